//! What real GenosDB 0.25 clients put on the wire, captured, against this crate.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::Path;

use genosdb::cells::Topology;
use genosdb::frame::{Frame, MAX_FRAME_BYTES};
use genosdb::graph::Outcome;
use genosdb::signature::{self, Identity};
use genosdb::{
    APP_ID, Batch, Content, Json, Limits, MemoryGraph, Message, Operation, PeerId, Reassembler, Room, SdpKey,
    SealedDescription, Signal,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A time of day close to that of the captures, in ms.
const CAPTURED_MS: u64 = 1_795_337_800_000;

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}"))
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("not an array: {value}"))
}

#[test]
fn topics_and_kinds_are_those_of_real_clients() {
    let vectors = fixture("topics.json");
    for vector in list(&vectors) {
        let database = text(&vector["database"]);
        let room = [Room::graph_sync(database), Room::app_sync(database)]
            .into_iter()
            .find(|room| room.as_str() == text(&vector["room"]))
            .unwrap();
        let root = room.root_topic();
        assert_eq!(root.as_str(), text(&vector["root_topic"]));
        assert_eq!(u64::from(root.kind()), vector["root_kind"].as_u64().unwrap());
        let own = room.self_topic(&PeerId::parse(text(&vector["peer_id"])).unwrap());
        assert_eq!(own.as_str(), text(&vector["self_topic"]));
        assert_eq!(u64::from(own.kind()), vector["self_kind"].as_u64().unwrap());
    }
    assert_eq!(list(&vectors).len(), 6);
}

#[test]
fn signals_of_real_clients_are_understood() {
    let events = fixture("events.json");
    let heard = |name: &str| Signal::parse(text(&events[name]["content"])).unwrap_or_else(|| panic!("{name}"));
    let first = PeerId::parse("rP5xrSA37VoHEv5F0C0U").unwrap();
    let second = PeerId::parse("4jNOC17LJYUx0rY4ssBn").unwrap();
    assert_eq!(heard("announce"), Signal::Announce { peer: first });
    assert_eq!(heard("bye"), Signal::Bye { peer: second });
    assert!(matches!(heard("offer"), Signal::Offer { peer, superpeer: false, .. } if peer == first));
    assert!(matches!(heard("answer"), Signal::Answer { peer, .. } if peer == second));
    assert!(matches!(heard("superpeer_offer"), Signal::Offer { superpeer: true, .. }));
    // What we say ourselves must read like what they say.
    for name in ["announce", "bye"] {
        assert_eq!(heard(name).to_content(), text(&events[name]["content"]));
    }
    // Offer and answer travel on the self topic of the other.
    let room = Room::graph_sync("my-app");
    assert_eq!(room.self_topic(&second).as_str(), text(&events["offer"]["tags"][0][1]));
    assert_eq!(room.self_topic(&first).as_str(), text(&events["answer"]["tags"][0][1]));
}

#[test]
fn sealed_descriptions_open_and_seal_to_the_same_text() {
    let vectors = fixture("sealed_sdp.json");
    for vector in list(&vectors) {
        let room = [Room::graph_sync("my-app"), Room::app_sync("my-app")]
            .into_iter()
            .find(|room| room.as_str() == text(&vector["room"]))
            .unwrap();
        assert_eq!(text(&vector["app_id"]), APP_ID);
        let key = SdpKey::derive(text(&vector["password"]), APP_ID, &room);
        let sealed = text(&vector["sealed"]);
        let description = SealedDescription::parse(sealed).unwrap();
        assert_eq!(key.open(&description).unwrap(), text(&vector["plaintext"]));
        let iv: Vec<u8> = sealed.split('$').next().unwrap().split(',').map(|byte| byte.parse().unwrap()).collect();
        assert_eq!(key.seal(iv.try_into().unwrap(), text(&vector["plaintext"])), description);
        let other = SdpKey::derive("another password", APP_ID, &room);
        assert!(other.open(&description).is_err());
    }
    assert!(list(&vectors).iter().any(|vector| !text(&vector["password"]).is_empty()));
}

