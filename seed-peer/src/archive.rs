//! The archive: every operation that was ever accepted, in one SQLite file with one writer.
//!
//! Requests queue up for a thread that merges them, commits them together, and only then lets go of the answers:
//! whatever a peer hears from the archive is on disk. While the disk refuses (full, for one), the thread keeps what
//! it holds, tries again every second, and goes on answering from what it has.

mod answer;
mod graph;
mod schema;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use genosdb::graph::{Outcome, apply, merge};
use genosdb::operation::{FullStateSync, Link, Node, Operation, Remove, Upsert};
use genosdb::{Hlc, Message, PeerId};
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, params};
use service::{Health, State};
use tokio::sync::mpsc::UnboundedSender;

use crate::metrics::Metrics;
use answer::Known as KnownByPeer;
use graph::{RoomGraph, RoomState, signed, unsigned};
use schema::ArchiveFile;
pub use schema::OpenError;

pub(crate) use answer::Known;

/// Requests that wait for the archive's thread, at most.
const QUEUE_REQUESTS: usize = 8_192;
/// Bytes of messages that wait for the archive, on their way or because the disk refuses, at most.
const QUEUE_BYTES: usize = 64 << 20;
/// How long requests are gathered for one commit.
const GROUP_COMMIT: Duration = Duration::from_millis(10);
/// How long to wait before a refusing disk is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Rooms whose whole state is kept ready to be sent.
const CACHED_STATES: usize = 8;

/// What an edge is taken to weigh where counting them would cost more than adding one.
const AVERAGE_EDGE_BYTES: usize = 32;

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
}

impl Default for Bounds {
    fn default() -> Self {
        Self { id_bytes: 1_024, value_bytes: 4 << 20, edges: 65_536, nodes: 2_000_000 }
    }
}

/// Where a room stands in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RoomKey(i64);

/// Names a link in requests and replies; the archive only passes it back.
pub(crate) type LinkToken = u64;

/// What is asked of the archive.
#[derive(Debug)]
enum Request {
    /// Merge what a peer sent. `bytes` is the size of its message.
    Merge { room: RoomKey, link: LinkToken, operations: Vec<Operation>, wall_ms: u64, bytes: usize },
    /// Answer a peer's `sync`.
    Answer { room: RoomKey, link: LinkToken, known: Known },
}

/// What the archive has to say.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Send this to the peer at the other end of the link; it then has the log up to `sent`.
    Send { link: LinkToken, message: Message, sent: u64 },
    /// The highest timestamp of a room has changed.
    Latest { room: RoomKey, latest: Hlc },
    /// Messages of a room were dropped while the disk refused: ask its peers for everything.
    Missed { room: RoomKey },
}

/// A room as the archive holds it at start.
#[derive(Debug, Clone)]
pub(crate) struct OpenRoom {
    pub(crate) key: RoomKey,
    /// The seed's own id in the room.
    pub(crate) peer: PeerId,
    pub(crate) latest: Option<Hlc>,
}

/// A handle on the archive's thread.
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
}

impl Opened {
    /// Opens or creates the archive in `folder`.
    pub(crate) fn open(folder: &Path) -> Result<Self, OpenError> {
        Ok(Self { file: schema::open(folder)? })
    }

