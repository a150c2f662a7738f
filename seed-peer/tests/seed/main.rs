//! The seed in its rooms, with peers on another WebRTC stack, through our relay over real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod cells;
#[allow(dead_code, reason = "the test that kills a seed uses the rest")]
mod client;
mod data;
mod hostile;
mod house;
mod rooms;