#[test]
fn frames_of_real_clients_reassemble_and_are_cut_the_same_way() {
    for vector in list(&fixture("frames.json")) {
        let name = text(&vector["name"]);
        let chunks: Vec<Vec<u8>> =
            list(&vector["chunks"]).iter().map(|chunk| hex::decode(text(chunk)).unwrap()).collect();
        let mut reassembler = Reassembler::new(Limits::default());
        let mut message = None;
        for (index, chunk) in chunks.iter().enumerate() {
            assert!(chunk.len() <= MAX_FRAME_BYTES);
            message = reassembler.push(&Frame::parse(chunk).unwrap()).unwrap();
            assert_eq!(message.is_some(), index + 1 == chunks.len(), "{name}, chunk {index}");
        }
        let (channel, content) = message.unwrap();
        assert_eq!(channel.as_str(), text(&vector["channel"]), "{name}");
        match &content {
            Content::Json(json) => {
                // A number or a string that changed on the way would show here.
                assert_eq!(Json::parse(json).unwrap().as_str(), json, "{name}");
                if let Some(expected) = vector.get("json") {
                    assert_eq!(&serde_json::from_str::<Value>(json).unwrap(), expected, "{name}");
                }
                if let Some(sha256) = vector.get("sha256") {
                    assert_eq!(hex::encode(Sha256::digest(json)), text(sha256), "{name}");
                }
            }
            Content::Text(string) => {
                let expected = vector.get("string").or(vector.get("bytes")).unwrap();
                assert_eq!(string, text(expected), "{name}");
            }
            Content::Binary { meta, bytes } => {
                assert_eq!(serde_json::from_str::<Value>(meta.as_ref().unwrap()).unwrap(), vector["meta"]);
                assert_eq!(Some(bytes.len() as u64), vector["length"].as_u64());
                assert_eq!(hex::encode(Sha256::digest(bytes)), text(&vector["sha256"]));
            }
        }
        // Deflate may differ from one library to the next; everything else is cut byte for byte as clients cut it.
        let deflated = chunks[0][13] & 16 != 0;
        let ours = Message::new(channel, content.clone());
        if !deflated {
            let nonce = chunks[0][12];
            let cut: Vec<Vec<u8>> = (0..ours.frames()).map(|index| ours.frame(nonce, index)).collect();
            assert_eq!(cut, chunks, "{name}");
        }
        let mut reassembler = Reassembler::new(Limits::default());
        let mut again = None;
        for index in 0..ours.frames() {
            let frame = ours.frame(9, index);
            assert_eq!(frame[13] & 16 != 0, deflated, "{name}");
            again = reassembler.push(&Frame::parse(&frame).unwrap()).unwrap();
        }
        assert_eq!(again, Some((channel, content)), "{name}");
    }
}

#[test]
fn a_captured_full_state_becomes_a_graph_and_prints_as_it_came() {
    let vectors = fixture("frames.json");
    let vector = list(&vectors).iter().find(|vector| vector.get("nodes").is_some()).unwrap();
    let mut reassembler = Reassembler::new(Limits::default());
    let mut message = None;
    for chunk in list(&vector["chunks"]) {
        message = reassembler.push(&Frame::parse(&hex::decode(text(chunk)).unwrap()).unwrap()).unwrap();
    }
    let Some((_, Content::Json(json))) = message else { panic!("not JSON") };
    let batch = Batch::parse(&json).unwrap();
    assert_eq!(batch.malformed, 0);
    assert_eq!(Batch::print(&batch.operations), json);
    let Operation::FullStateSync(state) = &batch.operations[0] else { panic!("not a state") };
    let mut graph = MemoryGraph::default();
    let merged = graph.merge(state, CAPTURED_MS);
    assert_eq!(Some(merged.nodes.len() as u64), vector["nodes"].as_u64());
    assert!(!merged.sender_lacks);
    // The same state again changes nothing.
    let again = graph.merge(state, CAPTURED_MS);
    assert_eq!((again.nodes.len(), again.sender_lacks), (0, false));
}

