//! Everything at once, for long: relay connections that announce themselves, TURN allocations, links with the seed that
//! write; memory, latencies and what went wrong, by the minute. Then a load many times as large for a minute, and what
//! comes after it.
//!
//! `cargo run --release --package bench --bin bench-soak` prints a Markdown report; build `homeport` in release first.

#[allow(dead_code, reason = "what it starts prints where it is")]
mod process;
mod scrape;
mod seed_client;
// The client of the server's own tests.
#[path = "../../turn-server/tests/support/mod.rs"]
mod turn_client;

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use futures_util::{SinkExt as _, StreamExt as _};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use process::Process;
use seed_client::{SeedLink, wall_ms};
use tokio_tungstenite::tungstenite::Message;
use turn_client::{CHANNEL_HEAD, Client, PASSWORD, REALM, Transport, USER, channel_data};

/// Runs everything at once, and prints a Markdown report.
#[derive(Debug, Parser)]
struct Cli {
    /// The homeport binary to measure
    #[arg(long, default_value = "target/release/homeport")]
    binary: PathBuf,
    /// Minutes of the load that is meant to be borne
    #[arg(long, default_value_t = 20)]
    minutes: u32,
    /// Relay connections, in rooms of ten
    #[arg(long, default_value_t = 5_000)]
    connections: usize,
    /// TURN allocations, each with ten packets a second there and back
    #[arg(long, default_value_t = 300)]
    allocations: usize,
    /// Links with the seed, ten in a database, each with one write a second
    #[arg(long, default_value_t = 300)]
    links: usize,
    /// How many times the load the minute of too much is
    #[arg(long, default_value_t = 10)]
    overload: u32,
}

const ANNOUNCE_PERIOD: Duration = Duration::from_millis(2_500);
const PACKET_PERIOD: Duration = Duration::from_millis(100);
const WRITE_PERIOD: Duration = Duration::from_secs(1);
const KIND: u16 = 22_000;
/// Memory before this is not of the steady state.
const WARM_UP_MINUTES: usize = 3;

/// What one kind of client saw since it was last asked.
#[derive(Debug, Default)]
struct Tally {
    /// In µs.
    latencies: Mutex<Vec<u32>>,
    /// What did not come back, or was refused.
    lost: AtomicU64,
    /// Clients whose connection ended.
    ended: AtomicU64,
}

impl Tally {
    fn took(&self, since: Instant) {
        let us = u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX);
        self.latencies.lock().unwrap_or_else(PoisonError::into_inner).push(us);
    }

    /// Count, median and 99th percentile in ms, lost, ended; and begins anew.
    fn row(&self) -> String {
        let mut latencies = std::mem::take(&mut *self.latencies.lock().unwrap_or_else(PoisonError::into_inner));
        latencies.sort_unstable();
        let quantile = |share: f64| {
            let index = (latencies.len() as f64 * share) as usize;
            latencies.get(index.min(latencies.len().saturating_sub(1))).map_or(0.0, |us| f64::from(*us) / 1_000.0)
        };
        let (lost, ended) = (self.lost.swap(0, Ordering::Relaxed), self.ended.swap(0, Ordering::Relaxed));
        format!("{} | {:.2} / {:.2} | {lost} | {ended}", latencies.len(), quantile(0.5), quantile(0.99))
    }
}

#[derive(Debug)]
struct Load {
    /// How many times the usual.
    factor: AtomicU32,
    stop: AtomicBool,
    relay: Tally,
    turn: Tally,
    seed: Tally,
}

