//! Messages that are being written.

use std::net::{IpAddr, SocketAddr};

use hmac::{Hmac, Mac as _};
use sha1::Sha1;
use sha2::Sha256;

use super::{
    Class, ErrorCode, HEADER, Key, MAGIC_COOKIE, Method, TransactionId, attribute, crc_of, header_with_length, mask_of,
};

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
