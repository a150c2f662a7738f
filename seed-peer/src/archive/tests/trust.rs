//! Rooms with super admins: on whose word the archive takes what.

use std::sync::Arc;

use genosdb::governance::Rules;
use genosdb::json::JsonString;
use genosdb::signature::{self, Identity};
use genosdb::{Batch, Json, MemoryGraph, Operation};
use proptest::prelude::*;
use tokio::sync::oneshot;

use super::super::{ArchiveConfig, Edit, Imported, Known, Received, Reply, Written};
use super::{Fixture, LINK, NOW_MS};
use crate::rooms::RoomError;
use crate::security::Security;
use crate::server::RoomConfig;

fn identity(number: u8) -> Identity {
    Identity::parse(&format!("{number:02x}").repeat(32)).unwrap()
}

/// A room ruled by identity 1; the seed signs as `seed`.
fn open(folder: &std::path::Path, seed: Option<u8>, change: impl FnOnce(&mut Security)) -> Fixture {
    let mut security = Arc::unwrap_or_clone(Security::of([identity(1).address()]).unwrap());
    change(&mut security);
    let room = RoomConfig { security: Some(Arc::new(security)), ..RoomConfig::named("my-app") };
    let config = ArchiveConfig { identity: seed.map(|seed| Arc::new(identity(seed))), ..ArchiveConfig::default() };
    Fixture::open_room(folder, &room, config)
}

fn upsert(id: &str, value: &str, logical: u64) -> String {
    format!(
        r#"{{"type":"upsert","id":"{id}","value":{value},"timestamp":{{"physical":{NOW_MS},"logical":{logical}}}}}"#
    )
}

