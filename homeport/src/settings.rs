//! The settings of all services, as file and environment spell them.

mod cluster;
#[cfg(test)]
mod reference;
mod relay;
mod seed;
mod tls;
mod turn;

use std::net::SocketAddr;
use std::path::Path;

use figment::providers::Serialized;
use figment::value::Dict;
use seed_peer::RelayKey;
use serde::{Deserialize, Serialize};
use service::settings::SettingsError;
use sha2::{Digest as _, Sha256};

use self::cluster::ClusterSettings;
use self::relay::Admission;
pub(crate) use self::relay::RelaySettings;
pub(crate) use self::seed::{CellsSettings, SeedSettings, super_admins};
use self::tls::TlsSettings;
pub(crate) use self::tls::{AcmeChallenge, AcmeSettings};
pub(crate) use self::turn::TurnSettings;

/// The file that is read when it is there and no other is named.
pub(crate) const DEFAULT_FILE: &str = "homeport.toml";
/// The file of the installed service (`deploy/systemd`), which is read when neither of those is.
pub(crate) const SYSTEM_FILE: &str = "/etc/homeport/homeport.toml";

/// Everything that can be set.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    pub(crate) relay: RelaySettings,
    pub(crate) turn: TurnSettings,
    pub(crate) seed: SeedSettings,
    pub(crate) metrics: MetricsSettings,
    tls: TlsSettings,
    cluster: ClusterSettings,
}

/// One text, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Where other processes of this Homeport have their `metrics.listen`: the status page shows them as well.
    pub(crate) others: Vec<SocketAddr>,
}

/// All addresses of this machine, of both families.
fn everywhere(port: u16) -> SocketAddr {
    SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port))
}

impl Default for MetricsSettings {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9464)), probe: true, others: Vec::new() }
    }
}

/// The settings file: the one that is named, or the first of those that are looked for.
pub(crate) fn file(named: Option<&Path>) -> Option<&Path> {
    named.or_else(|| [DEFAULT_FILE, SYSTEM_FILE].into_iter().map(Path::new).find(|file| file.exists()))
}

/// Loads the settings: defaults, then file, then environment, then what the command line says.
pub(crate) fn load(file: Option<&Path>, data: Option<&Path>, rooms: &[String]) -> Result<Settings, SettingsError> {
    let file = self::file(file);
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
    /// Whether there is something in the settings that others must not know.
    pub(crate) fn holds_secrets(&self) -> bool {
        let credentials = self.turn_credentials();
        !credentials.secrets.is_empty()
            || !credentials.users.is_empty()
            || self.relay.status_token.is_some()
            || self.turn.credentials_token.is_some()
            || self.seed.holds_secrets()
            || self.cluster.holds_secrets()
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

    /// Takes what is set to nothing for not set: docker compose cannot leave a variable out.
    fn forget_empty(&mut self) {
        let RelaySettings { public_url, trusted_proxy_header, status_token, .. } = &mut self.relay;
        let TurnSettings { host, credentials_token, secret, region, .. } = &mut self.turn;
        for text in [public_url, trusted_proxy_header, status_token, host, credentials_token, region] {
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
        let turn = settings.turn(true).unwrap();
        assert_eq!(turn.relay_ports, 50_000..=50_100);
        assert_eq!(turn.credentials.users["alice"], "password");
        let seed =
            settings.seed(Some("ws://127.0.0.1:9001/".into()), settings.relay_key().unwrap(), None).await.unwrap();
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
            ("[[turn.servers]]\nregion = \"eu\"", "turn.servers.host"),
            ("[[turn.servers]]\nhost = \"turn:a.example\"", "turn.servers.host"),
            ("[cluster]\nname = \"a\"", "cluster.nats"),
            ("[cluster]\nnats = \"ftp://a\"", "cluster.nats"),
            ("[cluster]\nnats = \"nats://a\"\nname = \"a b\"", "cluster.name"),
            ("[cluster]\nnats = \"nats://a\"\nname = \"a\"\nuser = \"b\"", "cluster.password"),
            ("[cluster]\nnats = \"nats://a\"\nname = \"a\"\ntoken = \"b\"\ncredentials = \"c\"", "cluster"),
            ("[cluster]\nnat = \"nats://a\"", "cluster.nats"),
            ("[seed]\nkeep = \"90 parsecs\"", "seed.keep"),
            ("[seed]\nrelays = [\"https://x\"]", "seed.relays"),
            ("[seeds]\ndata = \"x\"", "seed"),
        ] {
            let error = match of(text) {
                Ok(settings) => settings
                    .turn(true)
                    .and_then(|_| settings.relay_key())
                    .and_then(|key| settings.relay(axum::Router::new(), &[&key], None, None, None))
                    .and_then(|_| settings.cluster())
                    .and_then(|_| settings.other_turn_servers())
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
