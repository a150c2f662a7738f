//! How many allocations one user, one address and all together may have, over all threads of the server.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use service::Origin;

/// The most allocations at a time. 0 means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quotas {
    /// Of one user; for time-limited credentials, of one name behind the expiry. Default 0: all users of an app share
    /// a name.
    pub user: usize,
    /// From one client address; from one /64 of IPv6. Default 256.
    pub address: usize,
    /// All together. Default 0: there are no more than relay ports.
    pub total: usize,
}

impl Default for Quotas {
    fn default() -> Self {
        Self { user: 0, address: 256, total: 0 }
    }
}

/// A quota is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reached {
    User,
    Address,
    Total,
}

impl Reached {
    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Address => "address",
            Self::Total => "total",
        }
    }
}

#[derive(Debug, Default)]
struct InUse {
    users: HashMap<Box<str>, usize>,
    addresses: HashMap<Origin, usize>,
    total: usize,
}

/// What is in use of the quotas; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    quotas: Quotas,
    in_use: Arc<Mutex<InUse>>,
}

/// An allocation that counts until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    user: Box<str>,
    origin: Origin,
    ledger: Ledger,
}

impl Ledger {
    pub(crate) fn new(quotas: Quotas) -> Self {
        Self { quotas, in_use: Arc::default() }
    }

    /// Counts one more allocation, unless a quota is used up.
    pub(crate) fn take(&self, user: &str, client: IpAddr) -> Result<Share, Reached> {
        let origin = Origin::of(client);
        let mut in_use = self.lock();
        let full = |used: usize, limit: usize| limit > 0 && used >= limit;
        if full(in_use.total, self.quotas.total) {
            return Err(Reached::Total);
        }
        if full(in_use.addresses.get(&origin).copied().unwrap_or_default(), self.quotas.address) {
            return Err(Reached::Address);
        }
        if full(in_use.users.get(user).copied().unwrap_or_default(), self.quotas.user) {
            return Err(Reached::User);
        }
        in_use.total += 1;
        *in_use.addresses.entry(origin).or_default() += 1;
        *in_use.users.entry(user.into()).or_default() += 1;
        Ok(Share { user: user.into(), origin, ledger: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, InUse> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut in_use = self.ledger.lock();
        in_use.total = in_use.total.saturating_sub(1);
        give_back(&mut in_use.addresses, &self.origin);
        give_back(&mut in_use.users, &self.user);
    }
}

fn give_back<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_quota_is_kept_and_given_back() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let ledger = Ledger::new(Quotas { user: 2, address: 3, total: 4 });
        let alice = (ledger.take("alice", ip("192.0.2.1")).unwrap(), ledger.take("alice", ip("192.0.2.1")).unwrap());
        assert_eq!(ledger.take("alice", ip("192.0.2.9")).err(), Some(Reached::User));
        let bob = ledger.take("bob", ip("192.0.2.1")).unwrap();
        assert_eq!(ledger.take("carol", ip("192.0.2.1")).err(), Some(Reached::Address));
        let carol = ledger.take("carol", ip("2001:db8::1")).unwrap();
        assert_eq!(ledger.take("dave", ip("192.0.2.7")).err(), Some(Reached::Total));
        drop((alice, bob, carol));
        let in_use = ledger.lock();
        assert!(in_use.total == 0 && in_use.users.is_empty() && in_use.addresses.is_empty());
    }

    #[test]
    fn a_customer_of_ipv6_counts_as_one() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let ledger = Ledger::new(Quotas { user: 0, address: 1, total: 0 });
        let _one = ledger.take("alice", ip("2001:db8::1")).unwrap();
        assert_eq!(ledger.take("alice", ip("2001:db8::2")).err(), Some(Reached::Address));
        assert!(ledger.take("alice", ip("2001:db8:0:1::1")).is_ok());
    }
}
