//! Who is in a room, from announces, byes and links; and when that is sure enough to act on (wire §5). Sans-IO.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use genosdb::PeerId;

use crate::signalling::RelayIndex;

/// A roster is sealed when nothing has changed for so long,
const QUIET: Duration = Duration::from_secs(2);
/// or at most so long after the first change.
const PATIENCE: Duration = Duration::from_secs(10);
/// A peer that fell silent without a bye is taken for gone after so long.
const SILENCE: Duration = Duration::from_secs(30);
/// One that has closed its link in order, and may only have pruned it, after so long: in large rooms relays pass announces
/// on every 30 s.
const AFTER_CLOSING: Duration = Duration::from_secs(70);
/// A peer that no link tells of is gone when it was not heard for so long: tabs in the background announce once a
/// minute, and relays economise.
const UNHEARD: Duration = Duration::from_secs(150);
/// How often the roster is looked through for those that are gone.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Peers of one room that are remembered: whoever makes up ids gets no further.
const MAX_PEERS: usize = 20_000;

#[derive(Debug)]
struct Entry {
    /// When it last announced itself, or a link to it opened.
    heard: Instant,
    /// Where it was heard last.
    relay: RelayIndex,
    /// Open links to it: the seed may have several ids in a room.
    links: usize,
    /// When it is taken for gone unless it is heard, if its last link has ended.
    gone_at: Option<Instant>,
}

/// The peers of one room, without the seed.
#[derive(Debug)]
pub(crate) struct Roster {
    peers: HashMap<PeerId, Entry>,
    /// The first and the last change since the roster was sealed.
    changed: Option<(Instant, Instant)>,
    next_look: Instant,
}

impl Roster {
    pub(crate) fn new(now: Instant) -> Self {
        Self { peers: HashMap::new(), changed: None, next_look: now + LOOK_INTERVAL }
    }

    /// How many peers there are.
    pub(crate) fn len(&self) -> usize {
        self.peers.len()
    }

    /// The peers, unordered.
    pub(crate) fn iter(&self) -> impl Iterator<Item = PeerId> {
        self.peers.keys().copied()
    }

    /// The relay through which `peer` was heard last.
    pub(crate) fn relay_of(&self, peer: &PeerId) -> Option<RelayIndex> {
        self.peers.get(peer).map(|entry| entry.relay)
    }

    /// A peer has said that it is here. Returns whether that is new.
    pub(crate) fn heard(&mut self, peer: PeerId, relay: RelayIndex, now: Instant) -> bool {
        if let Some(entry) = self.peers.get_mut(&peer) {
            (entry.heard, entry.relay, entry.gone_at) = (now, relay, None);
            return false;
        }
        if self.peers.len() >= MAX_PEERS {
            return false;
        }
        self.peers.insert(peer, Entry { heard: now, relay, links: 0, gone_at: None });
        self.change(now);
        true
    }

