//! Clients that come back without asking again.
//!
//! Trystero up to 0.22, from which other clients descend, subscribes once. When its connection breaks, it connects anew and goes
//! on announcing itself, but asks for nothing: until its page is loaded again it hears nobody, and nobody can dial it. So it is
//! remembered what an author asked for, and a connection that has asked for nothing is given it once the author speaks there.
//!
//! That is a deviation from NIP-01, where subscriptions end with their connection. It concerns signalling alone, that is
//! subscriptions to nothing but ephemeral kinds, and nobody who asks anew.

mod file;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::filter::Filter;

/// Authors that are remembered, at most, and what they asked for, in bytes; more have to ask again.
const MAX_AUTHORS: usize = 50_000;
const MAX_BYTES: usize = 32 << 20;
/// What one author asked for, at most: who has more than a page of some rooms is no such client.
const MAX_SUBSCRIPTIONS: usize = 32;
const MAX_BYTES_OF_ONE: usize = 4 << 10;
/// Kinds and values of one filter, at most.
const MAX_VALUES: usize = 64;
/// What a subscription takes besides its name and values, in bytes.
const SUBSCRIPTION_BYTES: usize = 100;
/// The number of no connection.
const NOBODY: u64 = 0;
/// The file is written so seldom that the disk takes no more than this a second.
const BYTES_A_SECOND: u64 = 100_000;

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

#[derive(Debug, Default)]
struct State {
    authors: HashMap<[u8; 32], Remembered>,
    /// What all of them asked for.
    bytes: usize,
    /// Whether the file does not say what is remembered.
    is_changed: bool,
}

impl State {
    /// Puts an author in, if there is room.
    fn put(&mut self, author: [u8; 32], remembered: Remembered) {
        self.remove(&author);
        let bytes = self.bytes + bytes_of(&remembered.asked);
        if self.authors.len() < MAX_AUTHORS && bytes <= MAX_BYTES {
            self.bytes = bytes;
            self.authors.insert(author, remembered);
            self.is_changed = true;
        }
    }

    fn remove(&mut self, author: &[u8; 32]) {
        if let Some(gone) = self.authors.remove(author) {
            self.bytes -= bytes_of(&gone.asked);
            self.is_changed = true;
        }
    }
}

/// How clients are remembered that may come back without asking again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// For how long after their connection broke; zero remembers nobody. Default 10 minutes.
    pub patience: Duration,
    /// Where they stand for a relay that is started anew, if its folder is there. Default none.
    pub file: Option<PathBuf>,
}

impl Default for Resume {
    fn default() -> Self {
        Self { patience: Duration::from_secs(600), file: None }
    }
}

/// What authors asked for that may come back.
#[derive(Debug)]
pub(crate) struct Returning {
    patience: Duration,
    file: Option<PathBuf>,
    state: Mutex<State>,
    saving: Mutex<Saving>,
}

/// How writing the file goes.
#[derive(Debug)]
struct Saving {
    next: Instant,
    /// Whether it could not be written when that was last tried.
    has_failed: bool,
}

