//! Peers that mean harm, beside peers that only want to write.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use genosdb::{CellIndex, ChannelName, Content, MemoryGraph, Message, PeerId, Room};
use seed_peer::{Bounds, Bridge, CellsConfig, Config, RoomConfig, Server};

use crate::client::{Client, new_id, wall_ms};
use crate::house::{config, count, counted, join, relay, url};

const OPERATIONS: &str = "homeport_seed_operations_total";

/// Two peers that are linked with the seed alone, so that all between them goes through it.
struct Calm {
    writer: Client,
    reader: Client,
    written: usize,
}

impl Calm {
    async fn join(url: &str) -> Self {
        let (writer, reader) = (calm_peer(url).await, calm_peer(url).await);
        Self { writer, reader, written: 0 }
    }

    /// What the one writes reaches the other.
    async fn go_on(&mut self, after: &str) {
        self.written += 1;
        let id = format!("calm-{}", self.written);
        self.writer.write(&format!("put {id} \"after {after}\""));
        self.reader.until(&format!("a write after {after}"), |view| view.graph.get(&id).is_some()).await;
    }
}

async fn calm_peer(url: &str) -> Client {
    let mut peer = join(url);
    peer.keep_to_the_seed();
    peer.until("a link", |view| view.linked.len() == 1).await;
    peer
}

/// A frame of the graph's channel, which ends its message or does not.
fn frame(nonce: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"syncGraph\0\0\0".to_vec();
    bytes.extend_from_slice(&[nonce, flags, 0]);
    bytes.extend_from_slice(payload);
    bytes
}

fn send_operations(peer: &Client, text: &str) {
    send_message(peer, &Message::new(ChannelName::SYNC_GRAPH, Content::Json(text.to_owned())));
}

fn send_message(peer: &Client, message: &Message) {
    for index in 0..message.frames() {
        peer.send_raw(&message.frame(0, index));
    }
}

