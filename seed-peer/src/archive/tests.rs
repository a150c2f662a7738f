//! The archive against the merge rules in memory.

mod trust;

use std::path::Path;
use std::time::Duration;

use genosdb::frame::Frame;
use genosdb::operation::DeltaSync;
use genosdb::{Batch, Content, Hlc, Limits, MemoryGraph, Message, Operation, Reassembler};
use proptest::prelude::*;
use service::{Health, State};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::{Archive, ArchiveConfig, Asker, Bounds, Known, Opened, Received, Reply, RoomKey};
use crate::mesh::RoomId;
use crate::metrics::Metrics;
use crate::rooms::Source;
use crate::server::RoomConfig;

const NOW_MS: u64 = 1_795_337_800_000;
const LINK: Asker = Asker::Link(7);

struct Fixture {
    archive: Option<Archive>,
    replies: UnboundedReceiver<Reply>,
    room: RoomKey,
    next_asker: u64,
    health: Health,
    metrics: Metrics,
}

impl Fixture {
    fn open(folder: &Path, bounds: Bounds) -> Self {
        Self::open_with(folder, bounds, None)
    }

    fn open_with(folder: &Path, bounds: Bounds, keep: Option<Duration>) -> Self {
        Self::open_room(
            folder,
            &RoomConfig::named("my-app"),
            ArchiveConfig { bounds, keep, ..ArchiveConfig::default() },
        )
    }

    fn open_room(folder: &Path, room: &RoomConfig, config: ArchiveConfig) -> Self {
        let mut opened = Opened::open(folder).unwrap();
        let room = opened.room(room, Source::Settings).unwrap();
        let (sender, replies) = unbounded_channel();
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        let health = Health::default();
        let archive = opened.start(config, sender, metrics.clone(), health.clone()).unwrap();
        Self { archive: Some(archive), replies, room: room.key, next_asker: 100, health, metrics }
    }

    fn merge(&self, operations: &[Operation]) {
        let archive = self.archive.as_ref().unwrap();
        assert!(archive.merge(self.room, LINK, Received::Plain(operations.to_vec()), NOW_MS, 100));
    }

    /// What the archive answers to a peer that knows `known`.
    fn answers(&mut self, known: Known) -> (Vec<Operation>, u64) {
        let asker = Asker::Link(self.next_asker);
        self.next_asker += 1;
        assert!(self.archive.as_ref().unwrap().answer(self.room, asker, known));
        loop {
            if let Reply::Send { to, messages, sent } = self.replies.blocking_recv().unwrap()
                && to == asker
            {
                return (messages.iter().map(only_operation).collect(), sent);
            }
        }
    }

    fn answer(&mut self, known: Known) -> (Operation, u64) {
        let (mut operations, sent) = self.answers(known);
        assert_eq!(operations.len(), 1);
        (operations.remove(0), sent)
    }

    /// What a newcomer makes of what it is sent.
    fn graph(&mut self) -> MemoryGraph {
        let mut graph = MemoryGraph::default();
        for operation in self.answers(Known { timestamp: None, sent: None }).0 {
            match operation {
                Operation::FullStateSync(state) => drop(graph.merge(&state, NOW_MS)),
                Operation::DeltaSync(delta) => {
                    for operation in &delta.operations {
                        graph.apply(operation, NOW_MS);
                    }
                }
                other => panic!("{other}"),
            }
        }
        graph
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(archive) = self.archive.take() {
            archive.close();
        }
    }
}

fn only_operation(message: &Message) -> Operation {
    let mut reassembler = Reassembler::new(Limits::default());
    let mut whole = None;
    for index in 0..message.frames() {
        whole = reassembler.push(&Frame::parse(&message.frame(0, index)).unwrap()).unwrap();
    }
    let Some((_, Content::Json(text))) = whole else { panic!("not JSON") };
    let batch = Batch::parse(&text).unwrap();
    assert_eq!((batch.operations.len(), batch.malformed), (1, 0), "{text}");
    batch.operations.into_iter().next().unwrap()
}

