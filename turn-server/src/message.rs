//! STUN messages (RFC 8489, section 5 and 14; RFC 8656, section 18), read without copying and written once.
//!
//! The `stun` crate's type copies every attribute into a vector of its own before anything is known about the sender:
//! 16,000 allocations for one hostile packet. Here a message is walked once, in place. Tests hold the two against each
//! other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hmac::Hmac;
use hmac::digest::{KeyInit, Mac};
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

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

/// Attribute types.
pub(crate) mod attribute {
    pub(crate) const USERNAME: u16 = 0x0006;
    pub(crate) const MESSAGE_INTEGRITY: u16 = 0x0008;
    pub(crate) const ERROR_CODE: u16 = 0x0009;
    pub(crate) const UNKNOWN_ATTRIBUTES: u16 = 0x000a;
    pub(crate) const CHANNEL_NUMBER: u16 = 0x000c;
    pub(crate) const LIFETIME: u16 = 0x000d;
    pub(crate) const XOR_PEER_ADDRESS: u16 = 0x0012;
    pub(crate) const DATA: u16 = 0x0013;
    pub(crate) const REALM: u16 = 0x0014;
    pub(crate) const NONCE: u16 = 0x0015;
    pub(crate) const XOR_RELAYED_ADDRESS: u16 = 0x0016;
    pub(crate) const REQUESTED_ADDRESS_FAMILY: u16 = 0x0017;
    pub(crate) const EVEN_PORT: u16 = 0x0018;
    pub(crate) const REQUESTED_TRANSPORT: u16 = 0x0019;
    pub(crate) const DONT_FRAGMENT: u16 = 0x001a;
    pub(crate) const MESSAGE_INTEGRITY_SHA256: u16 = 0x001c;
    pub(crate) const PASSWORD_ALGORITHM: u16 = 0x001d;
    pub(crate) const XOR_MAPPED_ADDRESS: u16 = 0x0020;
    pub(crate) const RESERVATION_TOKEN: u16 = 0x0022;
    pub(crate) const ADDITIONAL_ADDRESS_FAMILY: u16 = 0x8000;
    pub(crate) const ADDRESS_ERROR_CODE: u16 = 0x8001;
    pub(crate) const PASSWORD_ALGORITHMS: u16 = 0x8002;
    pub(crate) const SOFTWARE: u16 = 0x8022;
    pub(crate) const FINGERPRINT: u16 = 0x8028;

    /// Whether who does not understand the attribute must not go on (RFC 8489, section 14).
    pub(crate) fn is_comprehension_required(attribute: u16) -> bool {
        attribute < 0x8000
    }
}

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

/// A hash that goes into MESSAGE-INTEGRITY, and makes the key (RFC 8489, section 18.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Md5,
    Sha256,
}

impl Algorithm {
    /// The number in PASSWORD-ALGORITHM.
    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Md5 => 1,
            Self::Sha256 => 2,
        }
    }
}

