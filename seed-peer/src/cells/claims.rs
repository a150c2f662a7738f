//! Which cells peers say that they are in. Where that is not the cell that we have them in, they have not sealed our roster
//! yet, or another: they drop what comes on a channel that is not theirs.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use genosdb::{CellIndex, PeerId};

/// Who turns out to have dropped what it was sent is sent that anew after so long: together with what else it lacks, and
/// once the archive has it.
const MEND_AFTER: Duration = Duration::from_secs(2);

/// What linked peers have said last.
#[derive(Debug, Default)]
pub(super) struct Claims {
    by_peer: HashMap<PeerId, (CellIndex, Instant)>,
    /// Those who said that they are where we have sent nothing.
    strays: HashSet<PeerId>,
    mends: Option<Instant>,
}

impl Claims {
    /// `peer` says that it is in `cell`; `is_news`: what it was sent before did not go there.
    pub(super) fn take(&mut self, peer: PeerId, cell: CellIndex, is_news: bool, now: Instant) {
        self.by_peer.insert(peer, (cell, now));
        if is_news {
            self.strays.insert(peer);
            self.mends.get_or_insert(now + MEND_AFTER);
        }
    }

    /// The cell that `peer` has said, if that was not before `since`.
    pub(super) fn of(&self, peer: &PeerId, since: Option<Instant>) -> Option<CellIndex> {
        let (cell, at) = self.by_peer.get(peer)?;
        since.is_none_or(|since| *at >= since).then_some(*cell)
    }

    /// Who is to be sent anew what it dropped; each once.
    pub(super) fn strays(&mut self, now: Instant) -> HashSet<PeerId> {
        match self.mends.take_if(|at| now >= *at) {
            Some(_) => std::mem::take(&mut self.strays),
            None => HashSet::new(),
        }
    }

    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.mends
    }

    pub(super) fn forget(&mut self, peer: &PeerId) {
        self.by_peer.remove(peer);
        self.strays.remove(peer);
    }
}
