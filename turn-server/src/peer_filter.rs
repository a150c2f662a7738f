//! Which peers an allocation may talk to. A relay on a public host must not be a way into its private network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Ranges of addresses that are not of the public internet (IANA's special-purpose registries), by first address
/// and prefix length.
const SPECIAL_V4: &[(Ipv4Addr, u8)] = &[
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Decides which peers are refused.
#[derive(Debug, Clone, Default)]
pub(crate) struct PeerFilter {
    /// The special range that the server itself is in: a server on a LAN serves that LAN.
    own: Option<(Ipv4Addr, u8)>,
    own_v6: Option<Ipv6Addr>,
    allow: Vec<IpNet>,
    deny: Vec<IpNet>,
}

impl PeerFilter {
    /// The filter of a server whose relayed addresses are `own`. What is in `deny` is refused, what is in `allow` is
    /// not, and the rest is refused when it is in a special range that the server is not in.
    pub(crate) fn new(own: impl IntoIterator<Item = IpAddr>, allow: &[IpNet], deny: &[IpNet]) -> Self {
        let mut filter = Self { allow: allow.to_vec(), deny: deny.to_vec(), ..Self::default() };
        for own in own {
            match own.to_canonical() {
                IpAddr::V4(address) => filter.own = filter.own.or(special_range(address)),
                IpAddr::V6(address) => filter.own_v6 = Some(address).filter(|own| !is_global_v6(*own)),
            }
        }
        filter
    }

    /// Whether the server is itself in a special range, which is then open to its users.
    pub(crate) fn opens_own_network(&self) -> bool {
        self.own.is_some() || self.own_v6.is_some()
    }

    /// Whether `peer` may be talked to.
    pub(crate) fn allows(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        if self.deny.iter().any(|net| net.contains(&peer)) {
            return false;
        }
        if self.allow.iter().any(|net| net.contains(&peer)) {
            return true;
        }
        match peer {
            IpAddr::V4(address) => match special_range(address) {
                None => true,
                range => range == self.own,
            },
            IpAddr::V6(address) => {
                is_global_v6(address) || self.own_v6.is_some_and(|own| own.segments()[..4] == address.segments()[..4])
            }
        }
    }
}

fn special_range(address: Ipv4Addr) -> Option<(Ipv4Addr, u8)> {
    SPECIAL_V4.iter().copied().find(|(first, length)| {
        let mask = u32::MAX << (32 - u32::from(*length));
        address.to_bits() & mask == first.to_bits()
    })
}

/// Whether an address is in 2000::/3 less the parts of it that embed or document other addresses.
fn is_global_v6(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.segments();
    let global_unicast = first & 0xe000 == 0x2000;
    // Teredo, ORCHID and the rest of 2001::/23; documentation; 6to4, which embeds IPv4; documentation again.
    let special = (first == 0x2001 && second < 0x200)
        || (first, second) == (0x2001, 0xdb8)
        || first == 0x2002
        || (first == 0x3fff && second < 0x1000);
    global_unicast && !special
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(own: &str, peer: &str) -> bool {
        PeerFilter::new([own.parse().unwrap()], &[], &[]).allows(peer.parse().unwrap())
    }

    #[test]
    fn a_public_server_relays_to_the_public_internet_alone() {
        for peer in ["8.8.8.8", "192.0.1.1", "2606:4700::1111"] {
            assert!(allows("9.9.9.9", peer), "{peer}");
        }
        for peer in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.31.255.255",
            "192.168.0.1",
            "203.0.113.5",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "::ffff:10.0.0.1",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
            "2001::1",
            "::10.0.0.1",
        ] {
            assert!(!allows("9.9.9.9", peer), "{peer}");
        }
    }

    #[test]
    fn a_server_on_a_private_network_serves_that_network_and_no_other() {
        assert!(allows("192.168.1.5", "192.168.7.7"));
        assert!(!allows("192.168.1.5", "10.0.0.1"));
        assert!(!allows("192.168.1.5", "169.254.169.254"));
        assert!(allows("127.0.0.1", "127.0.0.1"));
        assert!(allows("fd00::2", "fd00::7") && !allows("fd00::2", "fd01::7") && !allows("fd00::2", "::1"));
    }

    #[test]
    fn lists_of_the_owner_come_before_what_is_usual() {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        let allow = nets(&["10.1.0.0/16", "fd00::/8"]);
        let deny = nets(&["8.8.8.0/24", "10.1.2.0/24"]);
        let filter = PeerFilter::new(["9.9.9.9".parse().unwrap()], &allow, &deny);
        for (peer, allowed) in [
            ("10.1.1.1", true),
            ("::ffff:10.1.1.1", true),
            ("10.1.2.3", false),
            ("10.2.0.1", false),
            ("8.8.8.8", false),
            ("8.8.4.4", true),
            ("fd12::1", true),
            ("::1", false),
        ] {
            assert_eq!(filter.allows(peer.parse().unwrap()), allowed, "{peer}");
        }
    }
}
