//! The GenosDB protocol as browser clients speak it: topics, sealed session descriptions, data-channel
//! frames, the hybrid logical clock, graph operations and the rules that merge them.
//!
//! Everything here is pure: no IO, no clock, no runtime. Time is an argument. Bytes from the network are
//! parsed into types that cannot be wrong, within limits, and without a panic.
//!
//! The source of each rule is the wire description captured from real clients; `fixtures/` holds the captures.

pub mod cells;
pub mod clock;
pub mod election;
pub mod envelope;
pub mod frame;
pub mod governance;
pub mod graph;
pub mod json;
pub mod operation;
pub mod query;
pub mod reassembler;
pub mod roles;
pub mod sealed_sdp;
pub mod security;
pub mod signal;
pub mod signature;
pub mod topic;

pub use cells::{CellIndex, Topology};
pub use clock::{Clock, Hlc};
pub use envelope::Envelope;
pub use frame::{ChannelName, Content, JsonWriter, Message};
pub use graph::{MemoryGraph, Store};
pub use json::{Json, JsonString};
pub use operation::{Batch, Node, Operation, Removal};
pub use reassembler::{Limits, Reassembler};
pub use sealed_sdp::{SdpKey, SealedDescription};
pub use signal::Signal;
pub use topic::{APP_ID, PeerId, Room, Topic};
