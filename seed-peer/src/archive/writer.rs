//! The thread that writes the archive.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use genosdb::Operation;
use rusqlite::ErrorCode;
use service::{Health, State};
use tokio::sync::mpsc::UnboundedSender;

use super::graph::{RoomState, signed};
use super::reader::Reader;
use super::replication::{CommitError, Shipping};
use super::schema::ArchiveFile;
use super::{ArchiveConfig, Asker, Checked, Reply, Request, RoomKey, Shared, compaction, health_ok, room_rows, schema};
use crate::backup::RoomBeing;
use crate::links::LinkId;
use crate::metrics::Metrics;
use crate::notices::Notices;
use crate::rooms::RoomError;
use crate::security::Security;

/// How long requests are gathered for one commit.
const GROUP_COMMIT: Duration = Duration::from_millis(10);
/// How long to wait before a refusing disk is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// When nothing has come for so long, nothing much is happening.
const IDLE: Duration = Duration::from_secs(5);
/// How often old operations are looked for.
const COMPACTION_INTERVAL: Duration = Duration::from_secs(600);

/// Requests that are committed together.
const BATCH_REQUESTS: usize = super::QUEUE_REQUESTS;

pub(super) struct Writer {
    pub(super) file: ArchiveFile,
    reader: Reader,
    names: HashMap<RoomKey, String>,
    /// How rooms with super admins are ruled.
    pub(super) ruled: HashMap<RoomKey, Arc<Security>>,
    pub(super) config: ArchiveConfig,
    next_compaction: Instant,
    /// The rooms as they are committed.
    pub(super) rooms: HashMap<RoomKey, RoomState>,
    replies: UnboundedSender<Reply>,
    pub(super) metrics: Metrics,
    health: Health,
    shared: Arc<Shared>,
    /// Requests that the disk, or the cluster, refused and that are tried again.
    held: Vec<Request>,
    /// When to try again, since the last thing that was to be written was refused.
    next_try: Option<Instant>,
    pub(super) refusals: Notices<(i64, &'static str)>,
    /// The log entry up to which each room's rules have seen everything.
    pub(super) governed: HashMap<RoomKey, u64>,
    /// The cluster that rooms are shared with.
    pub(super) shipping: Option<Shipping>,
    /// Rooms that are being made anew from a snapshot.
    pub(super) rebuilding: HashMap<RoomKey, RoomBeing>,
}

impl Writer {
    pub(super) fn new(
        file: ArchiveFile,
        reader: Reader,
        mut config: ArchiveConfig,
        replies: UnboundedSender<Reply>,
        metrics: Metrics,
        health: Health,
        shared: Arc<Shared>,
    ) -> Self {
        health_ok(&health);
        let shipping = config.shipping.take();
        Self {
            file,
            reader,
            names: HashMap::new(),
            ruled: HashMap::new(),
            config,
            next_compaction: Instant::now(),
            rooms: HashMap::new(),
            replies,
            metrics,
            health,
            shared,
            held: Vec::new(),
            next_try: None,
            refusals: Notices::default(),
            governed: HashMap::new(),
            shipping,
            rebuilding: HashMap::new(),
        }
    }

    /// Gives a room its name in metrics and publishes its size, and learns who rules it.
    pub(super) fn take_in(&mut self, room: RoomKey, name: String, security: Option<Arc<Security>>) {
        match security {
            Some(security) => self.ruled.insert(room, security),
            None => self.ruled.remove(&room),
        };
        match room_rows::load(&self.file.connection, room) {
            Ok(state) => {
                self.publish(&name, &state);
                self.rooms.insert(room, state);
            }
            Err(error) => tracing::warn!(%error, "the archive cannot read a room"),
        }
        self.names.insert(room, name);
    }

