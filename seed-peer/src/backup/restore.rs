//! Restoring a backup: an archive made anew from its log, and put in place only when it is whole.

use std::path::{Path, PathBuf};

use genosdb::{Hlc, Node, Store as _};
use object_store::ObjectStoreExt as _;
use rusqlite::{Connection, params};

use super::manifest::Room;
use super::segment::{Segment, SnapshotLine, each_line, removed_id};
use super::{BackupError, Backups, blocking};
use crate::archive::{FILE_NAME, LogEntry, RoomGraph, RoomState, replay, schema};

/// The folder in the data folder where an archive is restored until it is whole.
const FOLDER: &str = "restoring";

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The backup.
    pub id: String,
    /// Its rooms, with their nodes.
    pub rooms: Vec<(String, u64)>,
    /// Operations of all rooms.
    pub operations: u64,
}

/// An archive that is being restored.
struct Restoring {
    file: schema::ArchiveFile,
    folder: PathBuf,
}

/// A room that is being restored.
pub(crate) struct RoomBeing {
    /// The room, and the snapshot that its log begins with.
    state: RoomState,
    snapshot: Option<RoomState>,
    log_from: u64,
    /// What it is to come to.
    room: Room,
}

impl Backups {
    /// Restores the backup `id`, or the newest that is whole, as the archive of the folder `data`, where there must be
    /// none. `progress` is told how many operations of how many are there.
    ///
    /// # Errors
    /// [`BackupError`]. Then there is still no archive.
    pub async fn restore(
        &self,
        id: Option<&str>,
        data: &Path,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Restored, BackupError> {
        // What was left in a write-ahead log would be taken for the restored archive's.
        if [FILE_NAME.to_owned(), format!("{FILE_NAME}-wal")].iter().any(|name| data.join(name).exists()) {
            return Err(BackupError::Exists(data.to_owned()));
        }
        let manifest = match id {
            Some(id) => self.manifest(id).await?,
            None => self.newest().await?.ok_or(BackupError::None)?,
        };
        let total = manifest.rooms.iter().map(Room::operations).sum();
        let mut restored =
            Restored { id: super::manifest::id_of(manifest.created_ms), rooms: Vec::new(), operations: 0 };
        let mut restoring = Restoring::start(data)?;
        for room in manifest.rooms {
            let mut being = restoring.begin(room.clone())?;
            for segment in &room.snapshot {
                let content = self.content(segment).await?;
                let segment = segment.clone();
                (restoring, being) = blocking(move || {
                    being.add_snapshot(&restoring.file.connection, &segment, &content)?;
                    Ok((restoring, being))
                })
                .await?;
            }
            for segment in &room.log {
                let content = self.content(segment).await?;
                let (segment, before) = (segment.clone(), being.state.seq);
                (restoring, being) = blocking(move || {
                    being.add_log(&restoring.file.connection, &segment, &content)?;
                    Ok((restoring, being))
                })
                .await?;
                restored.operations += being.state.seq.saturating_sub(before.max(being.log_from.saturating_sub(1)));
                progress(restored.operations, total);
            }
            being.finish(&restoring.file.connection)?;
            restored.rooms.push((room.name.clone(), being.state.nodes));
        }
        let data = data.to_owned();
        blocking(move || restoring.put_in_place(&data)).await?;
        Ok(restored)
    }

    async fn content(&self, segment: &Segment) -> Result<Vec<u8>, BackupError> {
        let found = self.store.get(&self.segment_at(&segment.sha256)).await?;
        Ok(found.bytes().await?.to_vec())
    }
}

impl RoomBeing {
    /// Begins with the empty row `id`.
    pub(crate) fn begin(connection: &Connection, id: i64, room: Room) -> rusqlite::Result<Self> {
        let state = |id| RoomState { id, nodes: 0, bytes: 0, seq: 0, latest: None };
        let snapshot = match room.snapshot_seq {
            None => None,
            Some(seq) => {
                crate::archive::make_shadow(connection, id)?;
                Some(RoomState { seq, ..state(connection.last_insert_rowid()) })
            }
        };
        let state = RoomState { seq: room.snapshot_seq.unwrap_or(0), ..state(id) };
        Ok(Self { state, snapshot, log_from: room.log_from, room })
    }

