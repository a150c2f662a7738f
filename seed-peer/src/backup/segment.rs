//! Segments: portions of a room's log or of its snapshot, as compressed JSON lines.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use genosdb::JsonString;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::BackupError;
use super::manifest::Room;
use crate::archive::{FILE_NAME, LogEntry, read_node, unsigned};

/// Entries of a segment, at most.
const ENTRIES: usize = 20_000;
/// Bytes of a segment before compression, but for its last entry.
const BYTES: usize = 16 << 20;
/// Bytes that a segment may hold when it is read: more is not one of ours.
const MAX_BYTES: u64 = 1 << 30;

/// A portion of a room, as the manifest names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Segment {
    /// The checksum of the compressed content, which is its name.
    pub(crate) sha256: String,
    /// Compressed bytes.
    pub(crate) bytes: u64,
    /// The first and the last entry of the log in it; in a snapshot, how many lines came before it, and up to it.
    pub(super) first: u64,
    pub(super) last: u64,
    /// Whether it holds as much as one does: it will not grow.
    pub(super) is_full: bool,
    /// The checksum of its last entry, to tell whether an archive's log is still the same.
    pub(super) last_entry: String,
}

/// A line of a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SnapshotLine {
    /// A node as peers send it.
    Node(String),
    /// A node's id, and when it was removed.
    Removal(String, u64, u64),
}

/// How far a snapshot has been read.
#[derive(Debug, Clone)]
pub(super) struct SnapshotPlace {
    removals: bool,
    id: Option<String>,
    lines: u64,
}

/// What of an earlier backup is still true.
#[derive(Default)]
pub(crate) struct Reusable {
    pub(super) log: Vec<Segment>,
    pub(super) snapshot: Option<Vec<Segment>>,
}

/// An archive as it is read for a backup: all of it as at one moment.
pub(crate) struct Source {
    connection: Connection,
}

