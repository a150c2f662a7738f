//! The ids of events that were verified lately: the same event again costs neither verification nor delivery.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, PoisonError};

/// Ids that are remembered.
const REMEMBERED: usize = 16_384;

/// The most recent event ids.
#[derive(Debug, Default)]
pub(crate) struct RecentIds(Mutex<Ids>);

#[derive(Debug, Default)]
struct Ids {
    known: HashSet<[u8; 32]>,
    order: VecDeque<[u8; 32]>,
}

impl RecentIds {
    /// Whether an event of this id was verified lately.
    pub(crate) fn contains(&self, id: &[u8; 32]) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).known.contains(id)
    }

    /// Remembers a verified event. Returns whether it is new: of two connections that verify the same event at the
    /// same time, one is first.
    pub(crate) fn insert(&self, id: [u8; 32]) -> bool {
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !ids.known.insert(id) {
            return false;
        }
        ids.order.push_back(id);
        if ids.order.len() > REMEMBERED
            && let Some(oldest) = ids.order.pop_front()
        {
            ids.known.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_known_until_many_others_came() {
        let recent = RecentIds::default();
        let id = |number: usize| std::array::from_fn(|index| number.to_le_bytes().get(index).copied().unwrap_or(0));
        assert!(recent.insert(id(0)) && !recent.insert(id(0)));
        for number in 1..REMEMBERED {
            recent.insert(id(number));
        }
        assert!(recent.contains(&id(0)));
        recent.insert(id(REMEMBERED));
        assert!(!recent.contains(&id(0)) && recent.contains(&id(1)));
        assert_eq!(recent.0.lock().unwrap().known.len(), REMEMBERED);
    }
}
