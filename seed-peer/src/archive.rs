//! The archive: every operation that was ever accepted, in one SQLite file.
//!
//! One thread writes: it merges what queues up, commits it together, and tries again every second while the disk
//! refuses (full, for one). Another reads: it answers peers, from a snapshot of what is committed, so that whatever a
//! peer hears from the archive is on disk, and a large room that is read for a newcomer does not keep others from
//! writing.

mod answer;
mod compaction;
mod graph;
mod reader;
mod room_rows;
pub(crate) mod schema;
mod writer;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use genosdb::operation::Operation;
use genosdb::{Hlc, Message, PeerId};
use service::{Health, State};
use tokio::sync::mpsc::UnboundedSender;

use crate::links::LinkId;
use crate::mesh::RoomId;
use crate::metrics::Metrics;
use crate::rooms::{Respond, RoomError, Source};
use crate::server::RoomConfig;
use reader::Reader;
use schema::ArchiveFile;
pub(crate) use schema::FILE_NAME;
pub use schema::OpenError;
use writer::Writer;

pub(crate) use answer::Known;

/// Requests that wait for the archive's thread, at most.
const QUEUE_REQUESTS: usize = 8_192;
/// Bytes of messages that wait for the archive, on their way or because the disk refuses, at most.
const QUEUE_BYTES: usize = 64 << 20;

/// What is too much for the archive; beyond it an operation is refused and counted.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of a node's id. Default 1,024.
    pub id_bytes: usize,
    /// Bytes of a node's value as JSON, unknown members included. Default 4 MiB.
    pub value_bytes: usize,
    /// Edges of one node. Default 65,536.
    pub edges: usize,
    /// Nodes of one room. Default 2,000,000.
    pub nodes: u64,
    /// Bytes of all nodes of one room: ids, values and edges. Default 4 GiB.
    pub room_bytes: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { id_bytes: 1_024, value_bytes: 4 << 20, edges: 65_536, nodes: 2_000_000, room_bytes: 4 << 30 }
    }
}

/// Where a room stands in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RoomKey(i64);

/// Who asks the archive; it only passes that back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Asker {
    /// The peer at the other end of a link.
    Link(LinkId),
    /// Somebody in a room whom no link reaches: the answer goes to everybody.
    Room(RoomId),
}

/// What is asked of the archive's writer.
#[derive(Debug)]
enum Request {
    /// Merge what a peer sent. `bytes` is the size of its message.
    Merge { room: RoomKey, asker: Asker, operations: Vec<Operation>, wall_ms: u64, bytes: usize },
    /// Answer a peer's `sync`, after what was merged before.
    Answer(Question),
    /// Find or make the row of a room.
    Open { config: RoomConfig, source: Source, respond: Respond },
    /// Remember that a room is paused, or no longer.
    Pause { room: RoomKey, paused: bool, respond: Respond },
    /// Do not join a room any more that was added.
    Forget { room: RoomKey, respond: Respond },
}

/// A peer's `sync`.
#[derive(Debug, Clone, Copy)]
struct Question {
    room: RoomKey,
    asker: Asker,
    known: Known,
}

/// What the archive has to say.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Send these in order; the peer then has the log up to `sent`.
    Send { to: Asker, messages: Vec<Message>, sent: u64 },
    /// Somebody out of reach lacks something that we have.
    RoomLacks { room: RoomId },
    /// The highest timestamp of a room has changed.
    Latest { room: RoomKey, latest: Hlc },
    /// Messages of a room were dropped while the disk refused: ask its peers for everything.
    Missed { room: RoomKey },
    /// A room's row is there.
    Opened { config: RoomConfig, opened: OpenRoom, added: Source, respond: Respond },
}

/// A room as the archive holds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenRoom {
    pub(crate) key: RoomKey,
    /// The id that the seed's ids in the room are made from.
    pub(crate) peer: PeerId,
    pub(crate) latest: Option<Hlc>,
    /// Whether the seed stays out of it for now.
    pub(crate) paused: bool,
}

/// A handle on the archive's threads.
pub(crate) struct Archive {
    requests: SyncSender<Request>,
    shared: Arc<Shared>,
    thread: std::thread::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    queued_bytes: AtomicUsize,
    missed: Mutex<HashSet<RoomKey>>,
}

