//! The settings of a cluster: how this machine finds the others.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use service::settings::SettingsError;
use service::{ClusterConfig, ClusterLogin};

use super::{OneOrMany, Settings};

/// `[cluster]`
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ClusterSettings {
    /// Servers of NATS over which the machines of a cluster know each other, such as `"nats://10.0.0.1:4222"`, or
    /// `"tls://…"`; a list takes several, any of which will do. Without it, this machine is alone.
    nats: Option<OneOrMany>,
    /// What this machine is called among the others; its host name without it.
    name: Option<String>,
    /// Who this machine is to NATS: a user and its password.
    user: Option<String>,
    /// The password of `cluster.user`.
    password: Option<String>,
    /// Who this machine is to NATS: whoever shows this token.
    token: Option<String>,
    /// Who this machine is to NATS: the file of its credentials (`.creds`).
    credentials: Option<PathBuf>,
    /// The root of the servers' certificates, in PEM, if this machine does not know it.
    ca: Option<PathBuf>,
    /// On how many servers of NATS each thing is kept that the machines share: 1, 3 or 5, and as many servers must be
    /// there. With 3, one may die.
    replicas: Replicas,
    /// Whether the seeds of the cluster share their rooms: each room is then held by one of them at a time, and followed by
    /// the others. Without that, each is in all of its rooms by itself.
    rooms: Shares,
}

/// Whether rooms are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Shares(bool);

impl Default for Shares {
    fn default() -> Self {
        Self(true)
    }
}

/// Copies of what is kept at NATS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Replicas(usize);

impl Default for Replicas {
    fn default() -> Self {
        Self(1)
    }
}

impl fmt::Debug for ClusterSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Addresses may hold passwords too.
        f.debug_struct("ClusterSettings").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ClusterSettings {
    pub(super) fn holds_secrets(&self) -> bool {
        let in_address = self.nats.iter().flat_map(OneOrMany::as_slice).any(|address| address.contains('@'));
        in_address || self.password.is_some() || self.token.is_some()
    }

    /// Whether the seed shares its rooms with those of other machines.
    pub(super) fn shares_rooms(&self) -> bool {
        self.rooms.0
    }

    fn login(&self) -> Result<ClusterLogin, SettingsError> {
        match (&self.user, &self.password, &self.token, &self.credentials) {
            (None, None, None, None) => Ok(ClusterLogin::Anonymous),
            (Some(name), Some(password), None, None) => {
                Ok(ClusterLogin::User { name: name.clone(), password: password.clone() })
            }
            (Some(_), None, None, None) => Err(SettingsError::of("cluster.password", "the user needs a password")),
            (None, Some(_), None, None) => Err(SettingsError::of("cluster.user", "whose password is it?")),
            (None, None, Some(token), None) => Ok(ClusterLogin::Token(token.clone())),
            (None, None, None, Some(file)) => Ok(ClusterLogin::Credentials(file.clone())),
            _ => Err(SettingsError::of("cluster", "of user, token and credentials, one is enough")),
        }
    }
}

impl Settings {
    /// Whether there are rooms here that the machines of the cluster share.
    pub(crate) fn has_shared_rooms(&self) -> bool {
        self.cluster.nats.is_some() && self.cluster.shares_rooms() && !self.seed.room.is_empty()
    }

    /// How to reach the other machines of the cluster, if there is one.
    pub(crate) fn cluster(&self) -> Result<Option<ClusterConfig>, SettingsError> {
        let settings = &self.cluster;
        let Some(nats) = &settings.nats else {
            return if *settings == ClusterSettings::default() {
                Ok(None)
            } else {
                Err(SettingsError::of("cluster.nats", "a cluster needs the address of NATS"))
            };
        };
        let servers = nats.as_slice().iter().map(|address| {
            // What is wrong with an address may be its password.
            address.parse().map_err(|_| SettingsError::of("cluster.nats", "expected an address like nats://host:4222"))
        });
        let Replicas(replicas) = settings.replicas;
        if ![1, 3, 5].contains(&replicas) {
            return Err(SettingsError::of("cluster.replicas", format_args!("{replicas} is none of 1, 3 and 5")));
        }
        let name = settings.name.clone().or_else(host_name);
        let name =
            name.ok_or_else(|| SettingsError::of("cluster.name", "this machine has no host name: give it one"))?;
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if name.is_empty() || name.len() > 64 || !name.bytes().all(is_plain) {
            return Err(SettingsError::of(
                "cluster.name",
                format_args!("{name:?} is not made of letters, digits, - and _ alone"),
            ));
        }
        Ok(Some(ClusterConfig {
            servers: servers.collect::<Result<_, _>>()?,
            name,
            login: settings.login()?,
            ca: settings.ca.clone(),
            replicas,
        }))
    }
}

/// The machine's name, without its domain.
fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_str().ok()?.to_owned();
    Some(name.split('.').next().unwrap_or(&name).to_owned())
}