impl Load {
    fn period(&self, usual: Duration) -> Duration {
        usual / self.factor.load(Ordering::Relaxed)
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

fn main() -> anyhow::Result<()> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(Cli::parse()))
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let databases = cli.links.div_ceil(10);
    let rooms: Vec<String> = (0..databases).map(|number| format!(r#"{{name="soak-{number}"}}"#)).collect();
    let port = |()| anyhow::Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port());
    let turn = SocketAddr::from((Ipv4Addr::LOCALHOST, port(())?));
    let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, port(())?));
    let binary = std::fs::canonicalize(&cli.binary).context("build homeport in release first")?;
    let mut child = Command::new(binary)
        .args(["up", "--data"])
        .arg(folder.path())
        .current_dir(folder.path())
        .env("HOMEPORT_RELAY__LISTEN", "127.0.0.1:0")
        .env("HOMEPORT_RELAY__MAX_CONNECTIONS", (cli.connections + cli.links + 200).to_string())
        .env("HOMEPORT_TURN__LISTEN", turn.to_string())
        .env("HOMEPORT_TURN__EXTERNAL_IP", "127.0.0.1")
        .env("HOMEPORT_TURN__USERS", format!("{{{USER}=\"{PASSWORD}\"}}"))
        .env("HOMEPORT_TURN__REALM", REALM)
        // Everybody comes from one address here, which nobody does elsewhere.
        .env("HOMEPORT_TURN__ADDRESS_QUOTA", "0")
        .env("HOMEPORT_TURN__UNAUTHENTICATED_PER_SECOND", "0")
        .env("HOMEPORT_SEED__LISTEN", "127.0.0.1:0")
        .env("HOMEPORT_SEED__ROOM", format!("[{}]", rooms.join(",")))
        .env("HOMEPORT_METRICS__LISTEN", metrics.to_string())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create("target/soak.log")?)
        .spawn()?;
    let lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let process = Process(child);
    let mut url = None;
    for line in lines {
        if let Some(address) = line?.trim().strip_prefix("relay") {
            url = Some(address.trim().to_owned());
            break;
        }
    }
    let url = url.context("homeport did not start")?;
    let load = Arc::new(Load {
        factor: AtomicU32::new(1),
        stop: AtomicBool::new(false),
        relay: Tally::default(),
        turn: Tally::default(),
        seed: Tally::default(),
    });
    let mut tasks = Vec::new();
    for number in 0..cli.connections {
        tasks.push(tokio::spawn(announce(url.clone(), number, Arc::clone(&load))));
    }
    let threads: Vec<_> = (0..cli.allocations)
        .map(|_| {
            let load = Arc::clone(&load);
            std::thread::Builder::new().stack_size(256 << 10).spawn(move || relay_packets(turn, &load))
        })
        .collect::<Result<_, _>>()?;
    for number in 0..cli.links {
        let link = SeedLink::open(&url, &database_of(number)).await?;
        tasks.push(tokio::spawn(stay_linked(url.clone(), link, number, Arc::clone(&load))));
    }
    println!("# Everything at once\n");
    println!(
        "{} relay connections in rooms of ten, {} TURN allocations, {} links with the seed in {databases} databases.\n",
        cli.connections, cli.allocations, cli.links
    );
    println!(
        "| minute | MiB | cores | announces heard | ms p50 / p99 | refused | cut | TURN echoes | ms p50 / p99 | lost | \
         ended | writes heard back | ms p50 / p99 | lost | links ended |"
    );
    println!("| --- |{}", " --- |".repeat(14));
    let mut samples = Vec::new();
    for minute in 1..=cli.minutes {
        samples.push(sample(&process, &load, &minute.to_string()).await?);
    }
    load.factor.store(cli.overload, Ordering::Relaxed);
    sample(&process, &load, &format!("{} times the load", cli.overload)).await?;
    load.factor.store(1, Ordering::Relaxed);
    for name in ["the minute after", "the next"] {
        sample(&process, &load, name).await?;
    }
    println!("\n| memory after the first {WARM_UP_MINUTES} minutes | KiB a minute |\n| --- | --- |");
    println!("| slope | {:+.1} |", slope(&samples));
    println!("\n| counted, with the minute of too much | how many |\n| --- | --- |");
    for line in counted(metrics).await? {
        if let Some((name, count)) = line.rsplit_once(' ') {
            println!("| `{name}` | {count} |");
        }
    }
    load.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread has panicked"))??;
    }
    for task in tasks {
        task.abort();
    }
    Ok(())
}

/// A minute's row. Returns resident KiB at its end.
async fn sample(process: &Process, load: &Load, name: &str) -> anyhow::Result<f64> {
    let before = process.cpu_seconds()?;
    let start = Instant::now();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let cores = (process.cpu_seconds()? - before) / start.elapsed().as_secs_f64();
    let kib = process.resident_kib()?;
    let (relay, turn, seed) = (load.relay.row(), load.turn.row(), load.seed.row());
    println!("| {name} | {:.1} | {cores:.2} | {relay} | {turn} | {seed} |", kib / 1024.0);
    Ok(kib)
}

/// KiB a minute, by least squares, once it is warm.
fn slope(samples: &[f64]) -> f64 {
    let steady = samples.get(WARM_UP_MINUTES..).unwrap_or_default();
    let count = steady.len() as f64;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / count;
    let (x, y) = (mean(&mut (0..steady.len()).map(|minute| minute as f64)), mean(&mut steady.iter().copied()));
    let (mut over, mut under) = (0.0, 0.0);
    for (minute, kib) in steady.iter().enumerate() {
        over += (minute as f64 - x) * (kib - y);
        under += (minute as f64 - x).powi(2);
    }
    over / under
}

/// The counters of what is dropped, refused or fails, that are not zero.
async fn counted(metrics: SocketAddr) -> anyhow::Result<Vec<String>> {
    let text = scrape::metrics(metrics).await?;
    let names = ["_drops_", "_refused", "_disconnects_", "_closed_", "_failures", "_ended_total", "operations_total"];
    let is_told =
        |line: &&str| !line.starts_with('#') && !line.ends_with(" 0") && names.iter().any(|name| line.contains(name));
    Ok(text.lines().filter(is_told).map(str::to_owned).collect())
}

