//! Histories against a naive replay, and restorations against what they restore.

use std::path::Path;

use genosdb::graph::Outcome;
use genosdb::operation::{Batch, FullStateSync};
use genosdb::query::Query;
use genosdb::{Clock, Hlc, Json, JsonString, MemoryGraph, Node, Operation};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rusqlite::params;

use super::*;
use crate::archive::{Edit, RoomGraph, RoomState, schema};

/// Where histories in these tests begin, in ms.
const START_MS: u64 = 1_795_000_000_000;

/// An archive that is written without a seed, as the seed writes it.
pub(crate) struct Written {
    pub(crate) file: schema::ArchiveFile,
    pub(crate) state: RoomState,
    /// Every log entry: when it came, its author's timestamp, and the graph behind it.
    pub(crate) moments: Vec<(u64, Hlc, MemoryGraph)>,
    pub(crate) graph: MemoryGraph,
}

impl Written {
    pub(crate) fn new(folder: &Path) -> Self {
        let file = schema::open(folder).unwrap();
        file.connection
            .execute("INSERT INTO room (name, peer_id, nodes, seq) VALUES ('my-app', 'z', 0, 0)", [])
            .unwrap();
        let state = RoomState { id: 1, nodes: 0, bytes: 0, seq: 0, latest: None };
        Self { file, state, moments: Vec::new(), graph: MemoryGraph::default() }
    }

    fn log(&mut self, received: u64, kind: i64, text: &str, timestamp: Hlc) {
        self.state.seq += 1;
        self.state.see(timestamp);
        self.file
            .connection
            .execute(
                "INSERT INTO log (room, seq, received, kind, operation) VALUES (1, ?, ?, ?, ?)",
                params![signed(self.state.seq), signed(received), kind, text],
            )
            .unwrap();
        self.moments.push((received, timestamp, self.graph.clone()));
    }

    pub(crate) fn apply(&mut self, operation: &Operation, received: u64) {
        let expected = self.graph.apply(operation, received);
        let mut graph = RoomGraph { connection: &self.file.connection, state: &mut self.state };
        assert_eq!(genosdb::graph::apply(&mut graph, operation, received).unwrap(), expected);
        if expected == Outcome::Applied {
            self.log(received, 0, &operation.to_string(), crate::archive::timestamp_of(operation));
        }
    }

    fn merge(&mut self, full: &FullStateSync, received: u64) {
        let before = self.graph.clone();
        let merged = self.graph.merge(full, received);
        let mut graph = RoomGraph { connection: &self.file.connection, state: &mut self.state };
        genosdb::graph::merge(&mut graph, full, received, |_, _| Ok(true)).unwrap();
        // Moments inside a merge are not told apart here: only the last one is remembered with its graph.
        let after = std::mem::replace(&mut self.graph, before);
        for removal in &merged.removals {
            let text = format!(
                r#"{{"type":"remove","id":{},"timestamp":{{"physical":{},"logical":{}}}}}"#,
                removal.id, removal.timestamp.physical, removal.timestamp.logical
            );
            self.log(received, 0, &text, removal.timestamp);
        }
        for node in &merged.nodes {
            let mut text = String::new();
            node.print(&mut text);
            self.log(received, 1, &text, node.timestamp);
        }
        self.graph = after;
        if let Some(last) = self.moments.last_mut() {
            last.2 = self.graph.clone();
        }
    }

    pub(crate) fn save(&self) {
        let RoomState { nodes, bytes, seq, latest, .. } = self.state;
        self.file
            .connection
            .execute(
                "UPDATE room SET nodes = ?, bytes = ?, seq = ?, physical = ?, logical = ? WHERE id = 1",
                params![
                    signed(nodes),
                    signed(bytes),
                    signed(seq),
                    latest.map(|latest| signed(latest.physical)),
                    latest.map(|latest| signed(latest.logical))
                ],
            )
            .unwrap();
    }
}

