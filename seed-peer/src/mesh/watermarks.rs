//! From when on a peer is to be asked for what it has, when it is linked again.
//!
//! What a peer had sent just before its link broke is lost, and asking for what is newer than the newest we know does not
//! bring it back: others have written meanwhile. A client answers with its last operations, or with its whole state when it
//! is asked for more than those (wire §4). So a peer is asked from where we were last sure to know all that it knew. The
//! channel is reliable and in order: once a peer has answered on a link, we know all that it knew up to the last thing
//! that came over it.

use std::collections::{HashMap, VecDeque};

use genosdb::{Hlc, Operation, PeerId};

/// Peers that are remembered in one room.
const REMEMBERED: usize = 4_096;
/// How many peers are asked from before the seed was started. What was on its way when it ended, several will know.
const ASKED_FROM_BEFORE: usize = 3;
/// How long before the end of an earlier process something may have been on its way.
const ON_ITS_WAY_MS: u64 = 60_000;

/// What is known of the peers of one room that were linked before.
#[derive(Debug, Default)]
pub(crate) struct Watermarks {
    known: HashMap<PeerId, Hlc>,
    /// In the order in which they were first remembered.
    order: VecDeque<PeerId>,
    /// The newest that the archive held when the room was entered, and how many more are to be asked from before that.
    before: Option<(Hlc, usize)>,
}

impl Watermarks {
    /// The room is entered with an archive whose newest is `latest`.
    pub(crate) fn new(latest: Option<Hlc>) -> Self {
        Self { before: latest.map(|latest| (latest, ASKED_FROM_BEFORE)), ..Self::default() }
    }

    /// What to ask `peer` for, now that the newest we know is `latest`; `None` is everything.
    pub(crate) fn ask_from(&mut self, peer: &PeerId, latest: Option<Hlc>) -> Option<Hlc> {
        if let Some(known) = self.known.get(peer) {
            return latest.min(Some(*known));
        }
        match &mut self.before {
            Some((before, left)) if *left > 0 => {
                *left -= 1;
                let physical = before.physical.saturating_sub(ON_ITS_WAY_MS);
                latest.min(Some(Hlc { physical, ..*before }))
            }
            _ => latest,
        }
    }

    /// A link has ended on which `peer` was known up to `until`.
    pub(crate) fn unlinked(&mut self, peer: PeerId, until: Hlc) {
        if let Some(known) = self.known.get_mut(&peer) {
            *known = until.max(*known);
            return;
        }
        self.known.insert(peer, until);
        self.order.push_back(peer);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

/// What one link has brought of what its peer knows.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// From when on the peer was asked; `None` is everything.
    asked: Option<Hlc>,
    /// Whether it has answered.
    is_complete: bool,
    until: Option<Hlc>,
}

impl Heard {
    /// The peer was asked.
    pub(crate) fn asked(&mut self, from: Option<Hlc>) {
        *self = Self { asked: from, is_complete: false, until: None };
    }

    /// Takes note of what came over the link.
    pub(crate) fn hear(&mut self, operation: &Operation) {
        let until = match operation {
            Operation::FullStateSync(full) => {
                self.is_complete = true;
                full.timestamp
            }
            Operation::DeltaSync(delta) => {
                // It may be the answer to somebody else, who asked for less.
                let first = delta.operations.first().and_then(timestamp);
                self.is_complete |= first.is_none_or(|first| self.asked.is_some_and(|asked| first <= asked));
                delta.timestamp
            }
            live => timestamp(live),
        };
        self.until = self.until.max(until);
    }

    /// Up to when everything is known that the peer knew.
    pub(crate) fn until(&self) -> Option<Hlc> {
        self.until.filter(|_| self.is_complete)
    }
}

fn timestamp(operation: &Operation) -> Option<Hlc> {
    match operation {
        Operation::Upsert(upsert) => Some(upsert.timestamp),
        Operation::Remove(remove) => Some(remove.timestamp),
        Operation::Link(link) => Some(link.timestamp),
        Operation::Sync(_) | Operation::DeltaSync(_) | Operation::FullStateSync(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(physical: u64) -> String {
        format!(r#"{{"type":"upsert","id":"a","value":1,"timestamp":{{"physical":{physical},"logical":1}}}}"#)
    }

    fn operation(text: &str) -> Operation {
        Operation::parse(text, &mut 0).unwrap()
    }

    fn peer(last: char) -> PeerId {
        PeerId::parse(&format!("0000000000000000000{last}")).unwrap()
    }

    #[test]
    fn who_was_linked_is_asked_from_the_last_that_came_and_a_stranger_for_what_is_new() {
        let at = |physical| Some(Hlc::new(physical, 1));
        let mut heard = Heard::default();
        heard.asked(at(100));
        heard.hear(&operation(&put(110)));
        assert_eq!(heard.until(), None, "it has not answered yet");
        // The answer to somebody who knew more.
        let delta = |first| {
            let operations = format!("[{},{}]", put(first), put(118));
            let end = r#""timestamp":{"physical":120,"logical":1}}"#;
            operation(&format!(r#"{{"type":"deltaSync","operations":{operations},{end}"#))
        };
        heard.hear(&delta(105));
        assert_eq!(heard.until(), None);
        heard.hear(&delta(90));
        assert_eq!(heard.until(), at(120));
        heard.hear(&operation(&put(130)));
        assert_eq!(heard.until(), at(130));

        let mut marks = Watermarks::default();
        marks.unlinked(peer('a'), Hlc::new(130, 1));
        assert_eq!(marks.ask_from(&peer('a'), at(500)), at(130));
        assert_eq!(marks.ask_from(&peer('b'), at(500)), at(500));
        assert_eq!(marks.ask_from(&peer('b'), None), None);
    }

    #[test]
    fn the_first_after_a_start_are_asked_from_before_it() {
        let latest = Some(Hlc::new(200_000, 7));
        let mut marks = Watermarks::new(latest);
        for _ in 0..ASKED_FROM_BEFORE {
            assert_eq!(marks.ask_from(&peer('a'), latest), Some(Hlc::new(140_000, 7)));
        }
        assert_eq!(marks.ask_from(&peer('a'), latest), latest);
        assert_eq!(Watermarks::new(None).ask_from(&peer('a'), None), None);
    }

    #[test]
    fn not_more_than_so_many_are_remembered() {
        let mut marks = Watermarks::default();
        let many = |number: usize| PeerId::parse(&format!("{number:020}")).unwrap();
        for number in 0..REMEMBERED + 10 {
            marks.unlinked(many(number), Hlc::new(1, 1));
        }
        assert_eq!((marks.known.len(), marks.order.len()), (REMEMBERED, REMEMBERED));
    }
}
