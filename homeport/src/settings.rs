//! The settings of all services, as file and environment spell them.

#[cfg(test)]
mod reference;
mod seed;
mod turn;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::providers::Serialized;
use figment::value::Dict;
use seed_peer::RelayKey;
use serde::{Deserialize, Serialize};
use service::TlsFiles;
use service::settings::SettingsError;
use sha2::{Digest as _, Sha256};

use crate::acme::AcmeFolder;
use crate::status;

pub(crate) use self::seed::{CellsSettings, SeedSettings, super_admins};
pub(crate) use self::turn::TurnSettings;

/// The file that is read when it is there and no other is named.
pub(crate) const DEFAULT_FILE: &str = "homeport.toml";

/// Everything that can be set.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    pub(crate) relay: RelaySettings,
    pub(crate) turn: TurnSettings,
    pub(crate) seed: SeedSettings,
    pub(crate) metrics: MetricsSettings,
    tls: TlsSettings,
}

/// `[relay]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RelaySettings {
    /// Where to listen for WebSocket and HTTP; `[::]` takes IPv4 too. With a certificate, connections may come with
    /// TLS and without.
    pub(crate) listen: SocketAddr,
    /// The relay's address for apps, such as `"wss://relay.example.com"`; without it, the first name of `tls.acme`,
    /// or the address asked.
    pub(crate) public_url: Option<String>,
    /// Whom the relay serves: `"open"` everybody; `"rooms"` only the topics of `[[seed.room]]`; `"auth"` only clients
    /// that prove a key of `relay.allowed_pubkeys` (NIP-42).
    admission: Admission,
    /// Nostr public keys in hex; the seed of the same process is always one of them.
    allowed_pubkeys: Vec<String>,
    /// Connections at a time.
    pub(crate) max_connections: usize,
    /// Bytes of one message.
    max_message_bytes: usize,
    /// Connections at a time of one IPv4 address or IPv6 /64; `0` sets no limit, here and below.
    max_connections_per_address: usize,
    /// Messages a second of one connection; five times as many may come at once.
    messages_per_second: u32,
    /// Bytes of messages a second of one connection; five times as many may come at once.
    bytes_per_second: u32,
    /// Signatures a second that are checked for one address; five times as many may come at once.
    verifications_per_second: u32,
    /// Where a proxy in front says who the client is, such as `"x-forwarded-for"`; without it, loopback has no limit
    /// per address.
    trusted_proxy_header: Option<String>,
    /// Whether events that are not ephemeral are kept, in the folder `events` of `seed.data`; signalling needs none.
    store: bool,
    /// Bytes that kept events may take.
    store_max_bytes: usize,
    /// How far the clocks of two clients may be apart before a `since` costs an ephemeral event.
    clock_skew_seconds: u64,
    /// Leading zero bits that an event's id must have (NIP-13).
    min_pow_difficulty: u32,
    /// Announces a second that one subscriber gets per topic; `0` passes every one on.
    announce_budget: u32,
    /// The longest time between two announces of one peer to one subscriber.
    announce_max_interval_seconds: u64,
    /// Whether it is watched what becomes of offers between peers.
    dial_ledger: bool,
    /// Whether `/monitor.js` is served, and what it reports is taken.
    pub(crate) reports: bool,
    /// Who shows it sees names, drawings and reasons on the status page.
    pub(crate) status_token: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Admission {
    Open,
    Rooms,
    Auth,
}

/// One text, or a list of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged, from = "Spelled")]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// As it stands in a file; in the environment, a list is text like `["one", "other"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Spelled {
    Text(String),
    List(Vec<String>),
}

impl From<Spelled> for OneOrMany {
    fn from(spelled: Spelled) -> Self {
        match spelled {
            Spelled::Text(text) => serde_json::from_str(&text).map_or(Self::One(text), Self::Many),
            Spelled::List(list) => Self::Many(list),
        }
    }
}

impl OneOrMany {
    pub(crate) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// `[metrics]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MetricsSettings {
    /// Where to listen for `/metrics`, `/healthz` and `/readyz`.
    pub(crate) listen: SocketAddr,
    /// Whether each service of the process is tried out once a minute, as a client would.
    pub(crate) probe: bool,
}

/// `[tls]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TlsSettings {
    /// The file of the certificate and those that lead to its root, in PEM; read again when it changes. For relay and TURN.
    cert: Option<PathBuf>,
    /// The file of the certificate's private key, in PEM; read again when it changes.
    key: Option<PathBuf>,
    /// A certificate that is asked for and renewed by itself.
    acme: AcmeSettings,
}

