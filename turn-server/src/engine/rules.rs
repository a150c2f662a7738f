//! What the owner of a server has decided.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Instant;

use crate::bucket::{Bucket, Rate};
use crate::credentials::Credentials;
use crate::nonce::Nonces;
use crate::peer_filter::PeerFilter;
use crate::quotas::Ledger;

/// What all threads of a server share and do not change.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) realm: String,
    pub(crate) credentials: Credentials,
    pub(crate) nonces: Nonces,
    pub(crate) relay_ports: RangeInclusive<u16>,
    /// The longest lifetime, in seconds.
    pub(crate) max_lifetime: u32,
    /// Seconds that allocations outlive a time-limited credential.
    pub(crate) expiry_grace: u64,
    /// Bytes a second of one allocation, both ways together.
    pub(crate) allocation_bandwidth: Rate,
    /// Answers a second to strangers at one address.
    pub(crate) unauthenticated: Rate,
    pub(crate) ledger: Ledger,
    pub(crate) bandwidth: TotalBandwidth,
}

/// The bytes a second of all allocations together.
#[derive(Debug)]
pub(crate) struct TotalBandwidth {
    pub(crate) rate: Rate,
    bucket: std::sync::Mutex<Bucket>,
}

impl TotalBandwidth {
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, bucket: std::sync::Mutex::new(Bucket::full(now)) }
    }

    pub(super) fn take(&self, amount: u64, now: Instant) -> bool {
        self.rate.per_second == 0
            || self.bucket.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take(self.rate, amount, now)
    }
}

/// Where the server is, which may change while it runs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    /// The addresses that clients are told, one a family.
    pub(crate) v4: Option<IpAddr>,
    pub(crate) v6: Option<IpAddr>,
    pub(crate) peers: PeerFilter,
}
