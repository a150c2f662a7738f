//! Manifests: what a backup holds.
//!
//! A manifest is `{"sha256": …, "backup": {…}}`, where the checksum is of the text of `backup`.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::segment::{Segment, sha256};

/// The version of the format.
const VERSION: u32 = 1;

/// Whether a backup names segments that an earlier one has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Everything in it was written with it.
    Full,
    /// What an earlier backup has written was not written again.
    Incremental,
}

/// A text is no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is not what a manifest is, or was cut off.
    #[error("its manifest is damaged: {0}")]
    Json(#[from] serde_json::Error),
    /// Its checksum is another.
    #[error("its manifest is damaged: its checksum is another")]
    Checksum,
    /// A newer Homeport made it.
    #[error("it has format {0}, this version knows up to {VERSION}: use a newer homeport")]
    TooNew(u32),
}

/// What a backup holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) version: u32,
    pub(super) kind: Kind,
    pub(super) created_ms: u64,
    pub(super) rooms: Vec<Room>,
}

/// A room in a backup.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Room {
    /// The row of the archive that it was read from.
    #[serde(skip)]
    pub(crate) id: i64,
    /// That of its snapshot.
    #[serde(skip)]
    pub(crate) snapshot_id: Option<i64>,
    pub(crate) name: String,
    pub(crate) peer_id: String,
    /// How to join the room, when it was added while the seed ran.
    pub(crate) settings: Option<String>,
    pub(crate) paused: bool,
    /// Nodes that it comes to, to tell whether a restored room is the same.
    pub(crate) nodes: u64,
    pub(crate) latest: Option<(u64, u64)>,
    /// The first entry of the log; what segments hold before it is part of the snapshot.
    pub(crate) log_from: u64,
    /// The last entry.
    pub(crate) log_to: u64,
    /// The last entry that the snapshot stands for; absent without one.
    pub(crate) snapshot_seq: Option<u64>,
    pub(crate) snapshot: Vec<Segment>,
    pub(crate) log: Vec<Segment>,
}

impl Room {
    pub(crate) fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.snapshot.iter().chain(&self.log)
    }

    /// Operations in the log.
    pub(crate) fn operations(&self) -> u64 {
        (self.log_to + 1).saturating_sub(self.log_from)
    }
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    sha256: String,
    backup: Box<RawValue>,
}

impl Manifest {
    pub(super) fn new(kind: Kind, created_ms: u64) -> Self {
        Self { version: VERSION, kind, created_ms, rooms: Vec::new() }
    }

    /// The room of that name, if it is the same: another of the name has another id of the seed in it.
    pub(super) fn room(&self, name: &str, peer_id: &str) -> Option<&Room> {
        self.rooms.iter().find(|room| room.name == name && room.peer_id == peer_id)
    }

    pub(super) fn print(&self) -> String {
        let text = serde_json::json!(self).to_string();
        format!(r#"{{"sha256":"{}","backup":{text}}}"#, sha256(text.as_bytes()))
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let Sealed { sha256: expected, backup } = serde_json::from_slice(bytes)?;
        if sha256(backup.get().as_bytes()) != expected {
            return Err(ManifestError::Checksum);
        }
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_str(backup.get())?;
        if version > VERSION {
            return Err(ManifestError::TooNew(version));
        }
        Ok(serde_json::from_str(backup.get())?)
    }
}

/// The name of a backup that was made at a time of day: names order as times do.
pub(super) fn id_of(created_ms: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(created_ms);
    humantime::format_rfc3339_millis(time).to_string().replace([':', '.'], "-")
}
