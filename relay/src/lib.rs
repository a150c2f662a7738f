//! A Nostr relay made for signalling: ephemeral events go straight to whoever subscribed to them, through an
//! index by kind, tag and value, and are never stored. Other events are, when a store is set.

mod admission;
mod clocks;
mod connection;
mod dials;
mod event;
mod filter;
#[cfg(fuzzing)]
pub mod fuzzing;
mod information;
mod limits;
mod message;
mod metrics;
mod neighbours;
mod outbox;
mod presence;
mod relay;
mod replication;
mod returning;
mod server;
mod store;
mod subscriptions;

pub use admission::Admission;
pub use limits::{Rates, client_address};
pub use presence::AnnounceEconomy;
pub use replication::{ReplicationError, STREAM as EVENT_STREAM};
pub use returning::Resume;
pub use server::{Config, Limits, Page, ServedRooms, Server, StartError};
pub use store::{StoreConfig, StoreError};