fn operation(kind: u8, one: u8, other: u8, at: Hlc) -> Operation {
    let timestamp = format!(r#"{{"physical":{},"logical":{}}}"#, at.physical, at.logical);
    let text = match kind {
        0 => format!(r#"{{"type":"upsert","id":"n\"{one}","value":{{"i":{other}}},"timestamp":{timestamp},"by":"x"}}"#),
        1 => format!(r#"{{"type":"remove","id":"n\"{one}","timestamp":{timestamp}}}"#),
        _ => format!(r#"{{"type":"link","sourceId":"n\"{one}","targetId":"n\"{other}","timestamp":{timestamp}}}"#),
    };
    Operation::parse(&text, &mut 0).unwrap()
}

fn put(id: u8, logical: u64) -> Operation {
    operation(0, id, 0, Hlc::new(NOW_MS, logical))
}

fn schedules() -> impl Strategy<Value = Vec<Operation>> {
    prop::collection::vec((0..3u8, 0..6u8, 0..6u8, 0..60u64), 1..60).prop_map(|drawn| {
        let at = |time, index: usize| Hlc::new(NOW_MS - 100 + time, u64::try_from(index).unwrap());
        let make = |(index, (kind, one, other, time))| operation(kind, one, other, at(time, index));
        drawn.into_iter().enumerate().map(make).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_archive_holds_what_the_rules_say_also_after_a_restart(
        operations in schedules(),
        others in schedules(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut expected = MemoryGraph::default();
        let mut other = MemoryGraph::default();
        for operation in &operations {
            expected.apply(operation, NOW_MS);
        }
        for operation in &others {
            other.apply(operation, NOW_MS);
        }
        let mut archive = Fixture::open(folder.path(), Bounds::default());
        for operation in &operations {
            archive.merge(std::slice::from_ref(operation));
        }
        prop_assert_eq!(archive.graph().full_state(), expected.full_state());

        expected.merge(&other.full_state(), NOW_MS);
        archive.merge(&[Operation::FullStateSync(other.full_state())]);
        prop_assert_eq!(archive.graph().full_state(), expected.full_state());
        drop(archive);

        let mut archive = Fixture::open(folder.path(), Bounds::default());
        prop_assert_eq!(archive.graph().full_state(), expected.full_state());
        for operation in &operations {
            expected.apply(operation, NOW_MS);
            archive.merge(std::slice::from_ref(operation));
        }
        prop_assert_eq!(archive.graph().full_state(), expected.full_state());
    }
}

#[test]
fn a_peer_that_was_sent_everything_is_then_sent_only_what_is_new() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Fixture::open(folder.path(), Bounds::default());
    archive.merge(&[put(1, 1), put(2, 2)]);
    let (first, sent) = archive.answer(Known { timestamp: None, sent: None });
    assert!(matches!(first, Operation::FullStateSync(state) if state.nodes.len() == 2));
    archive.merge(&[put(3, 3)]);
    let known = Known { timestamp: Some(Hlc::new(NOW_MS, 2)), sent: Some(sent) };
    let (second, sent) = archive.answer(known);
    let Operation::DeltaSync(delta) = second else { panic!("not a delta") };
    assert_eq!(delta.operations, [put(3, 3)]);
    assert_eq!(delta.timestamp, Some(Hlc::new(NOW_MS, 3)));
    let (third, _) = archive.answer(Known { sent: Some(sent), ..known });
    assert!(matches!(third, Operation::DeltaSync(delta) if delta.operations.is_empty()));
}

#[test]
fn a_peer_of_a_large_room_that_was_away_shortly_gets_a_delta_and_one_that_was_away_long_the_state() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Fixture::open(folder.path(), Bounds::default());
    let old_ms = NOW_MS - 10 * 3_600_000;
    let many: Vec<Operation> = (0..600)
        .map(|index| {
            let text = format!(
                r#"{{"type":"upsert","id":"x{index}","value":1,"timestamp":{{"physical":{old_ms},"logical":{index}}}}}"#
            );
            Operation::parse(&text, &mut 0).unwrap()
        })
        .collect();
    assert!(archive.archive.as_ref().unwrap().merge(archive.room, LINK, Received::Plain(many), old_ms, 100));
    archive.merge(&[put(1, 1_000)]);
    let recent = Known { timestamp: Some(Hlc::new(NOW_MS - 3_600_000, 0)), sent: None };
    let (answer, _) = archive.answer(recent);
    let Operation::DeltaSync(delta) = answer else { panic!("not a delta") };
    assert_eq!(delta.operations, [put(1, 1_000)]);
    let older = Known { timestamp: Some(Hlc::new(old_ms - 3_600_000, 0)), sent: None };
    assert!(matches!(archive.answer(older).0, Operation::FullStateSync(state) if state.nodes.len() == 601));
}

#[test]
fn what_is_sent_unasked_is_operations() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Fixture::open(folder.path(), Bounds::default());
    let live = |archive: &mut Fixture, first: u64| {
        assert!(archive.archive.as_ref().unwrap().live(archive.room, RoomId(1), first));
        loop {
            if let Reply::Send { to: Asker::Linked(_), messages, sent } = archive.replies.blocking_recv().unwrap() {
                return (messages.iter().map(only_operation).collect::<Vec<_>>(), sent);
            }
        }
    };
    archive.merge(&[put(1, 1), put(2, 2)]);
    let (said, sent) = live(&mut archive, 1);
    assert!(matches!(&said[..], [Operation::DeltaSync(delta)] if delta.operations.len() == 2) && sent == 2);
    assert_eq!(live(&mut archive, 3), (Vec::new(), 2), "there is nothing new");
    let mut other = MemoryGraph::default();
    other.apply(&put(3, 3), NOW_MS);
    archive.merge(&[Operation::FullStateSync(other.full_state())]);
    // Nodes of a state are no operations, but can be said as such.
    archive.merge(&[put(4, 4)]);
    let (said, sent) = live(&mut archive, 2);
    let Operation::DeltaSync(delta) = &said[0] else { panic!("{said:?}") };
    let mut third = put(3, 3);
    third.extra_mut().clear();
    assert_eq!((&delta.operations[..], sent), (&[put(2, 2), third, put(4, 4)][..], 4));
}

#[test]
fn who_sends_a_delta_that_begins_with_news_may_have_more() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Fixture::open(folder.path(), Bounds::default());
    let delta = |operations: &[Operation]| {
        [Operation::DeltaSync(DeltaSync { operations: operations.to_vec(), timestamp: None, extra: Vec::new() })]
    };
    archive.merge(&[put(1, 1)]);
    // Nothing was lost before what is known.
    archive.merge(&delta(&[put(1, 1), put(2, 2)]));
    let nothing = Known { timestamp: None, sent: None };
    assert!(archive.archive.as_ref().unwrap().answer(archive.room, LINK, nothing));
    loop {
        match archive.replies.blocking_recv().unwrap() {
            Reply::Send { .. } => break,
            Reply::MayLack { .. } => panic!("all before it was known"),
            _ => {}
        }
    }
    archive.merge(&delta(&[put(3, 3), put(1, 4)]));
    let Asker::Link(asker) = LINK else { panic!("{LINK:?}") };
    while !matches!(archive.replies.blocking_recv().unwrap(), Reply::MayLack { link } if link == asker) {}
}

#[test]
fn what_is_too_much_is_left_out_and_the_rest_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds { id_bytes: 10, value_bytes: 50, edges: 2, nodes: 3, ..Bounds::default() };
    let mut archive = Fixture::open(folder.path(), bounds);
    let text = |id: &str, value: &str| {
        let text = format!(
            r#"{{"type":"upsert","id":"{id}","value":"{value}","timestamp":{{"physical":{NOW_MS},"logical":1}}}}"#
        );
        Operation::parse(&text, &mut 0).unwrap()
    };
    archive.merge(&[text("a", "ok"), text(&"long".repeat(5), "x"), text("b", &"x".repeat(60)), text("c", "ok")]);
    let state = r#"{"type":"fullStateSync","graphData":{
        "d":{"id":"d","value":1,"edges":["a","b","c"],"timestamp":{"physical":5,"logical":1}},
        "e":{"id":"e","value":1,"edges":["a","c"],"timestamp":{"physical":5,"logical":1}},
        "f":{"id":"f","value":1,"edges":[],"timestamp":{"physical":5,"logical":1}}},"removals":[],"timestamp":null}"#;
    archive.merge(&[Operation::parse(state, &mut 0).unwrap()]);
    archive.merge(&[text("g", "one too many")]);
    let held: Vec<String> = archive.graph().iter().map(|node| node.id.to_text()).collect();
    assert_eq!(held, ["a", "c", "e"]);
}

