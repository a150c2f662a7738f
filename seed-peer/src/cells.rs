//! The seed's part in the cells of one room: which ids it goes by, whom it links with, what it passes on (wire §5).
//! Sans-IO.
//!
//! Where clients and the seed disagree for a while on who is there, their topologies differ. So the seed is strict in
//! what it builds, and lenient in what it takes: a frame counts whatever the channel it came on, and is sent to each
//! peer on the channel of that peer's own cell, which it always listens to; to one that says another cell, on both. What
//! was seen is dropped, so that costs a frame at most.

mod claims;

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use genosdb::cells::{HashedId, cell_count};
use genosdb::election::Election;
use genosdb::envelope::{Envelope, Postmark};
use genosdb::{CellIndex, ChannelName, Json, PeerId, Topology};
use serde::{Deserialize, Serialize};
use service::RecentSet;

use self::claims::Claims;
use crate::links::LinkId;
use crate::rooms::CellStatus;
use crate::roster::Roster;

/// Ids of messages that are remembered, as clients do.
const REMEMBERED: usize = 5_000;
/// Links outside the topology end so long after a seal.
const PRUNE_AFTER: Duration = Duration::from_secs(5);
/// How long after a seal, if nobody comes or goes, everybody has sealed the same roster and links by it.
const SETTLED_AFTER: Duration = Duration::from_secs(6);
/// Links that are younger are left alone: the other side may know more.
const YOUNG: Duration = Duration::from_secs(15);
/// Ids that the seed goes by in one room, at most.
const MAX_IDS: u32 = 64;
/// Ids that are looked for at one seal: each takes some milliseconds.
const PICKS_AT_ONCE: usize = 4;
/// How soon the rest is looked for.
const PICK_PAUSE: Duration = Duration::from_millis(100);
/// How often an id may be exchanged for a better one: to everybody else, a peer leaves and another comes.
const REPICK_INTERVAL: Duration = Duration::from_secs(60);

/// What the seed is to a room in cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bridge {
    /// The bridge of its cell.
    #[default]
    One,
    /// The bridge of every cell, under an id for each.
    Every,
    /// A member like any other.
    Off,
}

/// A room in cells; the apps' `rtc.cells` must say the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellsConfig {
    /// Peers of one cell, more or less. Clients' default is 10.
    pub cell_size: usize,
    /// What the seed is to the room.
    pub bridge: Bridge,
}

/// What became of the seed's ids at a seal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct IdChange {
    pub(crate) added: Vec<PeerId>,
    pub(crate) dropped: Vec<PeerId>,
}

/// The seed in the cells of one room.
#[derive(Debug)]
pub(crate) struct Cells {
    config: CellsConfig,
    /// The id that all others are made from; `None` where ids are given, and stay.
    base: Option<PeerId>,
    /// The ids that the seed goes by: with [`Bridge::Every`] that of each cell, else one.
    ours: Vec<PeerId>,
    topology: Arc<Topology>,
    sealed: Option<Instant>,
    /// When the topology counts as settled, until that has been acted on.
    settles: Option<Instant>,
    repicked: Option<Instant>,
    /// When ids are to be looked for that a seal left out.
    unfinished: Option<Instant>,
    claims: Claims,
    seen: Seen,
    postmark: Postmark,
}

impl Cells {
    pub(crate) fn new(config: CellsConfig, base: PeerId) -> Self {
        let election = Election::expected(likely(1));
        let id = match config.bridge {
            Bridge::One => election.bridge(base),
            Bridge::Every => election.bridge_of(CellIndex(0), base),
            Bridge::Off => election.member(base),
        };
        Self {
            config,
            base: Some(base),
            ours: vec![id],
            topology: Arc::new(Topology::new(&[id], config.cell_size)),
            sealed: None,
            settles: None,
            repicked: None,
            unfinished: None,
            claims: Claims::default(),
            seen: Seen::default(),
            postmark: Postmark::default(),
        }
    }

