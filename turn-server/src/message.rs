//! STUN messages (RFC 8489, section 5 and 14; RFC 8656, section 18), read without copying and written once.
//!
//! The `stun` crate's type copies every attribute into a vector of its own before anything is known about the sender:
//! 16,000 allocations for one hostile packet. Here a message is walked once, in place. Tests hold the two against each
//! other.

pub(crate) mod attribute;
mod builder;
mod error_code;
mod key;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hmac::{Hmac, Mac as _};
use sha1::Sha1;
use sha2::Sha256;

pub(crate) use builder::{Builder, data_head};
pub(crate) use error_code::ErrorCode;
pub(crate) use key::{Algorithm, Key};

/// Every STUN message has this behind its length (RFC 8489, section 5).
const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// Bytes of a message's header.
pub(crate) const HEADER: usize = 20;
/// What the CRC of FINGERPRINT is combined with (RFC 8489, section 14.7).
const FINGERPRINT_XOR: u32 = 0x5354_554e;
/// Unknown attributes that an answer names, at most.
const MAX_UNKNOWN: usize = 8;
/// The longest USERNAME (RFC 8489, section 14.3), and REALM and NONCE (sections 14.9 and 14.10), in bytes.
const MAX_USERNAME: usize = 508;
const MAX_TEXT: usize = 763;

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Method {
    Binding,
    Allocate,
    Refresh,
    Send,
    Data,
    CreatePermission,
    ChannelBind,
}

impl Method {
    fn of_bits(bits: u16) -> Option<Self> {
        Some(match bits {
            0x001 => Self::Binding,
            0x003 => Self::Allocate,
            0x004 => Self::Refresh,
            0x006 => Self::Send,
            0x007 => Self::Data,
            0x008 => Self::CreatePermission,
            0x009 => Self::ChannelBind,
            _ => return None,
        })
    }

    fn bits(self) -> u16 {
        match self {
            Self::Binding => 0x001,
            Self::Allocate => 0x003,
            Self::Refresh => 0x004,
            Self::Send => 0x006,
            Self::Data => 0x007,
            Self::CreatePermission => 0x008,
            Self::ChannelBind => 0x009,
        }
    }

    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Binding => "binding",
            Self::Allocate => "allocate",
            Self::Refresh => "refresh",
            Self::Send => "send",
            Self::Data => "data",
            Self::CreatePermission => "create_permission",
            Self::ChannelBind => "channel_bind",
        }
    }
}

/// The role of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Request,
    Indication,
    Success,
    Error,
}

/// What ties an answer to its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct TransactionId([u8; 12]);

impl TransactionId {
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }
}

/// Bytes are no STUN message that a server can make sense of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MessageError {
    #[error("not a STUN message")]
    NotStun,
    #[error("the lengths in the message do not add up")]
    Length,
    #[error("a method that this server does not know")]
    Method,
    #[error("the fingerprint does not match")]
    Fingerprint,
}

/// Where an integrity attribute stands, and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Integrity<'a> {
    offset: usize,
    value: &'a [u8],
}

/// The attributes of a message that a server looks at; of several of a type, the first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attributes<'a> {
    pub(crate) username: Option<&'a str>,
    pub(crate) realm: Option<&'a str>,
    pub(crate) nonce: Option<&'a [u8]>,
    pub(crate) password_algorithm: Option<&'a [u8]>,
    pub(crate) password_algorithms: Option<&'a [u8]>,
    pub(crate) channel_number: Option<&'a [u8]>,
    pub(crate) lifetime: Option<&'a [u8]>,
    pub(crate) peer_address: Option<&'a [u8]>,
    pub(crate) data: Option<&'a [u8]>,
    pub(crate) requested_family: Option<&'a [u8]>,
    pub(crate) additional_family: Option<&'a [u8]>,
    pub(crate) even_port: Option<&'a [u8]>,
    pub(crate) requested_transport: Option<&'a [u8]>,
    pub(crate) reservation_token: Option<&'a [u8]>,
    pub(crate) dont_fragment: bool,
    pub(crate) has_fingerprint: bool,
    /// A text attribute is too long or not UTF-8.
    pub(crate) has_bad_text: bool,
    integrity: Option<Integrity<'a>>,
    integrity_sha256: Option<Integrity<'a>>,
    unknown: [u16; MAX_UNKNOWN],
    unknown_count: usize,
}

impl Attributes<'_> {
    /// Attributes that must be understood and are not.
    pub(crate) fn unknown(&self) -> &[u16] {
        &self.unknown[..self.unknown_count]
    }

    pub(crate) fn has_integrity(&self) -> bool {
        self.integrity.is_some() || self.integrity_sha256.is_some()
    }

    /// Whether MESSAGE-INTEGRITY-SHA256 protects the message.
    pub(crate) fn has_integrity_sha256(&self) -> bool {
        self.integrity_sha256.is_some()
    }
}

