//! The archive: every operation that was ever accepted, in one SQLite file.
//!
//! One thread writes: it merges what queues up, commits it together, and tries again every second while the disk
//! refuses (full, for one). Another reads: it answers peers, from a snapshot of what is committed, so that whatever a
//! peer hears from the archive is on disk, and a large room that is read for a newcomer does not keep others from
//! writing.

mod answer;
mod compaction;
mod edits;
mod entry;
mod graph;
mod merging;
mod reader;
mod replication;
mod room_rows;
pub(crate) mod schema;
mod verifier;
mod writer;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use genosdb::operation::{Node, Operation, Removal};
use genosdb::security::Attested;
use genosdb::signature::Identity;
use genosdb::{Hlc, Message, PeerId};
use service::{Health, State};
use tokio::sync::mpsc::UnboundedSender;

use crate::links::LinkId;
use crate::mesh::RoomId;
use crate::metrics::Metrics;
use crate::rooms::{Respond, RoomError, Source};
use crate::security::Security;
use crate::server::RoomConfig;
use crate::time_of_day;
pub(crate) use compaction::make_shadow;
pub(crate) use compaction::replay;
pub(crate) use entry::LogEntry;
pub(crate) use graph::{RoomGraph, RoomState, read_node, unsigned};
pub(crate) use merging::timestamp_of;
use reader::Reader;
pub(crate) use replication::{Position, Rebuild, Shipping};
pub(crate) use room_rows::save as save_room;
use schema::ArchiveFile;
pub use schema::OpenError;
pub(crate) use schema::{FILE_NAME, TABLES};
use verifier::{Task, Verifier};
use writer::Writer;

pub(crate) use answer::Known;
pub use edits::{Edit, EditError, Imported, Written};

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

/// How to keep the archive.
#[derive(Debug, Default)]
pub(crate) struct ArchiveConfig {
    pub(crate) bounds: Bounds,
    /// What is older is compacted; `None`: nothing is.
    pub(crate) keep: Option<Duration>,
    /// Who signs what the archive answers.
    pub(crate) identity: Option<Arc<Identity>>,
    /// The cluster that rooms are shared with; `None`: they are this archive's alone.
    pub(crate) shipping: Option<Shipping>,
}

/// Where a room stands in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RoomKey(i64);

impl RoomKey {
    /// The row of the room.
    fn row(self) -> i64 {
        self.0
    }
}

/// Who asks the archive; it only passes that back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Asker {
    /// The peer at the other end of a link.
    Link(LinkId),
    /// Somebody in a room whom no link reaches: the answer goes to everybody.
    Room(RoomId),
    /// The seed itself, for everybody who is linked with it in a room.
    Linked(RoomId),
}

/// What a peer sent.
#[derive(Debug)]
pub(crate) enum Received {
    /// In a room where nobody rules.
    Plain(Vec<Operation>),
    /// In a room with super admins: each operation with the text that it came as.
    WithText(Vec<(Operation, String)>),
}

/// What a peer sent, as far as it can be checked without the graph.
#[derive(Debug)]
enum Checked {
    /// In a room where nobody rules.
    Plain(Vec<Operation>),
    /// In a room with super admins.
    Attested(Vec<Attested>),
}

/// What is asked of the archive's writer.
#[derive(Debug)]
enum Request {
    /// Merge what a peer sent. `bytes` is the size of its message.
    Merge { room: RoomKey, asker: Asker, operations: Checked, wall_ms: u64, bytes: usize },
    /// Answer a peer's `sync`, after what was merged before.
    Answer(Question),
    /// Find or make the row of a room.
    Open { config: RoomConfig, source: Source, respond: Respond },
    /// Remember that a room is paused, or no longer.
    Pause { room: RoomKey, paused: bool, respond: Respond },
    /// Do not join a room any more that was added.
    Forget { room: RoomKey, respond: Respond },
    /// Write as the one who runs the seed.
    Edit { room: RoomKey, edits: Vec<Edit>, wall_ms: u64, respond: Respond<Written> },
    /// Take nodes and removals over as they are.
    Import { room: RoomKey, nodes: Vec<Node>, removals: Vec<Removal>, wall_ms: u64, respond: Respond<Imported> },
    /// Give and take roles by the room's rules.
    Govern { room: RoomKey, wall_ms: u64 },
    /// A room of the cluster is ours to write to, from where its stream ends.
    Hold { room: RoomKey, respond: Respond },
    /// It is no longer: what was not written to its stream by now never will be.
    Release { room: RoomKey, respond: Respond },
    /// Say where a room stands in its stream.
    Position { room: RoomKey, respond: Respond<Position> },
    /// The room is the one of a stream that is still empty.
    Adopt { room: RoomKey, stream: i64, respond: Respond },
    /// Take over what another instance has put into the room's stream.
    TakeOver { room: RoomKey, entries: Vec<LogEntry>, message: u64, respond: Respond },
    /// Give all that there is of a room to another name.
    SetAside { room: RoomKey, name: String, respond: Respond },
    /// Make the room anew.
    Rebuild { room: RoomKey, step: Rebuild, respond: Respond },
}

