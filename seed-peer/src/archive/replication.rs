//! How a room's log is shared with other instances of a cluster: what the one that holds the room accepts goes to the
//! room's stream before it is committed here, and what another has put there is taken over as it is.
//!
//! So the archive is never ahead of the stream: it is a copy of it, up to some message. What counts is what the stream
//! has acknowledged; a batch that it does not take is kept and tried again, as with a disk that refuses.

use std::collections::HashMap;
use std::time::Instant;

use futures_util::future::join_all;
use rusqlite::{Connection, OptionalExtension as _, params};
use service::Cluster;
use tokio::runtime::Handle;

use super::compaction::replay;
use super::entry::{self, LogEntry};
use super::graph::{RoomGraph, signed, unsigned};
use super::writer::{Writer, is_of_the_disk};
use super::{Reply, Request, RoomKey, room_rows};
use crate::backup::{BackupError, Room, RoomBeing, Segment};
use crate::cluster::{RoomStream, StreamError};
use crate::rooms::RoomError;

/// The cluster as the archive needs it.
#[derive(Debug)]
pub(crate) struct Shipping {
    /// What drives the connection with NATS.
    pub(crate) runtime: Handle,
    pub(crate) cluster: Cluster,
    held: HashMap<RoomKey, Held>,
}

/// A room that is ours to write to.
#[derive(Debug)]
struct Held {
    stream: RoomStream,
    /// The last message of the stream.
    position: u64,
}

impl Shipping {
    pub(crate) fn new(runtime: Handle, cluster: Cluster) -> Self {
        Self { runtime, cluster, held: HashMap::new() }
    }
}

/// Where a room's archive stands in the stream of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// When the stream was made, s since the Unix epoch. `None`: the archive is of no stream.
    pub(crate) stream: Option<i64>,
    /// The last message of it that was taken in.
    pub(crate) message: u64,
    /// The last entry of the log.
    pub(crate) seq: u64,
}

/// A room is made anew, in steps.
#[derive(Debug)]
pub(crate) enum Rebuild {
    /// Forget what there is; what follows is of this room.
    Begin(Box<Room>),
    Snapshot(Segment, Vec<u8>),
    Log(Segment, Vec<u8>),
    /// It is whole, and stands there in that stream.
    Finish {
        stream: i64,
        message: u64,
    },
}

/// A commit that did not come to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommitError {
    #[error(transparent)]
    Database(#[from] rusqlite::Error),
    /// The stream has more than this archive.
    #[error("the room's stream has gone on")]
    Behind(RoomKey),
    #[error("the cluster does not take it: {0}")]
    Away(String),
    #[error("another machine holds the room")]
    NotHeld,
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
}

/// A room cannot be taken over from the stream.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeOverError {
    #[error(transparent)]
    Database(#[from] rusqlite::Error),
    #[error("entries of the room's log are missing in its stream: after {after} comes {found}")]
    Gap { after: u64, found: u64 },
}

pub(super) fn position(connection: &Connection, room: RoomKey) -> rusqlite::Result<Position> {
    let row = connection
        .query_row("SELECT made, position FROM stream WHERE room = ?", [room.0], |row| {
            Ok((row.get(0)?, unsigned(row.get(1)?)))
        })
        .optional()?;
    let seq = room_rows::load(connection, room)?.seq;
    Ok(Position { stream: row.map(|(made, _)| made), message: row.map_or(0, |(_, message)| message), seq })
}

fn set_position(connection: &Connection, room: RoomKey, message: u64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE stream SET position = ? WHERE room = ?")?
        .execute(params![signed(message), room.0])?;
    Ok(())
}

fn adopt(connection: &Connection, room: RoomKey, stream: i64, message: u64) -> rusqlite::Result<()> {
    connection.execute(
        "INSERT INTO stream (room, made, position) VALUES (?1, ?2, ?3)
         ON CONFLICT (room) DO UPDATE SET made = ?2, position = ?3",
        params![room.0, stream, signed(message)],
    )?;
    Ok(())
}

/// Tables with the content of rooms.
const CONTENT: [&str; 4] = ["log", "node", "edge", "tombstone"];

/// Empties a room.
fn empty(connection: &Connection, room: RoomKey) -> rusqlite::Result<()> {
    let shadow = "SELECT id FROM room WHERE snapshot_of = ?1";
    for table in CONTENT {
        connection.execute(&format!("DELETE FROM {table} WHERE room = ?1 OR room IN ({shadow})"), [room.0])?;
    }
    connection.execute("DELETE FROM room WHERE snapshot_of = ?", [room.0])?;
    connection.execute(
        "UPDATE room SET nodes = 0, bytes = 0, seq = 0, physical = NULL, logical = NULL WHERE id = ?",
        [room.0],
    )?;
    Ok(())
}

