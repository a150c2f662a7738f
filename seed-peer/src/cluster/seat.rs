//! One room of a cluster, as this instance has it: it follows the room's stream, or holds the room.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::SharedRooms;
use super::bucket::RoomHash;
use super::snapshot::{SnapshotError, Snapshots};
use super::stream::{RoomStream, Standing, StreamError, Tail, Taken};
use crate::archive::{ArchiveClient, Position, Rebuild, RoomKey};
use crate::rooms::{RoomError, Rooms};

/// How long to wait before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often it is looked whether a snapshot is due.
const SNAPSHOT_LOOK: Duration = Duration::from_secs(20);
/// A snapshot is due when the stream has so many bytes, however few messages they are.
const SNAPSHOT_BYTES: u64 = 32 << 20;

/// What a room is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Follow,
    Hold,
}

/// What has become of a room.
#[derive(Debug)]
pub(super) enum Happened {
    /// It was left, or never entered.
    Exited(RoomHash),
    /// It cannot be entered.
    Unable(RoomHash),
}

/// What does not work with a room.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SeatError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("the archive: {0}")]
    Archive(#[from] RoomError),
    #[error("the room's stream begins later than this archive ends, and there is no snapshot of what is between")]
    NoSnapshot,
    #[error("nobody has begun the room's stream yet, and this archive has operations of its own")]
    NotFounded,
}

/// A room's archive, and the same room in the cluster.
pub(super) struct Copy {
    name: String,
    key: RoomKey,
    stream: RoomStream,
    snapshots: Snapshots,
    archive: ArchiveClient,
    data: PathBuf,
}

impl Copy {
    pub(super) fn new(
        cluster: service::Cluster,
        name: &str,
        key: RoomKey,
        archive: ArchiveClient,
        data: PathBuf,
    ) -> Self {
        let stream = RoomStream::of(cluster.clone(), name);
        Self { snapshots: Snapshots::of(cluster, name), name: name.to_owned(), key, stream, archive, data }
    }

    /// Brings the archive to where the stream ends, and `begins` it if nobody has.
    pub(super) async fn update(&self, begins: bool) -> Result<(), SeatError> {
        self.run(Some(begins)).await
    }

    /// Takes in what comes, until something fails.
    async fn follow(&self) -> Result<(), SeatError> {
        self.run(None).await
    }

    /// `to_end`: until where the stream ends now, and whether to begin it.
    async fn run(&self, to_end: Option<bool>) -> Result<(), SeatError> {
        let (stream, standing) = self.stream.open().await?;
        let message = self.settle(&standing, to_end == Some(true)).await?;
        if to_end.is_some() && message >= standing.last {
            return Ok(());
        }
        let mut tail = Tail::new(&stream, message).await?;
        loop {
            let taken = if to_end.is_some() { tail.next_there_is().await? } else { tail.next().await? };
            let Some(Taken { message, batch }) = taken else {
                return Err(StreamError::JetStream("the stream ends".into()).into());
            };
            if let Some(entries) = batch {
                self.archive.take_over(self.key, entries, message).await?;
            }
            if to_end.is_some() && message >= standing.last {
                return Ok(());
            }
        }
    }

    /// Makes the archive one of the stream, and returns behind which message it goes on.
    async fn settle(&self, standing: &Standing, begins: bool) -> Result<u64, SeatError> {
        let position = self.archive.position(self.key).await?;
        let is_of_it = position.stream == Some(standing.made);
        if is_of_it && standing.first <= position.message + 1 {
            if begins && standing.last == 0 && position.seq > 0 && self.snapshot(standing).await?.is_none() {
                // It was begun, but the others were not told from where.
                self.snapshots.make(&self.data).await?;
            }
            return Ok(position.message);
        }
        let snapshot = self.snapshot(standing).await?;
        let is_new = standing.last == 0 && snapshot.is_none();
        if is_new && position.seq > 0 && position.stream != Some(0) {
            if !begins {
                return Err(SeatError::NotFounded);
            }
            self.archive.adopt(self.key, standing.made).await?;
            self.snapshots.make(&self.data).await?;
            tracing::info!(room = %self.name, operations = position.seq, "the cluster has the room from this archive");
            return Ok(0);
        }
        self.make_way(&position, is_of_it).await?;
        match snapshot {
            Some(manifest) => {
                tracing::info!(room = %self.name, operations = manifest.room.operations(), "a room is taken from its snapshot");
                self.rebuild(manifest).await
            }
            None if standing.first <= 1 => {
                self.archive.adopt(self.key, standing.made).await?;
                Ok(0)
            }
            None => Err(SeatError::NoSnapshot),
        }
    }

    /// The newest snapshot of the stream.
    async fn snapshot(&self, standing: &Standing) -> Result<Option<super::snapshot::Manifest>, SeatError> {
        Ok(self.snapshots.newest().await?.filter(|manifest| manifest.stream == standing.made))
    }