/// `[tls.acme]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct AcmeSettings {
    /// The names that the certificate is to be for; apps reach the services under the first.
    pub(crate) domains: Vec<String>,
    /// Where the certificate authority may write to.
    pub(crate) email: Option<String>,
    /// The certificate authority's directory; Let's Encrypt's without it.
    pub(crate) directory: String,
    /// Where to answer the certificate authority, which asks at port 80 of each domain.
    pub(crate) listen: SocketAddr,
    /// The root of the certificate authority's own certificate, in PEM, if this machine does not know it.
    pub(crate) ca: Option<PathBuf>,
}

impl Default for AcmeSettings {
    fn default() -> Self {
        Self {
            domains: Vec::new(),
            email: None,
            directory: instant_acme::LetsEncrypt::Production.url().to_owned(),
            listen: everywhere(80),
            ca: None,
        }
    }
}

impl AcmeSettings {
    fn check(&self) -> Result<(), SettingsError> {
        if self.domains.is_empty() && *self != Self::default() {
            return Err(SettingsError::of("tls.acme.domains", "a certificate needs a name, such as relay.example.com"));
        }
        let is_name = |name: &String| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
            !name.is_empty() && name.bytes().all(allowed) && name.parse::<std::net::IpAddr>().is_err()
        };
        match self.domains.iter().find(|name| !is_name(name)) {
            // The challenge proves one host, so there are no wildcards.
            Some(name) => Err(SettingsError::of("tls.acme.domains", format_args!("{name:?} is no name of a host"))),
            None => Ok(()),
        }
    }
}

impl TlsSettings {
    fn files(&self, data: &Path) -> Result<Option<TlsFiles>, SettingsError> {
        let asks = !self.acme.domains.is_empty();
        match (&self.cert, &self.key) {
            (None, None) => Ok(asks.then(|| AcmeFolder::in_data(data).files())),
            _ if asks => {
                Err(SettingsError::of("tls.acme", "with the files of a certificate, none is asked for: take one out"))
            }
            (Some(cert), Some(key)) => Ok(Some(TlsFiles {
                cert: cert.clone(),
                key: key.clone(),
                may_come_later: false,
                check_every: Duration::from_secs(30),
            })),
            (None, _) => Err(SettingsError::of("tls.cert", "TLS needs the file of a certificate")),
            (_, None) => Err(SettingsError::of("tls.key", "TLS needs the file of the certificate's key")),
        }
    }
}

/// All addresses of this machine, of both families.
fn everywhere(port: u16) -> SocketAddr {
    SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port))
}

impl Default for RelaySettings {
    fn default() -> Self {
        let limits = relay::Limits::default();
        let rates = relay::Rates::default();
        let announces = relay::AnnounceEconomy::default();
        Self {
            listen: everywhere(8080),
            public_url: None,
            admission: Admission::Open,
            allowed_pubkeys: Vec::new(),
            max_connections: limits.connections,
            max_message_bytes: limits.message_bytes,
            max_connections_per_address: rates.address_connections,
            messages_per_second: rates.messages,
            bytes_per_second: rates.bytes,
            verifications_per_second: rates.verifications,
            trusted_proxy_header: None,
            store: false,
            store_max_bytes: 1 << 30,
            clock_skew_seconds: limits.clock_skew_seconds,
            min_pow_difficulty: 0,
            announce_budget: announces.budget,
            announce_max_interval_seconds: announces.max_interval.as_secs(),
            dial_ledger: true,
            reports: true,
            status_token: None,
        }
    }
}

impl Default for MetricsSettings {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9464)), probe: true }
    }
}

/// Loads the settings: defaults, then file, then environment, then what the command line says.
pub(crate) fn load(file: Option<&Path>, data: Option<&Path>, rooms: &[String]) -> Result<Settings, SettingsError> {
    let default = Path::new(DEFAULT_FILE);
    let file = file.or_else(|| Some(default).filter(|file| file.exists()));
    // Names that are not UTF-8 are nobody's settings.
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    read(file, environment, data, rooms)
}

fn read(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    data: Option<&Path>,
    rooms: &[String],
) -> Result<Settings, SettingsError> {
    let flags = Serialized::defaults(Dict::new());
    let mut settings: Settings = service::settings::load(file, environment, flags)?;
    if let Some(data) = data {
        data.clone_into(&mut settings.seed.data);
    }
    for name in rooms {
        settings.seed.add_room(name);
    }
    settings.forget_empty();
    settings.check()?;
    Ok(settings)
}