    /// The room called `name`, created with the id that `new_peer` makes up when it is new.
    pub(crate) fn room(&self, name: &str, new_peer: impl FnOnce() -> PeerId) -> rusqlite::Result<OpenRoom> {
        let connection = &self.file.connection;
        let row = connection
            .query_row("SELECT id, peer_id, physical, logical FROM room WHERE name = ?", [name], |row| {
                Ok((
                    row.get(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, Option<i64>>(2)?,
                    row.get::<_, Option<i64>>(3)?,
                ))
            })
            .optional()?;
        if let Some((id, peer, physical, logical)) = row
            && let Some(peer) = PeerId::parse(&peer)
        {
            let latest =
                physical.zip(logical).map(|(physical, logical)| Hlc::new(unsigned(physical), unsigned(logical)));
            return Ok(OpenRoom { key: RoomKey(id), peer, latest });
        }
        let peer = new_peer();
        connection.execute(
            "INSERT INTO room (name, peer_id, nodes, seq) VALUES (?1, ?2, 0, 0)
             ON CONFLICT (name) DO UPDATE SET peer_id = ?2",
            params![name, peer.as_str()],
        )?;
        let id = connection.query_row("SELECT id FROM room WHERE name = ?", [name], |row| row.get(0))?;
        Ok(OpenRoom { key: RoomKey(id), peer, latest: None })
    }

    /// Starts the thread. Room names are for metrics.
    pub(crate) fn start(
        self,
        names: HashMap<RoomKey, String>,
        bounds: Bounds,
        replies: UnboundedSender<Reply>,
        metrics: Metrics,
        health: Health,
    ) -> std::io::Result<Archive> {
        let (requests, receiver) = sync_channel(QUEUE_REQUESTS);
        let shared = Arc::new(Shared::default());
        let mut writer = Writer {
            file: self.file,
            names,
            bounds,
            rooms: HashMap::new(),
            states: Vec::new(),
            replies,
            metrics,
            health,
            shared: Arc::clone(&shared),
            held: Vec::new(),
        };
        health_ok(&writer.health);
        writer.publish_rooms();
        let thread = std::thread::Builder::new().name("archive".into()).spawn(move || writer.run(&receiver))?;
        Ok(Archive { requests, shared, thread })
    }
}

fn health_ok(health: &Health) -> bool {
    health.set("archive", State::Ok)
}

impl Archive {
    /// Hands over what a peer sent, to be merged. Returns whether there was room for it; if not, the archive will
    /// ask for everything once it is through ([`Reply::Missed`]).
    pub(crate) fn merge(
        &self,
        room: RoomKey,
        link: LinkToken,
        operations: Vec<Operation>,
        wall_ms: u64,
        bytes: usize,
    ) -> bool {
        let fits = self.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUE_BYTES;
        if fits && self.requests.try_send(Request::Merge { room, link, operations, wall_ms, bytes }).is_ok() {
            return true;
        }
        self.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.shared.miss(room);
        false
    }

    /// Asks for the answer to a peer's `sync`. Returns whether there was room for the question.
    pub(crate) fn answer(&self, room: RoomKey, link: LinkToken, known: Known) -> bool {
        self.requests.try_send(Request::Answer { room, link, known }).is_ok()
    }

