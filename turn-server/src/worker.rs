//! One thread of the server: waits for sockets, hands what they have to the engine, and sends what that answers.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus::local::LocalHistogram;
use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSockRef};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustls::{ServerConfig, ServerConnection};
use service::StunConnection;

use crate::coalescing::Coalescing;
use crate::engine::{AllocationId, ClientId, Engine, Now, Place, Transport};
use crate::frame::first_frame;
use crate::metrics::Metrics;
use crate::quotas::{Ledger, Share};
use crate::sockets::{BindAddresses, Datagrams, Relay, Reservations, Sockets, Source};
use crate::stream::{End, Stream};

/// Bytes of one receive buffer: as much as the system puts together of one sender's datagrams (GRO).
const RECEIVE_BUFFER: usize = 64 << 10;
/// Full batches of one socket in a row before others get their turn.
const BATCHES_IN_A_ROW: usize = 4;
/// Sockets that are looked at after one wait.
const EVENTS: usize = 256;
/// Connections that are accepted in a row.
const ACCEPTS_IN_A_ROW: usize = 64;
/// Reads of one stream in a row.
const READS_IN_A_ROW: usize = 8;
/// How often counts of packets go into the metrics.
const PUBLISH: Duration = Duration::from_millis(100);
/// How often streams and reservations are looked at for what takes too long.
const SWEEP: Duration = Duration::from_secs(1);
/// A client that has connected must say something within this time, its TLS handshake included.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// A connection without an allocation, on which nothing is said for so long, is closed.
const IDLE_STREAM: Duration = Duration::from_secs(60);

/// What other threads ask of a worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// The server's addresses have changed.
    Move(Place, BindAddresses),
    /// A client has come to a listener of another service.
    Take { connection: Box<StunConnection>, share: Share },
    /// Take nothing new, and end when all allocations have ended, or at the deadline.
    Drain { deadline: Instant },
}

/// Hands commands to a worker.
#[derive(Debug, Clone)]
pub(crate) struct Mailbox {
    commands: Arc<Mutex<VecDeque<Command>>>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { commands: Arc::default(), wake: Arc::new(wake) })
    }

    pub(crate) fn send(&self, command: Command) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).push_back(command);
        if let Err(error) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "a TURN thread cannot be woken");
        }
    }

    fn take(&self) -> VecDeque<Command> {
        // Only says that the descriptor has been seen; there may be nothing to read any more.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut *self.commands.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a worker is made of.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) sockets: Sockets,
    pub(crate) reservations: Reservations,
    pub(crate) tls: Option<Arc<ServerConfig>>,
    /// Connections, by address and all together.
    pub(crate) connections: Ledger,
    pub(crate) mailbox: Mailbox,
    pub(crate) metrics: Metrics,
}

/// One thread of the server.
pub(crate) struct Worker {
    engine: Engine,
    sockets: Sockets,
    reservations: Reservations,
    tls: Option<Arc<ServerConfig>>,
    connections: Ledger,
    mailbox: Mailbox,
    metrics: Metrics,
    receive: Receive,
    coalescing: Coalescing,
    /// Messages of clients that are not in the metrics yet.
    from_clients: u64,
    swept: Instant,
    published: Instant,
    drain_until: Option<Instant>,
}

/// Where datagrams are received, one batch after the other.
struct Receive {
    buffer: Vec<u8>,
    meta: Vec<RecvMeta>,
    /// Buffers that are offered to the system: preparing each costs, so one more than were needed last time.
    offered: usize,
    /// Datagrams that came since the thread was woken.
    packets: u64,
    /// Datagrams that came in batches, by size of the batch, for the metrics.
    batches: LocalHistogram,
}

impl Receive {
    /// Receives a batch. Returns how many buffers have something, and whether there may be more.
    fn batch(&mut self, datagrams: &Datagrams) -> io::Result<(usize, bool)> {
        let mut chunks = self.buffer.chunks_mut(RECEIVE_BUFFER);
        let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        let buffers = &mut buffers[..self.offered];
        let count = datagrams.state.recv(UdpSockRef::from(&datagrams.socket), buffers, &mut self.meta)?;
        let is_full = count == self.offered;
        self.offered = if is_full { 4 * count } else { count + 1 }.clamp(2, BATCH_SIZE);
        Ok((count, is_full))
    }

