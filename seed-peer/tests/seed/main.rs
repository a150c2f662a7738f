//! The seed in its rooms, with peers on another WebRTC stack, through our relay over real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod cells;
#[allow(dead_code, reason = "the test that kills a seed uses the rest")]
mod client;
mod cluster;
mod data;
mod hostile;
mod house;
#[allow(dead_code, reason = "the relay's tests use the rest")]
#[path = "../../../relay/tests/support/nats.rs"]
mod nats;
mod rooms;
