//! The seed as a peer of one room: whom to dial, whom to answer, when to give up (wire §2). Sans-IO.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use genosdb::PeerId;

use crate::links::LinkId;
use crate::signalling::RelayIndex;

/// How often a peer says that it is here while others come,
const ANNOUNCE_INTERVAL: Duration = Duration::from_millis(2_500);
/// for how long after the last has come,
const ANNOUNCE_FOR: Duration = Duration::from_secs(10);
/// and how often when nobody does: with hundreds of rooms, even that is work. Clients were seen to keep their rosters
/// at one announce in 90 s.
const IDLE_ANNOUNCE_INTERVAL: Duration = Duration::from_secs(20);
/// How long an offer of ours waits for its link. Browsers gather candidates for up to 5 s before they answer. Clients
/// keep theirs for 57 s, but a peer that reloads within that time would find us deaf.
const DIAL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long two offers may be on their way at once. A client gathers candidates for up to 5 s, so a later offer is no
/// longer one that crossed ours: the peer never saw ours, or has been reloaded since.
const CROSSING: Duration = Duration::from_secs(8);
/// How long an answer of ours waits for its link.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(30);
/// Offers of one peer that are answered at the same time: one by each of its relays, and one after a reload.
const MAX_ACCEPTING: usize = 6;
/// Links of one room that are not open yet: whoever floods a room with made-up ids gets no further.
const MAX_PENDING: usize = 128;

/// What a peer said through a relay. Descriptions are opened already: whoever does not know the room's password
/// cannot make us drop or answer anything with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    /// "I am here", on the room's topic.
    Announce,
    /// "I am leaving", on the room's topic.
    Bye,
    /// "Connect to me", on our own topic.
    Offer { sdp: String },
    /// "Here is how", on our own topic.
    Answer { sdp: String },
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Say that we are here, on all relays.
    Announce,
    /// Make an offer to `peer`, and send it through `relay`; then call [`RoomPeer::dialled`].
    Dial { peer: PeerId, relay: RelayIndex },
    /// Answer the offer of `peer` through `relay`; then call [`RoomPeer::accepted`].
    Accept { peer: PeerId, relay: RelayIndex, sdp: String },
    /// Give the answer of `peer` to the link that dialled it.
    Complete { peer: PeerId, link: LinkId, sdp: String },
    /// End a link that is of no more use.
    Drop { link: LinkId, why: Why },
    /// `peer` is here, on this link.
    Joined { peer: PeerId, link: LinkId },
    /// `peer` is no longer linked.
    Left { peer: PeerId },
}

/// Why a link is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// Another link took its place.
    Replaced,
    /// The peer has left the room.
    Bye,
    /// It did not open in time.
    Late,
    /// The topology has no place for it.
    Surplus,
    /// The seed leaves the room, or goes by another id in it.
    Leaving,
}

impl Why {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Replaced => "replaced",
            Self::Bye => "bye",
            Self::Late => "late",
            Self::Surplus => "surplus",
            Self::Leaving => "leaving",
        }
    }
}

/// An offer of ours that has no link yet.
#[derive(Debug)]
struct Dial {
    link: LinkId,
    since: Instant,
    is_answered: bool,
    /// Their latest offer that crossed ours, and the relay that it came through. It is answered if ours is not: they may not
    /// have heard ours, and wait for a minute before they offer again.
    crossed: Option<(RelayIndex, String)>,
}

/// What is known of one peer.
#[derive(Debug, Default)]
struct Peer {
    /// The link that carries messages.
    open: Option<LinkId>,
    dialling: Option<Dial>,
    /// Their offers that we answered and that have no link yet.
    accepting: Vec<(LinkId, Instant)>,
}

impl Peer {
    fn is_idle(&self) -> bool {
        self.open.is_none() && self.dialling.is_none() && self.accepting.is_empty()
    }

    /// The links that are not open yet.
    fn pending(&self) -> impl Iterator<Item = LinkId> {
        let accepting = self.accepting.iter().map(|(link, _)| *link);
        self.dialling.iter().map(|dial| dial.link).chain(accepting)
    }
}

/// The seed's part in one room.
#[derive(Debug)]
pub(crate) struct RoomPeer {
    id: PeerId,
    peers: HashMap<PeerId, Peer>,
    max_peers: usize,
    pending: usize,
    announced: Option<Instant>,
    next_announce: Instant,
    /// Until when to announce often.
    busy_until: Instant,
}

