//! The settings of the seed peer.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use genosdb::governance::Rules;
use genosdb::roles::{Role, Roles};
use genosdb::security::Policy;
use genosdb::signature::{Address, Identity};
use seed_peer::{
    BackupConfig, BackupTarget, Bounds, Bridge, CellsConfig, Config, ExternalAddress, RelayKey, RoomConfig, S3Settings,
    Security, SharedRooms,
};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use service::Cluster;
use service::settings::SettingsError;
use turn_server::ExternalIp;
use zeroize::Zeroizing;

use super::{Settings, everywhere};

/// `[seed]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SeedSettings {
    /// The UDP port of all WebRTC links.
    pub(crate) listen: SocketAddr,
    /// The folder of the archive; also `--data`.
    pub(crate) data: PathBuf,
    /// The Security Manager identity that signs: a mnemonic or a `0x` key.
    identity: Option<Zeroizing<String>>,
    /// A file that holds the identity instead.
    identity_file: Option<PathBuf>,
    /// The address under which peers reach the seed, as `turn.external_ip`, and by default the same.
    external_ip: Option<String>,
    /// Relays to meet peers through, besides our own in `homeport up`.
    pub(crate) relays: Vec<String>,
    /// The Nostr secret key that the seed's events to relays are signed with, for relays that ask (NIP-42); a new one
    /// at each start without it.
    pub(super) relay_key: Option<String>,
    /// The rooms to stay in; also `--room`.
    pub(crate) room: Vec<RoomSettings>,
    /// How long operations are kept as such, as `"90d"`; without it, for ever.
    keep: Option<String>,
    /// Links at a time.
    max_links: usize,
    /// Bytes of one message of a peer, inflated.
    max_message_bytes: usize,
    /// Operations a second of one peer, and ten times as many at once; what it sends when it joins is not meant; `0`
    /// sets no limit. What a peer passes on for others, as cells do, may be ten times as much.
    operations_per_second: u32,
    /// Whether what one peer of a full mesh writes is sent to the others as well, a quarter of a second later, for those
    /// who could not be linked with it. Costs each of them the same traffic once more.
    pass_on: bool,
    /// Bytes of a node's value.
    max_value_bytes: usize,
    /// Nodes of one room.
    max_nodes: u64,
    /// Bytes of the ids, values and edges of one room.
    max_room_bytes: u64,
    /// Backups of the archive.
    backup: Option<BackupSettings>,
}

/// `[seed.backup]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BackupSettings {
    /// A folder, or `s3://bucket/prefix`; without it there are no backups.
    to: String,
    /// How often, as `6h`.
    every: String,
    /// How often everything is written anew, as `7d`.
    full_every: String,
    /// How long backups are kept, as `30d`.
    keep: String,
    /// The address of a storage other than Amazon's; like the rest, else as `AWS_ENDPOINT`, … say.
    endpoint: Option<String>,
    /// The region of the storage.
    region: Option<String>,
    /// The id of its access key.
    access_key_id: Option<String>,
    /// The access key.
    secret_access_key: Option<Zeroizing<String>>,
}

impl Default for BackupSettings {
    fn default() -> Self {
        Self {
            to: String::new(),
            every: "6h".into(),
            full_every: "7d".into(),
            keep: "30d".into(),
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
        }
    }
}

impl BackupSettings {
    /// The place that `text` names, reached as the settings say.
    fn target(&self, text: &str) -> Result<BackupTarget, SettingsError> {
        let settings = S3Settings {
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            access_key_id: self.access_key_id.clone(),
            secret_access_key: self.secret_access_key.clone(),
        };
        BackupTarget::parse(text, &settings).map_err(|error| SettingsError::of("seed.backup.to", error))
    }

    fn config(&self) -> Result<BackupConfig, SettingsError> {
        let duration = |key: &str, text: &str| {
            let key = format!("seed.backup.{key}");
            match humantime::parse_duration(text) {
                Ok(duration) if duration >= Duration::from_secs(1) => Ok(duration),
                Ok(_) => Err(SettingsError::of(&key, "less than a second is too little")),
                Err(error) => Err(SettingsError::of(&key, format_args!("{error}; write it as \"6h\""))),
            }
        };
        Ok(BackupConfig {
            target: self.target(&self.to)?,
            every: duration("every", &self.every)?,
            full_every: duration("full_every", &self.full_every)?,
            keep: duration("keep", &self.keep)?,
        })
    }
}

