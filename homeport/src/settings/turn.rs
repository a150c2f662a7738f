//! The settings of the TURN server.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use service::settings::SettingsError;
use turn_server::{Credentials, ExternalIp, Quotas};

use super::{OneOrMany, Settings, everywhere};
use crate::client_config::{is_host, printed};
use crate::summary::TurnSummary;
use crate::turn_credentials::{CredentialRules, TurnPlace};
use crate::turn_servers::{SecretPrint, TurnServer, TurnServers};

/// `[turn]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TurnSettings {
    /// Where to listen for clients, UDP and TCP.
    pub(crate) listen: SocketAddr,
    /// Where to listen for clients with TLS, when there is a certificate; 443 gets through most firewalls. In one
    /// process (`homeport up`), the relay's port takes them too, so this may be `relay.listen`; if that is 443, apps are
    /// told of it rather than of this.
    pub(crate) listen_tls: SocketAddr,
    /// The address of relayed traffic: found (`"auto"`), given, `"public/private"` behind a one-to-one NAT (as on
    /// most clouds), or `"stun:host:port"` to ask a STUN server elsewhere for it; a list for both families. It is
    /// looked up again every three minutes.
    pub(crate) external_ip: OneOrMany,
    /// The ports of relayed traffic, as `"first-last"`.
    pub(crate) relay_ports: String,
    /// The realm of credentials.
    realm: String,
    /// Mints time-limited credentials: user `<expiry>:<name>`, password base64(HMAC-SHA1(secret, user)); a list takes
    /// several, of which the first mints. Without it, one is made up and kept in `seed.data`.
    pub(crate) secret: Option<OneOrMany>,
    /// Static users: `{ alice = "password" }`.
    users: BTreeMap<String, String>,
    /// Networks that may be relayed to although they are private, such as `["10.1.0.0/16"]`.
    allow_peers: Vec<IpNet>,
    /// Networks that may not be relayed to.
    deny_peers: Vec<IpNet>,
    /// Allocations at a time of one user; `0` sets no limit, here and below. All users of an app share one name.
    user_quota: usize,
    /// Allocations at a time of one IPv4 address or IPv6 /64.
    address_quota: usize,
    /// Allocations at a time of all.
    total_quota: usize,
    /// Bandwidth of one allocation, both directions together; what is over it is dropped.
    max_bytes_per_second: u64,
    /// Bandwidth of all allocations.
    total_bytes_per_second: u64,
    /// Seconds that an allocation lives without being refreshed, at most; at least 600.
    max_lifetime: u32,
    /// Seconds that allocations outlive their time-limited credential.
    credential_grace: u32,
    /// Answers a second to one address that has not proven who it is; five times as many may come at once.
    unauthenticated_per_second: u32,
    /// TCP and TLS connections at a time of one address.
    address_connections: usize,
    /// TCP and TLS connections at a time of all.
    pub(crate) max_connections: usize,
    /// Seconds that allocations live on after SIGTERM; new ones are refused meanwhile.
    pub(crate) drain: u32,
    /// Threads that relay; `0` means one for each core.
    threads: usize,
    /// Where the server is, in your words, such as `"eu"`: apps that ask for `/client-config.json?region=eu` are sent to it
    /// first, and those that name no region to the one that the relay has here.
    pub(crate) region: Option<String>,
    /// How much the server takes beside others of its region.
    pub(crate) weight: u32,
    /// Other TURN servers with the same secret, for apps. In a cluster they are known without it.
    pub(crate) servers: Vec<TurnServerSettings>,
    /// The name under which apps reach the server; with TLS, one that the certificate is for. Without it, the first
    /// name of `tls.acme`, or the external address.
    pub(crate) host: Option<String>,
    /// Seconds that credentials for apps are good.
    pub(crate) credentials_lifetime: u32,
    /// Whoever asks for credentials must show this as `Authorization: Bearer …`.
    pub(crate) credentials_token: Option<String>,
    /// Pages of these origins may ask for credentials; `*` is all of them.
    pub(crate) credentials_origins: Vec<String>,
    /// How often one IPv4 address or IPv6 /64 may ask for credentials; without `relay.trusted_proxy_header`, loopback
    /// has no limit.
    pub(crate) credentials_per_minute: u32,
}

/// `[[turn.servers]]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TurnServerSettings {
    /// The name or address under which apps reach it.
    host: String,
    /// Its port of UDP and TCP.
    port: u16,
    /// Its port of TLS, if it has one.
    tls_port: Option<u16>,
    /// Where it is.
    region: Option<String>,
    /// How much it takes beside others of its region.
    weight: u32,
}

