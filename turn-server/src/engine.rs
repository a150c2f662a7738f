//! The TURN engine: what each message means, and what is relayed (RFC 8489, RFC 8656). Sans-IO: time comes in as an
//! argument, sockets are those of an [`Edge`].

mod allocation;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use slab::Slab;

use allocation::{Allocation, Granted, NotBound};
pub(crate) use allocation::{ChannelNumber, Family, RelayedAddress};

use crate::bucket::{Bucket, Buckets, Rate};
use crate::credentials::{Credentials, Denied};
use crate::message::{
    self, Algorithm, Builder, Class, ErrorCode, Key, Message, MessageError, Method, TransactionId, attribute,
};
use crate::metrics::Metrics;
use crate::nonce::Nonces;
use crate::peer_filter::PeerFilter;
use crate::quotas::{Ledger, Origin};

/// The lifetime of an allocation whose client asks for none, in seconds (RFC 8656, section 3.2).
const DEFAULT_LIFETIME: u32 = 600;
/// How long the upper port of a pair is kept for who has the token (RFC 8656, section 7.2).
pub(crate) const RESERVATION_LIFETIME: Duration = Duration::from_secs(30);
/// How long a request may be repeated (RFC 8489, section 6.2.1: 39.5 s).
const RETRANSMISSION: Duration = Duration::from_secs(40);
/// Ended allocations that are remembered for repeated requests.
const MAX_ENDED: usize = 1_024;
/// Ports that are drawn at random before the range is walked through.
const RANDOM_TRIES: u32 = 64;
/// Ports that are walked through: all of a small range. Where so many in a row are taken, the rest is as well, and every
/// try costs the packets of others time.
const MAX_WALK: u32 = 1_024;
/// Addresses whose share of unauthenticated answers is remembered, by each thread.
const MAX_ORIGINS: usize = 16_384;
/// The protocol number of UDP in REQUESTED-TRANSPORT.
const UDP: u8 = 17;
/// What PASSWORD-ALGORITHMS says (RFC 8489, section 14.11): SHA-256 and MD5, neither with parameters.
const PASSWORD_ALGORITHMS: [u8; 8] = [0, 2, 0, 0, 0, 1, 0, 0];
/// Zeros behind a payload, where its length is to be a multiple of four.
const PADDING: [u8; 3] = [0; 3];

/// The moment at which something happens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    /// Seconds since the Unix epoch, for credentials and nonces.
    pub(crate) unix: u64,
}

/// How a client talks to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    Udp,
    Tcp,
    Tls,
}

impl Transport {
    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
        }
    }
}

/// The five-tuple of a client (RFC 8656, section 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ClientId {
    pub(crate) transport: Transport,
    pub(crate) address: SocketAddr,
    /// The address that the client sends to.
    pub(crate) server: SocketAddr,
}

/// Names an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct AllocationId(usize);

/// Names a socket of the edge's at which peers reach an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RelayId(pub(crate) usize);

/// Why a port cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPort {
    /// Somebody else has it: another may be free.
    InUse,
    /// There is no socket for any port.
    Exhausted,
}

/// What the engine needs of the world.
pub(crate) trait Edge {
    /// Opens a port for peers.
    fn bind(&mut self, allocation: AllocationId, family: Family, port: u16) -> Result<RelayId, NoPort>;
    /// Opens a port and keeps it until `until`, for who has the token.
    fn reserve(&mut self, token: [u8; 8], family: Family, port: u16, until: Instant) -> Result<(), NoPort>;
    /// Takes what was reserved.
    fn claim(&mut self, token: [u8; 8], allocation: AllocationId, now: Instant) -> Option<(RelayId, Family, u16)>;
    /// Closes a port.
    fn close(&mut self, relay: RelayId);
    /// Sends the parts, as one message, to a client.
    fn to_client(&mut self, client: ClientId, parts: [&[u8]; 3]);
    /// Sends a datagram to a peer, in one piece if so asked.
    fn to_peer(&mut self, relay: RelayId, peer: SocketAddr, payload: &[u8], dont_fragment: bool);
}

