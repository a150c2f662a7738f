//! Stored events, in an embedded database made for them. Ephemeral events never come here.

use std::path::PathBuf;

use nostr::prelude::{Event, Filter, Timestamp};
use nostr_database::{NostrDatabase as _, RejectedReason, SaveEventStatus};
use nostr_lmdb::NostrLmdb;

/// Where stored events are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// The folder of the database.
    pub folder: PathBuf,
    /// Its size at most, in bytes; beyond, new events are refused.
    pub max_bytes: usize,
}

/// The store cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the store of events in {folder} (setting seed.data): {reason}")]
pub struct StoreError {
    folder: PathBuf,
    reason: String,
}

/// Why an event is not stored; the message goes to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotStored {
    #[error("blocked: this event was deleted by its author")]
    Deleted,
    #[error("invalid: this event has expired")]
    Expired,
    #[error("blocked: a newer version of this event is here")]
    Replaced,
    #[error("invalid: only its author can delete an event")]
    InvalidDelete,
    #[error("error: the store does not take this event, it may be full")]
    Failed,
}

/// What became of an event that may be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    New,
    Duplicate,
}

#[derive(Debug)]
pub(crate) struct Store {
    database: NostrLmdb,
}

impl Store {
    pub(crate) async fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        let failed = |reason: String| StoreError { folder: config.folder.clone(), reason };
        std::fs::create_dir_all(&config.folder).map_err(|error| failed(error.to_string()))?;
        // LMDB maps whole pages.
        let map_size = config.max_bytes.next_multiple_of(1 << 20);
        let building = NostrLmdb::builder(&config.folder).map_size(map_size).process_nip62(false).build();
        Ok(Self { database: building.await.map_err(|error| failed(error.to_string()))? })
    }

    /// Stores a verified event: regular, replaceable or addressable, and deletes what a deletion request names
    /// (NIP-01, NIP-09). What has expired is not stored (NIP-40).
    pub(crate) async fn save(&self, raw: &str) -> Result<Stored, NotStored> {
        let event: Event = serde_json::from_str(raw).map_err(|_| NotStored::Failed)?;
        if event.is_expired() {
            return Err(NotStored::Expired);
        }
        match self.database.save_event(&event).await {
            Ok(SaveEventStatus::Success) => Ok(Stored::New),
            Ok(SaveEventStatus::Rejected(reason)) => match reason {
                RejectedReason::Duplicate => Ok(Stored::Duplicate),
                RejectedReason::Deleted | RejectedReason::Vanished => Err(NotStored::Deleted),
                RejectedReason::Expired => Err(NotStored::Expired),
                RejectedReason::Replaced => Err(NotStored::Replaced),
                RejectedReason::InvalidDelete => Err(NotStored::InvalidDelete),
                RejectedReason::Ephemeral | RejectedReason::Other => Err(NotStored::Failed),
            },
            Err(error) => {
                tracing::warn!(%error, "the store of events does not take an event");
                Err(NotStored::Failed)
            }
        }
    }

    /// The newest events that a filter asks for, newest first, `max_limit` at most.
    pub(crate) async fn query(&self, filter: &str, max_limit: usize) -> Vec<Event> {
        let Ok(mut filter) = serde_json::from_str::<Filter>(filter) else { return Vec::new() };
        filter.limit = Some(filter.limit.unwrap_or(max_limit).min(max_limit));
        match self.database.query(filter).await {
            Ok(events) => {
                let now = Timestamp::now();
                // Ordered as NIP-01 wants it: by time, newest first, then by id.
                events.into_iter().filter(|event| !event.is_expired_at(now)).collect()
            }
            Err(error) => {
                tracing::warn!(%error, "the store of events does not answer");
                Vec::new()
            }
        }
    }

    /// How many stored events a filter asks for (NIP-45).
    pub(crate) async fn count(&self, filter: &str) -> Option<usize> {
        let filter = serde_json::from_str::<Filter>(filter).ok()?;
        match self.database.count(filter).await {
            Ok(count) => Some(count),
            Err(error) => {
                tracing::warn!(%error, "the store of events does not answer");
                None
            }
        }
    }
}
