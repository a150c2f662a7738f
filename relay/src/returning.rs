//! Clients that come back without asking again.
//!
//! Trystero up to 0.22, from which other clients descend, subscribes once. When its connection breaks, it connects anew and goes
//! on announcing itself, but asks for nothing: until its page is loaded again it hears nobody, and nobody can dial it. So it is
//! remembered what an author asked for, and a connection that has asked for nothing is given it once the author speaks there.
//!
//! That is a deviation from NIP-01, where subscriptions end with their connection. It concerns signalling alone, that is
//! subscriptions to nothing but ephemeral kinds, and nobody who asks anew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::filter::Filter;

/// Authors that are remembered, at most; more have to ask again.
const MAX_AUTHORS: usize = 50_000;
/// Who has more subscriptions than a page of some rooms is no such client.
const MAX_SUBSCRIPTIONS: usize = 32;
/// Kinds and values of one filter that are remembered, at most.
const MAX_VALUES: usize = 64;

/// What a client asked for: names of subscriptions, and their filters.
pub(crate) type Asked = Vec<(Box<str>, Arc<[Filter]>)>;

#[derive(Debug)]
struct Remembered {
    /// Where the author spoke last.
    connection: u64,
    asked: Asked,
    /// When that connection broke, if it has.
    broke: Option<Instant>,
}

/// What authors asked for that may come back.
#[derive(Debug)]
pub(crate) struct Returning {
    /// For how long after a connection broke.
    patience: Duration,
    authors: Mutex<HashMap<[u8; 32], Remembered>>,
}

impl Returning {
    /// Remembers authors for so long after their connection broke; zero remembers nobody.
    pub(crate) fn new(patience: Duration) -> Self {
        Self { patience, authors: Mutex::default() }
    }

    fn authors(&self) -> MutexGuard<'_, HashMap<[u8; 32], Remembered>> {
        self.authors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An author who speaks over `connection` asks for this there.
    pub(crate) fn note(&self, author: [u8; 32], connection: u64, asked: Asked) {
        let mut authors = self.authors();
        let is_known = authors.contains_key(&author);
        if asked.is_empty()
            || asked.len() > MAX_SUBSCRIPTIONS
            || !asked.iter().all(|(_, filters)| is_signalling(filters))
        {
            authors.remove(&author);
        } else if !self.patience.is_zero() && (is_known || authors.len() < MAX_AUTHORS) {
            authors.insert(author, Remembered { connection, asked, broke: None });
        }
    }

    /// The connection of an author has ended: in order, with a goodbye, or it broke.
    pub(crate) fn left(&self, author: &[u8; 32], connection: u64, in_order: bool, now: Instant) {
        let mut authors = self.authors();
        if let Some(known) = authors.get_mut(author).filter(|known| known.connection == connection) {
            known.broke = Some(now);
            if in_order {
                authors.remove(author);
            }
        }
    }

    /// What an author asked for elsewhere, where the connection broke or may yet turn out to be broken.
    pub(crate) fn asked_by(&self, author: &[u8; 32], now: Instant) -> Asked {
        let authors = self.authors();
        let known = authors.get(author).filter(|known| !self.is_over(known, now));
        known.map(|known| known.asked.clone()).unwrap_or_default()
    }

    fn is_over(&self, known: &Remembered, now: Instant) -> bool {
        known.broke.is_some_and(|broke| now.saturating_duration_since(broke) > self.patience)
    }

    /// Forgets who has not come back.
    pub(crate) fn tidy(&self, now: Instant) {
        let mut authors = self.authors();
        authors.retain(|_, known| !self.is_over(known, now));
        if authors.len() < authors.capacity() / 4 {
            authors.shrink_to_fit();
        }
    }
}

/// Whether filters ask for ephemeral kinds alone, and not for too many.
fn is_signalling(filters: &[Filter]) -> bool {
    filters.iter().all(|filter| {
        let values: usize = filter.tags.iter().map(|(_, values)| values.len()).sum();
        let kinds = filter.kinds.as_ref();
        kinds.is_some_and(|kinds| {
            kinds.iter().all(|kind| (20_000..30_000).contains(kind)) && kinds.len() + values <= MAX_VALUES
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::OneOf;

    const PATIENCE: Duration = Duration::from_secs(600);
    const AUTHOR: [u8; 32] = [1; 32];

    fn asked(kinds: &[u16]) -> Asked {
        let filter = Filter { kinds: Some(OneOf::from_iter(kinds.iter().copied())), ..Filter::default() };
        vec![("s".into(), vec![filter].into())]
    }

    #[test]
    fn who_comes_back_in_time_is_known_and_who_left_in_order_is_not() {
        let (returning, now) = (Returning::new(PATIENCE), Instant::now());
        returning.note(AUTHOR, 1, asked(&[20_001]));
        // A broken connection may not be known as such yet.
        assert_eq!(returning.asked_by(&AUTHOR, now), asked(&[20_001]));
        returning.left(&AUTHOR, 1, false, now);
        assert_eq!(returning.asked_by(&AUTHOR, now + PATIENCE), asked(&[20_001]));
        assert_eq!(returning.asked_by(&AUTHOR, now + PATIENCE * 2), Asked::new());
        returning.tidy(now + PATIENCE * 2);
        assert!(returning.authors().is_empty());

        returning.note(AUTHOR, 2, asked(&[20_001]));
        returning.left(&AUTHOR, 2, true, now);
        assert_eq!(returning.asked_by(&AUTHOR, now), Asked::new());
    }

    #[test]
    fn what_an_earlier_connection_does_is_of_no_matter() {
        let (returning, now) = (Returning::new(PATIENCE), Instant::now());
        returning.note(AUTHOR, 1, asked(&[20_001]));
        returning.note(AUTHOR, 2, asked(&[20_002]));
        returning.left(&AUTHOR, 1, true, now);
        returning.left(&AUTHOR, 1, false, now);
        assert_eq!(returning.asked_by(&AUTHOR, now + PATIENCE * 2), asked(&[20_002]));
    }

    #[test]
    fn only_signalling_is_remembered_and_only_with_patience() {
        let now = Instant::now();
        let returning = Returning::new(PATIENCE);
        let many = Asked::from_iter(std::iter::repeat_n(asked(&[20_001]).remove(0), MAX_SUBSCRIPTIONS + 1));
        let unbound = vec![("s".into(), vec![Filter::default()].into())];
        for other in [asked(&[1]), asked(&[20_001, 30_000]), many, unbound, Asked::new()] {
            returning.note(AUTHOR, 1, asked(&[20_001]));
            returning.note(AUTHOR, 1, other);
            assert_eq!(returning.asked_by(&AUTHOR, now), Asked::new());
        }
        let impatient = Returning::new(Duration::ZERO);
        impatient.note(AUTHOR, 1, asked(&[20_001]));
        assert_eq!(impatient.asked_by(&AUTHOR, now), Asked::new());
    }
}