#[test]
fn what_two_clients_said_leads_both_to_the_same_graph() {
    let transcript = fixture("sync_transcript.json");
    let mut writer = MemoryGraph::default();
    let mut reloaded = MemoryGraph::default();
    let mut printed_alike = 0;
    for entry in list(&transcript["A"]) {
        let raw = entry["message"].to_string();
        let batch = Batch::parse(&raw).unwrap();
        assert_eq!(batch.malformed, 0);
        assert_eq!(
            serde_json::from_str::<Value>(&Batch::print(&batch.operations)).unwrap(),
            entry["message"],
            "an operation lost something"
        );
        printed_alike += 1;
        if entry["direction"] == "out" {
            for operation in &batch.operations {
                writer.apply(operation, CAPTURED_MS);
            }
        }
    }
    assert!(printed_alike > 5);
    let names: Vec<String> = writer.iter().map(|node| node.id.to_text()).collect();
    assert_eq!(names, ["n0", "n1", "n2", "n99"]);
    assert_eq!(writer.get("n0").unwrap().value.as_ref().unwrap().as_str(), r#"{"i":"upd"}"#);

    // The delta that the second client sent: its upsert of the removed node comes without a value.
    let delta = list(&transcript["B2"])
        .iter()
        .map(|entry| Batch::parse(&entry["message"].to_string()).unwrap())
        .find_map(|batch| match batch.operations.into_iter().next() {
            Some(Operation::DeltaSync(delta)) => Some(delta),
            _ => None,
        })
        .unwrap();
    let outcomes: Vec<Outcome> =
        delta.operations.iter().map(|operation| reloaded.apply(operation, CAPTURED_MS)).collect();
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Incomplete).count(), 1);
    assert_eq!(reloaded.get("n4"), None);
    assert_eq!(reloaded.get("n0").unwrap().edges, ["n1".into()]);

    // To the one that holds more, the delta brings nothing back, and nothing new.
    let before = writer.clone();
    for operation in &delta.operations {
        assert_ne!(writer.apply(operation, CAPTURED_MS), Outcome::Applied);
    }
    assert_eq!(writer, before);

    // Full states merge both ways into one.
    assert!(writer.merge(&reloaded.full_state(), CAPTURED_MS).sender_lacks);
    reloaded.merge(&writer.full_state(), CAPTURED_MS);
    assert_eq!(reloaded, writer);
    assert!(!writer.merge(&reloaded.full_state(), CAPTURED_MS).sender_lacks);
}

#[test]
fn signed_operations_keep_every_member_that_was_signed() {
    let vectors = fixture("signatures.json");
    for sample in list(&vectors["samples"]) {
        let raw = sample["operation"].to_string();
        let operation = Operation::parse(&raw, &mut 0).unwrap();
        let printed: Value = serde_json::from_str(&operation.to_string()).unwrap();
        assert_eq!(printed, sample["operation"]);
        assert_eq!(
            signature::signed_text(&raw, genosdb::json::Order::Sorted).unwrap(),
            text(&sample["signed_message"])
        );
        // It verifies as it came, and as it is printed again.
        for operation in [raw.clone(), operation.to_string()] {
            assert_eq!(signature::verify(&operation).unwrap().to_string(), text(&vectors["address"]));
        }
        // The first key of the vectors' mnemonic signs the very same way.
        let key = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80";
        let signed: Value = serde_json::from_str(&Identity::parse(key).unwrap().sign(&raw).unwrap()).unwrap();
        assert_eq!(signed, sample["operation"]);
    }
}

#[test]
fn cells_bridges_and_links_are_those_of_real_clients() {
    let peer = |id: &Value| PeerId::parse(text(id)).unwrap();
    for room in list(&fixture("cells.json")) {
        let roster: Vec<PeerId> = list(&room["roster"]).iter().map(peer).collect();
        assert!(roster.is_sorted(), "ids must order as JavaScript orders them");
        let topology = Topology::new(&roster, usize::try_from(room["cell_size"].as_u64().unwrap()).unwrap());
        assert_eq!(Some(topology.total_cells() as u64), room["total_cells"].as_u64());
        assert_eq!(Some(u64::from(topology.ttl())), room["ttl"].as_u64());
        assert!(!list(&room["peers"]).is_empty());
        for seen in list(&room["peers"]) {
            let id = peer(&seen["id"]);
            assert_eq!(topology.cell_of(&id).unwrap().to_string(), text(&seen["cell"]), "{id}");
            assert_eq!(Some(topology.is_bridge(&id)), seen["is_bridge"].as_bool(), "{id}");
            let mut links: Vec<PeerId> = list(&seen["links"]).iter().map(peer).collect();
            links.sort();
            assert_eq!(topology.links(&id), links, "{id} in {}", text(&seen["cell"]));
        }
    }
}
