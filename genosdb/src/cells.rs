//! The topology of a room in cells, which every peer computes alone from the same roster (wire §5).

use std::collections::HashMap;
use std::fmt;

use crate::frame::ChannelName;
use crate::topic::PeerId;

/// A cell's number, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CellIndex(pub u32);

impl fmt::Display for CellIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cell-{}", self.0)
    }
}

impl CellIndex {
    /// Parses a cell's name, `cell-<n>`; `None` when it is not one.
    pub fn parse(name: &str) -> Option<Self> {
        let number = name.strip_prefix("cell-")?;
        number.parse().ok().map(Self).filter(|cell| cell.to_string() == name)
    }

    /// The channel on which frames for this cell's members travel: `c<n>`.
    pub fn channel(self) -> ChannelName {
        // "c" and at most ten digits: shorter than a channel's name may be.
        ChannelName::new(&format!("c{}", self.0)).unwrap_or(ChannelName::LEAVE)
    }

    /// The cell whose frames travel on `channel`; `None` when it is no cell's.
    pub fn of_channel(channel: ChannelName) -> Option<Self> {
        let cell = Self(channel.as_str().strip_prefix('c')?.parse().ok()?);
        (cell.channel() == channel).then_some(cell)
    }
}

/// The transport's hash of a text, over its UTF-16 units; what is hashed here is ASCII. Goes on from `hash`, the hash
/// of what stands before.
fn hash_on(hash: u32, text: impl IntoIterator<Item = u8>) -> u32 {
    text.into_iter().fold(hash, |hash, unit| (hash ^ u32::from(unit)).wrapping_mul(2_654_435_761))
}

/// A peer's id, hashed as far as all its hashes have in common. The peers of a large room are asked for their place
/// among thousands of cells.
#[derive(Debug, Clone, Copy)]
pub struct HashedId(u32);

impl HashedId {
    /// Hashes the id of `peer`.
    pub fn new(peer: &PeerId) -> Self {
        Self(hash_on(0, peer.as_str().bytes()))
    }

    /// How strongly the peer belongs to a cell: it is in the one of its greatest affinity, the first of equals.
    pub fn affinity(self, cell: CellIndex) -> u32 {
        self.hash(b':', cell)
    }

    /// The peer's rank in the election of a cell's bridge: the greatest wins, then the next in the line of succession.
    pub fn rank(self, cell: CellIndex) -> u32 {
        self.hash(b'@', cell)
    }

    /// The cell of the peer when there are `count`.
    pub fn cell_among(self, count: u32) -> CellIndex {
        let cells = (0..count.max(1)).map(CellIndex);
        let best = cells.max_by_key(|cell| (self.affinity(*cell), std::cmp::Reverse(*cell)));
        best.unwrap_or(CellIndex(0))
    }

    fn hash(self, separator: u8, CellIndex(cell): CellIndex) -> u32 {
        let mut digits = [0; 10];
        let mut start = digits.len();
        let mut rest = cell;
        loop {
            start -= 1;
            digits[start] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        hash_on(hash_on(self.0, [separator]), digits[start..].iter().copied())
    }
}

/// How many cells a room of `peers` has, with cells of about `cell_size`; a size of 0 counts as 1.
pub fn cell_count(peers: usize, cell_size: usize) -> u32 {
    u32::try_from(peers.div_ceil(cell_size.max(1)).max(1)).unwrap_or(u32::MAX)
}

/// Who is in which cell, and who bridges. Made from a sealed roster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// The members of each cell in the order of succession: the first is the bridge.
    cells: Vec<Vec<PeerId>>,
    places: HashMap<PeerId, CellIndex>,
}

impl Topology {
    /// The topology of `roster` with cells of about `cell_size` peers; a size of 0 counts as 1.
    pub fn new(roster: &[PeerId], cell_size: usize) -> Self {
        let count = cell_count(roster.len(), cell_size);
        let mut ranked = vec![Vec::new(); count as usize];
        let mut places = HashMap::with_capacity(roster.len());
        for peer in roster {
            let hashed = HashedId::new(peer);
            let cell = hashed.cell_among(count);
            if places.insert(*peer, cell).is_none() {
                ranked[cell.0 as usize].push((hashed.rank(cell), *peer));
            }
        }
        let succession = |mut members: Vec<(u32, PeerId)>| {
            members.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
            members.into_iter().map(|(_, peer)| peer).collect()
        };
        Self { cells: ranked.into_iter().map(succession).collect(), places }
    }

    /// How many cells there are, empty ones included.
    pub fn total_cells(&self) -> usize {
        self.cells.len()
    }

    /// The cell of `peer`, if it is in the roster.
    pub fn cell_of(&self, peer: &PeerId) -> Option<CellIndex> {
        self.places.get(peer).copied()
    }

    /// Whether `peer` is the bridge of its cell. A room of one cell has none: there is nothing to bridge.
    pub fn is_bridge(&self, peer: &PeerId) -> bool {
        self.cells.len() > 1 && self.cell_of(peer).is_some_and(|cell| self.members(cell).first() == Some(peer))
    }