    /// Commits what was handed over, and ends the thread. Blocks.
    pub(crate) fn close(self) {
        drop(self.requests);
        if self.thread.join().is_err() {
            tracing::error!("the archive's thread had panicked");
        }
    }
}

/// A full state that is ready to be sent.
struct CachedState {
    room: RoomKey,
    seq: u64,
    message: Message,
}

struct Writer {
    file: ArchiveFile,
    names: HashMap<RoomKey, String>,
    bounds: Bounds,
    rooms: HashMap<RoomKey, RoomState>,
    /// The most recently used last.
    states: Vec<CachedState>,
    replies: UnboundedSender<Reply>,
    metrics: Metrics,
    health: Health,
    shared: Arc<Shared>,
    /// Requests that the disk refused and that are tried again.
    held: Vec<Request>,
}

impl Writer {
    fn run(&mut self, requests: &Receiver<Request>) {
        loop {
            let first = if self.held.is_empty() {
                requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                requests.recv_timeout(RETRY)
            };
            match first {
                Ok(first) => self.gather(first, requests),
                Err(RecvTimeoutError::Timeout) => self.commit(Vec::new()),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if !self.held.is_empty() {
            self.commit(Vec::new());
        }
        if !self.held.is_empty() {
            tracing::error!(messages = self.held.len(), "the disk refused to the end: messages are lost");
        }
        if let Err(error) = self.file.connection.execute_batch("PRAGMA optimize; PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::warn!(%error, "the archive could not tidy up");
        }
    }

    /// Takes what has queued up behind `first`, and commits it together.
    fn gather(&mut self, first: Request, requests: &Receiver<Request>) {
        let start = Instant::now();
        let mut batch = vec![first];
        while start.elapsed() < GROUP_COMMIT && batch.len() < QUEUE_REQUESTS {
            match requests.try_recv() {
                Ok(request) => batch.push(request),
                Err(_) => break,
            }
        }
        self.commit(batch);
    }

    fn commit(&mut self, batch: Vec<Request>) {
        let refusing = !self.held.is_empty();
        let mut all = std::mem::take(&mut self.held);
        all.extend(batch);
        let start = Instant::now();
        match self.try_commit(&all) {
            Ok(replies) => {
                self.metrics.archive_commit_seconds.observe(start.elapsed().as_secs_f64());
                self.release(&all);
                for reply in replies {
                    self.reply(reply);
                }
                if refusing {
                    tracing::info!("the archive writes again");
                }
                health_ok(&self.health);
                self.publish_rooms();
                self.report_missed();
            }
            Err(error) => self.refused(all, &error),
        }
    }

    /// Merges and answers inside one transaction; the replies are for after it.
    fn try_commit(&mut self, batch: &[Request]) -> rusqlite::Result<Vec<Reply>> {
        self.file.connection.execute_batch("BEGIN IMMEDIATE")?;
        let before = self.rooms.clone();
        let result = self.process_all(batch).and_then(|replies| {
            self.save_rooms(&before)?;
            self.file.connection.execute_batch("COMMIT")?;
            Ok(replies)
        });
        if result.is_err() {
            // After some failures SQLite has rolled back by itself.
            if !self.file.connection.is_autocommit()
                && let Err(error) = self.file.connection.execute_batch("ROLLBACK")
            {
                tracing::error!(%error, "the archive could not roll back");
            }
            self.rooms = before;
            self.states.clear();
        }
        result
    }

    fn process_all(&mut self, batch: &[Request]) -> rusqlite::Result<Vec<Reply>> {
        let mut replies = Vec::new();
        for request in batch {
            self.file.connection.execute_batch("SAVEPOINT request")?;
            let room = match request {
                Request::Merge { room, .. } | Request::Answer { room, .. } => *room,
            };
            let before = self.rooms.get(&room).cloned();
            let mut its_replies = Vec::new();
            match self.process(request, &mut its_replies) {
                Ok(()) => replies.append(&mut its_replies),
                Err(error) if is_of_the_disk(&error) => return Err(error),
                Err(error) => {
                    // Ours to mend, but not to stop the room for: the message is left out.
                    tracing::error!(%error, "the archive could not take a message");
                    self.metrics.operations.with_label_values(&["failed"]).inc();
                    self.file.connection.execute_batch("ROLLBACK TO request")?;
                    self.states.clear();
                    match before {
                        Some(before) => self.rooms.insert(room, before),
                        None => self.rooms.remove(&room),
                    };
                }
            }
            self.file.connection.execute_batch("RELEASE request")?;
        }
        Ok(replies)
    }

    fn process(&mut self, request: &Request, replies: &mut Vec<Reply>) -> rusqlite::Result<()> {
        match request {
            Request::Answer { room, link, known } => {
                let mut state = self.take_room(*room)?;
                let answered = self.answer(*room, &mut state, *known);
                let sent = state.seq;
                self.rooms.insert(*room, state);
                replies.push(Reply::Send { link: *link, message: answered?, sent });
            }
            Request::Merge { room, link, operations, wall_ms, .. } => {
                let mut state = self.take_room(*room)?;
                let before = state.latest;
                let merged = self.merge(&mut state, operations, *wall_ms);
                let (latest, sent) = (state.latest, state.seq);
                let answer = match merged {
                    // The peer lacks something: send it everything.
                    Ok(true) => Some(self.answer(*room, &mut state, KnownByPeer { timestamp: None, sent: None })),
                    Ok(false) => None,
                    Err(error) => {
                        self.rooms.insert(*room, state);
                        return Err(error);
                    }
                };
                self.rooms.insert(*room, state);
                if let Some(answer) = answer {
                    replies.push(Reply::Send { link: *link, message: answer?, sent });
                }
                if let Some(latest) = latest.filter(|_| latest != before) {
                    replies.push(Reply::Latest { room: *room, latest });
                }
            }
        }
        Ok(())
    }

    /// The room's state, which the caller puts back.
    fn take_room(&mut self, room: RoomKey) -> rusqlite::Result<RoomState> {
        match self.rooms.remove(&room) {
            Some(state) => Ok(state),
            None => load_room(&self.file.connection, room),
        }
    }

    fn answer(&mut self, key: RoomKey, room: &mut RoomState, known: Known) -> rusqlite::Result<Message> {
        let cached = self.states.iter().position(|state| state.room == key);
        if known.timestamp.is_some() {
            self.metrics.answers.with_label_values(&["sync"]).inc();
            return answer::to_sync(&self.file.connection, room, known);
        }
        self.metrics.answers.with_label_values(&["full_state"]).inc();
        if let Some(index) = cached {
            let state = self.states.remove(index);
            if state.seq == room.seq {
                let message = state.message.clone();
                self.states.push(state);
                return Ok(message);
            }
        }
        let message = answer::full_state(&self.file.connection, room)?;
        if self.states.len() >= CACHED_STATES {
            self.states.remove(0);
        }
        self.states.push(CachedState { room: key, seq: room.seq, message: message.clone() });
        Ok(message)
    }

    /// Merges what a peer sent. Returns whether the peer lacks something that we have.
    fn merge(&mut self, state: &mut RoomState, operations: &[Operation], wall_ms: u64) -> rusqlite::Result<bool> {
        let mut sender_lacks = false;
        for operation in operations {
            match operation {
                Operation::Upsert(_) | Operation::Remove(_) | Operation::Link(_) => {
                    self.apply(state, operation, wall_ms)?;
                }
                Operation::DeltaSync(delta) => {
                    for operation in &delta.operations {
                        self.apply(state, operation, wall_ms)?;
                    }
                }
                Operation::FullStateSync(full) => sender_lacks |= self.merge_state(state, full, wall_ms)?,
                Operation::Sync(_) => {}
            }
        }
        Ok(sender_lacks)
    }

    fn apply(&mut self, state: &mut RoomState, operation: &Operation, wall_ms: u64) -> rusqlite::Result<()> {
        let result = match self.too_much(operation, state)? {
            Some(reason) => reason,
            None => {
                let mut graph = RoomGraph { connection: &self.file.connection, state };
                match apply(&mut graph, operation, wall_ms)? {
                    Outcome::Applied => {
                        let operation = capped(operation, wall_ms);
                        state.see(timestamp_of(&operation));
                        self.log(state, 0, &operation.to_string(), wall_ms)?;
                        "applied"
                    }
                    Outcome::Superseded => "superseded",
                    Outcome::Incomplete => "incomplete",
                }
            }
        };
        self.metrics.operations.with_label_values(&[result]).inc();
        Ok(())
    }

    /// Why an operation is beyond the bounds, if it is.
    fn too_much(&self, operation: &Operation, state: &mut RoomState) -> rusqlite::Result<Option<&'static str>> {
        let bounds = &self.bounds;
        let long = |id: &genosdb::JsonString| id.as_printed().len() > bounds.id_bytes;
        let too_large = match operation {
            Operation::Upsert(Upsert { id, value, extra, .. }) | Operation::Remove(Remove { id, value, extra, .. }) => {
                let value = value.as_ref().map_or(0, |value| value.as_str().len());
                long(id) || value + extra_bytes(extra) > bounds.value_bytes
            }
            Operation::Link(Link { source, target, extra, .. }) => {
                long(source)
                    || long(target)
                    || extra_bytes(extra) > bounds.value_bytes
                    || RoomGraph { connection: &self.file.connection, state }.edges_bytes(source)?
                        > bounds.edges.saturating_mul(AVERAGE_EDGE_BYTES)
            }
            _ => false,
        };
        Ok(if too_large {
            Some("too_large")
        } else if state.nodes >= bounds.nodes && matches!(operation, Operation::Upsert(_)) {
            Some("room_full")
        } else {
            None
        })
    }

    fn merge_state(&mut self, state: &mut RoomState, full: &FullStateSync, wall_ms: u64) -> rusqlite::Result<bool> {
        let bounds = self.bounds;
        let mut refused = 0;
        let mut taken = 0;
        let held = state.nodes;
        let accept = |node: &Node| {
            let value = node.value.as_ref().map_or(0, |value| value.as_str().len()) + extra_bytes(&node.extra);
            let fits = node.id.as_printed().len() <= bounds.id_bytes
                && value <= bounds.value_bytes
                && node.edges.len() <= bounds.edges
                && node.edges.iter().all(|edge| edge.as_printed().len() <= bounds.id_bytes)
                && held + taken < bounds.nodes;
            taken += u64::from(fits);
            refused += u64::from(!fits);
            fits
        };
        let mut graph = RoomGraph { connection: &self.file.connection, state };
        let merged = merge(&mut graph, full, wall_ms, accept)?;
        for removal in &merged.removals {
            state.see(removal.timestamp);
            let operation = Operation::Remove(Remove {
                id: removal.id.clone(),
                value: None,
                timestamp: removal.timestamp,
                extra: Vec::new(),
            });
            self.log(state, 0, &operation.to_string(), wall_ms)?;
        }
        for node in &merged.nodes {
            state.see(node.timestamp);
            let mut text = String::new();
            node.print(&mut text);
            self.log(state, 1, &text, wall_ms)?;
        }
        let applied = merged.nodes.len() + merged.removals.len();
        self.metrics.operations.with_label_values(&["applied"]).inc_by(u64::try_from(applied).unwrap_or(u64::MAX));
        self.metrics.operations.with_label_values(&["too_large"]).inc_by(refused);
        Ok(merged.sender_lacks)
    }

    fn log(&self, state: &mut RoomState, kind: i64, operation: &str, wall_ms: u64) -> rusqlite::Result<()> {
        state.seq += 1;
        self.file.connection.prepare_cached("INSERT INTO log VALUES (?, ?, ?, ?, ?)")?.execute(params![
            state.id,
            signed(state.seq),
            signed(wall_ms),
            kind,
            operation
        ])?;
        Ok(())
    }

    fn save_rooms(&self, before: &HashMap<RoomKey, RoomState>) -> rusqlite::Result<()> {
        for (key, state) in &self.rooms {
            if before.get(key) != Some(state) {
                self.file
                    .connection
                    .prepare_cached("UPDATE room SET nodes = ?, seq = ?, physical = ?, logical = ? WHERE id = ?")?
                    .execute(params![
                        signed(state.nodes),
                        signed(state.seq),
                        state.latest.map(|latest| signed(latest.physical)),
                        state.latest.map(|latest| signed(latest.logical)),
                        state.id
                    ])?;
            }
        }
        Ok(())
    }

    /// The disk refuses: keep what is to be written, answer what can be answered.
    fn refused(&mut self, batch: Vec<Request>, error: &rusqlite::Error) {
        let reason = format!("cannot write: {error}");
        if self.health.set("archive", State::Degraded(reason)) {
            tracing::error!(%error, "the archive cannot write; it keeps what it has and tries again every second");
        }
        self.metrics.archive_failures.inc();
        // What was committed before may still stand in the write-ahead log; in the file itself it takes less room.
        if let Err(error) = self.file.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::debug!(%error, "the write-ahead log cannot be emptied");
        }
        for request in batch {
            match request {
                Request::Merge { .. } => self.held.push(request),
                Request::Answer { .. } => {
                    let mut replies = Vec::new();
                    match self.process(&request, &mut replies) {
                        Ok(()) => replies.into_iter().for_each(|reply| self.reply(reply)),
                        Err(error) => tracing::warn!(%error, "the archive cannot read"),
                    }
                }
            }
        }
    }

