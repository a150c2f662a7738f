//! The archive's file: its tables, and whether a file is an archive at all.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

/// Marks an SQLite file as a Homeport archive (`PRAGMA application_id`): "HmPt".
const APPLICATION_ID: i32 = 0x486d_5074;

/// The version of the tables below (`PRAGMA user_version`).
pub(super) const VERSION: i32 = 4;

/// Pages of the file that each connection keeps in memory, in KiB.
const WRITER_CACHE_KIB: i64 = 6 * 1024;
const READER_CACHE_KIB: i64 = 2 * 1024;

/// The archive's file inside the data folder.
pub(crate) const FILE_NAME: &str = "archive.sqlite";

/// `log` is the archive proper: every operation that was ever accepted, in the order of acceptance, as JSON text
/// (`kind` 0), and every node that was taken from a peer's full state (`kind` 1). `node`, `edge` and `tombstone` are
/// what the log amounts to. Ids are JSON string contents: a quote in an id is stored as `\"`.
pub(crate) const TABLES: &str = "
CREATE TABLE room (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,       -- the database's name, as configured
    peer_id TEXT NOT NULL,           -- the seed's own id in the room, kept over restarts
    nodes INTEGER NOT NULL,          -- how many nodes there are
    seq INTEGER NOT NULL,            -- the last log entry
    physical INTEGER,                -- the highest timestamp seen: ms since the epoch
    logical INTEGER,                 --   and counter; NULL before the first
    bytes INTEGER NOT NULL DEFAULT 0,    -- of all nodes: ids, values, edges and extra
    paused INTEGER NOT NULL DEFAULT 0,   -- 1: the seed stays out of it for now
    settings TEXT,                   -- JSON: how to join a room that was added while the seed ran; else NULL
    snapshot_of INTEGER REFERENCES room  -- not NULL: this is no room, but that room before the first entry of its log
) STRICT;
CREATE TABLE log (
    room INTEGER NOT NULL REFERENCES room,
    seq INTEGER NOT NULL,            -- counts from 1 in each room
    received INTEGER NOT NULL,       -- our time of day, ms since the epoch
    kind INTEGER NOT NULL,           -- 0: an operation as it came; 1: a node of a full state
    operation TEXT NOT NULL,         -- JSON
    vouched TEXT,                    -- the address on whose word it was taken, where no signature of its own says so
    PRIMARY KEY (room, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX log_received ON log (room, received);
CREATE TABLE node (
    room INTEGER NOT NULL REFERENCES room,
    id TEXT NOT NULL,
    value TEXT,                      -- JSON; NULL when the node has none
    edges TEXT NOT NULL,             -- JSON array of ids, in the order in which they were linked
    extra TEXT NOT NULL,             -- JSON members that this version does not know, without the braces
    physical INTEGER NOT NULL,
    logical INTEGER NOT NULL,
    PRIMARY KEY (room, id)
) STRICT, WITHOUT ROWID;
CREATE TABLE edge (                  -- node.edges the other way round
    room INTEGER NOT NULL REFERENCES room,
    target TEXT NOT NULL,
    source TEXT NOT NULL,
    PRIMARY KEY (room, target, source)
) STRICT, WITHOUT ROWID;
CREATE TABLE tombstone (             -- when a node was last removed, also when it has been made again since
    room INTEGER NOT NULL REFERENCES room,
    id TEXT NOT NULL,
    physical INTEGER NOT NULL,
    logical INTEGER NOT NULL,
    PRIMARY KEY (room, id)
) STRICT, WITHOUT ROWID;
CREATE TABLE stream (                -- where a room that a cluster shares stands in its stream
    room INTEGER PRIMARY KEY REFERENCES room,
    made INTEGER NOT NULL,           -- when the stream was made, s since the epoch; 0: the room is being made anew from it
    position INTEGER NOT NULL        -- its last message that is in the log
) STRICT;
";

/// From version 1, which knew neither bounds in bytes, nor rooms at run time, nor compaction.
const FROM_VERSION_1: &str = "
ALTER TABLE room ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE room ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;
ALTER TABLE room ADD COLUMN settings TEXT;
ALTER TABLE room ADD COLUMN snapshot_of INTEGER REFERENCES room;
UPDATE room SET bytes = (
    SELECT coalesce(sum(octet_length(id) + coalesce(octet_length(value), 0) + octet_length(edges)
        + octet_length(extra)), 0)
    FROM node WHERE node.room = room.id
);
";

/// From version 2, which knew no addresses.
const FROM_VERSION_2: &str = "ALTER TABLE log ADD COLUMN vouched TEXT;";

/// From version 3, which knew no clusters.
const FROM_VERSION_3: &str = "
CREATE TABLE stream (room INTEGER PRIMARY KEY REFERENCES room, made INTEGER NOT NULL, position INTEGER NOT NULL) STRICT;
";

/// The archive cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The data folder or a file in it is out of reach.
    #[error("cannot use the data folder {path} (setting seed.data): {source}")]
    Folder {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another process has the data folder.
    #[error("{0} is in use by another homeport process (setting seed.data)")]
    InUse(PathBuf),
    /// The file is not an archive of Homeport.
    #[error("{path} is not an archive of Homeport ({reason}); it was left untouched")]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        reason: String,
    },
    /// The file is an archive, but broken.
    #[error("{path} is damaged ({reason}); it was left untouched: restore a copy, or move it away to start anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What SQLite found.
        reason: String,
    },
    /// The file was written by a newer Homeport.
    #[error(
        "{path} has format {found}, this version knows up to {VERSION}: use a newer homeport; it was left untouched"
    )]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: i32,
    },
    /// SQLite could not open or prepare it.
    #[error("cannot open {path}: {source}")]
    Database {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}

