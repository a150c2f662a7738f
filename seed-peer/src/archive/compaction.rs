//! Compaction: what is older than is to be kept is no longer kept as operations, but as what they amounted to.
//!
//! Each room has a shadow: a row of `room` whose `snapshot_of` names it, with nodes, edges and tombstones of its own.
//! It is the room as it was before the first entry of its log. Compacting an entry applies it to the shadow, by the
//! same rules as ever, and takes it out of the log. Shadow and log together are the room at any moment since.

use genosdb::Hlc;
use genosdb::graph::{Outcome, Store as _, apply};
use genosdb::operation::{Node, Operation};
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};

use super::graph::{RoomGraph, signed, unsigned};
use super::merging::timestamp_of;
use super::{RoomKey, room_rows};

/// Entries that are compacted in one transaction: writing waits for no more.
const ENTRIES: u32 = 2_000;

/// Compacts some entries that were received before `horizon_ms`. Returns how many; 0 when there are none left.
pub(super) fn step(connection: &mut Connection, horizon_ms: u64) -> rusqlite::Result<u64> {
    let transaction = connection.transaction()?;
    let room: Option<i64> = transaction
        .query_row(
            "SELECT id FROM room
             WHERE (SELECT received FROM log WHERE log.room = room.id ORDER BY seq LIMIT 1) < ? LIMIT 1",
            [signed(horizon_ms)],
            |row| row.get(0),
        )
        .optional()?;
    let Some(room) = room else { return Ok(0) };
    let shadow = shadow_of(&transaction, room)?;
    let entries: Vec<(i64, i64, String, i64)> = transaction
        .prepare_cached("SELECT seq, kind, operation, received FROM log WHERE room = ? ORDER BY seq LIMIT ?")?
        .query_map(params![room, ENTRIES], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?
        .collect::<Result<_, _>>()?;
    let mut state = room_rows::load(&transaction, shadow)?;
    let mut last = 0;
    // In the order of the log, and no further: a clock that was set back does not change what came first.
    for (seq, kind, text, received) in entries.iter().take_while(|(.., received)| *received < signed(horizon_ms)) {
        let mut graph = RoomGraph { connection: &transaction, state: &mut state };
        if let Some(timestamp) = replay(&mut graph, *kind, text, unsigned(*received))? {
            state.see(timestamp);
        }
        last = *seq;
    }
    state.seq = unsigned(last);
    room_rows::save(&transaction, &state)?;
    let taken = transaction.execute("DELETE FROM log WHERE room = ?1 AND seq <= ?2", params![room, last])?;
    transaction.commit()?;
    Ok(u64::try_from(taken).unwrap_or(u64::MAX))
}

/// Applies an entry of the log to a graph. Returns its timestamp.
pub(crate) fn replay(
    graph: &mut RoomGraph<'_>,
    kind: i64,
    text: &str,
    received_ms: u64,
) -> rusqlite::Result<Option<Hlc>> {
    if kind == 0 {
        match Operation::parse(text, &mut 0) {
            Ok(operation) => {
                let outcome = apply(graph, &operation, received_ms)?;
                if outcome != Outcome::Applied {
                    tracing::debug!(?outcome, "a logged operation did not change the graph");
                }
                return Ok(Some(timestamp_of(&operation)));
            }
            Err(error) => tracing::error!(%error, "a logged operation is not one"),
        }
        return Ok(None);
    }
    match Node::parse(text) {
        Ok(node) => {
            graph.set_node(&node)?;
            Ok(Some(node.timestamp))
        }
        Err(error) => {
            tracing::error!(%error, "a logged node is not one");
            Ok(None)
        }
    }
}

/// The shadow of a room, made when it has none.
fn shadow_of(transaction: &Transaction<'_>, room: i64) -> rusqlite::Result<RoomKey> {
    let found: Option<i64> =
        transaction.query_row("SELECT id FROM room WHERE snapshot_of = ?", [room], |row| row.get(0)).optional()?;
    if let Some(id) = found {
        return Ok(RoomKey(id));
    }
    make_shadow(transaction, room)?;
    Ok(RoomKey(transaction.last_insert_rowid()))
}

/// Makes the shadow of a room, empty: the row that was inserted last.
pub(crate) fn make_shadow(connection: &Connection, room: i64) -> rusqlite::Result<()> {
    // No database has a name that starts so: names are not empty, and this one is of two parts.
    connection.execute(
        "INSERT INTO room (name, peer_id, snapshot_of, paused, nodes, bytes, seq)
         SELECT 'snapshot of ' || id || char(0), peer_id, id, 1, 0, 0, 0 FROM room WHERE id = ?",
        [room],
    )?;
    Ok(())
}
