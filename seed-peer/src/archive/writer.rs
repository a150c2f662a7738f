//! The thread that writes the archive.

mod commit;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::ErrorCode;
use service::{Health, State};
use tokio::sync::mpsc::UnboundedSender;

use super::graph::{RoomState, signed};
use super::reader::Reader;
use super::replication::{CommitError, Shipping};
use super::schema::ArchiveFile;
use super::{ArchiveConfig, Reply, Request, RoomKey, Shared, compaction, health_ok, room_rows, schema};
use crate::backup::RoomBeing;
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

    /// Ends a transaction that has failed.
    pub(super) fn roll_back(&self) {
        // After some failures SQLite has rolled back by itself.
        if !self.file.connection.is_autocommit()
            && let Err(error) = self.file.connection.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "the archive could not roll back");
        }
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