/// Subscribes to a room of ten and announces itself there, for ever; comes again when the relay hangs up.
async fn announce(url: String, number: usize, load: Arc<Load>) {
    let topic = format!("soak-room-{}", number / 10);
    // Spread over the period, as real clients are.
    tokio::time::sleep(ANNOUNCE_PERIOD.mul_f64((number as f64 * 0.618_034).fract())).await;
    while load.goes_on() {
        if converse(&url, &topic, number, &load).await.is_err() {
            load.relay.ended.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
}

async fn converse(url: &str, topic: &str, number: usize, load: &Load) -> anyhow::Result<()> {
    let (mut socket, _) = tokio_tungstenite::connect_async_with_config(url, None, true).await?;
    let filter = serde_json::json!({ "kinds": [KIND], "#x": [topic] });
    socket.send(Message::text(serde_json::json!(["REQ", "s".repeat(64), filter]).to_string())).await?;
    let keys = Keys::generate();
    let mut own: Option<(String, Instant)> = None;
    let mut next = tokio::time::Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next) => {
                let event = EventBuilder::new(Kind::from(KIND), format!(r#"{{"peerId":"{number:020}"}}"#))
                    .tag(Tag::parse(["x", topic])?)
                    .finalize(&keys)?;
                own = Some((event.id.to_hex(), Instant::now()));
                socket.send(Message::text(serde_json::json!(["EVENT", event]).to_string())).await?;
                next = tokio::time::Instant::now() + load.period(ANNOUNCE_PERIOD);
            }
            message = socket.next() => {
                let Message::Text(text) = message.context("the relay hung up")?? else { continue };
                if text.starts_with(r#"["OK""#) && text.contains(",false,") {
                    load.relay.lost.fetch_add(1, Ordering::Relaxed);
                } else if let Some((id, sent)) = &own
                    && text.starts_with(r#"["EVENT""#)
                    && text.contains(id.as_str())
                {
                    load.relay.took(*sent);
                    own = None;
                }
            }
        }
    }
}

/// Sends packets through an allocation to a peer and back, for as long as the load goes on.
fn relay_packets(server: SocketAddr, load: &Load) -> anyhow::Result<()> {
    const REFRESH: Duration = Duration::from_secs(240);
    const PATIENCE: Duration = Duration::from_secs(1);
    let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    peer.set_read_timeout(Some(PATIENCE))?;
    let data = channel_data(200);
    let mut buffer = [0; 2_048];
    'anew: while load.goes_on() {
        let mut client = Client::allocate(Transport::udp(server)?)?;
        client.bind(peer.local_addr()?)?;
        let mut fresh = Instant::now();
        while load.goes_on() {
            if fresh.elapsed() > REFRESH {
                fresh = Instant::now();
                if client.bind(peer.local_addr()?).and_then(|()| client.refresh()).is_err() {
                    load.turn.ended.fetch_add(1, Ordering::Relaxed);
                    continue 'anew;
                }
            }
            let sent = Instant::now();
            client.transport.write(&data)?;
            let there = peer.recv(&mut buffer).is_ok();
            let back = there && {
                peer.send_to(&data[CHANNEL_HEAD..], client.relayed)?;
                client.transport.read().is_ok()
            };
            if back {
                load.turn.took(sent);
            } else {
                load.turn.lost.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(load.period(PACKET_PERIOD).saturating_sub(sent.elapsed()));
        }
    }
    Ok(())
}

fn database_of(number: usize) -> String {
    format!("soak-{}", number / 10)
}

/// Writes on a link, and makes it anew when it has ended, as pages do.
async fn stay_linked(url: String, mut link: SeedLink, number: usize, load: Arc<Load>) {
    let mut count = 0;
    loop {
        write(&mut link, number, &mut count, &load).await;
        load.seed.ended.fetch_add(1, Ordering::Relaxed);
        link = loop {
            match SeedLink::open(&url, &database_of(number)).await {
                Ok(link) => break link,
                Err(_) => tokio::time::sleep(Duration::from_secs(2)).await,
            }
        };
    }
}

/// Writes to a hundred nodes of its own, over and over, and hears what the seed sends on, until the link ends.
async fn write(link: &mut SeedLink, number: usize, count: &mut u64, load: &Load) {
    let mut sent: Option<(String, Instant)> = None;
    let mut next = tokio::time::Instant::now() + WRITE_PERIOD.mul_f64((number as f64 * 0.618_034).fract());
    loop {
        let outcome: anyhow::Result<()> = tokio::select! {
            () = tokio::time::sleep_until(next) => {
                *count += 1;
                next = tokio::time::Instant::now() + load.period(WRITE_PERIOD);
                let marker = format!(r#""count":{count}}}"#);
                let text = format!(
                    r#"[{{"type":"upsert","id":"{number}-{}","value":{{"by":{number},{marker},"timestamp":{{"physical":{},"logical":{count}}}}}]"#,
                    *count % 100, wall_ms()
                );
                if let Some((_, at)) = &sent && at.elapsed() > Duration::from_secs(10) {
                    load.seed.lost.fetch_add(1, Ordering::Relaxed);
                    sent = None;
                }
                sent.get_or_insert((format!(r#""by":{number},{marker}"#), Instant::now()));
                link.send(&text).await
            }
            message = link.message() => match message {
                Some(text) => {
                    if let Some((_, at)) = sent.take_if(|(marker, _)| text.contains(marker.as_str())) {
                        load.seed.took(at);
                    }
                    Ok(())
                }
                None => Err(anyhow::anyhow!("the link closed")),
            },
        };
        if outcome.is_err() {
            return;
        }
    }
}