impl Returning {
    /// Remembers authors, those of the file included: their connections broke `now`. `clock_skew` is that of filters, in seconds.
    pub(crate) fn new(Resume { patience, file }: Resume, clock_skew: u64, now: Instant) -> Self {
        let file = file.filter(|_| !patience.is_zero());
        let read = file.as_ref().map(|file| (file, file::read(file, clock_skew)));
        let known = match read {
            Some((file, Err(error))) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(%error, file = %file.display(), "clients that were here before are not known: the file cannot be read");
                Vec::new()
            }
            Some((_, known)) => known.unwrap_or_default(),
            None => Vec::new(),
        };
        let mut state = State::default();
        for (author, asked) in known {
            state.put(author, Remembered { connection: NOBODY, asked, broke: Some(now) });
        }
        let saving = Mutex::new(Saving { next: now, has_failed: false });
        Self { patience, file, state: Mutex::new(state), saving }
    }

    /// Brings the file up to date: when it is time, or `at_once`. Waits for the disk.
    pub(crate) fn save(&self, now: Instant, at_once: bool) {
        // Who keeps nothing else there does not want a folder for this.
        let Some(file) = self.file.as_ref().filter(|file| file.parent().is_some_and(Path::is_dir)) else { return };
        let mut saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        if !state.is_changed || now < saving.next && !at_once {
            return;
        }
        state.is_changed = false;
        let authors: Vec<([u8; 32], Asked)> =
            state.authors.iter().map(|(author, known)| (*author, known.asked.clone())).collect();
        drop(state);
        let written = file::write(file, &authors);
        let had_failed = std::mem::replace(&mut saving.has_failed, written.is_err());
        match written {
            Ok(bytes) => saving.next = now + Duration::from_secs(bytes / BYTES_A_SECOND),
            Err(error) => {
                // It is tried again, whether something changes or not; a person is told once.
                self.state().is_changed = true;
                if !had_failed {
                    tracing::warn!(%error, file = %file.display(), "who is connected cannot be written down for after a restart");
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An author who speaks over `connection` asks for this there.
    pub(crate) fn note(&self, author: [u8; 32], connection: u64, asked: Asked) {
        if self.patience.is_zero() {
            return;
        }
        let is_such_a_client = !asked.is_empty()
            && asked.len() <= MAX_SUBSCRIPTIONS
            && asked.iter().all(|(_, filters)| is_signalling(filters))
            && bytes_of(&asked) <= MAX_BYTES_OF_ONE;
        let mut state = self.state();
        if is_such_a_client {
            state.put(author, Remembered { connection, asked, broke: None });
        } else {
            state.remove(&author);
        }
    }

    /// The connection of an author has ended: in order, with a goodbye, or it broke.
    pub(crate) fn left(&self, author: &[u8; 32], connection: u64, in_order: bool, now: Instant) {
        let mut state = self.state();
        if let Some(known) = state.authors.get_mut(author).filter(|known| known.connection == connection) {
            known.broke = Some(now);
            if in_order {
                state.remove(author);
            }
        }
    }

    /// What an author asked for elsewhere, where the connection broke or may yet turn out to be broken.
    pub(crate) fn asked_by(&self, author: &[u8; 32], now: Instant) -> Asked {
        let state = self.state();
        let known = state.authors.get(author).filter(|known| !self.is_over(known, now));
        known.map(|known| known.asked.clone()).unwrap_or_default()
    }

    fn is_over(&self, known: &Remembered, now: Instant) -> bool {
        known.broke.is_some_and(|broke| now.saturating_duration_since(broke) > self.patience)
    }

    /// Forgets who has not come back.
    pub(crate) fn tidy(&self, now: Instant) {
        let mut state = self.state();
        let over = state.authors.iter().filter(|(_, known)| self.is_over(known, now));
        for author in over.map(|(author, _)| *author).collect::<Vec<_>>() {
            state.remove(&author);
        }
        if state.authors.len() < state.authors.capacity() / 4 {
            state.authors.shrink_to_fit();
        }
    }
}

/// What it takes to remember this, about.
fn bytes_of(asked: &Asked) -> usize {
    let of_filter = |filter: &Filter| {
        let kinds = filter.kinds.as_ref().map_or(0, |kinds| 2 * kinds.len());
        kinds + filter.tags.iter().flat_map(|(_, values)| values.iter()).map(|value| value.len() + 16).sum::<usize>()
    };
    let of = |(id, filters): &(Box<str>, Arc<[Filter]>)| {
        id.len() + SUBSCRIPTION_BYTES + filters.iter().map(of_filter).sum::<usize>()
    };
    asked.iter().map(of).sum()
}

/// Whether filters ask for ephemeral kinds alone, and not for too many.
fn is_signalling(filters: &[Filter]) -> bool {
    filters.iter().all(|filter| {
        let values: usize = filter.tags.iter().map(|(_, values)| values.len()).sum();
        let kinds = filter.kinds.as_ref();
        let is_plain =
            filter.ids.is_none() && filter.authors.is_none() && filter.until.is_none() && filter.limit.is_none();
        is_plain
            && kinds.is_some_and(|kinds| {
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
    const CLOCK_SKEW: u64 = 60;

    fn remembering(patience: Duration) -> Returning {
        Returning::new(Resume { patience, file: None }, CLOCK_SKEW, Instant::now())
    }

    fn asked(kinds: &[u16]) -> Asked {
        let filter = Filter {
            kinds: Some(OneOf::from_iter(kinds.iter().copied())),
            clock_skew: CLOCK_SKEW,
            ..Filter::default()
        };
        vec![("s".into(), vec![filter].into())]
    }

    #[test]
    fn who_comes_back_in_time_is_known_and_who_left_in_order_is_not() {
        let (returning, now) = (remembering(PATIENCE), Instant::now());
        returning.note(AUTHOR, 1, asked(&[20_001]));
        // A broken connection may not be known as such yet.
        assert_eq!(returning.asked_by(&AUTHOR, now), asked(&[20_001]));
        returning.left(&AUTHOR, 1, false, now);
        assert_eq!(returning.asked_by(&AUTHOR, now + PATIENCE), asked(&[20_001]));
        assert_eq!(returning.asked_by(&AUTHOR, now + PATIENCE * 2), Asked::new());
        returning.tidy(now + PATIENCE * 2);
        assert!(returning.state().authors.is_empty() && returning.state().bytes == 0);

        returning.note(AUTHOR, 2, asked(&[20_001]));
        returning.left(&AUTHOR, 2, true, now);
        assert_eq!(returning.asked_by(&AUTHOR, now), Asked::new());
    }

    #[test]
    fn what_an_earlier_connection_does_is_of_no_matter() {
        let (returning, now) = (remembering(PATIENCE), Instant::now());
        returning.note(AUTHOR, 1, asked(&[20_001]));
        returning.note(AUTHOR, 2, asked(&[20_002]));
        returning.left(&AUTHOR, 1, true, now);
        returning.left(&AUTHOR, 1, false, now);
        assert_eq!(returning.asked_by(&AUTHOR, now + PATIENCE * 2), asked(&[20_002]));
    }

    #[test]
    fn a_relay_that_is_started_anew_knows_who_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let resume = |name: &str| Resume { patience: PATIENCE, file: Some(folder.path().join(name)) };
        let now = Instant::now();
        let first = Returning::new(resume("returning.jsonl"), CLOCK_SKEW, now);
        first.note(AUTHOR, 1, asked(&[20_001]));
        first.note([2; 32], 2, asked(&[20_001]));
        first.left(&[2; 32], 2, true, now);
        first.save(now, false);
        let second = Returning::new(resume("returning.jsonl"), CLOCK_SKEW, now);
        assert_eq!(second.asked_by(&AUTHOR, now + PATIENCE), asked(&[20_001]));
        assert_eq!(second.asked_by(&[2; 32], now), Asked::new());
        assert_eq!(second.asked_by(&AUTHOR, now + PATIENCE * 2), Asked::new());
        // A disk that refuses is tried again, though nothing changes.
        let refused = Returning::new(resume("refused"), CLOCK_SKEW, now);
        std::fs::create_dir(folder.path().join("refused")).unwrap();
        refused.note(AUTHOR, 1, asked(&[20_001]));
        refused.save(now, false);
        std::fs::remove_dir(folder.path().join("refused")).unwrap();
        refused.save(now, false);
        let third = Returning::new(resume("refused"), CLOCK_SKEW, now);
        assert_eq!(third.asked_by(&AUTHOR, now), asked(&[20_001]));
        // No folder is made for it.
        let elsewhere = Returning::new(resume("folder/returning.jsonl"), CLOCK_SKEW, now);
        elsewhere.note(AUTHOR, 1, asked(&[20_001]));
        elsewhere.save(now, true);
        assert!(!folder.path().join("folder").exists());
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let returning = remembering(PATIENCE);
        let name: Box<str> = "s".repeat(MAX_BYTES_OF_ONE - 500).into();
        for number in 0..20_000_u32 {
            let mut author = [0; 32];
            author[..4].copy_from_slice(&number.to_le_bytes());
            returning.note(author, 1, vec![(name.clone(), asked(&[20_001]).remove(0).1)]);
        }
        let state = returning.state();
        let sum: usize = state.authors.values().map(|known| bytes_of(&known.asked)).sum();
        assert_eq!(state.bytes, sum);
        assert!(state.bytes <= MAX_BYTES && state.authors.len() > 5_000, "{}", state.authors.len());
    }

    #[test]
    fn only_signalling_is_remembered_and_only_with_patience() {
        let now = Instant::now();
        let returning = remembering(PATIENCE);
        let many = Asked::from_iter(std::iter::repeat_n(asked(&[20_001]).remove(0), MAX_SUBSCRIPTIONS + 1));
        let unbound = vec![("s".into(), vec![Filter::default()].into())];
        let large = vec![("s".repeat(MAX_BYTES_OF_ONE).into(), asked(&[20_001]).remove(0).1)];
        for other in [asked(&[1]), asked(&[20_001, 30_000]), many, unbound, large, Asked::new()] {
            returning.note(AUTHOR, 1, asked(&[20_001]));
            returning.note(AUTHOR, 1, other);
            assert_eq!(returning.asked_by(&AUTHOR, now), Asked::new());
        }
        let impatient = remembering(Duration::ZERO);
        impatient.note(AUTHOR, 1, asked(&[20_001]));
        assert_eq!(impatient.asked_by(&AUTHOR, now), Asked::new());
    }
}