/// A peer's `sync`, or what takes its place.
#[derive(Debug, Clone, Copy)]
struct Question {
    room: RoomKey,
    asker: Asker,
    wanted: Wanted,
}

/// What is to be answered.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    /// What a peer lacks that knows so much.
    Since(Known),
    /// The operations from a log entry on.
    Live(u64),
}

/// What the archive has to say.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Send these in order; the peer then has the log up to `sent`.
    Send { to: Asker, messages: Vec<Message>, sent: u64 },
    /// The peer at the other end of a link has told all that it has, and lacks something that we have.
    Lacks { link: LinkId },
    /// Somebody out of reach lacks something that we have.
    RoomLacks { room: RoomId },
    /// The peer at the other end of a link may have more than it has told.
    MayLack { link: LinkId },
    /// The highest timestamp of a room has changed.
    Latest { room: RoomKey, latest: Hlc },
    /// What peers have sent is in a room's log, from the entry `first` to `last`; all of it over one link, if it is named.
    Logged { room: RoomKey, first: u64, last: u64, over: Option<LinkId> },
    /// The seed itself has written to a room: tell its peers.
    Wrote { room: RoomKey, message: Message },
    /// Messages of a room were dropped while the disk refused: ask its peers for everything.
    Missed { room: RoomKey },
    /// A room of the cluster is ours to write to.
    Held { room: RoomKey, latest: Option<Hlc>, respond: Respond },
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
    /// Operations in its log.
    pub(crate) operations: u64,
    /// Whether the seed stays out of it for now.
    pub(crate) paused: bool,
}

/// A handle on the archive's threads.
pub(crate) struct Archive {
    requests: SyncSender<Request>,
    /// There is one once there is a room with super admins.
    verifier: Option<Verifier>,
    ruled: HashSet<RoomKey>,
    shared: Arc<Shared>,
    metrics: Metrics,
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
    rooms: HashMap<RoomKey, (String, Option<Arc<Security>>)>,
}

impl Opened {
    /// Opens or creates the archive in `folder`.
    pub(crate) fn open(folder: &Path) -> Result<Self, OpenError> {
        let file = schema::open(folder)?;
        let database = |source| OpenError::Database { path: file.path.clone(), source };
        time_of_day::not_before(room_rows::last_received(&file.connection).map_err(database)?);
        Ok(Self { file, rooms: HashMap::new() })
    }

    /// The room of `config`, created when it is new.
    pub(crate) fn room(&mut self, config: &RoomConfig, source: Source) -> rusqlite::Result<OpenRoom> {
        let room = room_rows::open(&self.file.connection, config, source)?;
        self.rooms.insert(room.key, (config.name.clone(), config.security.clone()));
        Ok(room)
    }

    /// The room called `name`, created when it is new, otherwise as it is.
    pub(crate) fn known(&mut self, name: &str) -> rusqlite::Result<RoomKey> {
        let key = match room_rows::find(&self.file.connection, name)? {
            Some(key) => key,
            None => room_rows::open(&self.file.connection, &RoomConfig::named(name), Source::Settings)?.key,
        };
        self.rooms.insert(key, (name.to_owned(), None));
        Ok(key)
    }

    /// The names of all rooms.
    pub(crate) fn names(&self) -> rusqlite::Result<Vec<String>> {
        room_rows::names(&self.file.connection)
    }