impl RoomPeer {
    /// A peer called `id` that links with up to `max_peers` others, and announces itself from `at` on.
    pub(crate) fn new(id: PeerId, max_peers: usize, at: Instant) -> Self {
        Self {
            id,
            peers: HashMap::new(),
            max_peers,
            pending: 0,
            announced: None,
            next_announce: at,
            busy_until: at + ANNOUNCE_FOR,
        }
    }

    /// The seed's id in this room.
    pub(crate) fn id(&self) -> PeerId {
        self.id
    }

    /// How many peers have an open link.
    pub(crate) fn open_links(&self) -> usize {
        self.peers.values().filter(|peer| peer.open.is_some()).count()
    }

    /// The peers with an open link, and the links.
    pub(crate) fn links(&self) -> impl Iterator<Item = (PeerId, LinkId)> {
        self.peers.iter().filter_map(|(id, peer)| Some((*id, peer.open?)))
    }

    /// Every link, open or not.
    pub(crate) fn all_links(&self) -> Vec<LinkId> {
        self.peers.values().flat_map(|peer| peer.pending().chain(peer.open)).collect()
    }

    /// The open link to `peer`.
    pub(crate) fn link_to(&self, peer: &PeerId) -> Option<LinkId> {
        self.peers.get(peer)?.open
    }

    /// When [`RoomPeer::tick`] has something to do.
    pub(crate) fn next_tick(&self) -> Instant {
        self.next_announce
    }