    /// The ids that the seed goes by.
    pub(crate) fn ours(&self) -> &[PeerId] {
        &self.ours
    }

    /// How many cells there are.
    pub(crate) fn total_cells(&self) -> usize {
        self.topology.total_cells()
    }

    /// How many of the cells have one of the seed's ids as their bridge.
    pub(crate) fn bridged(&self) -> usize {
        self.ours.iter().filter(|us| self.topology.is_bridge(us)).count()
    }

    /// The cells, in their order, as somebody may look at them.
    pub(crate) fn statuses(&self) -> Vec<CellStatus> {
        let total = u32::try_from(self.topology.total_cells()).unwrap_or(u32::MAX);
        let status = |cell| {
            let members = self.topology.members(CellIndex(cell));
            let bridged = members.iter().any(|member| self.ours.contains(member) && self.topology.is_bridge(member));
            CellStatus { members: members.len(), bridged }
        };
        (0..total).map(status).collect()
    }

    /// When there is something to do besides sealing.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        self.unfinished.into_iter().chain(self.settles).chain(self.claims.next_tick()).min()
    }

    /// Peers that have dropped what they were sent, since they were in another cell than we had them in; each is handed out
    /// once, a moment after it has said so.
    pub(crate) fn strays(&mut self, now: Instant) -> HashSet<PeerId> {
        self.claims.strays(now)
    }

    /// Whether the topology has just settled: true once after the last of several seals.
    pub(crate) fn has_settled(&mut self, now: Instant) -> bool {
        self.settles.take_if(|at| now >= *at).is_some()
    }

    /// One of `peers` for each cell that any of them is in.
    pub(crate) fn one_of_each_cell(&self, peers: impl Iterator<Item = (PeerId, LinkId)>) -> Vec<LinkId> {
        let mut chosen: HashMap<CellIndex, LinkId> = HashMap::new();
        for (peer, link) in peers {
            if let Some(cell) = self.topology.cell_of(&peer) {
                chosen.insert(cell, link);
            }
        }
        chosen.into_values().collect()
    }

    /// Whether ids are to be looked for now.
    pub(crate) fn is_unfinished(&self, now: Instant) -> bool {
        self.unfinished.is_some_and(|at| now >= at)
    }

    /// Makes the topology of those who are there, and changes the seed's ids where they no longer do.
    pub(crate) fn seal(&mut self, roster: &Roster, now: Instant) -> IdChange {
        let before = self.ours.clone();
        let others: Vec<PeerId> = roster.iter().filter(|peer| !self.ours.contains(peer)).collect();
        self.unfinished = None;
        match (self.base, self.config.bridge) {
            (None, _) => {}
            (Some(base), Bridge::Every) => self.pick_for_every_cell(base, &others, now),
            (Some(base), Bridge::One | Bridge::Off) => self.pick_one(base, &others, now),
        }
        self.topology = Arc::new(self.topology_with(&others));
        self.sealed = Some(now);
        self.settles = Some(now + SETTLED_AFTER);
        let added = self.ours.iter().filter(|id| !before.contains(id)).copied().collect();
        let dropped = before.into_iter().filter(|id| !self.ours.contains(id)).collect();
        IdChange { added, dropped }
    }

    fn topology_with(&self, others: &[PeerId]) -> Topology {
        Topology::new(&[others, &self.ours].concat(), self.config.cell_size)
    }

    /// Takes another id when the one we have is not what it should be: the room has grown beyond what was likely, or
    /// somebody has a better one.
    fn pick_one(&mut self, base: PeerId, others: &[PeerId], now: Instant) {
        let topology = self.topology_with(others);
        let (us, count) = (self.ours[0], cell_count(others.len() + 1, self.config.cell_size));
        let alone = topology.cell_of(&us).is_none_or(|cell| topology.members(cell).len() < 2);
        let fits = match self.config.bridge {
            Bridge::Off => !topology.is_bridge(&us) || alone,
            Bridge::One | Bridge::Every => topology.is_bridge(&us),
        };
        if count < 2 || fits || self.repicked.is_some_and(|at| now < at + REPICK_INTERVAL) {
            return;
        }
        let election = Election::expected(likely(count)).held_among(others, 1, self.config.cell_size);
        self.ours[0] = match self.config.bridge {
            Bridge::Off => election.member(base),
            Bridge::One | Bridge::Every => election.bridge(base),
        };
        self.repicked = Some(now);
    }

    /// Has one id for each cell, each the bridge of its own. The ids count as members: of every cell, one is ours.
    fn pick_for_every_cell(&mut self, base: PeerId, others: &[PeerId], now: Instant) {
        let per_cell = self.config.cell_size.saturating_sub(1).max(1);
        let needed = |others: usize| cell_count(others, per_cell).min(MAX_IDS) as usize;
        let count = needed(others.len());
        // Who comes and goes at the brink of another cell is not to make an id come and go.
        let kept = needed(others.len() + per_cell / 2);
        self.ours.truncate(kept.max(count));
        let total = u32::try_from(count).unwrap_or(MAX_IDS);
        let mut best = vec![0; count];
        for other in others.iter().map(HashedId::new) {
            let cell = other.cell_among(total);
            if let Some(best) = usize::try_from(cell.0).ok().and_then(|cell| best.get_mut(cell)) {
                *best = other.rank(cell).max(*best);
            }
        }
        let mut election = None;
        let mut picks = 0;
        for (index, best) in best.into_iter().enumerate() {
            let cell = CellIndex(u32::try_from(index).unwrap_or(MAX_IDS));
            let wins = self.ours.get(index).is_some_and(|us| {
                let us = HashedId::new(us);
                count < 2 || (us.cell_among(total) == cell && us.rank(cell) > best)
            });
            if wins {
                continue;
            }
            if picks == PICKS_AT_ONCE {
                self.unfinished = Some(now + PICK_PAUSE);
                break;
            }
            picks += 1;
            let election = election.get_or_insert_with(|| {
                Election::expected(likely(total)).held_among(others, count, self.config.cell_size)
            });
            let id = election.bridge_of(cell, base);
            match self.ours.get_mut(index) {
                Some(us) => *us = id,
                None => self.ours.push(id),
            }
        }
    }

    /// Whether `us` keeps a link with `peer`. A newcomer, whom nobody has in a topology yet, is met at once by the id
    /// whose cell it will be in, so that it need not wait for the state of the room.
    pub(crate) fn wants(&self, us: &PeerId, peer: &PeerId) -> bool {
        if self.ours.contains(peer) {
            return false;
        }
        if self.topology.cell_of(peer).is_some() {
            return self.topology.are_linked(us, peer);
        }
        self.cell_to_be(peer).and_then(|cell| self.ours.get(cell)).unwrap_or(&self.ours[0]) == us
    }

    fn cell_to_be(&self, peer: &PeerId) -> Option<usize> {
        let total = u32::try_from(self.topology.total_cells()).unwrap_or(u32::MAX);
        usize::try_from(HashedId::new(peer).cell_among(total).0).ok()
    }

    /// Whether the link of `us` with `peer`, open since `opened`, has no place in the topology.
    pub(crate) fn is_surplus(&self, us: &PeerId, peer: &PeerId, opened: Instant, now: Instant) -> bool {
        self.sealed.is_some_and(|at| now >= at + PRUNE_AFTER)
            && now >= opened + YOUNG
            && self.topology.cell_of(peer).is_some()
            && !self.topology.are_linked(us, peer)
    }

    /// Whether `peer` is a bridge, whom others rely on.
    pub(crate) fn is_bridge(&self, peer: &PeerId) -> bool {
        self.topology.is_bridge(peer)
    }

    /// Whether `us` passes on what it gets: every bridge does. A seed that is to be one does so as well while clients
    /// may think that it is: others may have sealed a roster that still is `changing` here.
    pub(crate) fn passes_on(&self, us: &PeerId, changing: bool) -> bool {
        let may_be_elected = self.config.bridge != Bridge::Off && (changing || self.topology.total_cells() > 1);
        self.topology.is_bridge(us) || may_be_elected
    }

    /// The channels of the cells in one of which `peer` listens: that which the topology has it in, or will, and that which
    /// it said itself since the last seal. Who says another cell than ours may join ours at its next seal, and then says
    /// nothing until it has something to say: so it is sent what there is on both, and drops one of them.
    pub(crate) fn channels_to(&self, peer: &PeerId) -> impl Iterator<Item = ChannelName> + use<> {
        let known = self.topology.cell_of(peer);
        let to_be = || self.cell_to_be(peer).and_then(|cell| u32::try_from(cell).ok()).map_or(CellIndex(0), CellIndex);
        let ours = known.unwrap_or_else(to_be);
        let claimed = self.claims.of(peer, self.sealed.filter(|_| known.is_some())).filter(|cell| *cell != ours);
        [Some(ours), claimed].into_iter().flatten().map(CellIndex::channel)
    }

    /// Whether `us` is in the very cell of `peer`: of several links to a peer, that one is taken.
    pub(crate) fn is_in_cell_of(&self, us: &PeerId, peer: &PeerId) -> bool {
        self.topology.cell_of(us) == self.topology.cell_of(peer)
    }

    /// A frame came from `from`. Returns the envelope unless it was seen before, or was ours to begin with.
    pub(crate) fn receive(&mut self, from: PeerId, envelope: Envelope, now: Instant) -> Option<Envelope> {
        if let Some(cell) = envelope.origin_cell.filter(|_| envelope.origin == from)
            // Nobody is in a cell so far out; whoever says so is not to make us remember each of its channels.
            && u64::from(cell.0) < 2 * self.topology.total_cells() as u64 + 16
        {
            let is_news = !self.channels_to(&from).any(|channel| channel == cell.channel());
            self.claims.take(from, cell, is_news, now);
        }
        let new = self.seen.insert(envelope.id.as_printed());
        (new && !self.ours.contains(&envelope.origin)).then_some(envelope)
    }

    /// The last link to `peer` has ended.
    pub(crate) fn unlinked(&mut self, peer: &PeerId) {
        self.claims.forget(peer);
    }

    /// A message of the seed's own, to everybody.
    pub(crate) fn message(&mut self, wall_ms: u64, channel: ChannelName, payload: &str) -> Envelope {
        let envelope = self.postmark.channel(self.ours[0], &self.topology, wall_ms, channel, payload);
        self.seen.insert(envelope.id.as_printed());
        envelope
    }

    /// The seed's answer to a ping of one of its ids.
    pub(crate) fn pong(&mut self, us: PeerId, wall_ms: u64, ping_id: &Json) -> Envelope {
        let envelope = self.postmark.pong(us, &self.topology, wall_ms, ping_id);
        self.seen.insert(envelope.id.as_printed());
        envelope
    }
}

