//! What a GenosDB peer sends over its data channel: frames, and in them operations, envelopes and signatures. The input
//! is a run of frames, each behind its length in two bytes.
#![no_main]

use genosdb::frame::Frame;
use genosdb::governance::Rules;
use genosdb::query::Query;
use genosdb::roles::Roles;
use genosdb::security::{Attested, Change, Policy};
use genosdb::signature::Address;
use genosdb::{Batch, Content, Envelope, Limits, MemoryGraph, Operation, Reassembler, signature};

/// Any time of day will do.
const NOW_MS: u64 = 1_795_337_371_021;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { message_bytes: 1 << 20, unfinished_bytes: 1 << 20, ..Limits::default() };
    let mut reassembler = Reassembler::new(limits);
    let mut graph = MemoryGraph::default();
    let policy = Policy { super_admins: [].into(), roles: Roles::default(), acls: true };
    let Some(somebody) = Address::parse("0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266") else { return };
    let mut rest = bytes;
    while let Some((length, more)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(more.len());
        let (frame, more) = more.split_at(length);
        rest = more;
        let Ok(frame) = Frame::parse(frame) else { continue };
        let Ok(Some((_, content))) = reassembler.push(&frame) else { continue };
        let (Content::Json(text) | Content::Text(text) | Content::Binary { meta: Some(text), .. }) = content else {
            continue;
        };
        if let Ok(envelope) = Envelope::parse(&text) {
            let _ = envelope.letter();
            assert_eq!(Envelope::parse(&envelope.print()).as_ref(), Ok(&envelope));
        }
        let _ = signature::verify(&text);
        let _ = Query::parse(&text).map(|query| query.follows_edges());
        let _ = Rules::parse(&text, &policy).map(|rules| rules.wait());
        // What a room with super admins asks of each operation, whoever signed it.
        for (operation, raw) in Batch::parse_with_text(&text).map(|(operations, _)| operations).unwrap_or_default() {
            let attested = Attested::check(operation, raw);
            if let Some(change) = Change::of(&attested.operation) {
                let Ok(_) = policy.permits(&mut graph, somebody, change, NOW_MS);
            }
            if let Operation::FullStateSync(state) = &attested.operation {
                for node in &state.nodes {
                    let Ok(_) = policy.permits(&mut graph, somebody, Change::Node(node), NOW_MS);
                }
            }
        }
        let Ok(batch) = Batch::parse(&text) else { continue };
        for operation in &batch.operations {
            match operation {
                Operation::FullStateSync(state) => drop(graph.merge(state, NOW_MS)),
                Operation::DeltaSync(delta) => {
                    for operation in &delta.operations {
                        graph.apply(operation, NOW_MS);
                    }
                }
                other => drop(graph.apply(other, NOW_MS)),
            }
        }
        let printed = Batch::print(&batch.operations);
        assert_eq!(Batch::parse(&printed).map(|again| again.operations), Ok(batch.operations));
    }
});