    /// A link to a peer has opened.
    pub(crate) fn linked(&mut self, peer: PeerId, relay: RelayIndex, now: Instant) {
        self.heard(peer, relay, now);
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.links += 1;
        }
    }

    /// A link to a peer has ended. `died` says that nobody closed it; then, if a `bridge` was at its end, others rely
    /// on a new one being elected soon.
    pub(crate) fn unlinked(&mut self, peer: PeerId, died: bool, bridge: bool, now: Instant) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        entry.links = entry.links.saturating_sub(1);
        if entry.links > 0 {
            return;
        }
        // It was there until now, whatever relays passed on meanwhile.
        entry.heard = now;
        if died && bridge {
            self.remove(peer, now);
        } else {
            entry.gone_at = Some(now + if died { SILENCE } else { AFTER_CLOSING });
        }
    }

    /// A peer has said that it leaves.
    pub(crate) fn bye(&mut self, peer: PeerId, now: Instant) {
        self.remove(peer, now);
    }

    fn remove(&mut self, peer: PeerId, now: Instant) {
        if self.peers.remove(&peer).is_some() {
            self.change(now);
        }
    }

    fn change(&mut self, now: Instant) {
        self.changed = Some((self.changed.map_or(now, |(first, _)| first), now));
    }

    /// A relay is reached again: nobody could be heard meanwhile, and nobody is to be taken for gone for that.
    pub(crate) fn relay_reached(&mut self, now: Instant) {
        for entry in self.peers.values_mut() {
            entry.heard = now;
        }
    }

    /// Drops those who are gone.
    pub(crate) fn look_through(&mut self, now: Instant) {
        if now < self.next_look {
            return;
        }
        self.next_look = now + LOOK_INTERVAL;
        let before = self.peers.len();
        self.peers.retain(|_, entry| {
            let is_gone = entry.gone_at.is_some_and(|at| now >= at) || now >= entry.heard + UNHEARD;
            entry.links > 0 || !is_gone
        });
        if self.peers.len() < before {
            self.change(now);
        }
    }

    /// Whether the roster has changed and come to rest.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.seal_at().is_some_and(|at| now >= at)
    }

    /// The roster is acted on as it is.
    pub(crate) fn sealed(&mut self) {
        self.changed = None;
    }

    /// Whether the roster has changed since it was sealed.
    pub(crate) fn is_changing(&self) -> bool {
        self.changed.is_some()
    }

    /// When there is something to do.
    pub(crate) fn next_tick(&self) -> Instant {
        self.seal_at().map_or(self.next_look, |at| at.min(self.next_look))
    }

    fn seal_at(&self) -> Option<Instant> {
        self.changed.map(|(first, last)| (last + QUIET).min(first + PATIENCE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELAY: RelayIndex = RelayIndex(0);

    fn id(number: usize) -> PeerId {
        PeerId::parse(&format!("{number:020}")).unwrap()
    }

    #[test]
    fn a_roster_is_sealed_when_it_is_quiet_or_has_not_been_for_long() {
        let start = Instant::now();
        let second = |number: u64| start + Duration::from_secs(number);
        let mut roster = Roster::new(start);
        assert!(roster.heard(id(1), RELAY, start) && !roster.heard(id(1), RELAY, second(1)));
        assert!(!roster.is_due(second(1)) && roster.is_due(second(2)));
        roster.sealed();
        assert!(!roster.is_due(second(100)));

        let mut roster = Roster::new(start);
        for number in 0..20 {
            roster.heard(id(usize::try_from(number).unwrap()), RELAY, second(number));
            assert_eq!(roster.is_due(second(number)), number >= 10);
        }
    }

    #[test]
    fn who_says_bye_and_a_bridge_that_died_are_gone_at_once_and_others_later() {
        let start = Instant::now();
        let mut roster = Roster::new(start);
        for number in 0..4 {
            roster.linked(id(number), RELAY, start);
        }
        roster.sealed();
        roster.bye(id(0), start);
        roster.unlinked(id(1), true, true, start);
        roster.unlinked(id(2), true, false, start);
        assert_eq!(roster.len(), 2);
        roster.sealed();
        roster.look_through(start + SILENCE - Duration::from_secs(1));
        assert_eq!(roster.len(), 2);
        roster.look_through(start + SILENCE + LOOK_INTERVAL);
        assert_eq!(roster.iter().collect::<Vec<_>>(), [id(3)]);
        assert!(roster.is_due(start + SILENCE + LOOK_INTERVAL + QUIET));
        // One that has pruned its link is heard of by its announces, however seldom they are.
        roster.linked(id(4), RELAY, start);
        roster.unlinked(id(4), false, true, start + SILENCE);
        roster.look_through(start + SILENCE * 3);
        assert_eq!(roster.len(), 2);
        roster.heard(id(4), RELAY, start + SILENCE * 3);
        roster.look_through(start + SILENCE * 5);
        assert_eq!(roster.len(), 2);
        // A link says more than announces.
        roster.look_through(start + UNHEARD * 2);
        assert_eq!(roster.len(), 1);
    }

    #[test]
    fn silence_of_the_relay_is_not_that_of_peers() {
        let start = Instant::now();
        let mut roster = Roster::new(start);
        roster.heard(id(1), RELAY, start);
        roster.relay_reached(start + UNHEARD);
        roster.look_through(start + UNHEARD);
        assert_eq!(roster.len(), 1);
        roster.look_through(start + UNHEARD * 2);
        assert_eq!(roster.len(), 0);
    }

    #[test]
    fn made_up_peers_take_bounded_memory() {
        let start = Instant::now();
        let mut roster = Roster::new(start);
        for number in 0..MAX_PEERS + 100 {
            roster.heard(id(number), RELAY, start);
        }
        assert_eq!(roster.len(), MAX_PEERS);
    }
}
