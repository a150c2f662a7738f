//! Whom the relay serves: everybody, the rooms of its owner, or the keys on a list.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use genosdb::{Room, Signal};

use crate::event::Event;

/// The kind of an event that answers a challenge (NIP-42).
const AUTH_KIND: u16 = 22_242;
/// How far the clock of a client that answers a challenge may be off, in seconds (NIP-42 suggests ten minutes).
const AUTH_WINDOW_SECONDS: u64 = 600;
/// A peer's own topic is served for so long after its last announce.
const LEARNED_FOR: Duration = Duration::from_secs(600);
/// Own topics that are remembered.
const MAX_LEARNED: usize = 200_000;

/// Whom the relay serves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Admission {
    /// Everybody.
    #[default]
    Open,
    /// Everybody, on the topics of these databases alone.
    Rooms(Vec<String>),
    /// Clients that prove one of these public keys (NIP-42).
    Auth(BTreeSet<[u8; 32]>),
}

/// Why an event or a subscription is not admitted; the message goes to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAdmitted {
    #[error("blocked: this relay serves the rooms of its owner only")]
    OtherRoom,
    #[error("auth-required: this relay serves clients that it knows")]
    AuthRequired,
}

/// Decides who is served.
#[derive(Debug)]
pub(crate) enum Gate {
    Open,
    Rooms(RoomGate),
    Auth(BTreeSet<[u8; 32]>),
}

impl Gate {
    pub(crate) fn new(admission: Admission) -> Self {
        match admission {
            Admission::Open => Self::Open,
            Admission::Rooms(databases) => Self::Rooms(RoomGate::new(&databases)),
            Admission::Auth(keys) => Self::Auth(keys),
        }
    }

    /// Serves the rooms of a database from now on, or no longer. Means nothing unless rooms are what is served.
    pub(crate) fn set_served(&self, database: &str, served: bool) {
        if let Self::Rooms(rooms) = self {
            rooms.set_served(database, served);
        }
    }

    /// Whether everybody is served.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::Open)
    }

    /// Whether clients must prove who they are.
    pub(crate) fn asks_for_proof(&self) -> bool {
        matches!(self, Self::Auth(_))
    }

    /// Whether a client that has proven `key`, or none, may publish and subscribe at all.
    pub(crate) fn admits_client(&self, key: Option<&[u8; 32]>) -> Result<(), NotAdmitted> {
        match self {
            Self::Auth(keys) if !key.is_some_and(|key| keys.contains(key)) => Err(NotAdmitted::AuthRequired),
            _ => Ok(()),
        }
    }

    /// Whether an event is about something that the relay serves.
    pub(crate) fn admits_event(&self, event: &Event<'_>, now: Instant) -> Result<(), NotAdmitted> {
        match self {
            Self::Rooms(rooms) if !rooms.serves(event, now) => Err(NotAdmitted::OtherRoom),
            _ => Ok(()),
        }
    }

    /// Takes note of a verified event.
    pub(crate) fn learn(&self, event: &Event<'_>, now: Instant) {
        if let Self::Rooms(rooms) = self {
            rooms.learn(event, now);
        }
    }

    /// Whether `event` proves its author's key against `challenge`, to a relay that goes by one of the names in `hosts`
    /// (NIP-42). The event is verified already.
    pub(crate) fn accepts_proof(
        &self,
        event: &Event<'_>,
        challenge: &str,
        hosts: &[String],
        now_seconds: u64,
    ) -> Result<(), &'static str> {
        let tag = |name: &str| {
            let found = event.tags.iter().find(|tag| tag.first().is_some_and(|first| first == name));
            found.and_then(|tag| tag.get(1)).map(AsRef::as_ref)
        };
        if event.kind != AUTH_KIND {
            return Err("invalid: not an event of kind 22242");
        }
        if tag("challenge") != Some(challenge) {
            return Err("invalid: the challenge is another");
        }
        if event.created_at.abs_diff(now_seconds) > AUTH_WINDOW_SECONDS {
            return Err("invalid: created too long ago, or in the future");
        }
        let named = tag("relay").and_then(host_of);
        if !named.is_some_and(|named| hosts.iter().any(|host| host.eq_ignore_ascii_case(named))) {
            return Err("invalid: meant for another relay");
        }
        match self {
            Self::Auth(keys) if !keys.contains(&event.pubkey) => Err("restricted: this key is not on the list"),
            _ => Ok(()),
        }
    }
}

/// Host and port of a relay's address.
pub(crate) fn host_of(url: &str) -> Option<&str> {
    let rest = url.strip_prefix("wss://").or_else(|| url.strip_prefix("ws://"))?;
    rest.split(['/', '?', '#']).next().filter(|host| !host.is_empty())
}

/// Serves configured rooms: their root topics, and the own topics of the peers that announced themselves there.
#[derive(Debug)]
pub(crate) struct RoomGate {
    /// By root topic.
    roots: RwLock<HashMap<String, Room>>,
    learned: Mutex<HashMap<String, Instant>>,
}

impl RoomGate {
    fn new(databases: &[String]) -> Self {
        let gate = Self { roots: RwLock::default(), learned: Mutex::default() };
        databases.iter().for_each(|name| gate.set_served(name, true));
        gate
    }