/// What all threads of a server share and do not change.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) realm: String,
    pub(crate) credentials: Credentials,
    pub(crate) nonces: Nonces,
    pub(crate) relay_ports: RangeInclusive<u16>,
    /// The longest lifetime, in seconds.
    pub(crate) max_lifetime: u32,
    /// Seconds that allocations outlive a time-limited credential.
    pub(crate) expiry_grace: u64,
    /// Bytes a second of one allocation, both ways together.
    pub(crate) allocation_bandwidth: Rate,
    /// Answers a second to strangers at one address.
    pub(crate) unauthenticated: Rate,
    pub(crate) ledger: Ledger,
    pub(crate) bandwidth: TotalBandwidth,
}

/// The bytes a second of all allocations together.
#[derive(Debug)]
pub(crate) struct TotalBandwidth {
    pub(crate) rate: Rate,
    bucket: std::sync::Mutex<Bucket>,
}

impl TotalBandwidth {
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, bucket: std::sync::Mutex::new(Bucket::full(now)) }
    }

    fn take(&self, amount: u64, now: Instant) -> bool {
        self.rate.per_second == 0
            || self.bucket.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take(self.rate, amount, now)
    }
}

/// Where the server is, which may change while it runs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    /// The addresses that clients are told, one a family.
    pub(crate) v4: Option<IpAddr>,
    pub(crate) v6: Option<IpAddr>,
    pub(crate) peers: PeerFilter,
}

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

