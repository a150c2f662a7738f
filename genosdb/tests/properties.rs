//! What must hold for any input.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use genosdb::frame::Frame;
use genosdb::{Batch, Content, Hlc, Json, Limits, MemoryGraph, Message, Operation, Reassembler};
use proptest::prelude::*;

const NOW_MS: u64 = 1_795_337_800_000;

fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_filter("finite", |number| number.is_finite()).prop_map(Into::into),
        any::<String>().prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Into::into),
            prop::collection::btree_map(any::<String>(), inner, 0..8)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Operations on few nodes, with timestamps that nobody else gives out.
fn operations() -> impl Strategy<Value = Vec<Operation>> {
    prop::collection::vec((0..3u8, 0..5u8, 0..5u8), 1..40).prop_map(|drawn| {
        drawn
            .into_iter()
            .enumerate()
            .map(|(index, (kind, one, other))| {
                let at = format!(r#"{{"physical":{},"logical":{index}}}"#, NOW_MS - 1000 + index as u64);
                let text = match kind {
                    0 => format!(r#"{{"type":"upsert","id":"n{one}","value":{index},"timestamp":{at}}}"#),
                    1 => format!(r#"{{"type":"remove","id":"n{one}","timestamp":{at}}}"#),
                    _ => format!(r#"{{"type":"link","sourceId":"n{one}","targetId":"n{other}","timestamp":{at}}}"#),
                };
                Operation::parse(&text, &mut 0).unwrap()
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn printing_is_stable_and_means_the_same(value in json()) {
        let printed = Json::parse(&value.to_string()).unwrap();
        prop_assert_eq!(Json::parse(printed.as_str()).unwrap(), printed.clone());
        let back: serde_json::Value = serde_json::from_str(printed.as_str()).unwrap();
        prop_assert!(alike(&back, &value), "{} became {}", value, back);
    }

    #[test]
    fn no_text_makes_a_parser_panic(text in any::<String>()) {
        let _ = Json::parse(&text);
        let _ = Batch::parse(&text);
        let _ = genosdb::Signal::parse(&text);
        let _ = genosdb::Envelope::parse(&text).map(|envelope| envelope.letter());
    }

    #[test]
    fn no_bytes_make_the_reassembler_panic(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..32)) {
        let mut reassembler = Reassembler::new(Limits::default());
        for bytes in &frames {
            if let Ok(frame) = Frame::parse(bytes) {
                let _ = reassembler.push(&frame);
            }
        }
    }

    #[test]
    fn a_message_survives_its_frames(bytes in prop::collection::vec(any::<u8>(), 0..70_000), nonce in any::<u8>()) {
        let channel = genosdb::ChannelName::new("files").unwrap();
        let content = Content::Binary { meta: None, bytes };
        let message = Message::new(channel, content.clone());
        let mut reassembler = Reassembler::new(Limits::default());
        let mut got = None;
        for index in 0..message.frames() {
            let frame = message.frame(nonce, index);
            got = reassembler.push(&Frame::parse(&frame).unwrap()).unwrap();
        }
        prop_assert_eq!(got, Some((channel, content)));
    }

    #[test]
    fn operations_that_come_again_and_again_change_nothing_any_more(operations in operations()) {
        let play = |graph: &mut MemoryGraph| {
            for operation in &operations {
                graph.apply(operation, NOW_MS);
            }
        };
        let mut graph = MemoryGraph::default();
        play(&mut graph);
        // A link that came before its source was there finds it now.
        play(&mut graph);
        let twice = graph.clone();
        play(&mut graph);
        prop_assert_eq!(graph, twice);
    }

    #[test]
    fn full_states_exchanged_both_ways_leave_both_sides_equal(left in operations(), right in operations()) {
        let play = |operations: &[Operation], offset: u64| {
            let mut graph = MemoryGraph::default();
            for operation in operations {
                graph.apply(&shifted(operation, offset), NOW_MS);
            }
            graph
        };
        let (mut left, mut right) = (play(&left, 0), play(&right, 100));
        right.merge(&left.full_state(), NOW_MS);
        left.merge(&right.full_state(), NOW_MS);
        prop_assert_eq!(unordered(&left), unordered(&right));
        prop_assert!(!right.merge(&left.full_state(), NOW_MS).sender_lacks);
        prop_assert!(!left.merge(&right.full_state(), NOW_MS).sender_lacks);
    }
}

/// The nodes of a graph; edges that were missed are added behind the others, and so have no order.
fn unordered(graph: &MemoryGraph) -> Vec<genosdb::Node> {
    let sorted = |node: &genosdb::Node| {
        let mut node = node.clone();
        node.edges.sort();
        node
    };
    graph.iter().map(sorted).collect()
}

/// The operation with another logical time, so that two writers never stamp alike.
fn shifted(operation: &Operation, offset: u64) -> Operation {
    let mut operation = operation.clone();
    let (Operation::Upsert(genosdb::operation::Upsert { timestamp, .. })
    | Operation::Remove(genosdb::operation::Remove { timestamp, .. })
    | Operation::Link(genosdb::operation::Link { timestamp, .. })) = &mut operation
    else {
        return operation;
    };
    *timestamp = Hlc::new(timestamp.physical, timestamp.logical + offset);
    operation
}

/// Equal as JavaScript sees it: every number is a double, and -0 prints as 0.
fn alike(one: &serde_json::Value, other: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| alike(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len() && one.iter().all(|(key, value)| other.get(key).is_some_and(|it| alike(value, it)))
        }
        _ => one == other,
    }
}
