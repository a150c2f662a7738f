//! The rows of rooms: where each stands, and how to join those that were added while the seed ran.

use genosdb::signature::Address;
use genosdb::{Hlc, PeerId};
use rand::Rng as _;
use rusqlite::{Connection, OptionalExtension as _, params};
use serde::{Deserialize, Serialize};

use super::graph::{RoomState, signed, unsigned};
use super::{OpenRoom, RoomKey};
use crate::cells::{Bridge, CellsConfig};
use crate::rooms::Source;
use crate::security::Security;
use crate::server::RoomConfig;

/// How to join a room, as the archive keeps it.
#[derive(Serialize, Deserialize)]
struct Settings {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    password: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cells: Option<CellsSettings>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    super_admins: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct CellsSettings {
    cell_size: usize,
    bridge: Bridge,
}

/// Finds or makes the row of a room.
pub(super) fn open(connection: &Connection, config: &RoomConfig, source: Source) -> rusqlite::Result<OpenRoom> {
    let settings = (source == Source::Added).then(|| {
        let cells = config.cells.map(|CellsConfig { cell_size, bridge }| CellsSettings { cell_size, bridge });
        let security = config.security.as_ref();
        let super_admins = security
            .map_or(Vec::new(), |security| security.policy.super_admins.iter().map(ToString::to_string).collect());
        serde_json::json!(Settings { password: config.password.clone(), cells, super_admins }).to_string()
    });
    connection.execute(
        "INSERT INTO room (name, peer_id, settings, paused, nodes, bytes, seq) VALUES (?1, ?2, ?3, 0, 0, 0, 0)
         ON CONFLICT (name) DO UPDATE SET settings = ?3",
        params![config.name, new_peer_id().as_str(), settings],
    )?;
    let (key, peer, latest, operations, paused) = connection.query_row(
        "SELECT id, peer_id, physical, logical, seq, paused FROM room WHERE name = ?",
        [&config.name],
        |row| {
            let latest = timestamp(row.get(2)?, row.get(3)?);
            Ok((row.get(0)?, row.get::<_, String>(1)?, latest, unsigned(row.get(4)?), row.get(5)?))
        },
    )?;
    let key = RoomKey(key);
    let peer = match PeerId::parse(&peer) {
        Some(peer) => peer,
        // Somebody has been at the file; any id will do.
        None => {
            let peer = new_peer_id();
            connection.execute("UPDATE room SET peer_id = ? WHERE id = ?", params![peer.as_str(), key.0])?;
            peer
        }
    };
    Ok(OpenRoom { key, peer, latest, operations, paused })
}

/// The row of the room called `name`, if there is one.
pub(super) fn find(connection: &Connection, name: &str) -> rusqlite::Result<Option<RoomKey>> {
    let row = "SELECT id FROM room WHERE name = ? AND snapshot_of IS NULL";
    connection.query_row(row, [name], |row| Ok(RoomKey(row.get(0)?))).optional()
}

/// The names of all rooms.
pub(super) fn names(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut select = connection.prepare("SELECT name FROM room WHERE snapshot_of IS NULL ORDER BY name")?;
    select.query_map([], |row| row.get(0))?.collect()
}

/// The rooms that were added while the seed ran.
pub(super) fn added(connection: &Connection) -> rusqlite::Result<Vec<RoomConfig>> {
    let mut select = connection.prepare("SELECT name, settings FROM room WHERE settings IS NOT NULL ORDER BY name")?;
    let rows = select.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    let mut rooms = Vec::new();
    for row in rows {
        let (name, settings) = row?;
        match serde_json::from_str::<Settings>(&settings) {
            Ok(Settings { password, cells, super_admins }) => {
                let Some(super_admins) =
                    super_admins.iter().map(|text| Address::parse(text)).collect::<Option<Vec<_>>>()
                else {
                    // Without who rules it, everybody would.
                    tracing::error!(room = %name, "the archive does not say who rules a room: it is not joined");
                    continue;
                };
                rooms.push(RoomConfig {
                    name,
                    password,
                    cells: cells.map(|CellsSettings { cell_size, bridge }| CellsConfig { cell_size, bridge }),
                    security: Security::of(super_admins),
                });
            }
            Err(error) => tracing::error!(room = %name, %error, "the archive does not say how to join a room"),
        }
    }
    Ok(rooms)
}

/// When the last operation of any room was received, in ms since the Unix epoch; 0 before the first.
pub(super) fn last_received(connection: &Connection) -> rusqlite::Result<u64> {
    let last: Option<i64> = connection.query_row(
        "SELECT max((SELECT max(received) FROM log WHERE room = room.id)) FROM room",
        [],
        |row| row.get(0),
    )?;
    Ok(last.map_or(0, unsigned))
}

/// Remembers whether a room is paused.
pub(super) fn set_paused(connection: &Connection, room: RoomKey, paused: bool) -> rusqlite::Result<()> {
    connection.execute("UPDATE room SET paused = ? WHERE id = ?", params![paused, room.0])?;
    Ok(())
}

/// Forgets that a room was added.
pub(super) fn forget(connection: &Connection, room: RoomKey) -> rusqlite::Result<()> {
    connection.execute("UPDATE room SET settings = NULL, paused = 0 WHERE id = ?", [room.0])?;
    Ok(())
}

/// Where a room stands.
pub(super) fn load(connection: &Connection, room: RoomKey) -> rusqlite::Result<RoomState> {
    connection.prepare_cached("SELECT nodes, bytes, seq, physical, logical FROM room WHERE id = ?")?.query_row(
        [room.0],
        |row| {
            Ok(RoomState {
                id: room.0,
                nodes: unsigned(row.get(0)?),
                bytes: unsigned(row.get(1)?),
                seq: unsigned(row.get(2)?),
                latest: timestamp(row.get(3)?, row.get(4)?),
            })
        },
    )
}

/// Writes where a room stands.
pub(crate) fn save(connection: &Connection, state: &RoomState) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE room SET nodes = ?, bytes = ?, seq = ?, physical = ?, logical = ? WHERE id = ?")?
        .execute(params![
            signed(state.nodes),
            signed(state.bytes),
            signed(state.seq),
            state.latest.map(|latest| signed(latest.physical)),
            state.latest.map(|latest| signed(latest.logical)),
            state.id
        ])?;
    Ok(())
}

fn timestamp(physical: Option<i64>, logical: Option<i64>) -> Option<Hlc> {
    physical.zip(logical).map(|(physical, logical)| Hlc::new(unsigned(physical), unsigned(logical)))
}

/// Characters at the start of an id that are the greatest there are. With so many, one peer in 15 million has a greater id.
const GREATEST: usize = 4;

/// A new id, greater than those of clients. Of two offers that cross, that of the greater id stands (wire §2), which is then
/// always ours: only offers tell clients that the seed is a superpeer. And Trystero, of which clients descend, ignores offers of a
/// lesser id as long as it has one of its own to it, which it may keep for ever: it would be deaf to a seed that comes back.
fn new_peer_id() -> PeerId {
    let mut random = rand::rng();
    let mut drawn = 0;
    PeerId::generate(|range| {
        drawn += 1;
        if drawn <= GREATEST { range.end - 1 } else { random.random_range(range) }
    })
}
