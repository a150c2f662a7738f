//! A room as it was at a moment: what its log amounts to until then.
//!
//! The log is replayed into temporary tables of the same names, which SQLite keeps in a file of its own when they grow:
//! a room of any size can be looked at with little memory, and nothing of the archive is touched.

use std::collections::{HashSet, VecDeque};

use genosdb::json::{JsonString, Value};
use genosdb::operation::{Node, Operation, Removal};
use genosdb::query::{Query, Subject};
use genosdb::{Hlc, Store as _};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{History, HistoryError, Moment, signed};
use crate::archive::{RoomGraph, RoomState, TABLES, read_node, replay, timestamp_of, unsigned};

/// Nodes that are read at a time where two rooms are compared.
const PORTION: u32 = 1_000;

/// A room as it was.
pub struct PastRoom {
    history: History,
    /// The row of `room` that the nodes belong to.
    room: i64,
    state: RoomState,
    entries: u64,
}

impl History {
    /// The room as it was at `moment`. `progress` is told how many entries of the log were replayed, now and then.
    ///
    /// # Errors
    /// [`HistoryError`], also when the moment is older than what is kept.
    pub fn at(self, moment: Moment, mut progress: impl FnMut(u64)) -> Result<PastRoom, HistoryError> {
        // One snapshot, however long it takes: a seed goes on writing.
        self.read(|connection| connection.execute_batch("BEGIN"))?;
        let room = self.room;
        if moment == Moment::Now {
            let (state, entries) = self.read(|connection| {
                let state = state_of(connection, "main", room)?;
                let entries =
                    connection.query_row("SELECT count(*) FROM main.log WHERE room = ?", [room], |row| row.get(0))?;
                Ok((state, unsigned(entries)))
            })?;
            return Ok(PastRoom { history: self, room, state, entries });
        }
        let last = self.last_entry_at(moment)?;
        let entries = self.read(|connection| {
            prepare(connection, room).and_then(|()| {
                let mut state = state_of(connection, "temp", room)?;
                let entries = replay_until(connection, &mut state, last, moment, &mut progress)?;
                Ok((state, entries))
            })
        })?;
        let (state, entries) = entries;
        Ok(PastRoom { history: self, room, state, entries })
    }

    /// The log entry up to which a moment reaches; all of them where the authors' clocks decide.
    fn last_entry_at(&self, moment: Moment) -> Result<u64, HistoryError> {
        let room = self.room;
        let (last, first, snapshot) = self.read(|connection| {
            let last: Option<i64> = match moment {
                Moment::Received(ms) => connection.query_row(
                    "SELECT max(seq) FROM main.log WHERE room = ? AND received <= ?",
                    params![room, signed(ms)],
                    |row| row.get(0),
                )?,
                Moment::Entry(entry) => Some(signed(entry)),
                Moment::Clock(_) | Moment::Now => Some(i64::MAX),
            };
            let first: Option<i64> = connection
                .query_row("SELECT received FROM main.log WHERE room = ? ORDER BY seq LIMIT 1", [room], |row| {
                    row.get(0)
                })
                .optional()?;
            let snapshot: Option<(Option<i64>, Option<i64>, u64)> = connection
                .query_row("SELECT physical, logical, seq FROM main.room WHERE snapshot_of = ?", [room], |row| {
                    Ok((row.get(0)?, row.get(1)?, unsigned(row.get(2)?)))
                })
                .optional()?;
            Ok((last, first, snapshot))
        })?;
        let compacted = snapshot.is_some_and(|(physical, logical, seq)| match (moment, physical.zip(logical)) {
            (Moment::Received(_), _) => last.is_none(),
            (Moment::Clock(clock), Some((physical, logical))) => {
                clock < Hlc::new(unsigned(physical), unsigned(logical))
            }
            (Moment::Clock(_), None) | (Moment::Now, _) => false,
            (Moment::Entry(entry), _) => seq > entry,
        });
        if compacted {
            return Err(HistoryError::Compacted { since_ms: unsigned(first.unwrap_or(0)) });
        }
        Ok(last.map_or(0, unsigned))
    }
}