/// Gives all that is archived of a room to another name, and leaves the room empty.
fn set_aside(connection: &Connection, room: RoomKey, name: &str) -> rusqlite::Result<()> {
    connection.execute(
        "INSERT INTO room (name, peer_id, nodes, seq, physical, logical, bytes, paused)
         SELECT ?, peer_id, nodes, seq, physical, logical, bytes, 1 FROM room WHERE id = ?",
        params![name, room.0],
    )?;
    let aside = connection.last_insert_rowid();
    for table in CONTENT {
        connection.execute(&format!("UPDATE {table} SET room = ? WHERE room = ?"), [aside, room.0])?;
    }
    connection.execute("UPDATE room SET snapshot_of = ? WHERE snapshot_of = ?", [aside, room.0])?;
    connection.execute("DELETE FROM stream WHERE room = ?", [room.0])?;
    empty(connection, room)
}

impl Writer {
    /// Whether a room may be written to: it is ours, or there is no cluster.
    pub(super) fn may_write(&self, room: RoomKey) -> bool {
        self.shipping.as_ref().is_none_or(|shipping| shipping.held.contains_key(&room))
    }

    /// Has the streams of rooms take what their logs have come to in the open transaction, each behind an entry. Returns
    /// where each then stands, for [`Writer::shipped`].
    pub(super) fn ship(&self, changed: &[(RoomKey, u64)]) -> Result<Vec<(RoomKey, u64)>, CommitError> {
        let Some(shipping) = &self.shipping else { return Ok(Vec::new()) };
        let mut batches = Vec::new();
        for (room, seq) in changed {
            let held = shipping.held.get(room).ok_or(CommitError::NotHeld)?;
            let entries = entry::after(&self.file.connection, *room, *seq)?;
            if !entries.is_empty() {
                batches.push((*room, held, entries));
            }
        }
        if batches.is_empty() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let appending = batches
            .iter()
            .map(|(room, held, entries)| async { (*room, held.stream.append(entries, held.position).await) });
        let mut shipped = Vec::new();
        for (room, appended) in shipping.runtime.block_on(join_all(appending)) {
            match appended {
                Ok(position) => {
                    set_position(&self.file.connection, room, position)?;
                    shipped.push((room, position));
                }
                Err(StreamError::Behind) => return Err(CommitError::Behind(room)),
                Err(error) => return Err(CommitError::Away(error.to_string())),
            }
        }
        self.metrics.cluster_acknowledge_seconds.observe(start.elapsed().as_secs_f64());
        Ok(shipped)
    }

    /// What was shipped is committed.
    pub(super) fn shipped(&mut self, shipped: Vec<(RoomKey, u64)>) {
        let Some(shipping) = &mut self.shipping else { return };
        for (room, position) in shipped {
            if let Some(held) = shipping.held.get_mut(&room) {
                held.position = position;
            }
        }
    }

    /// Takes in what the stream of a room that we hold has behind what is here: what we sent and were not told of, or what
    /// the one before us did.
    pub(super) fn catch_up(&mut self, room: RoomKey) -> Result<(), CommitError> {
        let Some((shipping, held)) =
            self.shipping.as_ref().and_then(|shipping| Some((shipping, shipping.held.get(&room)?)))
        else {
            return Err(CommitError::NotHeld);
        };
        let reading = held.stream.read_rest(held.position);
        let (batches, end) =
            shipping.runtime.block_on(reading).map_err(|error| CommitError::Away(error.to_string()))?;
        for (entries, message) in batches {
            self.take_over(room, &entries, message)?;
        }
        self.shipped(vec![(room, end)]);
        Ok(())
    }

    /// Takes entries over that another instance, or an earlier attempt of ours, has put into the stream.
    fn take_over(&mut self, room: RoomKey, entries: &[LogEntry], message: u64) -> Result<(), TakeOverError> {
        let connection = &self.file.connection;
        connection.execute_batch("BEGIN IMMEDIATE")?;
        let taken = (|| {
            let before = room_rows::load(connection, room)?;
            let mut state = before.clone();
            for entry in entries {
                let LogEntry(seq, received, kind, _, operation) = entry;
                if *seq <= state.seq {
                    continue;
                }
                if *seq != state.seq + 1 {
                    return Err(TakeOverError::Gap { after: state.seq, found: *seq });
                }
                entry.insert(connection, room.0)?;
                let mut graph = RoomGraph { connection, state: &mut state };
                if let Some(timestamp) = replay(&mut graph, *kind, operation, *received)? {
                    state.see(timestamp);
                }
                state.seq = *seq;
            }
            room_rows::save(connection, &state)?;
            set_position(connection, room, message)?;
            connection.execute_batch("COMMIT")?;
            Ok((before, state))
        })();
        match taken {
            Ok((before, state)) => {
                if let Some(latest) = state.latest.filter(|_| state.latest != before.latest) {
                    self.reply(Reply::Latest { room, latest });
                }
                let (first, last) = (before.seq + 1, state.seq);
                self.committed(state);
                if first <= last {
                    self.reply(Reply::Logged { room, first, last, over: None });
                }
                Ok(())
            }
            Err(error) => {
                self.roll_back();
                Err(error)
            }
        }
    }

