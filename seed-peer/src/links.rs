//! All links of the process, on one UDP port. A packet finds its link by the ICE user name in it, and from then on
//! by the address that it came from.

use std::collections::{BTreeSet, HashMap};
use std::io::{ErrorKind, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use str0m::ice::StunMessage;
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::link::{CloseReason, Link, LinkOutput, packet};
use crate::metrics::Metrics;

/// Names a link for as long as the process runs.
pub(crate) type LinkId = u64;

/// Bytes of one buffer for packets: a run of them may come in one.
const BUFFER_BYTES: usize = 64 << 10;

/// The socket of all links.
pub(crate) struct LinkSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
    is_ipv6: bool,
}

impl LinkSocket {
    pub(crate) fn new(socket: std::net::UdpSocket) -> std::io::Result<Self> {
        let local = socket.local_addr()?;
        let socket = UdpSocket::from_std(socket)?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        Ok(Self { socket, state, local, is_ipv6: local.is_ipv6() })
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub(crate) async fn readable(&self) -> std::io::Result<()> {
        self.socket.readable().await
    }

    fn receive(&self, buffers: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> std::io::Result<usize> {
        self.socket.try_io(Interest::READABLE, || self.state.recv(UdpSockRef::from(&self.socket), buffers, meta))
    }

    fn send(&self, source: SocketAddr, destination: SocketAddr, bytes: &[u8]) -> std::io::Result<()> {
        let destination = match destination {
            SocketAddr::V4(v4) if self.is_ipv6 => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            other => other,
        };
        // From the very address that the peer sent to: on a machine with several, another would not be believed.
        let src_ip = Some(source.ip()).filter(|_| self.local.ip().is_unspecified());
        let transmit = Transmit { destination, ecn: None, contents: bytes, segment_size: None, src_ip };
        self.socket.try_io(Interest::WRITABLE, || self.state.try_send(UdpSockRef::from(&self.socket), &transmit))
    }
}

/// The links, and the ways to find them.
pub(crate) struct Links {
    socket: LinkSocket,
    links: HashMap<LinkId, Entry>,
    next_id: LinkId,
    by_ufrag: HashMap<String, LinkId>,
    /// Links whose data channel is not open yet: only they wait for answers from addresses that are not known.
    unopened: BTreeSet<LinkId>,
    by_address: HashMap<SocketAddr, LinkId>,
    deadlines: BTreeSet<(Instant, LinkId)>,
    buffers: Vec<Vec<u8>>,
    metrics: Metrics,
}

struct Entry {
    link: Link,
    deadline: Instant,
    addresses: Vec<SocketAddr>,
}

impl Links {
    pub(crate) fn new(socket: LinkSocket, metrics: Metrics) -> Self {
        Self {
            socket,
            links: HashMap::new(),
            next_id: 1,
            by_ufrag: HashMap::new(),
            unopened: BTreeSet::new(),
            by_address: HashMap::new(),
            deadlines: BTreeSet::new(),
            buffers: vec![vec![0; BUFFER_BYTES]; BATCH_SIZE],
            metrics,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.links.len()
    }

    /// Takes a link in, and names it.
    pub(crate) fn add(&mut self, now: Instant, link: Link) -> LinkId {
        let id = self.next_id;
        self.next_id += 1;
        self.by_ufrag.insert(link.ufrag().to_owned(), id);
        self.unopened.insert(id);
        self.deadlines.insert((now, id));
        self.links.insert(id, Entry { link, deadline: now, addresses: Vec::new() });
        id
    }

    pub(crate) fn get_mut(&mut self, id: LinkId) -> Option<&mut Link> {
        self.links.get_mut(&id).map(|entry| &mut entry.link)
    }

    /// Resolves when there are packets to [`Links::receive`].
    pub(crate) async fn readable(&self) -> std::io::Result<()> {
        self.socket.readable().await
    }

    /// When a link next wants to be told the time.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Reads one batch of packets, and hands out what follows from them. Returns whether there may be more.
    pub(crate) fn receive(&mut self, now: Instant, events: &mut Vec<(LinkId, LinkOutput)>) -> bool {
        let mut meta = [RecvMeta::default(); BATCH_SIZE];
        let mut buffers = std::mem::take(&mut self.buffers);
        let mut slices: Vec<IoSliceMut<'_>> = buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
        let more = match self.socket.receive(&mut slices, &mut meta) {
            Ok(count) => {
                for (buffer, meta) in slices.iter().zip(&meta).take(count) {
                    let source = canonical(meta.addr);
                    let ip = meta.dst_ip.map_or(self.socket.local.ip(), |ip| ip.to_canonical());
                    let destination = SocketAddr::new(ip, self.socket.local.port());
                    for bytes in buffer[..meta.len].chunks(meta.stride.max(1)) {
                        self.dispatch(now, source, destination, bytes, events);
                    }
                }
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            // An ICMP error about a packet that was sent: links time out by themselves.
            Err(error) => {
                tracing::debug!(%error, "receiving from peers");
                false
            }
        };
        self.buffers = buffers;
        more
    }

    fn dispatch(
        &mut self,
        now: Instant,
        source: SocketAddr,
        destination: SocketAddr,
        bytes: &[u8],
        events: &mut Vec<(LinkId, LinkOutput)>,
    ) {
        let Some(id) = self.find(now, source, destination, bytes) else {
            self.metrics.udp_drops.with_label_values(&["unknown_source"]).inc();
            return;
        };
        if let Some(entry) = self.links.get_mut(&id)
            && let Some(input) = packet(now, source, destination, bytes)
        {
            entry.link.handle_packet(now, input);
            self.drive(id, events);
        }
    }

    fn find(&mut self, now: Instant, source: SocketAddr, destination: SocketAddr, bytes: &[u8]) -> Option<LinkId> {
        let is_stun = bytes.len() >= 20 && bytes[0] < 2;
        if !is_stun {
            return self.by_address.get(&source).copied();
        }
        let message = StunMessage::parse(bytes).ok()?;
        let input = packet(now, source, destination, bytes)?;
        let accepts = |id: &LinkId| self.links.get(id).is_some_and(|entry| entry.link.accepts(&input));
        let id = if message.is_binding_request() {
            let id = *self.by_ufrag.get(message.split_username()?.0)?;
            // Only a packet whose integrity holds may say where a peer is.
            if !accepts(&id) {
                return None;
            }
            id
        } else {
            let known = self.by_address.get(&source).filter(|id| accepts(id)).copied();
            known.or_else(|| self.unopened.iter().copied().find(|id| accepts(id)))?
        };
        if self.by_address.insert(source, id) != Some(id)
            && let Some(entry) = self.links.get_mut(&id)
        {
            entry.addresses.push(source);
        }
        Some(id)
    }

    /// Lets a link go on that was changed from outside.
    pub(crate) fn touch(&mut self, now: Instant, id: LinkId) {
        if let Some(entry) = self.links.get_mut(&id) {
            self.deadlines.remove(&(entry.deadline, id));
            entry.deadline = now;
            self.deadlines.insert((now, id));
        }
    }

    /// Tells every link that waits for it the time.
    pub(crate) fn handle_timeouts(&mut self, now: Instant, events: &mut Vec<(LinkId, LinkOutput)>) {
        while let Some(&(at, id)) = self.deadlines.first() {
            if at > now {
                return;
            }
            self.deadlines.pop_first();
            if let Some(entry) = self.links.get_mut(&id) {
                entry.link.handle_timeout(now);
                self.drive(id, events);
                // A link may not ask for the same moment again and again.
                if let Some(entry) = self.links.get_mut(&id)
                    && entry.deadline <= now
                {
                    self.deadlines.remove(&(entry.deadline, id));
                    entry.deadline = now + std::time::Duration::from_millis(1);
                    self.deadlines.insert((entry.deadline, id));
                }
            }
        }
    }

    /// Sends what a link has to send, and hands out the rest.
    pub(crate) fn drive(&mut self, id: LinkId, events: &mut Vec<(LinkId, LinkOutput)>) {
        let Some(entry) = self.links.get_mut(&id) else { return };
        loop {
            match entry.link.poll() {
                LinkOutput::Transmit { source, destination, bytes } => {
                    // A packet that the system does not take is a lost packet: WebRTC sends it again.
                    if let Err(error) = self.socket.send(source, destination, &bytes) {
                        self.metrics.udp_drops.with_label_values(&["send_failed"]).inc();
                        tracing::trace!(%error, "a packet was not sent");
                    }
                }
                LinkOutput::Timeout(at) => {
                    self.deadlines.remove(&(entry.deadline, id));
                    entry.deadline = at;
                    self.deadlines.insert((at, id));
                    return;
                }
                output => {
                    if matches!(output, LinkOutput::Opened) {
                        self.unopened.remove(&id);
                    }
                    events.push((id, output));
                }
            }
        }
    }

    /// Closes a link, and lets its last packets out.
    pub(crate) fn close(&mut self, id: LinkId, reason: CloseReason, events: &mut Vec<(LinkId, LinkOutput)>) {
        if let Some(link) = self.get_mut(id) {
            link.close(reason);
            self.drive(id, events);
        }
    }

    /// Forgets a link.
    pub(crate) fn remove(&mut self, id: LinkId) {
        let Some(entry) = self.links.remove(&id) else { return };
        self.deadlines.remove(&(entry.deadline, id));
        self.unopened.remove(&id);
        self.by_ufrag.remove(entry.link.ufrag());
        for address in entry.addresses {
            if self.by_address.get(&address) == Some(&id) {
                self.by_address.remove(&address);
            }
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}
