//! The TURN engine: what each message means, and what is relayed (RFC 8489, RFC 8656). Sans-IO: time comes in as an
//! argument, sockets are those of an [`Edge`].

mod allocation;
mod authentication;
mod edge;
mod requests;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use service::Origin;
use slab::Slab;

use allocation::Allocation;
pub(crate) use allocation::{ChannelNumber, Family, RelayedAddress};
pub(crate) use edge::{AllocationId, ClientId, Edge, NoPort, Now, RelayId, Transport};
pub(crate) use rules::{Place, Rules, TotalBandwidth};

use crate::bucket::Buckets;
use crate::message::{self, Class, ErrorCode, Message, MessageError, Method, TransactionId};
use crate::metrics::Metrics;
use crate::probe::PROBE_NAME;

/// How long the upper port of a pair is kept for who has the token (RFC 8656, section 7.2).
const RESERVATION_LIFETIME: Duration = Duration::from_secs(30);
/// Addresses whose share of unauthenticated answers is remembered, by each thread.
const MAX_ORIGINS: usize = 16_384;
/// Zeros behind a payload, where its length is to be a multiple of four.
const PADDING: [u8; 3] = [0; 3];

/// Packets and bytes that were relayed and are not in the metrics yet.
#[derive(Debug, Clone, Copy, Default)]
struct Flow {
    to_peers: Volume,
    from_peers: Volume,
}

#[derive(Debug, Clone, Copy, Default)]
struct Volume {
    packets: u64,
    bytes: u64,
}

impl Volume {
    fn add(&mut self, bytes: usize) {
        self.packets += 1;
        self.bytes += u64::try_from(bytes).unwrap_or_default();
    }
}

/// A request that is not granted.
type Refused = ErrorCode;

/// The allocations of one thread.
#[derive(Debug)]
pub(crate) struct Engine {
    rules: Arc<Rules>,
    place: Place,
    metrics: Metrics,
    rng: StdRng,
    allocations: Slab<Allocation>,
    by_client: HashMap<ClientId, AllocationId>,
    /// When each allocation is to be looked at next.
    deadlines: BTreeSet<(Instant, usize)>,
    /// Allocations that were ended by request, for when the request comes again.
    ended: VecDeque<(Instant, ClientId, TransactionId)>,
    strangers: Buckets<Origin>,
    flow: Flow,
    draining: bool,
}

impl Engine {
    pub(crate) fn new(rules: Arc<Rules>, place: Place, metrics: Metrics, seed: [u8; 32]) -> Self {
        let strangers = Buckets::new(rules.unauthenticated, MAX_ORIGINS);
        Self {
            rules,
            place,
            metrics,
            rng: StdRng::from_seed(seed),
            allocations: Slab::new(),
            by_client: HashMap::new(),
            deadlines: BTreeSet::new(),
            ended: VecDeque::new(),
            strangers,
            flow: Flow::default(),
            draining: false,
        }
    }

    /// The server has moved: new allocations get the new addresses.
    pub(crate) fn set_place(&mut self, place: Place) {
        self.place = place;
    }