    /// The rooms that were added while the seed ran.
    pub(crate) fn added(&self) -> rusqlite::Result<Vec<RoomConfig>> {
        room_rows::added(&self.file.connection)
    }

    /// Starts the threads.
    pub(crate) fn start(
        self,
        config: ArchiveConfig,
        replies: UnboundedSender<Reply>,
        metrics: Metrics,
        health: Health,
    ) -> Result<Archive, OpenError> {
        let (requests, receiver) = sync_channel(QUEUE_REQUESTS);
        let shared = Arc::new(Shared::default());
        let reader = Reader::start(&self.file, config.identity.clone(), replies.clone(), metrics.clone())?;
        let path = self.file.path.clone();
        let rooms = self.rooms;
        let mut writer = Writer::new(self.file, reader, config, replies, metrics.clone(), health, Arc::clone(&shared));
        let mut ruled = HashSet::new();
        for (key, (name, security)) in rooms {
            ruled.extend(security.is_some().then_some(key));
            writer.take_in(key, name, security);
        }
        let thread = std::thread::Builder::new()
            .name("archive".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|source| OpenError::Folder { path, source })?;
        let mut archive = Archive { requests, verifier: None, ruled: HashSet::new(), shared, metrics, thread };
        ruled.into_iter().for_each(|room| archive.rule(room));
        Ok(archive)
    }
}

impl Archive {
    /// From now on, what peers send to a room is checked for who signed it.
    pub(crate) fn rule(&mut self, room: RoomKey) {
        self.ruled.insert(room);
        if self.verifier.is_none() {
            match Verifier::start(&self.requests, &self.metrics) {
                Ok(verifier) => self.verifier = Some(verifier),
                // Nothing is taken on in the room, since nothing can be checked.
                Err(error) => tracing::error!(%error, "no thread to check signatures"),
            }
        }
    }

    /// A handle for what the cluster asks for. The archive ends once all of them are gone.
    pub(crate) fn client(&self) -> ArchiveClient {
        ArchiveClient { requests: self.requests.clone() }
    }

    /// A room of the cluster is ours to write to; [`Reply::Held`] follows, unless it cannot be.
    pub(crate) fn hold_room(&self, room: RoomKey, respond: Respond) {
        self.ask(Request::Hold { room, respond });
    }

    /// A room of the cluster is no longer ours to write to.
    pub(crate) fn release_room(&self, room: RoomKey, respond: Respond) {
        self.ask(Request::Release { room, respond });
    }

    /// Hands over what a peer sent, to be merged. Returns whether there was room for it; if not, the archive will
    /// ask for everything once it is through ([`Reply::Missed`]).
    pub(crate) fn merge(&self, room: RoomKey, asker: Asker, operations: Received, wall_ms: u64, bytes: usize) -> bool {
        let fits = self.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUE_BYTES;
        let hand_over = || match operations {
            Received::Plain(operations) => {
                let operations = Checked::Plain(operations);
                self.requests.try_send(Request::Merge { room, asker, operations, wall_ms, bytes }).is_ok()
            }
            Received::WithText(operations) => self.verifier.as_ref().is_some_and(|verifier| {
                verifier.hand_over(room, Task::Check { room, asker, operations, wall_ms, bytes })
            }),
        };
        if fits && hand_over() {
            return true;
        }
        self.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.shared.miss(room);
        false
    }

    /// Asks for the answer to a peer's `sync`. Returns whether there was room for the question.
    pub(crate) fn answer(&self, room: RoomKey, asker: Asker, known: Known) -> bool {
        self.question(Question { room, asker, wanted: Wanted::Since(known) })
    }

    /// Asks for the operations from the log entry `first` on, for everybody who is linked in `id`. Returns whether there
    /// was room for the question.
    pub(crate) fn live(&self, room: RoomKey, id: RoomId, first: u64) -> bool {
        self.question(Question { room, asker: Asker::Linked(id), wanted: Wanted::Live(first) })
    }

    fn question(&self, question: Question) -> bool {
        let room = question.room;
        match self.verifier.as_ref().filter(|_| self.ruled.contains(&room)) {
            Some(verifier) => verifier.hand_over(room, Task::Pass(question)),
            None => self.requests.try_send(Request::Answer(question)).is_ok(),
        }
    }