/// Makes the temporary tables, with the room as it was before the first entry of its log.
fn prepare(connection: &Connection, room: i64) -> rusqlite::Result<()> {
    let tables = TABLES.replace("CREATE TABLE", "CREATE TEMP TABLE").replace("CREATE INDEX ", "CREATE INDEX temp.");
    connection.execute_batch(&tables)?;
    connection
        .execute("INSERT INTO temp.room (id, name, peer_id, nodes, bytes, seq) VALUES (?, '', '', 0, 0, 0)", [room])?;
    let snapshot: Option<i64> =
        connection.query_row("SELECT id FROM main.room WHERE snapshot_of = ?", [room], |row| row.get(0)).optional()?;
    if let Some(snapshot) = snapshot {
        connection.execute(
            "UPDATE temp.room SET (nodes, bytes, seq, physical, logical) =
                (SELECT nodes, bytes, seq, physical, logical FROM main.room WHERE id = ?)",
            [snapshot],
        )?;
        connection.execute(
            "INSERT INTO temp.node SELECT ?, id, value, edges, extra, physical, logical FROM main.node WHERE room = ?",
            params![room, snapshot],
        )?;
        connection.execute(
            "INSERT INTO temp.edge SELECT ?, target, source FROM main.edge WHERE room = ?",
            params![room, snapshot],
        )?;
        connection.execute(
            "INSERT INTO temp.tombstone SELECT ?, id, physical, logical FROM main.tombstone WHERE room = ?",
            params![room, snapshot],
        )?;
    }
    Ok(())
}

fn state_of(connection: &Connection, schema: &str, room: i64) -> rusqlite::Result<RoomState> {
    connection.query_row(
        &format!("SELECT nodes, bytes, seq, physical, logical FROM {schema}.room WHERE id = ?"),
        [room],
        |row| {
            let latest = row.get::<_, Option<i64>>(3)?.zip(row.get::<_, Option<i64>>(4)?);
            Ok(RoomState {
                id: room,
                nodes: unsigned(row.get(0)?),
                bytes: unsigned(row.get(1)?),
                seq: unsigned(row.get(2)?),
                latest: latest.map(|(physical, logical)| Hlc::new(unsigned(physical), unsigned(logical))),
            })
        },
    )
}

/// Replays the log into the temporary tables. Returns how many entries counted.
fn replay_until(
    connection: &Connection,
    state: &mut RoomState,
    last: u64,
    moment: Moment,
    progress: &mut impl FnMut(u64),
) -> rusqlite::Result<u64> {
    let mut select = connection
        .prepare("SELECT seq, kind, operation, received FROM main.log WHERE room = ? AND seq <= ? ORDER BY seq")?;
    let mut rows = select.query(params![state.id, signed(last)])?;
    let (mut seen, mut counted) = (0, 0);
    while let Some(row) = rows.next()? {
        seen += 1;
        if seen % 1_000 == 0 {
            progress(seen);
        }
        let kind: i64 = row.get(1)?;
        let text = row.get_ref(2)?.as_str()?;
        if let Moment::Clock(clock) = moment
            && timestamp_in(kind, text) > Some(clock)
        {
            continue;
        }
        let received = unsigned(row.get(3)?);
        if let Some(timestamp) = replay(&mut RoomGraph { connection, state }, kind, text, received)? {
            state.see(timestamp);
        }
        state.seq = unsigned(row.get(0)?);
        counted += 1;
    }
    Ok(counted)
}

/// The timestamp of an entry of the log.
fn timestamp_in(kind: i64, text: &str) -> Option<Hlc> {
    match kind {
        0 => Operation::parse(text, &mut 0).ok().map(|operation| timestamp_of(&operation)),
        _ => Node::parse(text).ok().map(|node| node.timestamp),
    }
}

impl PastRoom {
    /// How many nodes there were.
    pub fn nodes(&self) -> u64 {
        self.state.nodes
    }

    /// The highest timestamp there was.
    pub fn latest(&self) -> Option<Hlc> {
        self.state.latest
    }

    /// The last entry of the log that counted.
    pub fn last_entry(&self) -> u64 {
        self.state.seq
    }