impl Default for TurnServerSettings {
    fn default() -> Self {
        Self { host: String::new(), port: 3478, tls_port: None, region: None, weight: 1 }
    }
}

impl TurnServerSettings {
    fn server(&self) -> Result<TurnServer, SettingsError> {
        if !is_host(&self.host) || self.host.contains(':') && !self.host.starts_with('[') {
            return Err(SettingsError::of("turn.servers.host", format_args!("{:?} is no name or address", self.host)));
        }
        let place = TurnPlace { host: self.host.clone(), port: self.port, tls_port: self.tls_port };
        Ok(TurnServer { place, region: self.region.clone(), weight: self.weight })
    }
}

impl fmt::Debug for TurnSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TurnSettings").field("listen", &self.listen).finish_non_exhaustive()
    }
}

impl Default for TurnSettings {
    fn default() -> Self {
        let limits = turn_server::Limits::default();
        Self {
            listen: everywhere(3478),
            listen_tls: everywhere(5349),
            external_ip: OneOrMany::One("auto".into()),
            relay_ports: "49152-65535".into(),
            realm: "homeport".into(),
            secret: None,
            users: BTreeMap::new(),
            allow_peers: Vec::new(),
            deny_peers: Vec::new(),
            user_quota: limits.allocations.user,
            address_quota: limits.allocations.address,
            total_quota: limits.allocations.total,
            max_bytes_per_second: limits.allocation_bytes_per_second,
            total_bytes_per_second: limits.total_bytes_per_second,
            max_lifetime: 3_600,
            credential_grace: 600,
            unauthenticated_per_second: limits.unauthenticated_per_second,
            address_connections: limits.address_connections,
            max_connections: limits.connections,
            drain: 0,
            threads: 0,
            region: None,
            weight: 1,
            servers: Vec::new(),
            host: None,
            credentials_lifetime: 86_400,
            credentials_token: None,
            credentials_origins: vec!["*".into()],
            credentials_per_minute: 60,
        }
    }
}

impl Settings {
    /// The TURN server's configuration; `with_relay` in one process with the relay, which hands it those of its clients
    /// that speak STUN.
    pub(crate) fn turn(&self, with_relay: bool) -> Result<turn_server::Config, SettingsError> {
        let turn = &self.turn;
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        // Then it is the relay that listens there. Port 0 is another one each time.
        let is_of_relay = turn.listen_tls == self.relay.listen && turn.listen_tls.port() != 0;
        Ok(turn_server::Config {
            listen: turn.listen,
            listen_tls: turn.listen_tls,
            tls: self.tls_files()?.filter(|_| !(with_relay && is_of_relay)),
            external_ips: self.turn_external_ips()?,
            relay_ports: port_range(&turn.relay_ports)?,
            realm: turn.realm.clone(),
            credentials: self.turn_credentials(),
            limits: turn_server::Limits {
                allocations: Quotas { user: turn.user_quota, address: turn.address_quota, total: turn.total_quota },
                allocation_bytes_per_second: turn.max_bytes_per_second,
                total_bytes_per_second: turn.total_bytes_per_second,
                lifetime: seconds(turn.max_lifetime),
                credential_grace: seconds(turn.credential_grace),
                unauthenticated_per_second: turn.unauthenticated_per_second,
                address_connections: turn.address_connections,
                connections: turn.max_connections,
                ..turn_server::Limits::default()
            },
            allow_peers: turn.allow_peers.clone(),
            deny_peers: turn.deny_peers.clone(),
            drain: seconds(turn.drain),
            threads: turn.threads,
        })
    }

    /// Who may use the TURN server.
    pub(crate) fn turn_credentials(&self) -> Credentials {
        let secrets = self.turn.secret.as_ref().map_or(&[][..], OneOrMany::as_slice);
        Credentials { users: self.turn.users.clone(), secrets: secrets.to_vec() }
    }

    /// The addresses of allocations as set.
    pub(crate) fn turn_external_ips(&self) -> Result<Vec<ExternalIp>, SettingsError> {
        let texts = self.turn.external_ip.as_slice().iter();
        texts.map(|text| text.parse().map_err(|error| SettingsError::of("turn.external_ip", error))).collect()
    }

    /// Where the TURN server of these settings is, if it runs elsewhere.
    pub(crate) async fn turn_place(&self) -> Result<TurnSummary, SettingsError> {
        let addresses = turn_server::Addresses::find(&self.turn_external_ips()?, self.turn.listen.ip()).await;
        Ok(TurnSummary {
            external_ip: addresses.main(),
            port: self.turn.listen.port(),
            tls_port: self.tls_files()?.map(|_| self.turn.listen_tls.port()),
        })
    }