    /// Does what the cluster asks for.
    pub(super) fn share(&mut self, request: Request) {
        let failed = |error: rusqlite::Error| RoomError::Archive(error.to_string());
        // Who asked may have given up waiting, here and below.
        match request {
            Request::Hold { room, respond } => match self.hold(room) {
                Ok(latest) => self.reply(Reply::Held { room, latest, respond }),
                Err(error) => drop(respond.send(Err(RoomError::Archive(error.to_string())))),
            },
            Request::Release { room, respond } => {
                if let Some(shipping) = &mut self.shipping {
                    shipping.held.remove(&room);
                }
                self.forget_held(room);
                let _ = respond.send(Ok(()));
            }
            Request::Position { room, respond } => {
                let _ = respond.send(position(&self.file.connection, room).map_err(failed));
            }
            Request::Adopt { room, stream, respond } => {
                let _ = respond.send(adopt(&self.file.connection, room, stream, 0).map_err(failed));
            }
            Request::TakeOver { room, entries, message, respond } => {
                let taken = self.take_over(room, &entries, message).map_err(|error| {
                    let error = CommitError::from(error);
                    if let CommitError::TakeOver(TakeOverError::Database(cause)) = &error
                        && is_of_the_disk(cause)
                    {
                        self.refused(Vec::new(), &error);
                    }
                    RoomError::Archive(error.to_string())
                });
                let _ = respond.send(taken);
            }
            Request::SetAside { room, name, respond } => {
                let done = self.in_one(|connection| set_aside(connection, room, &name));
                self.reload(room);
                let _ = respond.send(done.map_err(failed));
            }
            Request::Rebuild { room, step, respond } => {
                let done = self.rebuild(room, step);
                let _ = respond.send(done.map_err(|error| RoomError::Archive(error.to_string())));
            }
            _ => {}
        }
    }

    /// From now on a room is ours to write to. Returns its highest timestamp.
    fn hold(&mut self, room: RoomKey) -> Result<Option<genosdb::Hlc>, CommitError> {
        let message = position(&self.file.connection, room)?.message;
        let name = self.name_of(room).to_owned();
        let Some(shipping) = &mut self.shipping else { return Err(CommitError::NotHeld) };
        let stream = RoomStream::of(shipping.cluster.clone(), &name);
        shipping.held.insert(room, Held { stream, position: message });
        let caught_up = self.catch_up(room).and_then(|()| Ok(room_rows::load(&self.file.connection, room)?.latest));
        if caught_up.is_err()
            && let Some(shipping) = &mut self.shipping
        {
            shipping.held.remove(&room);
        }
        caught_up
    }

    fn in_one(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<()>) -> rusqlite::Result<()> {
        let connection = &self.file.connection;
        connection.execute_batch("BEGIN IMMEDIATE")?;
        let done = work(connection).and_then(|()| connection.execute_batch("COMMIT"));
        if done.is_err() {
            self.roll_back();
        }
        done
    }

    /// Reads again where a room stands.
    fn reload(&mut self, room: RoomKey) {
        match room_rows::load(&self.file.connection, room) {
            Ok(state) => self.committed(state),
            Err(error) => tracing::warn!(%error, "the archive cannot read a room"),
        }
    }

    fn rebuild(&mut self, room: RoomKey, step: Rebuild) -> Result<(), BackupError> {
        match step {
            Rebuild::Begin(content) => {
                let mut being = None;
                self.in_one(|connection| {
                    // Until it is whole, it is of no stream.
                    adopt(connection, room, 0, 0)?;
                    empty(connection, room)?;
                    being = Some(RoomBeing::begin(connection, room.row(), *content)?);
                    Ok(())
                })?;
                self.rebuilding.extend(being.map(|being| (room, being)));
            }
            Rebuild::Snapshot(segment, content) => {
                if let Some(being) = self.rebuilding.get_mut(&room) {
                    being.add_snapshot(&self.file.connection, &segment, &content)?;
                }
            }
            Rebuild::Log(segment, content) => {
                if let Some(being) = self.rebuilding.get_mut(&room) {
                    being.add_log(&self.file.connection, &segment, &content)?;
                }
            }
            Rebuild::Finish { stream, message } => {
                if let Some(being) = self.rebuilding.remove(&room) {
                    being.finish(&self.file.connection)?;
                    adopt(&self.file.connection, room, stream, message)?;
                    self.reload(room);
                }
            }
        }
        // A transaction that was begun and has failed.
        if !self.file.connection.is_autocommit() {
            self.roll_back();
        }
        Ok(())
    }
}