/// Who made a request.
struct Requester {
    key: Key,
    expires: Option<u64>,
}

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
        self.metrics.outcomes.with_label_values(&[outcome]).inc();
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

    fn request<E: Edge>(&mut self, now: Now, client: ClientId, method: Method, message: &Message<'_>, edge: &mut E) {
        let count = |engine: &Self, code| engine.metrics.requests.with_label_values(&[method.label(), code]).inc();
        if method == Method::Binding {
            if !self.strangers.take_one(Origin::of(client.address.ip()), now.instant) {
                self.metrics.drops.with_label_values(&["unauthenticated"]).inc();
                return;
            }
            let answer = if message.attributes.unknown().is_empty() {
                count(self, "ok");
                Builder::new(Class::Success, method, message.transaction)
                    .address(attribute::XOR_MAPPED_ADDRESS, client.address)
            } else {
                count(self, ErrorCode::UnknownAttribute.label());
                unknown_attributes(method, message)
            };
            return answer_with(answer, message, None, client, edge);
        }
        let requester = match self.authenticate(now, client, message) {
            Ok(requester) => requester,
            Err(code) => {
                if !self.strangers.take_one(Origin::of(client.address.ip()), now.instant) {
                    self.metrics.drops.with_label_values(&["unauthenticated"]).inc();
                    return;
                }
                count(self, code.label());
                let mut answer =
                    Builder::new(Class::Error, method, message.transaction).error(attribute::ERROR_CODE, 0, code);
                if matches!(code, ErrorCode::Unauthenticated | ErrorCode::StaleNonce) {
                    answer = answer
                        .attribute(attribute::REALM, self.rules.realm.as_bytes())
                        .attribute(attribute::NONCE, &self.rules.nonces.make(client.address, now.unix))
                        .attribute(attribute::PASSWORD_ALGORITHMS, &PASSWORD_ALGORITHMS);
                }
                return answer_with(answer, message, None, client, edge);
            }
        };
        let result = if message.attributes.unknown().is_empty() {
            match method {
                Method::Allocate => self.allocate(now, client, message, &requester, edge),
                Method::Refresh => self.refresh(now, client, message, edge),
                Method::CreatePermission => self.create_permission(now, client, message),
                Method::ChannelBind => self.channel_bind(now, client, message),
                Method::Binding | Method::Send | Method::Data => Err(ErrorCode::BadRequest),
            }
        } else {
            Err(ErrorCode::UnknownAttribute)
        };
        let answer = match result {
            Ok(answer) => {
                count(self, "ok");
                answer.attribute(attribute::SOFTWARE, b"homeport")
            }
            Err(code) => {
                count(self, code.label());
                if code == ErrorCode::UnknownAttribute {
                    unknown_attributes(method, message)
                } else {
                    Builder::new(Class::Error, method, message.transaction).error(attribute::ERROR_CODE, 0, code)
                }
            }
        };
        answer_with(answer, message, Some(&requester.key), client, edge);
    }

    /// Who made the request, by the long-term credential (RFC 8489, section 9.2.4).
    fn authenticate(&mut self, now: Now, client: ClientId, message: &Message<'_>) -> Result<Requester, Refused> {
        let attributes = &message.attributes;
        let fail = |engine: &Self, reason| {
            engine.metrics.auth_failures.with_label_values(&[reason]).inc();
            Err(ErrorCode::Unauthenticated)
        };
        if !attributes.has_integrity() {
            // Not a failure: every client starts like this, to learn realm and nonce.
            return Err(ErrorCode::Unauthenticated);
        }
        let (Some(username), Some(realm), Some(nonce)) = (attributes.username, attributes.realm, attributes.nonce)
        else {
            return Err(ErrorCode::BadRequest);
        };
        if attributes.has_bad_text {
            return Err(ErrorCode::BadRequest);
        }
        let algorithm = match (attributes.password_algorithm, attributes.password_algorithms) {
            (None, None) => Algorithm::Md5,
            // Both or none, what was offered as it was offered, and one of that: else somebody on the way took the
            // better algorithm out.
            (Some(chosen), Some(offered)) if offered == PASSWORD_ALGORITHMS && Nonces::announces_algorithms(nonce) => {
                let chosen_is = |algorithm: Algorithm| {
                    let [high, low] = algorithm.number().to_be_bytes();
                    chosen == [high, low, 0, 0]
                };
                match (chosen_is(Algorithm::Sha256), chosen_is(Algorithm::Md5)) {
                    (true, _) => Algorithm::Sha256,
                    (_, true) => Algorithm::Md5,
                    _ => return Err(ErrorCode::BadRequest),
                }
            }
            _ => return Err(ErrorCode::BadRequest),
        };
        if realm != self.rules.realm {
            return fail(self, "wrong_realm");
        }
        // Who has an allocation may keep it for a while after the credential has ended.
        let grace = if self.by_client.contains_key(&client) { self.rules.expiry_grace } else { 0 };
        let user = match self.rules.credentials.find(username, now.unix, grace) {
            Ok(user) => user,
            Err(Denied::UnknownUser) => return fail(self, "unknown_user"),
            Err(Denied::Expired) => return fail(self, "expired"),
        };
        let mut keys = user.passwords.iter().map(|password| Key::long_term(algorithm, username, realm, password));
        let Some(key) = keys.find(|key| message.is_by(key)) else { return fail(self, "wrong_password") };
        if !self.rules.nonces.is_fresh(nonce, client.address, now.unix) {
            self.metrics.stale_nonces.inc();
            return Err(ErrorCode::StaleNonce);
        }
        Ok(Requester { key, expires: user.expires })
    }

    /// The requester's allocation, if it is the requester's.
    fn own(&mut self, client: ClientId, message: &Message<'_>) -> Result<AllocationId, Refused> {
        let id = *self.by_client.get(&client).ok_or(ErrorCode::AllocationMismatch)?;
        let allocation = self.allocations.get(id.0).ok_or(ErrorCode::AllocationMismatch)?;
        if message.attributes.username != Some(&*allocation.username) {
            return Err(ErrorCode::WrongCredentials);
        }
        Ok(id)
    }

    /// RFC 8656, section 7.2.
    fn allocate<E: Edge>(
        &mut self,
        now: Now,
        client: ClientId,
        message: &Message<'_>,
        requester: &Requester,
        edge: &mut E,
    ) -> Result<Builder, Refused> {
        if let Some(id) = self.by_client.get(&client).copied() {
            let allocation = self.allocations.get(id.0).ok_or(ErrorCode::AllocationMismatch)?;
            if allocation.transaction != message.transaction {
                return Err(ErrorCode::AllocationMismatch);
            }
            // The same request again: the answer was lost.
            return Ok(allocated(allocation));
        }
        let wish = Wish::of(message)?;
        if self.draining {
            return Err(ErrorCode::InsufficientCapacity);
        }
        let username = message.attributes.username.unwrap_or_default();
        let name = self.rules.credentials.name_of(username);
        let share = self.rules.ledger.take(name, client.address.ip()).map_err(|reached| {
            self.metrics.quota_hits.with_label_values(&[reached.label()]).inc();
            ErrorCode::AllocationQuotaReached
        })?;
        let lifetime = wish.lifetime.unwrap_or(DEFAULT_LIFETIME).clamp(DEFAULT_LIFETIME, self.max_lifetime());
        let ends = requester.expires.map(|expires| {
            let left = expires.saturating_add(self.rules.expiry_grace).saturating_sub(now.unix);
            now.instant + Duration::from_secs(left)
        });
        let granted =
            Granted { client, username: username.into(), transaction: message.transaction, lifetime, ends, share };
        let slot = self.allocations.vacant_key();
        let mut allocation = Allocation::new(granted, now.instant);
        if let Err(code) = self.open(&mut allocation, AllocationId(slot), &wish, now.instant, edge) {
            for relayed in [allocation.v4, allocation.v6].into_iter().flatten() {
                edge.close(relayed.relay);
            }
            return Err(code);
        }
        let answer = allocated(&allocation);
        let labels = if allocation.v4.is_some() { Family::V4 } else { Family::V6 };
        self.metrics.created.with_label_values(&[client.transport.label(), labels.label()]).inc();
        self.metrics.allocations.inc();
        self.deadlines.insert((allocation.deadline, slot));
        self.by_client.insert(client, AllocationId(slot));
        self.allocations.insert(allocation);
        Ok(answer)
    }

    fn max_lifetime(&self) -> u32 {
        self.rules.max_lifetime.max(DEFAULT_LIFETIME)
    }

    /// Opens the ports that a client wishes for.
    fn open<E: Edge>(
        &mut self,
        allocation: &mut Allocation,
        id: AllocationId,
        wish: &Wish,
        now: Instant,
        edge: &mut E,
    ) -> Result<(), Refused> {
        if let Some(token) = wish.token {
            let (relay, family, port) = edge.claim(token, id, now).ok_or(ErrorCode::InsufficientCapacity)?;
            let Some(ip) = self.own_address(family) else {
                edge.close(relay);
                return Err(ErrorCode::InsufficientCapacity);
            };
            *allocation.relayed_mut(family) = Some(RelayedAddress { relay, address: SocketAddr::new(ip, port) });
            return Ok(());
        }
        let (relayed, reservation) = self.open_port(id, wish.family, wish.even_port, now, edge)?;
        *allocation.relayed_mut(wish.family) = Some(relayed);
        allocation.reservation = reservation;
        if wish.both_families {
            match self.open_port(id, Family::V6, None, now, edge) {
                Ok((relayed, _)) => allocation.v6 = Some(relayed),
                Err(_) => allocation.refused_family = true,
            }
        }
        Ok(())
    }

    fn own_address(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.place.v4,
            Family::V6 => self.place.v6,
        }
    }

    /// Opens a port of the range, drawn at random; with `even_port`, an even one, and with `Some(true)` the one above
    /// it as well, for whoever has the token.
    fn open_port<E: Edge>(
        &mut self,
        id: AllocationId,
        family: Family,
        even_port: Option<bool>,
        now: Instant,
        edge: &mut E,
    ) -> Result<(RelayedAddress, Option<[u8; 8]>), Refused> {
        let ip = self.own_address(family).ok_or(ErrorCode::AddressFamilyNotSupported)?;
        let first = u32::from(*self.rules.relay_ports.start());
        let count = (u32::from(*self.rules.relay_ports.end()) + 1).saturating_sub(first).max(1);
        let start = self.rng.random_range(0..count);
        for step in 0..RANDOM_TRIES + count.min(MAX_WALK) {
            let offset = if step < RANDOM_TRIES {
                self.rng.random_range(0..count)
            } else {
                (start + step - RANDOM_TRIES) % count
            };
            let Ok(mut port) = u16::try_from(first + offset) else { continue };
            if even_port.is_some() {
                port &= !1;
            }
            let reserved = (even_port == Some(true)).then_some(port | 1);
            if !self.rules.relay_ports.contains(&port)
                || reserved.is_some_and(|port| !self.rules.relay_ports.contains(&port))
            {
                continue;
            }
            let relay = match edge.bind(id, family, port) {
                Ok(relay) => relay,
                Err(NoPort::InUse) => continue,
                Err(NoPort::Exhausted) => break,
            };
            let mut token = None;
            if let Some(port) = reserved {
                let drawn: [u8; 8] = self.rng.random();
                match edge.reserve(drawn, family, port, now + RESERVATION_LIFETIME) {
                    Ok(()) => token = Some(drawn),
                    Err(error) => {
                        edge.close(relay);
                        match error {
                            NoPort::InUse => continue,
                            NoPort::Exhausted => break,
                        }
                    }
                }
            }
            return Ok((RelayedAddress { relay, address: SocketAddr::new(ip, port) }, token));
        }
        self.metrics.no_port.inc();
        Err(ErrorCode::InsufficientCapacity)
    }

    /// RFC 8656, section 8.2.
    fn refresh<E: Edge>(
        &mut self,
        now: Now,
        client: ClientId,
        message: &Message<'_>,
        edge: &mut E,
    ) -> Result<Builder, Refused> {
        let lifetime = lifetime_of(message)?.unwrap_or(DEFAULT_LIFETIME);
        let family = message.attributes.requested_family.map(family_of).transpose()?;
        let answer = |lifetime: u32| {
            Builder::new(Class::Success, Method::Refresh, message.transaction)
                .attribute(attribute::LIFETIME, &lifetime.to_be_bytes())
        };
        let id = match self.own(client, message) {
            Err(ErrorCode::AllocationMismatch) if self.was_ended(client, message.transaction, now.instant) => {
                return Ok(answer(0));
            }
            result => result?,
        };
        let max = self.max_lifetime();
        let Some(allocation) = self.allocations.get_mut(id.0) else { return Err(ErrorCode::AllocationMismatch) };
        if family.is_some_and(|family| allocation.relayed(family).is_none()) {
            return Err(ErrorCode::PeerAddressFamilyMismatch);
        }
        if lifetime == 0 {
            let both = allocation.v4.is_some() && allocation.v6.is_some();
            if let Some(family) = family.filter(|_| both) {
                // One of two families goes (RFC 8656, section 8.2).
                if let Some(relayed) = allocation.relayed_mut(family).take() {
                    edge.close(relayed.relay);
                }
            } else {
                self.end(id, "by_request", now.instant, edge);
                if self.ended.len() >= MAX_ENDED {
                    self.ended.pop_front();
                }
                self.ended.push_back((now.instant, client, message.transaction));
            }
            return Ok(answer(0));
        }
        let lifetime = lifetime.clamp(DEFAULT_LIFETIME, max);
        allocation.extend(lifetime, now.instant);
        let left = allocation.expires.saturating_duration_since(now.instant).as_secs();
        if allocation.expires < allocation.deadline {
            self.deadlines.remove(&(allocation.deadline, id.0));
            allocation.deadline = allocation.expires;
            self.deadlines.insert((allocation.deadline, id.0));
        }
        Ok(answer(u32::try_from(left).unwrap_or(lifetime).min(lifetime)))
    }

    fn was_ended(&mut self, client: ClientId, transaction: TransactionId, now: Instant) -> bool {
        while self.ended.front().is_some_and(|(at, ..)| *at + RETRANSMISSION < now) {
            self.ended.pop_front();
        }
        self.ended.iter().any(|(_, ended, by)| *ended == client && *by == transaction)
    }

    /// Whether an allocation may talk to a peer.
    fn admit(&self, id: AllocationId, peer: IpAddr) -> Result<(), Refused> {
        let allocation = self.allocations.get(id.0).ok_or(ErrorCode::AllocationMismatch)?;
        // An IPv4 address in IPv6 spelling is refused as what it is.
        if let IpAddr::V6(v6) = peer
            && v6.to_ipv4_mapped().is_some()
        {
            self.metrics.denied_peers.inc();
            return Err(ErrorCode::Forbidden);
        }
        if allocation.relayed(Family::of(peer)).is_none() {
            return Err(ErrorCode::PeerAddressFamilyMismatch);
        }
        if !self.place.peers.allows(peer) {
            self.metrics.denied_peers.inc();
            return Err(ErrorCode::Forbidden);
        }
        Ok(())
    }

    /// RFC 8656, section 10.2: all peers or none.
    fn create_permission(&mut self, now: Now, client: ClientId, message: &Message<'_>) -> Result<Builder, Refused> {
        let id = self.own(client, message)?;
        let mut count = 0;
        for peer in message.peers() {
            self.admit(id, peer.ok_or(ErrorCode::BadRequest)?.ip())?;
            count += 1;
        }
        if count == 0 {
            return Err(ErrorCode::BadRequest);
        }
        let allocation = self.allocations.get_mut(id.0).ok_or(ErrorCode::AllocationMismatch)?;
        if !allocation.has_room_for_permissions(count, now.instant) {
            return Err(ErrorCode::InsufficientCapacity);
        }
        for peer in message.peers().flatten() {
            allocation.permit(peer.ip(), now.instant);
        }
        Ok(Builder::new(Class::Success, Method::CreatePermission, message.transaction))
    }

    /// RFC 8656, section 12.2.
    fn channel_bind(&mut self, now: Now, client: ClientId, message: &Message<'_>) -> Result<Builder, Refused> {
        let id = self.own(client, message)?;
        let number = match message.attributes.channel_number {
            Some(&[high, low, _, _]) => ChannelNumber::new(u16::from_be_bytes([high, low])),
            _ => None,
        };
        let number = number.ok_or(ErrorCode::BadRequest)?;
        let peer = message.attributes.peer_address.and_then(|value| message.address(value));
        let peer = peer.ok_or(ErrorCode::BadRequest)?;
        self.admit(id, peer.ip())?;
        let allocation = self.allocations.get_mut(id.0).ok_or(ErrorCode::AllocationMismatch)?;
        match allocation.bind(number, peer, now.instant) {
            Ok(()) => Ok(Builder::new(Class::Success, Method::ChannelBind, message.transaction)),
            Err(NotBound::Conflict) => Err(ErrorCode::BadRequest),
            Err(NotBound::Full) => Err(ErrorCode::InsufficientCapacity),
        }
    }
}

