//! Token buckets that take time as an argument.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How much may pass in a second. 0 means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) per_second: u64,
    /// How many seconds' worth may pass at once.
    pub(crate) burst_seconds: u64,
}

/// A bucket that fills at a rate (as the generic cell rate algorithm: one moment says it all).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    /// When the bucket will be full again.
    full_at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub(crate) fn full(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Takes so much out, if it is there.
    pub(crate) fn take(&mut self, rate: Rate, amount: u64, now: Instant) -> bool {
        if rate.per_second == 0 {
            return true;
        }
        let nanos = u128::from(amount) * 1_000_000_000 / u128::from(rate.per_second);
        let Ok(nanos) = u64::try_from(nanos) else { return false };
        let full_at = self.full_at.max(now) + Duration::from_nanos(nanos);
        if full_at > now + Duration::from_secs(rate.burst_seconds) {
            return false;
        }
        self.full_at = full_at;
        true
    }

    fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }
}

/// Buckets by key; full ones are forgotten when there are many.
#[derive(Debug)]
pub(crate) struct Buckets<K> {
    rate: Rate,
    buckets: HashMap<K, Bucket>,
    /// Keys that are remembered, at most.
    capacity: usize,
}

impl<K: Eq + Hash> Buckets<K> {
    pub(crate) fn new(rate: Rate, capacity: usize) -> Self {
        Self { rate, buckets: HashMap::new(), capacity }
    }

    /// Takes one out of a key's bucket. When so many keys are being limited that no other can be remembered, new ones
    /// get nothing: that is an attack from many (forged) addresses, and answering it is what it wants.
    pub(crate) fn take_one(&mut self, key: K, now: Instant) -> bool {
        if self.rate.per_second == 0 {
            return true;
        }
        if self.buckets.len() >= self.capacity && !self.buckets.contains_key(&key) {
            self.buckets.retain(|_, bucket| !bucket.is_full(now));
            if self.buckets.len() >= self.capacity {
                return false;
            }
        }
        self.buckets.entry(key).or_insert_with(|| Bucket::full(now)).take(self.rate, 1, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let rate = Rate { per_second: 10, burst_seconds: 2 };
        let mut bucket = Bucket::full(start);
        assert_eq!((0..100).filter(|_| bucket.take(rate, 1, start)).count(), 20);
        let second = start + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| bucket.take(rate, 1, second)).count(), 10);
        // Never more than the burst, however long it waits.
        let later = start + Duration::from_secs(1_000);
        assert!(!bucket.take(rate, 21, later) && bucket.take(rate, 20, later));
        assert!(!bucket.take(rate, u64::MAX, later));
        assert!(bucket.take(Rate { per_second: 0, burst_seconds: 0 }, u64::MAX, later));
    }

    #[test]
    fn many_keys_do_not_grow_memory_without_bound() {
        let start = Instant::now();
        let mut buckets = Buckets::new(Rate { per_second: 1, burst_seconds: 1 }, 100);
        assert_eq!((0..1_000).filter(|key| buckets.take_one(*key, start)).count(), 100);
        assert!(buckets.buckets.len() <= 100);
        // Who has been quiet is forgotten, and others get their turn.
        assert!(buckets.take_one(5_000, start + Duration::from_secs(2)));
    }
}