    /// Adds a portion of the snapshot that its log begins with.
    pub(crate) fn add_snapshot(
        &mut self,
        connection: &Connection,
        segment: &Segment,
        content: &[u8],
    ) -> Result<(), BackupError> {
        connection.execute_batch("BEGIN")?;
        let states = [Some(&mut self.state), self.snapshot.as_mut()];
        let mut states: Vec<&mut RoomState> = states.into_iter().flatten().collect();
        each_line(segment, content, |line: SnapshotLine| {
            match line {
                SnapshotLine::Node(text) => {
                    let node = Node::parse(&text).map_err(|_| BackupError::Damaged(segment.sha256.clone()))?;
                    for state in &mut states {
                        state.see(node.timestamp);
                        RoomGraph { connection, state }.set_node(&node)?;
                    }
                }
                SnapshotLine::Removal(id, physical, logical) => {
                    let (id, timestamp) = (removed_id(id), Hlc::new(physical, logical));
                    for state in &mut states {
                        state.see(timestamp);
                        RoomGraph { connection, state }.set_removed(&id, timestamp)?;
                    }
                }
            }
            Ok(())
        })?;
        connection.execute_batch("COMMIT")?;
        Ok(())
    }

    /// Adds a portion of its log.
    pub(crate) fn add_log(
        &mut self,
        connection: &Connection,
        segment: &Segment,
        content: &[u8],
    ) -> Result<(), BackupError> {
        connection.execute_batch("BEGIN")?;
        each_line(segment, content, |entry: LogEntry| {
            let LogEntry(seq, received, kind, _, ref operation) = entry;
            if seq < self.log_from {
                // It is part of the snapshot.
                return Ok(());
            }
            entry.insert(connection, self.state.id)?;
            let mut graph = RoomGraph { connection, state: &mut self.state };
            if let Some(timestamp) = replay(&mut graph, kind, operation, received)? {
                self.state.see(timestamp);
            }
            self.state.seq = seq;
            Ok(())
        })?;
        connection.execute_batch("COMMIT")?;
        Ok(())
    }

    /// All of it is there: it must come to what the manifest says.
    pub(crate) fn finish(&self, connection: &Connection) -> Result<(), BackupError> {
        let room = &self.room;
        if self.state.nodes != room.nodes {
            return Err(BackupError::NotAsBackedUp {
                room: room.name.clone(),
                expected: room.nodes,
                found: self.state.nodes,
            });
        }
        let latest = room.latest.map(|(physical, logical)| Hlc::new(physical, logical));
        crate::archive::save_room(
            connection,
            &RoomState { seq: room.log_to, latest: latest.max(self.state.latest), ..self.state.clone() },
        )?;
        if let Some(snapshot) = &self.snapshot {
            crate::archive::save_room(connection, snapshot)?;
        }
        Ok(())
    }
}

impl Restoring {
    fn start(data: &Path) -> Result<Self, BackupError> {
        let folder = data.join(FOLDER);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let file = schema::open(&folder)?;
        // It counts only once it is whole: until then nothing needs to survive.
        file.connection.pragma_update(None, "synchronous", "OFF")?;
        file.connection.pragma_update(None, "cache_size", -(64 << 10))?;
        Ok(Self { file, folder })
    }

    fn begin(&self, room: Room) -> Result<RoomBeing, BackupError> {
        let connection = &self.file.connection;
        connection.execute(
            "INSERT INTO room (name, peer_id, settings, paused, nodes, bytes, seq) VALUES (?, ?, ?, ?, 0, 0, 0)",
            params![room.name, room.peer_id, room.settings, room.paused],
        )?;
        Ok(RoomBeing::begin(connection, connection.last_insert_rowid(), room)?)
    }

    fn put_in_place(self, data: &Path) -> Result<(), BackupError> {
        let Self { file, folder } = self;
        file.connection.execute_batch("PRAGMA optimize; PRAGMA wal_checkpoint(TRUNCATE)")?;
        drop(file);
        let path = folder.join(FILE_NAME);
        // Once more, as whoever opens it will.
        let connection = Connection::open(&path)?;
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            return Err(BackupError::File(std::io::Error::other(verdict)));
        }
        drop(connection);
        std::fs::File::open(&path)?.sync_all()?;
        let place = data.join(FILE_NAME);
        // Not over what has come meanwhile.
        std::fs::hard_link(&path, &place)?;
        std::fs::File::open(data)?.sync_all()?;
        std::fs::remove_dir_all(&folder)?;
        Ok(())
    }
}
