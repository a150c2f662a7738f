//! The addresses under which peers may find the seed's UDP port.

use std::net::{IpAddr, SocketAddr};

use str0m::Candidate;

/// A public address that a NAT or cloud maps one to one to this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExternalAddress {
    /// What peers see.
    pub public: IpAddr,
    /// The address of this machine behind it, when it has several; else that of the default interface.
    pub private: Option<IpAddr>,
}

/// Finds the candidates of new links.
#[derive(Debug, Clone)]
pub(crate) struct Addresses {
    /// Where the socket listens.
    pub(crate) listen: SocketAddr,
    pub(crate) external: Option<ExternalAddress>,
}

impl Addresses {
    /// The candidates of a link that is made now: interfaces come and go.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        let port = self.listen.port();
        let hosts = self.hosts();
        let mut candidates: Vec<Candidate> =
            hosts.iter().filter_map(|ip| Candidate::host(SocketAddr::new(*ip, port), "udp").ok()).collect();
        if let Some(ExternalAddress { public, private }) = self.external
            && !hosts.contains(&public)
        {
            let base = private.or_else(|| hosts.iter().copied().find(|ip| ip.is_ipv4() == public.is_ipv4()));
            let mapped = base.and_then(|base| {
                let (public, base) = (SocketAddr::new(public, port), SocketAddr::new(base, port));
                Candidate::server_reflexive(public, base, "udp").ok()
            });
            candidates.extend(mapped);
        }
        candidates
    }

    fn hosts(&self) -> Vec<IpAddr> {
        let listen = self.listen.ip();
        if !listen.is_unspecified() {
            return vec![listen];
        }
        let interfaces = match if_addrs::get_if_addrs() {
            Ok(interfaces) => interfaces,
            Err(error) => {
                tracing::warn!(%error, "cannot list this machine's addresses");
                Vec::new()
            }
        };
        let usable = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => !ip.is_link_local(),
            // Link-local addresses need a zone that no description can carry.
            IpAddr::V6(ip) => listen.is_ipv6() && !ip.is_unicast_link_local(),
        };
        let (loopback, others): (Vec<IpAddr>, Vec<IpAddr>) =
            interfaces.iter().map(if_addrs::Interface::ip).filter(usable).partition(IpAddr::is_loopback);
        // Loopback only helps where there is nothing else.
        if others.is_empty() { loopback } else { others }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(listen: &str, public: Option<&str>) -> Vec<String> {
        let external = public.map(|public| ExternalAddress { public: public.parse().unwrap(), private: None });
        let addresses = Addresses { listen: listen.parse().unwrap(), external };
        addresses.candidates().iter().map(|candidate| format!("{} {}", candidate.kind(), candidate.addr())).collect()
    }

    #[test]
    fn one_address_is_the_only_candidate() {
        assert_eq!(of("10.0.0.5:3479", None), ["host 10.0.0.5:3479"]);
    }

    #[test]
    fn a_mapped_address_is_offered_beside_the_own_one() {
        assert_eq!(of("10.0.0.5:3479", Some("203.0.113.9")), ["host 10.0.0.5:3479", "srflx 203.0.113.9:3479"]);
        assert_eq!(of("10.0.0.5:3479", Some("10.0.0.5")), ["host 10.0.0.5:3479"]);
    }

    #[test]
    fn listening_everywhere_offers_something() {
        assert!(!of("[::]:3479", None).is_empty());
    }
}