#[test]
fn the_size_of_a_room_is_counted_and_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds { room_bytes: 60, ..Bounds::default() };
    let mut archive = Fixture::open(folder.path(), bounds);
    let link = operation(2, 1, 2, Hlc::new(NOW_MS, 3));
    archive.merge(&[put(1, 1), put(2, 2), link]);
    // What is over the bound is left out; what makes the room smaller is taken.
    archive.merge(&[put(3, 4), put(4, 5), put(5, 6), put(6, 7)]);
    let held = archive.graph().iter().count();
    assert!((3..6).contains(&held), "{held}");
    archive.merge(&[operation(1, 1, 0, Hlc::new(NOW_MS, 8))]);
    assert_eq!(archive.graph().iter().count(), held - 1);
    drop(archive);
    let file = super::schema::open(folder.path()).unwrap();
    let counted = "SELECT bytes, (SELECT sum(octet_length(id) + octet_length(value) + octet_length(edges) \
        + octet_length(extra)) FROM node) FROM room";
    let (bytes, sum): (i64, i64) =
        file.connection.query_row(counted, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert_eq!(bytes, sum);
}

/// A room of so many nodes, written so many hours ago.
fn many(count: u64, at_ms: u64) -> Vec<Operation> {
    let make = |index| {
        let text = format!(
            r#"{{"type":"upsert","id":"x{index}","value":{{"text":"node number {index}"}},"timestamp":{{"physical":{at_ms},"logical":{index}}}}}"#
        );
        Operation::parse(&text, &mut 0).unwrap()
    };
    (0..count).map(make).collect()
}