/// An open archive file, and the lock that keeps other processes away from it.
#[derive(Debug)]
pub(crate) struct ArchiveFile {
    pub(crate) path: PathBuf,
    pub(crate) connection: Connection,
    _lock: File,
}

impl ArchiveFile {
    /// Another connection, to read with while this one writes.
    pub(crate) fn reader(&self) -> rusqlite::Result<Connection> {
        // Not read-only: a reader of a write-ahead log takes part in keeping its index.
        let connection = Connection::open_with_flags(&self.path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        connection.busy_timeout(Duration::from_secs(1))?;
        connection.pragma_update(None, "query_only", true)?;
        connection.pragma_update(None, "cache_size", -READER_CACHE_KIB)?;
        Ok(connection)
    }
}

/// Opens the archive in `folder`, or creates it.
pub(crate) fn open(folder: &Path) -> Result<ArchiveFile, OpenError> {
    let folder_error = |source| OpenError::Folder { path: folder.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(folder_error)?;
    let lock = lock(folder)?;
    let path = folder.join(FILE_NAME);
    let exists = match std::fs::metadata(&path) {
        Ok(metadata) => metadata.len() > 0,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(source) => return Err(OpenError::Folder { path, source }),
    };
    if exists {
        check(&path)?;
    }
    let database = |source| OpenError::Database { path: path.clone(), source };
    let mut connection = Connection::open(&path).map_err(database)?;
    configure(&connection).map_err(database)?;
    if exists {
        let found: i32 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(database)?;
        if found < VERSION {
            let copy = set_aside(&connection, folder, found)?;
            tracing::info!(from = found, to = VERSION, copy = %copy.display(), "the archive is brought up to date");
            migrate(&mut connection).map_err(database)?;
        }
    } else {
        create(&mut connection).map_err(database)?;
    }
    Ok(ArchiveFile { path, connection, _lock: lock })
}

fn lock(folder: &Path) -> Result<File, OpenError> {
    let path = folder.join("lock");
    let folder_error = |source| OpenError::Folder { path: path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(folder_error)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(folder.to_owned())),
        Err(TryLockError::Error(source)) => Err(folder_error(source)),
    }
}

/// Looks at a file without writing to it.
fn check(path: &Path) -> Result<(), OpenError> {
    let path_owned = || path.to_owned();
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
        .map_err(|source| OpenError::Database { path: path_owned(), source })?;
    let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    let application_id = pragma("application_id")
        .map_err(|error| OpenError::NotOurs { path: path_owned(), reason: error.to_string() })?;
    if application_id != APPLICATION_ID {
        let reason = format!("an SQLite file of application {application_id:#x}");
        return Err(OpenError::NotOurs { path: path_owned(), reason });
    }
    let damaged = |error: rusqlite::Error| OpenError::Damaged { path: path_owned(), reason: error.to_string() };
    let found = pragma("user_version").map_err(damaged)?;
    if found > VERSION {
        return Err(OpenError::TooNew { path: path_owned(), found });
    }
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(damaged)?;
    if verdict == "ok" { Ok(()) } else { Err(OpenError::Damaged { path: path_owned(), reason: verdict }) }
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    // Somebody may look at the file with the sqlite3 tool; longer than this, it is treated as a disk that refuses.
    connection.busy_timeout(Duration::from_secs(1))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // An acknowledged operation survives a power cut.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Kept small: the system caches the file as well, in memory that it can take back.
    connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
    // The write-ahead log gives its space back after a burst.
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

fn create(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(TABLES)?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", VERSION)?;
    transaction.commit()
}

/// Copies an archive as it is, before it is changed for good. The copy stays until somebody removes it.
fn set_aside(connection: &Connection, folder: &Path, version: i32) -> Result<PathBuf, OpenError> {
    let copy = folder.join(format!("archive-of-version-{version}.sqlite"));
    let unfinished = copy.with_extension("new");
    let folder_error = |source| OpenError::Folder { path: copy.clone(), source };
    match std::fs::remove_file(&unfinished) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(folder_error(error)),
        _ => {}
    }
    connection
        .execute("VACUUM INTO ?", [unfinished.to_string_lossy()])
        .map_err(|source| OpenError::Database { path: unfinished.clone(), source })?;
    File::open(&unfinished).and_then(|file| file.sync_all()).map_err(folder_error)?;
    std::fs::rename(&unfinished, &copy).map_err(folder_error)?;
    Ok(copy)
}

/// Brings an older archive to this version; it is then no longer for older Homeports.
fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    let found: i32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found < 2 {
        transaction.execute_batch(FROM_VERSION_1)?;
    }
    if found < 3 {
        transaction.execute_batch(FROM_VERSION_2)?;
    }
    if found < 4 {
        transaction.execute_batch(FROM_VERSION_3)?;
    }
    transaction.pragma_update(None, "user_version", VERSION)?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_opens_again_but_not_twice_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let first = open(folder.path()).unwrap();
        assert!(matches!(open(folder.path()), Err(OpenError::InUse(_))));
        drop(first);
        open(folder.path()).unwrap();
    }

    #[test]
    fn an_archive_of_the_first_version_is_brought_up_to_date() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let old = Connection::open(&path).unwrap();
        old.execute_batch(
            "PRAGMA application_id = 1215123572;
             CREATE TABLE room (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, peer_id TEXT NOT NULL,
                 nodes INTEGER NOT NULL, seq INTEGER NOT NULL, physical INTEGER, logical INTEGER) STRICT;
             CREATE TABLE node (room INTEGER NOT NULL REFERENCES room, id TEXT NOT NULL, value TEXT,
                 edges TEXT NOT NULL, extra TEXT NOT NULL, physical INTEGER NOT NULL, logical INTEGER NOT NULL,
                 PRIMARY KEY (room, id)) STRICT, WITHOUT ROWID;
             CREATE TABLE log (room INTEGER NOT NULL REFERENCES room, seq INTEGER NOT NULL, received INTEGER NOT NULL,
                 kind INTEGER NOT NULL, operation TEXT NOT NULL, PRIMARY KEY (room, seq)) STRICT, WITHOUT ROWID;
             INSERT INTO room VALUES (1, 'my-app', 'zzzzzzzzzzzzzzzzzzzz', 2, 0, NULL, NULL);
             INSERT INTO node VALUES (1, 'a', '\"é\"', '[]', '', 1, 1), (1, 'b', NULL, '[\"a\"]', '', 1, 1);",
        )
        .unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        drop(old);
        let file = open(folder.path()).unwrap();
        let (bytes, paused): (i64, bool) = file
            .connection
            .query_row("SELECT bytes, paused FROM room", [], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap();
        assert_eq!((bytes, paused), (1 + 4 + 2 + 1 + 5, false));
        let copy = Connection::open(folder.path().join("archive-of-version-1.sqlite")).unwrap();
        let version: i32 = copy.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
        let nodes: i64 = copy.query_row("SELECT count(*) FROM node", [], |row| row.get(0)).unwrap();
        assert_eq!((version, nodes), (1, 2), "as it was");
    }

    #[test]
    fn files_that_are_not_ours_are_refused_and_left_untouched() {
        fn foreign(path: &Path) {
            let connection = Connection::open(path).unwrap();
            connection.execute_batch("CREATE TABLE notes (text)").unwrap();
        }
        fn newer(path: &Path) {
            let connection = Connection::open(path).unwrap();
            connection.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
            connection.pragma_update(None, "user_version", VERSION + 1).unwrap();
        }
        fn text(path: &Path) {
            std::fs::write(path, "Dear diary, today I was not a database.\n".repeat(50)).unwrap();
        }
        fn damaged(path: &Path) {
            drop(open(path.parent().unwrap()).unwrap());
            let mut bytes = std::fs::read(path).unwrap();
            bytes[4096..].fill(0x5a);
            std::fs::write(path, bytes).unwrap();
        }
        type Make = fn(&Path);
        let makers: [(Make, &str); 4] = [
            (foreign, "not an archive of Homeport"),
            (newer, "use a newer homeport"),
            (text, "not an archive of Homeport"),
            (damaged, "damaged"),
        ];
        for (make, expected) in makers {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(FILE_NAME);
            make(&path);
            let before = std::fs::read(&path).unwrap();
            let message = open(folder.path()).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("untouched"), "{message}");
            assert_eq!(std::fs::read(&path).unwrap(), before, "{expected}");
        }
    }
}
