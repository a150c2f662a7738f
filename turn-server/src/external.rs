//! The address that relayed traffic is said to come from.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::str::FromStr;

/// Which address to give to clients as that of their allocations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExternalIp {
    /// The address of this machine that its default route uses.
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
            Some((public, private)) => Ok(Self::Mapped { public: address(public)?, private: address(private)? }),
            None => Ok(Self::Address(address(text)?)),
        }
    }
}

impl ExternalIp {
    /// The address to give to clients, and the one to bind relay sockets to. `listen` is where the server listens:
    /// when that is one address, `auto` means that address.
    pub fn resolve(self, listen: IpAddr) -> (IpAddr, IpAddr) {
        match self {
            Self::Auto => {
                let own = if listen.is_unspecified() { default_route_address() } else { listen };
                (own, own)
            }
            Self::Address(address) => (address, unspecified_like(address)),
            Self::Mapped { public, private } => (public, private),
        }
    }
}

fn unspecified_like(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The address that this machine would send from to the internet; else any that is not loopback; else loopback.
fn default_route_address() -> IpAddr {
    // Connecting a UDP socket sends nothing: it only asks the routing table. The target is no host (RFC 5737).
    let asked = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|socket| {
            socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9))?;
            socket.local_addr()
        })
        .map(|address: SocketAddr| address.ip());
    if let Ok(address) = asked
        && !address.is_unspecified()
    {
        return address;
    }
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let mut up = interfaces.iter().filter(|interface| !interface.is_loopback()).map(if_addrs::Interface::ip);
    up.find(IpAddr::is_ipv4).unwrap_or(Ipv4Addr::LOCALHOST.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_understood() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!("auto".parse(), Ok(ExternalIp::Auto));
        assert_eq!("203.0.113.7".parse(), Ok(ExternalIp::Address(ip("203.0.113.7"))));
        let mapped = ExternalIp::Mapped { public: ip("203.0.113.7"), private: ip("10.0.0.2") };
        assert_eq!("203.0.113.7/10.0.0.2".parse(), Ok(mapped));
        for wrong in ["", "Auto", "example.com", "1.2.3.4/", "1.2.3.4/24"] {
            assert!(wrong.parse::<ExternalIp>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_server_on_one_address_relays_from_it() {
        let loopback: IpAddr = "127.0.0.1".parse().unwrap();
        assert_eq!(ExternalIp::Auto.resolve(loopback), (loopback, loopback));
        let (public, bind) = ExternalIp::Auto.resolve("::".parse().unwrap());
        assert!(!public.is_unspecified() && public == bind);
    }
}
