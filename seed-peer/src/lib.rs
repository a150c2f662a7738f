//! A headless GenosDB peer: it stays in configured rooms, keeps every operation in an archive, and brings peers up
//! to date, whoever else is there.

mod addresses;
mod archive;
mod backup;
mod cells;
mod check;
mod cluster;
#[cfg(fuzzing)]
pub mod fuzzing;
mod history;
mod link;
mod link_probe;
mod links;
mod mesh;
mod metrics;
mod notices;
mod relay_key;
mod room;
mod rooms;
mod roster;
mod security;
mod server;
mod signalling;
mod time_of_day;

pub use addresses::ExternalAddress;
pub use archive::{Bounds, Edit, EditError, Imported, OpenError, Written};
pub use backup::{
    BackupConfig, BackupContent, BackupError, BackupReport, BackupTarget, Backups, Kind, ListedBackup, ManifestError,
    Restored, S3Settings, TargetError,
};
pub use cells::{Bridge, CellsConfig};
pub use check::CheckRoom;
pub use cluster::{LEASES, Overview, SNAPSHOTS, SharedRooms, Transfer, TransferError, fetch_rooms, found_rooms};
pub use history::{
    Difference, Doubtful, Entry, EntryKind, History, HistoryError, Moment, MomentError, PastRoom, Restoration,
    RoomIntegrity, Verification, check_archive, diff, restoration,
};
pub use link_probe::{LinkProbe, LinkProbeError};
pub use relay_key::{RelayKey, RelayKeyError};
pub use rooms::{CellStatus, RoomError, RoomStatus, Rooms, Source};
pub use security::Security;
pub use server::{Config, RoomConfig, Server, StartError, relay_tls};
