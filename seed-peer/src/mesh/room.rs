//! One of the two rooms of a database, as the seed is in it.

use std::time::{Duration, Instant};

use genosdb::{APP_ID, Hlc, PeerId, Room, SdpKey, Topic};

use super::RoomId;
use super::live::Live;
use super::watermarks::Watermarks;
use crate::archive::{Known, RoomKey};
use crate::cells::Cells;
use crate::link::Listening;
use crate::links::LinkId;
use crate::room::RoomPeer;
use crate::roster::Roster;
use crate::signalling::Listener;

/// How often the whole room is sent an answer that one peer out of reach has asked for.
const ROOM_ANSWER_INTERVAL: Duration = Duration::from_secs(5);

/// How often a room's rules are applied.
const GOVERN_INTERVAL: Duration = Duration::from_secs(5);
/// How long nothing must come before the first peers count as having told all.
const SYNC_QUIET: Duration = Duration::from_secs(3);
/// How long they may take.
const FIRST_SYNC: Duration = Duration::from_secs(120);
/// When nobody has come for so long, there is nobody to wait for.
const NOBODY_THERE: Duration = Duration::from_secs(30);

/// What a database's room is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The graph and its synchronisation.
    Graph,
    /// Presence and the application's own channels.
    App,
}

/// A room that the seed is in.
pub(crate) struct MeshRoom {
    pub(crate) id: RoomId,
    pub(crate) part: Part,
    pub(crate) room: Room,
    pub(crate) root: Topic,
    pub(crate) key: SdpKey,
    /// The configured name, for metrics and logs.
    pub(crate) name: String,
    /// Where the graph is kept; of use in the graph's room.
    pub(crate) archive: RoomKey,
    /// The highest timestamp in the archive.
    pub(crate) latest: Option<Hlc>,
    pub(crate) roster: Roster,
    /// The seed's ids in the room, each a peer to the others.
    pub(crate) members: Vec<RoomPeer>,
    pub(crate) cells: Option<Cells>,
    /// Whether what peers send must be signed.
    pub(crate) is_ruled: bool,
    /// When roles are given and taken, in the graph's room of a database with rules.
    pub(crate) governor: Option<Governor>,
    /// Whether somebody was told that clients and the seed disagree on cells.
    pub(crate) warned: bool,
    pub(crate) room_answers: RoomAnswers,
    pub(crate) live: Live,
    /// The last log entry of the archive, since the room was entered.
    pub(crate) logged: u64,
    /// From when on peers are asked that were linked before.
    pub(crate) watermarks: Watermarks,
    /// When the room is in [`super::Mesh`]'s queue to be looked at.
    pub(crate) deadline: Instant,
}

impl MeshRoom {
    /// The seed's ids, of which it has several in a room where it bridges every cell.
    pub(crate) fn ours(&self) -> Vec<PeerId> {
        self.members.iter().map(RoomPeer::id).collect()
    }

    pub(crate) fn member(&mut self, us: PeerId) -> Option<&mut RoomPeer> {
        self.members.iter_mut().find(|member| member.id() == us)
    }

    /// What the links of the room listen to.
    pub(crate) fn listening(&self, limits: genosdb::Limits) -> Listening {
        Listening { graph: self.part == Part::Graph, cells: self.cells.is_some(), limits }
    }

    /// The topics to hear of: the room's, and that of each id.
    pub(crate) fn topics(&self) -> Vec<(Topic, Listener)> {
        let root = (self.root.clone(), Listener { room: self.id, us: None });
        let own = self.ours().into_iter().map(|us| self.own_topic(us));
        std::iter::once(root).chain(own).collect()
    }

    pub(crate) fn own_topic(&self, us: PeerId) -> (Topic, Listener) {
        (self.room.self_topic(&us), Listener { room: self.id, us: Some(us) })
    }

    /// The open links, by the seed's id and the peer's.
    pub(crate) fn links(&self) -> impl Iterator<Item = (PeerId, PeerId, LinkId)> {
        self.members.iter().flat_map(|member| member.links().map(|(peer, link)| (member.id(), peer, link)))
    }

    /// An open link to `peer`, whichever of the seed's ids has it.
    pub(crate) fn link_to(&self, peer: &PeerId) -> Option<LinkId> {
        self.members.iter().find_map(|member| member.link_to(peer))
    }

    pub(crate) fn open_links(&self) -> usize {
        self.members.iter().map(RoomPeer::open_links).sum()
    }

    /// When the room is to be looked at.
    pub(crate) fn next_tick(&self) -> Instant {
        let members = self.members.iter().map(RoomPeer::next_tick);
        let cells = self.cells.as_ref().and_then(Cells::next_tick);
        let answer = self.room_answers.next_tick();
        let governor = self.governor.as_ref().map(Governor::next_tick);
        let live = self.live.next_tick();
        members
            .chain([self.roster.next_tick()])
            .chain(cells)
            .chain(answer)
            .chain(live)
            .chain(governor)
            .min()
            .unwrap_or(self.deadline)
    }
}

