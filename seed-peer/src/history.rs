//! A room's history, read from the archive beside the seed that writes it: its log, and the room as it was at any
//! moment since the log begins.

mod diff;
mod integrity;
mod moment;
mod past;
mod restore;
mod verify;

use std::path::{Path, PathBuf};

use genosdb::json::Members;
use genosdb::operation::{Node, Operation};
use genosdb::signature::Address;
use genosdb::{Hlc, JsonString};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};

use crate::archive::{FILE_NAME, unsigned};
pub use diff::{Difference, diff};
pub use integrity::{RoomIntegrity, check_archive};
pub use moment::{Moment, MomentError};
pub use past::PastRoom;
pub use restore::{Restoration, restoration};
pub use verify::{Doubtful, Verification};

/// A room's history cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// There is no archive, or it cannot be read.
    #[error("cannot read {path}: {source}")]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The archive holds no such room.
    #[error("the archive holds no room of that name")]
    Unknown,
    /// The moment is older than what is kept.
    #[error("the log begins later: what came before {} is kept only as what it amounted to (seed.keep)", printed_ms(*since_ms))]
    Compacted {
        /// When the first entry that is kept was accepted, ms since the Unix epoch.
        since_ms: u64,
    },
}

/// A time of day as RFC 3339 prints it.
fn printed_ms(ms: u64) -> humantime::Rfc3339Timestamp {
    humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms))
}

/// A room in an archive, to be read.
pub struct History {
    path: PathBuf,
    connection: Connection,
    room: i64,
}

/// An entry of a room's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the room's log, from 1.
    pub seq: u64,
    /// When it was accepted, in ms since the Unix epoch.
    pub received_ms: u64,
    /// What it is.
    pub kind: EntryKind,
    /// The operation or node as JSON.
    pub text: String,
    /// The address on whose word it was taken, where no signature of its own says so.
    pub vouched: Option<String>,
}

/// What an entry of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// An operation.
    Operation,
    /// A node that was taken from a peer's full state.
    Node,
}

impl Entry {
    /// What it did, to which node, and when by its author's clock; `None` when it cannot be read.
    pub fn summary(&self) -> Option<(&'static str, JsonString, Hlc)> {
        if self.kind == EntryKind::Node {
            return Node::parse(&self.text).ok().map(|node| ("node", node.id, node.timestamp));
        }
        match Operation::parse(&self.text, &mut 0).ok()? {
            Operation::Upsert(upsert) => Some(("upsert", upsert.id, upsert.timestamp)),
            Operation::Remove(remove) => Some(("remove", remove.id, remove.timestamp)),
            Operation::Link(link) => Some(("link", link.source, link.timestamp)),
            Operation::Sync(_) | Operation::DeltaSync(_) | Operation::FullStateSync(_) => None,
        }
    }

    /// Who says that it wrote this, or vouched for it. [`History::verify`] says whether that holds.
    pub fn author(&self) -> Option<Address> {
        let mut members = Members::parse(&self.text).ok()?;
        let named = members.take("originEthAddress").and_then(|raw| genosdb::json::string(raw).ok());
        let named = named.and_then(|text| Address::parse(text.as_printed()));
        named.or_else(|| Address::parse(self.vouched.as_deref()?))
    }
}

impl History {
    /// Opens the room `name` in the archive of the folder `data`. A seed may be running on it.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn open(data: &Path, name: &str) -> Result<Self, HistoryError> {
        let path = data.join(FILE_NAME);
        let opened = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY).and_then(|connection| {
            // A seed that writes makes nobody wait, but for the moments in which it tidies up.
            connection.busy_timeout(std::time::Duration::from_secs(5))?;
            let room: Option<i64> =
                connection.query_row("SELECT id FROM room WHERE name = ?", [name], |row| row.get(0)).optional()?;
            Ok((connection, room))
        });
        match opened {
            Ok((connection, Some(room))) => Ok(Self { path, connection, room }),
            Ok((_, None)) => Err(HistoryError::Unknown),
            Err(source) => Err(HistoryError::Archive { path, source }),
        }
    }

    /// Hands out the entries of the log from `from` on, at most `limit`, until `each` returns false.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn entries(&self, from: u64, limit: u64, mut each: impl FnMut(Entry) -> bool) -> Result<(), HistoryError> {
        self.read(|connection| {
            let mut select = connection.prepare_cached(
                "SELECT seq, received, kind, operation, vouched FROM main.log WHERE room = ? AND seq >= ?
                 ORDER BY seq LIMIT ?",
            )?;
            let mut rows = select.query(params![self.room, signed(from), signed(limit)])?;
            while let Some(row) = rows.next()? {
                let entry = Entry {
                    seq: unsigned(row.get(0)?),
                    received_ms: unsigned(row.get(1)?),
                    kind: if row.get::<_, i64>(2)? == 0 { EntryKind::Operation } else { EntryKind::Node },
                    text: row.get(3)?,
                    vouched: row.get(4)?,
                };
                if !each(entry) {
                    break;
                }
            }
            Ok(())
        })
    }

    /// The last entry of the log; 0 when there is none.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn last_entry(&self) -> Result<u64, HistoryError> {
        self.read(|connection| {
            connection.query_row("SELECT seq FROM main.room WHERE id = ?", [self.room], |row| Ok(unsigned(row.get(0)?)))
        })
    }

    /// A number that changes whenever the archive does.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn version(&self) -> Result<i64, HistoryError> {
        self.read(|connection| connection.pragma_query_value(None, "data_version", |row| row.get(0)))
    }

    fn read<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, HistoryError> {
        read(&self.connection).map_err(|source| HistoryError::Archive { path: self.path.clone(), source })
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
