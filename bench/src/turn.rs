//! Measures the TURN server beside coturn: CPU per relayed packet, throughput over streams, memory, allocations.
//!
//! `cargo run --release --package bench --bin bench-turn` prints a Markdown report; build `homeport` in release first.

mod process;
// The client of the server's own tests.
#[path = "../../turn-server/tests/support/mod.rs"]
mod turn_client;

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use process::Process;
use turn_client::{CHANNEL_HEAD, Client, PASSWORD, REALM, Transport, USER, channel_data, tls_config};

/// Measures the TURN server, and prints a Markdown report.
#[derive(Debug, Parser)]
struct Cli {
    /// The homeport binary to measure
    #[arg(long, default_value = "target/release/homeport")]
    binary: PathBuf,
    /// coturn's server, to run beside it
    #[arg(long, default_value = "turnserver")]
    coturn: PathBuf,
    /// Runs of each shape, of which the medians are shown
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Run only shapes whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Seconds of each run
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
}

/// Bytes of each relayed packet.
const PAYLOAD: usize = 1_000;
/// Clients of each shape.
const CLIENTS: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    Homeport,
    Coturn,
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Homeport => "homeport",
            Self::Coturn => "coturn",
        }
    }
}

/// A server under test.
struct Server {
    process: Process,
    address: SocketAddr,
    tls_address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(contender: Contender, cli: &Cli) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        std::fs::write(&cert, made.cert.pem())?;
        std::fs::write(&key, made.signing_key.serialize_pem())?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let tls_address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let mut command = match contender {
            Contender::Homeport => homeport(&cli.binary, address, tls_address, &cert, &key, folder.path()),
            Contender::Coturn => coturn(&cli.coturn, address, tls_address, &cert, &key),
        };
        let process = Process::start(command.current_dir(folder.path()))?;
        let deadline = Instant::now() + Duration::from_secs(20);
        // It tells nothing when it listens: it can only be asked.
        while TcpStream::connect(address).is_err() || TcpStream::connect(tls_address).is_err() || !answers(address) {
            anyhow::ensure!(Instant::now() < deadline, "{} does not listen", contender.name());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { process, address, tls_address, _folder: folder })
    }
}

/// Whether a Binding request over UDP is answered.
fn answers(address: SocketAddr) -> bool {
    const BINDING: [u8; 20] = *b"\x00\x01\x00\x00\x21\x12\xa4\x42twelve bytes";
    let ask = || {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        socket.connect(address)?;
        socket.send(&BINDING)?;
        socket.recv(&mut [0; 512])
    };
    ask().is_ok()
}

fn homeport(binary: &Path, address: SocketAddr, tls: SocketAddr, cert: &Path, key: &Path, folder: &Path) -> Command {
    let binary = std::fs::canonicalize(binary).unwrap_or_else(|_| binary.to_owned());
    let mut command = Command::new(binary);
    command
        .args(["turn", "--data"])
        .arg(folder)
        .env("HOMEPORT_TURN__LISTEN", address.to_string())
        .env("HOMEPORT_TURN__LISTEN_TLS", tls.to_string())
        .env("HOMEPORT_TURN__EXTERNAL_IP", "127.0.0.1")
        .env("HOMEPORT_TURN__USERS", format!("{{{USER}=\"{PASSWORD}\"}}"))
        .env("HOMEPORT_TURN__REALM", REALM)
        // Everybody comes from one address here, which nobody does elsewhere.
        .env("HOMEPORT_TURN__ADDRESS_QUOTA", "0")
        .env("HOMEPORT_TURN__UNAUTHENTICATED_PER_SECOND", "0")
        .env("HOMEPORT_TLS__CERT", cert)
        .env("HOMEPORT_TLS__KEY", key)
        .env("HOMEPORT_METRICS__LISTEN", "127.0.0.1:0");
    command
}

