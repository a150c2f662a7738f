//! The dial ledger: what becomes of attempts to connect, as far as the relay that carries them can see.
//!
//! An offer goes to the topic of the peer it is for, and its answer comes back on the same two connections. A pair that
//! dials again soon has not connected, whether it was answered or not: clients give a dial up after 57 s (wire §2). So,
//! [`WINDOW`] after an offer: answered and not dialled again counts as connected.
//!
//! Nothing is kept but hashes, and of those a bounded number. The relay sees no data channel: what it counts as connected
//! may still have failed, if neither side tried again.

use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, Hash};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::event::Event;

/// How long after an offer a second one for the same pair means that the first has failed.
pub(crate) const WINDOW: Duration = Duration::from_secs(75);
/// Offers that cross within so long are one attempt: one side then ignores the other's.
const GLARE: Duration = Duration::from_secs(5);
/// An offer of a pair that comes again so soon is the same.
const REPEATED: Duration = Duration::from_secs(1);
/// Dials that are remembered. What comes beyond is counted as not watched.
const MAX_DIALS: usize = 65_536;

/// Dials of one connection to another that are watched at a time: a pair of pages has few rooms in common.
const MAX_PER_PAIR: usize = 64;

/// What became of a dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered, and not dialled again.
    Connected,
    /// Dialled again: it has failed.
    Redialled,
    /// Nobody answered.
    Unanswered,
}

impl Outcome {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Redialled => "redialled",
            Self::Unanswered => "unanswered",
        }
    }
}

/// What the ledger has to say about an event.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Noted {
    /// What became of earlier dials.
    pub(crate) outcomes: Vec<Outcome>,
    /// From an offer to its answer.
    pub(crate) answered_after: Option<Duration>,
    /// Whether a dial is not watched, since too many are.
    pub(crate) is_unwatched: bool,
}

/// Signalling content: Trystero's and GenosRTC's alike.
#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow, rename = "peerId")]
    peer: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "offerId")]
    offer_id: Option<Cow<'a, str>>,
    offer: Option<IgnoredAny>,
    answer: Option<IgnoredAny>,
}

/// Two connections, the dialling one first.
type Pair = (u64, u64);
/// Who dials whom: a hash of the peer's id, the target's topic, and the offer's id where there is one.
type Key = u64;

#[derive(Debug)]
struct Dial {
    offered: Instant,
    is_answered: bool,
    offer_id: Option<u64>,
    /// Tells it from a later dial of the same key.
    serial: u64,
}

#[derive(Debug, Default)]
struct State {
    dials: HashMap<Key, Dial>,
    /// Dials that nobody has answered, by who waits for whom.
    waiting: HashMap<Pair, VecDeque<(Key, u64)>>,
    /// In the order of their ends, which is that of their beginnings.
    ends: VecDeque<(Instant, Key, u64, Pair)>,
    next_serial: u64,
}

/// The ledger of a relay.
#[derive(Debug, Default)]
pub(crate) struct DialLedger {
    hasher: RandomState,
    state: Mutex<State>,
}

/// Whether an event may be an offer or an answer. Most of what passes here are announces, which are shorter than any
/// description and not looked into.
pub(crate) fn may_be_of_a_dial(event: &Event<'_>) -> bool {
    let content: &str = &event.content;
    event.is_ephemeral() && (content.contains("\"offer\"") || content.contains("\"answer\""))
}

impl DialLedger {
    /// Takes note of an event that came over `connection` and goes to `receivers`.
    pub(crate) fn note(&self, event: &Event<'_>, connection: u64, receivers: &[u64], now: Instant) -> Noted {
        let mut noted = Noted::default();
        let Some(topic) = event.only_topic() else { return noted };
        let Ok(content) = serde_json::from_str::<Content<'_>>(&event.content) else { return noted };
        let Some(peer) = content.peer else { return noted };
        let offer_id = content.offer_id.map(|id| self.hash(&*id));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.expire(now, &mut noted.outcomes);
        if content.offer.is_some() {
            let key = self.hash((&*peer, topic, event.kind));
            // A room's member listens once; should several listen, the first stands for the target.
            let target = receivers.iter().find(|receiver| **receiver != connection).copied();
            state.offer(key, offer_id, connection, target, now, &mut noted);
        } else if content.answer.is_some() {
            noted.answered_after =
                receivers.iter().find_map(|receiver| state.answer(offer_id, connection, *receiver, now));
        }
        noted
    }

    /// What has become of dials whose time is over.
    pub(crate) fn expire(&self, now: Instant) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        self.state.lock().unwrap_or_else(PoisonError::into_inner).expire(now, &mut outcomes);
        outcomes
    }

    fn hash(&self, value: impl Hash) -> u64 {
        self.hasher.hash_one(value)
    }
}