    /// The port of TLS that apps are told of, of a TURN server in one process with the relay; `own` is the server's own, if
    /// it has one.
    pub(crate) fn turn_tls_port(&self, own: Option<u16>) -> Option<u16> {
        let relay = self.relay.listen;
        let is_beside_turn = relay.ip().is_unspecified() || relay.ip() == self.turn.listen_tls.ip();
        // More networks let 443 out than any other port, and whoever signals through it gets there.
        let is_better = relay.port() == 443 && is_beside_turn;
        own.filter(|_| !is_better).or(self.has_tls().then_some(relay.port()))
    }

    /// A TURN server of these settings, as apps reach it.
    pub(crate) fn turn_server(&self, own: TurnSummary) -> TurnServer {
        let host = self.turn.host.clone().or_else(|| self.host().map(str::to_owned));
        let host = host.unwrap_or_else(|| printed(own.external_ip));
        let place = TurnPlace { host, port: own.port, tls_port: own.tls_port };
        TurnServer { place, region: self.turn.region.clone(), weight: self.turn.weight }
    }

    /// The TURN servers that the settings name.
    pub(super) fn other_turn_servers(&self) -> Result<Vec<TurnServer>, SettingsError> {
        self.turn.servers.iter().map(TurnServerSettings::server).collect()
    }

    /// The TURN servers for apps. `own` is that of this process, if there is one; in a cluster it says so itself.
    pub(crate) async fn turn_servers(
        &self,
        own: Option<TurnSummary>,
        in_cluster: bool,
    ) -> Result<TurnServers, SettingsError> {
        let mut fixed = self.other_turn_servers()?;
        match own {
            Some(own) if !in_cluster => fixed.push(self.turn_server(own)),
            // Where none is named, the settings tell of one: `auto` then means that it is on this machine.
            None if !in_cluster && fixed.is_empty() => fixed.push(self.turn_server(self.turn_place().await?)),
            _ => {}
        }
        let secret = self.turn_credentials().secrets.first().map(|secret| SecretPrint::of(secret));
        Ok(TurnServers::new(fixed, self.turn.region.clone(), secret))
    }

    /// Who gets credentials for TURN.
    pub(crate) fn credential_rules(&self) -> Result<CredentialRules, SettingsError> {
        Ok(CredentialRules {
            lifetime: Duration::from_secs(self.turn.credentials_lifetime.into()),
            token: self.turn.credentials_token.clone(),
            origins: self.turn.credentials_origins.clone(),
            per_minute: self.turn.credentials_per_minute,
            proxy_header: self.proxy_header()?,
        })
    }

    /// The header in which a trusted proxy says who the client is.
    pub(crate) fn proxy_header(&self) -> Result<Option<axum::http::HeaderName>, SettingsError> {
        let header = self.relay.trusted_proxy_header.as_deref();
        let header = header.map(axum::http::HeaderName::try_from).transpose();
        header.map_err(|_| SettingsError::of("relay.trusted_proxy_header", "that is no name of a header"))
    }
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, SettingsError> {
    let range = text.split_once('-').and_then(|(first, last)| {
        let range = first.trim().parse::<u16>().ok()?..=last.trim().parse::<u16>().ok()?;
        (*range.start() > 0 && !range.is_empty()).then_some(range)
    });
    range.ok_or_else(|| SettingsError::of("turn.relay_ports", format_args!("expected \"first-last\", found {text:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apps_are_told_of_the_port_of_tls_that_most_networks_let_out() {
        let told = |relay: &str, turn: &str, has_tls| {
            let mut settings = Settings::default();
            (settings.relay.listen, settings.turn.listen_tls) = (relay.parse().unwrap(), turn.parse().unwrap());
            if has_tls {
                settings.tls.acme.domains = vec!["relay.example.com".into()];
            }
            let own = settings.turn(true).unwrap().tls.map(|_| settings.turn.listen_tls.port());
            (own, settings.turn_tls_port(own))
        };
        assert_eq!(told("[::]:443", "[::]:5349", false), (None, None));
        assert_eq!(told("[::]:8080", "[::]:5349", true), (Some(5349), Some(5349)));
        assert_eq!(told("[::]:443", "[::]:5349", true), (Some(5349), Some(443)));
        assert_eq!(told("203.0.113.7:443", "203.0.113.8:5349", true), (Some(5349), Some(5349)));
        assert_eq!(told("[::]:8443", "[::]:8443", true), (None, Some(8443)), "the relay listens there for both");
        assert_eq!(told("[::]:0", "[::]:0", true).0, Some(0), "each is given a port of its own");
    }
}