impl Settings {
    /// The certificate of relay and TURN.
    pub(crate) fn tls_files(&self) -> Result<Option<TlsFiles>, SettingsError> {
        self.tls.files(&self.seed.data)
    }

    /// Whether relay and TURN have a certificate.
    pub(crate) fn has_tls(&self) -> bool {
        self.tls.cert.is_some() || self.acme().is_some()
    }

    /// Whether there is something in the settings that others must not know.
    pub(crate) fn holds_secrets(&self) -> bool {
        let credentials = self.turn_credentials();
        !credentials.secrets.is_empty()
            || !credentials.users.is_empty()
            || self.relay.status_token.is_some()
            || self.turn.credentials_token.is_some()
            || self.seed.holds_secrets()
    }

    /// What the processes of docker compose are told by the environment.
    pub(crate) fn compose_variables(&self) -> Vec<(&'static str, String)> {
        // Names of rooms are text without control characters by then: TOML's spelling is JSON's.
        let rooms: Vec<String> = self
            .seed
            .room
            .iter()
            .map(|room| format!("{{name={}}}", serde_json::Value::from(room.name.as_str())))
            .collect();
        let mut list = vec![
            ("HOMEPORT_TURN__EXTERNAL_IP", self.turn.external_ip.as_slice().join(",")),
            ("HOMEPORT_SEED__ROOM", format!("[{}]", rooms.join(","))),
        ];
        if let Some(secret) = self.turn_credentials().secrets.first() {
            list.push(("HOMEPORT_TURN__SECRET", secret.clone()));
        }
        if let Some(token) = &self.relay.status_token {
            list.push(("HOMEPORT_RELAY__STATUS_TOKEN", token.clone()));
        }
        if let Some(url) = self.relay_url() {
            list.push(("HOMEPORT_RELAY__PUBLIC_URL", url));
        }
        if let Some(host) = self.turn.host.clone().or_else(|| self.host().map(str::to_owned)) {
            list.push(("HOMEPORT_TURN__HOST", host));
        }
        list
    }

    /// How a certificate is asked for.
    pub(crate) fn acme(&self) -> Option<&AcmeSettings> {
        Some(&self.tls.acme).filter(|acme| !acme.domains.is_empty())
    }

    /// The name under which apps reach the services, as far as it is known.
    pub(crate) fn host(&self) -> Option<&str> {
        self.acme()?.domains.first().map(String::as_str)
    }

    /// The address under which apps reach the relay, if it is set or follows from the certificate's name.
    pub(crate) fn relay_url(&self) -> Option<String> {
        let of_host = |host: &str| match self.relay.listen.port() {
            443 => format!("wss://{host}"),
            port => format!("wss://{host}:{port}"),
        };
        self.relay.public_url.clone().or_else(|| self.host().map(of_host))
    }

    /// Takes what is set to nothing for not set: docker compose cannot leave a variable out.
    fn forget_empty(&mut self) {
        let RelaySettings { public_url, trusted_proxy_header, status_token, .. } = &mut self.relay;
        let TurnSettings { host, credentials_token, secret, .. } = &mut self.turn;
        for text in [public_url, trusted_proxy_header, status_token, host, credentials_token] {
            text.take_if(|text| text.is_empty());
        }
        secret.take_if(|secret| secret.as_slice().iter().all(String::is_empty));
    }

    /// Refuses what cannot be.
    fn check(&self) -> Result<(), SettingsError> {
        self.tls_files()?;
        self.tls.acme.check()?;
        if self.relay.admission == Admission::Rooms && self.seed.room.is_empty() {
            return Err(SettingsError::of("relay.admission", "\"rooms\" needs a [[seed.room]], or nobody is served"));
        }
        self.seed.check()
    }

