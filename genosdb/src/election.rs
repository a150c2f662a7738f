//! Peer ids that win, or lose, the election of a cell's bridge (wire §5).
//!
//! A peer chooses its own id, and where it stands follows from hashes of it: the cell of its greatest affinity, its
//! rank among that cell's members. So a peer that stays for years can look for an id with the place that it wants.
//!
//! - When the room grows, cells are added, and a peer moves whenever a new one has more affinity than all before. So an
//!   id is judged by where it stands at several counts of cells, from the fewest to the most that are likely.
//! - What it takes to win differs from cell to cell. Affinity and rank hash nearly the same text with a hash that mixes
//!   little: the members of a cell, being those of great affinity, have ranks that crowd around a few values. So the
//!   bar is not computed but found: the greatest rank among the members of each cell in a made-up crowd, and among
//!   those who are really there. Of all ids tried, the one that clears its lowest margin by most is taken.
//!
//! Ids are enumerated: 16 characters come from an id that the peer keeps, and the last four vary. The same question
//! always finds the same id, so that a restarted peer is known again.

use std::ops::RangeInclusive;

use crate::cells::{CellIndex, HashedId, cell_count};
use crate::topic::PeerId;

/// Ids that are tried for one place.
const CANDIDATES: u32 = 300_000;
/// Members of each cell in the made-up crowd: fifty times as many as a cell of real peers has.
const CROWD_PER_CELL: u64 = 500;
/// Affinities that may be computed for one crowd; for thousands of cells, the crowd is smaller.
const CROWD_COST: u64 = 4_000_000;
/// Counts of cells at which an id is judged.
const COUNTS: u32 = 6;

/// The id with the greatest score, of those that start as `base` does. `score` is told the best so far, and may leave
/// off at what is no better.
fn best(base: PeerId, score: impl Fn(HashedId, i64) -> Option<i64>) -> PeerId {
    let mut best = (i64::MIN, base);
    for number in 0..CANDIDATES {
        let candidate = base.with_ending(number);
        if let Some(score) = score(HashedId::new(&candidate), best.0)
            && score > best.0
        {
            best = (score, candidate);
        }
    }
    best.1
}

/// What it costs an id to leave its cell at one of the likely counts: more than to lose it there.
const LEFT_LATER: i64 = 1 << 33;
/// What it costs an id to lose the election that is held now.
const LOST_NOW: i64 = 1 << 34;

/// Those who stand for election at one count of cells.
#[derive(Debug, Clone)]
struct Field {
    count: u32,
    /// Whether the election is held now, among peers that are there: it must be won before all others.
    is_held: bool,
    /// The ranks of others, by cell, ordered.
    ranks: Vec<Vec<u32>>,
}

impl Field {
    fn new(count: u32, is_held: bool, others: impl Iterator<Item = HashedId>) -> Self {
        let mut ranks = vec![Vec::new(); count as usize];
        for other in others {
            let cell = other.cell_among(count);
            ranks[cell.0 as usize].push(other.rank(cell));
        }
        ranks.iter_mut().for_each(|ranks| ranks.sort_unstable());
        Self { count, is_held, ranks }
    }

    /// How an id fares in a cell: by how much it beats all others, or else minus 2^32 times the share of those that
    /// beat it; and below all of that where the election is held now.
    fn margin(&self, id: HashedId, cell: CellIndex) -> i64 {
        let (rank, ranks) = (id.rank(cell), &self.ranks[cell.0 as usize]);
        let Some(greatest) = ranks.last() else { return i64::from(rank) };
        if rank > *greatest {
            return i64::from(rank - greatest);
        }
        let beaten = ranks.partition_point(|other| *other < rank);
        let share = ((ranks.len() - beaten) << 32) / ranks.len();
        let loss = i64::try_from(share).unwrap_or(i64::MAX);
        if self.is_held { -LOST_NOW - loss } else { -loss }
    }

