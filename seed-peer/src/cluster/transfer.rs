//! From one machine to a cluster and back, while no seed runs on the archive.

use std::path::Path;

use service::{Cluster, Health, Telemetry};
use tokio::sync::mpsc;

use super::LEASES;
use super::bucket::{Key, LeaseRecord};
use super::seat::{Copy, SeatError};
use crate::archive::{Archive, ArchiveConfig, OpenError, Opened, Shipping};
use crate::metrics::Metrics;

/// Rooms cannot be brought to the cluster, or from there.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The archive cannot be opened.
    #[error(transparent)]
    Archive(#[from] OpenError),
    /// The archive opened, but cannot be used.
    #[error("the archive cannot be used: {0}")]
    Rooms(#[from] rusqlite::Error),
    /// What is counted cannot be.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// The cluster does not say which rooms it has.
    #[error("the cluster does not say which rooms it has: {0}")]
    Leases(String),
    /// Something went wrong with a room; those before it are done.
    #[error("room {room:?}: {reason}")]
    Room {
        /// Its name.
        room: String,
        /// What went wrong.
        reason: String,
    },
    /// The cluster has the room already.
    #[error("the cluster has the room {0:?} already: nothing was changed there")]
    Exists(String),
}

/// A room that was brought to the cluster, or from there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// Its name.
    pub room: String,
    /// Operations in its log.
    pub operations: u64,
}

/// An archive that is opened for nothing else.
struct Opening {
    archive: Archive,
    copies: Vec<(String, Copy, crate::archive::RoomKey)>,
}

impl Opening {
    fn new(cluster: &Cluster, data: &Path, names: Option<Vec<String>>) -> Result<Self, TransferError> {
        let mut opened = Opened::open(data)?;
        let names = match names {
            Some(names) => names,
            None => opened.names()?,
        };
        let mut keys = Vec::new();
        for name in names {
            keys.push((opened.known(&name)?, name));
        }
        let telemetry = Telemetry::default();
        let metrics = Metrics::register(&telemetry.registry)?;
        let (replies, _) = mpsc::unbounded_channel();
        let shipping = Shipping::new(tokio::runtime::Handle::current(), cluster.clone());
        let config = ArchiveConfig { shipping: Some(shipping), ..ArchiveConfig::default() };
        let archive = opened.start(config, replies, metrics, Health::default())?;
        let copy = |(key, name): (_, String)| {
            let copy = Copy::new(cluster.clone(), &name, key, archive.client(), data.to_owned());
            (name, copy, key)
        };
        let copies = keys.into_iter().map(copy).collect();
        Ok(Self { archive, copies })
    }

    /// Updates every room, and ends.
    async fn run(self, begins: bool, mut each: impl FnMut(&Transfer)) -> Result<Vec<Transfer>, TransferError> {
        let Self { archive, copies } = self;
        let mut done = Ok(Vec::new());
        for (room, copy, key) in &copies {
            let updated = async {
                copy.update(begins).await?;
                Ok::<_, SeatError>(archive.client().position(*key).await?.seq)
            };
            match (updated.await, &mut done) {
                (Ok(operations), Ok(done)) => {
                    let transfer = Transfer { room: room.clone(), operations };
                    each(&transfer);
                    done.push(transfer);
                }
                (Err(error), _) => {
                    done = Err(TransferError::Room { room: room.clone(), reason: error.to_string() });
                    break;
                }
                (Ok(_), Err(_)) => break,
            }
        }
        drop(copies);
        // Joins threads, and waits for what is on its way to the disk.
        let closed = tokio::task::spawn_blocking(move || archive.close()).await;
        if closed.is_err() {
            tracing::error!("the archive could not be closed");
        }
        done
    }
}

/// Gives every room of the archive in `data`, on which no seed runs, to a cluster that has none of them yet.
///
/// # Errors
/// [`TransferError`]. Rooms before the one that is named are in the cluster then.
pub async fn found_rooms(
    cluster: &Cluster,
    data: &Path,
    each: impl FnMut(&Transfer),
) -> Result<Vec<Transfer>, TransferError> {
    let opening = Opening::new(cluster, data, None)?;
    for (room, copy, _) in &opening.copies {
        let is_new = copy.is_new().await.map_err(|error| error.to_string());
        match is_new {
            Ok(true) => {}
            Ok(false) => return Err(TransferError::Exists(room.clone())),
            Err(reason) => return Err(TransferError::Room { room: room.clone(), reason }),
        }
    }
    opening.run(true, each).await
}

/// Brings every room that a cluster has to the archive in `data`, on which no seed runs.
///
/// # Errors
/// [`TransferError`]. Rooms before the one that is named are in the archive then.
pub async fn fetch_rooms(
    cluster: &Cluster,
    data: &Path,
    each: impl FnMut(&Transfer),
) -> Result<Vec<Transfer>, TransferError> {
    let names = names(cluster).await.map_err(TransferError::Leases)?;
    Opening::new(cluster, data, Some(names))?.run(false, each).await
}

/// The rooms that the cluster has had.
async fn names(cluster: &Cluster) -> Result<Vec<String>, String> {
    use futures_util::TryStreamExt as _;
    let bucket = cluster.jetstream().get_key_value(LEASES).await.map_err(|error| error.to_string())?;
    let keys: Vec<String> = bucket
        .keys()
        .await
        .map_err(|error| error.to_string())?
        .try_collect()
        .await
        .map_err(|error| error.to_string())?;
    let mut names = Vec::new();
    for key in keys.iter().filter(|key| matches!(Key::parse(key), Some(Key::Lease(_)))) {
        let record = bucket.get(key.as_str()).await.map_err(|error| error.to_string())?;
        if let Some(record) = record.and_then(|record| serde_json::from_slice::<LeaseRecord>(&record).ok()) {
            names.push(record.room);
        }
    }
    names.sort();
    Ok(names)
}
