//! Entrances for fuzz targets.

use crate::engine::ChannelNumber;
use crate::frame::first_frame;
use crate::message::{Algorithm, Key, Message};

/// Reads bytes as one STUN message, and asks it everything that can be asked.
pub fn message(bytes: &[u8]) {
    let Ok(message) = Message::parse(bytes) else { return };
    let attributes = &message.attributes;
    let _ = (attributes.unknown(), attributes.has_integrity());
    for algorithm in [Algorithm::Md5, Algorithm::Sha256] {
        assert!(!message.is_by(&Key::long_term(algorithm, "user", "realm", "a password that no input knows")));
    }
    for peer in message.peers().flatten() {
        assert!(peer.is_ipv4() || peer.is_ipv6());
    }
    if let Some(&[high, low, ..]) = attributes.channel_number {
        let _ = ChannelNumber::new(u16::from_be_bytes([high, low]));
    }
}

/// Cuts a stream into messages, and reads each.
pub fn stream(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(Some(length)) = first_frame(rest) {
        assert!(length >= 4 && length <= rest.len());
        message(&rest[..length]);
        rest = &rest[length..];
    }
}
