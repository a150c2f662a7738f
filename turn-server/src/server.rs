//! The TURN server as a running service.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use service::{BindError, Certificate, State, StunTaker, Telemetry, TlsError, TlsFiles, listen};
use tokio_util::sync::CancellationToken;

use crate::bucket::Rate;
use crate::credentials::Credentials;
use crate::engine::{Engine, Place, Rules, TotalBandwidth, Transport};
use crate::external::{Addresses, ExternalIp};
use crate::metrics::Metrics;
use crate::nonce::Nonces;
use crate::peer_filter::PeerFilter;
use crate::quotas::{Ledger, Quotas};
use crate::sockets::{BindAddresses, Reservations, Sockets};
use crate::stream::End;
use crate::worker::{Command, Mailbox, Parts, Worker};

/// How often the server's own addresses are looked up again.
const ADDRESS_CHECK: Duration = Duration::from_secs(180);
/// Seconds' worth of a rate that may come at once.
const BURST_SECONDS: u64 = 5;
/// The most threads, however many cores there are.
const MAX_THREADS: usize = 64;
/// Tries to find a port that is free for UDP and TCP, when any will do.
const PORT_TRIES: usize = 16;

/// How to run the TURN server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen for clients on UDP and TCP.
    pub listen: SocketAddr,
    /// Where to listen for clients on TLS, if `tls` is set.
    pub listen_tls: SocketAddr,
    /// The certificate; without it there is no TLS.
    pub tls: Option<TlsFiles>,
    /// The addresses of allocations.
    pub external_ips: Vec<ExternalIp>,
    /// The ports of allocations. Default 49152 to 65535.
    pub relay_ports: RangeInclusive<u16>,
    /// The realm of long-term credentials. Default `homeport`.
    pub realm: String,
    /// Who may use the server. STUN needs no credentials.
    pub credentials: Credentials,
    /// What clients may use.
    pub limits: Limits,
    /// Peers that are let through although they are in special ranges.
    pub allow_peers: Vec<IpNet>,
    /// Peers that are refused.
    pub deny_peers: Vec<IpNet>,
    /// How long allocations live on at shutdown.
    pub drain: Duration,
    /// Threads that relay; 0 means one for each core.
    pub threads: usize,
}

/// What clients may use. 0 means no limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Allocations at a time.
    pub allocations: Quotas,
    /// Bytes a second of one allocation, both ways together. Default 0.
    pub allocation_bytes_per_second: u64,
    /// Bytes a second of all allocations together. Default 0.
    pub total_bytes_per_second: u64,
    /// The longest lifetime of an allocation that is not refreshed. Default 1 hour; 10 minutes at least.
    pub lifetime: Duration,
    /// How long allocations outlive a time-limited credential. Default 10 minutes.
    pub credential_grace: Duration,
    /// How long a nonce is good. Default 1 hour.
    pub nonce_lifetime: Duration,
    /// Answers a second to clients of one address that have not proven who they are. Default 50.
    pub unauthenticated_per_second: u32,
    /// TCP and TLS connections of one address at a time. Default 128.
    pub address_connections: usize,
    /// TCP and TLS connections at a time. Default 10,000.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            allocations: Quotas::default(),
            allocation_bytes_per_second: 0,
            total_bytes_per_second: 0,
            lifetime: Duration::from_secs(3_600),
            credential_grace: Duration::from_secs(600),
            nonce_lifetime: Duration::from_secs(3_600),
            unauthenticated_per_second: 50,
            address_connections: 128,
            connections: 10_000,
        }
    }
}

/// The TURN server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A socket does not do what sockets do.
    #[error("a TURN socket failed: {0}")]
    Socket(#[from] std::io::Error),
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

/// A running TURN server.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    external_ip: IpAddr,
    allocations: prometheus::IntGauge,
    telemetry: Telemetry,
    drain: Duration,
    mailboxes: Vec<Mailbox>,
    /// TCP and TLS connections.
    connections: Ledger,
    refused: prometheus::IntCounter,
    threads: Vec<JoinHandle<()>>,
    stop: CancellationToken,
}

