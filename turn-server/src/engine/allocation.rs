//! One allocation: what a client has been given, and whom it talks to (RFC 8656, sections 2.2 to 2.5).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::bucket::Bucket;
use crate::message::TransactionId;
use crate::quotas::Share;

use super::{ClientId, RelayId};

/// How long a permission holds (RFC 8656, section 9).
pub(crate) const PERMISSION_LIFETIME: Duration = Duration::from_secs(300);
/// How long a channel holds (RFC 8656, section 12).
pub(crate) const CHANNEL_LIFETIME: Duration = Duration::from_secs(600);
/// Permissions, and channels, of one allocation.
const MAX_PEERS: usize = 1_024;

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// A number of a channel: 0x4000 to 0x7fff. RFC 8656, section 12, ends the range at 0x4fff; clients written for RFC
/// 5766, coturn's among them, choose from all of it, and on a port of TURN alone nothing else starts like that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ChannelNumber(u16);

impl ChannelNumber {
    pub(crate) fn new(number: u16) -> Option<Self> {
        (0x4000..=0x7fff).contains(&number).then_some(Self(number))
    }

    pub(crate) fn get(self) -> u16 {
        self.0
    }
}

/// A socket at which peers reach an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RelayedAddress {
    pub(crate) relay: RelayId,
    /// What clients and peers are told.
    pub(crate) address: SocketAddr,
}

#[derive(Debug, Clone, Copy)]
struct Channel {
    peer: SocketAddr,
    expires: Instant,
}

/// Why a peer cannot be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotBound {
    /// The number stands for another peer, or the peer has another number.
    Conflict,
    /// There are too many.
    Full,
}

/// An allocation.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) client: ClientId,
    pub(crate) username: Box<str>,
    /// The request that made it, for when that comes again.
    pub(crate) transaction: TransactionId,
    /// The answer to that request, without integrity.
    pub(crate) lifetime: u32,
    pub(crate) reservation: Option<[u8; 8]>,
    pub(crate) refused_family: bool,
    pub(crate) v4: Option<RelayedAddress>,
    pub(crate) v6: Option<RelayedAddress>,
    pub(crate) created: Instant,
    pub(crate) expires: Instant,
    /// When it is looked at next, which is not after it expires.
    pub(crate) deadline: Instant,
    /// When it ends although it is refreshed: the user's credential has expired by then.
    pub(crate) ends: Option<Instant>,
    /// Counts against the quotas as long as this lives.
    _share: Share,
    pub(crate) to_peers: bool,
    pub(crate) from_peers: bool,
    pub(crate) bandwidth: Bucket,
    permissions: HashMap<IpAddr, Instant>,
    channels: HashMap<ChannelNumber, Channel>,
    numbers: HashMap<SocketAddr, ChannelNumber>,
}

/// What a new allocation is made of.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) client: ClientId,
    pub(crate) username: Box<str>,
    pub(crate) transaction: TransactionId,
    pub(crate) lifetime: u32,
    pub(crate) ends: Option<Instant>,
    pub(crate) share: Share,
}

impl Allocation {
    /// An allocation without a relayed address as yet.
    pub(crate) fn new(granted: Granted, now: Instant) -> Self {
        let Granted { client, username, transaction, lifetime, ends, share } = granted;
        let mut allocation = Self {
            client,
            username,
            transaction,
            lifetime,
            reservation: None,
            refused_family: false,
            v4: None,
            v6: None,
            created: now,
            expires: now,
            deadline: now,
            ends,
            _share: share,
            to_peers: false,
            from_peers: false,
            bandwidth: Bucket::full(now),
            permissions: HashMap::new(),
            channels: HashMap::new(),
            numbers: HashMap::new(),
        };
        allocation.extend(lifetime, now);
        allocation.deadline = allocation.expires;
        allocation
    }

    /// Lets it live for `lifetime` seconds from now, though not beyond its end.
    pub(crate) fn extend(&mut self, lifetime: u32, now: Instant) {
        let expires = now + Duration::from_secs(lifetime.into());
        self.expires = self.ends.map_or(expires, |ends| ends.min(expires));
    }

    pub(crate) fn relayed(&self, family: Family) -> Option<RelayedAddress> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    pub(crate) fn relayed_mut(&mut self, family: Family) -> &mut Option<RelayedAddress> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Lets peers at an address reach the client, and be reached.
    pub(crate) fn permit(&mut self, peer: IpAddr, now: Instant) {
        self.permissions.insert(peer, now + PERMISSION_LIFETIME);
    }

    /// Whether so many more permissions fit.
    pub(crate) fn has_room_for_permissions(&mut self, more: usize, now: Instant) -> bool {
        if self.permissions.len() + more > MAX_PEERS {
            self.permissions.retain(|_, expires| *expires > now);
        }
        self.permissions.len() + more <= MAX_PEERS
    }

    pub(crate) fn is_permitted(&self, peer: IpAddr, now: Instant) -> bool {
        self.permissions.get(&peer).is_some_and(|expires| *expires > now)
    }

    /// Binds a channel to a peer, or makes that last longer, with a permission (RFC 8656, section 12.2).
    pub(crate) fn bind(&mut self, number: ChannelNumber, peer: SocketAddr, now: Instant) -> Result<(), NotBound> {
        if self.channels.len() >= MAX_PEERS {
            self.channels.retain(|_, channel| channel.expires > now);
            self.numbers.retain(|_, number| self.channels.contains_key(number));
        }
        if self.channels.get(&number).is_some_and(|channel| channel.expires > now && channel.peer != peer) {
            return Err(NotBound::Conflict);
        }
        let bound = self.numbers.get(&peer).copied().filter(|bound| *bound != number);
        if bound.is_some_and(|bound| self.channels.get(&bound).is_some_and(|channel| channel.expires > now)) {
            return Err(NotBound::Conflict);
        }
        if self.channels.len() >= MAX_PEERS || !self.has_room_for_permissions(1, now) {
            return Err(NotBound::Full);
        }
        // What these two were bound to before has expired.
        if let Some(bound) = bound {
            self.channels.remove(&bound);
        }
        if let Some(old) = self.channels.insert(number, Channel { peer, expires: now + CHANNEL_LIFETIME })
            && old.peer != peer
        {
            self.numbers.remove(&old.peer);
        }
        self.numbers.insert(peer, number);
        self.permit(peer.ip(), now);
        Ok(())
    }

    /// The peer of a channel.
    pub(crate) fn peer_of(&self, number: ChannelNumber, now: Instant) -> Option<SocketAddr> {
        self.channels.get(&number).filter(|channel| channel.expires > now).map(|channel| channel.peer)
    }

    /// The channel of a peer.
    pub(crate) fn channel_of(&self, peer: SocketAddr, now: Instant) -> Option<ChannelNumber> {
        let number = *self.numbers.get(&peer)?;
        self.peer_of(number, now).map(|_| number)
    }
}