impl State {
    fn offer(
        &mut self,
        key: Key,
        offer_id: Option<u64>,
        from: u64,
        target: Option<u64>,
        now: Instant,
        noted: &mut Noted,
    ) {
        if let Some(earlier) = self.dials.get(&key) {
            let is_same = (offer_id.is_some() && earlier.offer_id == offer_id)
                || (!earlier.is_answered && now.duration_since(earlier.offered) < REPEATED);
            if is_same {
                return;
            }
            noted.outcomes.push(Outcome::Redialled);
        } else if self.dials.len() >= MAX_DIALS {
            noted.is_unwatched = true;
            return;
        }
        if let Some(target) = target
            && self.waits(target, from).is_some_and(|(_, offered)| now.duration_since(offered) < GLARE)
            && !self.dials.contains_key(&key)
        {
            // The other side has just dialled: one of the two offers is ignored, and the answer to the other is theirs.
            return;
        }
        // Nobody listens: it waits for an answer that cannot come.
        let pair = (from, target.unwrap_or(u64::MAX));
        let waiting = self.waiting.entry(pair).or_default();
        if waiting.len() >= MAX_PER_PAIR {
            // What is said of an earlier one stands; this one is not watched.
            self.dials.remove(&key);
            noted.is_unwatched = true;
            return;
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        waiting.push_back((key, serial));
        self.dials.insert(key, Dial { offered: now, is_answered: false, offer_id, serial });
        self.ends.push_back((now + WINDOW, key, serial, pair));
    }

    /// The oldest dial of `from` that waits for an answer of `to`, and when it was made.
    fn waits(&self, from: u64, to: u64) -> Option<(Key, Instant)> {
        self.waiting.get(&(from, to))?.iter().find_map(|(key, serial)| {
            let dial = self.dials.get(key).filter(|dial| dial.serial == *serial && !dial.is_answered)?;
            Some((*key, dial.offered))
        })
    }

    /// An answer came from `from` for `to`. Returns how long it took.
    fn answer(&mut self, offer_id: Option<u64>, from: u64, to: u64, now: Instant) -> Option<Duration> {
        let by_id = offer_id.and_then(|_| {
            let waiting = self.waiting.get(&(to, from))?;
            waiting
                .iter()
                .map(|(key, _)| *key)
                .find(|key| self.dials.get(key).is_some_and(|dial| dial.offer_id == offer_id && !dial.is_answered))
        });
        // Where offers have crossed, only the first of them is watched.
        let key = by_id.or_else(|| self.waits(to, from).or_else(|| self.waits(from, to)).map(|(key, _)| key))?;
        let dial = self.dials.get_mut(&key)?;
        dial.is_answered = true;
        Some(now.duration_since(dial.offered))
    }

    fn expire(&mut self, now: Instant, outcomes: &mut Vec<Outcome>) {
        while let Some(&(end, key, serial, pair)) = self.ends.front()
            && end <= now
        {
            self.ends.pop_front();
            if let Some(waiting) = self.waiting.get_mut(&pair) {
                waiting.retain(|(_, other)| *other != serial);
                if waiting.is_empty() {
                    self.waiting.remove(&pair);
                }
            }
            // One that was dialled again is counted already.
            if self.dials.get(&key).is_some_and(|dial| dial.serial == serial)
                && let Some(dial) = self.dials.remove(&key)
            {
                outcomes.push(if dial.is_answered { Outcome::Connected } else { Outcome::Unanswered });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A relay that carries signals between numbered connections; topic `t<n>` is that of connection n.
    struct Carrier {
        ledger: DialLedger,
        now: Instant,
    }

    impl Carrier {
        fn new() -> Self {
            Self { ledger: DialLedger::default(), now: Instant::now() }
        }

        fn says(&self, from: u64, topic: &str, content: String, receivers: &[u64]) -> Noted {
            let event = Event {
                id: [0; 32],
                pubkey: [0; 32],
                created_at: 0,
                kind: 20_001,
                tags: vec![vec!["x".into(), topic.to_owned().into()]],
                content: content.into(),
                sig: [0; 64],
            };
            self.ledger.note(&event, from, receivers, self.now)
        }

        fn offers(&self, from: u64, to: u64, room: &str) -> Noted {
            let content = format!(r#"{{"peerId":"peer{from}","offer":{{"type":"offer","sdp":"…"}}}}"#);
            self.says(from, &format!("{room}{to}"), content, &[to])
        }

        fn answers(&self, from: u64, to: u64, room: &str) -> Option<Duration> {
            let content = format!(r#"{{"peerId":"peer{from}","answer":{{"type":"answer","sdp":"…"}}}}"#);
            self.says(from, &format!("{room}{to}"), content, &[to]).answered_after
        }

        fn after(&mut self, seconds: u64) -> Vec<&'static str> {
            self.now += Duration::from_secs(seconds);
            self.ledger.expire(self.now).into_iter().map(Outcome::label).collect()
        }
    }

    #[test]
    fn what_is_answered_and_not_dialled_again_has_connected() {
        let mut carrier = Carrier::new();
        assert_eq!(carrier.offers(1, 2, "t"), Noted::default());
        carrier.now += Duration::from_millis(300);
        assert_eq!(carrier.answers(2, 1, "t"), Some(Duration::from_millis(300)));
        assert_eq!(carrier.answers(2, 1, "t"), None, "an answer counts once");
        assert!(carrier.after(74).is_empty());
        assert_eq!(carrier.after(1), ["connected"]);
        assert!(carrier.after(1_000).is_empty());
    }

    #[test]
    fn what_is_dialled_again_has_failed_and_what_nobody_answers_too() {
        let mut carrier = Carrier::new();
        carrier.offers(1, 2, "t");
        carrier.answers(2, 1, "t");
        carrier.after(60);
        assert_eq!(carrier.offers(1, 2, "t").outcomes, [Outcome::Redialled]);
        carrier.answers(2, 1, "t");
        assert!(carrier.after(20).is_empty(), "the first is counted already");
        assert_eq!(carrier.after(60), ["connected"]);
        carrier.offers(1, 3, "t");
        assert_eq!(carrier.after(75), ["unanswered"]);
        let content = r#"{"peerId":"peer1","offer":1}"#.to_owned();
        carrier.says(1, "nobody", content, &[]);
        assert_eq!(carrier.after(75), ["unanswered"]);
    }

    #[test]
    fn offers_that_cross_are_one_attempt_whoever_gives_way() {
        for answering in [1, 2] {
            let mut carrier = Carrier::new();
            carrier.offers(1, 2, "t");
            carrier.offers(2, 1, "t");
            let other = 3 - answering;
            assert!(carrier.answers(answering, other, "t").is_some());
            assert_eq!(carrier.after(75), ["connected"]);
        }
    }

    #[test]
    fn two_rooms_between_two_pages_are_two_dials() {
        let mut carrier = Carrier::new();
        carrier.offers(1, 2, "graph");
        carrier.offers(1, 2, "app");
        assert!(carrier.answers(2, 1, "app").is_some() && carrier.answers(2, 1, "graph").is_some());
        assert_eq!(carrier.after(75), ["connected", "connected"]);
    }

    #[test]
    fn trysteros_offers_are_told_apart_by_their_ids() {
        let mut carrier = Carrier::new();
        let offer = |id: &str| format!(r#"{{"peerId":"peer1","offerId":"{id}","offer":"sealed"}}"#);
        carrier.says(1, "t2", offer("a"), &[2]);
        carrier.now += Duration::from_secs(10);
        assert_eq!(carrier.says(1, "t2", offer("a"), &[2]).outcomes, [], "the same offer again is no second dial");
        assert_eq!(carrier.says(1, "t2", offer("b"), &[2]).outcomes, [Outcome::Redialled]);
        let answer = r#"{"peerId":"peer2","offerId":"b","answer":"sealed"}"#.to_owned();
        assert_eq!(carrier.says(2, "t1", answer, &[1]).answered_after, Some(Duration::ZERO));
        assert_eq!(carrier.after(75), ["connected"]);
    }

    #[test]
    fn what_is_no_dial_is_not_noted_and_what_is_kept_is_bounded() {
        let mut carrier = Carrier::new();
        for content in [r#"{"peerId":"a"}"#, "\"offer\"", "{\"offer\":1}", "{\"peerId\":1,\"offer\":1}", "["] {
            assert_eq!(carrier.says(1, "t", content.to_owned(), &[2]), Noted::default());
        }
        assert!(carrier.after(1_000).is_empty());
        for peer in 0..MAX_PER_PAIR + 1 {
            let noted = carrier.says(1, "t", format!(r#"{{"peerId":"p{peer}","offer":1}}"#), &[2]);
            assert_eq!(noted.is_unwatched, peer == MAX_PER_PAIR);
        }
        assert_eq!(carrier.after(75).len(), MAX_PER_PAIR);
        for peer in 0..MAX_DIALS + 1 {
            let target = u64::try_from(peer).unwrap() + 10;
            let noted = carrier.says(1, "t", format!(r#"{{"peerId":"p{peer}","offer":1}}"#), &[target]);
            assert_eq!(noted.is_unwatched, peer == MAX_DIALS);
        }
        assert_eq!(carrier.after(75).len(), MAX_DIALS);
        let state = carrier.ledger.state.lock().unwrap();
        assert!(state.dials.is_empty() && state.waiting.is_empty() && state.ends.is_empty());
    }
}
