//! Measures what the archive's word costs: signatures made and checked, history replayed, backups made and restored.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use genosdb::security::Attested;
use genosdb::signature::Identity;
use genosdb::{Json, JsonString, Operation};
use seed_peer::{
    BackupTarget, Backups, Config, Edit, History, Kind, Moment, RelayKey, RoomConfig, Security, Server, diff,
    restoration,
};
use tempfile::TempDir;

/// The key of a well-known mnemonic: nobody's.
const KEY: &str = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80";
/// The room that everything happens in.
const ROOM: &str = "bench";

#[derive(Debug, Parser)]
#[command(about = "Measures signatures, history and backups of the archive")]
struct Args {
    /// Operations in the archive
    #[arg(long, default_value_t = 1_000_000)]
    operations: usize,
    /// Different nodes that they write
    #[arg(long, default_value_t = 200_000)]
    nodes: usize,
    /// Seconds of making and checking signatures
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

fn post(index: usize) -> String {
    format!(r#"{{"author":"0x{index:040x}","text":"{index:x>100}","likes":{},"at":{index}.5}}"#, index % 97)
}

fn upsert(index: usize) -> String {
    format!(
        r#"{{"type":"upsert","id":"post:{index}","value":{},"timestamp":{{"physical":1795337700880,"logical":{index}}}}}"#,
        post(index)
    )
}

/// How often something is done in a second, on one thread.
fn rate(seconds: u64, mut work: impl FnMut(usize)) -> f64 {
    let (start, mut done) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..100 {
            work(done);
            done += 1;
        }
    }
    done as f64 / start.elapsed().as_secs_f64()
}

fn row(what: &str, measured: impl std::fmt::Display) {
    println!("| {what} | {measured} |");
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    println!("| what | measured |\n| --- | --- |");
    let identity = Identity::parse(KEY)?;
    row(
        "signatures made, one core",
        format!(
            "{:.0} a second",
            rate(args.seconds, |index| {
                let _ = identity.sign(&upsert(index));
            })
        ),
    );
    let signed: Vec<String> = (0..1_000).map(|index| identity.sign(&upsert(index))).collect::<Result<_, _>>()?;
    row(
        "signatures checked, one core",
        format!(
            "{:.0} a second",
            rate(args.seconds, |index| {
                let text = &signed[index % signed.len()];
                if let Ok(operation) = Operation::parse(text, &mut 0) {
                    assert!(Attested::check(operation, text).author.is_ok());
                }
            })
        ),
    );

    let data = TempDir::new()?;
    let filled = fill(data.path(), 0..args.operations, &args, None).await?;
    row("operations that the seed writes itself, unsigned", format!("{filled:.0} a second"));
    let history = |data: &Path| History::open(data, ROOM);
    let start = Instant::now();
    let middle = {
        let mut received = 0;
        let half = u64::try_from(args.operations / 2)?;
        history(data.path())?.entries(half, 1, |entry| {
            received = entry.received_ms;
            true
        })?;
        Moment::Received(received)
    };
    let then = history(data.path())?.at(middle, |_| ())?;
    let took = start.elapsed();
    row(
        "the room as it was half of its operations ago",
        format!("{:.1} s, {} nodes", took.as_secs_f64(), then.nodes()),
    );
    let now = history(data.path())?.at(Moment::Now, |_| ())?;
    let start = Instant::now();
    let mut differences = 0u64;
    diff(&then, &now, |_| differences += 1)?;
    row("what differs since", format!("{:.1} s, {differences} nodes", start.elapsed().as_secs_f64()));
    let start = Instant::now();
    let plan = restoration(&now, &then)?;
    row("what would bring it back", format!("{:.1} s, {} operations", start.elapsed().as_secs_f64(), plan.edits.len()));
    drop((then, now, plan));

    let place = TempDir::new()?;
    let backups = Backups::at(&BackupTarget::Folder(place.path().to_owned()))?;
    let back_up = async |kind| -> anyhow::Result<String> {
        let start = Instant::now();
        let report = backups.make(data.path(), kind, wall_ms()).await?;
        let took = start.elapsed().as_secs_f64();
        Ok(format!("{took:.2} s, {:.2} MB written", report.written_bytes as f64 / 1e6))
    };
    row("a full backup", back_up(Kind::Full).await?);
    let more = args.operations / 100;
    fill(data.path(), args.operations..args.operations + more, &args, None).await?;
    row(&format!("an incremental one, {more} operations later"), back_up(Kind::Incremental).await?);
    let empty = TempDir::new()?;
    let start = Instant::now();
    let restored = backups.restore(None, empty.path(), |_, _| ()).await?;
    let took = start.elapsed().as_secs_f64();
    row("restored onto an empty machine", format!("{} operations in {took:.1} s", restored.operations));
    let peak = peak_memory()?;
    row("memory of all that, at most", format!("{peak} MiB"));

    // The same with an identity: each operation is signed, checked against the room's rules, and signed as it is told.
    let signed = TempDir::new()?;
    let filled = fill(signed.path(), 0..args.operations / 5, &args, Some(Arc::new(identity))).await?;
    row("operations that the seed writes itself, signed, in a room with super admins", format!("{filled:.0} a second"));
    let start = Instant::now();
    let verification = history(signed.path())?.verify(|_| ())?;
    let took = start.elapsed().as_secs_f64();
    row("homeport rooms verify", format!("{} operations in {took:.1} s", verification.signed));
    Ok(())
}

/// Writes operations into an archive through a seed; says how many a second.
async fn fill(
    data: &Path,
    operations: Range<usize>,
    args: &Args,
    identity: Option<Arc<Identity>>,
) -> anyhow::Result<f64> {
    let count = operations.len() as f64;
    let security = Security::of(identity.iter().map(|identity| identity.address()));
    let server = Server::bind(Config {
        listen: "127.0.0.1:0".parse()?,
        external: None,
        data: data.to_owned(),
        // Nobody is to be met.
        relays: vec!["ws://127.0.0.1:9/".into()],
        relay_key: RelayKey::generate(),
        identity,
        rooms: vec![RoomConfig { security, ..RoomConfig::named(ROOM) }],
        bounds: seed_peer::Bounds::default(),
        keep: None,
        message_bytes: 64 << 20,
        operations_per_second: 0,
        pass_on: true,
        max_links: 16,
        check_room: None,
        backup: None,
        shared: None,
    })?;
    let start = Instant::now();
    for batch in operations.collect::<Vec<_>>().chunks(1_000) {
        let edit = |index: &usize| -> anyhow::Result<Edit> {
            let id = JsonString::new(&format!("post:{}", index % args.nodes));
            Ok(Edit::Upsert { id, value: Json::parse(&post(*index))? })
        };
        let edits = batch.iter().map(edit).collect::<Result<_, _>>()?;
        server.rooms().edit(ROOM, edits).await.context("writing")?;
    }
    let rate = count / start.elapsed().as_secs_f64();
    server.shutdown().await;
    Ok(rate)
}

fn wall_ms() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// The most memory that this process has had, in MiB.
fn peak_memory() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? / 1_024)
}
