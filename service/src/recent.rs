//! What came lately: so that what comes again, by another way or from another client, is taken once.

use std::collections::{HashSet, VecDeque};
use std::hash::Hash;

/// The last `CAPACITY` things that were put in; the oldest make room for new ones. Takes memory as they come.
#[derive(Debug)]
pub struct RecentSet<T, const CAPACITY: usize> {
    known: HashSet<T>,
    order: VecDeque<T>,
}

impl<T, const CAPACITY: usize> Default for RecentSet<T, CAPACITY> {
    fn default() -> Self {
        Self { known: HashSet::new(), order: VecDeque::new() }
    }
}

impl<T: Copy + Eq + Hash, const CAPACITY: usize> RecentSet<T, CAPACITY> {
    /// Whether it came lately.
    pub fn contains(&self, one: &T) -> bool {
        self.known.contains(one)
    }

    /// Remembers it. Returns whether it is new; what is not new does not become younger.
    pub fn insert(&mut self, one: T) -> bool {
        if !self.known.insert(one) {
            return false;
        }
        self.order.push_back(one);
        if self.order.len() > CAPACITY
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_is_known_until_as_many_others_came_as_are_remembered() {
        let mut recent = RecentSet::<u32, 100>::default();
        assert!(recent.insert(0) && !recent.insert(0));
        for number in 1..100 {
            assert!(recent.insert(number));
        }
        assert!(recent.contains(&0));
        assert!(recent.insert(100));
        assert!(!recent.contains(&0) && recent.contains(&1));
        assert_eq!((recent.known.len(), recent.order.len()), (100, 100));
    }
}
