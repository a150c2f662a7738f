//! Where a client comes from, as limits see it.

use std::net::{IpAddr, Ipv6Addr};

/// What counts as one client: an address of IPv4, or a /64 of IPv6, since a customer of IPv6 has a whole one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Origin(IpAddr);

impl Origin {
    /// The origin of a client at `address`.
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) if !address.is_loopback() => {
                Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into()
            }
            address => address,
        })
    }

    /// Whether the client is on this machine, such as a proxy that does not say for whom it speaks.
    pub fn is_loopback(&self) -> bool {
        self.0.is_loopback()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(text: &str) -> Origin {
        Origin::of(text.parse().unwrap())
    }

    #[test]
    fn an_ipv6_customer_is_one_origin_and_an_ipv4_address_is_one() {
        assert_eq!(origin("2001:db8:1:2::7"), origin("2001:db8:1:2:ffff::1"));
        assert_ne!(origin("2001:db8:1:2::7"), origin("2001:db8:1:3::7"));
        assert_ne!(origin("192.0.2.1"), origin("192.0.2.2"));
        assert_eq!(origin("::ffff:192.0.2.1"), origin("192.0.2.1"));
        assert!(origin("127.0.0.1").is_loopback() && origin("::1").is_loopback() && !origin("::2").is_loopback());
    }
}