    pub(super) fn run(&mut self, requests: &Receiver<Request>) {
        let mut busy = false;
        loop {
            let due = match (self.next_try, self.config.keep) {
                (Some(next_try), _) => Some(next_try),
                (None, Some(_)) => Some(self.next_compaction),
                (None, None) => None,
            };
            let wait = due.map_or(IDLE, |due| due.saturating_duration_since(Instant::now()).min(IDLE));
            match requests.recv_timeout(wait) {
                Ok(first) => {
                    self.gather(first, requests);
                    busy = true;
                }
                Err(RecvTimeoutError::Timeout) if self.next_try.is_some() => {}
                Err(RecvTimeoutError::Timeout) => {
                    if std::mem::take(&mut busy) {
                        self.shrink();
                    }
                    self.compact();
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            // By the clock: where requests never cease, of which none writes, nothing else would find out.
            if self.next_try.is_some_and(|next_try| next_try <= Instant::now()) {
                self.try_again();
            }
        }
        if !self.held.is_empty() {
            self.commit(Vec::new());
        }
        if !self.held.is_empty() {
            tracing::error!(messages = self.held.len(), "the disk refused to the end: messages are lost");
        }
        self.reader.close();
        if let Err(error) = self.file.connection.execute_batch("PRAGMA optimize; PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::warn!(%error, "the archive could not tidy up");
        }
    }

    /// Takes what has queued up behind `first`, and commits it together.
    fn gather(&mut self, first: Request, requests: &Receiver<Request>) {
        let start = Instant::now();
        let mut batch = Vec::new();
        let mut next = Some(first);
        while let Some(request) = next {
            match request {
                Request::Merge { .. } | Request::Answer(_) => batch.push(request),
                wish => {
                    // In order, but each by itself: who asked waits for what becomes of it.
                    self.commit(std::mem::take(&mut batch));
                    self.grant(wish);
                }
            }
            next = (start.elapsed() < GROUP_COMMIT && batch.len() < BATCH_REQUESTS)
                .then(|| requests.try_recv().ok())
                .flatten();
        }
        self.commit(batch);
    }

    /// Does what the one who runs the seed asked for.
    fn grant(&mut self, wish: Request) {
        let connection = &self.file.connection;
        let failed = |error: rusqlite::Error| RoomError::Archive(error.to_string());
        // Who asked may have given up waiting, here and below.
        match wish {
            Request::Open { config, source, respond } => match room_rows::open(connection, &config, source) {
                Ok(opened) => {
                    self.take_in(opened.key, config.name.clone(), config.security.clone());
                    self.reply(Reply::Opened { config, opened, added: source, respond });
                }
                Err(error) => {
                    let _ = respond.send(Err(failed(error)));
                }
            },
            Request::Pause { room, paused, respond } => {
                let _ = respond.send(room_rows::set_paused(connection, room, paused).map_err(failed));
            }
            Request::Forget { room, respond } => {
                let forgotten = room_rows::forget(connection, room).map_err(failed);
                if let Some(name) = self.names.remove(&room) {
                    for gauge in [&self.metrics.nodes, &self.metrics.node_bytes, &self.metrics.logged] {
                        // A room that could not be read has none.
                        let _ = gauge.remove_label_values(&[&name]);
                    }
                }
                let _ = respond.send(forgotten);
            }
            Request::Edit { room, edits, wall_ms, respond } => {
                let written = self.edit(room, &edits, wall_ms).map_err(RoomError::from);
                let _ = respond.send(written);
            }
            Request::Import { room, nodes, removals, wall_ms, respond } => {
                let imported = self.import(room, nodes, removals, wall_ms).map_err(RoomError::from);
                let _ = respond.send(imported);
            }
            Request::Govern { room, wall_ms } => self.govern(room, wall_ms),
            Request::Merge { .. } | Request::Answer(_) => {}
            of_cluster => self.share(of_cluster),
        }
    }

    fn commit(&mut self, batch: Vec<Request>) {
        if batch.is_empty() && self.held.is_empty() {
            return;
        }
        let mut all = std::mem::take(&mut self.held);
        all.extend(batch);
        let start = Instant::now();
        let result = if all.iter().all(|request| matches!(request, Request::Answer(_))) {
            Ok(Committed::default())
        } else {
            self.commit_in_turn(&all)
        };
        match result {
            Ok(Committed { rooms, replies, .. }) => {
                if !rooms.is_empty() {
                    self.metrics.archive_commit_seconds.observe(start.elapsed().as_secs_f64());
                }
                // What writes nothing does not show that anything can be written.
                let shows_that_it_writes = !rooms.is_empty();
                for state in rooms.into_values() {
                    let room = RoomKey(state.id);
                    let (first, last) = (self.rooms.get(&room).map_or(0, |before| before.seq) + 1, state.seq);
                    self.committed(state);
                    if first <= last {
                        self.reply(Reply::Logged { room, first, last, over: only_link(&all, room) });
                    }
                }
                self.release(&all);
                for request in all {
                    if let Request::Answer(question) = request {
                        self.reader.ask(question);
                    }
                }
                for reply in replies {
                    self.reply(reply);
                }
                if shows_that_it_writes || self.next_try.is_none() {
                    self.writes();
                }
            }
            Err(error) => self.refused(all, &error),
        }
    }

    /// Commits, and where another instance was faster, once more behind that.
    fn commit_in_turn(&mut self, batch: &[Request]) -> Result<Committed, CommitError> {
        let mut caught_up = HashSet::new();
        loop {
            match self.try_commit(batch) {
                Err(CommitError::Behind(room)) if caught_up.insert(room) => self.catch_up(room)?,
                result => return result,
            }
        }
    }

    /// Merges inside one transaction; the replies are for after it.
    fn try_commit(&mut self, batch: &[Request]) -> Result<Committed, CommitError> {
        self.file.connection.execute_batch("BEGIN IMMEDIATE")?;
        let mut committed = Committed::default();
        let result = self.merge_all(batch, &mut committed).map_err(CommitError::from).and_then(|()| {
            for state in committed.rooms.values() {
                room_rows::save(&self.file.connection, state)?;
            }
            let logged = |room: &RoomKey| (*room, self.rooms.get(room).map_or(0, |before| before.seq));
            let shipped = self.ship(&committed.rooms.keys().map(logged).collect::<Vec<_>>())?;
            self.file.connection.execute_batch("COMMIT")?;
            Ok(shipped)
        });
        match result {
            Ok(shipped) => {
                self.shipped(shipped);
                Ok(committed)
            }
            Err(error) => {
                self.roll_back();
                Err(error)
            }
        }
    }

    /// Ends a transaction that has failed.
    pub(super) fn roll_back(&self) {
        // After some failures SQLite has rolled back by itself.
        if !self.file.connection.is_autocommit()
            && let Err(error) = self.file.connection.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "the archive could not roll back");
        }
    }