#[test]
fn a_state_that_is_kept_is_sent_with_what_came_since() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Fixture::open(folder.path(), Bounds::default());
    archive.merge(&many(1_000, NOW_MS - 1_000));
    let nothing = Known { timestamp: None, sent: None };
    assert_eq!(archive.answers(nothing).0.len(), 1);
    archive.merge(&[put(1, 1), operation(1, 2, 0, Hlc::new(NOW_MS, 2))]);
    let (answers, sent) = archive.answers(nothing);
    let [Operation::FullStateSync(state), Operation::DeltaSync(delta)] = &answers[..] else { panic!("{answers:?}") };
    assert_eq!((state.nodes.len(), delta.operations.len(), sent), (1_000, 2, 1_002));
    assert_eq!(archive.graph().iter().count(), 1_001);
    // What came as nodes of a state cannot be said as operations: the state is made anew.
    let mut other = MemoryGraph::default();
    other.apply(&put(9, 9), NOW_MS);
    archive.merge(&[Operation::FullStateSync(other.full_state())]);
    let (answers, _) = archive.answers(nothing);
    assert!(matches!(&answers[..], [Operation::FullStateSync(state)] if state.nodes.len() == 1_002));
}

#[test]
fn who_may_hold_more_than_a_state_that_is_kept_is_sent_what_is_true_now() {
    let nothing = Known { timestamp: None, sent: None };
    // It has seen something, before all that is logged: no delta will do.
    let something = Known { timestamp: Some(Hlc::new(1, 0)), sent: None };
    for (nodes, known) in [(10, nothing), (10, something), (1_000, something)] {
        let folder = tempfile::tempdir().unwrap();
        let mut archive = Fixture::open(folder.path(), Bounds::default());
        archive.merge(&many(nodes, NOW_MS - 1_000));
        assert_eq!(archive.answers(known).0.len(), 1);
        archive.merge(&[put(1, 1)]);
        // Not at once: reading takes a tenth of the thread's time at most.
        wait_until(|| {
            let (answers, _) = archive.answers(known);
            matches!(&answers[..], [Operation::FullStateSync(state)] if state.nodes.len() as u64 == nodes + 1)
        });
    }
}