/// What a client asks for in an Allocate request (RFC 8656, section 7.1), checked as section 7.2 says.
struct Wish {
    lifetime: Option<u32>,
    family: Family,
    both_families: bool,
    /// `Some`: an even port; `Some(true)`: and the next one reserved.
    even_port: Option<bool>,
    token: Option<[u8; 8]>,
}

impl Wish {
    fn of(message: &Message<'_>) -> Result<Self, Refused> {
        let attributes = &message.attributes;
        match attributes.requested_transport {
            Some(&[UDP, _, _, _]) => {}
            Some([_, _, _, _]) => return Err(ErrorCode::UnsupportedTransportProtocol),
            _ => return Err(ErrorCode::BadRequest),
        }
        let family = attributes.requested_family.map(family_of).transpose()?;
        let both_families = match attributes.additional_family {
            None => false,
            Some(&[2, _, _, _]) => true,
            Some(_) => return Err(ErrorCode::BadRequest),
        };
        let even_port = match attributes.even_port {
            None => None,
            Some(&[flags]) => Some(flags & 0x80 != 0),
            Some(_) => return Err(ErrorCode::BadRequest),
        };
        let token = attributes.reservation_token.map(<[u8; 8]>::try_from).transpose();
        let token = token.map_err(|_| ErrorCode::BadRequest)?;
        let contradicts = (token.is_some() && (even_port.is_some() || family.is_some() || both_families))
            || (both_families && (family.is_some() || even_port == Some(true)));
        if contradicts {
            return Err(ErrorCode::BadRequest);
        }
        Ok(Self {
            lifetime: lifetime_of(message)?,
            family: family.unwrap_or(Family::V4),
            both_families,
            even_port,
            token,
        })
    }
}