    fn merge_all(&mut self, batch: &[Request], committed: &mut Committed) -> rusqlite::Result<()> {
        for (request, is_outdated) in batch.iter().zip(outdated_states(batch)) {
            let Request::Merge { room, asker, operations, wall_ms, .. } = request else { continue };
            if is_outdated || !self.may_write(*room) {
                continue;
            }
            let before = match committed.rooms.get(room).or_else(|| self.rooms.get(room)) {
                Some(state) => state.clone(),
                None => room_rows::load(&self.file.connection, *room)?,
            };
            let mut state = before.clone();
            self.file.connection.execute_batch("SAVEPOINT message")?;
            match self.merge(&mut state, operations, *wall_ms) {
                Ok(gaps) => {
                    if gaps.ours
                        && let Asker::Link(link) = *asker
                    {
                        committed.replies.push(Reply::MayLack { link });
                    }
                    if gaps.theirs {
                        committed.replies.push(lacking(*asker));
                    }
                    if let Some(latest) = state.latest.filter(|_| state.latest != before.latest) {
                        committed.replies.push(Reply::Latest { room: *room, latest });
                    }
                    if state != before {
                        committed.rooms.insert(*room, state);
                    }
                }
                Err(error) if is_of_the_disk(&error) => return Err(error),
                Err(error) => {
                    // Ours to mend, but not to stop the room for: the message is left out.
                    tracing::error!(%error, "the archive could not take a message");
                    self.metrics.operations.with_label_values(&["failed"]).inc();
                    self.file.connection.execute_batch("ROLLBACK TO message")?;
                }
            }
            self.file.connection.execute_batch("RELEASE message")?;
        }
        Ok(())
    }

    /// What was to be written is.
    fn writes(&mut self) {
        if self.next_try.take().is_some() {
            tracing::info!("the archive writes again");
        }
        health_ok(&self.health);
        self.report_missed();
    }

    /// Tries to write what waits for it.
    fn try_again(&mut self) {
        self.next_try = Some(Instant::now() + RETRY);
        if self.held.is_empty() {
            self.try_disk();
        } else {
            self.commit(Vec::new());
        }
    }

    /// Writes what stands there anyway: what was refused is not ours to write any more, but whether anything can be
    /// written is still to be known.
    fn try_disk(&mut self) {
        match self.file.connection.pragma_update(None, "user_version", schema::VERSION) {
            Ok(()) => self.writes(),
            Err(error) => tracing::debug!(%error, "the archive still cannot write"),
        }
    }

    /// The disk refuses: keep what is to be written, answer what can be answered.
    pub(super) fn refused(&mut self, batch: Vec<Request>, error: &CommitError) {
        let reason = format!("cannot write: {error}");
        if self.health.set("archive", State::Degraded(reason)) {
            tracing::error!(%error, "the archive cannot write; it keeps what it has and tries again every second");
        }
        self.next_try.get_or_insert_with(|| Instant::now() + RETRY);
        self.metrics.archive_failures.inc();
        // What was committed before may still stand in the write-ahead log; in the file itself it takes less room.
        if let Err(error) = self.file.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::debug!(%error, "the write-ahead log cannot be emptied");
        }
        for request in batch {
            match request {
                Request::Answer(question) => self.reader.ask(question),
                merge => self.held.push(merge),
            }
        }
    }

    /// Gives memory back that a busy time has left behind.
    fn shrink(&self) {
        if let Err(error) = self.file.connection.execute_batch("PRAGMA shrink_memory") {
            tracing::debug!(%error, "the archive keeps its memory");
        }
    }

