//! Backups: the archive, away from its machine.
//!
//! A backup is a manifest that names segments: portions of each room's log, and of the snapshot that a compacted log
//! begins with. A segment is named by its content, and the manifest, written last, holds the checksum of each and one of
//! its own. So a backup is either whole or not there; it needs no other backup, although one that is incremental names
//! segments that an earlier one has written. What no manifest names any more is deleted with the last that did.

mod manifest;
mod restore;
mod schedule;
mod segment;
mod target;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use object_store::path::Path as Location;
use object_store::{ObjectStore, ObjectStoreExt as _, PutPayload};

use manifest::Manifest;
pub(crate) use manifest::Room;
pub use manifest::{Kind, ManifestError};
pub use restore::Restored;
pub(crate) use restore::RoomBeing;
pub use schedule::BackupConfig;
pub(crate) use schedule::BackupSchedule;
use segment::Reusable;
pub(crate) use segment::{Segment, Source, sha256};
pub use target::{BackupTarget, S3Settings, TargetError};

/// A segment that no manifest names is left alone for so long: somebody may be writing one that does.
const GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// A backup cannot be made, listed or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The place of backups does not do what is asked.
    #[error("the place of backups: {0}")]
    Store(#[from] object_store::Error),
    /// The archive cannot be read or written.
    #[error("the archive: {0}")]
    Archive(#[from] rusqlite::Error),
    /// There is no archive to back up, or it cannot be opened.
    #[error(transparent)]
    Open(#[from] crate::archive::OpenError),
    /// A file cannot be written.
    #[error("{0}")]
    File(#[from] std::io::Error),
    /// What was written reads back otherwise.
    #[error("{0} does not read back as it was written")]
    NotAsWritten(String),
    /// A segment is not what its name says.
    #[error("the segment {0} is damaged")]
    Damaged(String),
    /// The manifest is none.
    #[error("the backup {id}: {source}")]
    Manifest {
        /// Which.
        id: String,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// There is no such backup.
    #[error("there is no backup {0}")]
    Unknown(String),
    /// There is none at all.
    #[error("there are no backups there")]
    None,
    /// There is an archive already where one is to be restored.
    #[error("there is an archive in {0} already: move it away, a backup is restored onto an empty folder")]
    Exists(std::path::PathBuf),
    /// What was restored is not what the manifest says.
    #[error("room {room:?} came to {found} nodes instead of {expected}: nothing was put in place")]
    NotAsBackedUp {
        /// The room.
        room: String,
        /// Nodes that the manifest says.
        expected: u64,
        /// Nodes that there are.
        found: u64,
    },
}

/// A backup that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupReport {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Rooms in it.
    pub rooms: usize,
    /// Operations in it, over all rooms.
    pub operations: u64,
    /// Bytes that were written for it.
    pub written_bytes: u64,
    /// Segments of earlier backups that it names as well.
    pub reused_segments: usize,
}

/// A backup that is there.
#[derive(Debug)]
pub struct ListedBackup {
    /// Its name.
    pub id: String,
    /// What it holds; an error when its manifest is damaged, or a segment that it names is missing.
    pub content: Result<BackupContent, BackupError>,
}

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupContent {
    /// What it is.
    pub kind: Kind,
    /// When it was made, ms since the Unix epoch.
    pub created_ms: u64,
    /// Its rooms, and how many operations each has.
    pub rooms: Vec<(String, u64)>,
    /// Bytes of all its segments.
    pub bytes: u64,
}

/// The backups in one place.
#[derive(Debug, Clone)]
pub struct Backups {
    store: Arc<dyn ObjectStore>,
    prefix: Location,
}

impl Backups {
    /// The backups at `target`.
    ///
    /// # Errors
    /// [`TargetError`] when the place cannot be.
    pub fn at(target: &BackupTarget) -> Result<Self, TargetError> {
        let (store, prefix) = target.open()?;
        Ok(Self { store, prefix })
    }

    fn manifest_at(&self, id: &str) -> Location {
        self.prefix.clone().join("manifests").join(format!("{id}.json"))
    }

    fn segment_at(&self, name: &str) -> Location {
        self.prefix.clone().join("segments").join(format!("{name}.jsonl.gz"))
    }

    /// Backs the archive of the folder `data` up, beside the seed that writes it.
    ///
    /// # Errors
    /// [`BackupError`]. Then there is no new backup, and the others are as before.
    pub async fn make(&self, data: &Path, kind: Kind, wall_ms: u64) -> Result<BackupReport, BackupError> {
        let mut source = Source::open(data)?;
        let earlier = match kind {
            Kind::Full => None,
            Kind::Incremental => self.newest().await?,
        };
        // Without anything to build on, it is a full one.
        let kind = if earlier.is_some() { Kind::Incremental } else { Kind::Full };
        let held = if earlier.is_some() { self.held_segments().await? } else { HashMap::new() };
        let mut report = BackupReport {
            id: manifest::id_of(wall_ms),
            kind,
            rooms: 0,
            operations: 0,
            written_bytes: 0,
            reused_segments: 0,
        };
        let mut manifest = Manifest::new(kind, wall_ms);
        for mut room in source.rooms()? {
            let earlier = earlier.as_ref().and_then(|earlier| earlier.room(&room.name, &room.peer_id));
            let reused = source.reusable(&room, earlier, |segment| {
                held.get(&segment.sha256).is_some_and(|bytes| *bytes == segment.bytes)
            })?;
            report.reused_segments += reused.log.len() + reused.snapshot.as_ref().map_or(0, Vec::len);
            let mut sink = Target { backups: self, report: &mut report };
            source = read_room(source, &mut room, reused, &mut sink).await?;
            report.rooms += 1;
            report.operations += room.operations();
            manifest.rooms.push(room);
        }
        drop(source);
        let text = manifest.print();
        let location = self.manifest_at(&report.id);
        self.put(&location, text.into_bytes(), &mut report).await?;
        Ok(report)
    }

    /// Writes an object, and reads it back.
    async fn put(&self, location: &Location, content: Vec<u8>, report: &mut BackupReport) -> Result<(), BackupError> {
        let bytes = u64::try_from(content.len()).unwrap_or(u64::MAX);
        let expected = sha256(&content);
        self.store.put(location, PutPayload::from(content)).await?;
        let found = self.store.get(location).await?.bytes().await?;
        if sha256(&found) != expected {
            return Err(BackupError::NotAsWritten(location.to_string()));
        }
        report.written_bytes += bytes;
        Ok(())
    }

    /// The names of all backups, oldest first.
    async fn ids(&self) -> Result<Vec<String>, BackupError> {
        let listed: Vec<_> = self.store.list(Some(&self.prefix.clone().join("manifests"))).try_collect().await?;
        let names = listed.iter().filter_map(|object| object.location.filename()?.strip_suffix(".json"));
        let mut ids: Vec<String> = names.map(str::to_owned).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    async fn manifest(&self, id: &str) -> Result<Manifest, BackupError> {
        let bytes = match self.store.get(&self.manifest_at(id)).await {
            Ok(found) => found.bytes().await?,
            Err(object_store::Error::NotFound { .. }) => return Err(BackupError::Unknown(id.to_owned())),
            Err(error) => return Err(error.into()),
        };
        Manifest::parse(&bytes).map_err(|source| BackupError::Manifest { id: id.to_owned(), source })
    }

    /// The newest manifest that is whole.
    async fn newest(&self) -> Result<Option<Manifest>, BackupError> {
        for id in self.ids().await?.iter().rev() {
            match self.manifest(id).await {
                Ok(manifest) => return Ok(Some(manifest)),
                Err(BackupError::Manifest { .. }) => tracing::warn!(id, "a backup's manifest is damaged"),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The segments that are there, by name, with their sizes.
    async fn held_segments(&self) -> Result<HashMap<String, u64>, BackupError> {
        let listed: Vec<_> = self.store.list(Some(&self.prefix.clone().join("segments"))).try_collect().await?;
        let names = listed.iter().filter_map(|object| {
            Some((object.location.filename()?.strip_suffix(".jsonl.gz")?.to_owned(), object.size))
        });
        Ok(names.collect())
    }

    /// Every backup that is there, oldest first.
    ///
    /// # Errors
    /// [`BackupError`] when the place cannot be read.
    pub async fn list(&self) -> Result<Vec<ListedBackup>, BackupError> {
        let held = self.held_segments().await?;
        let mut list = Vec::new();
        for id in self.ids().await? {
            let content = self.manifest(&id).await.and_then(|manifest| {
                let segments = || manifest.rooms.iter().flat_map(|room| room.segments());
                if let Some(missing) = segments().find(|segment| held.get(&segment.sha256) != Some(&segment.bytes)) {
                    return Err(BackupError::Damaged(missing.sha256.clone()));
                }
                Ok(BackupContent {
                    kind: manifest.kind,
                    created_ms: manifest.created_ms,
                    rooms: manifest.rooms.iter().map(|room| (room.name.clone(), room.operations())).collect(),
                    bytes: segments().map(|segment| segment.bytes).sum(),
                })
            });
            list.push(ListedBackup { id, content });
        }
        Ok(list)
    }

    /// Deletes backups that are older than `keep`, but never the newest, and the segments that only they named.
    /// Returns how many backups went.
    ///
    /// # Errors
    /// [`BackupError`].
    pub async fn prune(&self, keep: Duration, wall_ms: u64) -> Result<usize, BackupError> {
        let horizon = manifest::id_of(wall_ms.saturating_sub(u64::try_from(keep.as_millis()).unwrap_or(u64::MAX)));
        let ids = self.ids().await?;
        let mut named = std::collections::HashSet::new();
        let mut pruned = 0;
        let mut newest_whole = None;
        for id in ids.iter().rev() {
            let manifest = self.manifest(id).await;
            if newest_whole.is_none() && manifest.is_ok() {
                newest_whole = Some(id);
            }
            if *id < horizon && newest_whole.is_some_and(|newest| newest != id) {
                self.store.delete(&self.manifest_at(id)).await?;
                pruned += 1;
                continue;
            }
            match manifest {
                Ok(manifest) => named.extend(
                    manifest.rooms.iter().flat_map(|room| room.segments()).map(|segment| segment.sha256.clone()),
                ),
                Err(BackupError::Manifest { .. }) => {}
                // What cannot be read may name anything: nothing more is deleted.
                Err(error) => return Err(error),
            }
        }
        let segments: Vec<_> = self.store.list(Some(&self.prefix.clone().join("segments"))).try_collect().await?;
        for object in segments {
            let name = object.location.filename().and_then(|name| name.strip_suffix(".jsonl.gz")).map(str::to_owned);
            let written_ms = u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(0);
            let is_old = written_ms.saturating_add(u64::try_from(GRACE.as_millis()).unwrap_or(u64::MAX)) < wall_ms;
            if is_old && name.is_some_and(|name| !named.contains(&name)) {
                self.store.delete(&object.location).await?;
            }
        }
        Ok(pruned)
    }
}

/// Where the segments of a room go.
pub(crate) trait SegmentSink: Send {
    /// Takes a segment that was not there yet.
    fn put(&mut self, segment: &Segment, content: Vec<u8>) -> impl Future<Output = Result<(), BackupError>> + Send;
}

/// The place of backups.
struct Target<'a> {
    backups: &'a Backups,
    report: &'a mut BackupReport,
}

impl SegmentSink for Target<'_> {
    async fn put(&mut self, segment: &Segment, content: Vec<u8>) -> Result<(), BackupError> {
        self.backups.put(&self.backups.segment_at(&segment.sha256), content, self.report).await
    }
}

/// Reads a room, all but what is `reused`, segment by segment.
pub(crate) async fn read_room(
    mut source: Source,
    room: &mut Room,
    reused: Reusable,
    sink: &mut impl SegmentSink,
) -> Result<Source, BackupError> {
    let mut next = reused.log.last().map_or(room.log_from, |last| last.last + 1);
    room.log = reused.log;
    room.snapshot = match reused.snapshot {
        Some(segments) => segments,
        None => {
            let mut segments = Vec::new();
            let mut after = None;
            loop {
                let id = room.snapshot_id;
                let (returned, portion) =
                    blocking(move || source.snapshot_segment(id, after).map(|portion| (source, portion))).await?;
                source = returned;
                let Some((segment, content, last)) = portion else { break };
                sink.put(&segment, content).await?;
                segments.push(segment);
                after = Some(last);
            }
            segments
        }
    };
    loop {
        let id = room.id;
        let (returned, portion) =
            blocking(move || source.log_segment(id, next).map(|portion| (source, portion))).await?;
        source = returned;
        let Some((segment, content)) = portion else { break };
        sink.put(&segment, content).await?;
        next = segment.last + 1;
        room.log.push(segment);
    }
    Ok(source)
}

/// Does something that blocks on a thread for that.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, BackupError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(BackupError::File(std::io::Error::other(error))),
    }
}
