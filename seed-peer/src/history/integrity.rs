//! Whether an archive is what it says: a sound file, whose nodes are what its log amounts to.

use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::{History, HistoryError, Moment};
use crate::archive::FILE_NAME;

/// What was found of one room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomIntegrity {
    /// The room.
    pub name: String,
    /// Entries of its log that were replayed.
    pub entries: u64,
    /// Nodes that it holds.
    pub nodes: u64,
    /// Nodes that are otherwise than the log says, there or not there.
    pub differing: u64,
}

/// Checks the archive of the folder `data`, beside the seed that writes it. First come the complaints of SQLite, none
/// for a sound file; then each room. `progress` is told the room, and how many entries of it were replayed.
///
/// # Errors
/// [`HistoryError`] when it cannot be read at all.
pub fn check_archive(
    data: &Path,
    mut progress: impl FnMut(&str, u64),
) -> Result<(Vec<String>, Vec<RoomIntegrity>), HistoryError> {
    let path = data.join(FILE_NAME);
    let read = || -> rusqlite::Result<(Vec<String>, Vec<String>)> {
        let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        let complaints = connection
            .prepare("PRAGMA integrity_check(10)")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<Vec<String>>>()?;
        let names = connection
            .prepare("SELECT name FROM room WHERE snapshot_of IS NULL ORDER BY name")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        Ok((complaints.into_iter().filter(|text| text != "ok").collect(), names))
    };
    let (complaints, names) = read().map_err(|source| HistoryError::Archive { path: path.clone(), source })?;
    let mut rooms = Vec::new();
    for name in names {
        // All of the log, as of the moment at which the nodes are read.
        let now = History::open(data, &name)?.at(Moment::Now, |_| ())?;
        let replayed = History::open(data, &name)?.at(Moment::Entry(now.last_entry()), |entries| {
            progress(&name, entries);
        })?;
        let mut differing = 0;
        super::diff::compare(&replayed, &now, |_, _| differing += 1)?;
        rooms.push(RoomIntegrity { name, entries: replayed.entries(), nodes: now.nodes(), differing });
    }
    Ok((complaints, rooms))
}
