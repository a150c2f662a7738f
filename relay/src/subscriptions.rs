//! Who asked for what: the index through which an event finds its subscribers without asking all of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::event::Event;
use crate::filter::Filter;
use crate::message::relay_message;
use crate::neighbours::Subject;
use crate::outbox::Outbox;
use crate::presence::Audience;

/// Up to so many pairs of kind and value, a filter is indexed by the pairs; beyond, by the values alone. Trystero
/// asks for 250 kinds and 250 values in one filter: 62,500 pairs would be a way to fill our memory.
const MAX_PAIRS: usize = 64;

/// One subscription of one connection.
#[derive(Debug)]
pub(crate) struct Subscription {
    /// Tells subscriptions apart across the relay.
    serial: u64,
    /// The connection that made it.
    pub(crate) connection: u64,
    pub(crate) filters: Arc<[Filter]>,
    /// What other relays are asked for on its behalf.
    pub(crate) followed: Box<[Subject]>,
    /// What stands before the event in a message to this subscription.
    pub(crate) prefix: Box<str>,
    /// The connection's queue.
    pub(crate) outbox: Arc<Outbox>,
}

/// Where a filter is found. Every event that matches a filter has one of the filter's keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Key {
    KindAndTag(u16, u8, Box<str>),
    Tag(u8, Box<str>),
    Kind(u16),
    Any,
}

/// Subscriptions under one key, each with its serial in front: who is not due is passed over without a look at it.
type Bucket = Vec<(u64, Arc<Subscription>)>;

/// All subscriptions of the relay.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    next_serial: AtomicU64,
    index: RwLock<HashMap<Key, Bucket>>,
}

impl Subscriptions {
    /// Adds a subscription, which receives events from now on until it is removed.
    pub(crate) fn add(
        &self,
        id: &str,
        connection: u64,
        filters: Arc<[Filter]>,
        followed: Box<[Subject]>,
        outbox: Arc<Outbox>,
    ) -> Arc<Subscription> {
        let subscription = Arc::new(Subscription {
            serial: self.next_serial.fetch_add(1, Ordering::Relaxed),
            connection,
            filters,
            followed,
            prefix: relay_message::event_prefix(id).into(),
            outbox,
        });
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        for key in subscription.keys() {
            index.entry(key).or_default().push((subscription.serial, Arc::clone(&subscription)));
        }
        subscription
    }

    /// Removes a subscription.
    pub(crate) fn remove(&self, subscription: &Subscription) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        for key in subscription.keys() {
            if let Some(bucket) = index.get_mut(&key) {
                bucket.retain(|(serial, _)| *serial != subscription.serial);
                if bucket.is_empty() {
                    index.remove(&key);
                }
            }
        }
    }

    /// The subscriptions that an event belongs to, each once, and how many may belong to it that are not of the
    /// `audience`.
    pub(crate) fn matching(&self, event: &Event<'_>, audience: Audience) -> (Vec<Arc<Subscription>>, u64) {
        let mut keys = vec![Key::Any, Key::Kind(event.kind)];
        for (letter, value) in event.letter_tags() {
            keys.push(Key::KindAndTag(event.kind, letter, value.into()));
            keys.push(Key::Tag(letter, value.into()));
        }
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let mut matching: Vec<Arc<Subscription>> = Vec::new();
        let mut held_back = 0;
        for (serial, one) in keys.iter().filter_map(|key| index.get(key)).flatten() {
            if !audience.includes(*serial) {
                held_back += 1;
            } else if one.matches(event) {
                matching.push(Arc::clone(one));
            }
        }
        drop(index);
        // A subscription stands under several of its keys.
        matching.sort_unstable_by_key(|one| one.serial);
        matching.dedup_by_key(|one| one.serial);
        (matching, held_back)
    }
}