fn coturn(binary: &Path, address: SocketAddr, tls: SocketAddr, cert: &Path, key: &Path) -> Command {
    let mut command = Command::new(binary);
    command
        .args(["-n", "-L", "127.0.0.1", "-E", "127.0.0.1", "-a", "--allow-loopback-peers", "--no-cli"])
        .args(["--log-file", "/dev/null", "--no-dtls", "-r", REALM, "-u", &format!("{USER}:{PASSWORD}")])
        .args(["-p", &address.port().to_string(), "--tls-listening-port", &tls.port().to_string()])
        .arg("--cert")
        .arg(cert)
        .arg("--pkey")
        .arg(key);
    command
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// How packets come.
#[derive(Debug, Clone, Copy)]
enum Flow {
    /// Bursts of so many, which the peer sends back; as many a second as given, in each direction.
    Echo { burst: u32, per_second: u32 },
    /// From clients to peers, so many a second.
    Up { per_second: u32 },
    /// From peers to clients.
    Down { per_second: u32 },
}

/// What a flow came to.
#[derive(Debug, Clone, Copy)]
struct Measured {
    /// µs of the server's CPU for each packet that it relayed.
    micros: f64,
    packets_per_second: f64,
    lost: f64,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    rlimit::increase_nofile_limit(u64::MAX)?;
    println!("# TURN, measured\n\nMedians of {}; server and load generator share the machine's cores.\n", cli.runs);
    println!("| {PAYLOAD} B over UDP | server | µs CPU per packet | packets/s | lost |");
    println!("| --- | --- | --- | --- | --- |");
    let flows = [
        ("burst 8", Flow::Echo { burst: 8, per_second: 20_000 }),
        ("burst 1", Flow::Echo { burst: 1, per_second: 20_000 }),
        ("flood up", Flow::Up { per_second: 200_000 }),
        ("flood down", Flow::Down { per_second: 200_000 }),
    ];
    for (name, flow) in flows {
        if name.contains(&cli.only) {
            // Turn about, so that a machine that gets slower does so for both.
            let mut runs = [Vec::new(), Vec::new()];
            for _ in 0..cli.runs {
                for (runs, contender) in runs.iter_mut().zip([Contender::Homeport, Contender::Coturn]) {
                    runs.push(run(contender, &cli, flow)?);
                }
            }
            let [ours, theirs] = runs.map(|runs| median(runs, |run| run.micros));
            for (contender, run) in [(Contender::Homeport, ours), (Contender::Coturn, theirs)] {
                println!(
                    "| {name} | {} | {:.2}{} | {:.0} | {:.2}% |",
                    contender.name(),
                    run.micros,
                    if contender == Contender::Homeport {
                        format!(" ({:.2} of coturn)", ours.micros / theirs.micros)
                    } else {
                        String::new()
                    },
                    run.packets_per_second,
                    run.lost * 100.0
                );
            }
        }
    }
    println!("\n| one client's stream to a peer | server | MB/s | CPU s per GB |");
    println!("| --- | --- | --- | --- |");
    for (name, tls) in [("TCP", false), ("TLS", true)] {
        if name.contains(&cli.only) {
            for contender in [Contender::Homeport, Contender::Coturn] {
                let runs = (0..cli.runs).map(|_| stream(contender, &cli, tls)).collect::<anyhow::Result<Vec<_>>>()?;
                let (rate, cpu) = median(runs, |run| run.1);
                println!("| {name} | {} | {rate:.0} | {cpu:.2} |", contender.name());
            }
        }
    }
    if "idle allocations".contains(&cli.only) {
        println!("\n| 4,000 allocations | server | KiB each | a second |");
        println!("| --- | --- | --- | --- |");
        for contender in [Contender::Homeport, Contender::Coturn] {
            let runs =
                (0..cli.runs).map(|_| allocations(contender, &cli, 4_000)).collect::<anyhow::Result<Vec<_>>>()?;
            let (kib, rate) = median(runs, |run| run.0);
            println!("| idle | {} | {kib:.1} | {rate:.0} |", contender.name());
        }
    }
    Ok(())
}

fn median<T: Copy>(mut runs: Vec<T>, key: impl Fn(&T) -> f64) -> T {
    runs.sort_by(|one, other| key(one).total_cmp(&key(other)));
    runs[runs.len() / 2]
}

/// A client with a channel, and its peer.
struct Pair {
    client: UdpSocket,
    peer: UdpSocket,
    relayed: SocketAddr,
}

fn pair(server: &Server) -> anyhow::Result<Pair> {
    let mut client = Client::allocate(Transport::udp(server.address)?)?;
    let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    client.bind(peer.local_addr()?)?;
    let relayed = client.relayed;
    let Transport::Udp(client) = client.transport else { anyhow::bail!("not over UDP") };
    for socket in [&client, &peer] {
        let socket = socket2::SockRef::from(socket);
        socket.set_recv_buffer_size(4 << 20)?;
        socket.set_send_buffer_size(1 << 20)?;
    }
    Ok(Pair { client, peer, relayed })
}

/// Receives until told to stop, and counts; `echo` sends each payload back to where it came from.
fn receive(socket: &UdpSocket, echo: bool, received: &AtomicU64, stop: &AtomicBool) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut buffer = [0; 2_048];
    while !stop.load(Ordering::Relaxed) {
        if echo {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                received.fetch_add(1, Ordering::Relaxed);
                socket.send_to(&buffer[..length], from)?;
            }
        } else if socket.recv(&mut buffer).is_ok() {
            received.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn run(contender: Contender, cli: &Cli, flow: Flow) -> anyhow::Result<Measured> {
    let server = Server::start(contender, cli)?;
    let pairs = (0..CLIENTS).map(|_| pair(&server)).collect::<anyhow::Result<Vec<_>>>()?;
    let stop = AtomicBool::new(false);
    let (at_peers, at_clients) = (AtomicU64::new(0), AtomicU64::new(0));
    let duration = Duration::from_secs_f64(cli.seconds);
    let (burst, per_second) = match flow {
        Flow::Echo { burst, per_second } => (burst, per_second),
        Flow::Up { per_second } | Flow::Down { per_second } => (16, per_second),
    };
    let mut sent: u64 = 0;
    let (mut cpu, mut elapsed) = (0.0, 0.0);
    std::thread::scope(|scope| {
        for pair in &pairs {
            if !matches!(flow, Flow::Down { .. }) {
                let echo = matches!(flow, Flow::Echo { .. });
                let (received, stop) = (&at_peers, &stop);
                scope.spawn(move || receive(&pair.peer, echo, received, stop));
            }
            if !matches!(flow, Flow::Up { .. }) {
                let (received, stop) = (&at_clients, &stop);
                scope.spawn(move || receive(&pair.client, false, received, stop));
            }
        }
        let result = (|| {
            let data = channel_data(PAYLOAD);
            let before = server.process.cpu_seconds()?;
            let start = Instant::now();
            let pause = Duration::from_secs_f64(f64::from(burst) / f64::from(per_second));
            let mut next = start;
            for pair in pairs.iter().cycle() {
                let now = Instant::now();
                if now.duration_since(start) >= duration {
                    break;
                }
                if let Some(wait) = next.checked_duration_since(now) {
                    // Too short for a sleep to be exact: the others need the core meanwhile.
                    if wait > Duration::from_micros(80) {
                        std::thread::sleep(wait - Duration::from_micros(60));
                    }
                }
                next = (next + pause).max(now.checked_sub(Duration::from_millis(20)).unwrap_or(now));
                for _ in 0..burst {
                    let result = match flow {
                        Flow::Down { .. } => pair.peer.send_to(&data[CHANNEL_HEAD..], pair.relayed),
                        _ => pair.client.send(&data),
                    };
                    sent += u64::from(result.is_ok());
                }
            }
            // What is on its way arrives.
            let sending = start.elapsed();
            std::thread::sleep(Duration::from_millis(200));
            cpu = server.process.cpu_seconds()? - before;
            elapsed = sending.as_secs_f64();
            anyhow::Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    let (at_peers, at_clients) = (at_peers.into_inner(), at_clients.into_inner());
    let relayed = at_peers + at_clients;
    let expected = if matches!(flow, Flow::Echo { .. }) { 2 * sent } else { sent };
    anyhow::ensure!(relayed > 0, "nothing was relayed");
    Ok(Measured {
        micros: cpu * 1e6 / relayed as f64,
        packets_per_second: relayed as f64 / elapsed,
        lost: 1.0 - relayed as f64 / expected as f64,
    })
}

/// MB a second from one client, over a stream, to a peer; and the server's CPU seconds for each GB.
fn stream(contender: Contender, cli: &Cli, tls: bool) -> anyhow::Result<(f64, f64)> {
    let server = Server::start(contender, cli)?;
    let transport =
        if tls { Transport::tls(server.tls_address, &tls_config()?)? } else { Transport::tcp(server.address)? };
    let mut client = Client::allocate(transport)?;
    let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket2::SockRef::from(&peer).set_recv_buffer_size(4 << 20)?;
    client.bind(peer.local_addr()?)?;
    let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let duration = Duration::from_secs_f64(cli.seconds);
    let mut outcome = (0.0, 0.0);
    std::thread::scope(|scope| {
        scope.spawn(|| receive(&peer, false, &received, &stop));
        let result = (|| {
            let data: Vec<u8> = std::iter::repeat_n(channel_data(PAYLOAD), 16).flatten().collect();
            let before = server.process.cpu_seconds()?;
            let start = Instant::now();
            while start.elapsed() < duration {
                match &mut client.transport {
                    Transport::Udp(_) => anyhow::bail!("not a stream"),
                    Transport::Tcp(socket) => socket.write_all(&data)?,
                    Transport::Tls(stream) => stream.write_all(&data)?,
                }
            }
            let bytes = received.load(Ordering::Relaxed) as f64 * PAYLOAD as f64;
            let cpu = server.process.cpu_seconds()? - before;
            outcome = (bytes / 1e6 / start.elapsed().as_secs_f64(), cpu / bytes * 1e9);
            anyhow::Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    Ok(outcome)
}

/// KiB of resident memory of each of so many allocations, and how many were made a second.
fn allocations(contender: Contender, cli: &Cli, count: u32) -> anyhow::Result<(f64, f64)> {
    const THREADS: u32 = 4;
    let server = Server::start(contender, cli)?;
    // What the first ones need, all share.
    let _first = (0..8).map(|_| pair(&server)).collect::<anyhow::Result<Vec<_>>>()?;
    let before = server.process.resident_kib()?;
    let start = Instant::now();
    let held = std::thread::scope(|scope| {
        let work = || {
            (0..count / THREADS)
                .map(|_| Client::allocate(Transport::udp(server.address)?))
                .collect::<anyhow::Result<Vec<_>>>()
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread has panicked"))?)
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    let kib = (server.process.resident_kib()? - before) / f64::from(count);
    drop(held);
    Ok((kib, rate))
}
