//! The addresses that relayed traffic is said to come from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;

/// One address to give to clients as that of their allocations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExternalIp {
    /// The addresses of this machine that its default routes use.
    #[default]
    Auto,
    /// This address, which is this machine's own.
    Address(IpAddr),
    /// A public address that a NAT maps one to one to a private address of this machine.
    Mapped {
        /// What clients and peers see.
        public: IpAddr,
        /// What this machine has.
        private: IpAddr,
    },
}

/// Text is no external address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected \"auto\", an IP address, or \"public/private\", found {0:?}")]
pub struct ExternalIpError(String);

impl FromStr for ExternalIp {
    type Err = ExternalIpError;

    fn from_str(text: &str) -> Result<Self, ExternalIpError> {
        let address = |text: &str| text.trim().parse::<IpAddr>().map_err(|_| ExternalIpError(text.to_owned()));
        if text == "auto" {
            return Ok(Self::Auto);
        }
        match text.split_once('/') {
            Some((public, private)) => {
                let (public, private) = (address(public)?, address(private)?);
                if public.is_ipv4() != private.is_ipv4() {
                    return Err(ExternalIpError(text.to_owned()));
                }
                Ok(Self::Mapped { public, private })
            }
            None => Ok(Self::Address(address(text)?)),
        }
    }
}

/// An address of the server: what others see, and what to bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnAddress {
    /// What clients and peers are told.
    pub public: IpAddr,
    /// What sockets are bound to.
    pub bind: IpAddr,
}

/// The server's addresses, at most one of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Addresses {
    /// The address for peers of IPv4.
    pub v4: Option<OwnAddress>,
    /// The address for peers of IPv6.
    pub v6: Option<OwnAddress>,
}

impl Addresses {
    /// The addresses that the settings mean, for a server that listens at `listen`: where that is one address, `auto`
    /// means that address.
    pub fn resolve(settings: &[ExternalIp], listen: IpAddr) -> Self {
        let mut addresses = Self::default();
        for setting in settings {
            match *setting {
                ExternalIp::Auto if listen.is_unspecified() => {
                    let v4 = default_route_v4();
                    let v6 = listen.is_ipv6().then(default_route_v6).flatten();
                    let own = |ip: IpAddr| OwnAddress { public: ip, bind: ip };
                    // Something to tell, however useless, is better than a server that does not start.
                    let v4 = v4.or(v6.is_none().then_some(Ipv4Addr::LOCALHOST));
                    for ip in v4.map(IpAddr::from).into_iter().chain(v6.map(IpAddr::from)) {
                        addresses.add(own(ip));
                    }
                }
                ExternalIp::Auto => addresses.add(OwnAddress { public: listen, bind: listen }),
                ExternalIp::Address(public) => addresses.add(OwnAddress { public, bind: unspecified_like(public) }),
                ExternalIp::Mapped { public, private } => addresses.add(OwnAddress { public, bind: private }),
            }
        }
        addresses
    }

    /// The first of a family counts.
    fn add(&mut self, address: OwnAddress) {
        let slot = if address.public.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        slot.get_or_insert(address);
    }

    /// The address for people and apps to be told: IPv4, where there is one.
    pub fn main(&self) -> IpAddr {
        self.v4.or(self.v6).map_or(Ipv4Addr::LOCALHOST.into(), |own| own.public)
    }

    /// All that others see.
    pub(crate) fn public(&self) -> impl Iterator<Item = IpAddr> {
        [self.v4, self.v6].into_iter().flatten().map(|own| own.public)
    }
}

fn unspecified_like(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The address that this machine would send from to `target`.
fn routed_from(bind: IpAddr, target: IpAddr) -> Option<IpAddr> {
    // Connecting a UDP socket sends nothing: it only asks the routing table.
    let asked = UdpSocket::bind((bind, 0)).and_then(|socket| {
        socket.connect((target, 9))?;
        socket.local_addr()
    });
    asked.ok().map(|address: SocketAddr| address.ip()).filter(|ip| !ip.is_unspecified())
}

/// The address that this machine would send from to the internet; else any that is not loopback.
fn default_route_v4() -> Option<Ipv4Addr> {
    // The target is no host (RFC 5737).
    if let Some(IpAddr::V4(ip)) = routed_from(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(198, 51, 100, 1).into()) {
        return Some(ip);
    }
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    interfaces.iter().filter(|interface| !interface.is_loopback()).find_map(|interface| match interface.ip() {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    })
}

/// As for IPv4, where the address is one that reaches beyond this link.
fn default_route_v6() -> Option<Ipv6Addr> {
    // The target is no host (RFC 3849).
    let target = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    match routed_from(Ipv6Addr::UNSPECIFIED.into(), target.into()) {
        Some(IpAddr::V6(ip)) if !ip.is_loopback() && !ip.is_unicast_link_local() => Some(ip),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn settings_are_understood() {
        assert_eq!("auto".parse(), Ok(ExternalIp::Auto));
        assert_eq!("203.0.113.7".parse(), Ok(ExternalIp::Address(ip("203.0.113.7"))));
        let mapped = ExternalIp::Mapped { public: ip("203.0.113.7"), private: ip("10.0.0.2") };
        assert_eq!("203.0.113.7/10.0.0.2".parse(), Ok(mapped));
        for wrong in ["", "Auto", "example.com", "1.2.3.4/", "1.2.3.4/24", "1.2.3.4/::1"] {
            assert!(wrong.parse::<ExternalIp>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_server_on_one_address_relays_from_it() {
        let addresses = Addresses::resolve(&[ExternalIp::Auto], ip("127.0.0.1"));
        assert_eq!(addresses.v4, Some(OwnAddress { public: ip("127.0.0.1"), bind: ip("127.0.0.1") }));
        assert_eq!(addresses.v6, None);
        let addresses = Addresses::resolve(&[ExternalIp::Auto], ip("::"));
        assert!(!addresses.main().is_unspecified());
    }

    #[test]
    fn each_family_has_the_first_address_that_is_set_for_it() {
        let settings: Vec<ExternalIp> =
            ["203.0.113.7/10.0.0.2", "198.51.100.1", "2001:db8::7"].map(|text| text.parse().unwrap()).into();
        let addresses = Addresses::resolve(&settings, ip("::"));
        assert_eq!(addresses.v4, Some(OwnAddress { public: ip("203.0.113.7"), bind: ip("10.0.0.2") }));
        assert_eq!(addresses.v6, Some(OwnAddress { public: ip("2001:db8::7"), bind: ip("::") }));
        assert_eq!(addresses.main(), ip("203.0.113.7"));
    }
}
