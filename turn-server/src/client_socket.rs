//! The socket that clients talk to, as the engine sees it.

use std::any::Any;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use async_trait::async_trait;
use tokio::net::UdpSocket;
use webrtc_util::{Conn, Error};

use crate::metrics::Metrics;

/// A UDP socket on which errors of single packets stay errors of single packets, and IPv4 clients of a dual-stack
/// socket have IPv4 addresses: those go into XOR-MAPPED-ADDRESS.
pub(crate) struct ClientSocket {
    socket: UdpSocket,
    is_ipv6: bool,
    metrics: Metrics,
}

impl ClientSocket {
    pub(crate) fn new(socket: UdpSocket, metrics: Metrics) -> std::io::Result<Self> {
        let is_ipv6 = socket.local_addr()?.is_ipv6();
        Ok(Self { socket, is_ipv6, metrics })
    }
}

#[async_trait]
impl Conn for ClientSocket {
    async fn recv_from(&self, buffer: &mut [u8]) -> Result<(usize, SocketAddr), Error> {
        loop {
            match self.socket.recv_from(buffer).await {
                Ok((length, source)) => {
                    self.metrics.client_packets.with_label_values(&["from_client"]).inc();
                    return Ok((length, SocketAddr::new(source.ip().to_canonical(), source.port())));
                }
                // An ICMP error about a packet sent earlier. To the engine, any error would be the end.
                Err(error) => tracing::debug!(%error, "receiving from clients"),
            }
        }
    }

    async fn send_to(&self, bytes: &[u8], target: SocketAddr) -> Result<usize, Error> {
        let target = match target.ip() {
            IpAddr::V4(address) if self.is_ipv6 => {
                SocketAddr::V6(SocketAddrV6::new(address.to_ipv6_mapped(), target.port(), 0, 0))
            }
            _ => target,
        };
        match self.socket.send_to(bytes, target).await {
            Ok(length) => {
                self.metrics.client_packets.with_label_values(&["to_client"]).inc();
                Ok(length)
            }
            Err(error) => {
                self.metrics.drops.with_label_values(&["to_client"]).inc();
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