impl Server {
    /// Starts the TURN server.
    ///
    /// # Errors
    /// [`StartError`], which names the setting at fault.
    pub async fn bind(config: Config) -> Result<Self, StartError> {
        let telemetry = Telemetry::default();
        let metrics = Metrics::register(&telemetry.registry)?;
        let allocations = metrics.allocations.clone();
        let refused = metrics.streams_ended.with_label_values(&[End::Refused.label()]);
        let count = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            threads => threads,
        };
        let count = count.min(MAX_THREADS);
        let certificate = config.tls.clone().map(Certificate::load).transpose()?;
        let listening = Listening::open(&config, certificate.is_some(), count)?;
        let (address, tls_address) = (listening.address, listening.tls_address);
        let addresses = Addresses::find(&config.external_ips, address.ip()).await;
        let whereabouts = Whereabouts {
            settings: config.external_ips,
            listen: address.ip(),
            allow: config.allow_peers,
            deny: config.deny_peers,
        };
        let place = whereabouts.place(&addresses);
        if place.peers.opens_own_network() {
            tracing::info!(
                address = %addresses.main(),
                "the address of TURN allocations is not public: clients of this network can use it, others only if \
                 turn.external_ip is set to the public address"
            );
        }
        let tls = certificate.as_ref().map(Certificate::server_config).transpose()?;
        let limits = &config.limits;
        let rate = |per_second: u64, burst_seconds| Rate { per_second, burst_seconds };
        let ports = i64::from(*config.relay_ports.end()) - i64::from(*config.relay_ports.start()) + 1;
        metrics.relay_ports.set(ports);
        let rules = Arc::new(Rules {
            realm: config.realm,
            credentials: config.credentials,
            nonces: Nonces::new(rand::random(), limits.nonce_lifetime.as_secs()),
            relay_ports: config.relay_ports,
            max_lifetime: u32::try_from(limits.lifetime.as_secs()).unwrap_or(u32::MAX),
            expiry_grace: limits.credential_grace.as_secs(),
            allocation_bandwidth: rate(limits.allocation_bytes_per_second, 1),
            unauthenticated: rate(limits.unauthenticated_per_second.into(), BURST_SECONDS),
            ledger: Ledger::new(limits.allocations),
            bandwidth: TotalBandwidth::new(rate(limits.total_bytes_per_second, 1), Instant::now()),
        });
        let connections =
            Ledger::new(Quotas { user: 0, address: limits.address_connections, total: limits.connections });
        let reservations = Reservations::default();
        let (mut mailboxes, mut threads) = (Vec::new(), Vec::new());
        for (number, OfThread { datagrams, listeners }) in listening.threads.into_iter().enumerate() {
            let mailbox = Mailbox::new()?;
            let engine = Engine::new(Arc::clone(&rules), place.clone(), metrics.clone(), rand::random());
            let sockets =
                Sockets::new(datagrams, listeners, bind_addresses(&addresses), reservations.clone(), metrics.clone())?;
            let worker = Worker::new(Parts {
                engine,
                sockets,
                reservations: reservations.clone(),
                tls: tls.clone(),
                connections: connections.clone(),
                mailbox: mailbox.clone(),
                metrics: metrics.clone(),
            })?;
            let health = telemetry.health.clone();
            let work = move || {
                // Whoever reads its socket no more, clients of that socket are lost: people must hear of it.
                let guard = Guard { health, finished: false };
                let result = worker.run();
                if let Err(error) = &result {
                    tracing::error!(%error, "a TURN thread has ended");
                }
                guard.finish(result.is_ok());
            };
            threads.push(std::thread::Builder::new().name(format!("turn-{number}")).spawn(work)?);
            mailboxes.push(mailbox);
        }
        let stop = CancellationToken::new();
        let watch = whereabouts.watch(addresses, mailboxes.clone(), metrics.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(watch));
        if let Some(certificate) = certificate {
            let health = telemetry.health.clone();
            let renewing =
                certificate.renew(health, "turn certificate", move |ends| metrics.certificate_expiry.set(ends));
            tokio::spawn(stop.clone().run_until_cancelled_owned(renewing));
        }
        telemetry.health.set("turn", State::Ok);
        Ok(Self {
            address,
            tls_address,
            external_ip: addresses.main(),
            allocations,
            telemetry,
            drain: config.drain,
            mailboxes,
            connections,
            refused,
            threads,
            stop,
        })
    }

    /// The address in use for UDP and TCP, with the port that the system chose when it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address in use for TLS, if that is on.
    pub fn tls_address(&self) -> Option<SocketAddr> {
        self.tls_address
    }

    /// The address of allocations; of two families, that of IPv4.
    pub fn external_ip(&self) -> IpAddr {
        self.external_ip
    }

    /// What takes clients that come to a listener of another service of this process, so that one port, such as 443, is
    /// enough for both. They count as any other, and are served by each thread in turn.
    pub fn stun_taker(&self) -> StunTaker {
        let (mailboxes, connections, refused) =
            (self.mailboxes.clone(), self.connections.clone(), self.refused.clone());
        let next = AtomicUsize::new(0);
        StunTaker::new(move |connection| {
            let Ok(share) = connections.take("", connection.client.ip().to_canonical()) else { return refused.inc() };
            let turn = next.fetch_add(1, Ordering::Relaxed) % mailboxes.len().max(1);
            if let Some(mailbox) = mailboxes.get(turn) {
                mailbox.send(Command::Take { connection: Box::new(connection), share });
            }
        })
    }

    /// How many allocations are open.
    pub fn allocations(&self) -> &prometheus::IntGauge {
        &self.allocations
    }

    /// The server's metrics and health.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Takes nothing new, waits until all allocations have ended, though no longer than the configuration says, and
    /// stops.
    pub async fn shutdown(self) {
        self.stop.cancel();
        let deadline = Instant::now() + self.drain;
        for mailbox in &self.mailboxes {
            mailbox.send(Command::Drain { deadline });
        }
        let join = tokio::task::spawn_blocking(|| {
            for thread in self.threads {
                if thread.join().is_err() {
                    tracing::error!("a TURN thread had panicked");
                }
            }
        });
        if let Err(error) = join.await {
            tracing::error!(%error, "waiting for TURN threads");
        }
    }
}

