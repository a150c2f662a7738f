//! Relays side by side: how much later an event arrives that crosses from one to another, and how many messages that takes.
//!
//! `cargo run --release --package bench --bin bench-cluster` prints a Markdown report; build `homeport` in release first, and
//! have `nats-server` installed.

#[allow(dead_code, reason = "only one's own relays are started")]
mod contender;
#[allow(dead_code, reason = "only one shape is run")]
mod load;
#[path = "../../relay/tests/support/nats.rs"]
#[allow(dead_code, clippy::unwrap_used, clippy::expect_used, reason = "of the relay's own tests")]
mod nats;
#[allow(dead_code, reason = "one's own relays print where they are")]
mod process;
mod scrape;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use contender::{Contender, Relay};
use load::{Outcome, Shape};
use nats::Nats;

/// Measures relays that share their clients, each beside a server of NATS, and prints a Markdown report.
#[derive(Debug, Parser)]
struct Cli {
    /// The homeport binary to measure
    #[arg(long, default_value = "target/release/homeport")]
    binary: String,
    /// Clients, in rooms of ten, each with an announce every 2.5 s
    #[arg(long, default_value_t = 500)]
    connections: usize,
    /// Announces of each client
    #[arg(long, default_value_t = 8)]
    events: usize,
}

/// How long relays may take to ask each other for what their clients have asked for.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> anyhow::Result<()> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(Cli::parse()))
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    println!("# Relays side by side\n");
    println!(
        "| relays | deliveries | lost | p50 ms | p99 ms | cores of relays | messages between relays per delivery | MiB of each relay |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for count in 1..=3 {
        measure(&cli, count).await?;
    }
    Ok(())
}

async fn measure(cli: &Cli, count: usize) -> anyhow::Result<()> {
    let contender = Contender::homeport(&cli.binary);
    let mut servers: Vec<Nats> = Vec::new();
    let (mut relays, mut metrics) = (Vec::new(), Vec::new());
    for number in 0..count {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        metrics.push(listen);
        let mut settings = vec![("HOMEPORT_METRICS__LISTEN".to_owned(), listen.to_string())];
        // A single relay is one without a cluster.
        if count > 1 {
            servers.push(Nats::start(&servers.iter().collect::<Vec<_>>()));
            settings.push(("HOMEPORT_CLUSTER__NATS".to_owned(), format!("nats://{}", servers[number].address())));
            settings.push(("HOMEPORT_CLUSTER__NAME".to_owned(), format!("bench-{number}")));
        }
        let settings: Vec<(&str, &str)> =
            settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        relays.push(Relay::start(&contender, &settings)?);
    }
    let shape = Shape {
        connections: cli.connections,
        room: 10,
        events: cli.events,
        every: Some(Duration::from_millis(2_500)),
        padding: 0,
    };
    let urls: Vec<&str> = relays.iter().map(|relay| relay.url.as_str()).collect();
    let rooms = cli.connections.div_ceil(shape.room);
    let mut before = 0.0;
    let ready = async {
        if count > 1 {
            for listen in &metrics {
                until_asked(*listen, rooms).await?;
            }
            // Servers of NATS tell each other what they are asked for, and nothing says when they have.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        before = cpu(&relays)?;
        anyhow::Ok(())
    };
    let outcome = load::run_when(&urls, shape, ready).await?;
    let Outcome { seconds, published, delivered, p50_ms, p99_ms, .. } = outcome;
    let cores = (cpu(&relays)? - before) / seconds;
    let lost = published * u64::try_from(shape.room)? - delivered;
    let mut crossed = 0.0;
    let mut memory = 0.0;
    for (listen, relay) in metrics.iter().zip(&relays) {
        let text = scrape::metrics(*listen).await?;
        crossed += value(&text, r#"homeport_relay_cluster_messages_total{direction="in"}"#);
        memory += relay.process.resident_kib()? / 1_024.0;
    }
    println!(
        "| {count} | {delivered} | {lost} | {p50_ms:.2} | {p99_ms:.2} | {cores:.2} | {:.3} | {:.0} |",
        crossed / delivered as f64,
        memory / count as f64
    );
    Ok(())
}

fn cpu(relays: &[Relay]) -> anyhow::Result<f64> {
    relays.iter().map(|relay| relay.process.cpu_seconds()).sum()
}

/// Waits until a relay asks for as many subjects as there are rooms.
async fn until_asked(listen: SocketAddr, rooms: usize) -> anyhow::Result<()> {
    let start = Instant::now();
    while value(&scrape::metrics(listen).await?, "homeport_relay_cluster_subjects") < rooms as f64 {
        anyhow::ensure!(start.elapsed() < PATIENCE, "a relay does not ask for what its clients want");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port")?.local_addr()?.port())
}
