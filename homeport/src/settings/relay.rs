//! The settings of the relay.

use std::net::SocketAddr;
use std::time::Duration;

use seed_peer::RelayKey;
use serde::{Deserialize, Serialize};
use service::settings::SettingsError;
use service::{Cluster, Proofs, StunTaker};

use super::{Settings, everywhere};
use crate::status;

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
    pub(super) admission: Admission,
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
    pub(super) trusted_proxy_header: Option<String>,
    /// Whether events that are not ephemeral are kept, in the folder `events` of `seed.data`; signalling needs none.
    pub(crate) store: bool,
    /// Bytes that kept events may take.
    store_max_bytes: usize,
    /// How far the clocks of two clients may be apart before a `since` costs an ephemeral event.
    pub(crate) clock_skew_seconds: u64,
    /// Leading zero bits that an event's id must have (NIP-13).
    min_pow_difficulty: u32,
    /// Announces a second that one subscriber gets per topic; `0` passes every one on.
    announce_budget: u32,
    /// The longest time between two announces of one peer to one subscriber.
    announce_max_interval_seconds: u64,
    /// For how long it is remembered what a client of signalling asked for whose connection broke: some come back without asking
    /// again. `0` remembers nothing.
    resume_seconds: u64,
    /// Whether it is watched what becomes of offers between peers.
    dial_ledger: bool,
    /// Whether `/monitor.js` is served, and what it reports is taken.
    pub(crate) reports: bool,
    /// Who shows it sees names, drawings and reasons on the status page.
    pub(crate) status_token: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Admission {
    Open,
    Rooms,
    Auth,
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
            resume_seconds: 600,
            dial_ledger: true,
            reports: true,
            status_token: None,
        }
    }
}

impl Settings {
    /// The address under which apps reach the relay, if it is set or follows from the certificate's name.
    pub(crate) fn relay_url(&self) -> Option<String> {
        let of_host = |host: &str| match self.relay.listen.port() {
            443 => format!("wss://{host}"),
            port => format!("wss://{host}:{port}"),
        };
        self.relay.public_url.clone().or_else(|| self.host().map(of_host))
    }

    /// The relay's configuration; `routes` are pages besides its own, `own` are the keys of who asks it from this
    /// process, `cluster` is what it shares its clients with, `stun` who takes clients of TURN that come to its port.
    pub(crate) fn relay(
        &self,
        routes: axum::Router,
        own: &[&RelayKey],
        cluster: Option<Cluster>,
        stun: Option<StunTaker>,
        proofs: Option<Proofs>,
    ) -> Result<relay::Config, SettingsError> {
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
            proofs,
            stun,
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
            resume: relay::Resume {
                patience: Duration::from_secs(self.relay.resume_seconds),
                file: Some(self.seed.data.join("returning.jsonl")),
            },
            dial_ledger: self.relay.dial_ledger,
            page: relay::Page { html: status::PAGE, content_security_policy: status::CONTENT_SECURITY_POLICY },
            routes,
            cluster,
        })
    }
}

/// A public key as 64 digits of hex.
fn public_key(text: &str) -> Result<[u8; 32], SettingsError> {
    let mut key = [0; 32];
    hex::decode_to_slice(text, &mut key)
        .map(|()| key)
        .map_err(|_| SettingsError::of("relay.allowed_pubkeys", format_args!("{text:?} is not 64 digits of hex")))
}