    /// The members of a cell in the order of succession; the first is its bridge.
    pub fn members(&self, cell: CellIndex) -> &[PeerId] {
        self.cells.get(usize::try_from(cell.0).unwrap_or(usize::MAX)).map_or(&[], Vec::as_slice)
    }

    /// Whether two cells are neighbours: at a distance of 1, 2, 4 …
    pub fn are_neighbours(&self, one: CellIndex, other: CellIndex) -> bool {
        one.0.abs_diff(other.0).is_power_of_two()
    }

    /// The neighbours of a cell: at distances 1, 2, 4 … in both directions.
    pub fn neighbours(&self, cell: CellIndex) -> Vec<CellIndex> {
        let count = u32::try_from(self.cells.len()).unwrap_or(u32::MAX);
        let distances = (0..32).map(|power| 1u32 << power).take_while(|distance| *distance < count);
        let mut neighbours: Vec<CellIndex> = distances
            .flat_map(|distance| [cell.0.checked_sub(distance), cell.0.checked_add(distance)])
            .flatten()
            .filter(|index| *index < count)
            .map(CellIndex)
            .collect();
        neighbours.sort();
        neighbours
    }

    /// The cells whose channels `peer` sends on and listens to: its own and, as a bridge, the neighbouring ones.
    pub fn channels(&self, peer: &PeerId) -> Vec<CellIndex> {
        let Some(cell) = self.cell_of(peer) else { return Vec::new() };
        let mut channels = if self.is_bridge(peer) { self.neighbours(cell) } else { Vec::new() };
        channels.push(cell);
        channels
    }

    /// Whether frames on the channel of `cell` reach `peer`: it is a member, or bridges a neighbour.
    pub fn hears(&self, peer: &PeerId, cell: CellIndex) -> bool {
        self.cell_of(peer).is_some_and(|own| own == cell || (self.are_neighbours(own, cell) && self.is_bridge(peer)))
    }

    /// Whether two peers keep a link: members of one cell, and a bridge with every member of a neighbouring cell.
    pub fn are_linked(&self, one: &PeerId, other: &PeerId) -> bool {
        let (Some(cell), Some(others)) = (self.cell_of(one), self.cell_of(other)) else { return false };
        one != other
            && (cell == others || (self.are_neighbours(cell, others) && (self.is_bridge(one) || self.is_bridge(other))))
    }

    /// Whom `peer` keeps a link with, ordered: its own cell; as a bridge all members of the neighbouring cells; and the
    /// bridges of those.
    pub fn links(&self, peer: &PeerId) -> Vec<PeerId> {
        let Some(cell) = self.cell_of(peer) else { return Vec::new() };
        let cells = self.neighbours(cell).into_iter().chain([cell]);
        let mut links: Vec<PeerId> =
            cells.flat_map(|cell| self.members(cell)).filter(|other| self.are_linked(peer, other)).copied().collect();
        links.sort();
        links
    }

    /// The roster that the topology was made from, unordered.
    pub fn roster(&self) -> impl Iterator<Item = &PeerId> {
        self.places.keys()
    }

    /// How many times a message may be passed on.
    pub fn ttl(&self) -> u32 {
        let cells = u32::try_from(self.cells.len()).unwrap_or(u32::MAX);
        // The logarithm to base 2 of cells + 1, rounded up.
        let log = u32::BITS - cells.leading_zeros();
        (2 * log + 3).min(150)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ttl_grows_with_the_logarithm_of_the_cells() {
        for (cells, ttl) in [(1, 5), (2, 7), (3, 7), (4, 9), (5, 9), (7, 9), (8, 11)] {
            assert_eq!(Topology { cells: vec![Vec::new(); cells], places: HashMap::new() }.ttl(), ttl, "{cells} cells");
        }
    }

    #[test]
    fn nobody_is_alone_in_an_empty_room() {
        let topology = Topology::new(&[], 0);
        assert_eq!(topology.total_cells(), 1);
        let peer = PeerId::parse("rP5xrSA37VoHEv5F0C0U").unwrap();
        assert_eq!((topology.cell_of(&peer), topology.is_bridge(&peer)), (None, false));
        assert!(topology.links(&peer).is_empty());
    }

    #[test]
    fn names_of_cells_are_read_as_they_are_written() {
        for number in [0, 7, 10, 149, u32::MAX] {
            let cell = CellIndex(number);
            assert_eq!(CellIndex::parse(&cell.to_string()), Some(cell));
            assert_eq!(CellIndex::of_channel(cell.channel()), Some(cell));
        }
        for text in ["c", "c-1", "c01", "cx", "c4294967296", "d1", "chat", "syncGraph"] {
            assert_eq!(CellIndex::of_channel(ChannelName::new(text).unwrap()), None, "{text}");
        }
        for text in ["", "cell-", "cell-01", "cell-+1", "c1"] {
            assert_eq!(CellIndex::parse(text), None, "{text}");
        }
    }
}