/// The key of a long-term credential (RFC 8489, section 9.2.2).
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Key(Vec<u8>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    pub(crate) fn long_term(algorithm: Algorithm, username: &str, realm: &str, password: &str) -> Self {
        let text = format!("{username}:{realm}:{password}");
        Self(match algorithm {
            Algorithm::Md5 => Md5::digest(text.as_bytes()).to_vec(),
            Algorithm::Sha256 => Sha256::digest(text.as_bytes()).to_vec(),
        })
    }

    #[cfg(test)]
    pub(crate) fn short_term(password: &str) -> Self {
        Self(password.as_bytes().to_vec())
    }

    fn mac<M: Mac + KeyInit>(&self) -> Option<M> {
        // HMAC takes keys of any length.
        <M as Mac>::new_from_slice(&self.0).ok()
    }
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
            attribute::ADDITIONAL_ADDRESS_FAMILY => first(&mut attributes.additional_family, value),
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

/// A message that is being written.
#[derive(Debug, Clone)]
pub(crate) struct Builder {
    bytes: Vec<u8>,
    transaction: TransactionId,
}

impl Builder {
    pub(crate) fn new(class: Class, method: Method, transaction: TransactionId) -> Self {
        let bits = method.bits();
        let class = match class {
            Class::Request => 0x0000,
            Class::Indication => 0x0010,
            Class::Success => 0x0100,
            Class::Error => 0x0110,
        };
        let kind = (bits & 0x000f) | (bits & 0x0070) << 1 | (bits & 0x0f80) << 2 | class;
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&MAGIC_COOKIE);
        bytes.extend_from_slice(&transaction.0);
        Self { bytes, transaction }
    }

    /// Adds an attribute of at most 65,535 bytes.
    pub(crate) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
        let value = &value[..usize::from(length)];
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an XOR-… address.
    pub(crate) fn address(self, kind: u16, address: SocketAddr) -> Self {
        let (value, length) = xor_address(&self.transaction, address);
        self.attribute(kind, &value[..length])
    }

    /// Adds ERROR-CODE (RFC 8489, section 14.8), or ADDRESS-ERROR-CODE, whose first byte is a family (RFC 8656,
    /// section 18.12).
    pub(crate) fn error(self, kind: u16, first: u8, code: ErrorCode) -> Self {
        let [class, number] = [code.number() / 100, code.number() % 100].map(|part| part.to_be_bytes()[1]);
        let mut value = vec![first, 0, class, number];
        value.extend_from_slice(code.reason().as_bytes());
        self.attribute(kind, &value)
    }

    /// Protects what stands here so far.
    pub(crate) fn integrity(self, key: &Key, sha256: bool) -> Self {
        let (kind, size) =
            if sha256 { (attribute::MESSAGE_INTEGRITY_SHA256, 32) } else { (attribute::MESSAGE_INTEGRITY, 20) };
        let header = header_with_length(&self.bytes, self.bytes.len() + 4 + size - HEADER);
        let body = &self.bytes[HEADER..];
        let value = if sha256 {
            key.mac::<Hmac<Sha256>>()
                .map(|mac| mac.chain_update(header).chain_update(body).finalize().into_bytes().to_vec())
        } else {
            key.mac::<Hmac<Sha1>>()
                .map(|mac| mac.chain_update(header).chain_update(body).finalize().into_bytes().to_vec())
        };
        self.attribute(kind, &value.unwrap_or_default())
    }

    pub(crate) fn fingerprint(self) -> Self {
        let crc = crc_of(&self.bytes, self.bytes.len() + 8 - HEADER);
        self.attribute(attribute::FINGERPRINT, &crc.to_be_bytes())
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        let length = u16::try_from(self.bytes.len() - HEADER).unwrap_or(u16::MAX);
        self.bytes[2..4].copy_from_slice(&length.to_be_bytes());
        self.bytes
    }
}

/// An XOR-… address and how many bytes of it count.
fn xor_address(transaction: &TransactionId, address: SocketAddr) -> ([u8; 20], usize) {
    let mut value = [0; 20];
    let port = address.port() ^ u16::from_be_bytes([MAGIC_COOKIE[0], MAGIC_COOKIE[1]]);
    value[2..4].copy_from_slice(&port.to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => {
            value[1] = 1;
            value[4..8].copy_from_slice(&(ip.to_bits() ^ u32::from_be_bytes(MAGIC_COOKIE)).to_be_bytes());
            (value, 8)
        }
        IpAddr::V6(ip) => {
            value[1] = 2;
            value[4..].copy_from_slice(&(ip.to_bits() ^ mask_of(transaction)).to_be_bytes());
            (value, 20)
        }
    }
}

/// The longest head of a Data indication: header, an IPv6 address, the head of DATA.
pub(crate) const MAX_DATA_HEAD: usize = HEADER + 24 + 4;

/// What stands before the payload in a Data indication (RFC 8656, section 11.3), and how many bytes of it count. Behind
/// the payload comes padding to a multiple of four.
pub(crate) fn data_head(transaction: [u8; 12], peer: SocketAddr, payload: usize) -> ([u8; MAX_DATA_HEAD], usize) {
    let mut head = [0; MAX_DATA_HEAD];
    let transaction = TransactionId(transaction);
    let (address, length) = xor_address(&transaction, peer);
    let end = HEADER + 4 + length + 4;
    let total = end - HEADER + payload.next_multiple_of(4);
    head[..2].copy_from_slice(&0x0017_u16.to_be_bytes());
    head[2..4].copy_from_slice(&u16::try_from(total).unwrap_or(u16::MAX).to_be_bytes());
    head[4..8].copy_from_slice(&MAGIC_COOKIE);
    head[8..HEADER].copy_from_slice(&transaction.0);
    head[20..22].copy_from_slice(&attribute::XOR_PEER_ADDRESS.to_be_bytes());
    head[22..24].copy_from_slice(&u16::try_from(length).unwrap_or_default().to_be_bytes());
    head[24..24 + length].copy_from_slice(&address[..length]);
    head[end - 4..end - 2].copy_from_slice(&attribute::DATA.to_be_bytes());
    head[end - 2..end].copy_from_slice(&u16::try_from(payload).unwrap_or(u16::MAX).to_be_bytes());
    (head, end)
}

/// Why a request is refused (RFC 8489, section 14.8; RFC 8656, section 19).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorCode {
    BadRequest,
    Unauthenticated,
    Forbidden,
    UnknownAttribute,
    AllocationMismatch,
    StaleNonce,
    AddressFamilyNotSupported,
    WrongCredentials,
    UnsupportedTransportProtocol,
    PeerAddressFamilyMismatch,
    AllocationQuotaReached,
    InsufficientCapacity,
}

