//! The sockets of one thread: those that clients talk to, and those at which peers reach allocations.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use quinn_udp::{UdpSockRef, UdpSocketState};
use rustix::event::epoll;
use rustix::net::sockopt;
use slab::Slab;

use crate::batch::{Batch, Route};
use crate::engine::{AllocationId, ClientId, Edge, Family, NoPort, RelayId, Transport};
use crate::metrics::Metrics;
use crate::stream::{End, Stream};

/// What the system is asked to hold of datagrams that were not read yet, for each socket of clients and of peers. It
/// takes memory only when it is full.
const CLIENT_BUFFER: usize = 4 << 20;
const PEER_BUFFER: usize = 1 << 20;

/// Ports that are kept for who has a token, at most: each is one that nobody else gets.
const MAX_RESERVATIONS: usize = 256;

/// What epoll says has something for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Another thread has a command.
    Wake,
    /// Datagrams of clients.
    Clients(usize),
    /// Connections of clients to accept.
    Listener(usize),
    /// A connection of a client.
    Stream(usize),
    /// Datagrams of peers.
    Relay(usize),
}

impl Source {
    fn data(self) -> epoll::EventData {
        let (kind, index) = match self {
            Self::Wake => (0, 0),
            Self::Clients(index) => (1, index),
            Self::Listener(index) => (2, index),
            Self::Stream(index) => (3, index),
            Self::Relay(index) => (4, index),
        };
        epoll::EventData::new_u64(kind << 56 | u64::try_from(index).unwrap_or_default())
    }

    pub(crate) fn of(data: epoll::EventData) -> Self {
        let data = data.u64();
        let index = usize::try_from(data & (u64::MAX >> 8)).unwrap_or(usize::MAX);
        match data >> 56 {
            0 => Self::Wake,
            1 => Self::Clients(index),
            2 => Self::Listener(index),
            3 => Self::Stream(index),
            _ => Self::Relay(index),
        }
    }
}

/// A UDP socket and what the system can do for it.
#[derive(Debug)]
pub(crate) struct Datagrams {
    pub(crate) socket: UdpSocket,
    pub(crate) state: UdpSocketState,
    pub(crate) local: SocketAddr,
    is_v6: bool,
}

impl Datagrams {
    fn new(socket: UdpSocket, buffer: usize) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let local = socket.local_addr()?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // Beyond what an ordinary user may have, where this process may; else as much as it gets.
        if sockopt::set_socket_recv_buffer_size_force(&socket, buffer).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, buffer)?;
        }
        Ok(Self { socket, state, local, is_v6: local.is_ipv6() })
    }

    /// An address as this socket writes it: of both families, one of IPv6 has IPv4 ones mapped.
    fn spell(&self, address: SocketAddr) -> SocketAddr {
        match address.ip() {
            IpAddr::V4(ip) if self.is_v6 => SocketAddrV6::new(ip.to_ipv6_mapped(), address.port(), 0, 0).into(),
            _ => address,
        }
    }
}

/// A port at which peers reach an allocation.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) datagrams: Datagrams,
    pub(crate) allocation: AllocationId,
}

/// The upper ports of pairs, kept for who has the token, by whichever thread that client reaches.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reservations(Arc<Mutex<HashMap<[u8; 8], Reservation>>>);

#[derive(Debug)]
struct Reservation {
    socket: UdpSocket,
    family: Family,
    until: Instant,
}

impl Reservations {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 8], Reservation>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Closes the ports that nobody came for.
    pub(crate) fn expire(&self, now: Instant) {
        self.lock().retain(|_, reservation| reservation.until > now);
    }
}

/// The addresses that relay sockets are bound to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct BindAddresses {
    pub(crate) v4: Option<IpAddr>,
    pub(crate) v6: Option<IpAddr>,
}

/// All sockets of a thread.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) epoll: OwnedFd,
    pub(crate) clients: Vec<Datagrams>,
    pub(crate) listeners: Vec<(TcpListener, Transport)>,
    /// There was no descriptor for one more.
    pub(crate) listeners_are_paused: bool,
    pub(crate) streams: Slab<Stream>,
    by_client: HashMap<ClientId, usize>,
    pub(crate) relays: Slab<Relay>,
    to_clients: Batch,
    to_peers: Batch,
    /// Streams with something to write.
    unwritten: Vec<usize>,
    /// Datagrams and messages that were sent to clients and are not in the metrics yet.
    sent_to_clients: u64,
    pub(crate) bind: BindAddresses,
    reservations: Reservations,
    metrics: Metrics,
}