    /// Writes to a room as the one who runs the seed; [`Reply::Wrote`] follows for its peers.
    pub(crate) fn edit(&self, room: RoomKey, edits: Vec<Edit>, wall_ms: u64, respond: Respond<Written>) {
        self.ask(Request::Edit { room, edits, wall_ms, respond });
    }

    /// Takes nodes and removals over as they are.
    pub(crate) fn import(
        &self,
        room: RoomKey,
        nodes: Vec<Node>,
        removals: Vec<Removal>,
        wall_ms: u64,
        respond: Respond<Imported>,
    ) {
        self.ask(Request::Import { room, nodes, removals, wall_ms, respond });
    }

    /// Gives and takes roles by the room's rules.
    pub(crate) fn govern(&self, room: RoomKey, wall_ms: u64) {
        self.ask(Request::Govern { room, wall_ms });
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
            let busy = RoomError::Archive("it is too busy".into());
            // Who asked may have given up waiting.
            match request {
                Request::Open { respond, .. }
                | Request::Pause { respond, .. }
                | Request::Forget { respond, .. }
                | Request::Hold { respond, .. }
                | Request::Release { respond, .. }
                | Request::Adopt { respond, .. }
                | Request::TakeOver { respond, .. }
                | Request::SetAside { respond, .. }
                | Request::Rebuild { respond, .. } => {
                    let _ = respond.send(Err(busy));
                }
                Request::Edit { respond, .. } => drop(respond.send(Err(busy))),
                Request::Import { respond, .. } => drop(respond.send(Err(busy))),
                Request::Position { respond, .. } => drop(respond.send(Err(busy))),
                Request::Govern { .. } => tracing::debug!("the archive is too busy for a room's rules"),
                Request::Merge { .. } | Request::Answer(_) => {}
            }
        }
    }

    /// Commits what was handed over, and ends the threads. Blocks.
    pub(crate) fn close(self) {
        if let Some(verifier) = self.verifier {
            verifier.close();
        }
        drop(self.requests);
        if self.thread.join().is_err() {
            tracing::error!("the archive's thread had panicked");
        }
    }
}

/// What asks the archive on behalf of the cluster, and waits for it.
#[derive(Debug, Clone)]
pub(crate) struct ArchiveClient {
    requests: SyncSender<Request>,
}

impl ArchiveClient {
    async fn ask<T>(&self, request: impl FnOnce(Respond<T>) -> Request) -> Result<T, RoomError> {
        let (respond, response) = tokio::sync::oneshot::channel();
        let (requests, request) = (self.requests.clone(), request(respond));
        // Where the queue is full, it waits.
        let sent = tokio::task::spawn_blocking(move || requests.send(request).is_ok()).await;
        if !sent.unwrap_or(false) {
            return Err(RoomError::Gone);
        }
        response.await.map_err(|_| RoomError::Gone)?
    }

    pub(crate) async fn position(&self, room: RoomKey) -> Result<Position, RoomError> {
        self.ask(|respond| Request::Position { room, respond }).await
    }

    pub(crate) async fn adopt(&self, room: RoomKey, stream: i64) -> Result<(), RoomError> {
        self.ask(|respond| Request::Adopt { room, stream, respond }).await
    }

    pub(crate) async fn take_over(&self, room: RoomKey, entries: Vec<LogEntry>, message: u64) -> Result<(), RoomError> {
        self.ask(|respond| Request::TakeOver { room, entries, message, respond }).await
    }

    pub(crate) async fn set_aside(&self, room: RoomKey, name: String) -> Result<(), RoomError> {
        self.ask(|respond| Request::SetAside { room, name, respond }).await
    }

    pub(crate) async fn rebuild(&self, room: RoomKey, step: Rebuild) -> Result<(), RoomError> {
        self.ask(|respond| Request::Rebuild { room, step, respond }).await
    }
}

fn health_ok(health: &Health) -> bool {
    health.set("archive", State::Ok)
}

/// Compacts some of what was received before `horizon_ms`, and says how many entries.
#[cfg(test)]
pub(crate) fn compact(connection: &mut rusqlite::Connection, horizon_ms: u64) -> u64 {
    compaction::step(connection, horizon_ms).expect("the archive is there")
}

#[cfg(test)]
mod tests;
