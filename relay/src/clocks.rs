//! How far the clocks of clients are from ours. Peers meet by times that their own clocks say: a `since` that lies in the
//! future for everybody else hears nobody, and a graph's operations win by them (wire §2 and §4). Whose clock is wrong, one
//! client cannot tell; the middle one of many can.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Authors whose clocks are remembered: the last ones heard.
const REMEMBERED: usize = 128;
/// Fewer authors say nothing about whose clock is wrong.
const ENOUGH: usize = 5;

/// An author's clock when it was last heard.
#[derive(Debug)]
struct Clock {
    author: [u8; 32],
    /// Seconds ahead of ours.
    ahead: i64,
}

/// The clocks of those who were heard lately, each author's once.
#[derive(Debug, Default)]
pub(crate) struct Clocks(Mutex<VecDeque<Clock>>);

impl Clocks {
    /// Takes note of an author's clock. Returns by how many seconds the clocks of all are ahead of ours, the median; `None`
    /// while too few are known.
    pub(crate) fn note(&self, author: [u8; 32], ahead: i64) -> Option<i64> {
        let mut clocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        clocks.retain(|clock| clock.author != author);
        if clocks.len() == REMEMBERED {
            clocks.pop_front();
        }
        clocks.push_back(Clock { author, ahead });
        if clocks.len() < ENOUGH {
            return None;
        }
        let mut offsets: Vec<i64> = clocks.iter().map(|clock| clock.ahead).collect();
        let middle = (offsets.len() - 1) / 2;
        Some(*offsets.select_nth_unstable(middle).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_many_is_said_and_a_few_that_are_wrong_change_nothing() {
        let clocks = Clocks::default();
        let author = |number: u8| [number; 32];
        assert!((0..4).all(|number| clocks.note(author(number), 0).is_none()));
        assert_eq!(clocks.note(author(4), -86_400), Some(0));
        assert_eq!(clocks.note(author(5), i64::MAX), Some(0));
        // Somebody who comes again and again counts once.
        assert_eq!((0..100).filter_map(|_| clocks.note(author(5), 3_600)).last(), Some(0));
        let ours_is_behind: Vec<i64> = (6..20).filter_map(|number| clocks.note(author(number), 3_600)).collect();
        assert_eq!(ours_is_behind.last(), Some(&3_600));
    }

    #[test]
    fn those_heard_long_ago_are_forgotten() {
        let clocks = Clocks::default();
        let author = |number: usize| std::array::from_fn(|index| number.to_le_bytes().get(index).copied().unwrap_or(0));
        let said: Vec<i64> =
            (0..1_000).filter_map(|number| clocks.note(author(number), (number / 500) as i64)).collect();
        assert_eq!((said.first(), said.last()), (Some(&0), Some(&1)));
        assert_eq!(clocks.0.lock().unwrap().len(), REMEMBERED);
    }
}