    /// Announces when it is time, and gives up on what took too long.
    pub(crate) fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if now < self.next_announce {
            return;
        }
        actions.push(Action::Announce);
        let is_busy = now < self.busy_until || self.pending > 0;
        self.announced = Some(now);
        self.next_announce = now + if is_busy { ANNOUNCE_INTERVAL } else { IDLE_ANNOUNCE_INTERVAL };
        let mut late = Vec::new();
        for (peer, known) in &mut self.peers {
            let unheard = known
                .dialling
                .take_if(|dial| dial.crossed.is_some() && !dial.is_answered && now >= dial.since + CROSSING);
            if let Some(Dial { link, crossed: Some((relay, sdp)), .. }) = unheard {
                actions.push(Action::Drop { link, why: Why::Replaced });
                actions.push(Action::Accept { peer: *peer, relay, sdp });
            }
            late.extend(known.dialling.iter().filter(|dial| now >= dial.since + DIAL_TIMEOUT).map(|dial| dial.link));
            let accepting = known.accepting.iter().filter(|(_, since)| now >= *since + ACCEPT_TIMEOUT);
            late.extend(accepting.map(|(link, _)| *link));
        }
        self.pending = self.count_pending();
        for link in late {
            self.forget(link);
            actions.push(Action::Drop { link, why: Why::Late });
        }
    }

    /// Somebody is new here, and has not heard of us.
    pub(crate) fn newcomer(&mut self, now: Instant) {
        self.busy_until = now + ANNOUNCE_FOR;
        let soonest = self.announced.map_or(now, |last| last + ANNOUNCE_INTERVAL).max(now);
        self.next_announce = self.next_announce.min(soonest);
    }

    /// A relay is reached (again): the peers there have not heard of us. They will at `at`.
    pub(crate) fn relay_reached(&mut self, at: Instant) {
        self.next_announce = at;
        self.busy_until = at + ANNOUNCE_FOR;
    }

    /// A peer said something through a relay.
    pub(crate) fn handle(
        &mut self,
        peer: PeerId,
        said: Said,
        relay: RelayIndex,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        if peer == self.id {
            return;
        }
        match said {
            Said::Announce => self.meet(peer, relay, actions),
            Said::Bye => self.bye(peer, actions),
            Said::Offer { sdp } => self.offered(peer, relay, sdp, now, actions),
            Said::Answer { sdp } => {
                if let Some(dial) = self.peers.get_mut(&peer).and_then(|known| known.dialling.as_mut()) {
                    dial.is_answered = true;
                    actions.push(Action::Complete { peer, link: dial.link, sdp });
                }
            }
        }
    }

    /// Whoever hears of a peer that it has no link and no dial with, dials.
    pub(crate) fn meet(&mut self, peer: PeerId, relay: RelayIndex, actions: &mut Vec<Action>) {
        let idle = self.peers.get(&peer).is_none_or(Peer::is_idle);
        if idle && self.has_room(peer) {
            actions.push(Action::Dial { peer, relay });
        }
    }

    fn offered(&mut self, peer: PeerId, relay: RelayIndex, sdp: String, now: Instant, actions: &mut Vec<Action>) {
        if !self.has_room(peer) {
            return;
        }
        let us = self.id;
        let known = self.peers.entry(peer).or_default();
        if let Some(dial) = &mut known.dialling {
            // Both dialled: the offer of the greater id stands.
            if us > peer && now < dial.since + CROSSING {
                dial.crossed = Some((relay, sdp));
                return;
            }
            actions.push(Action::Drop { link: dial.link, why: Why::Replaced });
            known.dialling = None;
            self.pending -= 1;
        }
        if known.accepting.len() >= MAX_ACCEPTING {
            return;
        }
        // A peer with an open link that offers was reloaded, or the offer came late through another relay. The open
        // link stays until the new one opens: then either way the right one is left.
        actions.push(Action::Accept { peer, relay, sdp });
    }

    fn bye(&mut self, peer: PeerId, actions: &mut Vec<Action>) {
        self.end(peer, Why::Bye, actions);
    }

    /// Ends every link with `peer`.
    pub(crate) fn end(&mut self, peer: PeerId, why: Why, actions: &mut Vec<Action>) {
        let Some(known) = self.peers.remove(&peer) else { return };
        self.pending -= known.pending().count();
        actions.extend(known.pending().map(|link| Action::Drop { link, why }));
        if let Some(link) = known.open {
            actions.push(Action::Drop { link, why });
            actions.push(Action::Left { peer });
        }
    }

    fn has_room(&self, peer: PeerId) -> bool {
        self.pending < MAX_PENDING && (self.peers.contains_key(&peer) || self.peers.len() < self.max_peers)
    }

    /// An offer to `peer` went out for `link`.
    pub(crate) fn dialled(&mut self, peer: PeerId, link: LinkId, now: Instant) {
        let dial = Dial { link, since: now, is_answered: false, crossed: None };
        self.peers.entry(peer).or_default().dialling = Some(dial);
        self.pending += 1;
        self.look_soon(now);
    }

    /// The offer of `peer` was answered for `link`.
    pub(crate) fn accepted(&mut self, peer: PeerId, link: LinkId, now: Instant) {
        self.peers.entry(peer).or_default().accepting.push((link, now));
        self.pending += 1;
        self.look_soon(now);
    }

    /// A link of `peer` has opened.
    pub(crate) fn link_opened(&mut self, peer: PeerId, link: LinkId, actions: &mut Vec<Action>) {
        self.forget(link);
        let known = self.peers.entry(peer).or_default();
        let others: Vec<LinkId> = known.open.into_iter().chain(known.pending()).collect();
        *known = Peer { open: Some(link), ..Peer::default() };
        self.pending = self.count_pending();
        actions.extend(others.into_iter().map(|link| Action::Drop { link, why: Why::Replaced }));
        actions.push(Action::Joined { peer, link });
    }

    /// A link of `peer` has ended by itself.
    pub(crate) fn link_closed(&mut self, peer: PeerId, link: LinkId, actions: &mut Vec<Action>) {
        if self.peers.get(&peer).is_some_and(|known| known.open == Some(link)) {
            actions.push(Action::Left { peer });
        }
        self.forget(link);
    }

    /// What is pending is looked at as often as there are announces: soon.
    fn look_soon(&mut self, now: Instant) {
        self.next_announce = self.next_announce.min(now + ANNOUNCE_INTERVAL);
    }

    fn forget(&mut self, link: LinkId) {
        self.peers.retain(|_, peer| {
            if peer.open == Some(link) {
                peer.open = None;
            }
            peer.dialling.take_if(|dial| dial.link == link);
            peer.accepting.retain(|(accepting, _)| *accepting != link);
            !peer.is_idle()
        });
        self.pending = self.count_pending();
    }

    fn count_pending(&self) -> usize {
        self.peers.values().map(|peer| peer.pending().count()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELAY: RelayIndex = RelayIndex(0);

    fn id(character: char) -> PeerId {
        PeerId::parse(&character.to_string().repeat(20)).unwrap()
    }

    fn sdp() -> String {
        "v=0".into()
    }

    fn room(us: char) -> (RoomPeer, Instant) {
        let now = Instant::now();
        (RoomPeer::new(id(us), 10, now), now)
    }

    fn hear(room: &mut RoomPeer, peer: PeerId, said: Said) -> Vec<Action> {
        let mut actions = Vec::new();
        room.handle(peer, said, RELAY, room.next_announce, &mut actions);
        actions
    }

    fn offer() -> Said {
        Said::Offer { sdp: sdp() }
    }

    fn opened(room: &mut RoomPeer, peer: char, link: LinkId) -> Vec<Action> {
        let mut actions = Vec::new();
        room.link_opened(id(peer), link, &mut actions);
        actions
    }

    #[test]
    fn a_first_announce_is_answered_by_one_dial() {
        let (mut room, now) = room('m');
        let peer = id('a');
        assert_eq!(hear(&mut room, peer, Said::Announce), [Action::Dial { peer, relay: RELAY }]);
        room.dialled(peer, 1, now);
        assert_eq!(hear(&mut room, peer, Said::Announce), []);
        let answer = Said::Answer { sdp: sdp() };
        assert_eq!(hear(&mut room, peer, answer), [Action::Complete { peer, link: 1, sdp: sdp() }]);
        assert_eq!(opened(&mut room, 'a', 1), [Action::Joined { peer, link: 1 }]);
        assert_eq!(hear(&mut room, peer, Said::Announce), []);
        assert_eq!((room.open_links(), room.pending), (1, 0));
    }

    #[test]
    fn of_two_offers_that_cross_the_one_of_the_greater_id_stands() {
        let (mut greater, now) = room('z');
        greater.dialled(id('a'), 1, now);
        assert_eq!(hear(&mut greater, id('a'), offer()), []);
        // Later, it is not one that crossed: ours was lost.
        let mut actions = Vec::new();
        greater.handle(id('a'), offer(), RELAY, now + CROSSING, &mut actions);
        assert!(matches!(actions[..], [Action::Drop { link: 1, .. }, Action::Accept { .. }]));

        let (mut lesser, now) = room('A');
        lesser.dialled(id('a'), 1, now);
        let actions = hear(&mut lesser, id('a'), offer());
        assert_eq!(
            actions,
            [Action::Drop { link: 1, why: Why::Replaced }, Action::Accept { peer: id('a'), relay: RELAY, sdp: sdp() }]
        );
        assert_eq!(lesser.pending, 0);
    }

    #[test]
    fn an_offer_that_crossed_ours_is_answered_when_ours_is_not() {
        // The other has heard us through another relay than the one that our offer went through, where it may be deaf.
        let theirs = RelayIndex(1);
        let crossing = |room: &mut RoomPeer, now| {
            room.dialled(id('a'), 1, now);
            let mut actions = Vec::new();
            for sdp in ["first", "latest"] {
                room.handle(id('a'), Said::Offer { sdp: sdp.into() }, theirs, now, &mut actions);
            }
            assert_eq!(actions, []);
        };
        let (mut deaf, now) = room('z');
        crossing(&mut deaf, now);
        let mut actions = Vec::new();
        deaf.tick(now + CROSSING - Duration::from_millis(1), &mut actions);
        assert_eq!(actions, [Action::Announce]);
        deaf.tick(now + CROSSING + ANNOUNCE_INTERVAL, &mut actions);
        assert_eq!(
            actions[2..],
            [
                Action::Drop { link: 1, why: Why::Replaced },
                Action::Accept { peer: id('a'), relay: theirs, sdp: "latest".into() }
            ]
        );
        assert_eq!(deaf.pending, 0);

        let (mut heard, now) = room('z');
        crossing(&mut heard, now);
        hear(&mut heard, id('a'), Said::Answer { sdp: sdp() });
        let mut actions = Vec::new();
        heard.tick(now + CROSSING + ANNOUNCE_INTERVAL, &mut actions);
        assert_eq!(actions, [Action::Announce]);
        assert_eq!(heard.pending, 1);
    }

    #[test]
    fn a_reloaded_peer_replaces_its_link_once_the_new_one_is_open() {
        let (mut room, now) = room('m');
        room.accepted(id('a'), 1, now);
        opened(&mut room, 'a', 1);
        let actions = hear(&mut room, id('a'), offer());
        assert!(matches!(actions[..], [Action::Accept { .. }]));
        room.accepted(id('a'), 2, now);
        assert_eq!(room.links().collect::<Vec<_>>(), [(id('a'), 1)]);
        assert_eq!(
            opened(&mut room, 'a', 2),
            [Action::Drop { link: 1, why: Why::Replaced }, Action::Joined { peer: id('a'), link: 2 }]
        );
        let mut actions = Vec::new();
        room.link_closed(id('a'), 1, &mut actions);
        assert_eq!(actions, []);
        room.link_closed(id('a'), 2, &mut actions);
        assert_eq!(actions, [Action::Left { peer: id('a') }]);
    }

    #[test]
    fn an_offer_that_came_late_through_another_relay_does_not_cost_the_link() {
        let (mut room, mut now) = room('m');
        room.accepted(id('a'), 1, now);
        opened(&mut room, 'a', 1);
        hear(&mut room, id('a'), offer());
        room.accepted(id('a'), 2, now);
        now += ACCEPT_TIMEOUT;
        let mut actions = Vec::new();
        room.tick(now, &mut actions);
        assert_eq!(actions, [Action::Announce, Action::Drop { link: 2, why: Why::Late }]);
        assert_eq!(room.links().collect::<Vec<_>>(), [(id('a'), 1)]);
    }

    #[test]
    fn a_bye_ends_everything_with_that_peer() {
        let (mut room, now) = room('m');
        room.accepted(id('a'), 1, now);
        opened(&mut room, 'a', 1);
        room.accepted(id('a'), 2, now);
        let actions = hear(&mut room, id('a'), Said::Bye);
        assert_eq!(
            actions,
            [
                Action::Drop { link: 2, why: Why::Bye },
                Action::Drop { link: 1, why: Why::Bye },
                Action::Left { peer: id('a') }
            ]
        );
        assert_eq!((room.open_links(), room.pending), (0, 0));
    }

    #[test]
    fn announces_go_out_often_while_others_come_and_seldom_when_not() {
        let (mut room, now) = room('m');
        let announces = |room: &mut RoomPeer, seconds: std::ops::Range<u64>| {
            let mut actions = Vec::new();
            for tenth in seconds.start * 10..seconds.end * 10 {
                room.tick(now + Duration::from_millis(100 * tenth), &mut actions);
            }
            actions.len()
        };
        assert_eq!(announces(&mut room, 0..10), 4);
        assert_eq!(announces(&mut room, 10..50), 2);
        // The next would come at 50 s: a newcomer at 45 s need not wait for it.
        room.newcomer(now + Duration::from_secs(51));
        assert_eq!(announces(&mut room, 51..61), 4);
    }

    #[test]
    fn a_dial_that_nobody_answers_is_given_up_and_made_again() {
        let (mut room, mut now) = room('m');
        room.dialled(id('a'), 1, now);
        now += DIAL_TIMEOUT;
        let mut actions = Vec::new();
        room.tick(now, &mut actions);
        assert_eq!(actions, [Action::Announce, Action::Drop { link: 1, why: Why::Late }]);
        let actions = hear(&mut room, id('a'), Said::Announce);
        assert!(matches!(actions[..], [Action::Dial { .. }]));
    }

    #[test]
    fn made_up_peers_cannot_take_more_than_their_share() {
        let now = Instant::now();
        let mut room = RoomPeer::new(id('m'), 1_000, now);
        let mut dials = 0;
        for number in 0..10_000 {
            let peer = PeerId::parse(&format!("{number:020}")).unwrap();
            for action in hear(&mut room, peer, Said::Announce) {
                assert!(matches!(action, Action::Dial { .. }));
                dials += 1;
                room.dialled(peer, dials, now);
            }
        }
        assert_eq!(dials, 128);
    }

    #[test]
    fn the_seed_does_not_talk_to_itself() {
        let (mut room, _) = room('m');
        assert_eq!(hear(&mut room, id('m'), Said::Announce), []);
        assert_eq!(hear(&mut room, id('m'), offer()), []);
    }
}