impl fmt::Debug for SeedSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeedSettings").field("listen", &self.listen).finish_non_exhaustive()
    }
}

impl Default for SeedSettings {
    fn default() -> Self {
        let bounds = Bounds::default();
        Self {
            listen: everywhere(3479),
            data: "homeport-data".into(),
            identity: None,
            identity_file: None,
            external_ip: None,
            relays: Vec::new(),
            relay_key: None,
            room: Vec::new(),
            keep: None,
            max_links: 4_096,
            max_message_bytes: 64 << 20,
            operations_per_second: 1_000,
            pass_on: true,
            max_value_bytes: bounds.value_bytes,
            max_nodes: bounds.nodes,
            max_room_bytes: bounds.room_bytes,
            backup: None,
        }
    }
}

/// `[[seed.room]]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RoomSettings {
    /// The name of the app's database.
    pub(crate) name: String,
    /// `true` or `{ cell_size = 10, bridge = "one" }`, as the app's `rtc.cells`; without it, a full mesh.
    cells: Option<Cells>,
    /// The database's password, if it has one.
    password: Option<String>,
    /// Addresses of those who rule the room, as in the app's `sm.superAdmins`; what follows counts only with it.
    super_admins: Vec<String>,
    /// The app's own roles, besides the Security Manager's: `{ editor = { can = ["write", "link"], inherits = ["guest"] } }`.
    roles: BTreeMap<String, RoleSettings>,
    /// Whether nodes that name an `owner` are for that owner and its `collaborators`.
    acls: bool,
    /// Whether nodes in the full state of a peer that does not sign are taken, but for users' and those that are somebody's.
    accept_unsigned_states: bool,
    /// Rules by which the seed gives and takes roles.
    governance: Option<serde_json::Value>,
    /// A JSON file that holds the rules instead.
    governance_file: Option<PathBuf>,
}

impl Default for RoomSettings {
    fn default() -> Self {
        Self {
            name: String::new(),
            cells: None,
            password: None,
            super_admins: Vec::new(),
            roles: BTreeMap::new(),
            acls: true,
            accept_unsigned_states: false,
            governance: None,
            governance_file: None,
        }
    }
}

/// One of an app's own roles.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RoleSettings {
    /// What it may do.
    can: Vec<String>,
    /// The roles whose permissions it has as well.
    inherits: Vec<String>,
}

impl RoomSettings {
    /// Who rules the room, and how; `None` when nobody does.
    fn security(&self, signs: bool) -> Result<Option<Arc<Security>>, SettingsError> {
        let of = |key: &str, reason: &dyn fmt::Display| {
            SettingsError::of(&format!("seed.room.{key}"), format_args!("room {:?}: {reason}", self.name))
        };
        if self.super_admins.is_empty() {
            let idle = [
                ("roles", !self.roles.is_empty()),
                ("accept_unsigned_states", self.accept_unsigned_states),
                ("governance", self.governance.is_some()),
                ("governance_file", self.governance_file.is_some()),
            ];
            return match idle.iter().find(|(_, is_set)| *is_set) {
                Some((key, _)) => Err(of(key, &"it counts only in a room with super_admins")),
                None => Ok(None),
            };
        }
        let super_admins = super_admins(&self.super_admins).map_err(|reason| of("super_admins", &reason))?;
        let role = |(name, role): (&String, &RoleSettings)| {
            (name.clone(), Role { can: role.can.clone(), inherits: role.inherits.clone() })
        };
        let roles = Roles::with(&self.roles.iter().map(role).collect()).map_err(|error| of("roles", &error))?;
        let policy = Policy { super_admins, roles, acls: self.acls };
        let rules = match (&self.governance, &self.governance_file) {
            (None, None) => Rules::default(),
            (Some(_), Some(_)) => return Err(of("governance_file", &"the rules stand in governance as well")),
            (Some(rules), None) => {
                Rules::parse(&rules.to_string(), &policy).map_err(|error| of("governance", &error))?
            }
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| of("governance_file", &format_args!("{}: {error}", path.display())))?;
                Rules::parse(&text, &policy)
                    .map_err(|error| of("governance_file", &format_args!("{}: {error}", path.display())))?
            }
        };
        if !rules.is_empty() && !signs {
            return Err(of("governance", &"a seed without an identity can give no roles: set seed.identity"));
        }
        Ok(Some(Arc::new(Security { policy, unsigned_states: self.accept_unsigned_states, rules })))
    }

    fn config(&self, signs: bool) -> Result<RoomConfig, SettingsError> {
        let cells = match self.cells {
            None | Some(Cells::Switch(false)) => None,
            Some(Cells::Switch(true)) => Some(CellsSettings::default().config()),
            Some(Cells::Table(cells)) => Some(cells.config()),
        };
        Ok(RoomConfig {
            name: self.name.clone(),
            password: self.password.clone().unwrap_or_default(),
            cells,
            security: self.security(signs)?,
        })
    }
}