    /// The datagrams of the first `count` buffers, each with what is known of it.
    fn datagrams(&self, count: usize) -> impl Iterator<Item = (&RecvMeta, &[u8])> {
        self.meta.iter().zip(self.buffer.chunks(RECEIVE_BUFFER)).take(count).flat_map(|(meta, buffer)| {
            let bytes = &buffer[..meta.len.min(buffer.len())];
            // An empty datagram is one as well.
            let empty = bytes.is_empty().then_some(bytes);
            bytes.chunks(meta.stride.max(1)).chain(empty).map(move |datagram| (meta, datagram))
        })
    }
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        let Parts { engine, sockets, reservations, tls, connections, mailbox, metrics } = parts;
        sockets.watch_wake(&mailbox.wake)?;
        let receive = Receive {
            buffer: vec![0; RECEIVE_BUFFER * BATCH_SIZE],
            meta: vec![RecvMeta::default(); BATCH_SIZE],
            offered: 2,
            packets: 0,
            batches: metrics.batch_packets.local(),
        };
        let swept = Instant::now();
        Ok(Self {
            engine,
            sockets,
            reservations,
            tls,
            connections,
            mailbox,
            metrics,
            receive,
            coalescing: Coalescing::new(swept),
            from_clients: 0,
            swept,
            published: swept,
            drain_until: None,
        })
    }

    /// Works until it is drained.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            if let Some(rest) = self.coalescing.rest() {
                std::thread::sleep(rest);
            }
            let timeout = self.timeout(Instant::now());
            events.clear();
            match epoll::wait(&self.sockets.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let now = now();
            for event in &events {
                match Source::of(event.data) {
                    Source::Wake => self.obey(now),
                    Source::Clients(index) => self.receive_from_clients(index, now),
                    Source::Listener(index) => self.accept(index, now.instant),
                    Source::Stream(index) => self.stream(index, event.flags, now),
                    Source::Relay(index) => self.receive_from_peers(index, now.instant),
                }
            }
            self.coalescing.woke(std::mem::take(&mut self.receive.packets), now.instant);
            self.engine.expire(now.instant, &mut self.sockets);
            for (index, end) in self.sockets.flush() {
                self.end_stream(index, end, now.instant);
            }
            if now.instant.saturating_duration_since(self.published) >= PUBLISH {
                self.publish(now.instant);
            }
            if now.instant.saturating_duration_since(self.swept) >= SWEEP {
                self.sweep(now.instant);
            }
            if self.drain_until.is_some_and(|deadline| deadline <= now.instant || self.engine.len() == 0) {
                self.shut_down(now.instant);
                return Ok(());
            }
        }
    }

    /// Brings the metrics up to date: once for many packets, since threads share them.
    fn publish(&mut self, now: Instant) {
        self.published = now;
        self.engine.publish_flow();
        self.sockets.publish_flow();
        self.receive.batches.flush();
        if self.from_clients > 0 {
            self.metrics.client_packets.with_label_values(&["from_client"]).inc_by(self.from_clients);
            self.from_clients = 0;
        }
    }

    fn has_unpublished(&self) -> bool {
        self.from_clients > 0 || self.engine.has_unpublished() || self.sockets.has_unpublished()
    }

    /// How long there is nothing to do if nothing comes.
    fn timeout(&self, now: Instant) -> Option<Timespec> {
        let sweeps =
            !self.sockets.streams.is_empty() || self.sockets.listeners_are_paused || !self.reservations.is_empty();
        let sweep = sweeps.then_some(self.swept + SWEEP);
        let publish = self.has_unpublished().then_some(self.published + PUBLISH);
        let next = [self.engine.deadline(), self.drain_until, sweep, publish].into_iter().flatten().min()?;
        // Rounded up: to wake before the time would be to wake twice.
        let wait = next.saturating_duration_since(now) + Duration::from_millis(1);
        Timespec::try_from(wait).ok()
    }

    fn obey(&mut self, now: Now) {
        for command in self.mailbox.take() {
            match command {
                Command::Move(place, bind) => {
                    self.engine.set_place(place);
                    self.sockets.bind = bind;
                }
                // As when listening has stopped.
                Command::Take { .. } if self.drain_until.is_some() => {}
                Command::Take { connection, share } => self.take(*connection, share, now),
                Command::Drain { deadline } => {
                    self.engine.drain();
                    self.sockets.stop_listening();
                    let deadline = self.drain_until.map_or(deadline, |until| until.min(deadline));
                    self.drain_until = Some(deadline.max(now.instant));
                }
            }
        }
    }

    fn receive_from_clients(&mut self, index: usize, now: Now) {
        for _ in 0..BATCHES_IN_A_ROW {
            let Some(datagrams) = self.sockets.clients.get(index) else { return };
            let local = datagrams.local;
            let (count, more) = match self.receive.batch(datagrams) {
                Ok(received) => received,
                Err(error) => return receive_failed(&error, "receiving from clients"),
            };
            let mut received: u32 = 0;
            for (meta, datagram) in self.receive.datagrams(count) {
                received += 1;
                let server = meta.dst_ip.filter(|_| local.ip().is_unspecified()).unwrap_or(local.ip());
                let client = ClientId {
                    transport: Transport::Udp,
                    address: canonical(meta.addr),
                    server: SocketAddr::new(server.to_canonical(), local.port()),
                };
                self.engine.client_message(now, client, datagram, &mut self.sockets);
            }
            self.from_clients += u64::from(received);
            self.receive.packets += u64::from(received);
            self.receive.batches.observe(received.into());
            if !more {
                return;
            }
        }
    }

    fn receive_from_peers(&mut self, index: usize, now: Instant) {
        for _ in 0..BATCHES_IN_A_ROW {
            let Some(Relay { datagrams, allocation }) = self.sockets.relays.get(index) else { return };
            let allocation: AllocationId = *allocation;
            let (count, more) = match self.receive.batch(datagrams) {
                Ok(received) => received,
                Err(error) => return receive_failed(&error, "receiving from peers"),
            };
            let mut received: u32 = 0;
            for (meta, datagram) in self.receive.datagrams(count) {
                received += 1;
                self.engine.peer_datagram(now, allocation, canonical(meta.addr), datagram, &mut self.sockets);
            }
            self.receive.packets += u64::from(received);
            self.receive.batches.observe(received.into());
            if !more {
                return;
            }
        }
    }

    fn accept(&mut self, index: usize, now: Instant) {
        for _ in 0..ACCEPTS_IN_A_ROW {
            let Some((listener, transport)) = self.sockets.listeners.get(index) else { return };
            let transport = *transport;
            let (socket, address) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The client has gone again.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    // Such as: no descriptors left. To ask again at once would be to do nothing else.
                    tracing::warn!(%error, "accepting a TURN client");
                    self.sockets.pause_listeners();
                    return;
                }
            };
            let open = || {
                socket.set_nonblocking(true)?;
                socket.set_nodelay(true)?;
                socket.local_addr()
            };
            let server = match open() {
                Ok(server) => server,
                Err(error) => {
                    tracing::debug!(%error, "a TURN client has gone again");
                    continue;
                }
            };
            let client = ClientId { transport, address: canonical(address), server: canonical(server) };
            let Ok(share) = self.connections.take("", client.address.ip()) else {
                self.metrics.streams_ended.with_label_values(&[End::Refused.label()]).inc();
                continue;
            };
            let tls = match (transport, &self.tls) {
                (Transport::Tls, Some(config)) => match ServerConnection::new(Arc::clone(config)) {
                    Ok(connection) => Some(Box::new(connection)),
                    Err(error) => {
                        tracing::error!(%error, "no TLS for a TURN client");
                        continue;
                    }
                },
                _ => None,
            };
            if let Err(error) = self.sockets.add_stream(Stream::new(socket, tls, client, share, now)) {
                tracing::warn!(%error, "accepting a TURN client");
            }
        }
    }

    /// Serves a client that has come to a listener of another service and has begun to speak.
    fn take(&mut self, connection: StunConnection, share: Share, now: Now) {
        let StunConnection { socket, tls, client } = connection;
        let transport = if tls.is_some() { Transport::Tls } else { Transport::Tcp };
        let added = socket.local_addr().and_then(|server| {
            let client = ClientId { transport, address: canonical(client), server: canonical(server) };
            self.sockets.add_stream(Stream::new(socket, tls, client, share, now.instant))
        });
        match added {
            Ok(index) => {
                if let Err(end) = self.first_words(index, now) {
                    self.end_stream(index, end, now.instant);
                }
            }
            Err(error) => tracing::debug!(%error, "a TURN client has gone again"),
        }
    }

    /// Hears what the client of a new stream has said before it was ours.
    fn first_words(&mut self, index: usize, now: Now) -> Result<(), End> {
        let Some(stream) = self.sockets.streams.get_mut(index) else { return Ok(()) };
        stream.read_decrypted(&mut self.receive.buffer[..RECEIVE_BUFFER])?;
        self.messages(index, now)
    }

    fn stream(&mut self, index: usize, flags: epoll::EventFlags, now: Now) {
        let result = self.serve_stream(index, flags, now);
        if let Err(end) = result {
            self.end_stream(index, end, now.instant);
        }
    }

    fn serve_stream(&mut self, index: usize, flags: epoll::EventFlags, now: Now) -> Result<(), End> {
        if flags.contains(epoll::EventFlags::OUT) {
            self.sockets.write_stream(index)?;
        }
        for _ in 0..READS_IN_A_ROW {
            let Some(stream) = self.sockets.streams.get_mut(index) else { return Ok(()) };
            let was_handshaking = stream.is_handshaking();
            let more = stream.read(&mut self.receive.buffer[..RECEIVE_BUFFER])?;
            if was_handshaking {
                if !stream.is_handshaking() {
                    self.metrics.tls_handshakes.with_label_values(&["ok"]).inc();
                }
                self.sockets.write_stream(index)?;
            }
            self.messages(index, now)?;
            if !more {
                break;
            }
        }
        if let Some(stream) = self.sockets.streams.get_mut(index) {
            stream.tidy();
        }
        Ok(())
    }

    /// Hands all whole messages of a stream to the engine.
    fn messages(&mut self, index: usize, now: Now) -> Result<(), End> {
        let Some(stream) = self.sockets.streams.get_mut(index) else { return Ok(()) };
        let client = stream.client;
        // A channel is there only once it was asked for: who starts like that speaks something else, such as HTTP.
        if !stream.has_spoken && stream.incoming.first().is_some_and(|first| *first >= 0x40) {
            return Err(End::Malformed);
        }
        let mut incoming = std::mem::take(&mut stream.incoming);
        let (mut at, mut received) = (0, 0);
        let result = loop {
            match first_frame(&incoming[at..]) {
                Ok(Some(length)) => {
                    self.engine.client_message(now, client, &incoming[at..at + length], &mut self.sockets);
                    at += length;
                    received += 1;
                }
                Ok(None) => break Ok(()),
                Err(_) => break Err(End::Malformed),
            }
        };
        incoming.drain(..at);
        self.from_clients += received;
        if let Some(stream) = self.sockets.streams.get_mut(index) {
            stream.incoming = incoming;
            if received > 0 {
                stream.has_spoken = true;
                stream.waiting_since = now.instant;
            }
        }
        result
    }

    fn end_stream(&mut self, index: usize, end: End, now: Instant) {
        let Some(stream) = self.sockets.streams.get(index) else { return };
        let client = stream.client;
        let is_current = self.sockets.is_current(index);
        self.sockets.close_stream(index, end);
        if is_current {
            self.engine.disconnect(&client, now, &mut self.sockets);
        }
    }

    /// Ends what takes too long.
    fn sweep(&mut self, now: Instant) {
        self.swept = now;
        self.reservations.expire(now);
        self.sockets.resume_listeners();
        let idle: Vec<usize> = self
            .sockets
            .streams
            .iter()
            .filter(|(_, stream)| {
                let limit = if stream.has_spoken { IDLE_STREAM } else { FIRST_MESSAGE };
                let waited = now.saturating_duration_since(stream.waiting_since);
                waited >= limit && !self.engine.has_allocation(&stream.client)
            })
            .map(|(index, _)| index)
            .collect();
        for index in idle {
            self.end_stream(index, End::Idle, now);
        }
    }

    fn shut_down(&mut self, now: Instant) {
        self.publish(now);
        let streams: Vec<usize> = self.sockets.streams.iter().map(|(index, _)| index).collect();
        for index in streams {
            self.end_stream(index, End::Shutdown, now);
        }
        self.engine.end_all(now, &mut self.sockets);
    }
}

fn now() -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Now { instant: Instant::now(), unix }
}

/// IPv4 clients of a socket of both families have IPv4 addresses: those go into XOR-MAPPED-ADDRESS.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn receive_failed(error: &io::Error, what: &'static str) {
    // Else an ICMP error about a packet sent earlier, such as from a peer that is gone: no reason to end anything.
    if error.kind() != ErrorKind::WouldBlock {
        tracing::debug!(%error, what);
    }
}
