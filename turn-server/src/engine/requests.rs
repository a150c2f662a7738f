//! What requests ask for, and their answers (RFC 8656, sections 7, 8, 10 and 12).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng as _;
use service::Origin;

use super::allocation::{Allocation, Granted, NotBound};
use super::authentication::{PASSWORD_ALGORITHMS, Requester};
use super::{
    AllocationId, ChannelNumber, ClientId, Edge, Engine, Family, NoPort, Now, RESERVATION_LIFETIME, Refused,
    RelayedAddress,
};
use crate::message::{Builder, Class, ErrorCode, Key, Message, Method, TransactionId, attribute};

/// The lifetime of an allocation whose client asks for none, in seconds (RFC 8656, section 3.2).
const DEFAULT_LIFETIME: u32 = 600;
/// How long a request may be repeated (RFC 8489, section 6.2.1: 39.5 s).
const RETRANSMISSION: Duration = Duration::from_secs(40);
/// Ended allocations that are remembered for repeated requests.
const MAX_ENDED: usize = 1_024;
/// Ports that are drawn at random before the range is walked through.
const RANDOM_TRIES: u32 = 64;
/// Ports that are walked through: all of a small range. Where so many in a row are taken, the rest is as well, and every
/// try costs the packets of others time.
const MAX_WALK: u32 = 1_024;
/// The protocol number of UDP in REQUESTED-TRANSPORT.
pub(super) const UDP: u8 = 17;

impl Engine {
    pub(super) fn request<E: Edge>(
        &mut self,
        now: Now,
        client: ClientId,
        method: Method,
        message: &Message<'_>,
        edge: &mut E,
    ) {
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
            let is_owner = message.attributes.username == Some(&*allocation.username);
            if allocation.transaction != message.transaction || !is_owner {
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