impl Subscription {
    /// The values of `x` tags that the client asked for.
    pub(crate) fn topics(&self) -> impl Iterator<Item = &str> {
        let tags = self.filters.iter().flat_map(|filter| filter.tags.iter());
        tags.filter(|(letter, _)| *letter == b'x').flat_map(|(_, values)| values.iter()).map(AsRef::as_ref)
    }

    /// Whether an event is one that the client asked for.
    pub(crate) fn matches(&self, event: &Event<'_>) -> bool {
        self.filters.iter().any(|filter| filter.matches(event))
    }

    fn keys(&self) -> impl Iterator<Item = Key> {
        let mut keys: Vec<Key> = self.filters.iter().flat_map(keys).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.into_iter()
    }
}

/// The keys of one filter: by the tag that narrows it most, else by kind, else none at all.
fn keys(filter: &Filter) -> Vec<Key> {
    let narrowest = filter.tags.iter().min_by_key(|(_, values)| values.len());
    match (&filter.kinds, narrowest) {
        (Some(kinds), Some((letter, values))) if kinds.len() * values.len() <= MAX_PAIRS => kinds
            .iter()
            .flat_map(|kind| values.iter().map(|value| Key::KindAndTag(*kind, *letter, value.clone())))
            .collect(),
        (_, Some((letter, values))) => values.iter().map(|value| Key::Tag(*letter, value.clone())).collect(),
        (Some(kinds), None) => kinds.iter().map(|kind| Key::Kind(*kind)).collect(),
        (None, None) => vec![Key::Any],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::OneOf;

    fn filters() -> impl Strategy<Value = Filter> {
        let kinds = prop::option::of(prop::collection::vec(0..4u16, 0..3).prop_map(OneOf::from_iter));
        let values = || prop::collection::vec((0..3u8).prop_map(|value| value.to_string().into()), 0..3);
        let tags = prop::collection::btree_map(b'a'..=b'c', values().prop_map(OneOf::from_iter), 0..3)
            .prop_map(|tags| tags.into_iter().collect());
        let authors = prop::option::of(
            prop::collection::vec((0..2u8).prop_map(|byte| [byte; 32]), 0..2).prop_map(OneOf::from_iter),
        );
        (kinds, tags, authors).prop_map(|(kinds, tags, authors)| Filter { kinds, tags, authors, ..Filter::default() })
    }

    fn events() -> impl Strategy<Value = Event<'static>> {
        let tag = (b'a'..=b'd', 0..4u8)
            .prop_map(|(letter, value)| vec![char::from(letter).to_string().into(), value.to_string().into()]);
        (0..5u16, prop::collection::vec(tag, 0..4), 0..3u8).prop_map(|(kind, tags, author)| Event {
            id: [0; 32],
            pubkey: [author; 32],
            created_at: 0,
            kind,
            tags,
            content: "".into(),
            sig: [0; 64],
        })
    }

    proptest! {
        #[test]
        fn the_index_finds_what_asking_everybody_finds(
            requests in prop::collection::vec(prop::collection::vec(filters(), 1..3), 0..12),
            removed in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
            events in prop::collection::vec(events(), 1..8),
        ) {
            let subscriptions = Subscriptions::default();
            let outbox = Arc::<Outbox>::default();
            let mut live: Vec<_> =
                requests.into_iter().map(|filters| subscriptions.add("s", 1, filters.into(), Box::default(), Arc::clone(&outbox))).collect();
            for index in removed {
                if !live.is_empty() {
                    subscriptions.remove(&live.remove(index.index(live.len())));
                }
            }
            for event in &events {
                let found: Vec<u64> = subscriptions.matching(event, Audience::All).0.iter().map(|one| one.serial).collect();
                let asked: Vec<u64> = live.iter().filter(|one| one.matches(event)).map(|one| one.serial).collect();
                prop_assert_eq!(found, asked);
            }
            for one in live {
                subscriptions.remove(&one);
            }
            prop_assert!(subscriptions.index.read().unwrap().is_empty());
        }
    }
}