    /// Gives the bytes of written messages back to the queue's budget.
    fn release(&self, batch: &[Request]) {
        for request in batch {
            if let Request::Merge { bytes, .. } = request {
                self.shared.queued_bytes.fetch_sub(*bytes, Ordering::Relaxed);
            }
        }
    }

    fn report_missed(&self) {
        let missed = std::mem::take(&mut *self.shared.missed.lock().unwrap_or_else(PoisonError::into_inner));
        for room in missed {
            self.reply(Reply::Missed { room });
        }
    }

    fn reply(&self, reply: Reply) {
        // The other side is gone at shutdown: then nobody needs the reply.
        let _ = self.replies.send(reply);
    }

    fn publish_rooms(&mut self) {
        for (key, name) in &self.names {
            let state = match self.rooms.get(key) {
                Some(state) => state.clone(),
                None => match load_room(&self.file.connection, *key) {
                    Ok(state) => {
                        self.rooms.insert(*key, state.clone());
                        state
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the archive cannot read a room");
                        continue;
                    }
                },
            };
            self.metrics.nodes.with_label_values(&[name]).set(signed(state.nodes));
            self.metrics.logged.with_label_values(&[name]).set(signed(state.seq));
        }
    }
}

fn load_room(connection: &Connection, room: RoomKey) -> rusqlite::Result<RoomState> {
    connection.prepare_cached("SELECT nodes, seq, physical, logical FROM room WHERE id = ?")?.query_row(
        [room.0],
        |row| {
            let (physical, logical): (Option<i64>, Option<i64>) = (row.get(2)?, row.get(3)?);
            Ok(RoomState {
                id: room.0,
                nodes: unsigned(row.get(0)?),
                seq: unsigned(row.get(1)?),
                latest: physical
                    .zip(logical)
                    .map(|(physical, logical)| Hlc::new(unsigned(physical), unsigned(logical))),
            })
        },
    )
}

/// Whether an error will pass when the disk has space or works again.
fn is_of_the_disk(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            ErrorCode::DiskFull
                | ErrorCode::SystemIoFailure
                | ErrorCode::ReadOnly
                | ErrorCode::CannotOpen
                | ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::DatabaseCorrupt
                | ErrorCode::PermissionDenied
                | ErrorCode::OutOfMemory
        )
    )
}

fn extra_bytes(extra: &genosdb::operation::Extra) -> usize {
    extra.iter().map(|(name, value)| name.as_printed().len() + value.as_str().len()).sum()
}

/// The operation with its timestamp as the merge rules used it.
fn capped(operation: &Operation, wall_ms: u64) -> Operation {
    let mut operation = operation.clone();
    if let Operation::Upsert(Upsert { timestamp, .. })
    | Operation::Remove(Remove { timestamp, .. })
    | Operation::Link(Link { timestamp, .. }) = &mut operation
    {
        *timestamp = timestamp.capped(wall_ms);
    }
    operation
}

fn timestamp_of(operation: &Operation) -> Hlc {
    match operation {
        Operation::Upsert(Upsert { timestamp, .. })
        | Operation::Remove(Remove { timestamp, .. })
        | Operation::Link(Link { timestamp, .. }) => *timestamp,
        Operation::Sync(_) | Operation::DeltaSync(_) | Operation::FullStateSync(_) => Hlc::default(),
    }
}

#[cfg(test)]
mod tests;
