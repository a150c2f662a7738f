//! Who is present under which topic, and how often their announces are passed on.
//!
//! Every peer of a room says "I am here" every 2.5 s to every other: N peers cost 0.4 N² deliveries a second. A
//! peer that is known to be present does not have to be announced that often. So, for ephemeral events whose content
//! is exactly an announce, and as a deliberate deviation from NIP-01:
//!
//! - an author's first announce on a topic reaches everybody; repeated ones reach each subscriber about once per
//!   interval, which grows with the number of peers so that a subscriber gets no more announces than the budget says;
//! - a new subscriber gets the latest announce of everybody who is present, instead of waiting for the next.
//!
//! No state is kept per pair of peers. Time is cut into intervals, shifted for each pair by a hash: an announce is
//! passed on when a cut lies between it and the author's previous one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::event::Event;

/// How often clients announce themselves.
const ANNOUNCE_PERIOD: Duration = Duration::from_millis(2_500);
/// An author that was not heard for so long is no longer present: tabs in the background announce once a minute.
const GONE_AFTER: Duration = Duration::from_secs(150);
/// Announces that are remembered, over all topics. Beyond, authors are passed on as any relay would.
const MAX_PRESENT: usize = 200_000;

/// How announces are economised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnnounceEconomy {
    /// Announces a second that one subscriber gets per topic; 0 passes every announce on. Default 50.
    pub budget: u32,
    /// The longest interval between two announces of one author to one subscriber. Default 30 s.
    pub max_interval: Duration,
}

impl Default for AnnounceEconomy {
    fn default() -> Self {
        Self { budget: 50, max_interval: Duration::from_secs(30) }
    }
}

impl AnnounceEconomy {
    /// The interval between two announces of one author to one subscriber, among `present` authors.
    fn interval(&self, present: usize) -> Duration {
        let per_subscriber = f64::from(u32::try_from(present).unwrap_or(u32::MAX)) / f64::from(self.budget.max(1));
        Duration::from_secs_f64(per_subscriber).min(self.max_interval).max(ANNOUNCE_PERIOD)
    }
}

/// An author under a topic (an `x` value), for [`Presence::leave`] and [`Presence::latest`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct PresentKey {
    topic: Arc<str>,
    author: Author,
}

impl PresentKey {
    pub(crate) fn topic(&self) -> &str {
        &self.topic
    }

    pub(crate) fn kind(&self) -> u16 {
        self.author.0
    }
}

/// A kind and a public key.
type Author = (u16, [u8; 32]);

/// What an event says about presence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Saying<'a> {
    Announce { peer: &'a str },
    Bye,
    Other,
}

#[derive(Debug)]
struct Present {
    /// The latest announce, as its author sent it.
    latest: Arc<str>,
    peer: Box<str>,
    heard: Instant,
    connection: u64,
}

#[derive(Debug, Default)]
struct State {
    topics: HashMap<Arc<str>, HashMap<Author, Present>>,
    present: usize,
}

/// Whom an event goes to, of those that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Everybody.
    All,
    /// Those for whom a cut lies between the two moments, in ms since the relay started.
    Due { author: u64, previous_ms: u64, now_ms: u64, interval_ms: u64 },
}

impl Audience {
    /// Whether the subscription called `serial` is due.
    pub(crate) fn includes(&self, serial: u64) -> bool {
        match *self {
            Self::All => true,
            Self::Due { author, previous_ms, now_ms, interval_ms } => {
                let shift = mix(author ^ mix(serial)) % interval_ms;
                (previous_ms + shift) / interval_ms != (now_ms + shift) / interval_ms
            }
        }
    }
}

/// Spreads the bits of a number (the finaliser of SplitMix64).
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The presence of all topics.
#[derive(Debug)]
pub(crate) struct Presence {
    economy: AnnounceEconomy,
    start: Instant,
    state: Mutex<State>,
}

impl Presence {
    pub(crate) fn new(economy: AnnounceEconomy, start: Instant) -> Self {
        Self { economy, start, state: Mutex::default() }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.economy.budget > 0
    }

