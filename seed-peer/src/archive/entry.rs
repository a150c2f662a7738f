//! An entry of a room's log, as it leaves the archive: in backups, and to other instances.

use rusqlite::{Connection, Row, params};
use serde::{Deserialize, Serialize};

use super::RoomKey;
use super::graph::{signed, unsigned};

/// An entry of the log: its place, when it came (ms since the Unix epoch), its kind, on whose word, and the operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogEntry(
    pub(crate) u64,
    pub(crate) u64,
    pub(crate) i64,
    pub(crate) Option<String>,
    pub(crate) String,
);

impl LogEntry {
    /// Reads `seq, received, kind, vouched, operation`.
    pub(crate) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self(unsigned(row.get(0)?), unsigned(row.get(1)?), row.get(2)?, row.get(3)?, row.get(4)?))
    }

    /// Appends it to the log of a room as it is.
    pub(crate) fn insert(&self, connection: &Connection, room: i64) -> rusqlite::Result<()> {
        let Self(seq, received, kind, vouched, operation) = self;
        connection
            .prepare_cached(
                "INSERT INTO log (room, seq, received, kind, vouched, operation) VALUES (?, ?, ?, ?, ?, ?)",
            )?
            .execute(params![room, signed(*seq), signed(*received), kind, vouched, operation])?;
        Ok(())
    }
}

/// The log of a room behind an entry.
pub(super) fn after(connection: &Connection, room: RoomKey, seq: u64) -> rusqlite::Result<Vec<LogEntry>> {
    connection
        .prepare_cached(
            "SELECT seq, received, kind, vouched, operation FROM log WHERE room = ? AND seq > ? ORDER BY seq",
        )?
        .query_map(params![room.0, signed(seq)], LogEntry::read)?
        .collect()
}