pub(crate) fn random_operation(random: &mut StdRng, clock: &mut Clock, wall_ms: u64) -> Operation {
    let (one, other) = (random.random_range(0..8), random.random_range(0..8));
    // Some authors' clocks are behind.
    let skew = if random.random_bool(0.2) { random.random_range(0..5_000) } else { 0 };
    let Hlc { physical, logical } = clock.now(wall_ms);
    let timestamp = format!(r#"{{"physical":{},"logical":{logical}}}"#, physical - skew);
    let text = match random.random_range(0..10) {
        0..5 => format!(
            r#"{{"type":"upsert","id":"n{one}","value":{{"i":{}}},"timestamp":{timestamp}}}"#,
            random.random_range(0..4)
        ),
        5..7 => format!(r#"{{"type":"remove","id":"n{one}","timestamp":{timestamp}}}"#),
        _ => format!(r#"{{"type":"link","sourceId":"n{one}","targetId":"n{other}","timestamp":{timestamp}}}"#),
    };
    Operation::parse(&text, &mut 0).unwrap()
}

/// A history of about `length` operations, with a peer's full state in it now and then.
pub(crate) fn random_history(folder: &Path, random: &mut StdRng, length: usize) -> Written {
    let mut written = Written::new(folder);
    let (mut clock, mut wall_ms) = (Clock::default(), START_MS);
    let mut peer = MemoryGraph::default();
    written.file.connection.execute_batch("BEGIN").unwrap();
    for _ in 0..length {
        wall_ms += random.random_range(1..2_000);
        let operation = random_operation(random, &mut clock, wall_ms);
        if random.random_bool(0.1) {
            peer.apply(&operation, wall_ms);
        } else if random.random_bool(0.05) {
            peer.apply(&operation, wall_ms);
            written.merge(&peer.full_state(), wall_ms);
        } else {
            written.apply(&operation, wall_ms);
        }
    }
    written.save();
    written.file.connection.execute_batch("COMMIT").unwrap();
    written
}

fn history(folder: &Path) -> History {
    History::open(folder, "my-app").unwrap()
}

pub(crate) fn at(folder: &Path, moment: Moment) -> PastRoom {
    history(folder).at(moment, |_| ()).unwrap()
}

/// All of a room, as peers would hold it.
pub(crate) fn all(room: &PastRoom) -> (Vec<Node>, Vec<genosdb::Removal>) {
    let (mut nodes, mut removals) = (Vec::new(), Vec::new());
    room.each_node(|node| {
        nodes.push(node);
        true
    })
    .unwrap();
    room.each_removal(|removal| removals.push(removal)).unwrap();
    assert_eq!(room.nodes(), u64::try_from(nodes.len()).unwrap());
    assert_eq!(room.removals().unwrap(), u64::try_from(removals.len()).unwrap());
    (nodes, removals)
}

fn expected(graph: &MemoryGraph) -> (Vec<Node>, Vec<genosdb::Removal>) {
    let FullStateSync { nodes, removals, .. } = graph.full_state();
    (nodes, removals)
}

/// What every node says, its edges to others that are there in no order, and no timestamps.
fn content(room: &PastRoom) -> Vec<(JsonString, Option<Json>, Vec<JsonString>)> {
    let mut content = Vec::new();
    room.each_node(|mut node| {
        node.edges.retain(|edge| room.node(edge).unwrap().is_some());
        node.edges.sort_unstable();
        content.push((node.id, node.value, node.edges));
        true
    })
    .unwrap();
    content
}

#[test]
fn a_thousand_random_histories_are_what_a_naive_replay_makes_of_them() {
    for seed in 0..1_000 {
        let random = &mut StdRng::seed_from_u64(seed);
        let folder = tempfile::tempdir().unwrap();
        let length = random.random_range(1..60);
        let written = random_history(folder.path(), random, length);
        assert_eq!(all(&at(folder.path(), Moment::Now)), expected(&written.graph), "seed {seed}");
        let end = written.moments.last().map_or(START_MS, |last| last.0);
        for _ in 0..20 {
            let ms = random.random_range(START_MS - 1..end + 2);
            let graph = written.moments.iter().rev().find(|(received, ..)| *received <= ms);
            let graph = graph.map_or_else(MemoryGraph::default, |(.., graph)| graph.clone());
            assert_eq!(all(&at(folder.path(), Moment::Received(ms))), expected(&graph), "seed {seed}, {ms}");
        }
    }
}

#[test]
fn an_archive_whose_nodes_are_not_what_its_log_says_is_found_out() {
    let folder = tempfile::tempdir().unwrap();
    let random = &mut StdRng::seed_from_u64(11);
    let mut written = random_history(folder.path(), random, 300);
    let horizon = written.moments[written.moments.len() / 3].0;
    crate::archive::compact(&mut written.file.connection, horizon);
    let (complaints, rooms) = check_archive(folder.path(), |_, _| ()).unwrap();
    assert!(complaints.is_empty());
    assert_eq!((rooms.len(), rooms[0].differing), (1, 0));
    assert!(rooms[0].entries > 50 && rooms[0].nodes > 0);
    written.file.connection.execute("UPDATE node SET value = '{}' WHERE room = 1", []).unwrap();
    let (_, rooms) = check_archive(folder.path(), |_, _| ()).unwrap();
    assert_eq!(rooms[0].differing, rooms[0].nodes);
    assert!(check_archive(Path::new("/nowhere"), |_, _| ()).is_err());
}

#[test]
fn a_moment_of_the_authors_clocks_is_what_they_had_written_until_then() {
    let folder = tempfile::tempdir().unwrap();
    let mut written = Written::new(folder.path());
    let upsert = |id: &str, physical: u64| {
        let text =
            format!(r#"{{"type":"upsert","id":"{id}","value":1,"timestamp":{{"physical":{physical},"logical":1}}}}"#);
        Operation::parse(&text, &mut 0).unwrap()
    };
    // The second came first: its author had been away.
    for (id, physical) in [("b", START_MS + 2_000), ("a", START_MS + 1_000), ("c", START_MS + 3_000)] {
        written.apply(&upsert(id, physical), START_MS + 5_000);
    }
    written.save();
    let ids = |physical| {
        let room = at(folder.path(), Moment::Clock(Hlc::new(physical, 1)));
        all(&room).0.into_iter().map(|node| node.id.to_text()).collect::<Vec<_>>().join("")
    };
    let found: Vec<String> = (0..4).map(|second| ids(START_MS + second * 1_000)).collect();
    assert_eq!(found, ["", "a", "ab", "abc"]);
}

#[test]
fn what_was_compacted_is_said_and_what_was_not_is_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let random = &mut StdRng::seed_from_u64(7);
    let mut written = random_history(folder.path(), random, 200);
    let (horizon, ..) = written.moments[written.moments.len() / 2];
    while crate::archive::compact(&mut written.file.connection, horizon) > 0 {}
    for (received, _, graph) in written.moments.iter().filter(|(received, ..)| *received >= horizon) {
        if written.moments.iter().rev().find(|(other, ..)| other == received).unwrap().2 == *graph {
            assert_eq!(all(&at(folder.path(), Moment::Received(*received))), expected(graph));
        }
    }
    let error = history(folder.path()).at(Moment::Received(START_MS), |_| ()).err().unwrap();
    assert!(matches!(error, HistoryError::Compacted { since_ms } if since_ms >= horizon), "{error}");
    assert!(error.to_string().contains("T"), "{error}");
    assert!(history(folder.path()).at(Moment::Clock(Hlc::new(START_MS, 1)), |_| ()).is_err());
}

#[test]
fn a_restoration_brings_any_moment_back_and_can_be_undone() {
    for seed in 0..300 {
        let random = &mut StdRng::seed_from_u64(seed);
        let folder = tempfile::tempdir().unwrap();
        let length = random.random_range(5..80);
        let mut written = random_history(folder.path(), random, length);
        let Some((end, ..)) = written.moments.last().cloned() else { continue };
        let mut clock = Clock::starting_at(written.state.latest.unwrap());
        let mut wall_ms = end + 10_000;
        let mut restore = |written: &mut Written, moment: Moment| {
            let plan = restoration(&at(folder.path(), Moment::Now), &at(folder.path(), moment)).unwrap();
            wall_ms += 10_000;
            let operations: Vec<Operation> = plan.edits.iter().map(|edit| edit.at(clock.now(wall_ms))).collect();
            // A page that was there all the time follows.
            let mut page = written.graph.clone();
            for operation in &Batch::parse(&Batch::print(&operations)).unwrap().operations {
                page.apply(operation, wall_ms);
            }
            for operation in &operations {
                written.apply(operation, wall_ms);
            }
            written.save();
            assert_eq!(page, written.graph);
            let again = restoration(&at(folder.path(), Moment::Now), &at(folder.path(), moment)).unwrap();
            assert_eq!(again.edits, [], "seed {seed}: nothing is left to restore");
            wall_ms
        };
        let before = content(&at(folder.path(), Moment::Now));
        let moment = Moment::Received(random.random_range(START_MS..=end));
        let then = content(&at(folder.path(), moment));
        restore(&mut written, moment);
        assert_eq!(content(&at(folder.path(), Moment::Now)), then, "seed {seed}");
        restore(&mut written, Moment::Received(end));
        assert_eq!(content(&at(folder.path(), Moment::Now)), before, "seed {seed}: undone");
    }
}

#[test]
fn queries_are_asked_of_any_moment_and_follow_edges() {
    let folder = tempfile::tempdir().unwrap();
    let mut written = Written::new(folder.path());
    let text = |id: &str, kind: &str| {
        format!(
            r#"{{"type":"upsert","id":"{id}","value":{{"kind":"{kind}"}},"timestamp":{{"physical":5,"logical":1}}}}"#
        )
    };
    let link = |source: &str, target: &str| {
        format!(
            r#"{{"type":"link","sourceId":"{source}","targetId":"{target}","timestamp":{{"physical":6,"logical":1}}}}"#
        )
    };
    let operations = [
        (text("root", "folder"), 10),
        (text("a", "folder"), 10),
        (text("x", "file"), 10),
        (text("y", "file"), 10),
        (text("z", "file"), 10),
        (link("root", "a"), 10),
        (link("a", "x"), 10),
        (link("a", "root"), 10),
        (link("root", "y"), 20),
    ];
    for (operation, received) in &operations {
        written.apply(&Operation::parse(operation, &mut 0).unwrap(), START_MS + received);
    }
    written.save();
    let find = |moment, query: &str| {
        let mut ids = Vec::new();
        at(folder.path(), moment)
            .find(&Query::parse(query).unwrap(), |node| {
                ids.push(node.id.to_text());
                true
            })
            .unwrap();
        ids.sort_unstable();
        ids.join("")
    };
    assert_eq!(find(Moment::Now, r#"{"kind":"file"}"#), "xyz");
    assert_eq!(find(Moment::Now, r#"{"id":"root","$edge":{"kind":"file"}}"#), "xy");
    assert_eq!(find(Moment::Received(START_MS + 15), r#"{"id":"root","$edge":{"kind":"file"}}"#), "x");
    assert_eq!(find(Moment::Received(START_MS), r#"{"kind":"file"}"#), "");
    assert_eq!(find(Moment::Now, r#"{"id":"a","$edge":{}}"#), "aroot".to_owned() + "xy");
    let edit = Edit::Remove { id: JsonString::new("x") };
    written.apply(&edit.at(Hlc::new(START_MS, 1)), START_MS + 30);
    assert_eq!(find(Moment::Now, r#"{"kind":"file"}"#), "yz");
}
