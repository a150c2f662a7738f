//! The sockets of allocations: where relayed traffic leaves to peers and comes back.

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use async_trait::async_trait;
use rand::Rng as _;
use tokio::net::UdpSocket;
use turn::relay::RelayAddressGenerator;
use webrtc_util::{Conn, Error};

use crate::metrics::Metrics;
use crate::peer_filter::PeerFilter;

/// Ports that are tried for one allocation before it is refused. In a range no larger, all of them.
const MAX_TRIES: usize = 256;

/// Opens the sockets of allocations.
pub(crate) struct RelaySockets {
    /// The address that clients are told.
    pub(crate) public: IpAddr,
    /// The address to bind.
    pub(crate) bind: IpAddr,
    pub(crate) ports: RangeInclusive<u16>,
    pub(crate) peers: PeerFilter,
    pub(crate) metrics: Metrics,
}

#[async_trait]
impl RelayAddressGenerator for RelaySockets {
    fn validate(&self) -> Result<(), turn::Error> {
        Ok(())
    }

    async fn allocate_conn(
        &self,
        use_ipv4: bool,
        requested_port: u16,
    ) -> Result<(Arc<dyn Conn + Send + Sync>, SocketAddr), turn::Error> {
        if use_ipv4 != self.public.is_ipv4() {
            return Err(turn::Error::Other("no address of that family".into()));
        }
        let candidates: Vec<u16> = if requested_port != 0 {
            vec![requested_port]
        } else {
            let first = u32::from(*self.ports.start());
            let count = u32::from(*self.ports.end()) - first + 1;
            let offset = rand::rng().random_range(0..count);
            // From a random port on, once around the range.
            (0..count).take(MAX_TRIES).filter_map(|step| u16::try_from(first + (offset + step) % count).ok()).collect()
        };
        for port in candidates {
            let Ok(socket) = UdpSocket::bind((self.bind, port)).await else { continue };
            self.metrics.allocations_total.with_label_values(&["created"]).inc();
            self.metrics.allocations.inc();
            let socket = RelaySocket { socket, peers: self.peers, metrics: self.metrics.clone() };
            return Ok((Arc::new(socket), SocketAddr::new(self.public, port)));
        }
        self.metrics.allocations_total.with_label_values(&["no_port"]).inc();
        Err(turn::Error::ErrMaxRetriesExceeded)
    }
}

/// The socket of one allocation.
struct RelaySocket {
    socket: UdpSocket,
    peers: PeerFilter,
    metrics: Metrics,
}

impl RelaySocket {
    fn count(&self, direction: &str, bytes: usize) {
        self.metrics.relayed_packets.with_label_values(&[direction]).inc();
        self.metrics.relayed_bytes.with_label_values(&[direction]).inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}

impl Drop for RelaySocket {
    fn drop(&mut self) {
        self.metrics.allocations.dec();
    }
}

#[async_trait]
impl Conn for RelaySocket {
    async fn recv_from(&self, buffer: &mut [u8]) -> Result<(usize, SocketAddr), Error> {
        loop {
            match self.socket.recv_from(buffer).await {
                Ok((_, source)) if !self.peers.allows(source.ip()) => self.metrics.denied_peers.inc(),
                Ok((length, source)) => {
                    self.count("from_peer", length);
                    return Ok((length, source));
                }
                // A peer that is gone answers with ICMP: no reason to end the allocation.
                Err(error) => tracing::debug!(%error, "receiving from peers"),
            }
        }
    }

    async fn send_to(&self, bytes: &[u8], target: SocketAddr) -> Result<usize, Error> {
        if !self.peers.allows(target.ip()) {
            self.metrics.denied_peers.inc();
            // Dropped: to a client it is a peer that does not answer.
            return Ok(bytes.len());
        }
        match self.socket.send_to(bytes, target).await {
            Ok(length) => {
                self.count("to_peer", length);
                Ok(length)
            }
            Err(error) => {
                self.metrics.drops.with_label_values(&["to_peer"]).inc();
                Err(error.into())
            }
        }
    }

    fn local_addr(&self) -> Result<SocketAddr, Error> {
        Ok(self.socket.local_addr()?)
    }

    fn remote_addr(&self) -> Option<SocketAddr> {
        None
    }

    async fn connect(&self, address: SocketAddr) -> Result<(), Error> {
        Ok(self.socket.connect(address).await?)
    }

    async fn recv(&self, buffer: &mut [u8]) -> Result<usize, Error> {
        Ok(self.recv_from(buffer).await?.0)
    }

    async fn send(&self, bytes: &[u8]) -> Result<usize, Error> {
        Ok(self.socket.send(bytes).await?)
    }

    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}