fn role(user: u8, role: &str, logical: u64) -> String {
    let address = identity(user).address();
    upsert(&format!("user:{address}"), &format!(r#"{{"ethAddress":"{address}","role":"{role}"}}"#), logical)
}

fn signed(by: u8, operation: &str) -> String {
    identity(by).sign(operation).unwrap()
}

fn delta(operations: &[String]) -> String {
    format!(r#"{{"type":"deltaSync","operations":[{}],"timestamp":null}}"#, operations.join(","))
}

fn full_state(nodes: &[(&str, &str, u64)], removals: &[(&str, u64)]) -> String {
    let nodes = nodes.iter().map(|(id, value, logical)| {
        format!(r#""{id}":{{"id":"{id}","value":{value},"edges":[],"timestamp":{{"physical":{NOW_MS},"logical":{logical}}}}}"#)
    });
    let removals = removals
        .iter()
        .map(|(id, logical)| format!(r#"{{"id":"{id}","timestamp":{{"physical":{NOW_MS},"logical":{logical}}}}}"#));
    format!(
        r#"{{"type":"fullStateSync","graphData":{{{}}},"removals":[{}],"timestamp":null}}"#,
        nodes.collect::<Vec<_>>().join(","),
        removals.collect::<Vec<_>>().join(",")
    )
}

impl Fixture {
    fn hears(&self, text: &str) {
        let message = format!("[{text}]");
        let (operations, malformed) = Batch::parse_with_text(&message).unwrap();
        assert_eq!(malformed, 0, "{text}");
        let operations = operations.into_iter().map(|(operation, text)| (operation, text.to_owned())).collect();
        assert!(self.archive.as_ref().unwrap().merge(self.room, LINK, Received::WithText(operations), NOW_MS, 100));
    }

    fn ids(&mut self) -> Vec<String> {
        self.graph().iter().map(|node| node.id.to_text()).filter(|id| !id.starts_with("user:")).collect()
    }

    fn edits(&self, edits: Vec<Edit>) -> Result<Written, RoomError> {
        let (respond, response) = oneshot::channel();
        self.archive.as_ref().unwrap().edit(self.room, edits, NOW_MS, respond);
        response.blocking_recv().unwrap()
    }

    fn imports(&self, node: &str) -> Result<Imported, RoomError> {
        let (respond, response) = oneshot::channel();
        let node = genosdb::Node::parse(node).unwrap();
        self.archive.as_ref().unwrap().import(self.room, vec![node], Vec::new(), NOW_MS, respond);
        response.blocking_recv().unwrap()
    }

    fn left_out(&self, reason: &str) -> u64 {
        self.metrics.operations.with_label_values(&[reason]).get()
    }

    /// What the seed says by itself.
    fn wrote(&mut self) -> Vec<Operation> {
        loop {
            if let Reply::Wrote { message, .. } = self.replies.blocking_recv().unwrap() {
                let text = message.json().unwrap().to_string();
                return Batch::parse(&text).unwrap().operations;
            }
        }
    }
}

#[test]
fn nothing_is_taken_on_an_unsigned_senders_word() {
    let folder = tempfile::tempdir().unwrap();
    let mut room = open(folder.path(), None, |_| ());
    room.hears(&signed(1, &role(2, "user", 1)));
    room.hears(&signed(2, &upsert("mine", "1", 2)));
    assert_eq!(room.ids(), ["mine"]);
    // Live, in a delta, in a full state; unsigned, forged, and by one who may only read.
    let guest = upsert("guest", "1", 3);
    let forged = signed(2, &guest).replace(r#""value":1"#, r#""value":2"#);
    for text in [&guest, &forged, &signed(3, &guest)] {
        room.hears(text);
        room.hears(&delta(std::slice::from_ref(text)));
        room.hears(&signed(3, &delta(std::slice::from_ref(text))));
    }
    let state = full_state(&[("guest", "1", 3), ("mine", "2", 9)], &[("mine", 10)]);
    room.hears(&state);
    room.hears(&signed(3, &state));
    room.hears(&signed(2, &state).replace("guest", "guess"));
    assert_eq!(room.ids(), ["mine"]);
    assert_eq!(room.graph().get("mine").unwrap().value.as_ref().unwrap().as_str(), "1");
    assert!(room.left_out("unsigned") >= 3 && room.left_out("forged") >= 2 && room.left_out("not_permitted") >= 3);
    // A guest may ask, signed or not.
    assert!(matches!(room.answer(Known { timestamp: None, sent: None }).0, Operation::FullStateSync(_)));
}

#[test]
fn who_signs_a_delta_or_a_state_vouches_for_what_it_may_do_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut room = open(folder.path(), None, |_| ());
    let (author, sender) = (signed(2, &upsert("a", "1", 3)), upsert("b", "1", 4));
    let hydrated = signed(2, &upsert("c", "1", 5)).replace(r#""value":1"#, r#""value":2"#);
    room.hears(&signed(1, &role(2, "user", 1)));
    room.hears(&signed(1, &role(4, "user", 2)));
    // 3 is a guest: what 2 signed counts, what 3 says does not.
    room.hears(&signed(3, &delta(&[author, sender.clone(), hydrated.clone()])));
    assert_eq!(room.ids(), ["a"]);
    room.hears(&signed(4, &delta(&[sender, hydrated])));
    assert_eq!(room.ids(), ["a", "b", "c"]);
    room.hears(&signed(4, &full_state(&[("d", "1", 6), ("user:x", "1", 6)], &[("a", 7)])));
    assert_eq!(room.ids(), ["a", "b", "c", "d"], "a user removes nothing");
    drop(room);
    // The log knows on whose word each stands there, and holds no signature that does not hold.
    let mut doubtful = 0;
    let verification = crate::History::open(folder.path(), "my-app").unwrap().verify(|_| doubtful += 1).unwrap();
    assert_eq!((verification.signed, verification.vouched, verification.unsigned, doubtful), (3, 3, 0, 0));
    assert_eq!(verification.authors, [(identity(1).address(), 2), (identity(2).address(), 1)].into());
}

#[test]
fn a_state_that_is_refused_starts_no_argument() {
    let folder = tempfile::tempdir().unwrap();
    let room = open(folder.path(), None, |_| ());
    room.hears(&signed(1, &upsert("a", "1", 1)));
    // The sender has the node, or its removal: what it holds instead is not permitted, but it lacks nothing.
    for state in [full_state(&[("a", "2", 9)], &[]), full_state(&[], &[("a", 9)])] {
        let state = signed(3, &state);
        let message = format!("[{state}]");
        let (operations, _) = Batch::parse_with_text(&message).unwrap();
        let (operation, text) = operations.into_iter().next().unwrap();
        let asker = super::Asker::Link(55);
        let archive = room.archive.as_ref().unwrap();
        let received = Received::WithText(vec![(operation, text.to_owned())]);
        assert!(archive.merge(room.room, asker, received, NOW_MS, 100));
    }
    let mut room = room;
    room.ids();
    let sends = |reply: &Reply| matches!(reply, Reply::Send { to, .. } if *to == super::Asker::Link(55));
    while let Ok(reply) = room.replies.try_recv() {
        assert!(!sends(&reply), "an answer would be answered in turn, for ever");
    }
}

#[test]
fn a_room_may_take_the_state_of_one_who_does_not_sign() {
    let folder = tempfile::tempdir().unwrap();
    let mut room = open(folder.path(), None, |security| security.unsigned_states = true);
    let owned = format!(r#"{{"owner":"{}"}}"#, identity(2).address());
    room.hears(&signed(1, &upsert("owned", &owned, 1)));
    let user = format!("user:{}", identity(3).address());
    let nodes = [("a", "1", 2), ("owned", "1", 2), (&*user, r#"{"role":"admin"}"#, 2)];
    room.hears(&full_state(&nodes, &[("owned", 5)]));
    room.hears(&full_state(&[], &[("a", 5)]));
    room.hears(&upsert("live", "1", 3));
    assert_eq!(room.ids(), ["a", "owned"]);
    assert_eq!(room.graph().get("owned").unwrap().value.as_ref().unwrap().as_str(), owned);
    room.hears(&signed(3, &upsert("b", "1", 4)));
    assert_eq!(room.ids(), ["a", "owned"], "a role came with a state that nobody signed");
}

#[test]
fn an_operation_from_the_far_future_is_not_kept_as_signed() {
    let folder = tempfile::tempdir().unwrap();
    let mut room = open(folder.path(), None, |_| ());
    let far = upsert("a", "1", 1).replace(&NOW_MS.to_string(), &(NOW_MS * 2).to_string());
    room.hears(&signed(1, &far));
    assert_eq!(room.ids(), ["a"]);
    drop(room);
    let mut doubtful = 0;
    let verification = crate::History::open(folder.path(), "my-app").unwrap().verify(|_| doubtful += 1).unwrap();
    assert_eq!((verification.signed, verification.vouched, doubtful), (0, 1, 0));
}

#[test]
fn what_the_seed_writes_is_signed_told_and_logged_or_refused_as_a_whole() {
    let upsert = |id: &str| Edit::Upsert { id: JsonString::new(id), value: Json::parse("1").unwrap() };
    let folder = tempfile::tempdir().unwrap();
    let mut room = open(folder.path(), Some(1), |_| ());
    let edits = vec![
        upsert("a"),
        upsert("b"),
        Edit::Link { source: JsonString::new("a"), target: JsonString::new("b") },
        Edit::Link { source: JsonString::new("nowhere"), target: JsonString::new("b") },
        Edit::Remove { id: JsonString::new("b") },
    ];
    assert_eq!(room.edits(edits), Ok(Written { applied: 4, without_effect: 1 }));
    let told = room.wrote();
    assert_eq!(told.len(), 4);
    for operation in &told {
        assert_eq!(signature::verify(&operation.to_string()), Ok(identity(1).address()));
    }
    let mut graph = MemoryGraph::default();
    for operation in &told {
        graph.apply(operation, NOW_MS);
    }
    assert_eq!(room.graph().full_state().nodes, graph.full_state().nodes);
    let node = r#"{"id":"i","value":1,"edges":[],"timestamp":{"physical":5,"logical":1}}"#;
    assert_eq!(room.imports(node), Ok(Imported { applied: 1, left_out: 0 }));
    assert_eq!(room.ids(), ["a", "i"]);
    let long = "x".repeat(2_000);
    assert!(matches!(room.edits(vec![upsert("c"), upsert(&long)]), Err(RoomError::NotWritten(_))));
    assert_eq!(room.ids(), ["a", "i"], "all or nothing");
    drop(room);
    for seed in [None, Some(7)] {
        let mut room = open(folder.path(), seed, |_| ());
        assert!(matches!(room.edits(vec![upsert("c")]), Err(RoomError::NotWritten(_))), "{seed:?}");
        match seed {
            None => assert!(matches!(room.imports(node), Err(RoomError::NotWritten(_)))),
            Some(_) => assert_eq!(room.imports(&node.replace('5', "6")), Ok(Imported { applied: 0, left_out: 1 })),
        }
        assert_eq!(room.ids(), ["a", "i"]);
    }
}

#[test]
fn rules_climb_the_ladder_and_down_again_and_write_only_changes() {
    let folder = tempfile::tempdir().unwrap();
    let rules = r#"[
        {"if":{"role":"guest"},"then":{"assignRole":"user"},"offsetTimestamp":1000},
        {"if":{"role":"user","posts":{"$gte":3}},"then":{"assignRole":"manager"}},
        {"if":{"banned":true},"then":{"assignRole":"guest"}}
    ]"#;
    let mut room = open(folder.path(), Some(1), |security| {
        security.rules = Rules::parse(rules, &security.policy).unwrap();
    });
    let govern = |room: &mut Fixture, later: u64| {
        // What was said is checked on other threads: an answer comes behind it.
        room.ids();
        room.archive.as_ref().unwrap().govern(room.room, NOW_MS + later);
    };
    let user = format!("user:{}", identity(2).address());
    let role_of = |room: &mut Fixture| {
        let graph = room.graph();
        genosdb::security::role_in(&graph.get(&user).unwrap().value.as_ref().unwrap().into()).unwrap().to_owned()
    };
    let says = |members: &str, by: u8, logical: u64| signed(by, &upsert(&user, &format!("{{{members}}}"), logical));
    room.hears(&says(r#""role":"guest""#, 2, 1));
    room.hears(&signed(1, &role(1, "guest", 1)));
    govern(&mut room, 999);
    assert_eq!(role_of(&mut room), "guest");
    govern(&mut room, 1_000);
    assert_eq!(role_of(&mut room), "user");
    room.hears(&signed(2, &upsert("post", "1", 50)));
    assert_eq!(room.ids(), ["post"]);
    let later = |room: &Fixture, members: &str, at: u64| {
        let text = upsert(&user, &format!("{{{members}}}"), 9).replace(&NOW_MS.to_string(), &(NOW_MS + at).to_string());
        room.hears(&signed(1, &text));
    };
    later(&room, r#""role":"user","posts":3"#, 2_000);
    govern(&mut room, 2_000);
    assert_eq!(role_of(&mut room), "manager");
    later(&room, r#""role":"manager","banned":true"#, 3_000);
    govern(&mut room, 3_000);
    assert_eq!(role_of(&mut room), "guest");
    assert_eq!(room.metrics.rulings.get(), 3);
    for _ in 0..5 {
        govern(&mut room, 3_001);
    }
    assert_eq!(role_of(&mut room), "guest");
    assert_eq!(room.metrics.rulings.get(), 3, "what is as it should be is not written again");
    let own = format!("user:{}", identity(1).address());
    let own = room.graph().get(&own).unwrap().value.clone().unwrap();
    assert!(own.as_str().contains("guest"), "super admins are immune");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_the_seed_answers_bears_its_signature(
        ids in prop::collection::vec("[a-c]|[0-9]{1,3}|\\PC{1,3}|[\"\\\\\u{e000}-\u{ffff}]", 1..12),
        values in prop::collection::vec("[a-z\"]{0,5}", 12),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let config = ArchiveConfig { identity: Some(Arc::new(identity(1))), ..ArchiveConfig::default() };
        let mut room = Fixture::open_room(folder.path(), &RoomConfig::named("my-app"), config);
        let mut edits = Vec::new();
        for (id, value) in ids.iter().zip(&values) {
            let value = format!(r#"{{"z":[{}],"10":1.50,"9":{{"b":1e30,"a":"é"}}}}"#, JsonString::new(value));
            edits.push(Edit::Upsert { id: JsonString::new(id), value: Json::parse(&value).unwrap() });
        }
        edits.push(Edit::Link { source: JsonString::new(&ids[0]), target: JsonString::new("t") });
        edits.push(Edit::Remove { id: JsonString::new(&ids[ids.len() / 2]) });
        room.edits(edits).unwrap();
        let (state, sent) = room.answer(Known { timestamp: None, sent: None });
        prop_assert!(matches!(state, Operation::FullStateSync(_)));
        prop_assert_eq!(signature::verify(&state.to_string()), Ok(identity(1).address()));
        let known = Known { timestamp: Some(genosdb::Hlc::new(NOW_MS, 1)), sent: Some(sent.saturating_sub(2)) };
        let (delta, _) = room.answer(known);
        prop_assert!(matches!(delta, Operation::DeltaSync(_)));
        prop_assert_eq!(signature::verify(&delta.to_string()), Ok(identity(1).address()));
    }
}

#[test]
fn no_operation_in_a_delta_is_for_a_role_that_the_same_delta_gives() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = open(folder.path(), Some(1), |_| {});
    let known = Known { timestamp: Some(genosdb::Hlc::new(NOW_MS, 1)), sent: Some(0) };
    archive.hears(&signed(1, &upsert("a", "1", 1)));
    archive.hears(&signed(1, &role(2, "user", 2)));
    // Nothing follows that depends on the role.
    assert!(matches!(archive.answer(known).0, Operation::DeltaSync(delta) if delta.operations.len() == 2));
    archive.hears(&signed(2, &upsert("b", "1", 3)));
    assert!(matches!(archive.answer(known).0, Operation::FullStateSync(state) if state.nodes.len() == 3));
    // What is known already may be built upon.
    let (owner, other) = (identity(2).address(), identity(3).address());
    let known = Known { sent: Some(archive.answer(known).1), ..known };
    archive.hears(&signed(1, &role(3, "user", 4)));
    let known = Known { sent: Some(archive.answer(known).1), ..known };
    archive.hears(&signed(3, &upsert("c", "1", 5)));
    archive
        .hears(&signed(2, &upsert("d", &format!(r#"{{"owner":"{owner}","collaborators":{{"{other}":"write"}}}}"#), 6)));
    archive.hears(&signed(3, &upsert("c", "2", 7)));
    assert!(matches!(archive.answer(known).0, Operation::DeltaSync(delta) if delta.operations.len() == 3));
    let change = format!(r#"{{"text":1,"owner":"{owner}","collaborators":{{"{other}":"write"}}}}"#);
    archive.hears(&signed(3, &upsert("d", &change, 8)));
    assert!(matches!(archive.answer(known).0, Operation::FullStateSync(state) if state.nodes.len() == 6));
}

#[test]
fn a_room_that_was_added_is_joined_with_who_rules_it_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let room = RoomConfig { security: Security::of([identity(1).address()]), ..RoomConfig::named("added") };
    let mut opened = super::super::Opened::open(folder.path()).unwrap();
    opened.room(&room, crate::rooms::Source::Added).unwrap();
    let added = opened.added().unwrap();
    assert_eq!(added[0].security.as_ref().unwrap().policy.super_admins, [identity(1).address()].into());
    let garbled = r#"UPDATE room SET settings = '{"super_admins":["0x12"]}'"#;
    opened.file.connection.execute(garbled, []).unwrap();
    assert!(opened.added().unwrap().is_empty(), "without who rules it, everybody would");
}