impl Sockets {
    pub(crate) fn new(
        clients: Vec<UdpSocket>,
        listeners: Vec<(TcpListener, Transport)>,
        bind: BindAddresses,
        reservations: Reservations,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let clients: Vec<Datagrams> =
            clients.into_iter().map(|socket| Datagrams::new(socket, CLIENT_BUFFER)).collect::<io::Result<_>>()?;
        // Level-triggered: after a batch that was not full there is no call to learn that nothing is left.
        for (index, datagrams) in clients.iter().enumerate() {
            epoll::add(&epoll, &datagrams.socket, Source::Clients(index).data(), epoll::EventFlags::IN)?;
        }
        for (index, (listener, _)) in listeners.iter().enumerate() {
            epoll::add(&epoll, listener, Source::Listener(index).data(), epoll::EventFlags::IN)?;
        }
        Ok(Self {
            epoll,
            clients,
            listeners,
            listeners_are_paused: false,
            streams: Slab::new(),
            by_client: HashMap::new(),
            relays: Slab::new(),
            to_clients: Batch::default(),
            to_peers: Batch::default(),
            unwritten: Vec::new(),
            sent_to_clients: 0,
            bind,
            reservations,
            metrics,
        })
    }

    /// Waits on a descriptor that another thread writes to.
    pub(crate) fn watch_wake(&self, wake: impl AsFd) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, wake, Source::Wake.data(), epoll::EventFlags::IN)?)
    }

    /// Whether a stream is that of its client: a client may come back on the same port before its old connection is
    /// seen to be gone.
    pub(crate) fn is_current(&self, index: usize) -> bool {
        self.streams.get(index).is_some_and(|stream| self.by_client.get(&stream.client) == Some(&index))
    }

    /// Leaves connections waiting for a while.
    pub(crate) fn pause_listeners(&mut self) {
        self.listeners_are_paused = true;
        self.watch_listeners(epoll::EventFlags::empty());
    }

    /// Accepts connections again.
    pub(crate) fn resume_listeners(&mut self) {
        if std::mem::take(&mut self.listeners_are_paused) {
            self.watch_listeners(epoll::EventFlags::IN);
        }
    }

    fn watch_listeners(&self, flags: epoll::EventFlags) {
        for (index, (listener, _)) in self.listeners.iter().enumerate() {
            if let Err(error) = epoll::modify(&self.epoll, listener, Source::Listener(index).data(), flags) {
                tracing::error!(%error, "a TURN listener cannot be watched");
            }
        }
    }

    /// Takes no more connections.
    pub(crate) fn stop_listening(&mut self) {
        self.listeners.clear();
    }

    /// Waits for what comes on a stream from now on. Returns what it goes by.
    pub(crate) fn add_stream(&mut self, stream: Stream) -> io::Result<usize> {
        let entry = self.streams.vacant_entry();
        let index = entry.key();
        epoll::add(&self.epoll, &stream.socket, Source::Stream(index).data(), epoll::EventFlags::IN)?;
        self.metrics.streams.with_label_values(&[stream.client.transport.label()]).inc();
        self.by_client.insert(stream.client, index);
        entry.insert(stream);
        Ok(index)
    }

    pub(crate) fn close_stream(&mut self, index: usize, end: End) {
        let Some(stream) = self.streams.try_remove(index) else { return };
        if self.by_client.get(&stream.client) == Some(&index) {
            self.by_client.remove(&stream.client);
        }
        self.metrics.streams.with_label_values(&[stream.client.transport.label()]).dec();
        self.metrics.streams_ended.with_label_values(&[end.label()]).inc();
        if stream.is_handshaking() {
            self.metrics.tls_handshakes.with_label_values(&["failed"]).inc();
        }
    }

    /// Sends all that waits. Returns the streams that have ended over it.
    pub(crate) fn flush(&mut self) -> Vec<(usize, End)> {
        self.flush_to_peers();
        self.flush_to_clients();
        let mut ended = Vec::new();
        while let Some(index) = self.unwritten.pop() {
            if let Err(end) = self.write_stream(index) {
                ended.push((index, end));
            }
        }
        ended
    }

    /// Brings the metrics of what was sent up to date.
    pub(crate) fn publish_flow(&mut self) {
        if self.sent_to_clients > 0 {
            self.metrics.client_packets.with_label_values(&["to_client"]).inc_by(self.sent_to_clients);
            self.sent_to_clients = 0;
        }
    }

    pub(crate) fn has_unpublished(&self) -> bool {
        self.sent_to_clients > 0
    }

    /// Writes what waits for a stream, and asks to be told when its socket takes more.
    pub(crate) fn write_stream(&mut self, index: usize) -> Result<(), End> {
        let Some(stream) = self.streams.get_mut(index) else { return Ok(()) };
        let waits = stream.write()?;
        if waits != stream.waits_to_write {
            stream.waits_to_write = waits;
            let out = if waits { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let flags = epoll::EventFlags::IN | out;
            epoll::modify(&self.epoll, &stream.socket, Source::Stream(index).data(), flags).map_err(|_| End::Io)?;
        }
        Ok(())
    }

    fn flush_to_peers(&mut self) {
        let Some(route) = self.to_peers.route() else { return };
        match self.relays.get(route.socket) {
            Some(relay) => {
                let (count, result) = self.to_peers.send(&relay.datagrams.socket, &relay.datagrams.state);
                if let Err(error) = result {
                    tracing::debug!(%error, "sending to a peer");
                    self.metrics.drops.with_label_values(&["to_peer"]).inc_by(count);
                }
            }
            None => self.to_peers.clear(),
        }
    }

    fn flush_to_clients(&mut self) {
        let Some(route) = self.to_clients.route() else { return };
        match self.clients.get(route.socket) {
            Some(datagrams) => {
                let (count, result) = self.to_clients.send(&datagrams.socket, &datagrams.state);
                match result {
                    Ok(()) => self.sent_to_clients += count,
                    Err(error) => {
                        tracing::debug!(%error, "sending to a client");
                        self.metrics.drops.with_label_values(&["to_client"]).inc_by(count);
                    }
                }
            }
            None => self.to_clients.clear(),
        }
    }

    fn open(&self, family: Family, port: u16) -> Result<UdpSocket, NoPort> {
        let ip = match family {
            Family::V4 => self.bind.v4.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            Family::V6 => self.bind.v6.unwrap_or(Ipv6Addr::UNSPECIFIED.into()),
        };
        let open = || {
            let domain = if ip.is_ipv4() { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
            let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
            if ip.is_ipv6() {
                // The same port of IPv4 belongs to somebody else.
                socket.set_only_v6(true)?;
            }
            socket.bind(&SocketAddr::new(ip, port).into())?;
            Ok::<UdpSocket, io::Error>(socket.into())
        };
        open().map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => NoPort::InUse,
            _ => {
                tracing::warn!(%error, "no socket for a relay port");
                NoPort::Exhausted
            }
        })
    }

    fn add_relay(&mut self, socket: UdpSocket, allocation: AllocationId) -> Result<RelayId, NoPort> {
        let add = || {
            let datagrams = Datagrams::new(socket, PEER_BUFFER)?;
            // Datagrams that are too large for the way are cut into pieces, unless the client asks otherwise (RFC
            // 8656, section 16).
            let pieces = datagrams.local.is_ipv4().then_some(sockopt::Ipv4PathMtuDiscovery::DONT);
            if let Some(pieces) = pieces {
                sockopt::set_ip_mtu_discover(&datagrams.socket, pieces)?;
            } else {
                sockopt::set_ipv6_mtu_discover(&datagrams.socket, sockopt::Ipv6PathMtuDiscovery::DONT)?;
            }
            Ok::<_, io::Error>(datagrams)
        };
        let exhausted = |error: io::Error| {
            tracing::warn!(%error, "no socket for a relay port");
            NoPort::Exhausted
        };
        let datagrams = add().map_err(exhausted)?;
        let entry = self.relays.vacant_entry();
        let index = entry.key();
        epoll::add(&self.epoll, &datagrams.socket, Source::Relay(index).data(), epoll::EventFlags::IN)
            .map_err(|error| exhausted(error.into()))?;
        entry.insert(Relay { datagrams, allocation });
        self.metrics.ports_in_use.inc();
        Ok(RelayId(index))
    }
}