    fn set_served(&self, database: &str, served: bool) {
        let mut roots = self.roots.write().unwrap_or_else(PoisonError::into_inner);
        for room in [Room::graph_sync(database), Room::app_sync(database)] {
            let root = room.root_topic().as_str().to_owned();
            if served {
                roots.insert(root, room);
            } else {
                roots.remove(&root);
            }
        }
    }

    fn serves(&self, event: &Event<'_>, now: Instant) -> bool {
        let topics = || event.letter_tags().filter(|(letter, _)| *letter == b'x').map(|(_, topic)| topic);
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        if topics().any(|topic| roots.contains_key(topic)) {
            return true;
        }
        let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        topics().any(|topic| learned.get(topic).is_some_and(|at| now - *at < LEARNED_FOR))
    }

    fn learn(&self, event: &Event<'_>, now: Instant) {
        let Some(Signal::Announce { peer }) = Signal::parse(&event.content) else { return };
        for (_, topic) in event.letter_tags().filter(|(letter, _)| *letter == b'x') {
            let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
            let Some(room) = roots.get(topic) else { continue };
            let own = room.self_topic(&peer);
            let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
            if learned.len() >= MAX_LEARNED {
                learned.retain(|_, at| now - *at < LEARNED_FOR);
            }
            if learned.len() < MAX_LEARNED {
                learned.insert(own.as_str().to_owned(), now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use genosdb::PeerId;

    use super::*;

    fn event<'a>(topic: &'a str, content: &'a str) -> Event<'a> {
        Event {
            id: [0; 32],
            pubkey: [1; 32],
            created_at: 1_000,
            kind: 22_718,
            tags: vec![vec!["x".into(), topic.into()]],
            content: content.into(),
            sig: [0; 64],
        }
    }

    #[test]
    fn rooms_are_served_and_the_own_topics_of_who_announced_itself_there() {
        let gate = Gate::new(Admission::Rooms(vec!["my-app".into()]));
        let now = Instant::now();
        let room = Room::graph_sync("my-app");
        let peer = PeerId::parse("rP5xrSA37VoHEv5F0C0U").unwrap();
        let (root, own) = (room.root_topic(), room.self_topic(&peer));
        let elsewhere = Room::graph_sync("other").root_topic();
        let announce = Signal::Announce { peer }.to_content();
        let blocked = Err(NotAdmitted::OtherRoom);
        assert_eq!(gate.admits_event(&event(elsewhere.as_str(), &announce), now), blocked);
        assert_eq!(gate.admits_event(&event(own.as_str(), "{}"), now), blocked);
        assert_eq!(gate.admits_event(&event(root.as_str(), &announce), now), Ok(()));
        gate.set_served("other", true);
        assert_eq!(gate.admits_event(&event(elsewhere.as_str(), &announce), now), Ok(()));
        gate.set_served("other", false);
        assert_eq!(gate.admits_event(&event(elsewhere.as_str(), &announce), now), blocked);
        // An announce elsewhere teaches nothing.
        gate.learn(&event(elsewhere.as_str(), &announce), now);
        assert_eq!(gate.admits_event(&event(own.as_str(), "{}"), now), blocked);
        gate.learn(&event(root.as_str(), &announce), now);
        assert_eq!(gate.admits_event(&event(own.as_str(), "{}"), now), Ok(()));
        assert_eq!(gate.admits_event(&event(own.as_str(), "{}"), now + LEARNED_FOR), blocked);
    }

    #[test]
    fn a_proof_must_be_fresh_for_this_relay_and_of_a_known_key() {
        let gate = Gate::new(Admission::Auth(BTreeSet::from([[1; 32]])));
        let hosts = vec!["relay.example.com".to_owned()];
        let proof = |kind: u16, relay: &'static str, challenge: &'static str, author: u8| Event {
            kind,
            pubkey: [author; 32],
            tags: vec![vec!["relay".into(), relay.into()], vec!["challenge".into(), challenge.into()]],
            ..event("", "")
        };
        let good = "wss://Relay.example.com/";
        let judge = |event: &Event<'_>, now| gate.accepts_proof(event, "abc", &hosts, now);
        assert_eq!(judge(&proof(AUTH_KIND, good, "abc", 1), 1_000), Ok(()));
        for (event, now, prefix) in [
            (proof(1, good, "abc", 1), 1_000, "invalid:"),
            (proof(AUTH_KIND, good, "abd", 1), 1_000, "invalid:"),
            (proof(AUTH_KIND, "wss://evil.example", "abc", 1), 1_000, "invalid:"),
            (proof(AUTH_KIND, "relay.example.com", "abc", 1), 1_000, "invalid:"),
            (proof(AUTH_KIND, good, "abc", 1), 1_601, "invalid:"),
            (proof(AUTH_KIND, good, "abc", 2), 1_000, "restricted:"),
        ] {
            assert!(judge(&event, now).unwrap_err().starts_with(prefix));
        }
        assert_eq!(gate.admits_client(None), Err(NotAdmitted::AuthRequired));
        assert_eq!(gate.admits_client(Some(&[2; 32])), Err(NotAdmitted::AuthRequired));
        assert_eq!(gate.admits_client(Some(&[1; 32])), Ok(()));
        assert_eq!(Gate::Open.admits_client(None), Ok(()));
    }
}