/// Parses the addresses of those who rule a room.
pub(crate) fn super_admins(texts: &[String]) -> Result<BTreeSet<Address>, String> {
    let parse = |text: &String| {
        Address::parse(text).ok_or_else(|| {
            format!("{text:?} is no address: 0x and 40 digits of hex, spelled as its owner's wallet shows it")
        })
    };
    texts.iter().map(parse).collect()
}

/// `true`, or how.
#[derive(Clone, Copy, Serialize)]
#[serde(untagged)]
enum Cells {
    Switch(bool),
    Table(CellsSettings),
}

/// Cells, as in the apps' `rtc.cells`, and what the seed is to them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CellsSettings {
    /// Peers of one cell, more or less.
    pub(crate) cell_size: usize,
    /// What the seed is to the cells: the bridge of its own (`"one"`), of every one (`"every"`), or a member like any other (`"off"`).
    pub(crate) bridge: Bridge,
}

impl Default for CellsSettings {
    fn default() -> Self {
        Self { cell_size: 10, bridge: Bridge::One }
    }
}

impl CellsSettings {
    pub(crate) fn config(self) -> CellsConfig {
        CellsConfig { cell_size: self.cell_size, bridge: self.bridge }
    }

    /// Why the cells cannot be, if they cannot.
    pub(crate) fn problem(self) -> Option<&'static str> {
        match (self.cell_size, self.bridge) {
            (0, _) => Some("a cell has at least one member"),
            (1, Bridge::Every) => Some("in cells of one, a bridge for each would be alone with itself: take 2 or more"),
            _ => None,
        }
    }
}

/// Unlike that of an untagged enum, the error names what is wrong inside the table.
impl<'de> Deserialize<'de> for Cells {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CellsVisitor;
        impl<'de> Visitor<'de> for CellsVisitor {
            type Value = Cells;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or { cell_size = …, bridge = … } for cells")
            }

            fn visit_bool<E>(self, switch: bool) -> Result<Cells, E> {
                Ok(Cells::Switch(switch))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Cells, A::Error> {
                CellsSettings::deserialize(MapAccessDeserializer::new(map)).map(Cells::Table)
            }
        }
        deserializer.deserialize_any(CellsVisitor)
    }
}

impl SeedSettings {
    /// Stays in one more room, in a full mesh, unless the settings name it already.
    pub(super) fn add_room(&mut self, name: &str) {
        if !self.room.iter().any(|room| room.name == name) {
            self.room.push(RoomSettings { name: name.to_owned(), ..RoomSettings::default() });
        }
    }

    /// Whether there is something in here that others must not know.
    pub(super) fn holds_secrets(&self) -> bool {
        self.relay_key.is_some()
            || self.identity.is_some()
            || self.backup.as_ref().is_some_and(|backup| backup.secret_access_key.is_some())
            || self.room.iter().any(|room| room.password.is_some())
    }

    /// Refuses what cannot be, or not yet.
    pub(super) fn check(&self) -> Result<(), SettingsError> {
        self.backup()?;
        let signs = self.identity()?.is_some();
        self.keep()?;
        let mut names = BTreeSet::new();
        for room in &self.room {
            if room.name.is_empty() {
                return Err(SettingsError::of("seed.room.name", "a room needs the name of its database"));
            }
            if !names.insert(&room.name) {
                return Err(SettingsError::of("seed.room.name", format_args!("{:?} stands there twice", room.name)));
            }
            if let Some(Cells::Table(cells)) = room.cells
                && let Some(problem) = cells.problem()
            {
                return Err(SettingsError::of("seed.room.cells.cell_size", problem));
            }
            room.security(signs)?;
        }
        for url in &self.relays {
            if !url.starts_with("ws://") && !url.starts_with("wss://") {
                return Err(SettingsError::of(
                    "seed.relays",
                    format_args!("{url:?} does not start with ws:// or wss://"),
                ));
            }
        }
        Ok(())
    }

