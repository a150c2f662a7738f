//! The addresses that relayed traffic is said to come from.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::time::timeout;

use crate::message::{Builder, Class, Message, Method, TransactionId};

/// How long a STUN server gets to say what it sees.
const STUN_PATIENCE: Duration = Duration::from_secs(2);
/// When the question to a STUN server is repeated (RFC 8489, section 6.2.1: after 500 ms).
const STUN_REPEAT: Duration = Duration::from_millis(500);

/// One address to give to clients as that of their allocations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
    /// The address under which a STUN server elsewhere sees this machine, given as `host:port`; while that does not
    /// answer, as [`Self::Auto`].
    Stun(String),
}

/// Text is no external address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected \"auto\", an IP address, \"public/private\", or \"stun:host:port\", found {0:?}")]
pub struct ExternalIpError(String);

impl FromStr for ExternalIp {
    type Err = ExternalIpError;

    fn from_str(text: &str) -> Result<Self, ExternalIpError> {
        let address = |text: &str| text.trim().parse::<IpAddr>().map_err(|_| ExternalIpError(text.to_owned()));
        if text == "auto" {
            return Ok(Self::Auto);
        }
        if let Some(server) = text.strip_prefix("stun:") {
            let has_port =
                server.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            return if has_port { Ok(Self::Stun(server.to_owned())) } else { Err(ExternalIpError(text.to_owned())) };
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
    /// means that address. Asks STUN servers, if they are named, and waits two seconds for each at most.
    pub async fn find(settings: &[ExternalIp], listen: IpAddr) -> Self {
        let mut known = Vec::with_capacity(settings.len());
        for setting in settings {
            known.push(match setting {
                ExternalIp::Stun(server) => match seen_by(server, listen).await {
                    Ok((public, private)) => ExternalIp::Mapped { public, private },
                    Err(error) => {
                        tracing::warn!(%server, %error, "the STUN server did not say what our address is");
                        ExternalIp::Auto
                    }
                },
                other => other.clone(),
            });
        }
        Self::resolve(&known, listen)
    }

    /// As [`Self::find`], without asking anybody.
    pub fn resolve(settings: &[ExternalIp], listen: IpAddr) -> Self {
        let mut addresses = Self::default();
        for setting in settings {
            match *setting {
                ExternalIp::Auto | ExternalIp::Stun(_) if listen.is_unspecified() => {
                    let v4 = default_route_v4();
                    let v6 = listen.is_ipv6().then(default_route_v6).flatten();
                    let own = |ip: IpAddr| OwnAddress { public: ip, bind: ip };
                    // Something to tell, however useless, is better than a server that does not start.
                    let v4 = v4.or(v6.is_none().then_some(Ipv4Addr::LOCALHOST));
                    for ip in v4.map(IpAddr::from).into_iter().chain(v6.map(IpAddr::from)) {
                        addresses.add(own(ip));
                    }
                }
                ExternalIp::Auto | ExternalIp::Stun(_) => addresses.add(OwnAddress { public: listen, bind: listen }),
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

/// The address under which a STUN server sees this machine, and the one that this machine has on the way there.
async fn seen_by(server: &str, listen: IpAddr) -> io::Result<(IpAddr, IpAddr)> {
    let ask = async {
        let server = lookup_host(server).await?.find(|address| address.is_ipv4() || listen.is_ipv6());
        let server = server.ok_or(io::ErrorKind::NotFound)?;
        // As the allocations will be seen, where they are bound to one address.
        let bind = if listen.is_unspecified() { unspecified_like(server.ip()) } else { listen };
        let socket = tokio::net::UdpSocket::bind((bind, 0)).await?;
        socket.connect(server).await?;
        let transaction = TransactionId::random();
        let request = Builder::new(Class::Request, Method::Binding, transaction).finish();
        let mut buffer = [0; 1_500];
        loop {
            socket.send(&request).await?;
            let Ok(received) = timeout(STUN_REPEAT, socket.recv(&mut buffer)).await else { continue };
            if let Ok(answer) = Message::parse(&buffer[..received?])
                && answer.transaction == transaction
                && let Some(mapped) = answer.mapped_address()
            {
                return Ok((mapped.ip(), socket.local_addr()?.ip()));
            }
        }
    };
    timeout(STUN_PATIENCE, ask).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
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
        assert_eq!("stun:a.example:3478".parse(), Ok(ExternalIp::Stun("a.example:3478".into())));
        for wrong in [
            "",
            "Auto",
            "stun:",
            "stun:a.example",
            "stun::3478",
            "example.com",
            "1.2.3.4/",
            "1.2.3.4/24",
            "1.2.3.4/::1",
        ] {
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

    #[tokio::test]
    async fn a_stun_server_that_is_silent_costs_two_seconds_and_no_start() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let setting = ExternalIp::Stun(silent.local_addr().unwrap().to_string());
        let addresses = Addresses::find(std::slice::from_ref(&setting), ip("127.0.0.1")).await;
        assert_eq!(addresses, Addresses::resolve(&[ExternalIp::Auto], ip("127.0.0.1")));
        // It was asked more than once.
        let mut buffer = [0; 100];
        for _ in 0..2 {
            assert_eq!(silent.recv(&mut buffer).unwrap(), 20);
        }
        assert_eq!(seen_by(&setting_of(&setting), ip("127.0.0.1")).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    fn setting_of(setting: &ExternalIp) -> String {
        match setting {
            ExternalIp::Stun(server) => server.clone(),
            other => panic!("{other:?}"),
        }
    }
}