/// KiB of this process, seed included.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_peer_costs_the_others_nothing() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let room = RoomConfig::named("my-app");
    let bounds = Bounds { value_bytes: 100_000, edges: 10_000, ..Bounds::default() };
    let seed = Server::bind(seed_peer::Config { bounds, ..config(&[&url], data.path(), vec![room]) }).unwrap();
    let mut calm = Calm::join(&url).await;
    calm.go_on("nothing").await;
    let before = resident_kib();

    // A bomb: a gigabyte of blanks in a megabyte.
    let mut bomb = ZlibEncoder::new(Vec::new(), Compression::fast());
    for _ in 0..1_024 {
        bomb.write_all(&vec![b' '; 1 << 20]).unwrap();
    }
    let bomb = bomb.finish().unwrap();
    let rude = calm_peer(&url).await;
    let chunks: Vec<&[u8]> = bomb.chunks(16_000).collect();
    for (index, chunk) in chunks.iter().enumerate() {
        let last = u8::from(index + 1 == chunks.len());
        rude.send_raw(&frame(0, 8 | 16 | last, chunk));
    }
    counted(&seed, "homeport_seed_disconnects_total", "misbehaved", 1.0).await;
    rude.vanish();
    calm.go_on("a bomb").await;

    // Messages that never end, until the seed has had enough.
    let rude = calm_peer(&url).await;
    for nonce in 0..64 {
        rude.send_raw(&frame(nonce, 8, &[b'x'; 16_000]));
    }
    counted(&seed, "homeport_seed_disconnects_total", "misbehaved", 2.0).await;
    rude.vanish();
    calm.go_on("unfinished messages").await;

    // Names that mean something to JavaScript, and times at the ends of the range.
    let rude = calm_peer(&url).await;
    let now = wall_ms();
    let ends = [0, 9_007_199_254_740_991, 18_446_744_073_709_551_615_u64];
    let mut operations: Vec<String> = ["__proto__", "constructor", "toString", "hasOwnProperty"]
        .iter()
        .map(|id| {
            format!(
                r#"{{"type":"upsert","id":"{id}","value":{{"__proto__":{{"polluted":true}}}},"timestamp":{{"physical":{now},"logical":1}}}}"#
            )
        })
        .collect();
    for (index, end) in ends.into_iter().enumerate() {
        operations.push(format!(
            r#"{{"type":"upsert","id":"end-{index}","value":1,"timestamp":{{"physical":{end},"logical":{end}}}}}"#
        ));
    }
    operations.push(r#"{"type":"upsert","id":"negative","value":1,"timestamp":{"physical":-1,"logical":0.5}}"#.into());
    send_operations(&rude, &format!("[{}]", operations.join(",")));
    calm.reader.until("a node called __proto__", |view| view.graph.get("__proto__").is_some()).await;
    let view = calm.reader.view();
    let value = view.graph.get("__proto__").unwrap().value.as_ref().unwrap().to_string();
    assert_eq!(value, r#"{"__proto__":{"polluted":true}}"#);
    assert!(
        view.graph.latest().unwrap().physical <= wall_ms() + genosdb::clock::MAX_DRIFT_MS,
        "no clock is carried away"
    );
    calm.go_on("times at the ends").await;

    // A million edges on one node.
    let edges: Vec<String> = (0..1_000_000).map(|edge| format!("\"{edge}\"")).collect();
    send_operations(
        &rude,
        &format!(
            r#"[{{"type":"fullStateSync","graphData":{{"hub":{{"id":"hub","value":1,"edges":[{}],"timestamp":{{"physical":{now},"logical":1}}}}}},"removals":[],"timestamp":null}}]"#,
            edges.join(",")
        ),
    );
    counted(&seed, OPERATIONS, "too_large", 1.0).await;
    calm.go_on("a million edges").await;

    // As many operations as fit.
    for round in 0..40 {
        let flood: Vec<String> = (0..1_000)
            .map(|number| {
                format!(
                    r#"{{"type":"upsert","id":"flood","value":{number},"timestamp":{{"physical":{now},"logical":{}}}}}"#,
                    2 + round * 1_000 + number
                )
            })
            .collect();
        send_operations(&rude, &format!("[{}]", flood.join(",")));
    }
    counted(&seed, OPERATIONS, "too_fast", 20_000.0).await;
    calm.go_on("a flood").await;
    let grown = resident_kib().saturating_sub(before) / 1024;
    println!("after all of it the process, peers included, is {grown} MiB larger");
    assert!(grown < 700, "{grown} MiB");

    for peer in [calm.writer, calm.reader, rude] {
        peer.vanish();
    }
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_passes_on_too_much_in_cells_is_slowed_down_and_whom_it_names_is_not() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let cells = CellsConfig { cell_size: 4, bridge: Bridge::Every };
    let room = RoomConfig { cells: Some(cells), ..RoomConfig::named("my-app") };
    let bound = Config { operations_per_second: 10, ..config(&[&url], data.path(), vec![room]) };
    let seed = Server::bind(bound).unwrap();
    let join = |id| Client::join_cells(&url, &Room::graph_sync("my-app"), id, MemoryGraph::default(), 4);
    let victim_id = new_id();
    let (mut victim, mut rude) = (join(victim_id), join(new_id()));
    for peer in [&mut victim, &mut rude] {
        peer.until("the other and the seed", |view| view.linked.len() == 2).await;
    }

    // In the name of nobody, and of somebody who is there.
    let origins: [PeerId; 4] = [new_id(), new_id(), new_id(), victim_id];
    for (round, origin) in origins.into_iter().enumerate() {
        let flood: Vec<String> = (0..1_000)
            .map(|number| {
                let (id, now) = (round * 1_000 + number, wall_ms());
                format!(
                    r#"{{"type":"upsert","id":"flood-{id}","value":1,"timestamp":{{"physical":{now},"logical":{id}}}}}"#
                )
            })
            .collect();
        let text = format!(
            r#"{{"t":"msg","id":"{origin}:x:1","ttl":5,"data":{{"_ch":"syncGraph","_d":[{}]}},"origin":"{origin}","originCell":"cell-0"}}"#,
            flood.join(",")
        );
        send_message(&rude, &Message::new(CellIndex(0).channel(), Content::Text(text)));
    }
    counted(&seed, OPERATIONS, "too_fast", 2_500.0).await;
    // Each is taken or left out.
    while count(&seed, OPERATIONS, "applied") + count(&seed, OPERATIONS, "too_fast") < 4_000.0 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let left_out = count(&seed, OPERATIONS, "too_fast");

    // Its own hundred at once are all there still.
    let taken = count(&seed, OPERATIONS, "applied");
    let words: Vec<String> = (0..100).map(|number| format!("put mine-{number} 1")).collect();
    victim.write(&words.join("\n"));
    counted(&seed, OPERATIONS, "applied", taken + 100.0).await;
    assert_eq!(count(&seed, OPERATIONS, "too_fast").to_bits(), left_out.to_bits());
    for peer in [victim, rude] {
        peer.vanish();
    }
    seed.shutdown().await;
    relay.shutdown().await;
}
