//! A STUN and TURN server (RFC 8489, RFC 8656) over UDP, TCP and TLS, with static users and time-limited credentials.
//!
//! [`Server::bind`] starts it. Inside, the engine knows what messages mean, without sockets and clocks; around it, one
//! thread for each core has the sockets.

mod batch;
mod bucket;
mod coalescing;
mod credentials;
mod engine;
mod external;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod message;
mod metrics;
mod nonce;
mod peer_filter;
mod probe;
mod quotas;
mod server;
mod sockets;
mod stream;
mod worker;

pub use credentials::{Credentials, Minted, mint};
pub use external::{Addresses, ExternalIp, ExternalIpError, OwnAddress};
pub use probe::{Echo, PROBE_NAME, Probe, ProbeError, ProbeTransport};
pub use quotas::Quotas;
pub use server::{Config, Limits, Server, StartError};
