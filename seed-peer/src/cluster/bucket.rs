//! What stands in the bucket of leases: keys, and a record under each, as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Stands for a room where its name may not: in keys and subjects of NATS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct RoomHash(String);

impl RoomHash {
    pub(crate) fn of(name: &str) -> Self {
        Self(Sha256::digest(name)[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A key of the bucket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Key {
    /// Whether an instance is alive: [`InstanceRecord`].
    Instance(String),
    /// Which rooms an instance could hold: [`OfferRecord`].
    Offers(String),
    /// Who holds a room: [`LeaseRecord`].
    Lease(RoomHash),
    /// Who is to hold a room, by the wish of who runs the cluster: [`PinRecord`].
    Pin(RoomHash),
}

impl Key {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (kind, name) = text.split_once('.')?;
        match kind {
            "instance" => Some(Self::Instance(name.to_owned())),
            "offers" => Some(Self::Offers(name.to_owned())),
            "lease" => Some(Self::Lease(RoomHash(name.to_owned()))),
            "pin" => Some(Self::Pin(RoomHash(name.to_owned()))),
            _ => None,
        }
    }

    pub(super) fn print(&self) -> String {
        match self {
            Self::Instance(name) => format!("instance.{name}"),
            Self::Offers(name) => format!("offers.{name}"),
            Self::Lease(room) => format!("lease.{}", room.0),
            Self::Pin(room) => format!("pin.{}", room.0),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InstanceRecord {
    /// One life of an instance.
    pub(super) session: String,
    pub(super) alive: bool,
    /// Counts, so that no two records are the same.
    pub(super) beat: u64,
}

/// Rooms, and how many operations the instance has of each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OfferRecord {
    pub(super) rooms: BTreeMap<RoomHash, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeaseRecord {
    /// The room's name, for who looks.
    pub(super) room: String,
    /// Who holds it, and in which session; nobody when it was given back.
    pub(super) holder: Option<(String, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PinRecord {
    /// `None`: any will do.
    pub(super) instance: Option<String>,
}