    /// The relay's configuration; `routes` are pages besides its own, `own` are the keys of who asks it from this
    /// process.
    pub(crate) fn relay(&self, routes: axum::Router, own: &[&RelayKey]) -> Result<relay::Config, SettingsError> {
        let admission = match self.relay.admission {
            Admission::Open => relay::Admission::Open,
            Admission::Rooms => relay::Admission::Rooms(self.seed.room.iter().map(|room| room.name.clone()).collect()),
            Admission::Auth => {
                let listed = self.relay.allowed_pubkeys.iter().map(|text| public_key(text));
                relay::Admission::Auth(
                    listed.chain(own.iter().map(|key| Ok(key.public_key()))).collect::<Result<_, _>>()?,
                )
            }
        };
        let limits = relay::Limits {
            connections: self.relay.max_connections,
            message_bytes: self.relay.max_message_bytes,
            clock_skew_seconds: self.relay.clock_skew_seconds,
            difficulty: self.relay.min_pow_difficulty,
            ..relay::Limits::default()
        };
        let announces = relay::AnnounceEconomy {
            budget: self.relay.announce_budget,
            max_interval: Duration::from_secs(self.relay.announce_max_interval_seconds),
        };
        let rates = relay::Rates {
            messages: self.relay.messages_per_second,
            bytes: self.relay.bytes_per_second,
            verifications: self.relay.verifications_per_second,
            address_connections: self.relay.max_connections_per_address,
        };
        Ok(relay::Config {
            listen: self.relay.listen,
            tls: self.tls_files()?,
            limits,
            rates,
            trusted_proxy_header: self.relay.trusted_proxy_header.clone(),
            store: self.relay.store.then(|| relay::StoreConfig {
                folder: self.seed.data.join("events"),
                max_bytes: self.relay.store_max_bytes,
            }),
            admission,
            public_url: self.relay_url(),
            announces,
            dial_ledger: self.relay.dial_ledger,
            page: relay::Page { html: status::PAGE, content_security_policy: status::CONTENT_SECURITY_POLICY },
            routes,
        })
    }

    /// The name of the room in which links with the seed are tried. Who knows it sees the addresses of who tries, so it
    /// follows from what only these settings hold; the processes of one Homeport find the same.
    pub(crate) fn check_room(&self) -> String {
        let mut hash = Sha256::new_with_prefix("homeport check room");
        let names = || self.seed.room.iter().map(|room| room.name.as_str()).collect::<Vec<_>>().join("\0");
        // Rooms may be named on the command line of one process alone, so they only count where there is no secret.
        hash.update(self.turn_credentials().secrets.into_iter().next().unwrap_or_else(names));
        format!("homeport-check-{}", &hex::encode(hash.finalize())[..32])
    }

    /// The key that the seed signs its events to relays with: the one that is set, or a new one.
    pub(crate) fn relay_key(&self) -> Result<RelayKey, SettingsError> {
        match &self.seed.relay_key {
            Some(text) => RelayKey::parse(text).map_err(|error| SettingsError::of("seed.relay_key", error)),
            None => Ok(RelayKey::generate()),
        }
    }
}