/// The sockets of all threads.
struct Listening {
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    threads: Vec<OfThread>,
}

/// The sockets that one thread listens on.
#[derive(Default)]
struct OfThread {
    datagrams: Vec<std::net::UdpSocket>,
    listeners: Vec<(std::net::TcpListener, Transport)>,
}

impl Listening {
    fn open(config: &Config, with_tls: bool, count: usize) -> Result<Self, StartError> {
        let (udp, tcp) = udp_and_tcp(config.listen, count)?;
        let address = udp.first().map_or(Ok(config.listen), std::net::UdpSocket::local_addr)?;
        let of_thread = |(udp, tcp)| OfThread { datagrams: vec![udp], listeners: vec![(tcp, Transport::Tcp)] };
        let mut threads: Vec<OfThread> = udp.into_iter().zip(tcp).map(of_thread).collect();
        let mut tls_address = None;
        if with_tls {
            let tls = listen::tcp_shared("turn.listen_tls", config.listen_tls, count)?;
            tls_address = tls.first().map(std::net::TcpListener::local_addr).transpose()?;
            for (thread, tls) in threads.iter_mut().zip(tls) {
                thread.listeners.push((tls, Transport::Tls));
            }
        }
        Ok(Self { address, tls_address, threads })
    }
}

/// Listens on one port for both; where any port will do, on one that is free for both.
fn udp_and_tcp(
    address: SocketAddr,
    count: usize,
) -> Result<(Vec<std::net::UdpSocket>, Vec<std::net::TcpListener>), StartError> {
    let mut tries = if address.port() == 0 { PORT_TRIES } else { 1 };
    loop {
        tries -= 1;
        let udp = listen::udp_shared("turn.listen", address, count)?;
        let chosen = udp.first().map_or(Ok(address), std::net::UdpSocket::local_addr)?;
        match listen::tcp_shared("turn.listen", SocketAddr::new(address.ip(), chosen.port()), count) {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(_) if tries > 0 => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What makes up the server's place.
struct Whereabouts {
    settings: Vec<ExternalIp>,
    listen: IpAddr,
    allow: Vec<IpNet>,
    deny: Vec<IpNet>,
}

impl Whereabouts {
    fn place(&self, addresses: &Addresses) -> Place {
        Place {
            v4: addresses.v4.map(|own| own.public),
            v6: addresses.v6.map(|own| own.public),
            peers: PeerFilter::new(addresses.public(), &self.allow, &self.deny),
        }
    }

    /// Looks the addresses up again and again, for ever, and tells the threads when they have changed.
    async fn watch(self, mut known: Addresses, mailboxes: Vec<Mailbox>, metrics: Metrics) {
        let mut interval = tokio::time::interval(ADDRESS_CHECK);
        interval.tick().await;
        loop {
            interval.tick().await;
            let addresses = Addresses::find(&self.settings, self.listen).await;
            if addresses != known {
                tracing::warn!(before = ?known, now = ?addresses, "this machine's address has changed");
                metrics.address_changes.inc();
                known = addresses;
                for mailbox in &mailboxes {
                    mailbox.send(Command::Move(self.place(&known), bind_addresses(&known)));
                }
            }
        }
    }
}

fn bind_addresses(addresses: &Addresses) -> BindAddresses {
    BindAddresses { v4: addresses.v4.map(|own| own.bind), v6: addresses.v6.map(|own| own.bind) }
}

/// Says that the server is not well when its thread ends otherwise than it should, a panic included.
struct Guard {
    health: service::Health,
    finished: bool,
}

impl Guard {
    fn finish(mut self, ok: bool) {
        self.finished = ok;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.finished {
            self.health.set("turn", State::Degraded("a thread has ended; restart the server".to_owned()));
        }
    }
}
