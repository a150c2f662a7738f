//! A STUN and TURN server on UDP (RFC 8489, RFC 8656), with static users and time-limited credentials.
//!
//! The first engine is that of the `turn` crate; what stands around it here (settings, credentials, sockets,
//! metrics, the filter on peers) stays when it is replaced behind [`Server::bind`].

mod client_socket;
mod credentials;
mod external;
mod metrics;
mod peer_filter;
mod relay_socket;
mod server;

pub use credentials::{Credentials, Minted, mint};
pub use external::{ExternalIp, ExternalIpError};
pub use server::{Config, Server, StartError};
