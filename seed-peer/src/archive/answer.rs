//! What the archive answers to a peer's `sync`: the operations that it lacks, or the whole state.

mod judged_alone;
mod signature;

use std::fmt::Write as _;

use genosdb::clock::MAX_DRIFT_MS;
use genosdb::json::JsonString;
use genosdb::operation::Node;
use genosdb::signature::Identity;
use genosdb::{ChannelName, Hlc, JsonWriter, Message};
use judged_alone::JudgedAlone;
use rusqlite::{Connection, Row, params};

use super::graph::{RoomState, signed, unsigned};

/// A room with up to so many nodes is always sent whole: it is small, and a peer that is sent a whole state answers
/// with what we lack, which repairs both sides.
pub(super) const SMALL_ROOM_NODES: u64 = 500;
/// What a node in a full state takes besides its own bytes: its id once more, names of members, a timestamp.
const NODE_FRAME_BYTES: u64 = 90;
/// So many bytes of operations are sent as a delta whatever the size of the room.
const SMALL_DELTA_BYTES: u64 = 50_000;

/// Bytes of operations that everybody is sent at a time.
const LIVE_BYTES: u64 = 256 << 10;

/// What a peer said that it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    /// The highest timestamp that it has seen; `None`: it has nothing.
    pub(crate) timestamp: Option<Hlc>,
    /// The log entry up to which it was sent everything on this very link, if it was sent anything.
    pub(crate) sent: Option<u64>,
}

/// The delta for a peer that knows `known`; `None` when it is to be sent the whole state.
pub(crate) fn delta_for(
    connection: &Connection,
    room: &RoomState,
    known: Known,
    identity: Option<&Identity>,
) -> rusqlite::Result<Option<Message>> {
    let Some(timestamp) = known.timestamp else { return Ok(None) };
    let (from, nodes) = match known.sent {
        // The link is reliable: what was sent on it has arrived.
        Some(sent) => (sent + 1, Nodes::AsOperations),
        None if room.nodes <= SMALL_ROOM_NODES => return Ok(None),
        None => (first_unknown(connection, room, timestamp)?, Nodes::End),
    };
    if from == 0 {
        return Ok(None);
    }
    let state_bytes = room.bytes + room.nodes * NODE_FRAME_BYTES;
    delta_with(connection, room, from, state_bytes.max(SMALL_DELTA_BYTES), identity, nodes)
}

/// The first log entry that a peer whose highest timestamp is `timestamp` may lack; 0 when that is all of them.
///
/// A timestamp does not say what was missed before it: others may have written with slower clocks. But whatever a
/// peer missed, it missed after it was last here, and its clock is at most [`MAX_DRIFT_MS`] ahead of ours.
fn first_unknown(connection: &Connection, room: &RoomState, timestamp: Hlc) -> rusqlite::Result<u64> {
    let received = signed(timestamp.physical.saturating_sub(MAX_DRIFT_MS));
    let (first, earlier): (Option<i64>, bool) = connection
        .prepare_cached(
            "SELECT (SELECT min(seq) FROM log WHERE room = ?1 AND received >= ?2),
                    EXISTS (SELECT 1 FROM log WHERE room = ?1 AND received < ?2)",
        )?
        .query_row(params![room.id, received], |row| Ok((row.get(0)?, row.get(1)?)))?;
    if !earlier {
        // Older than all that is logged.
        return Ok(0);
    }
    Ok(first.map_or(room.seq + 1, unsigned))
}

/// The log from the entry `from` on; `None` when that is more than `max_bytes`, no longer there, holds what no
/// operation can say, or what a peer that checks signatures might judge by what it does not know yet.
pub(super) fn delta(
    connection: &Connection,
    room: &RoomState,
    from: u64,
    max_bytes: u64,
    identity: Option<&Identity>,
) -> rusqlite::Result<Option<Message>> {
    delta_with(connection, room, from, max_bytes, identity, Nodes::End)
}

fn delta_with(
    connection: &Connection,
    room: &RoomState,
    from: u64,
    max_bytes: u64,
    identity: Option<&Identity>,
    nodes: Nodes,
) -> rusqlite::Result<Option<Message>> {
    let run = Run::read(connection, room, from, max_bytes, identity, nodes)?;
    (run.next == room.seq + 1).then(|| run.finish(connection, room, identity)).transpose()
}

/// What everybody is to be sent from the log entry `from` on, unasked, and the last entry that is seen to with it.
pub(super) fn live(
    connection: &Connection,
    room: &RoomState,
    from: u64,
    identity: Option<&Identity>,
) -> rusqlite::Result<(Option<Message>, u64)> {
    // What was compacted meanwhile is older than any that could wait for it.
    let first: Option<i64> = connection
        .prepare_cached("SELECT min(seq) FROM log WHERE room = ? AND seq >= ?")?
        .query_row(params![room.id, signed(from)], |row| row.get(0))?;
    let Some(first) = first else { return Ok((None, room.seq)) };
    let run = Run::read(connection, room, unsigned(first), LIVE_BYTES, identity, Nodes::AsOperations)?;
    let last = run.next.saturating_sub(1);
    Ok((Some(run.finish(connection, room, identity)?), last))
}

