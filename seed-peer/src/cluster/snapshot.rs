//! Snapshots of rooms in the object store: the segments of a backup, and a manifest that says up to which message of the
//! room's stream they go.

use std::path::{Path, PathBuf};

use async_nats::jetstream::object_store::{GetErrorKind, ObjectStore};
use async_nats::jetstream::stream;
use serde::{Deserialize, Serialize};
use service::Cluster;
use tokio::io::AsyncReadExt as _;

use super::SNAPSHOTS;
use super::bucket::RoomHash;
use crate::backup::{BackupError, Room, Segment, SegmentSink, Source, read_room, sha256};

/// A snapshot cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("the object store: {0}")]
    Store(String),
    #[error(transparent)]
    Archive(#[from] BackupError),
    #[error("the manifest of a snapshot is damaged: {0}")]
    Manifest(#[from] serde_json::Error),
    #[error("the room is not in the archive")]
    Missing,
}

impl SnapshotError {
    fn of(error: impl std::fmt::Display) -> Self {
        Self::Store(error.to_string())
    }
}

/// What a snapshot holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// When the stream was made that it is of, s since the Unix epoch.
    pub(super) stream: i64,
    /// The last message of that stream that is in it.
    pub(super) message: u64,
    pub(super) room: Room,
}

/// The snapshots of one room.
#[derive(Debug, Clone)]
pub(super) struct Snapshots {
    cluster: Cluster,
    name: String,
    hash: RoomHash,
}

struct Sink<'a> {
    snapshots: &'a Snapshots,
    store: ObjectStore,
    bytes: u64,
}

impl SegmentSink for Sink<'_> {
    async fn put(&mut self, segment: &Segment, content: Vec<u8>) -> Result<(), BackupError> {
        let name = self.snapshots.segment_at(segment);
        self.bytes += segment.bytes;
        let put = self.store.put(name.as_str(), &mut &content[..]).await;
        put.map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(())
    }
}

impl Snapshots {
    pub(super) fn of(cluster: Cluster, name: &str) -> Self {
        Self { cluster, name: name.to_owned(), hash: RoomHash::of(name) }
    }

    fn manifest_at(&self) -> String {
        format!("{}.manifest", self.hash.as_str())
    }

    fn segment_at(&self, segment: &Segment) -> String {
        format!("{}.{}", self.hash.as_str(), segment.sha256)
    }

    async fn store(&self) -> Result<ObjectStore, SnapshotError> {
        // What an object store is underneath.
        let config = stream::Config {
            name: format!("OBJ_{SNAPSHOTS}"),
            description: Some("snapshots of rooms of Homeport's seeds".into()),
            subjects: vec![format!("$O.{SNAPSHOTS}.C.>"), format!("$O.{SNAPSHOTS}.M.>")],
            discard: stream::DiscardPolicy::New,
            allow_rollup: true,
            allow_direct: true,
            ..stream::Config::default()
        };
        self.cluster.keep(config).await.map_err(SnapshotError::of)?;
        self.cluster.jetstream().get_object_store(SNAPSHOTS).await.map_err(SnapshotError::of)
    }

    /// The newest snapshot, if there is one.
    pub(super) async fn newest(&self) -> Result<Option<Manifest>, SnapshotError> {
        let store = self.store().await?;
        match read(&store, &self.manifest_at()).await? {
            Some(content) => Ok(Some(serde_json::from_slice(&content)?)),
            None => Ok(None),
        }
    }

    /// The content of a segment.
    pub(super) async fn segment(&self, segment: &Segment) -> Result<Vec<u8>, SnapshotError> {
        let store = self.cluster.jetstream().get_object_store(SNAPSHOTS).await.map_err(SnapshotError::of)?;
        let content = read(&store, &self.segment_at(segment)).await?;
        content
            .filter(|content| sha256(content) == segment.sha256)
            .ok_or_else(|| SnapshotError::Archive(BackupError::Damaged(segment.sha256.clone())))
    }

    /// Makes a snapshot of the room in the archive of the folder `data`. Returns it, and how many bytes were written.
    pub(super) async fn make(&self, data: &Path) -> Result<(Manifest, u64), SnapshotError> {
        let (folder, name): (PathBuf, String) = (data.to_owned(), self.name.clone());
        let opened = tokio::task::spawn_blocking(move || -> Result<_, BackupError> {
            let source = Source::open(&folder)?;
            let room = source.rooms()?.into_iter().find(|room| room.name == name);
            let position = room.as_ref().map(|room| source.position(room)).transpose()?.flatten();
            Ok((source, room.zip(position)))
        });
        let (source, found) = opened.await.map_err(SnapshotError::of)??;
        let (mut room, (stream, message)) = found.ok_or(SnapshotError::Missing)?;
        let earlier = self.newest().await?.filter(|earlier| earlier.stream == stream);
        let store = self.store().await?;
        let reused = source.reusable(&room, earlier.as_ref().map(|earlier| &earlier.room), |_| true)?;
        let mut sink = Sink { snapshots: self, store: store.clone(), bytes: 0 };
        drop(read_room(source, &mut room, reused, &mut sink).await?);
        let written = sink.bytes;
        let manifest = Manifest { stream, message, room };
        let text = serde_json::to_vec(&manifest)?;
        store.put(self.manifest_at().as_str(), &mut &text[..]).await.map_err(SnapshotError::of)?;
        // What only the one before named.
        for segment in earlier.iter().flat_map(|earlier| earlier.room.segments()) {
            if manifest.room.segments().all(|other| other.sha256 != segment.sha256) {
                store.delete(self.segment_at(segment)).await.map_err(SnapshotError::of)?;
            }
        }
        Ok((manifest, written))
    }
}

/// The content of an object, if it is there.
async fn read(store: &ObjectStore, name: &str) -> Result<Option<Vec<u8>>, SnapshotError> {
    let mut object = match store.get(name).await {
        Ok(object) => object,
        Err(error) if error.kind() == GetErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(SnapshotError::of(error)),
    };
    let mut content = Vec::new();
    object.read_to_end(&mut content).await.map_err(SnapshotError::of)?;
    Ok(Some(content))
}
