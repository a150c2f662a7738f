//! The topology of a room in cells, which every peer computes alone from the same roster (wire §5).

use std::fmt;

use crate::topic::PeerId;

/// A cell's number, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CellIndex(pub u32);

impl fmt::Display for CellIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cell-{}", self.0)
    }
}

/// The transport's hash of a string: over its UTF-16 units, which for ids are its bytes.
fn hash(text: &str) -> u32 {
    text.encode_utf16().fold(0, |hash: u32, unit| (hash ^ u32::from(unit)).wrapping_mul(2_654_435_761))
}

/// Who is in which cell, and who bridges. Made from a sealed roster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// The members of each cell in the order of succession: the first is the bridge.
    cells: Vec<Vec<PeerId>>,
}

impl Topology {
    /// The topology of `roster` with cells of about `cell_size` peers; a size of 0 counts as 1.
    pub fn new(roster: &[PeerId], cell_size: usize) -> Self {
        let count = roster.len().div_ceil(cell_size.max(1)).max(1);
        let mut cells = vec![Vec::new(); count];
        for peer in roster {
            cells[cell_among(peer, count)].push(*peer);
        }
        for (index, members) in cells.iter_mut().enumerate() {
            members.sort_by_key(|peer| std::cmp::Reverse(hash(&format!("{peer}@{index}"))));
        }
        Self { cells }
    }

    /// How many cells there are, empty ones included.
    pub fn total_cells(&self) -> usize {
        self.cells.len()
    }

    /// The cell of `peer`, if it is in the roster.
    pub fn cell_of(&self, peer: &PeerId) -> Option<CellIndex> {
        let index = cell_among(peer, self.cells.len());
        self.cells[index].contains(peer).then(|| cell_index(index))
    }

    /// Whether `peer` is the bridge of its cell. A room of one cell has none: there is nothing to bridge.
    pub fn is_bridge(&self, peer: &PeerId) -> bool {
        self.cells.len() > 1 && self.cells[cell_among(peer, self.cells.len())].first() == Some(peer)
    }

    /// The members of a cell in the order of succession; the first is its bridge.
    pub fn members(&self, cell: CellIndex) -> &[PeerId] {
        self.cells.get(usize::try_from(cell.0).unwrap_or(usize::MAX)).map_or(&[], Vec::as_slice)
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

    /// Whom `peer` keeps a link with, ordered: its own cell; as a bridge all members of the neighbouring cells; and the
    /// bridges of those.
    pub fn links(&self, peer: &PeerId) -> Vec<PeerId> {
        let Some(cell) = self.cell_of(peer) else { return Vec::new() };
        let mut links: Vec<PeerId> = self.members(cell).to_vec();
        for neighbour in self.neighbours(cell) {
            let members = self.members(neighbour);
            let reached = if self.is_bridge(peer) { members.len() } else { members.len().min(1) };
            links.extend(&members[..reached]);
        }
        links.retain(|other| other != peer);
        links.sort();
        links.dedup();
        links
    }

    /// How many times a message may be passed on.
    pub fn ttl(&self) -> u32 {
        let cells = u32::try_from(self.cells.len()).unwrap_or(u32::MAX);
        // The logarithm to base 2 of cells + 1, rounded up.
        let log = u32::BITS - cells.leading_zeros();
        (2 * log + 3).min(150)
    }
}

/// The first cell of `count` for which the hash of the peer is greatest.
fn cell_among(peer: &PeerId, count: usize) -> usize {
    let hashes = (0..count).map(|index| (hash(&format!("{peer}:{index}")), index));
    hashes.max_by_key(|(hash, index)| (*hash, std::cmp::Reverse(*index))).map_or(0, |(_, index)| index)
}

fn cell_index(index: usize) -> CellIndex {
    CellIndex(u32::try_from(index).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ttl_grows_with_the_logarithm_of_the_cells() {
        for (cells, ttl) in [(1, 5), (2, 7), (3, 7), (4, 9), (5, 9), (7, 9), (8, 11)] {
            assert_eq!(Topology { cells: vec![Vec::new(); cells] }.ttl(), ttl, "{cells} cells");
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
}