    fn backup(&self) -> Result<Option<BackupConfig>, SettingsError> {
        self.backup.as_ref().map(BackupSettings::config).transpose()
    }

    /// How often backups are made, if they are.
    pub(crate) fn backup_interval(&self) -> Option<Duration> {
        self.backup().ok().flatten().map(|backup| backup.every)
    }

    /// Where backups are: at the place named on the command line, or that of the settings.
    pub(crate) fn backup_target(&self, named: Option<&str>) -> Result<BackupTarget, SettingsError> {
        match (named, &self.backup) {
            (Some(named), settings) => settings.clone().unwrap_or_default().target(named),
            (None, Some(settings)) => settings.target(&settings.to),
            (None, None) => Err(SettingsError::of("seed.backup.to", "it is not set: name a place on the command line")),
        }
    }

    /// The identity that signs, from wherever it stands.
    fn identity(&self) -> Result<Option<Arc<Identity>>, SettingsError> {
        let (key, text) = match (&self.identity, &self.identity_file) {
            (None, None) => return Ok(None),
            (Some(_), Some(_)) => {
                return Err(SettingsError::of("seed.identity_file", "the identity stands in seed.identity as well"));
            }
            (Some(text), None) => ("seed.identity", text.clone()),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path).map_err(|error| {
                    SettingsError::of("seed.identity_file", format_args!("{}: {error}", path.display()))
                })?;
                ("seed.identity_file", Zeroizing::new(text))
            }
        };
        let identity = Identity::parse(&text).map_err(|error| SettingsError::of(key, error))?;
        Ok(Some(Arc::new(identity)))
    }

    fn keep(&self) -> Result<Option<Duration>, SettingsError> {
        let parse = |text: &String| {
            humantime::parse_duration(text)
                .map_err(|error| SettingsError::of("seed.keep", format_args!("{error}; write it as \"90d\"")))
        };
        self.keep.as_ref().map(parse).transpose()
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            value_bytes: self.max_value_bytes,
            nodes: self.max_nodes,
            room_bytes: self.max_room_bytes,
            ..Bounds::default()
        }
    }
}

impl Settings {
    /// The seed's configuration, with `own_relay` in front of its relays.
    pub(crate) async fn seed(
        &self,
        own_relay: Option<String>,
        relay_key: RelayKey,
        cluster: Option<Cluster>,
    ) -> Result<Config, SettingsError> {
        let external = match &self.seed.external_ip {
            Some(text) => text.parse().map_err(|error| SettingsError::of("seed.external_ip", error))?,
            // The seed's links have one address; of several, that of IPv4.
            None => {
                let ips = self.turn_external_ips()?;
                let is_v4 = |ip: &&ExternalIp| match ip {
                    ExternalIp::Auto | ExternalIp::Stun(_) => false,
                    ExternalIp::Address(public) | ExternalIp::Mapped { public, .. } => public.is_ipv4(),
                };
                ips.iter().find(is_v4).or(ips.first()).cloned().unwrap_or_default()
            }
        };
        let external = match external {
            ExternalIp::Auto => None,
            ExternalIp::Stun(_) => {
                let addresses = turn_server::Addresses::find(&[external], self.seed.listen.ip()).await;
                let own = addresses.v4.or(addresses.v6).filter(|own| own.public != own.bind);
                own.map(|own| ExternalAddress { public: own.public, private: Some(own.bind) })
            }
            ExternalIp::Address(public) => Some(ExternalAddress { public, private: None }),
            ExternalIp::Mapped { public, private } => Some(ExternalAddress { public, private: Some(private) }),
        };
        let identity = self.seed.identity()?;
        Ok(Config {
            listen: self.seed.listen,
            relay_key,
            external,
            data: self.seed.data.clone(),
            relays: own_relay.into_iter().chain(self.seed.relays.iter().cloned()).collect(),
            rooms: self.seed.room.iter().map(|room| room.config(identity.is_some())).collect::<Result<_, _>>()?,
            identity,
            bounds: self.seed.bounds(),
            keep: self.seed.keep()?,
            message_bytes: self.seed.max_message_bytes,
            operations_per_second: self.seed.operations_per_second,
            pass_on: self.seed.pass_on,
            max_links: self.seed.max_links,
            check_room: Some(self.check_room()),
            backup: self.seed.backup()?,
            shared: cluster.filter(|_| self.cluster.shares_rooms()).map(SharedRooms::over),
        })
    }
}