    fn expected(count: u32) -> Self {
        let per_cell = CROWD_PER_CELL.min(CROWD_COST / u64::from(count).pow(2)).max(10);
        // Any fixed sequence will do (Knuth's MMIX generator).
        let mut state = u64::from(count);
        let mut random = move |range: std::ops::Range<usize>| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            range.start + usize::try_from(state >> 33).unwrap_or(0) % range.len()
        };
        let crowd = (0..per_cell * u64::from(count)).map(|_| HashedId::new(&PeerId::generate(&mut random)));
        Self::new(count, false, crowd)
    }
}

/// The elections that an id is to win, or to lose: one for each of some counts of cells.
#[derive(Debug, Clone)]
pub struct Election {
    /// Ordered by count.
    fields: Vec<Field>,
}

impl Election {
    /// The elections of a room that may have `counts` cells. A room of one cell has none. Where the most are three times
    /// the fewest, ids are found that beat all the crowd; over wider ranges, members of small cells beat them.
    pub fn expected(counts: RangeInclusive<u32>) -> Self {
        let (first, last) = (*counts.start().max(&2), *counts.end().max(&2));
        let step = |index: u32| {
            // Evenly on a logarithmic scale: what counts is by how much a room grows.
            let ratio = f64::from(last) / f64::from(first);
            let count = f64::from(first) * ratio.powf(f64::from(index) / f64::from(COUNTS - 1));
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two counts")]
            let count = count.round() as u32;
            count
        };
        let mut counts: Vec<u32> = (0..COUNTS).map(step).collect();
        counts.dedup();
        Self { fields: counts.into_iter().map(Field::expected).collect() }
    }

    /// Counts in the election that is held now among `others`, with `ours` ids of our own beside them.
    #[must_use]
    pub fn held_among(mut self, others: &[PeerId], ours: usize, cell_size: usize) -> Self {
        let count = cell_count(others.len() + ours, cell_size);
        if count > 1 {
            self.fields.push(Field::new(count, true, others.iter().map(HashedId::new)));
            self.fields.sort_by_key(|field| field.count);
        }
        self
    }

    /// An id of `base`'s kind that wins its cell, whichever that is.
    pub fn bridge(&self, base: PeerId) -> PeerId {
        best(base, |id, best| self.lowest_margin(id, best, |field, cell| field.margin(id, cell)))
    }

    /// An id that is in `cell` and wins it, wherever there are so many cells.
    pub fn bridge_of(&self, cell: CellIndex, base: PeerId) -> PeerId {
        let concerned: Vec<&Field> = self.fields.iter().filter(|field| field.count > cell.0).collect();
        best(base, |id, best| {
            // Whether it would win is quickly seen; whether it belongs there, less so.
            let would_win = concerned.iter().all(|field| field.margin(id, cell) > best);
            let margin = |field: &Field, its| match its {
                // Where there are fewer cells, nobody is in this one.
                _ if field.count <= cell.0 => i64::MAX,
                its if its == cell => field.margin(id, cell),
                // It may leave the cell when the room grows, and another id come, but not now.
                _ if field.is_held => i64::MIN,
                _ => -LEFT_LATER,
            };
            would_win.then(|| self.lowest_margin(id, best, margin)).flatten()
        })
    }

    /// An id that wins nowhere if it can help it.
    pub fn member(&self, base: PeerId) -> PeerId {
        best(base, |id, best| self.lowest_margin(id, best, |field, cell| -field.margin(id, cell)))
    }