fn lifetime_of(message: &Message<'_>) -> Result<Option<u32>, Refused> {
    let lifetime = message.attributes.lifetime.map(<[u8; 4]>::try_from).transpose();
    Ok(lifetime.map_err(|_| ErrorCode::BadRequest)?.map(u32::from_be_bytes))
}

/// The family in REQUESTED-ADDRESS-FAMILY (RFC 8656, section 18.3).
fn family_of(value: &[u8]) -> Result<Family, Refused> {
    match value {
        [1, _, _, _] => Ok(Family::V4),
        [2, _, _, _] => Ok(Family::V6),
        [_, _, _, _] => Err(ErrorCode::AddressFamilyNotSupported),
        _ => Err(ErrorCode::BadRequest),
    }
}

/// The answer to the request that made an allocation (RFC 8656, section 7.2).
fn allocated(allocation: &Allocation) -> Builder {
    let mut answer = Builder::new(Class::Success, Method::Allocate, allocation.transaction);
    for relayed in [allocation.v4, allocation.v6].into_iter().flatten() {
        answer = answer.address(attribute::XOR_RELAYED_ADDRESS, relayed.address);
    }
    answer = answer
        .attribute(attribute::LIFETIME, &allocation.lifetime.to_be_bytes())
        .address(attribute::XOR_MAPPED_ADDRESS, allocation.client.address);
    if let Some(token) = allocation.reservation {
        answer = answer.attribute(attribute::RESERVATION_TOKEN, &token);
    }
    if allocation.refused_family {
        // IPv6 was wished for as well, and is not to be had (RFC 8656, section 18.12).
        answer = answer.error(attribute::ADDRESS_ERROR_CODE, 2, ErrorCode::AddressFamilyNotSupported);
    }
    answer
}

fn unknown_attributes(method: Method, message: &Message<'_>) -> Builder {
    let unknown: Vec<u8> = message.attributes.unknown().iter().flat_map(|kind| kind.to_be_bytes()).collect();
    Builder::new(Class::Error, method, message.transaction)
        .error(attribute::ERROR_CODE, 0, ErrorCode::UnknownAttribute)
        .attribute(attribute::UNKNOWN_ATTRIBUTES, &unknown)
}

/// Sends an answer, protected as the request was (RFC 8489, section 9.2.4), with FINGERPRINT if that had one.
fn answer_with<E: Edge>(answer: Builder, message: &Message<'_>, key: Option<&Key>, client: ClientId, edge: &mut E) {
    let mut answer = answer;
    if let Some(key) = key {
        answer = answer.integrity(key, message.attributes.has_integrity_sha256());
    }
    if message.attributes.has_fingerprint {
        answer = answer.fingerprint();
    }
    edge.to_client(client, [&answer.finish(), &[], &[]]);
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
