//! Measures the seed peer: links, what they cost, how fast operations reach the archive, how soon a newcomer has
//! everything, and the memory that all of it takes. Its clients are peers on the `webrtc` crate.

mod process;
mod seed_client;

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use genosdb::operation::Operation;
use genosdb::{Batch, MemoryGraph};
use process::Process;
use seed_client::SeedLink;
use tempfile::TempDir;

/// The database that everything happens in.
const DATABASE: &str = "bench";
/// Operations that may be on their way into the archive.
const WINDOW: usize = 50_000;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Debug, Parser)]
#[command(about = "Measures the seed peer")]
struct Args {
    /// The binary to measure
    #[arg(long, default_value = "target/release/homeport")]
    homeport: PathBuf,
    /// Idle links
    #[arg(long, default_value_t = 500)]
    links: usize,
    /// Idle rooms
    #[arg(long, default_value_t = 1_000)]
    rooms: usize,
    /// Sizes of a room that a fresh client joins, in nodes
    #[arg(long, value_delimiter = ',', default_values_t = [20_000, 200_000])]
    nodes: Vec<usize>,
    /// Seconds of writing as fast as it goes
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// A homeport in a folder of its own.
struct Homeport {
    process: Process,
    relay: String,
    metrics: SocketAddr,
}

/// What a process has in memory, in MiB.
struct Memory {
    resident: f64,
    /// Without the pages of its binary.
    anonymous: f64,
}

impl Homeport {
    async fn start(binary: &Path, data: &TempDir, rooms: &[String]) -> anyhow::Result<Self> {
        let (relay, metrics) = (free_address()?, free_address()?);
        let mut command = Command::new(binary);
        command
            .arg("up")
            .current_dir(data.path())
            .env("HOMEPORT_RELAY__LISTEN", relay.to_string())
            .env("HOMEPORT_TURN__LISTEN", "127.0.0.1:0")
            .env("HOMEPORT_TURN__THREADS", "1")
            .env("HOMEPORT_SEED__LISTEN", "127.0.0.1:0")
            .env("HOMEPORT_SEED__OPERATIONS_PER_SECOND", "0")
            .env("HOMEPORT_METRICS__LISTEN", metrics.to_string());
        for room in rooms {
            command.args(["--room", room]);
        }
        let process = Process::start(&mut command)?;
        let homeport = Self { process, relay: format!("ws://{relay}/"), metrics };
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(metrics).is_err() || TcpStream::connect(relay).is_err() {
            if Instant::now() > deadline {
                bail!("{} does not start", binary.display());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        homeport.reaches("homeport_seed_relays_connected", 1.0).await?;
        Ok(homeport)
    }

    fn memory(&self) -> anyhow::Result<Memory> {
        let (resident, anonymous) = (self.process.resident_kib()? / 1_024.0, self.process.anonymous_kib()? / 1_024.0);
        Ok(Memory { resident, anonymous })
    }

    /// The sum of a metric's series whose labels contain `label`.
    async fn metric(&self, name: &str, label: &str) -> anyhow::Result<f64> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.metrics).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let series = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])) && line.contains(label)
        });
        Ok(series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// Lets the archive catch up: beyond what it queues it would ask for everything again.
    async fn keeps_up(&self, sent: usize) -> anyhow::Result<()> {
        if sent.is_multiple_of(WINDOW) && sent > WINDOW {
            self.reaches("homeport_seed_nodes", f64::from(u32::try_from(sent - WINDOW)?)).await?;
        }
        Ok(())
    }

    async fn reaches(&self, name: &str, value: f64) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.metric(name, "").await? < value {
            if Instant::now() > deadline {
                bail!("{name} is {} and not {value}", self.metric(name, "").await?);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn free_address() -> anyhow::Result<SocketAddr> {
    // Of a kind of port that the system gives to nobody by itself a moment later.
    for port in 21_000..29_000u16 {
        let address = SocketAddr::from(([127, 0, 0, 1], port + u16::try_from(std::process::id() % 1_000)?));
        if std::net::TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() && !taken(address) {
            return Ok(address);
        }
    }
    bail!("no port is free")
}

/// Whether an address was given out before.
fn taken(address: SocketAddr) -> bool {
    static GIVEN: std::sync::Mutex<Vec<SocketAddr>> = std::sync::Mutex::new(Vec::new());
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let is_taken = given.contains(&address);
    given.push(address);
    is_taken
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = Args::parse();
    // It runs in a folder of its own.
    args.homeport = std::fs::canonicalize(&args.homeport)
        .with_context(|| format!("no {}: build it with cargo build --release", args.homeport.display()))?;
    rlimit::increase_nofile_limit(u64::MAX)?;
    println!("| what | measured |\n| --- | --- |");
    links(&args).await?;
    operations(&args).await?;
    sizes(&args).await?;
    rooms(&args).await
}

fn quantile(sorted: &[Duration], at: f64) -> f64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let index = ((sorted.len() as f64 - 1.0) * at).round() as usize;
    sorted.get(index).map_or(f64::NAN, |duration| duration.as_secs_f64() * 1_000.0)
}

/// Time to set a link up, and the memory of one that is idle.
async fn links(args: &Args) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let homeport = Homeport::start(&args.homeport, &data, &[DATABASE.into()]).await?;
    // What is there once for all links is not counted with them.
    let warm = SeedLink::open(&homeport.relay, DATABASE).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = homeport.process.resident_kib()?;
    let (mut open, mut times) = (Vec::new(), Vec::new());
    while open.len() < args.links {
        let wave = (0..4.min(args.links - open.len())).map(|_| SeedLink::open(&homeport.relay, DATABASE));
        for link in futures_util::future::join_all(wave).await {
            let link = link?;
            times.push(link.set_up);
            open.push(link);
        }
    }
    tokio::time::sleep(Duration::from_secs(15)).await;
    let after = homeport.process.resident_kib()?;
    let cpu = homeport.process.cpu_seconds()?;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let idle = (homeport.process.cpu_seconds()? - cpu) / 10.0;
    times.sort();
    let count = f64::from(u32::try_from(args.links)?);
    println!(
        "| link set-up, announce to open, p50 / p99 | {:.0} / {:.0} ms |",
        quantile(&times, 0.5),
        quantile(&times, 0.99)
    );
    println!("| memory per idle link, {count} links | {:.0} KiB |", (after - before) / count);
    println!("| CPU of {count} idle links | {:.1} % of a core |", idle * 100.0);
    drop((warm, open));
    Ok(())
}

/// An operation such as an app writes.
fn put(number: usize, at: u64) -> String {
    format!(
        r#"{{"type":"upsert","id":"node-{number:07}","value":{{"type":"post","title":"Title of post number {number}","author":"0x71C7656EC7ab88b098defB751B7401B5f6d8976F","votes":{},"tags":["bench","seed"]}},"timestamp":{{"physical":{at},"logical":{number}}}}}"#,
        number % 97
    )
}

/// Operations a second into the archive, one a message and a hundred a message.
async fn operations(args: &Args) -> anyhow::Result<()> {
    for batch in [1, 100] {
        let data = tempfile::tempdir()?;
        let homeport = Homeport::start(&args.homeport, &data, &[DATABASE.into()]).await?;
        let mut link = SeedLink::open(&homeport.relay, DATABASE).await?;
        let start = Instant::now();
        let cpu = homeport.process.cpu_seconds()?;
        let mut sent = 0;
        while start.elapsed() < Duration::from_secs(args.seconds) {
            let operations: Vec<String> =
                (sent..sent + batch).map(|number| put(number, seed_client::wall_ms())).collect();
            link.send(&format!("[{}]", operations.join(","))).await?;
            sent += batch;
            homeport.keeps_up(sent).await?;
        }
        let expected = f64::from(u32::try_from(sent)?);
        homeport.reaches("homeport_seed_nodes", expected).await?;
        let seconds = start.elapsed().as_secs_f64();
        let cpu = homeport.process.cpu_seconds()? - cpu;
        println!(
            "| operations into the archive, {batch} a message, one peer | {:.0} a second, {:.1} µs CPU each |",
            expected / seconds,
            cpu * 1e6 / expected
        );
    }
    Ok(())
}

/// A room of so many nodes: its memory, and how soon a fresh client has it.
async fn sizes(args: &Args) -> anyhow::Result<()> {
    for nodes in &args.nodes {
        let data = tempfile::tempdir()?;
        let rooms = [DATABASE.to_owned()];
        let homeport = Homeport::start(&args.homeport, &data, &rooms).await?;
        let empty = homeport.memory()?;
        let mut link = SeedLink::open(&homeport.relay, DATABASE).await?;
        let at = seed_client::wall_ms();
        for first in (0..*nodes).step_by(500) {
            let operations: Vec<String> = (first..(first + 500).min(*nodes)).map(|number| put(number, at)).collect();
            link.send(&format!("[{}]", operations.join(","))).await?;
            homeport.keeps_up(first).await?;
        }
        let expected = f64::from(u32::try_from(*nodes)?);
        homeport.reaches("homeport_seed_nodes", expected).await?;
        let written = homeport.memory()?;
        drop((link, homeport));

        let homeport = Homeport::start(&args.homeport, &data, &rooms).await?;
        let restarted = homeport.memory()?;
        let mut times = Vec::new();
        let mut client = Duration::ZERO;
        let mut bytes = 0;
        let cpu = homeport.process.cpu_seconds()?;
        const CLIENTS: usize = 5;
        for number in 0..CLIENTS {
            let start = Instant::now();
            let mut link = SeedLink::open(&homeport.relay, DATABASE).await?;
            link.send(r#"[{"type":"sync","timestamp":null}]"#).await?;
            let (text, travelled) = link.state().await?;
            let arrived = start.elapsed();
            let batch = Batch::parse(&text).ok().context("not a message of operations")?;
            let mut graph = MemoryGraph::default();
            for operation in &batch.operations {
                if let Operation::FullStateSync(state) = operation {
                    graph.merge(state, seed_client::wall_ms());
                }
            }
            if graph.iter().count() != *nodes {
                bail!("{} nodes of {nodes}", graph.iter().count());
            }
            // The first is read from disk, the others are sent what was kept.
            times.push((arrived, start.elapsed()));
            client = start.elapsed() - arrived;
            bytes = travelled;
            if number == 0 {
                println!(
                    "| {nodes} nodes, first fresh client | state after {:.0} ms, graph after {:.0} ms |",
                    arrived.as_secs_f64() * 1e3,
                    start.elapsed().as_secs_f64() * 1e3
                );
            }
        }
        let cpu = homeport.process.cpu_seconds()? - cpu;
        let last = times.last().context("no client")?;
        let megabytes = f64::from(u32::try_from(bytes)?) / 1e6;
        println!(
            "| {nodes} nodes, a later client | state after {:.0} ms, graph after {:.0} ms, {:.0} ms of it its own work |",
            last.0.as_secs_f64() * 1e3,
            last.1.as_secs_f64() * 1e3,
            client.as_secs_f64() * 1e3
        );
        println!(
            "| {nodes} nodes, CPU per MB served, {megabytes:.1} MB deflated each | {:.0} ms |",
            cpu * 1e3 / (megabytes * 5.0)
        );
        let moments = [empty, written, restarted, homeport.memory()?];
        let list = |part: fn(&Memory) -> f64| {
            moments.iter().map(|one| format!("{:.0}", part(one))).collect::<Vec<_>>().join(", ")
        };
        println!(
            "| {nodes} nodes, memory of the whole process: empty, written, restarted, served | {} MiB, of which not the binary's \
             pages {} MiB |",
            list(|one| one.resident),
            list(|one| one.anonymous)
        );
    }
    Ok(())
}

/// The memory of rooms in which nothing happens.
async fn rooms(args: &Args) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let names: Vec<String> = (0..args.rooms).map(|number| format!("idle-{number}")).collect();
    let homeport = Homeport::start(&args.homeport, &data, &names).await?;
    tokio::time::sleep(Duration::from_secs(30)).await;
    let cpu = homeport.process.cpu_seconds()?;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let idle = (homeport.process.cpu_seconds()? - cpu) / 20.0;
    let Memory { resident, anonymous } = homeport.memory()?;
    println!(
        "| {} idle rooms, the whole process | {resident:.0} MiB, of which not the binary's pages {anonymous:.0} MiB, {:.1} % of a \
         core |",
        args.rooms,
        idle * 100.0
    );
    Ok(())
}