    /// The least of an id's margins over all elections; `None` once one is not over `best`.
    fn lowest_margin(&self, id: HashedId, best: i64, margin: impl Fn(&Field, CellIndex) -> i64) -> Option<i64> {
        let mut lowest = i64::MAX;
        let mut cell = CellIndex(0);
        let mut greatest = id.affinity(cell);
        let mut next = 1;
        for field in &self.fields {
            for other in (next..field.count).map(CellIndex) {
                let affinity = id.affinity(other);
                if affinity > greatest {
                    (cell, greatest) = (other, affinity);
                }
            }
            next = next.max(field.count);
            lowest = lowest.min(margin(field, cell));
            if lowest <= best {
                return None;
            }
        }
        Some(lowest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cells::Topology;

    fn base() -> PeerId {
        PeerId::parse("zP5xrSA37VoHEv5F0C0U").unwrap()
    }

    /// Members with ids as random as a test can have them.
    fn crowd(count: u64, seed: u64) -> Vec<PeerId> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = move |range: std::ops::Range<usize>| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            range.start + usize::try_from(state % 1_000_003).unwrap() % range.len()
        };
        (0..count).map(|_| PeerId::generate(&mut random)).collect()
    }

    /// In how many of 100 rooms of `peers` others each of `ours` is a bridge.
    fn elected(ours: &[PeerId], peers: u64) -> usize {
        let is_elected = |seed: &u64| {
            let mut roster = crowd(peers, *seed);
            roster.extend(ours);
            let topology = Topology::new(&roster, 10);
            ours.iter().all(|id| topology.is_bridge(id))
        };
        (1..=100).filter(is_elected).count()
    }

    #[test]
    fn an_id_wins_its_cell_at_all_likely_sizes_of_the_room() {
        for (counts, rooms) in [(2..=6, [11, 15, 25, 45, 58]), (8..=24, [75, 100, 120, 200, 238])] {
            let id = Election::expected(counts).bridge(base());
            for peers in rooms {
                let elected = elected(&[id], peers);
                assert!(elected >= 98, "{elected} of 100 with {peers} peers");
            }
        }
    }

    #[test]
    fn one_id_a_cell_wins_every_cell() {
        let election = Election::expected(5..=16);
        let bridge_of = |cell| election.bridge_of(CellIndex(cell), base());
        let ours: Vec<PeerId> = (0..8).map(bridge_of).collect();
        for (cell, id) in ours.iter().enumerate() {
            for count in [8, 12, 16] {
                assert_eq!(HashedId::new(id).cell_among(count), CellIndex(u32::try_from(cell).unwrap()));
            }
        }
        // 72 others and our 8 are 8 cells of 10.
        let elected = elected(&ours, 72);
        assert!(elected >= 90, "{elected} of 100");
    }

    #[test]
    fn who_is_really_there_is_outdone() {
        let others = crowd(72, 5);
        let election = Election::expected(8..=16).held_among(&others, 8, 10);
        let ours: Vec<PeerId> = (0..8).map(|cell| election.bridge_of(CellIndex(cell), base())).collect();
        let topology = Topology::new(&[others, ours.clone()].concat(), 10);
        assert!(ours.iter().all(|id| topology.is_bridge(id)));
        // In small rooms what is likely spans cells that nobody can win in all: what counts is now.
        for seed in 1..60 {
            let others = crowd(12, seed);
            let base = PeerId::parse(&format!("z{}", &others[0].as_str()[1..])).unwrap();
            let election = Election::expected(2..=8).held_among(&others, 4, 4);
            let mut ours = vec![election.bridge_of(CellIndex(0), base)];
            ours.extend((1..4).map(|cell| election.bridge_of(CellIndex(cell), base)));
            let topology = Topology::new(&[others, ours.clone()].concat(), 4);
            assert!(ours.iter().all(|id| topology.is_bridge(id)), "room {seed}");
        }
    }

    #[test]
    fn a_member_is_not_elected() {
        let id = Election::expected(2..=32).member(base());
        for peers in [15, 60, 250] {
            let elected = elected(&[id], peers);
            assert!(elected <= 2, "{elected} of 100 with {peers} peers");
        }
    }

    #[test]
    fn the_same_question_finds_the_same_id() {
        let id = Election::expected(2..=6).bridge(base());
        assert_eq!(id, Election::expected(2..=6).bridge(base()));
        // It starts as the base does: glare is decided by that.
        assert_eq!(id.as_str()[..16], base().as_str()[..16]);
    }
}
