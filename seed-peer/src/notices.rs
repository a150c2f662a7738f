//! Log lines that anybody could cause a thousand times a second: one of each sort now and then says as much.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How often one line is written.
const INTERVAL: Duration = Duration::from_secs(600);

/// When each sort of line was written last. Sorts must be few: rooms by reasons, not peers.
#[derive(Debug)]
pub(crate) struct Notices<K>(HashMap<K, Instant>);

impl<K> Default for Notices<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash> Notices<K> {
    /// Whether a line of this sort is due; then it counts as written.
    pub(crate) fn is_due(&mut self, sort: K, now: Instant) -> bool {
        match self.0.get(&sort) {
            Some(last) if now < *last + INTERVAL => false,
            _ => {
                self.0.insert(sort, now);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_once_in_a_while_and_others_for_themselves() {
        let (mut notices, now) = (Notices::default(), Instant::now());
        assert!(notices.is_due("full", now) && !notices.is_due("full", now));
        assert!(notices.is_due("fast", now));
        assert!(notices.is_due("full", now + INTERVAL));
    }
}
