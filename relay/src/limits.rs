//! How much one client, and all clients of one address, may ask.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{HeaderMap, HeaderName};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use service::Origin;

/// Rates of one client and of one address. 0 means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Messages a second of one connection; five times as many may come at once. Default 500.
    pub messages: u32,
    /// Bytes of messages a second of one connection; five times as many may come at once. Default 1 MiB.
    pub bytes: u32,
    /// Signatures a second that are checked for one address; five times as many may come at once. Default 2,000.
    pub verifications: u32,
    /// Connections of one address at a time. Default 1,024.
    pub address_connections: usize,
}

impl Default for Rates {
    fn default() -> Self {
        Self { messages: 500, bytes: 1 << 20, verifications: 2_000, address_connections: 1_024 }
    }
}

/// How many seconds' worth may come at once.
const BURST_SECONDS: u32 = 5;

fn quota(per_second: u32) -> Option<Quota> {
    let per_second = NonZeroU32::new(per_second)?;
    let burst = per_second.saturating_mul(NonZeroU32::new(BURST_SECONDS)?);
    Some(Quota::per_second(per_second).allow_burst(burst))
}

/// The limits on one connection.
#[derive(Debug)]
pub(crate) struct ConnectionLimit {
    messages: Option<DefaultDirectRateLimiter>,
    bytes: Option<DefaultDirectRateLimiter>,
}

impl ConnectionLimit {
    pub(crate) fn new(rates: &Rates) -> Self {
        let limiter = |per_second| quota(per_second).map(RateLimiter::direct);
        Self { messages: limiter(rates.messages), bytes: limiter(rates.bytes) }
    }

    /// Whether one more message of so many bytes is within the limits.
    pub(crate) fn allows_message(&self, bytes: usize) -> bool {
        let bytes = u32::try_from(bytes).ok().and_then(NonZeroU32::new);
        let fits = |limiter: &DefaultDirectRateLimiter| {
            // The outer error: more at once than ever fits.
            bytes.is_none_or(|bytes| limiter.check_n(bytes).is_ok_and(|verdict| verdict.is_ok()))
        };
        self.messages.as_ref().is_none_or(|limiter| limiter.check().is_ok()) && self.bytes.as_ref().is_none_or(fits)
    }
}

/// The limits on addresses, over all connections.
#[derive(Debug)]
pub(crate) struct AddressLimits {
    verifications: Option<DefaultKeyedRateLimiter<Origin>>,
    connections: Mutex<HashMap<Origin, usize>>,
    max_connections: usize,
    /// Behind a proxy that does not say for whom it speaks, everybody comes from loopback: that is no one client.
    spare_loopback: bool,
}

impl AddressLimits {
    pub(crate) fn new(rates: &Rates, spare_loopback: bool) -> Self {
        Self {
            verifications: quota(rates.verifications).map(RateLimiter::keyed),
            connections: Mutex::default(),
            max_connections: rates.address_connections,
            spare_loopback,
        }
    }

    fn spares(&self, origin: Origin) -> bool {
        self.spare_loopback && origin.is_loopback()
    }

    /// Whether one more signature may be checked for `origin`.
    pub(crate) fn allows_verification(&self, origin: Origin) -> bool {
        self.spares(origin) || self.verifications.as_ref().is_none_or(|limiter| limiter.check_key(&origin).is_ok())
    }

    /// Takes in one more connection of `origin`, until what is returned is dropped; `None` when it has too many.
    pub(crate) fn connect(self: &Arc<Self>, origin: Origin) -> Option<Admitted> {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let count = connections.entry(origin).or_default();
        if self.max_connections > 0 && *count >= self.max_connections && !self.spares(origin) {
            return None;
        }
        *count += 1;
        Some(Admitted { limits: Arc::clone(self), origin })
    }

    /// Forgets addresses that have not been heard of for a while.
    pub(crate) fn tidy(&self) {
        if let Some(limiter) = &self.verifications {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }
}

/// A connection that counts against its address.
#[derive(Debug)]
pub(crate) struct Admitted {
    limits: Arc<AddressLimits>,
    origin: Origin,
}

impl Admitted {
    /// Where the connection comes from.
    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut connections = self.limits.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = connections.get_mut(&self.origin) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.origin);
            }
        }
    }
}

/// Where a client comes from: as the header of a trusted proxy says, if there is one, else as the connection says.
pub fn client_address(connection: SocketAddr, headers: &HeaderMap, trusted_header: Option<&HeaderName>) -> IpAddr {
    let header = trusted_header.and_then(|name| headers.get(name)?.to_str().ok());
    header.and_then(forwarded).unwrap_or(connection.ip())
}

/// The client's address in a header that a trusted proxy sets: the last one, which the proxy itself added.
fn forwarded(header: &str) -> Option<IpAddr> {
    let last = header.rsplit(',').next()?.trim();
    let bare = last.strip_prefix('[').and_then(|rest| rest.split(']').next()).unwrap_or(last);
    bare.parse().ok().or_else(|| last.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_burst_is_allowed_and_then_no_more() {
        let limit = ConnectionLimit::new(&Rates { messages: 10, ..Rates::default() });
        let allowed = (0..1_000).filter(|_| limit.allows_message(10)).count();
        assert!((50..60).contains(&allowed), "{allowed}");
        let unlimited = ConnectionLimit::new(&Rates { messages: 0, bytes: 0, ..Rates::default() });
        assert!((0..100_000).all(|_| unlimited.allows_message(10)));
        let bytes = ConnectionLimit::new(&Rates { bytes: 1_000, ..Rates::default() });
        assert!(bytes.allows_message(4_000) && !bytes.allows_message(4_000) && bytes.allows_message(500));
        assert!(!ConnectionLimit::new(&Rates { bytes: 10, ..Rates::default() }).allows_message(51));
    }

    #[test]
    fn connections_count_until_they_end_and_loopback_is_spared_behind_a_silent_proxy() {
        let rates = Rates { address_connections: 2, verifications: 1, ..Rates::default() };
        let limits = Arc::new(AddressLimits::new(&rates, true));
        let origin = Origin::of(ip("192.0.2.1"));
        let first = limits.connect(origin).unwrap();
        let _second = limits.connect(origin).unwrap();
        assert!(limits.connect(origin).is_none());
        assert!(limits.connect(Origin::of(ip("192.0.2.2"))).is_some());
        drop(first);
        assert!(limits.connect(origin).is_some());
        let loopback = Origin::of(ip("127.0.0.1"));
        let all: Vec<_> = (0..10).map(|_| limits.connect(loopback)).collect();
        assert!(all.iter().all(Option::is_some));
        assert!((0..100).all(|_| limits.allows_verification(loopback)));
        assert!(!(0..100).all(|_| limits.allows_verification(origin)));
        drop(all);
        assert_eq!(limits.connections.lock().unwrap().get(&loopback), None);
    }

    #[test]
    fn the_last_address_of_a_header_is_the_one_the_proxy_saw() {
        for (header, expected) in [
            ("192.0.2.1", Some("192.0.2.1")),
            ("10.0.0.1, 192.0.2.1", Some("192.0.2.1")),
            ("192.0.2.1:5000", Some("192.0.2.1")),
            ("[2001:db8::1]:5000", Some("2001:db8::1")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("", None),
            ("unknown", None),
        ] {
            assert_eq!(forwarded(header), expected.map(ip), "{header}");
        }
    }
}
