//! Nostr events (NIP-01).

use std::borrow::Cow;

use secp256k1::{SECP256K1, XOnlyPublicKey, schnorr::Signature};
use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};

/// An event, parsed but not yet verified.
#[derive(Debug, Deserialize)]
pub(crate) struct Event<'a> {
    #[serde(deserialize_with = "lower_hex")]
    pub(crate) id: [u8; 32],
    #[serde(deserialize_with = "lower_hex")]
    pub(crate) pubkey: [u8; 32],
    /// Seconds since the Unix epoch.
    pub(crate) created_at: u64,
    pub(crate) kind: u16,
    #[serde(borrow)]
    pub(crate) tags: Vec<Vec<Cow<'a, str>>>,
    #[serde(borrow)]
    pub(crate) content: Cow<'a, str>,
    #[serde(deserialize_with = "lower_hex")]
    pub(crate) sig: [u8; 64],
}

/// Why an event is not what its author says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VerifyError {
    #[error("event id does not match")]
    Id,
    #[error("signature does not verify")]
    Signature,
}

impl Event<'_> {
    /// The topic of a signalling event: its only tag is `x`.
    pub(crate) fn only_topic(&self) -> Option<&str> {
        match self.tags.as_slice() {
            [tag] => match tag.as_slice() {
                [name, topic] if name == "x" => Some(topic),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether the event's kind says that it is delivered and forgotten (NIP-01).
    pub(crate) fn is_ephemeral(&self) -> bool {
        (20_000..30_000).contains(&self.kind)
    }

    /// Whether only its author may publish the event (NIP-70).
    pub(crate) fn is_protected(&self) -> bool {
        self.tags.iter().any(|tag| matches!(tag.as_slice(), [name] if name == "-"))
    }

    /// How many leading bits of the id are zero (NIP-13).
    pub(crate) fn difficulty(&self) -> u32 {
        let zeros = self.id.iter().take_while(|byte| **byte == 0).count();
        let rest = self.id.get(zeros).map_or(0, |byte| byte.leading_zeros());
        u32::try_from(8 * zeros).unwrap_or(u32::MAX) + rest
    }

    /// The tags that filters can name: one letter, and a value.
    pub(crate) fn letter_tags(&self) -> impl Iterator<Item = (u8, &str)> {
        self.tags.iter().filter_map(|tag| match tag.as_slice() {
            [name, value, ..] => match name.as_bytes() {
                [letter] if letter.is_ascii_alphabetic() => Some((*letter, value.as_ref())),
                _ => None,
            },
            _ => None,
        })
    }

    /// Checks id and signature. `keys` is that of the event's connection.
    pub(crate) fn verify(&self, keys: &mut KeyCache) -> Result<(), VerifyError> {
        if self.computed_id() != self.id {
            return Err(VerifyError::Id);
        }
        let author = keys.parse(&self.pubkey).ok_or(VerifyError::Signature)?;
        SECP256K1
            .verify_schnorr(&Signature::from_byte_array(self.sig), &self.id, &author)
            .map_err(|_| VerifyError::Signature)
    }

    /// SHA-256 of `[0,pubkey,created_at,kind,tags,content]` without white space.
    fn computed_id(&self) -> [u8; 32] {
        let fields = (0, hex::encode(self.pubkey), self.created_at, self.kind, &self.tags, &self.content);
        let mut hasher = Sha256::new();
        // Strings, numbers and arrays serialise, and hashing does not fail.
        let _ = serde_json::to_writer(HashWriter(&mut hasher), &fields);
        hasher.finalize().into()
    }
}

/// The public key that was parsed last: a connection publishes under one key, and parsing it takes a square root.
#[derive(Debug, Default)]
pub(crate) struct KeyCache(Option<([u8; 32], XOnlyPublicKey)>);

impl KeyCache {
    fn parse(&mut self, bytes: &[u8; 32]) -> Option<XOnlyPublicKey> {
        if let Some((known, key)) = &self.0
            && known == bytes
        {
            return Some(*key);
        }
        let key = XOnlyPublicKey::from_slice(bytes).ok()?;
        self.0 = Some((*bytes, key));
        Some(key)
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Reads `N` bytes written as lower-case hex, the only form that NIP-01 allows.
pub(crate) fn parse_lower_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let lower = !text.bytes().any(|byte| byte.is_ascii_uppercase());
    (lower && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

fn lower_hex<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<[u8; N], D::Error> {
    let text = Cow::<str>::deserialize(deserializer)?;
    parse_lower_hex(&text)
        .ok_or_else(|| serde::de::Error::custom(format!("expected {} digits of lower-case hex", 2 * N)))
}

#[cfg(test)]
mod tests {
    use nostr::event::FinalizeEvent as _;
    use nostr::prelude::{EventBuilder, Keys, Kind, Tag};

    use super::*;

    fn signed(content: &str) -> String {
        let event = EventBuilder::new(Kind::from(22_718), content)
            .tag(Tag::parse(["x", "topic \"quoted\"\n"]).unwrap())
            .finalize(&Keys::generate())
            .unwrap();
        serde_json::to_string(&event).unwrap()
    }

    #[test]
    fn events_of_another_implementation_verify() {
        for content in ["", "plain", "a \"b\" \\ \n\t\r\u{8}\u{c}\u{1}\u{7f} é 😀 \u{2028}"] {
            let json = signed(content);
            let event: Event<'_> = serde_json::from_str(&json).unwrap();
            assert_eq!(event.verify(&mut KeyCache::default()), Ok(()), "{content:?}");
            assert!(event.is_ephemeral());
            assert_eq!(event.letter_tags().collect::<Vec<_>>(), [(b'x', "topic \"quoted\"\n")]);
        }
    }

    #[test]
    fn a_changed_event_does_not_verify() {
        let json = signed("before");
        let forged = json.replace("before", "behind");
        assert_eq!(
            serde_json::from_str::<Event<'_>>(&forged).unwrap().verify(&mut KeyCache::default()),
            Err(VerifyError::Id)
        );
        let mut event: Event<'_> = serde_json::from_str(&json).unwrap();
        event.sig[5] ^= 1;
        assert_eq!(event.verify(&mut KeyCache::default()), Err(VerifyError::Signature));
        let mut event: Event<'_> = serde_json::from_str(&json).unwrap();
        // Not the x coordinate of any point: no key at all.
        event.pubkey = [0xff; 32];
        event.id = event.computed_id();
        assert_eq!(event.verify(&mut KeyCache::default()), Err(VerifyError::Signature));
    }

    #[test]
    fn captured_events_of_real_clients_verify() {
        let events: serde_json::Value =
            serde_json::from_str(include_str!("../../genosdb/fixtures/events.json")).unwrap();
        for (name, event) in events.as_object().unwrap() {
            let json = event.to_string();
            assert_eq!(
                serde_json::from_str::<Event<'_>>(&json).unwrap().verify(&mut KeyCache::default()),
                Ok(()),
                "{name}"
            );
        }
    }

    #[test]
    fn difficulty_counts_leading_zero_bits() {
        let json = signed("x");
        let mut event: Event<'_> = serde_json::from_str(&json).unwrap();
        for (start, expected) in [(&[0x80][..], 0), (&[0x01], 7), (&[0, 0x10], 11), (&[0; 32], 256)] {
            event.id = [0xff; 32];
            event.id[..start.len()].copy_from_slice(start);
            assert_eq!(event.difficulty(), expected);
        }
    }

    #[test]
    fn ill_typed_events_do_not_parse() {
        let good: serde_json::Value = serde_json::from_str(&signed("x")).unwrap();
        for (field, wrong) in [
            ("id", serde_json::json!("AB")),
            ("id", serde_json::json!("A".repeat(64))),
            ("pubkey", serde_json::json!(7)),
            ("created_at", serde_json::json!(-1)),
            ("created_at", serde_json::json!(1.5)),
            ("kind", serde_json::json!(65_536)),
            ("tags", serde_json::json!([["x", 1]])),
            ("tags", serde_json::json!({})),
            ("content", serde_json::json!(null)),
            ("sig", serde_json::json!("00")),
        ] {
            let mut event = good.clone();
            event[field] = wrong;
            assert!(serde_json::from_str::<Event<'_>>(&event.to_string()).is_err(), "{field}");
            let mut event = good.clone();
            event.as_object_mut().unwrap().remove(field);
            assert!(serde_json::from_str::<Event<'_>>(&event.to_string()).is_err(), "{field} missing");
        }
    }
}