impl ErrorCode {
    pub(crate) fn number(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::UnknownAttribute => 420,
            Self::AllocationMismatch => 437,
            Self::StaleNonce => 438,
            Self::AddressFamilyNotSupported => 440,
            Self::WrongCredentials => 441,
            Self::UnsupportedTransportProtocol => 442,
            Self::PeerAddressFamilyMismatch => 443,
            Self::AllocationQuotaReached => 486,
            Self::InsufficientCapacity => 508,
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::BadRequest => "Bad Request",
            Self::Unauthenticated => "Unauthenticated",
            Self::Forbidden => "Forbidden",
            Self::UnknownAttribute => "Unknown Attribute",
            Self::AllocationMismatch => "Allocation Mismatch",
            Self::StaleNonce => "Stale Nonce",
            Self::AddressFamilyNotSupported => "Address Family not Supported",
            Self::WrongCredentials => "Wrong Credentials",
            Self::UnsupportedTransportProtocol => "Unsupported Transport Protocol",
            Self::PeerAddressFamilyMismatch => "Peer Address Family Mismatch",
            Self::AllocationQuotaReached => "Allocation Quota Reached",
            Self::InsufficientCapacity => "Insufficient Capacity",
        }
    }

    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::BadRequest => "400",
            Self::Unauthenticated => "401",
            Self::Forbidden => "403",
            Self::UnknownAttribute => "420",
            Self::AllocationMismatch => "437",
            Self::StaleNonce => "438",
            Self::AddressFamilyNotSupported => "440",
            Self::WrongCredentials => "441",
            Self::UnsupportedTransportProtocol => "442",
            Self::PeerAddressFamilyMismatch => "443",
            Self::AllocationQuotaReached => "486",
            Self::InsufficientCapacity => "508",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    /// RFC 5769, section 2.1: a request with short-term credentials.
    const REQUEST: &str = "000100582112a442b7e7a701bc34d686fa87dfae80220010535455 4e207465737420636c69656e74
        002400046e0001ff80290008932ff9b151263b36 00060009 6576746a3a68367659202020
        00080014 9aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2 80280004 e57a3bcf";
    /// RFC 5769, section 2.2: an answer with an IPv4 address.
    const ANSWER_V4: &str = "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220
        002000080001a147e112a643 00080014 2b91f599fd9e90c38c7489f92af9ba53f06be7d7 80280004 c07d4c96";
    /// RFC 5769, section 2.3: an answer with an IPv6 address.
    const ANSWER_V6: &str = "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220
        002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9 00080014 a382954e4be67bf11784c97c8292c275bfe3ed41
        80280004 c8fb0b4c";
    /// RFC 5769, section 2.4: a request with long-term credentials.
    const LONG_TERM: &str = "000100602112a44278ad3433c6ad72c029da412e00060012e3839ee38388e383aae38383e382af e382b9 0000
        0015001c662f2f3439396b39353464364f4c33346f4c394653547679363473410014000b6578616d706c652e6f726700
        00080014f67024656dd64a3e02b8e0712e85c9a28ca89666";

    #[test]
    fn the_vectors_of_rfc_5769_are_read() {
        let key = Key::short_term("VOkJxbRl1RmTxUk/WvJxBt");
        let bytes = unhex(REQUEST);
        let request = Message::parse(&bytes).unwrap();
        assert_eq!((request.method, request.class), (Method::Binding, Class::Request));
        assert_eq!(request.attributes.username, Some("evtj:h6vY"));
        assert!(request.attributes.has_fingerprint && request.is_by(&key));
        // PRIORITY is for ICE, and a server of STUN does not know it; ICE-CONTROLLED need not be known.
        assert_eq!(request.attributes.unknown(), [0x0024]);
        for (bytes, address) in
            [(ANSWER_V4, "192.0.2.1:32853"), (ANSWER_V6, "[2001:db8:1234:5678:11:2233:4455:6677]:32853")]
        {
            let bytes = unhex(bytes);
            let answer = Message::parse(&bytes).unwrap();
            assert_eq!(answer.class, Class::Success);
            assert!(answer.is_by(&key) && !answer.is_by(&Key::short_term("another")));
            let step =
                Walk { bytes: &bytes, at: HEADER }.flatten().find(|(kind, ..)| *kind == attribute::XOR_MAPPED_ADDRESS);
            assert_eq!(answer.address(step.unwrap().1), Some(address.parse().unwrap()));
        }
        let bytes = unhex(LONG_TERM);
        let request = Message::parse(&bytes).unwrap();
        assert_eq!(request.attributes.username, Some("\u{30de}\u{30c8}\u{30ea}\u{30c3}\u{30af}\u{30b9}"));
        assert_eq!(request.attributes.nonce, Some(&b"f//499k954d6OL34oL9FSTvy64sA"[..]));
        let key = Key::long_term(Algorithm::Md5, request.attributes.username.unwrap(), "example.org", "TheMatrIX");
        assert!(request.is_by(&key));
    }

    #[test]
    fn every_changed_bit_of_what_is_protected_is_noticed() {
        let key = Key::short_term("VOkJxbRl1RmTxUk/WvJxBt");
        let bytes = unhex(REQUEST);
        for bit in 0..8 * (bytes.len() - 8) {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!Message::parse(&changed).is_ok_and(|message| message.is_by(&key)), "bit {bit}");
        }
    }

    #[test]
    fn what_stands_behind_the_integrity_does_not_count() {
        let key = Key::short_term("key");
        for sha256 in [false, true] {
            let bytes = Builder::new(Class::Request, Method::Refresh, TransactionId([7; 12]))
                .attribute(attribute::LIFETIME, &[0, 0, 0, 9])
                .integrity(&key, sha256)
                .attribute(attribute::USERNAME, b"forged")
                .address(attribute::XOR_PEER_ADDRESS, "10.0.0.1:1".parse().unwrap())
                .fingerprint()
                .finish();
            let message = Message::parse(&bytes).unwrap();
            assert!(message.is_by(&key) && message.attributes.has_fingerprint);
            assert_eq!(message.attributes.username, None);
            assert_eq!(message.attributes.lifetime, Some(&[0, 0, 0, 9][..]));
            assert_eq!(message.peers().count(), 0);
        }
    }

    #[test]
    fn the_stun_crate_reads_what_is_written_here() {
        use stun::message::Message as Theirs;
        for address in ["203.0.113.9:65535", "[2001:db8::7]:1"] {
            let address: SocketAddr = address.parse().unwrap();
            let key = Key::long_term(Algorithm::Md5, "alice", "homeport", "pass");
            let bytes = Builder::new(Class::Error, Method::ChannelBind, TransactionId([9; 12]))
                .error(attribute::ERROR_CODE, 0, ErrorCode::StaleNonce)
                .attribute(attribute::REALM, b"homeport")
                .address(attribute::XOR_MAPPED_ADDRESS, address)
                .integrity(&key, false)
                .fingerprint()
                .finish();
            let mut theirs = Theirs::default();
            theirs.unmarshal_binary(&bytes).unwrap();
            assert_eq!(theirs.typ.class, stun::message::CLASS_ERROR_RESPONSE);
            assert_eq!(theirs.typ.method, stun::message::METHOD_CHANNEL_BIND);
            let mut mapped = stun::xoraddr::XorMappedAddress::default();
            mapped.get_from_as(&theirs, stun::attributes::ATTR_XORMAPPED_ADDRESS).unwrap();
            assert_eq!((mapped.ip, mapped.port), (address.ip(), address.port()));
            let mut code = stun::error_code::ErrorCodeAttribute::default();
            stun::message::Getter::get_from(&mut code, &theirs).unwrap();
            assert!(code.code == stun::error_code::CODE_STALE_NONCE);
            let integrity = stun::integrity::MessageIntegrity::new_long_term_integrity(
                "alice".into(),
                "homeport".into(),
                "pass".into(),
            );
            integrity.check(&mut theirs).unwrap();
            stun::fingerprint::FINGERPRINT.check(&theirs).unwrap();
            let ours = Message::parse(&bytes).unwrap();
            assert!(ours.is_by(&key));
        }
    }

    #[test]
    fn a_data_indication_is_one_that_others_read() {
        for (peer, payload) in [("192.0.2.7:9", &b"hello"[..]), ("[2001:db8::9]:77", b"")] {
            let peer: SocketAddr = peer.parse().unwrap();
            let (head, length) = data_head([3; 12], peer, payload.len());
            let mut bytes = head[..length].to_vec();
            bytes.extend_from_slice(payload);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            let message = Message::parse(&bytes).unwrap();
            assert_eq!((message.method, message.class), (Method::Data, Class::Indication));
            assert_eq!(message.attributes.data, Some(payload));
            assert_eq!(message.peers().collect::<Vec<_>>(), [Some(peer)]);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), key in any::<[u8; 4]>()) {
            let _ = Message::parse(&bytes);
            // Bytes that get past the header.
            let mut stun = Builder::new(Class::Request, Method::Allocate, TransactionId([1; 12])).finish();
            stun.extend_from_slice(&bytes);
            stun.truncate(stun.len() / 4 * 4);
            let length = u16::try_from(stun.len() - HEADER).unwrap();
            stun[2..4].copy_from_slice(&length.to_be_bytes());
            if let Ok(message) = Message::parse(&stun) {
                let _ = message.is_by(&Key(key.to_vec()));
                let _ = message.peers().count();
            }
        }
    }
}