/// The counts of cells that a room of `count` cells is likely to have before long.
fn likely(count: u32) -> RangeInclusive<u32> {
    (count * 2 / 3).max(2)..=(count * 2).max(6)
}

/// The messages that were seen last. Ids are kept as hashes under a key that nobody knows.
#[derive(Debug, Default)]
struct Seen {
    hasher: RandomState,
    ids: RecentSet<u64, REMEMBERED>,
}

impl Seen {
    /// Takes note of an id. Returns whether it is new.
    fn insert(&mut self, id: &str) -> bool {
        self.ids.insert(self.hasher.hash_one(id))
    }
}

#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signalling::RelayIndex;

    fn peer(number: u32) -> PeerId {
        PeerId::parse(&format!("{number:020}")).unwrap()
    }

    /// Something that `origin` says, being in `cell`.
    fn said(origin: PeerId, cell: CellIndex, sequence: u32) -> Envelope {
        let ids = format!(r#""id":"{origin}:x:{sequence}","origin":"{origin}","originCell":"{cell}""#);
        Envelope::parse(&format!(r#"{{"t":"msg","ttl":3,"data":{{"_ch":"chat","_d":1}},{ids}}}"#)).unwrap()
    }

    #[test]
    fn who_says_another_cell_than_ours_is_sent_what_there_is_on_both_and_anew_what_it_dropped() {
        let start = Instant::now();
        let mut cells = Cells::new(CellsConfig { cell_size: 3, bridge: Bridge::One }, peer(1_000));
        let mut roster = Roster::new(start);
        for number in 0..12 {
            roster.heard(peer(number), RelayIndex(0), start);
        }
        cells.seal(&roster, start);
        let home = |cells: &Cells, peer: &PeerId| cells.topology.cell_of(peer).unwrap();
        let late = (0..12).map(peer).find(|peer| home(&cells, peer) != CellIndex(0)).unwrap();
        let cell = home(&cells, &late);
        let to = |cells: &Cells| cells.channels_to(&late).collect::<Vec<_>>();
        assert_eq!(to(&cells), [cell.channel()]);

        // It is here already, but has not sealed anything: like everybody alone, it is in the first.
        let now = start + Duration::from_millis(500);
        assert!(cells.receive(late, said(late, CellIndex(0), 1), now).is_some());
        assert_eq!(to(&cells), [cell.channel(), CellIndex(0).channel()]);
        assert!(cells.strays(now).is_empty());
        // That it is where it was told already is no news, nor is what it says of others.
        let other = (0..12).map(peer).find(|other| home(&cells, other) == CellIndex(0)).unwrap();
        assert!(cells.receive(other, said(other, CellIndex(0), 1), now).is_some());
        assert!(cells.receive(late, said(peer(5_000), CellIndex(2), 1), now).is_some());
        let mends = cells.next_tick().unwrap();
        assert_eq!(cells.strays(mends), HashSet::from([late]));
        assert!(cells.strays(mends + Duration::from_secs(60)).is_empty(), "once");

        assert!(cells.receive(late, said(late, cell, 2), mends).is_some());
        assert_eq!(to(&cells), [cell.channel()]);
        // A larger roster than ours has cells that ours has not.
        let beyond = CellIndex(u32::try_from(cells.total_cells()).unwrap() + 1);
        assert!(cells.receive(late, said(late, beyond, 3), mends).is_some());
        assert_eq!(to(&cells), [cell.channel(), beyond.channel()]);
        // After a seal everybody seals.
        cells.seal(&roster, mends + Duration::from_secs(1));
        assert_eq!(to(&cells), [home(&cells, &late).channel()]);
        cells.unlinked(&late);
        assert!(cells.strays(mends + Duration::from_secs(60)).is_empty(), "it is gone");
    }

    #[test]
    fn a_topology_settles_once_after_the_last_of_several_seals() {
        let start = Instant::now();
        let config = CellsConfig { cell_size: 4, bridge: Bridge::One };
        let mut cells = Cells::new(config, PeerId::parse(&"m".repeat(20)).unwrap());
        assert!(!cells.has_settled(start + SETTLED_AFTER));
        let roster = Roster::new(start);
        let later = start + SETTLED_AFTER / 2;
        cells.seal(&roster, start);
        cells.seal(&roster, later);
        assert!(!cells.has_settled(start + SETTLED_AFTER));
        assert_eq!(cells.next_tick(), Some(later + SETTLED_AFTER));
        assert!(cells.has_settled(later + SETTLED_AFTER));
        assert!(!cells.has_settled(later + SETTLED_AFTER) && cells.next_tick().is_none());
    }
}