    /// Puts aside what the archive has of another history of the room.
    async fn make_way(&self, position: &Position, is_of_it: bool) -> Result<(), SeatError> {
        if is_of_it || position.stream == Some(0) || position.seq == 0 {
            return Ok(());
        }
        let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
        let aside = format!("{} (before the cluster, {time})", self.name);
        self.archive.set_aside(self.key, aside.clone()).await?;
        tracing::warn!(
            room = %self.name, aside = %aside, operations = position.seq,
            "the archive had another history of a room than the cluster has: it stands aside, see homeport rooms export"
        );
        Ok(())
    }

    async fn rebuild(&self, manifest: super::snapshot::Manifest) -> Result<u64, SeatError> {
        let super::snapshot::Manifest { stream, message, room } = manifest;
        let (snapshot, log) = (room.snapshot.clone(), room.log.clone());
        self.archive.rebuild(self.key, Rebuild::Begin(Box::new(room))).await?;
        for segment in snapshot {
            let content = self.snapshots.segment(&segment).await?;
            self.archive.rebuild(self.key, Rebuild::Snapshot(segment, content)).await?;
        }
        for segment in log {
            let content = self.snapshots.segment(&segment).await?;
            self.archive.rebuild(self.key, Rebuild::Log(segment, content)).await?;
        }
        self.archive.rebuild(self.key, Rebuild::Finish { stream, message }).await?;
        Ok(message)
    }

    /// Makes a snapshot if the stream has grown long, and has it begin behind that.
    async fn shorten(&self, snapshot_messages: u64) -> Result<(), SeatError> {
        let (_, standing) = self.stream.open().await?;
        if standing.messages < snapshot_messages && standing.bytes < SNAPSHOT_BYTES {
            return Ok(());
        }
        let (manifest, bytes) = self.snapshots.make(&self.data).await?;
        self.stream.forget(manifest.message).await?;
        tracing::info!(room = %self.name, bytes, messages = standing.messages, "a snapshot of a room is in the cluster");
        Ok(())
    }

    /// Whether the room's stream has nothing yet.
    pub(super) async fn is_new(&self) -> Result<bool, SeatError> {
        let (_, standing) = self.stream.open().await?;
        let position = self.archive.position(self.key).await?;
        Ok(standing.last == 0 && position.stream != Some(standing.made) && self.snapshot(&standing).await?.is_none())
    }
}

/// A room with its task.
pub(super) struct Seat {
    pub(super) copy: Copy,
    pub(super) hash: RoomHash,
    pub(super) rooms: Rooms,
    pub(super) shared: SharedRooms,
    pub(super) happened: UnboundedSender<Happened>,
}

impl Seat {
    /// Does as it is told, until nobody tells it any more.
    pub(super) async fn run(self, mut modes: UnboundedReceiver<Mode>) {
        loop {
            let mode = tokio::select! {
                mode = modes.recv() => mode,
                () = self.follow() => None,
            };
            match mode {
                None => return,
                Some(Mode::Follow) => {
                    self.tell(Happened::Exited(self.hash.clone()));
                    continue;
                }
                Some(Mode::Hold) => {}
            }
            let entered = tokio::select! {
                _ = modes.recv() => None,
                entered = self.enter() => Some(entered),
            };
            let happened = match entered {
                None => Happened::Exited(self.hash.clone()),
                Some(Ok(())) => {
                    tokio::select! {
                        _ = modes.recv() => {}
                        () = self.keep_short() => {}
                    }
                    Happened::Exited(self.hash.clone())
                }
                Some(Err(error)) => {
                    tracing::warn!(room = %self.copy.name, error = ?error.to_string(), "a room cannot be held here");
                    Happened::Unable(self.hash.clone())
                }
            };
            if let Err(error) = self.rooms.release(&self.copy.name).await {
                tracing::debug!(room = %self.copy.name, %error, "a room is left by who is gone");
            }
            self.tell(happened);
        }
    }

    fn tell(&self, happened: Happened) {
        // At shutdown nobody needs to know.
        let _ = self.happened.send(happened);
    }

    async fn follow(&self) {
        let mut said = None;
        loop {
            if let Err(error) = self.copy.follow().await {
                let reason = error.to_string();
                if self.shared.cluster.is_connected() && said.as_ref() != Some(&reason) {
                    tracing::info!(room = %self.copy.name, ?reason, "a room cannot be followed now");
                    said = Some(reason);
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn enter(&self) -> Result<(), SeatError> {
        self.copy.update(true).await?;
        self.rooms.hold(&self.copy.name).await?;
        tracing::info!(room = %self.copy.name, "this machine holds a room");
        Ok(())
    }

    /// Keeps the stream short, for ever.
    async fn keep_short(&self) {
        loop {
            if let Err(error) = self.copy.shorten(self.shared.snapshot_messages).await {
                tracing::warn!(room = %self.copy.name, error = ?error.to_string(), "no snapshot of a room can be made");
            }
            tokio::time::sleep(SNAPSHOT_LOOK).await;
        }
    }
}
