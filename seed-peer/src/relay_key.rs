//! The key that the seed signs its events to relays with, and proves to relays that ask (NIP-42).

use std::fmt;

use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};

/// The kind of an event that answers a challenge (NIP-42).
const AUTH_KIND: u16 = 22_242;

/// A Nostr key. Has nothing to do with identities of the Security Manager.
#[derive(Clone)]
pub struct RelayKey(Keys);

/// Text is no secret key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a Nostr secret key, as 64 digits of hex or nsec1…")]
pub struct RelayKeyError;

impl RelayKey {
    /// A new key.
    pub fn generate() -> Self {
        Self(Keys::generate())
    }

    /// Parses a secret key, in hex or as `nsec1…`.
    ///
    /// # Errors
    /// [`RelayKeyError`], which does not repeat the text.
    pub fn parse(text: &str) -> Result<Self, RelayKeyError> {
        Keys::parse(text).map(Self).map_err(|_| RelayKeyError)
    }

    /// The public key, for a relay's list.
    pub fn public_key(&self) -> [u8; 32] {
        self.0.public_key().to_bytes()
    }

    /// The message that publishes `content` under a topic.
    ///
    /// # Errors
    /// When the event cannot be signed.
    pub fn event_message(&self, kind: u16, topic: &str, content: &str) -> Result<String, nostr::error::Error> {
        let event = EventBuilder::new(Kind::from(kind), content).tag(Tag::parse(["x", topic])?).finalize(&self.0)?;
        Ok(serde_json::json!(["EVENT", event]).to_string())
    }

    /// The message that answers a relay's challenge.
    ///
    /// # Errors
    /// When the event cannot be signed.
    pub fn auth_message(&self, relay: &str, challenge: &str) -> Result<String, nostr::error::Error> {
        let tags = [Tag::parse(["relay", relay])?, Tag::parse(["challenge", challenge])?];
        let event = EventBuilder::new(Kind::from(AUTH_KIND), "").tags(tags).finalize(&self.0)?;
        Ok(serde_json::json!(["AUTH", event]).to_string())
    }
}

impl fmt::Debug for RelayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RelayKey({})", self.0.public_key().to_hex())
    }
}