impl Edge for Sockets {
    fn bind(&mut self, allocation: AllocationId, family: Family, port: u16) -> Result<RelayId, NoPort> {
        let socket = self.open(family, port)?;
        self.add_relay(socket, allocation)
    }

    fn reserve(&mut self, token: [u8; 8], family: Family, port: u16, until: Instant) -> Result<(), NoPort> {
        let mut reservations = self.reservations.lock();
        if reservations.len() >= MAX_RESERVATIONS {
            let now = Instant::now();
            reservations.retain(|_, reservation| reservation.until > now);
            if reservations.len() >= MAX_RESERVATIONS {
                return Err(NoPort::Exhausted);
            }
        }
        let socket = self.open(family, port)?;
        reservations.insert(token, Reservation { socket, family, until });
        Ok(())
    }

    fn claim(&mut self, token: [u8; 8], allocation: AllocationId, now: Instant) -> Option<(RelayId, Family, u16)> {
        let Reservation { socket, family, until } = self.reservations.lock().remove(&token)?;
        let port = socket.local_addr().ok()?.port();
        if until <= now {
            return None;
        }
        Some((self.add_relay(socket, allocation).ok()?, family, port))
    }

    fn close(&mut self, relay: RelayId) {
        if self.to_peers.route().is_some_and(|route| route.socket == relay.0) {
            self.flush_to_peers();
        }
        if self.relays.try_remove(relay.0).is_some() {
            self.metrics.ports_in_use.dec();
        }
    }

