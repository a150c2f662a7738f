//! Seeds side by side: several instances, on machines of their own, of which each room has one at a time.
//!
//! Who holds which room stands in a bucket of JetStream ([`bucket`], [`leases`]). The holder alone is in the room, signs and writes;
//! what it accepts goes to the room's stream ([`stream`]) before it counts. The others follow the stream, so that each has
//! a whole archive and can take the room at once. When a stream has grown long, the holder puts a snapshot of the room,
//! its whole history in it, into the object store ([`snapshot`]), and the stream begins anew behind it.

mod bucket;
mod keeper;
mod leases;
mod overview;
mod seat;
mod snapshot;
mod stream;
mod transfer;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

pub(crate) use keeper::{Keeper, KeeperCommand};
pub use overview::Overview;
pub(crate) use stream::{RoomStream, StreamError};
pub use transfer::{Transfer, TransferError, fetch_rooms, found_rooms};

/// The bucket of leases.
pub const LEASES: &str = "homeport_seeds";
/// The object store of snapshots.
pub const SNAPSHOTS: &str = "homeport_rooms";

/// How to share rooms with other instances.
#[derive(Debug, Clone)]
pub struct SharedRooms {
    /// The connection with them.
    pub cluster: service::Cluster,
    /// A snapshot of a room is made when its stream has so many messages. Default [`SharedRooms::SNAPSHOT_MESSAGES`].
    pub snapshot_messages: u64,
}

impl SharedRooms {
    /// Messages of a room's stream before it begins anew: one for each commit, of which there are a hundred a second at most.
    pub const SNAPSHOT_MESSAGES: u64 = 5_000;

    /// Rooms that are shared over `cluster`.
    pub fn over(cluster: service::Cluster) -> Self {
        Self { cluster, snapshot_messages: Self::SNAPSHOT_MESSAGES }
    }
}

/// Until when this instance holds what it holds. Whoever acts in a room looks first: the keeper may be late.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tenure(Arc<Mutex<Option<Instant>>>);

impl Tenure {
    fn set(&self, end: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = end;
    }

    pub(crate) fn holds(&self, now: Instant) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|end| now < end)
    }
}