/// When a room's rules are applied: around the clock, but not before the seed has heard what happened while it was
/// away. Roles must not be given by what stood in the archive then.
#[derive(Debug)]
pub(crate) struct Governor {
    next: Instant,
    /// Until when the first peers may take to bring the seed up to date; `None` once the rules have been applied.
    patience: Option<Instant>,
    /// Whether a peer is linked, or was.
    met: bool,
}

impl Governor {
    pub(crate) fn new(now: Instant) -> Self {
        Self { next: now + NOBODY_THERE, patience: Some(now + FIRST_SYNC), met: false }
    }

    /// A peer is linked, and was asked for what we lack.
    pub(crate) fn met(&mut self, now: Instant) {
        if self.patience.is_some() && !std::mem::replace(&mut self.met, true) {
            self.next = now + SYNC_QUIET;
        }
    }

    /// Something has changed in the room.
    pub(crate) fn heard(&mut self, now: Instant) {
        if let Some(patience) = self.patience.filter(|_| self.met) {
            self.next = (now + SYNC_QUIET).min(patience);
        }
    }

    /// Whether the rules are due; then they count as applied.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        if now < self.next {
            return false;
        }
        self.patience = None;
        self.next = now + GOVERN_INTERVAL;
        true
    }

    fn next_tick(&self) -> Instant {
        self.next
    }
}

/// The room's key and topic for `part` of the database `name`.
pub(crate) fn place(part: Part, name: &str, password: &str) -> (Room, Topic, SdpKey) {
    let room = match part {
        Part::Graph => Room::graph_sync(name),
        Part::App => Room::app_sync(name),
    };
    let (root, key) = (room.root_topic(), SdpKey::derive(password, APP_ID, &room));
    (room, root, key)
}

/// Answers that go to everybody, because who asked is out of reach: one now and then is enough for all who ask.
#[derive(Debug, Default)]
pub(crate) struct RoomAnswers {
    last: Option<Instant>,
    waiting: Option<Known>,
}

impl RoomAnswers {
    /// Somebody asks, and knows so much. Returns what to answer to now, if anything.
    pub(crate) fn asked(&mut self, known: Known, now: Instant) -> Option<Known> {
        let timestamp = match &self.waiting {
            // Who knows least needs most, and the others have use for a part of that.
            Some(waiting) => waiting.timestamp.min(known.timestamp),
            None => known.timestamp,
        };
        self.waiting = Some(Known { timestamp, sent: None });
        self.due(now)
    }

    /// What to answer to by now, if anything.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Known> {
        if self.last.is_some_and(|last| now < last + ROOM_ANSWER_INTERVAL) {
            return None;
        }
        let known = self.waiting.take()?;
        self.last = Some(now);
        Some(known)
    }

    fn next_tick(&self) -> Option<Instant> {
        self.waiting.and(self.last).map(|last| last + ROOM_ANSWER_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_wait_for_the_first_peers_and_then_for_nobody() {
        let start = Instant::now();
        let mut governor = Governor::new(start);
        assert!(!governor.is_due(start) && governor.next_tick() == start + NOBODY_THERE);
        governor.heard(start);
        let met = start + Duration::from_secs(10);
        governor.met(met);
        assert_eq!(governor.next_tick(), met + SYNC_QUIET);
        let heard = met + Duration::from_secs(2);
        governor.heard(heard);
        assert!(!governor.is_due(met + SYNC_QUIET));
        governor.heard(start + FIRST_SYNC);
        assert_eq!(governor.next_tick(), start + FIRST_SYNC, "they cannot keep it from ruling");
        assert!(governor.is_due(start + FIRST_SYNC));
        governor.heard(start + FIRST_SYNC);
        governor.met(start + FIRST_SYNC);
        assert_eq!(governor.next_tick(), start + FIRST_SYNC + GOVERN_INTERVAL);
    }

    #[test]
    fn many_who_ask_get_one_answer_for_the_one_who_knows_least() {
        let start = Instant::now();
        let known = |physical| Known { timestamp: Some(Hlc::new(physical, 1)), sent: None };
        let mut answers = RoomAnswers::default();
        assert_eq!(answers.asked(known(5), start), Some(known(5)));
        let soon = start + Duration::from_secs(1);
        assert_eq!(answers.asked(known(9), soon), None);
        assert_eq!(answers.asked(known(7), soon), None);
        let later = answers.next_tick().unwrap();
        assert_eq!(answers.due(later), Some(known(7)));
        assert_eq!(answers.due(later + ROOM_ANSWER_INTERVAL), None);
        assert_eq!(
            answers.asked(Known { timestamp: None, sent: None }, later + ROOM_ANSWER_INTERVAL).unwrap().timestamp,
            None
        );
    }
}