    /// From now on there are no new allocations.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
    }

    /// Allocations that are open.
    pub(crate) fn len(&self) -> usize {
        self.allocations.len()
    }

    pub(crate) fn has_allocation(&self, client: &ClientId) -> bool {
        self.by_client.contains_key(client)
    }

    /// Brings the metrics of relayed packets up to date: once for many packets, since threads share them.
    pub(crate) fn publish_flow(&mut self) {
        for (direction, volume) in [("to_peer", self.flow.to_peers), ("from_peer", self.flow.from_peers)] {
            if volume.packets > 0 {
                self.metrics.relayed_packets.with_label_values(&[direction]).inc_by(volume.packets);
                self.metrics.relayed_bytes.with_label_values(&[direction]).inc_by(volume.bytes);
            }
        }
        self.flow = Flow::default();
    }

    pub(crate) fn has_unpublished(&self) -> bool {
        self.flow.to_peers.packets > 0 || self.flow.from_peers.packets > 0
    }

    /// When [`Self::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends the allocations whose time has come.
    pub(crate) fn expire<E: Edge>(&mut self, now: Instant, edge: &mut E) {
        while let Some((deadline, index)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.remove(&(deadline, index));
            let Some(allocation) = self.allocations.get_mut(index) else { continue };
            if allocation.expires <= now {
                self.end(AllocationId(index), "expired", now, edge);
            } else {
                // It was refreshed since.
                allocation.deadline = allocation.expires;
                self.deadlines.insert((allocation.deadline, index));
            }
        }
    }

    /// A stream has ended, and what it had allocated with it (RFC 8656, section 3.1: the five-tuple is gone).
    pub(crate) fn disconnect<E: Edge>(&mut self, client: &ClientId, now: Instant, edge: &mut E) {
        if let Some(id) = self.by_client.get(client).copied() {
            self.end(id, "disconnected", now, edge);
        }
    }

    /// Ends everything, at the end of the server.
    pub(crate) fn end_all<E: Edge>(&mut self, now: Instant, edge: &mut E) {
        let ids: Vec<usize> = self.allocations.iter().map(|(index, _)| index).collect();
        for id in ids {
            self.end(AllocationId(id), "shutdown", now, edge);
        }
    }

    fn end<E: Edge>(&mut self, id: AllocationId, reason: &'static str, now: Instant, edge: &mut E) {
        let Some(allocation) = self.allocations.try_remove(id.0) else { return };
        self.by_client.remove(&allocation.client);
        self.deadlines.remove(&(allocation.deadline, id.0));
        for relayed in [allocation.v4, allocation.v6].into_iter().flatten() {
            edge.close(relayed.relay);
        }
        self.metrics.allocations.dec();
        self.metrics.ended.with_label_values(&[reason]).inc();
        let outcome = match (allocation.to_peers, allocation.from_peers) {
            (true, true) => "both_ways",
            (false, false) => "unused",
            _ => "one_way",
        };
        // What tries the server out is nobody's success.
        if allocation.username.rsplit(':').next() != Some(PROBE_NAME) {
            self.metrics.outcomes.with_label_values(&[outcome]).inc();
        }
        let lived = now.saturating_duration_since(allocation.created);
        self.metrics.lifetime_seconds.observe(lived.as_secs_f64());
    }

    /// A datagram of a client, or one message of its stream.
    pub(crate) fn client_message<E: Edge>(&mut self, now: Now, client: ClientId, bytes: &[u8], edge: &mut E) {
        // A channel's data starts with its number (RFC 8656, section 12.5).
        if let [0x40..=0x7f, ..] = bytes {
            self.channel_data(now, client, bytes, edge);
            return;
        }
        let message = match Message::parse(bytes) {
            Ok(message) => message,
            Err(error) => {
                self.metrics.malformed.with_label_values(&[label_of(error)]).inc();
                return;
            }
        };
        match (message.class, message.method) {
            (Class::Indication, Method::Send) => self.send(now, client, &message, edge),
            // Only keeps the NAT's binding alive (RFC 8489, section 6.3.2).
            (Class::Indication, Method::Binding) => {}
            (Class::Request, Method::Send | Method::Data) | (Class::Indication | Class::Success | Class::Error, _) => {
                self.metrics.malformed.with_label_values(&["unexpected"]).inc();
            }
            (Class::Request, method) => self.request(now, client, method, &message, edge),
        }
    }

    fn channel_data<E: Edge>(&mut self, now: Now, client: ClientId, bytes: &[u8], edge: &mut E) {
        let drop = |engine: &Self, reason| engine.metrics.drops.with_label_values(&[reason]).inc();
        let &[first, second, length_high, length_low, ref rest @ ..] = bytes else {
            return drop(self, "malformed");
        };
        let length = usize::from(u16::from_be_bytes([length_high, length_low]));
        // Over UDP there may be padding (RFC 8656, section 12.5); the length tells what counts.
        let (Some(payload), Some(number)) =
            (rest.get(..length), ChannelNumber::new(u16::from_be_bytes([first, second])))
        else {
            return drop(self, "malformed");
        };
        let allocation = self.by_client.get(&client).and_then(|id| self.allocations.get_mut(id.0));
        let Some(allocation) = allocation else { return drop(self, "no_allocation") };
        let Some(peer) = allocation.peer_of(number, now.instant) else { return drop(self, "no_channel") };
        let Some(relayed) = allocation.relayed(Family::of(peer.ip())) else { return drop(self, "no_channel") };
        if !fits_bandwidth(&self.rules, allocation, length, now.instant) {
            return drop(self, "bandwidth");
        }
        allocation.to_peers = true;
        self.flow.to_peers.add(length);
        edge.to_peer(relayed.relay, peer, payload, false);
    }

    /// A Send indication (RFC 8656, section 11.2). Whatever is wrong with it, it has no answer.
    fn send<E: Edge>(&mut self, now: Now, client: ClientId, message: &Message<'_>, edge: &mut E) {
        let drop = |engine: &Self, reason| engine.metrics.drops.with_label_values(&[reason]).inc();
        let attributes = &message.attributes;
        let (Some(data), Some(peer)) = (attributes.data, attributes.peer_address) else {
            return drop(self, "malformed");
        };
        let Some(peer) = message.address(peer).filter(|_| attributes.unknown().is_empty()) else {
            return drop(self, "malformed");
        };
        let allocation = self.by_client.get(&client).and_then(|id| self.allocations.get_mut(id.0));
        let Some(allocation) = allocation else { return drop(self, "no_allocation") };
        if !allocation.is_permitted(peer.ip(), now.instant) {
            return drop(self, "no_permission");
        }
        let Some(relayed) = allocation.relayed(Family::of(peer.ip())) else { return drop(self, "no_permission") };
        if !fits_bandwidth(&self.rules, allocation, data.len(), now.instant) {
            return drop(self, "bandwidth");
        }
        allocation.to_peers = true;
        self.flow.to_peers.add(data.len());
        edge.to_peer(relayed.relay, peer, data, attributes.dont_fragment);
    }

    /// A datagram of a peer (RFC 8656, section 11.3).
    pub(crate) fn peer_datagram<E: Edge>(
        &mut self,
        now: Instant,
        id: AllocationId,
        peer: SocketAddr,
        payload: &[u8],
        edge: &mut E,
    ) {
        let drop = |engine: &Self, reason| engine.metrics.drops.with_label_values(&[reason]).inc();
        let Some(allocation) = self.allocations.get_mut(id.0) else { return drop(self, "no_allocation") };
        if !allocation.is_permitted(peer.ip(), now) {
            return drop(self, "no_permission");
        }
        if !fits_bandwidth(&self.rules, allocation, payload.len(), now) {
            return drop(self, "bandwidth");
        }
        let client = allocation.client;
        let channel = allocation.channel_of(peer, now);
        if !allocation.from_peers {
            allocation.from_peers = true;
            let waited = now.saturating_duration_since(allocation.created);
            self.metrics.first_byte_seconds.observe(waited.as_secs_f64());
        }
        self.flow.from_peers.add(payload.len());
        let padding = payload.len().next_multiple_of(4) - payload.len();
        match channel {
            Some(number) => {
                let [high, low] = number.get().to_be_bytes();
                let [length_high, length_low] = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
                let head = [high, low, length_high, length_low];
                // Only streams need padding, to find the next message (RFC 8656, section 12.5).
                let padding = if client.transport == Transport::Udp { 0 } else { padding };
                edge.to_client(client, [&head, payload, &PADDING[..padding]]);
            }
            None => {
                let (head, length) = message::data_head(self.rng.random(), peer, payload.len());
                edge.to_client(client, [&head[..length], payload, &PADDING[..padding]]);
            }
        }
    }
}

/// Whether a payload is within the bandwidth of its allocation and of all.
fn fits_bandwidth(rules: &Rules, allocation: &mut Allocation, bytes: usize, now: Instant) -> bool {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    allocation.bandwidth.take(rules.allocation_bandwidth, bytes, now) && rules.bandwidth.take(bytes, now)
}

fn label_of(error: MessageError) -> &'static str {
    match error {
        MessageError::NotStun => "not_stun",
        MessageError::Length => "length",
        MessageError::Method => "method",
        MessageError::Fingerprint => "fingerprint",
    }
}