    /// Takes a step in compacting what is older than is to be kept.
    fn compact(&mut self) {
        let Some(keep) = self.config.keep.filter(|_| Instant::now() >= self.next_compaction) else { return };
        let horizon_ms =
            crate::time_of_day::wall_ms().saturating_sub(u64::try_from(keep.as_millis()).unwrap_or(u64::MAX));
        match compaction::step(&mut self.file.connection, horizon_ms) {
            // The rest follows at once, but for what has queued up meanwhile.
            Ok(taken) if taken > 0 => {
                self.metrics.compacted.inc_by(taken);
                self.next_compaction = Instant::now() + Duration::from_millis(1);
            }
            Ok(_) => self.next_compaction = Instant::now() + COMPACTION_INTERVAL,
            Err(error) => {
                tracing::warn!(%error, "the archive could not be compacted");
                self.next_compaction = Instant::now() + COMPACTION_INTERVAL;
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

    /// What waits to be written to a room is not ours to write any more: whoever holds it now has it from its peers.
    pub(super) fn forget_held(&mut self, room: RoomKey) {
        let of_room = |request: &mut Request| matches!(request, Request::Merge { room: other, .. } if *other == room);
        let forgotten: Vec<Request> = self.held.extract_if(.., of_room).collect();
        self.release(&forgotten);
    }

    fn report_missed(&self) {
        let missed = std::mem::take(&mut *self.shared.missed.lock().unwrap_or_else(PoisonError::into_inner));
        for room in missed {
            self.reply(Reply::Missed { room });
        }
    }

    pub(super) fn reply(&self, reply: Reply) {
        // The other side is gone at shutdown: then nobody needs the reply.
        let _ = self.replies.send(reply);
    }

    /// Takes note of where a room stands after a commit.
    pub(super) fn committed(&mut self, state: RoomState) {
        let key = RoomKey(state.id);
        if let Some(name) = self.names.get(&key) {
            self.publish(name, &state);
        }
        self.rooms.insert(key, state);
    }

    /// The room's name as configured; empty for one that is not.
    pub(super) fn name_of(&self, room: RoomKey) -> &str {
        self.names.get(&room).map_or("", String::as_str)
    }

    fn publish(&self, name: &str, state: &RoomState) {
        self.metrics.nodes.with_label_values(&[name]).set(signed(state.nodes));
        self.metrics.node_bytes.with_label_values(&[name]).set(signed(state.bytes));
        self.metrics.logged.with_label_values(&[name]).set(signed(state.seq));
    }
}

/// What a transaction has come to.
#[derive(Default)]
struct Committed {
    /// The rooms that have changed.
    rooms: HashMap<RoomKey, RoomState>,
    replies: Vec<Reply>,
}

/// The link over which everything came that was merged into a room, if it was one.
fn only_link(merged: &[Request], room: RoomKey) -> Option<LinkId> {
    let mut askers = merged.iter().filter_map(|request| match request {
        Request::Merge { room: other, asker, .. } if *other == room => Some(*asker),
        _ => None,
    });
    let Some(Asker::Link(link)) = askers.next() else { return None };
    askers.all(|asker| asker == Asker::Link(link)).then_some(link)
}

/// A peer lacks something.
fn lacking(asker: Asker) -> Reply {
    match asker {
        Asker::Link(link) => Reply::Lacks { link },
        Asker::Room(room) | Asker::Linked(room) => Reply::RoomLacks { room },
    }
}

/// Which of the requests are states of peers that have sent another since: it holds all that they did. Peers answer each
/// other's states with their own while they write, and there may be many.
fn outdated_states(batch: &[Request]) -> Vec<bool> {
    let mut later = HashSet::new();
    let mut outdated = vec![false; batch.len()];
    for (request, is_outdated) in batch.iter().zip(&mut outdated).rev() {
        if let Request::Merge { room, asker: Asker::Link(link), operations: Checked::Plain(operations), .. } = request
            && matches!(operations[..], [Operation::FullStateSync(_)])
        {
            *is_outdated = !later.insert((*room, *link));
        }
    }
    outdated
}

/// Whether an error will pass when the disk has space or works again.
pub(super) fn is_of_the_disk(error: &rusqlite::Error) -> bool {
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

#[cfg(test)]
mod tests {
    use genosdb::MemoryGraph;

    use super::*;

    #[test]
    fn of_several_states_of_a_peer_the_last_one_counts() {
        let state = || Operation::FullStateSync(MemoryGraph::default().full_state());
        let merge = |room, link, operations| Request::Merge {
            room: RoomKey(room),
            asker: Asker::Link(link),
            operations: Checked::Plain(operations),
            wall_ms: 0,
            bytes: 0,
        };
        let batch = [
            merge(1, 1, vec![state()]),
            merge(1, 2, vec![state()]),
            // Who speaks of more than its state is heard.
            merge(1, 1, vec![state(), state()]),
            merge(2, 1, vec![state()]),
            merge(1, 1, vec![state()]),
        ];
        assert_eq!(outdated_states(&batch), [true, false, false, false, false]);
    }
}