    /// Announces a second that one subscriber gets per topic.
    pub(crate) fn budget(&self) -> usize {
        usize::try_from(self.economy.budget).unwrap_or(usize::MAX)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many authors are present, over all topics.
    pub(crate) fn len(&self) -> usize {
        self.lock().present
    }

    /// Takes note of an event that came over `connection`, which `may_join` more authors or not. Returns whom the event
    /// goes to, and the author's key when it has just become present.
    pub(crate) fn hear(
        &self,
        event: &Event<'_>,
        raw: &Arc<str>,
        connection: u64,
        may_join: bool,
        now: Instant,
    ) -> (Audience, Option<PresentKey>) {
        if !self.is_on() {
            return (Audience::All, None);
        }
        let saying = saying(&event.content);
        let Some(topic) = (saying != Saying::Other).then(|| event.only_topic()).flatten() else {
            return (Audience::All, None);
        };
        let author = (event.kind, event.pubkey);
        let mut state = self.lock();
        let Saying::Announce { peer } = saying else {
            state.remove(&PresentKey { topic: topic.into(), author });
            return (Audience::All, None);
        };
        let known = state.topics.get_mut(topic).and_then(|authors| {
            let count = authors.len();
            Some((count, authors.get_mut(&author)?))
        });
        if let Some((count, known)) = known {
            let previous = std::mem::replace(&mut known.heard, now);
            known.latest = Arc::clone(raw);
            known.connection = connection;
            // Another peer under the same key, or one that was gone, is a new peer.
            if *known.peer != *peer || now - previous >= GONE_AFTER {
                known.peer = peer.into();
                return (Audience::All, Some(PresentKey { topic: topic.into(), author }));
            }
            let interval = self.economy.interval(count);
            if interval <= ANNOUNCE_PERIOD {
                return (Audience::All, None);
            }
            let audience = Audience::Due {
                author: u64::from_le_bytes(std::array::from_fn(|index| event.pubkey[index])),
                previous_ms: self.ms(previous),
                now_ms: self.ms(now),
                interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
            };
            return (audience, None);
        }
        if !may_join || state.present >= MAX_PRESENT {
            return (Audience::All, None);
        }
        let topic: Arc<str> = topic.into();
        let present = Present { latest: Arc::clone(raw), peer: peer.into(), heard: now, connection };
        state.topics.entry(Arc::clone(&topic)).or_default().insert(author, present);
        state.present += 1;
        (Audience::All, Some(PresentKey { topic, author }))
    }

    fn ms(&self, at: Instant) -> u64 {
        u64::try_from((at - self.start).as_millis()).unwrap_or(u64::MAX)
    }

    /// The authors that are present under a topic, but for those of `connection` itself.
    pub(crate) fn present(&self, topic: &str, connection: u64, now: Instant) -> Vec<PresentKey> {
        let state = self.lock();
        let Some((topic, authors)) = state.topics.get_key_value(topic) else { return Vec::new() };
        authors
            .iter()
            .filter(|(_, present)| now - present.heard < GONE_AFTER && present.connection != connection)
            .map(|(author, _)| PresentKey { topic: Arc::clone(topic), author: *author })
            .collect()
    }

    /// The latest announce of an author, if it is still there.
    pub(crate) fn latest(&self, key: &PresentKey) -> Option<Arc<str>> {
        let state = self.lock();
        Some(Arc::clone(&state.topics.get(&key.topic)?.get(&key.author)?.latest))
    }

    /// A connection is gone, and with it who announced itself over it. Returns who is no longer present.
    pub(crate) fn leave(&self, connection: u64, keys: impl IntoIterator<Item = PresentKey>) -> Vec<PresentKey> {
        let mut state = self.lock();
        let mut gone = Vec::new();
        for key in keys {
            // It may have come back over another connection meanwhile.
            let there = state.topics.get(&key.topic).and_then(|authors| authors.get(&key.author));
            if there.is_some_and(|present| present.connection == connection) {
                state.remove(&key);
                gone.push(key);
            }
        }
        gone
    }

    /// Forgets who came over `connection` and was not heard for long: of neighbours, nobody says that they are gone when
    /// they fail.
    pub(crate) fn tidy(&self, connection: u64, now: Instant) {
        let mut state = self.lock();
        let mut removed = 0;
        state.topics.retain(|_, authors| {
            let before = authors.len();
            authors.retain(|_, present| present.connection != connection || now - present.heard < GONE_AFTER);
            removed += before - authors.len();
            !authors.is_empty()
        });
        state.present -= removed;
    }
}

impl State {
    fn remove(&mut self, key: &PresentKey) {
        let Some(authors) = self.topics.get_mut(&key.topic) else { return };
        self.present -= usize::from(authors.remove(&key.author).is_some());
        if authors.is_empty() {
            self.topics.remove(&key.topic);
        }
    }
}

/// Whether content is exactly `{"peerId":"…"}`, or that with a bye.
fn saying(content: &str) -> Saying<'_> {
    let Some((peer, rest)) = content.strip_prefix(r#"{"peerId":""#).and_then(|rest| rest.split_once('"')) else {
        return Saying::Other;
    };
    let plausible = (1..=64).contains(&peer.len()) && peer.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match rest {
        "}" if plausible => Saying::Announce { peer },
        _ if plausible && rest.starts_with(r#","bye":"#) => Saying::Bye,
        _ => Saying::Other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIND: u16 = 22_718;

    fn event(author: u8, content: &str) -> Event<'_> {
        Event {
            id: [0; 32],
            pubkey: [author; 32],
            created_at: 0,
            kind: KIND,
            tags: vec![vec!["x".into(), "topic".into()]],
            content: content.into(),
            sig: [0; 64],
        }
    }

    fn announce(peer: u8) -> String {
        format!(r#"{{"peerId":"peer{peer}"}}"#)
    }

    fn economy(budget: u32) -> AnnounceEconomy {
        AnnounceEconomy { budget, max_interval: Duration::from_secs(30) }
    }

    fn raw(text: &str) -> Arc<str> {
        text.into()
    }

    #[test]
    fn only_exact_announces_and_byes_are_taken_for_them() {
        assert_eq!(saying(r#"{"peerId":"abc"}"#), Saying::Announce { peer: "abc" });
        assert_eq!(saying(r#"{"peerId":"abc","bye":1}"#), Saying::Bye);
        for content in [
            "",
            "{}",
            r#"{"peerId":""}"#,
            r#"{"peerId":"a b"}"#,
            r#"{"peerId":"abc"} "#,
            r#"{"peerId":1}"#,
            r#"{"peerId":"abc","offer":{}}"#,
            r#"{"peerId":"abc","answer":{}}"#,
            r#"{"peer":"abc"}"#,
        ] {
            assert_eq!(saying(content), Saying::Other, "{content}");
        }
    }

    #[test]
    fn the_interval_grows_with_the_room_within_its_bounds() {
        let economy = economy(50);
        for (present, seconds) in [(1, 2.5), (125, 2.5), (500, 10.0), (1_000, 20.0), (1_500, 30.0), (10_000, 30.0)] {
            assert_eq!(economy.interval(present), Duration::from_secs_f64(seconds), "{present}");
        }
    }

    #[test]
    fn who_says_bye_or_loses_its_connection_is_no_longer_present() {
        let now = Instant::now();
        let presence = Presence::new(economy(50), now);
        let mut keys = Vec::new();
        for author in 0..4 {
            let content = announce(author);
            let (audience, key) = presence.hear(&event(author, &content), &raw("latest"), u64::from(author), true, now);
            assert_eq!(audience, Audience::All);
            keys.push(key.unwrap());
        }
        assert_eq!(presence.present("topic", 99, now).len(), 4);
        let (audience, _) = presence.hear(&event(0, r#"{"peerId":"peer0","bye":1}"#), &raw("bye"), 0, true, now);
        assert_eq!(audience, Audience::All);
        presence.leave(1, [keys[1].clone()]);
        // Not the connection that it was last heard over.
        presence.leave(77, [keys[2].clone()]);
        let present = presence.present("topic", 99, now);
        assert_eq!((present.len(), presence.len()), (2, 2));
        assert!(present.iter().all(|key| presence.latest(key).is_some()));
        assert_eq!(presence.present("topic", 3, now).len(), 1, "its own announces are no news to a connection");
        assert_eq!(presence.latest(&keys[0]), None);
        assert!(presence.present("topic", 99, now + GONE_AFTER).is_empty());
    }

    #[test]
    fn with_a_budget_of_nothing_every_announce_is_for_everybody() {
        let now = Instant::now();
        let presence = Presence::new(economy(0), now);
        for _ in 0..3 {
            assert_eq!(presence.hear(&event(1, &announce(1)), &raw(""), 1, true, now), (Audience::All, None));
        }
        assert_eq!(presence.len(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn nobody_is_late_and_no_subscriber_gets_much_more_than_the_budget(
            peers in 2..120u8,
            budget in 1..20u32,
            jitter in prop::collection::vec(0..2_500u64, 120),
        ) {
            let start = Instant::now();
            let economy = economy(budget);
            let presence = Presence::new(economy, start);
            let interval = economy.interval(usize::from(peers));
            let subscribers: Vec<u64> = (0..40).map(|number| number * 7 + 3).collect();
            let mut last: HashMap<(u8, u64), Instant> = HashMap::new();
            let mut delivered = 0u32;
            let rounds = 60u64;
            for round in 0..rounds {
                for author in 0..peers {
                    let at = start + Duration::from_millis(2_500 * round + jitter[usize::from(author)]);
                    let (audience, _) = presence.hear(&event(author, &announce(author)), &raw(""), 1, true, at);
                    // First announces reach everybody.
                    prop_assert!(round > 0 || audience == Audience::All);
                    for subscriber in &subscribers {
                        if audience.includes(*subscriber) {
                            last.insert((author, *subscriber), at);
                            delivered += u32::from(round > 0);
                        }
                        // Heard within the interval, give or take one announce.
                        let gap = at - last[&(author, *subscriber)];
                        prop_assert!(gap <= interval + ANNOUNCE_PERIOD, "{:?} of {:?}", gap, interval);
                    }
                    for other in [r#"{"peerId":"x","offer":{}}"#, r#"{"peerId":"x","answer":{}}"#] {
                        prop_assert_eq!(presence.hear(&event(author, other), &raw(""), 1, true, at).0, Audience::All);
                    }
                }
            }
            let seconds = 2.5 * (rounds - 1) as f64;
            let each = f64::from(delivered) / subscribers.len() as f64 / seconds;
            let allowed = f64::from(peers) / interval.as_secs_f64();
            prop_assert!(each <= allowed * 1.3 + 1.0, "{} of {}", each, allowed);
        }
    }
}
