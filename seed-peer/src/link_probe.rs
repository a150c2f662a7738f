//! A link with a seed from the outside: made, opened, and closed again.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use genosdb::Limits;
use tokio::net::UdpSocket;

use crate::addresses::Addresses;
use crate::link::{CloseReason, Link, LinkOutput, Listening, Step, packet};

/// The largest packet of WebRTC that is not media.
const MAX_PACKET: usize = 2_000;

/// A link that is being tried.
pub struct LinkProbe {
    link: Link,
    socket: UdpSocket,
    local: SocketAddr,
}

/// A link did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum LinkProbeError {
    /// The seed's answer is none.
    #[error("the answer is not a description of a link: {0}")]
    Answer(String),
    /// This side cannot.
    #[error("cannot make a link from here: {0}")]
    Here(String),
    /// It went so far.
    #[error("{0}")]
    NotOpened(&'static str),
}

impl LinkProbe {
    /// A link from the address of this machine that reaches `towards`, and the description to ask with. No address in
    /// particular (`0.0.0.0`, `::`) is the internet, or loopback where there is none.
    ///
    /// # Errors
    /// [`LinkProbeError::Here`].
    pub async fn offer(towards: IpAddr) -> Result<(Self, String), LinkProbeError> {
        let here = |error: &dyn std::fmt::Display| LinkProbeError::Here(error.to_string());
        let own = async {
            let ip = match routed_from(towards).await {
                Err(_) if towards.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                ip => ip?,
            };
            let socket = UdpSocket::bind((ip, 0)).await?;
            let local = socket.local_addr()?;
            std::io::Result::Ok((socket, local))
        };
        let (socket, local) = own.await.map_err(|error| here(&error))?;
        let provider = str0m::crypto::from_feature_flags();
        let certificate = provider.dtls_provider.generate_certificate();
        let certificate = certificate.ok_or_else(|| here(&"the crypto provider makes no certificate"))?;
        // Others of this process may have done so before.
        provider.install_process_default();
        let candidates = Addresses { listen: local, external: None }.candidates();
        let listening = Listening { graph: false, cells: false, limits: Limits::default() };
        let (link, sdp) =
            Link::offer(Instant::now(), certificate, candidates, listening).map_err(|error| here(&error))?;
        Ok((Self { link, socket, local }, sdp))
    }

    /// Takes the seed's answer, and waits until the data channel is open. Returns how long that took.
    ///
    /// # Errors
    /// [`LinkProbeError`].
    pub async fn open(mut self, answer: &str, patience: Duration) -> Result<Duration, LinkProbeError> {
        let start = Instant::now();
        self.link.accept_answer(answer).map_err(|error| LinkProbeError::Answer(error.to_string()))?;
        self.link.handle_timeout(start);
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let wake = loop {
                match self.link.poll() {
                    LinkOutput::Transmit { destination, bytes, .. } => {
                        // A packet that the system does not take is a lost packet: WebRTC sends it again.
                        let _ = self.socket.send_to(&bytes, destination).await;
                    }
                    LinkOutput::Opened => {
                        self.close().await;
                        return Ok(start.elapsed());
                    }
                    LinkOutput::Closed(_) => return Err(self.so_far()),
                    LinkOutput::Timeout(at) => break at,
                    _ => {}
                }
            };
            let end = start + patience;
            tokio::select! {
                received = self.socket.recv_from(&mut buffer) => {
                    // An ICMP error about a packet that was sent says no more than silence does.
                    if let Ok((length, source)) = received
                        && let Some(input) = packet(Instant::now(), source, self.local, &buffer[..length])
                        && self.link.accepts(&input)
                    {
                        self.link.handle_packet(Instant::now(), input);
                    }
                }
                () = tokio::time::sleep_until(wake.min(end).into()) => self.link.handle_timeout(Instant::now()),
            }
            if Instant::now() >= end {
                return Err(self.so_far());
            }
        }
    }

    fn so_far(&self) -> LinkProbeError {
        LinkProbeError::NotOpened(match self.link.step() {
            None | Some(Step::Described) => "no packet comes through between here and the seed's UDP port",
            Some(Step::Reached) => "packets come through, but DTLS does not come to be",
            Some(Step::Sealed) => "DTLS is there, but no data channel opens",
        })
    }

    /// Tells the seed that it was only a try.
    async fn close(&mut self) {
        self.link.close(CloseReason::Left);
        while let output @ (LinkOutput::Transmit { .. } | LinkOutput::Closed(_)) = self.link.poll() {
            if let LinkOutput::Transmit { destination, bytes, .. } = output {
                let _ = self.socket.send_to(&bytes, destination).await;
            }
        }
    }
}

/// The address that this machine sends from to `target`.
async fn routed_from(target: IpAddr) -> std::io::Result<IpAddr> {
    // No host (RFC 5737).
    let target = if target.is_unspecified() { Ipv4Addr::new(198, 51, 100, 1).into() } else { target };
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    // Connecting a UDP socket sends nothing: it only asks the routing table.
    let asking = UdpSocket::bind((any, 0)).await?;
    asking.connect((target, 9)).await?;
    Ok(asking.local_addr()?.ip())
}
