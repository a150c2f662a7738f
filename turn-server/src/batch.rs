//! Datagrams that wait to be sent together: a run of equal size to one target leaves with one system call (GSO).

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};

/// Bytes of one run, at most: what one call may hand to the kernel.
const MAX_BYTES: usize = 60_000;
/// Datagrams of one run, at most (Linux: UDP_MAX_SEGMENTS).
const MAX_SEGMENTS: usize = 64;

/// Where a run of datagrams goes, and through which socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// The edge's number of the socket.
    pub(crate) socket: usize,
    pub(crate) to: SocketAddr,
    /// The address to send from, where the socket has several.
    pub(crate) from: Option<IpAddr>,
}

/// A run of datagrams: all of one size but the last, which may be smaller.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    route: Option<Route>,
    bytes: Vec<u8>,
    /// The size of the first datagram.
    segment: usize,
    count: usize,
    /// A smaller one was added: nothing may come behind it.
    is_closed: bool,
}

impl Batch {
    /// Whether a datagram of so many bytes can be added; else the batch has to be sent first.
    pub(crate) fn takes(&self, route: &Route, length: usize, max_segments: usize) -> bool {
        match &self.route {
            None => true,
            Some(current) => {
                current == route
                    && !self.is_closed
                    && length <= self.segment
                    && length > 0
                    && self.count < max_segments.min(MAX_SEGMENTS)
                    && self.bytes.len() + length <= MAX_BYTES
            }
        }
    }

    /// Adds a datagram, made of parts, that the batch takes.
    pub(crate) fn push(&mut self, route: Route, parts: &[&[u8]]) {
        let before = self.bytes.len();
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        let length = self.bytes.len() - before;
        if self.route.is_none() {
            self.segment = length;
        }
        self.is_closed = length < self.segment;
        self.route = Some(route);
        self.count += 1;
    }

    /// The route of what waits, if anything does.
    pub(crate) fn route(&self) -> Option<Route> {
        self.route
    }

    /// Sends what waits, through the socket of its route; returns how many datagrams that were.
    pub(crate) fn send(&mut self, socket: &UdpSocket, state: &UdpSocketState) -> (u64, io::Result<()>) {
        let Some(route) = self.route.take() else { return (0, Ok(())) };
        let result = if self.count == 1 && route.from.is_none() {
            // The plain call is the cheaper one where there is nothing to say but where to.
            socket.send_to(&self.bytes, route.to).map(drop)
        } else {
            state.try_send(
                UdpSockRef::from(socket),
                &Transmit {
                    destination: route.to,
                    ecn: None,
                    contents: &self.bytes,
                    segment_size: (self.count > 1).then_some(self.segment),
                    src_ip: route.from,
                },
            )
        };
        let count = u64::try_from(self.count).unwrap_or_default();
        self.bytes.clear();
        self.count = 0;
        self.is_closed = false;
        (count, result)
    }

    /// Forgets what waits, when its socket is gone.
    pub(crate) fn clear(&mut self) {
        self.route = None;
        self.bytes.clear();
        self.count = 0;
        self.is_closed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(port: u16) -> Route {
        Route { socket: 1, to: SocketAddr::from(([127, 0, 0, 1], port)), from: None }
    }

    #[test]
    fn a_run_is_one_route_and_one_size_with_a_smaller_end() {
        let mut batch = Batch::default();
        assert!(batch.takes(&route(1), 10, 64));
        batch.push(route(1), &[&[0; 4], &[0; 6]]);
        assert!(batch.takes(&route(1), 10, 64) && batch.takes(&route(1), 9, 64));
        assert!(!batch.takes(&route(1), 11, 64), "larger");
        assert!(!batch.takes(&route(1), 0, 64), "an empty segment ends a run unseen");
        assert!(!batch.takes(&route(2), 10, 64), "elsewhere");
        assert!(!batch.takes(&route(1), 10, 1), "no GSO here");
        batch.push(route(1), &[&[0; 9]]);
        assert!(!batch.takes(&route(1), 9, 64), "behind a smaller one");
        batch.clear();
        assert!(batch.takes(&route(2), 10_000, 64));
        for _ in 0..6 {
            assert!(batch.takes(&route(2), 10_000, 64));
            batch.push(route(2), &[&[0; 10_000]]);
        }
        assert!(!batch.takes(&route(2), 10_000, 64), "more than one call takes");
    }

    #[test]
    fn a_run_arrives_as_the_datagrams_that_it_was_made_of() {
        let (sender, receiver) =
            (std::net::UdpSocket::bind("127.0.0.1:0").unwrap(), std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let state = UdpSocketState::new((&sender).into()).unwrap();
        let route = Route { socket: 0, to: receiver.local_addr().unwrap(), from: None };
        let mut batch = Batch::default();
        let mut sent = Vec::new();
        let mut datagrams = 0;
        for length in [100_usize, 100, 100, 40, 100, 1, 0, 0, 7] {
            let payload = vec![u8::try_from(length).unwrap(); length];
            if !batch.takes(&route, length, state.max_gso_segments()) {
                let (count, result) = batch.send(&sender, &state);
                result.unwrap();
                datagrams += count;
            }
            batch.push(route, &[&payload]);
            sent.push(payload);
        }
        datagrams += batch.send(&sender, &state).0;
        assert_eq!(datagrams, 9);
        let mut buffer = [0; 200];
        for payload in sent {
            let (length, _) = receiver.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..length], payload);
        }
    }
}
