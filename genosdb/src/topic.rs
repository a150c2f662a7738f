//! Rooms, and the Nostr topics and kinds that their peers meet under (wire §1).

use std::fmt;

use sha1::{Digest, Sha1};

/// The application id under which every GenosDB client joins its rooms.
pub const APP_ID: &str = "1234";

/// The transport's name, the first part of every topic.
const TRANSPORT: &str = "GenosRTC";

/// Length of a peer id in characters.
const PEER_ID_LENGTH: usize = 20;

/// A room of the transport: the set of peers that meet under one root topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Room(String);

impl Room {
    /// The room in which the peers of `database` synchronise its graph.
    pub fn graph_sync(database: &str) -> Self {
        Self(format!("graph-sync-room-{database}"))
    }

    /// The room of `database` for presence and the application's own channels (`db.room`).
    pub fn app_sync(database: &str) -> Self {
        Self(format!("app-sync-{database}"))
    }

    /// The room's name as it goes into topics and keys.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The topic that every peer of the room announces itself on.
    pub fn root_topic(&self) -> Topic {
        Topic::of(&format!("{TRANSPORT}@{APP_ID}@{}", self.0))
    }

    /// The topic on which `peer` receives offers and answers.
    pub fn self_topic(&self, peer: &PeerId) -> Topic {
        Topic::of(&format!("{TRANSPORT}@{APP_ID}@{}@{peer}", self.0))
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The value of the `x` tag under which events of a room or of one of its peers travel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(String);

impl Topic {
    /// `sha1x` of a plain text: SHA-1, each byte in base 36 without padding, joined.
    fn of(plaintext: &str) -> Self {
        let mut topic = String::with_capacity(40);
        for byte in Sha1::digest(plaintext.as_bytes()) {
            if byte >= 36 {
                topic.push(base36(byte / 36));
            }
            topic.push(base36(byte % 36));
        }
        Self(topic)
    }

    /// The topic's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The Nostr event kind of this topic, always in the ephemeral range 20000..30000 (NIP-01).
    pub fn kind(&self) -> u16 {
        let sum: u32 = self.0.bytes().map(u32::from).sum();
        // A topic has at most 40 characters of at most 'z': the sum fits, and so does the kind.
        20_000 + u16::try_from(sum % 10_000).unwrap_or(0)
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn base36(digit: u8) -> char {
    char::from(if digit < 10 { b'0' + digit } else { b'a' + digit - 10 })
}

/// The name of a peer: 20 characters of `[0-9A-Za-z]`, one per page load, chosen by the peer itself.
///
/// Ids order as JavaScript orders their strings, which decides who yields when two peers dial each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId([u8; PEER_ID_LENGTH]);

impl PeerId {
    /// The characters a peer id is made of.
    pub const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

    /// Parses an id; `None` unless it is 20 characters of `[0-9A-Za-z]`.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; PEER_ID_LENGTH] = text.as_bytes().try_into().ok()?;
        bytes.iter().all(u8::is_ascii_alphanumeric).then_some(Self(bytes))
    }

    /// The id with another ending of four characters, one for each `number` below 62^4.
    pub fn with_ending(&self, number: u32) -> Self {
        let mut bytes = self.0;
        let mut rest = number;
        for byte in bytes.iter_mut().rev().take(4) {
            *byte = Self::ALPHABET[rest as usize % Self::ALPHABET.len()];
            rest /= 62;
        }
        Self(bytes)
    }

    /// An id whose characters are drawn with `index`, which is asked for numbers in `0..62`.
    pub fn generate(mut index: impl FnMut(std::ops::Range<usize>) -> usize) -> Self {
        let alphabet = Self::ALPHABET;
        Self(std::array::from_fn(|_| alphabet[index(0..alphabet.len()) % alphabet.len()]))
    }

    /// The id's text.
    pub fn as_str(&self) -> &str {
        // Only ASCII letters and digits pass `parse` and `generate`.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_id_is_twenty_letters_and_digits() {
        assert!(PeerId::parse("rP5xrSA37VoHEv5F0C0U").is_some());
        for wrong in ["", "rP5xrSA37VoHEv5F0C0", "rP5xrSA37VoHEv5F0C0UU", "rP5xrSA37VoHEv5F0C0-", "ééééééééééé"]
        {
            assert_eq!(PeerId::parse(wrong), None, "{wrong}");
        }
    }
}