    fn to_client(&mut self, client: ClientId, parts: [&[u8]; 3]) {
        if client.transport != Transport::Udp {
            let Some(index) = self.by_client.get(&client).copied() else { return };
            let Some(stream) = self.streams.get_mut(index) else { return };
            if !stream.push(parts) {
                self.metrics.drops.with_label_values(&["slow_client"]).inc();
                return;
            }
            self.sent_to_clients += 1;
            if self.unwritten.last() != Some(&index) && !stream.waits_to_write {
                self.unwritten.push(index);
            }
            return;
        }
        let serves = |datagrams: &&Datagrams| {
            datagrams.local.port() == client.server.port()
                && (datagrams.local.ip().is_unspecified() || datagrams.local.ip().to_canonical() == client.server.ip())
        };
        let Some(socket) = self.clients.iter().position(|datagrams| serves(&datagrams)) else { return };
        let datagrams = &self.clients[socket];
        let from = datagrams.local.ip().is_unspecified().then(|| datagrams.spell(client.server).ip());
        let route = Route { socket, to: datagrams.spell(client.address), from };
        let length = parts.iter().map(|part| part.len()).sum();
        if !self.to_clients.takes(&route, length, datagrams.state.max_gso_segments()) {
            self.flush_to_clients();
        }
        self.to_clients.push(route, &parts);
    }

    fn to_peer(&mut self, relay: RelayId, peer: SocketAddr, payload: &[u8], dont_fragment: bool) {
        let route = Route { socket: relay.0, to: peer, from: None };
        let Some(Relay { datagrams, .. }) = self.relays.get(relay.0) else { return };
        if dont_fragment {
            self.flush_to_peers();
            self.send_in_one_piece(relay, peer, payload);
            return;
        }
        if !self.to_peers.takes(&route, payload.len(), datagrams.state.max_gso_segments()) {
            self.flush_to_peers();
        }
        self.to_peers.push(route, &[payload]);
    }
}

impl Sockets {
    /// Sends a datagram that no router may cut (RFC 8656, section 11.2). Rare: a client that measures the path.
    fn send_in_one_piece(&self, relay: RelayId, peer: SocketAddr, payload: &[u8]) {
        let Some(Relay { datagrams, .. }) = self.relays.get(relay.0) else { return };
        let socket = &datagrams.socket;
        let set = |on: bool| {
            if datagrams.is_v6 {
                let value = if on { sockopt::Ipv6PathMtuDiscovery::PROBE } else { sockopt::Ipv6PathMtuDiscovery::DONT };
                sockopt::set_ipv6_mtu_discover(socket, value)
            } else {
                let value = if on { sockopt::Ipv4PathMtuDiscovery::PROBE } else { sockopt::Ipv4PathMtuDiscovery::DONT };
                sockopt::set_ip_mtu_discover(socket, value)
            }
        };
        let sent = set(true).map_err(io::Error::from).and_then(|()| socket.send_to(payload, peer));
        let reset = set(false);
        if let Err(error) = sent.and(reset.map_err(io::Error::from)) {
            tracing::debug!(%error, "sending to a peer in one piece");
            self.metrics.drops.with_label_values(&["to_peer"]).inc();
        }
    }
}