impl Shared {
    fn miss(&self, room: RoomKey) {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner).insert(room);
    }
}

/// The archive is open; rooms are named before it starts to take requests.
pub(crate) struct Opened {
    file: ArchiveFile,
    names: HashMap<RoomKey, String>,
}

impl Opened {
    /// Opens or creates the archive in `folder`.
    pub(crate) fn open(folder: &Path) -> Result<Self, OpenError> {
        Ok(Self { file: schema::open(folder)?, names: HashMap::new() })
    }

    /// The room of `config`, created when it is new.
    pub(crate) fn room(&mut self, config: &RoomConfig, source: Source) -> rusqlite::Result<OpenRoom> {
        let room = room_rows::open(&self.file.connection, config, source)?;
        self.names.insert(room.key, config.name.clone());
        Ok(room)
    }

    /// The rooms that were added while the seed ran.
    pub(crate) fn added(&self) -> rusqlite::Result<Vec<RoomConfig>> {
        room_rows::added(&self.file.connection)
    }

    /// Starts the threads. What is older than `keep` is compacted.
    pub(crate) fn start(
        self,
        bounds: Bounds,
        keep: Option<Duration>,
        replies: UnboundedSender<Reply>,
        metrics: Metrics,
        health: Health,
    ) -> Result<Archive, OpenError> {
        let (requests, receiver) = sync_channel(QUEUE_REQUESTS);
        let shared = Arc::new(Shared::default());
        let reader = Reader::start(&self.file, replies.clone(), metrics.clone())?;
        let path = self.file.path.clone();
        let names = self.names;
        let mut writer = Writer::new(self.file, reader, bounds, keep, replies, metrics, health, Arc::clone(&shared));
        for (key, name) in names {
            writer.name_room(key, name);
        }
        let thread = std::thread::Builder::new()
            .name("archive".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|source| OpenError::Folder { path, source })?;
        Ok(Archive { requests, shared, thread })
    }
}

impl Archive {
    /// Hands over what a peer sent, to be merged. Returns whether there was room for it; if not, the archive will
    /// ask for everything once it is through ([`Reply::Missed`]).
    pub(crate) fn merge(
        &self,
        room: RoomKey,
        asker: Asker,
        operations: Vec<Operation>,
        wall_ms: u64,
        bytes: usize,
    ) -> bool {
        let fits = self.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUE_BYTES;
        if fits && self.requests.try_send(Request::Merge { room, asker, operations, wall_ms, bytes }).is_ok() {
            return true;
        }
        self.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.shared.miss(room);
        false
    }

    /// Asks for the answer to a peer's `sync`. Returns whether there was room for the question.
    pub(crate) fn answer(&self, room: RoomKey, asker: Asker, known: Known) -> bool {
        self.requests.try_send(Request::Answer(Question { room, asker, known })).is_ok()
    }

    /// Finds or makes the row of a room; [`Reply::Opened`] follows, unless it cannot be.
    pub(crate) fn open_room(&self, config: RoomConfig, source: Source, respond: Respond) {
        self.ask(Request::Open { config, source, respond });
    }

    /// Remembers that a room is paused, or no longer.
    pub(crate) fn pause_room(&self, room: RoomKey, paused: bool, respond: Respond) {
        self.ask(Request::Pause { room, paused, respond });
    }

    /// Forgets that a room was added. What is archived stays.
    pub(crate) fn forget_room(&self, room: RoomKey, respond: Respond) {
        self.ask(Request::Forget { room, respond });
    }

    fn ask(&self, request: Request) {
        if let Err(error) = self.requests.try_send(request) {
            let (std::sync::mpsc::TrySendError::Full(request) | std::sync::mpsc::TrySendError::Disconnected(request)) =
                error;
            if let Request::Open { respond, .. } | Request::Pause { respond, .. } | Request::Forget { respond, .. } =
                request
            {
                // Who asked may have given up waiting.
                let _ = respond.send(Err(RoomError::Archive("it is too busy".into())));
            }
        }
    }

    /// Commits what was handed over, and ends the threads. Blocks.
    pub(crate) fn close(self) {
        drop(self.requests);
        if self.thread.join().is_err() {
            tracing::error!("the archive's thread had panicked");
        }
    }
}

fn health_ok(health: &Health) -> bool {
    health.set("archive", State::Ok)
}

#[cfg(test)]
mod tests;