impl Source {
    pub(crate) fn open(data: &Path) -> Result<Self, BackupError> {
        let connection = Connection::open_with_flags(data.join(FILE_NAME), OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection.execute_batch("BEGIN")?;
        Ok(Self { connection })
    }

    /// The rooms, their logs still empty.
    pub(crate) fn rooms(&self) -> Result<Vec<Room>, BackupError> {
        let mut select = self.connection.prepare(
            "SELECT room.id, shadow.id, room.name, room.peer_id, room.settings, room.paused, room.nodes, room.seq,
                room.physical, room.logical, shadow.seq,
                (SELECT seq FROM log WHERE log.room = room.id ORDER BY seq LIMIT 1)
             FROM room LEFT JOIN room AS shadow ON shadow.snapshot_of = room.id
             WHERE room.snapshot_of IS NULL ORDER BY room.id",
        )?;
        let rooms = select.query_map([], |row| {
            let latest = row.get::<_, Option<i64>>(8)?.zip(row.get::<_, Option<i64>>(9)?);
            let log_to = unsigned(row.get(7)?);
            Ok(Room {
                id: row.get(0)?,
                snapshot_id: row.get(1)?,
                name: row.get(2)?,
                peer_id: row.get(3)?,
                settings: row.get(4)?,
                paused: row.get(5)?,
                nodes: unsigned(row.get(6)?),
                latest: latest.map(|(physical, logical)| (unsigned(physical), unsigned(logical))),
                log_from: row.get::<_, Option<i64>>(11)?.map_or(log_to + 1, unsigned),
                log_to,
                snapshot_seq: row.get::<_, Option<i64>>(10)?.map(unsigned),
                snapshot: Vec::new(),
                log: Vec::new(),
            })
        })?;
        Ok(rooms.collect::<Result<_, _>>()?)
    }

    /// Where a room stands in the stream of a cluster: when that was made, and its last message here.
    pub(crate) fn position(&self, room: &Room) -> Result<Option<(i64, u64)>, BackupError> {
        let row = "SELECT made, position FROM stream WHERE room = ?";
        let found = self.connection.query_row(row, [room.id], |row| Ok((row.get(0)?, unsigned(row.get(1)?))));
        Ok(found.optional()?)
    }

    /// What of an earlier backup of a room can be named again. `is_held` says whether a segment is still there.
    pub(crate) fn reusable(
        &self,
        room: &Room,
        earlier: Option<&Room>,
        is_held: impl Fn(&Segment) -> bool,
    ) -> Result<Reusable, BackupError> {
        let Some(earlier) = earlier else { return Ok(Reusable::default()) };
        let mut reusable = Reusable::default();
        let mut next = None;
        for segment in earlier.log.iter().filter(|segment| segment.last >= room.log_from) {
            let follows = next.map_or(segment.first <= room.log_from, |next| segment.first == next);
            let is_same = self.entry(room.id, segment.last)?.is_some_and(|entry| entry == segment.last_entry);
            if !(follows && segment.is_full && is_same && is_held(segment)) {
                break;
            }
            next = Some(segment.last + 1);
            reusable.log.push(segment.clone());
        }
        let is_same = room.snapshot_seq == earlier.snapshot_seq && earlier.snapshot.iter().all(is_held);
        // Of two snapshots up to one entry of one log, both are the same; what ties them to it is the log behind them.
        if is_same && (room.snapshot_seq.is_none() || !reusable.log.is_empty()) {
            reusable.snapshot = Some(earlier.snapshot.clone());
        }
        Ok(reusable)
    }

    /// The checksum of an entry of the log.
    fn entry(&self, room: i64, seq: u64) -> Result<Option<String>, BackupError> {
        let found = self
            .connection
            .prepare_cached("SELECT seq, received, kind, vouched, operation FROM log WHERE room = ? AND seq = ?")?
            .query_row(params![room, i64::try_from(seq).unwrap_or(i64::MAX)], LogEntry::read)
            .optional()?;
        Ok(found.map(|line| sha256(printed(&line).as_bytes())))
    }

    /// The log from `first` on, as far as one segment goes; `None` when there is no more.
    pub(super) fn log_segment(&self, room: i64, first: u64) -> Result<Option<(Segment, Vec<u8>)>, BackupError> {
        let mut select = self.connection.prepare_cached(
            "SELECT seq, received, kind, vouched, operation FROM log WHERE room = ? AND seq >= ? ORDER BY seq LIMIT ?",
        )?;
        let limit = i64::try_from(ENTRIES).unwrap_or(i64::MAX);
        let mut rows = select.query(params![room, i64::try_from(first).unwrap_or(i64::MAX), limit])?;
        let mut lines = Lines::default();
        let (mut last, mut last_entry) = (0, String::new());
        while let Some(row) = rows.next()? {
            let line = LogEntry::read(row)?;
            last = line.0;
            last_entry = printed(&line);
            lines.push(&last_entry)?;
            if lines.is_full() {
                break;
            }
        }
        if lines.count == 0 {
            return Ok(None);
        }
        let is_full = lines.is_full();
        let content = lines.finish()?;
        let segment = segment(&content, first, last, is_full, sha256(last_entry.as_bytes()));
        Ok(Some((segment, content)))
    }

    /// The snapshot behind a place in it, as far as one segment goes, and the place then; `None` when there is no more.
    #[allow(clippy::type_complexity, reason = "read in one place")]
    pub(super) fn snapshot_segment(
        &self,
        snapshot: Option<i64>,
        after: Option<SnapshotPlace>,
    ) -> Result<Option<(Segment, Vec<u8>, SnapshotPlace)>, BackupError> {
        let Some(snapshot) = snapshot else { return Ok(None) };
        let mut place = after.unwrap_or(SnapshotPlace { removals: false, id: None, lines: 0 });
        let first = place.lines;
        let mut lines = Lines::default();
        let mut last_entry = String::new();
        if !place.removals {
            let mut select = self.connection.prepare_cached(
                "SELECT id, value, edges, extra, physical, logical FROM node
                 WHERE room = ?1 AND (?2 IS NULL OR id > ?2) ORDER BY id",
            )?;
            let mut rows = select.query(params![snapshot, place.id])?;
            loop {
                let Some(row) = rows.next()? else {
                    (place.removals, place.id) = (true, None);
                    break;
                };
                let node = read_node(row)?;
                let mut text = String::new();
                node.print(&mut text);
                last_entry = printed(&SnapshotLine::Node(text));
                lines.push(&last_entry)?;
                place.id = Some(node.id.as_printed().to_owned());
                if lines.is_full() {
                    break;
                }
            }
        }
        if place.removals && !lines.is_full() {
            let mut select = self.connection.prepare_cached(
                "SELECT id, physical, logical FROM tombstone
                 WHERE room = ?1 AND (?2 IS NULL OR id > ?2) ORDER BY id",
            )?;
            let mut rows = select.query(params![snapshot, place.id])?;
            while let Some(row) = rows.next()? {
                let id: String = row.get(0)?;
                let removal = SnapshotLine::Removal(id.clone(), unsigned(row.get(1)?), unsigned(row.get(2)?));
                last_entry = printed(&removal);
                lines.push(&last_entry)?;
                place.id = Some(id);
                if lines.is_full() {
                    break;
                }
            }
        }
        if lines.count == 0 {
            return Ok(None);
        }
        place.lines += u64::try_from(lines.count).unwrap_or(u64::MAX);
        let is_full = lines.is_full();
        let content = lines.finish()?;
        let segment = segment(&content, first, place.lines, is_full, sha256(last_entry.as_bytes()));
        Ok(Some((segment, content, place)))
    }
}

fn segment(content: &[u8], first: u64, last: u64, is_full: bool, last_entry: String) -> Segment {
    let bytes = u64::try_from(content.len()).unwrap_or(u64::MAX);
    Segment { sha256: sha256(content), bytes, first, last, is_full, last_entry }
}

fn printed(line: &impl Serialize) -> String {
    serde_json::json!(line).to_string()
}

/// The checksum of some bytes, in hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lines that are compressed as they come.
struct Lines {
    encoder: GzEncoder<Vec<u8>>,
    count: usize,
    bytes: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Self { encoder: GzEncoder::new(Vec::new(), Compression::default()), count: 0, bytes: 0 }
    }
}

impl Lines {
    fn push(&mut self, line: &str) -> std::io::Result<()> {
        self.encoder.write_all(line.as_bytes())?;
        self.encoder.write_all(b"\n")?;
        self.count += 1;
        self.bytes += line.len();
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.count >= ENTRIES || self.bytes >= BYTES
    }

    fn finish(self) -> std::io::Result<Vec<u8>> {
        self.encoder.finish()
    }
}

/// Hands out the lines of a segment's content, which must be what its name says.
pub(super) fn each_line<L: for<'de> Deserialize<'de>>(
    segment: &Segment,
    content: &[u8],
    mut each: impl FnMut(L) -> Result<(), BackupError>,
) -> Result<(), BackupError> {
    let damaged = || BackupError::Damaged(segment.sha256.clone());
    if sha256(content) != segment.sha256 {
        return Err(damaged());
    }
    for line in BufReader::new(GzDecoder::new(content).take(MAX_BYTES)).lines() {
        let line = line.map_err(|_| damaged())?;
        each(serde_json::from_str(&line).map_err(|_| damaged())?)?;
    }
    Ok(())
}

/// The id of a snapshot's removal.
pub(super) fn removed_id(printed: String) -> JsonString {
    JsonString::from_printed(printed)
}