#[test]
fn a_peer_that_was_away_for_months_gets_a_delta_when_that_is_smaller() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Fixture::open(folder.path(), Bounds::default());
    let (year, months) = (NOW_MS - 365 * 86_400_000, NOW_MS - 90 * 86_400_000);
    let send = |archive: &Fixture, operations: Vec<Operation>, at| {
        let operations = Received::Plain(operations);
        assert!(archive.archive.as_ref().unwrap().merge(archive.room, LINK, operations, at, 100));
    };
    send(&archive, many(20_000, year), year);
    let away = Known { timestamp: Some(Hlc::new(months, 0)), sent: None };
    send(&archive, many(5_000, NOW_MS), NOW_MS);
    assert!(matches!(archive.answer(away).0, Operation::DeltaSync(delta) if delta.operations.len() == 5_000));
    // One that has been gone while everything was rewritten several times is sent what came of it.
    for round in 1..6 {
        send(&archive, many(20_000, NOW_MS + round), NOW_MS + round);
    }
    assert!(matches!(archive.answer(away).0, Operation::FullStateSync(state) if state.nodes.len() == 20_000));
}

/// What a room was before the first entry of its log, and what it is with the log.
fn replayed(folder: &Path) -> (usize, MemoryGraph) {
    let file = super::schema::open(folder).unwrap();
    let mut graph = MemoryGraph::default();
    let mut nodes = file
        .connection
        .prepare(
            "SELECT node.id, value, edges, node.physical, node.logical FROM node JOIN room ON room.id = node.room
                  WHERE snapshot_of = 1",
        )
        .unwrap();
    let mut rows = nodes.query([]).unwrap();
    let mut text = String::from(r#"{"type":"fullStateSync","graphData":{"#);
    while let Some(row) = rows.next().unwrap() {
        let id: String = row.get(0).unwrap();
        let value: String = row.get(1).unwrap();
        let edges: String = row.get(2).unwrap();
        let (physical, logical): (i64, i64) = (row.get(3).unwrap(), row.get(4).unwrap());
        text.push_str(&format!(
            r#""{id}":{{"id":"{id}","value":{value},"edges":{edges},"timestamp":{{"physical":{physical},"logical":{logical}}}}},"#
        ));
    }
    let mut tombstones = file
        .connection
        .prepare(
            "SELECT tombstone.id, tombstone.physical, tombstone.logical FROM tombstone
                  JOIN room ON room.id = tombstone.room WHERE snapshot_of = 1",
        )
        .unwrap();
    let removals: Vec<String> = tombstones
        .query_map([], |row| {
            let (id, physical, logical): (String, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(format!(r#"{{"id":"{id}","timestamp":{{"physical":{physical},"logical":{logical}}}}}"#))
        })
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let text = format!("{}}},\"removals\":[{}],\"timestamp\":null}}", text.trim_end_matches(','), removals.join(","));
    let Operation::FullStateSync(state) = Operation::parse(&text, &mut 0).unwrap() else { panic!("a state") };
    graph.merge(&state, NOW_MS);
    let mut log = file.connection.prepare("SELECT kind, operation FROM log WHERE room = 1 ORDER BY seq").unwrap();
    let mut rows = log.query([]).unwrap();
    let mut entries = 0;
    while let Some(row) = rows.next().unwrap() {
        entries += 1;
        assert_eq!(row.get::<_, i64>(0).unwrap(), 0);
        let operation = Operation::parse(&row.get::<_, String>(1).unwrap(), &mut 0).unwrap();
        graph.apply(&operation, NOW_MS);
    }
    (entries, graph)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn what_is_compacted_amounts_to_the_same(older in schedules(), newer in schedules()) {
        let folder = tempfile::tempdir().unwrap();
        let now = crate::time_of_day::wall_ms();
        let mut expected = MemoryGraph::default();
        let mut archive = Fixture::open(folder.path(), Bounds::default());
        let mut is_older_logged = false;
        for (operations, at) in [(&older, now - 10_000), (&newer, now)] {
            for operation in operations {
                let outcome = expected.apply(operation, at);
                is_older_logged |= at < now && outcome == genosdb::graph::Outcome::Applied;
            }
            assert!(archive.archive.as_ref().unwrap().merge(archive.room, LINK, Received::Plain(operations.clone()), at, 100));
        }
        prop_assert_eq!(archive.graph().full_state(), expected.full_state());
        drop(archive);

        let mut archive = Fixture::open_with(folder.path(), Bounds::default(), Some(Duration::from_millis(5_000)));
        prop_assert_eq!(archive.graph().full_state(), expected.full_state());
        // A peer that knows what is compacted gets the state: a delta would have a hole.
        let known = Known { timestamp: Some(Hlc::new(1, 1)), sent: Some(0) };
        if is_older_logged {
            wait_until(|| archive.metrics.compacted.get() > 0);
            let answers = archive.answers(known).0;
            prop_assert!(matches!(&answers[..], [Operation::FullStateSync(_)]));
        }
        drop(archive);
        let (entries, graph) = replayed(folder.path());
        prop_assert!(entries <= newer.len());
        prop_assert_eq!(graph.full_state(), expected.full_state());
    }
}

#[test]
fn a_disk_that_refuses_is_waited_for_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Fixture::open(folder.path(), Bounds::default());
    archive.merge(&[put(1, 1)]);
    let before = archive.graph().full_state();

    // Another writer holds the file: to the archive, a disk that does not take anything.
    let blocker = rusqlite::Connection::open(folder.path().join(super::schema::FILE_NAME)).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    archive.merge(&[put(2, 2)]);
    wait_until(|| matches!(archive.health.parts()["archive"], State::Degraded(_)));
    // It still answers, from what it has.
    assert_eq!(archive.graph().full_state(), before);
    archive.merge(&[put(3, 3)]);

    blocker.execute_batch("ROLLBACK").unwrap();
    wait_until(|| archive.health.parts()["archive"] == State::Ok);
    assert_eq!(archive.graph().iter().count(), 3);
}

#[test]
fn a_disk_that_refuses_what_is_another_s_to_write_by_now_is_still_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let archive = Fixture::open(folder.path(), Bounds::default());
    let blocker = rusqlite::Connection::open(folder.path().join(super::schema::FILE_NAME)).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    archive.merge(&[put(1, 1)]);
    wait_until(|| matches!(archive.health.parts()["archive"], State::Degraded(_)));
    let (respond, released) = tokio::sync::oneshot::channel();
    archive.archive.as_ref().unwrap().release_room(archive.room, respond);
    released.blocking_recv().unwrap().unwrap();
    let failures = archive.metrics.archive_failures.get();
    // Nothing waits any more, but the disk still refuses.
    assert!(matches!(archive.health.parts()["archive"], State::Degraded(_)));
    blocker.execute_batch("ROLLBACK").unwrap();
    // It is found out although there is never a second without a request, of which none writes.
    wait_until(|| {
        let (respond, released) = tokio::sync::oneshot::channel();
        archive.archive.as_ref().unwrap().release_room(archive.room, respond);
        released.blocking_recv().unwrap().unwrap();
        archive.health.parts()["archive"] == State::Ok
    });
    assert_eq!(archive.metrics.archive_failures.get(), failures);
}

/// Waits for what another thread does; fails rather than waiting for ever.
fn wait_until(mut condition: impl FnMut() -> bool) {
    for _ in 0..1_000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("nothing came of it");
}