/// What becomes of nodes that came with a peer's state, where operations are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nodes {
    /// The first of them ends a run.
    End,
    /// They are said as operations. Who lacks nothing else then holds them as they are.
    AsOperations,
}

/// Hands out the operations of a log entry of `kind`, as JSON.
fn for_each_operation(kind: i64, entry: &str, mut each: impl FnMut(&str)) {
    if kind == 0 {
        return each(entry);
    }
    // What is in the archive was parsed before.
    for operation in Node::parse(entry).iter().flat_map(Node::operations) {
        each(&operation.to_string());
    }
}

/// Operations that follow one another in the log, printed as a delta that is not finished.
struct Run {
    text: JsonWriter,
    first: u64,
    /// The first entry that is not in it.
    next: u64,
}

impl Run {
    fn read(
        connection: &Connection,
        room: &RoomState,
        first: u64,
        max_bytes: u64,
        identity: Option<&Identity>,
        nodes: Nodes,
    ) -> rusqlite::Result<Self> {
        let max_bytes = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        let mut text = JsonWriter::new(ChannelName::SYNC_GRAPH);
        text.push_str(r#"[{"type":"deltaSync","operations":["#);
        let mut judged = identity.map(|_| JudgedAlone::default());
        let (mut next, mut is_first) = (first, true);
        let mut select = connection
            .prepare_cached("SELECT seq, kind, operation FROM log WHERE room = ? AND seq >= ? ORDER BY seq")?;
        let mut rows = select.query(params![room.id, signed(first)])?;
        while let Some(row) = rows.next()? {
            let kind = row.get(1)?;
            if unsigned(row.get(0)?) != next || (kind != 0 && nodes == Nodes::End) || text.written() > max_bytes {
                break;
            }
            let entry = row.get_ref(2)?.as_str()?;
            if judged.as_mut().is_some_and(|judged| !judged.takes(kind, entry)) {
                break;
            }
            for_each_operation(kind, entry, |operation| {
                if !std::mem::take(&mut is_first) {
                    text.push_str(",");
                }
                text.push_str(operation);
            });
            next += 1;
        }
        Ok(Self { text, first, next })
    }

    fn finish(
        mut self,
        connection: &Connection,
        room: &RoomState,
        identity: Option<&Identity>,
    ) -> rusqlite::Result<Message> {
        let signature = signature::of_delta(connection, room, self.first..self.next, identity)?;
        let _ = write!(self.text, r#"],"timestamp":{}{signature}}}]"#, timestamp(room.latest));
        Ok(self.text.finish())
    }
}

/// The whole room, read from disk row by row.
pub(crate) fn full_state(
    connection: &Connection,
    room: &RoomState,
    identity: Option<&Identity>,
) -> rusqlite::Result<Message> {
    let mut text = JsonWriter::new(ChannelName::SYNC_GRAPH);
    text.push_str(r#"[{"type":"fullStateSync","graphData":{"#);
    let mut select = connection
        .prepare_cached("SELECT id, value, edges, extra, physical, logical FROM node WHERE room = ? ORDER BY id")?;
    let mut rows = select.query(params![room.id])?;
    let mut first = true;
    while let Some(row) = rows.next()? {
        if !first {
            text.push_str(",");
        }
        first = false;
        let id = JsonString::from_printed(row.get(0)?);
        let _ = write!(text, "{id}:");
        print_node(&id, row, |part| text.push_str(part))?;
    }
    text.push_str(r#"},"removals":["#);
    let mut select =
        connection.prepare_cached("SELECT id, physical, logical FROM tombstone WHERE room = ? ORDER BY id")?;
    let mut rows = select.query(params![room.id])?;
    let mut first = true;
    while let Some(row) = rows.next()? {
        if !first {
            text.push_str(",");
        }
        first = false;
        let id = JsonString::from_printed(row.get(0)?);
        let (physical, logical): (i64, i64) = (row.get(1)?, row.get(2)?);
        let _ = write!(text, r#"{{"id":{id},"timestamp":{{"physical":{physical},"logical":{logical}}}}}"#);
    }
    let signature = signature::of_full_state(connection, room, identity)?;
    let _ = write!(text, r#"],"timestamp":{}{signature}}}]"#, timestamp(room.latest));
    Ok(text.finish())
}

/// Prints a node from a row of its value, edges, unknown members and timestamp, behind the id.
fn print_node(id: &JsonString, row: &Row<'_>, mut print: impl FnMut(&str)) -> rusqlite::Result<()> {
    print(&format!(r#"{{"id":{id}"#));
    if let Some(value) = row.get_ref(1)?.as_str_or_null()? {
        print(r#","value":"#);
        print(value);
    }
    print(r#","edges":"#);
    print(row.get_ref(2)?.as_str()?);
    let (physical, logical): (i64, i64) = (row.get(4)?, row.get(5)?);
    print(&format!(r#","timestamp":{{"physical":{physical},"logical":{logical}}}"#));
    let extra = row.get_ref(3)?.as_str()?;
    if !extra.is_empty() {
        print(",");
        print(extra);
    }
    print("}");
    Ok(())
}

fn timestamp(latest: Option<Hlc>) -> String {
    match latest {
        Some(Hlc { physical, logical }) => format!(r#"{{"physical":{physical},"logical":{logical}}}"#),
        None => "null".into(),
    }
}