    /// How many entries of the log made it what it was.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Hands out every node, ordered by id, until `each` returns false.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn each_node(&self, mut each: impl FnMut(Node) -> bool) -> Result<(), HistoryError> {
        self.history.read(|connection| {
            let mut select = connection
                .prepare("SELECT id, value, edges, extra, physical, logical FROM node WHERE room = ? ORDER BY id")?;
            let mut rows = select.query([self.room])?;
            while let Some(row) = rows.next()? {
                if !each(read_node(row)?) {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Some nodes behind the one called `last`, ordered by id; none when there are no more.
    pub(super) fn nodes_after(&self, last: Option<&JsonString>) -> Result<Vec<Node>, HistoryError> {
        self.history.read(|connection| {
            let mut select = connection.prepare_cached(
                "SELECT id, value, edges, extra, physical, logical FROM node
                 WHERE room = ?1 AND (?2 IS NULL OR id > ?2) ORDER BY id LIMIT ?3",
            )?;
            let last = last.map(JsonString::as_printed);
            select.query_map(params![self.room, last, PORTION], read_node)?.collect()
        })
    }

    /// Hands out every removal that was remembered, ordered by id.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn each_removal(&self, mut each: impl FnMut(Removal)) -> Result<(), HistoryError> {
        self.history.read(|connection| {
            let mut select =
                connection.prepare("SELECT id, physical, logical FROM tombstone WHERE room = ? ORDER BY id")?;
            let mut rows = select.query([self.room])?;
            while let Some(row) = rows.next()? {
                let timestamp = Hlc::new(unsigned(row.get(1)?), unsigned(row.get(2)?));
                each(Removal { id: JsonString::from_printed(row.get(0)?), timestamp });
            }
            Ok(())
        })
    }

    /// How many removals were remembered.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn removals(&self) -> Result<u64, HistoryError> {
        self.history.read(|connection| {
            connection.query_row("SELECT count(*) FROM tombstone WHERE room = ?", [self.room], |row| {
                Ok(unsigned(row.get(0)?))
            })
        })
    }

    /// One node.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn node(&self, id: &JsonString) -> Result<Option<Node>, HistoryError> {
        self.history.read(|connection| {
            let mut state = self.state.clone();
            RoomGraph { connection, state: &mut state }.node(id)
        })
    }

    /// Whether a node was removed before, also when it was made again.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn was_removed(&self, id: &JsonString) -> Result<bool, HistoryError> {
        self.history.read(|connection| {
            let mut state = self.state.clone();
            Ok(RoomGraph { connection, state: &mut state }.removed(id)?.is_some())
        })
    }

    /// The nodes with an edge to `target`, ordered.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn sources(&self, target: &JsonString) -> Result<Vec<JsonString>, HistoryError> {
        self.history.read(|connection| {
            connection
                .prepare_cached("SELECT source FROM edge WHERE room = ? AND target = ? ORDER BY source")?
                .query_map(params![self.room, target.as_printed()], |row| Ok(JsonString::from_printed(row.get(0)?)))?
                .collect()
        })
    }

    /// Hands out the nodes that a query asks for, until `each` returns false: ordered by id, or, where it follows
    /// edges, as they are reached.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn find(&self, query: &Query, mut each: impl FnMut(Node) -> bool) -> Result<(), HistoryError> {
        let Some(inner) = query.edge() else {
            return self.each_node(|node| !matches(query, &node) || each(node));
        };
        let mut starts = Vec::new();
        self.each_node(|node| {
            if matches(query, &node) {
                starts.push(node);
            }
            true
        })?;
        let mut seen: HashSet<JsonString> = HashSet::new();
        let mut waiting: VecDeque<JsonString> = starts.into_iter().flat_map(|node| node.edges).collect();
        while let Some(id) = waiting.pop_front() {
            if !seen.insert(id.clone()) {
                continue;
            }
            if let Some(node) = self.node(&id)? {
                waiting.extend(node.edges.iter().cloned());
                if matches(inner, &node) && !each(node) {
                    break;
                }
            }
        }
        Ok(())
    }
}

fn matches(query: &Query, node: &Node) -> bool {
    let value = node.value.as_ref().map_or(Value::Null, Value::from);
    query.matches(&Subject { id: &node.id.to_text(), value: &value, physical: node.timestamp.physical })
}