/// A public key as 64 digits of hex.
fn public_key(text: &str) -> Result<[u8; 32], SettingsError> {
    let mut key = [0; 32];
    hex::decode_to_slice(text, &mut key)
        .map(|()| key)
        .map_err(|_| SettingsError::of("relay.allowed_pubkeys", format_args!("{text:?} is not 64 digits of hex")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Settings, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("homeport.toml");
        std::fs::write(&path, text).unwrap();
        read(Some(&path), [], None, &["extra".into()]).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_full_file_is_understood() {
        let settings = of(r#"
            [relay]
            listen = "127.0.0.1:9001"
            public_url = "wss://relay.example.com"
            admission = "open"
            [turn]
            listen = "127.0.0.1:9002"
            external_ip = ["203.0.113.7/10.0.0.2"]
            relay_ports = "50000-50100"
            secret = "north"
            users = { alice = "password" }
            [seed]
            listen = "127.0.0.1:9003"
            data = "/somewhere"
            relays = ["wss://relay.example.org"]
            [[seed.room]]
            name = "my-app"
            password = "pw"
            [[seed.room]]
            name = "crowd"
            cells = { cell_size = 5, bridge = "every" }
            [[seed.room]]
            name = "mesh"
            cells = false
            [[seed.room]]
            name = "default"
            cells = true
            [metrics]
            listen = "127.0.0.1:9004"
            "#)
        .unwrap();
        let turn = settings.turn().unwrap();
        assert_eq!(turn.relay_ports, 50_000..=50_100);
        assert_eq!(turn.credentials.users["alice"], "password");
        let seed = settings.seed(Some("ws://127.0.0.1:9001/".into()), settings.relay_key().unwrap()).await.unwrap();
        assert_eq!(seed.relays, ["ws://127.0.0.1:9001/", "wss://relay.example.org"]);
        assert_eq!(
            seed.rooms.iter().map(|room| room.name.as_str()).collect::<Vec<_>>(),
            ["my-app", "crowd", "mesh", "default", "extra"]
        );
        let cells = |cell_size, bridge| Some(seed_peer::CellsConfig { cell_size, bridge });
        let [_, crowd, mesh, default, _] = &seed.rooms[..] else { panic!("five rooms") };
        assert_eq!(crowd.cells, cells(5, seed_peer::Bridge::Every));
        assert_eq!((mesh.cells, default.cells), (None, cells(10, seed_peer::Bridge::One)));
        assert_eq!(seed.keep, None);
        // The seed stands behind the same mapping as TURN.
        assert_eq!(seed.external.map(|external| external.public.to_string()).as_deref(), Some("203.0.113.7"));
        assert!(!format!("{settings:?}").contains("north"));
    }

    #[test]
    fn what_is_set_to_nothing_is_not_set() {
        let settings =
            of("[relay]\npublic_url = \"\"\nstatus_token = \"\"\n[turn]\nsecret = \"\"\nhost = \"\"").unwrap();
        assert_eq!((settings.relay.public_url.clone(), settings.relay.status_token.clone()), (None, None));
        // An empty secret would let everybody in.
        assert!(settings.turn_credentials().secrets.is_empty() && settings.turn.host.is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("[relay]\nlisten = 8080", "relay.listen"),
            ("[relay]\nlisten = \"8080\"", "relay.listen"),
            ("[relay]\nadmision = \"open\"", "relay.admission"),
            ("[relay]\nadmission = \"nobody\"", "relay.admission"),
            ("[relay]\nadmission = \"auth\"\nallowed_pubkeys = [\"xyz\"]", "relay.allowed_pubkeys"),
            ("[seed]\nrelay_key = \"xyz\"", "seed.relay_key"),
            ("[turn]\nrelay_ports = \"5000\"", "turn.relay_ports"),
            ("[turn]\nrelay_ports = \"6000-5000\"", "turn.relay_ports"),
            ("[turn]\nexternal_ip = \"example.com\"", "turn.external_ip"),
            ("[[seed.room]]\npasword = \"x\"", "password"),
            ("[[seed.room]]\nname = \"\"", "seed.room.name"),
            ("[[seed.room]]\nname = \"a\"\n[[seed.room]]\nname = \"a\"", "twice"),
            ("[[seed.room]]\nname = \"a\"\ncells = { cell_size = 1, bridge = \"every\" }", "seed.room.cells.cell_size"),
            ("[[seed.room]]\nname = \"a\"\ncells = { cell_size = 0 }", "seed.room.cells.cell_size"),
            ("[[seed.room]]\nname = \"a\"\ncells = { bridge = \"two\" }", "bridge"),
            ("[[seed.room]]\nname = \"a\"\ncells = { size = 5 }", "cells.size"),
            ("[[seed.room]]\nname = \"a\"\ncells = 5", "cells"),
            ("[tls]\ncert = \"x\"", "tls.key"),
            ("[tls]\nacme = { email = \"a@b.example\" }", "tls.acme.domains"),
            ("[tls]\nacme = { domains = [\"*.example.com\"] }", "tls.acme.domains"),
            ("[tls]\nacme = { domains = [\"192.0.2.1\"] }", "tls.acme.domains"),
            ("[tls]\nacme = { domain = \"a.example\" }", "domain"),
            ("[tls]\ncert = \"x\"\nacme = { domains = [\"a.example\"] }", "tls.acme"),
            ("[seed]\nkeep = \"90 parsecs\"", "seed.keep"),
            ("[seed]\nrelays = [\"https://x\"]", "seed.relays"),
            ("[seeds]\ndata = \"x\"", "seed"),
        ] {
            let error = match of(text) {
                Ok(settings) => settings
                    .turn()
                    .and_then(|_| settings.relay_key())
                    .and_then(|key| settings.relay(axum::Router::new(), &[&key]))
                    .map(|_| ())
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error),
            };
            let message = error.unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn a_list_in_the_environment_is_a_list_and_other_text_is_text() {
        let many = |text: &str| OneOrMany::from(Spelled::Text(text.into())).as_slice().to_vec();
        assert_eq!(many(r#"["127.0.0.1", "::1"]"#), ["127.0.0.1", "::1"]);
        for one in ["auto", "123456", "[1,2]", "[", "[\"a\"", "\"quoted\""] {
            assert_eq!(many(one), [one]);
        }
    }
}
