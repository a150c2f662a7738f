//! What a peer says of itself before there is a link: its session description, and the addresses in it.

use std::net::SocketAddr;

/// Candidates of a peer that are looked at, and sent packets to: whoever writes a description could name others' addresses
/// (RFC 8445, section 19.5.1).
const MAX_CANDIDATES: usize = 64;

/// A link cannot be made from a description.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DescriptionError {
    #[error("not a session description: {0}")]
    Sdp(String),
    #[error("there is no address of this machine to offer")]
    NoAddress,
    #[error("no offer is open")]
    NotOffered,
}

impl DescriptionError {
    pub(super) fn sdp(error: impl std::fmt::Display) -> Self {
        Self::Sdp(error.to_string())
    }
}

/// A peer's description, without the candidates that cannot be dialled from here: names that only resolve on the peer's
/// own network (`….local`, which browsers put in place of addresses), and TCP; and of the others not without end.
#[derive(Debug)]
pub(super) struct Description {
    pub(super) sdp: String,
    pub(super) candidates: RemoteCandidates,
}

impl Description {
    pub(super) fn read(text: &str) -> Self {
        let mut candidates = Vec::new();
        let mut sdp = String::with_capacity(text.len());
        for line in text.split_inclusive('\n') {
            if let Some(candidate) = line.trim_end().strip_prefix("a=candidate:") {
                match dialled(candidate) {
                    Some(named) if candidates.len() < MAX_CANDIDATES => candidates.push(named),
                    _ => continue,
                }
            }
            sdp.push_str(line);
        }
        Self { sdp, candidates: RemoteCandidates(candidates) }
    }
}

/// The candidates that a peer has named: an address, and the kind of it.
#[derive(Debug, Default)]
pub(super) struct RemoteCandidates(Vec<(SocketAddr, &'static str)>);

impl RemoteCandidates {
    /// The kind of the candidate at `address`, as the peer called it; `prflx` for one that it did not name.
    pub(super) fn kind_of(&self, address: Option<SocketAddr>) -> &'static str {
        let canonical = |address: SocketAddr| (address.ip().to_canonical(), address.port());
        let address = address.map(canonical);
        let named = self.0.iter().find(|(named, _)| Some(canonical(*named)) == address);
        named.map_or("prflx", |(_, kind)| *kind)
    }
}

/// The address and kind of a candidate (RFC 8839, section 5.1), if packets can be sent there.
fn dialled(candidate: &str) -> Option<(SocketAddr, &'static str)> {
    let mut words = candidate.split_ascii_whitespace().skip(2);
    let is_udp = words.next()?.eq_ignore_ascii_case("udp");
    let (address, port) = (words.nth(1)?.parse().ok()?, words.next()?.parse().ok()?);
    let kind = words.nth(1).filter(|_| is_udp)?;
    let kind = ["host", "srflx", "prflx", "relay"].into_iter().find(|known| *known == kind)?;
    Some((SocketAddr::new(address, port), kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_that_cannot_be_dialled_are_left_out() {
        let sdp = "v=0\r\n\
            a=candidate:1 1 udp 2113937151 192.0.2.2 37606 typ host generation 0\r\n\
            a=candidate:2 1 udp 2113937151 5f2b7f8e-0000-4000-8000-000000000000.local 37606 typ host\r\n\
            a=candidate:3 1 tcp 1518280447 192.0.2.2 9 typ host tcptype active\r\n\
            a=candidate:4 1 udp 2113937151 192.0.2.2 port typ host\r\n\
            a=candidate:5 1 UDP 1677729535 2001:db8::1 40000 typ srflx raddr :: rport 9\r\n\
            a=candidate:6 1 udp\r\n\
            a=mid:0\r\n";
        let Description { sdp, candidates } = Description::read(sdp);
        let kept: Vec<&str> = sdp.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(kept, ["v=0", "a=candidate:1", "a=candidate:5", "a=mid:0"]);
        assert_eq!(candidates.0.len(), 2);
    }

    #[test]
    fn a_candidate_is_of_the_kind_that_the_peer_called_it() {
        let candidates = Description::read(
            "a=candidate:1 1 udp 2113937151 192.0.2.2 37606 typ host\r\n\
             a=candidate:2 1 udp 41885439 198.51.100.1 50000 typ relay raddr 192.0.2.2 rport 37606",
        )
        .candidates;
        let kind = |address: &str| candidates.kind_of(Some(address.parse().unwrap()));
        assert_eq!(kind("198.51.100.1:50000"), "relay");
        assert_eq!(kind("[::ffff:192.0.2.2]:37606"), "host");
        assert_eq!(kind("192.0.2.2:37607"), "prflx");
        assert_eq!(candidates.kind_of(None), "prflx");
    }

    #[test]
    fn a_description_does_not_send_us_to_everybody() {
        let candidate = |last| format!("a=candidate:1 1 udp 2113937151 198.51.100.{last} 53 typ host\r\n");
        let sdp: String = (0..250).map(candidate).chain(["a=mid:0\r\n".to_owned()]).collect();
        let kept = Description::read(&sdp).sdp;
        assert_eq!(kept.lines().filter(|line| line.contains("candidate")).count(), MAX_CANDIDATES);
        assert!(kept.contains("198.51.100.0 ") && kept.ends_with("a=mid:0\r\n"));
    }
}
