//! The engine with invented time and sockets.

mod allocations;
mod model;
mod relaying;
mod requests;
mod world;
