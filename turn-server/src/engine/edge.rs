//! What the engine needs of the world: a moment, clients, and sockets.

use std::net::SocketAddr;
use std::time::Instant;

use super::Family;

/// The moment at which something happens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    /// Seconds since the Unix epoch, for credentials and nonces.
    pub(crate) unix: u64,
}

/// How a client talks to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    Udp,
    Tcp,
    Tls,
}

impl Transport {
    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
        }
    }
}

/// The five-tuple of a client (RFC 8656, section 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ClientId {
    pub(crate) transport: Transport,
    pub(crate) address: SocketAddr,
    /// The address that the client sends to.
    pub(crate) server: SocketAddr,
}

/// Names an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct AllocationId(pub(super) usize);

/// Names a socket of the edge's at which peers reach an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RelayId(pub(crate) usize);

/// Why a port cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPort {
    /// Somebody else has it: another may be free.
    InUse,
    /// There is no socket for any port.
    Exhausted,
}

/// What the engine needs of the world.
pub(crate) trait Edge {
    /// Opens a port for peers.
    fn bind(&mut self, allocation: AllocationId, family: Family, port: u16) -> Result<RelayId, NoPort>;
    /// Opens a port and keeps it until `until`, for who has the token.
    fn reserve(&mut self, token: [u8; 8], family: Family, port: u16, until: Instant) -> Result<(), NoPort>;
    /// Takes what was reserved.
    fn claim(&mut self, token: [u8; 8], allocation: AllocationId, now: Instant) -> Option<(RelayId, Family, u16)>;
    /// Closes a port.
    fn close(&mut self, relay: RelayId);
    /// Sends the parts, as one message, to a client.
    fn to_client(&mut self, client: ClientId, parts: [&[u8]; 3]);
    /// Sends a datagram to a peer, in one piece if so asked.
    fn to_peer(&mut self, relay: RelayId, peer: SocketAddr, payload: &[u8], dont_fragment: bool);
}