/// A STUN message, whose bytes have been walked once: all lengths are right.
#[derive(Debug, Clone)]
pub(crate) struct Message<'a> {
    pub(crate) method: Method,
    pub(crate) class: Class,
    pub(crate) transaction: TransactionId,
    pub(crate) attributes: Attributes<'a>,
    bytes: &'a [u8],
    /// Where the attributes end that count: behind the integrity only FINGERPRINT does.
    end: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Attributes one after the other: type, value, and offset of the attribute in the message.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<(u16, &'a [u8], usize), MessageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.bytes.len() {
            return None;
        }
        let at = self.at;
        let step = || {
            let kind = u16_at(self.bytes, at)?;
            let length = usize::from(u16_at(self.bytes, at + 2)?);
            let value = self.bytes.get(at + 4..at + 4 + length)?;
            let next = at + 4 + length.next_multiple_of(4);
            (next <= self.bytes.len()).then_some((kind, value, next))
        };
        match step() {
            Some((kind, value, next)) => {
                self.at = next;
                Some(Ok((kind, value, at)))
            }
            None => {
                self.at = self.bytes.len();
                Some(Err(MessageError::Length))
            }
        }
    }
}

impl<'a> Message<'a> {
    /// Reads a message that is exactly `bytes`.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, MessageError> {
        if bytes.len() < HEADER || bytes[0] & 0xc0 != 0 || bytes[4..8] != MAGIC_COOKIE {
            return Err(MessageError::NotStun);
        }
        let length = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        if length % 4 != 0 || HEADER + length != bytes.len() {
            return Err(MessageError::Length);
        }
        let kind = u16::from_be_bytes([bytes[0], bytes[1]]);
        // Twelve bits of method with two of class between them (RFC 8489, figure 3).
        let method = Method::of_bits((kind & 0x000f) | (kind & 0x00e0) >> 1 | (kind & 0x3e00) >> 2);
        let class = match (kind & 0x0100 != 0, kind & 0x0010 != 0) {
            (false, false) => Class::Request,
            (false, true) => Class::Indication,
            (true, false) => Class::Success,
            (true, true) => Class::Error,
        };
        let mut transaction = [0; 12];
        transaction.copy_from_slice(&bytes[8..HEADER]);
        let mut message = Self {
            method: method.ok_or(MessageError::Method)?,
            class,
            transaction: TransactionId(transaction),
            attributes: Attributes::default(),
            bytes,
            end: bytes.len(),
        };
        for step in (Walk { bytes, at: HEADER }) {
            let (kind, value, offset) = step?;
            message.note(kind, value, offset)?;
        }
        Ok(message)
    }

    fn note(&mut self, kind: u16, value: &'a [u8], offset: usize) -> Result<(), MessageError> {
        let attributes = &mut self.attributes;
        // Behind MESSAGE-INTEGRITY only the other integrity and FINGERPRINT count, behind that only FINGERPRINT
        // (RFC 8489, sections 14.5 and 14.6).
        let behind = attributes.has_integrity();
        if kind == attribute::FINGERPRINT {
            if attributes.has_fingerprint {
                return Ok(());
            }
            let crc = crc_of(&self.bytes[..offset], offset + 8 - HEADER);
            if offset + 8 != self.bytes.len() || value != crc.to_be_bytes() {
                return Err(MessageError::Fingerprint);
            }
            attributes.has_fingerprint = true;
            return Ok(());
        }
        if kind == attribute::MESSAGE_INTEGRITY_SHA256 {
            if attributes.integrity_sha256.is_none() {
                attributes.integrity_sha256 = Some(Integrity { offset, value });
                self.end = self.end.min(offset);
            }
            return Ok(());
        }
        if behind {
            return Ok(());
        }
        let mut text = |limit| {
            let text = std::str::from_utf8(value).ok().filter(|text| text.len() <= limit);
            attributes.has_bad_text |= text.is_none();
            text
        };
        match kind {
            attribute::MESSAGE_INTEGRITY => {
                attributes.integrity = Some(Integrity { offset, value });
                self.end = self.end.min(offset);
            }
            attribute::USERNAME => attributes.username = attributes.username.or(text(MAX_USERNAME)),
            attribute::REALM => attributes.realm = attributes.realm.or(text(MAX_TEXT)),
            attribute::NONCE => attributes.nonce = attributes.nonce.or(Some(value)),
            attribute::PASSWORD_ALGORITHM => first(&mut attributes.password_algorithm, value),
            attribute::PASSWORD_ALGORITHMS => first(&mut attributes.password_algorithms, value),
            attribute::CHANNEL_NUMBER => first(&mut attributes.channel_number, value),
            attribute::LIFETIME => first(&mut attributes.lifetime, value),
            attribute::XOR_PEER_ADDRESS => first(&mut attributes.peer_address, value),
            attribute::DATA => first(&mut attributes.data, value),
            attribute::REQUESTED_ADDRESS_FAMILY => first(&mut attributes.requested_family, value),
            attribute::ADDITIONAL_ADDRESS_FAMILY | attribute::ADDITIONAL_ADDRESS_FAMILY_OF_DRAFT => {
                first(&mut attributes.additional_family, value);
            }
            attribute::EVEN_PORT => first(&mut attributes.even_port, value),
            attribute::REQUESTED_TRANSPORT => first(&mut attributes.requested_transport, value),
            attribute::RESERVATION_TOKEN => first(&mut attributes.reservation_token, value),
            attribute::DONT_FRAGMENT => attributes.dont_fragment = true,
            unknown
                if attribute::is_comprehension_required(unknown)
                    && attributes.unknown_count < MAX_UNKNOWN
                    && !attributes.unknown().contains(&unknown) =>
            {
                attributes.unknown[attributes.unknown_count] = unknown;
                attributes.unknown_count += 1;
            }
            _ => {}
        }
        Ok(())
    }

    /// All peers that the message names; `None` for one that is no address.
    pub(crate) fn peers(&self) -> impl Iterator<Item = Option<SocketAddr>> {
        let walk = Walk { bytes: &self.bytes[..self.end], at: HEADER };
        walk.filter_map(Result::ok)
            .filter(|(kind, ..)| *kind == attribute::XOR_PEER_ADDRESS)
            .map(|(_, value, _)| self.address(value))
    }

    /// The address in XOR-MAPPED-ADDRESS, in an answer to a Binding request.
    pub(crate) fn mapped_address(&self) -> Option<SocketAddr> {
        self.address(self.first(attribute::XOR_MAPPED_ADDRESS)?)
    }

    /// The address in XOR-RELAYED-ADDRESS, in an answer to an Allocate request.
    pub(crate) fn relayed_address(&self) -> Option<SocketAddr> {
        self.address(self.first(attribute::XOR_RELAYED_ADDRESS)?)
    }

    /// The code in ERROR-CODE (RFC 8489, section 14.8).
    pub(crate) fn error_code(&self) -> Option<u16> {
        let &[_, _, class, number, ..] = self.first(attribute::ERROR_CODE)? else { return None };
        Some(u16::from(class & 7) * 100 + u16::from(number))
    }

    /// The value of the first attribute of a kind that servers have no use for.
    fn first(&self, kind: u16) -> Option<&'a [u8]> {
        let walk = Walk { bytes: &self.bytes[..self.end], at: HEADER };
        walk.filter_map(Result::ok).find(|(found, ..)| *found == kind).map(|(_, value, _)| value)
    }

    /// The address in an XOR-… attribute (RFC 8489, section 14.2).
    pub(crate) fn address(&self, value: &[u8]) -> Option<SocketAddr> {
        let port = u16_at(value, 2)? ^ u16::from_be_bytes([MAGIC_COOKIE[0], MAGIC_COOKIE[1]]);
        let mask = mask_of(&self.transaction);
        let ip = match (value.get(1)?, value.len()) {
            (1, 8) => {
                let bits = u32::from_be_bytes(value[4..].try_into().ok()?);
                IpAddr::from(Ipv4Addr::from_bits(bits ^ u32::from_be_bytes(MAGIC_COOKIE)))
            }
            (2, 20) => IpAddr::from(Ipv6Addr::from_bits(u128::from_be_bytes(value[4..].try_into().ok()?) ^ mask)),
            _ => return None,
        };
        Some(SocketAddr::new(ip, port))
    }

    /// Whether the message was made by who knows the key. The stronger of its integrity attributes counts.
    pub(crate) fn is_by(&self, key: &Key) -> bool {
        let verify = |integrity: &Integrity<'a>, sha256: bool| {
            let length = integrity.offset + 4 + integrity.value.len() - HEADER;
            let header = header_with_length(self.bytes, length);
            let body = &self.bytes[HEADER..integrity.offset];
            if sha256 {
                // It may be cut to 16 bytes or more (RFC 8489, section 14.6).
                let fits = matches!(integrity.value.len(), 16..=32) && integrity.value.len().is_multiple_of(4);
                fits && key.mac::<Hmac<Sha256>>().is_some_and(|mac| {
                    mac.chain_update(header).chain_update(body).verify_truncated_left(integrity.value).is_ok()
                })
            } else {
                key.mac::<Hmac<Sha1>>().is_some_and(|mac| {
                    mac.chain_update(header).chain_update(body).verify_slice(integrity.value).is_ok()
                })
            }
        };
        match (&self.attributes.integrity_sha256, &self.attributes.integrity) {
            (Some(integrity), _) => verify(integrity, true),
            (None, Some(integrity)) => verify(integrity, false),
            (None, None) => false,
        }
    }
}

fn first<'a>(slot: &mut Option<&'a [u8]>, value: &'a [u8]) {
    slot.get_or_insert(value);
}

/// What an IPv6 address is combined with: cookie and transaction id.
fn mask_of(transaction: &TransactionId) -> u128 {
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(&MAGIC_COOKIE);
    mask[4..].copy_from_slice(&transaction.0);
    u128::from_be_bytes(mask)
}

/// A message's header with another length of what follows.
fn header_with_length(message: &[u8], length: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header.copy_from_slice(&message[..HEADER]);
    header[2..4].copy_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    header
}

/// The value of a FINGERPRINT that follows `message`, whose length field is to say `length`.
fn crc_of(message: &[u8], length: usize) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header_with_length(message, length));
    crc.update(&message[HEADER..]);
    crc.finalize() ^ FINGERPRINT_XOR
}
