//! Measures the relay: latency, saturation, session descriptions, idle connections, and one room that grows.
//!
//! `cargo run --release --package bench --bin bench-relay` prints a Markdown report; build `homeport` in release first.

mod contender;
mod load;
mod process;

use std::time::Duration;

use clap::Parser;
use contender::{Contender, Relay};
use load::{Outcome, Shape};

/// Measures the relay, and prints a Markdown report.
#[derive(Debug, Parser)]
struct Cli {
    /// The homeport binary to measure
    #[arg(long, default_value = "target/release/homeport")]
    binary: String,
    /// Another relay to run beside it: `name=command`, where `{port}` stands for the port to listen on
    #[arg(long = "peer")]
    peers: Vec<Contender>,
    /// Runs of each shape, of which the medians are shown
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Run only shapes whose name contains this
    #[arg(long, default_value = "")]
    only: String,
}

/// A run and its cost to the relay.
#[derive(Debug, Clone, Copy)]
struct Measured {
    outcome: Outcome,
    cpu_seconds: f64,
}

const ANNOUNCE_PERIOD: Duration = Duration::from_millis(2_500);
const BUDGET: &str = "HOMEPORT_RELAY__ANNOUNCE_BUDGET";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let descriptors = rlimit::increase_nofile_limit(u64::MAX)?;
    println!("# The relay, measured\n");
    println!("Medians of {}; relay and load generator share the machine's cores.\n", cli.runs);

    println!("| shape | relay | deliveries | per s | CPU s per 100k deliveries | p50 ms | p99 ms |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let shapes = [
        (
            "latency: 500 clients in rooms of 10, an announce every 2.5 s",
            Shape { connections: 500, room: 10, events: 8, every: Some(ANNOUNCE_PERIOD), padding: 0 },
        ),
        (
            "saturation: 200 clients in rooms of 10, 120 B",
            Shape { connections: 200, room: 10, events: 100, every: None, padding: 0 },
        ),
        (
            "descriptions: 200 clients in pairs, 2 KB",
            Shape { connections: 200, room: 2, events: 100, every: None, padding: 2_000 },
        ),
        (
            "crowd: 10,000 clients in rooms of 10, an announce every 2.5 s",
            Shape { connections: 10_000, room: 10, events: 6, every: Some(ANNOUNCE_PERIOD), padding: 0 },
        ),
    ];
    let homeport = Contender::homeport(&cli.binary);
    let contenders: Vec<&Contender> = std::iter::once(&homeport).chain(&cli.peers).collect();
    for (name, shape) in shapes {
        if name.contains(&cli.only) {
            for contender in &contenders {
                row(name, &cli, contender, shape).await?;
            }
        }
    }
    if "flood".contains(&cli.only) {
        println!("\n| a calm room of 10 beside one client that floods | relay | p50 ms | p99 ms |");
        println!("| --- | --- | --- | --- |");
        for contender in &contenders {
            for flooded in [false, true] {
                let relay = Relay::start(contender, &[])?;
                let (calm, refused) = load::beside_a_flood(&relay.url, flooded).await?;
                let how = if flooded { format!("20,000 events, {refused} refused") } else { "no flood".to_owned() };
                println!("| {how} | {} | {:.2} | {:.2} |", contender.name, calm.p50_ms, calm.p99_ms);
            }
        }
    }

    println!("\n| one room of | announces passed on | deliveries | clients cut off | cores | p50 ms | p99 ms |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for peers in [100, 300, 1_000, 3_000] {
        for (how, budget) in [("within the budget", "50"), ("all of them", "0")] {
            let name = format!("room of {peers}, {how}");
            if name.contains(&cli.only) {
                let shape =
                    Shape { connections: peers, room: peers, events: 8, every: Some(ANNOUNCE_PERIOD), padding: 0 };
                let measured = median(&cli, &homeport, shape, &[(BUDGET, budget)]).await?;
                let Outcome { seconds, delivered, cut, p50_ms, p99_ms, .. } = measured.outcome;
                let cores = measured.cpu_seconds / seconds;
                println!("| {peers} | {how} | {delivered} | {cut} | {cores:.2} | {p50_ms:.2} | {p99_ms:.2} |");
            }
        }
    }

    println!("\n| idle connections | relay | KiB each |");
    println!("| --- | --- | --- |");
    for connections in [2_000, 10_000] {
        // The generator's own end of each connection is a descriptor as well.
        if format!("idle {connections}").contains(&cli.only) && descriptors > connections + 100 {
            for contender in &contenders {
                match idle(contender, connections).await {
                    Ok(kib) => println!("| {connections} | {} | {kib:.1} |", contender.name),
                    Err(error) => println!("| {connections} | {} | ({error:#}) |", contender.name),
                }
            }
        }
    }
    Ok(())
}

async fn row(name: &str, cli: &Cli, contender: &Contender, shape: Shape) -> anyhow::Result<()> {
    let Contender { name: relay, .. } = contender;
    let measured = match median(cli, contender, shape, &[]).await {
        Ok(measured) => measured,
        // A contender that falls over under a shape is a result as well; a Homeport that does is a bug.
        Err(error) if !contender.is_homeport => {
            println!("| {name} | {relay} | ({error:#}) | | | | |");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let Measured { outcome, cpu_seconds, .. } = measured;
    let Outcome { seconds, published, delivered, p50_ms, p99_ms, .. } = outcome;
    let expected = published * u64::try_from(shape.room)?;
    let lost = if delivered == expected { String::new() } else { format!(" ({} lost)", expected - delivered) };
    let per_second = delivered as f64 / seconds;
    let cpu = cpu_seconds / delivered as f64 * 100_000.0;
    println!("| {name} | {relay} | {delivered}{lost} | {per_second:.0} | {cpu:.2} | {p50_ms:.2} | {p99_ms:.2} |");
    Ok(())
}

/// The run whose CPU time is the median of all runs.
async fn median(cli: &Cli, contender: &Contender, shape: Shape, settings: &[(&str, &str)]) -> anyhow::Result<Measured> {
    let mut runs = Vec::new();
    for _ in 0..cli.runs {
        let relay = Relay::start(contender, settings)?;
        let mut before = Ok(0.0);
        let outcome = load::run(&relay.url, shape, || before = relay.process.cpu_seconds()).await?;
        let cpu_seconds = relay.process.cpu_seconds()? - before?;
        runs.push(Measured { outcome, cpu_seconds });
    }
    runs.sort_by(|one, other| one.cpu_seconds.total_cmp(&other.cpu_seconds));
    Ok(runs[runs.len() / 2])
}

/// KiB of resident memory that one idle, subscribed connection costs.
async fn idle(contender: &Contender, connections: u64) -> anyhow::Result<f64> {
    let relay = Relay::start(contender, &[])?;
    let before = relay.process.resident_kib()?;
    let mut sockets = Vec::new();
    for number in 0..connections {
        sockets.push(load::subscribe(&relay.url, &format!("idle-{}", number / 10)).await?);
    }
    let after = relay.process.resident_kib()?;
    drop(sockets);
    Ok((after - before) / connections as f64)
}
