//! Session descriptions, sealed so that a relay cannot read addresses out of them (wire §2).
//!
//! AES-256-GCM under `SHA-256("<password>:<app id>:<room>")`. The text form is the IV's bytes in decimal,
//! joined by commas, then `$`, then the base64 of cipher text and tag.

use aes_gcm::aead::consts::{U12, U16};
use aes_gcm::aead::{Aead, KeyInit};
use aes_gcm::aes::Aes256;
use aes_gcm::{AesGcm, Nonce};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use crate::topic::Room;

/// The longest sealed text that is looked at, in bytes. Real ones are about 2 KB.
pub const MAX_SEALED_BYTES: usize = 64 * 1024;

/// A sealed session description could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The text is longer than [`MAX_SEALED_BYTES`].
    #[error("sealed description is too long")]
    TooLong,
    /// The text is not an IV, a `$` and base64.
    #[error("sealed description is malformed")]
    Malformed,
    /// The key is not the one it was sealed with: most often, the room's password differs.
    #[error("sealed description does not open: the room's password differs")]
    WrongKey,
}

/// The key under which the peers of one room seal their session descriptions.
#[derive(Clone)]
pub struct SdpKey([u8; 32]);

impl SdpKey {
    /// The key of `room` of the application `app_id`; `password` is empty for a room without one.
    pub fn derive(password: &str, app_id: &str, room: &Room) -> Self {
        Self(Sha256::digest(format!("{password}:{app_id}:{room}").as_bytes()).into())
    }

    /// Seals a session description. `iv` must never repeat under one key: draw it at random.
    pub fn seal(&self, iv: [u8; 12], sdp: &str) -> String {
        let cipher = AesGcm::<Aes256, U12>::new((&self.0).into());
        let sealed = cipher
            .encrypt(Nonce::<U12>::from_slice(&iv), sdp.as_bytes())
            // AES-GCM fails only beyond 64 GiB, which no session description in memory is.
            .unwrap_or_default();
        let iv: Vec<String> = iv.iter().map(u8::to_string).collect();
        format!("{}${}", iv.join(","), STANDARD.encode(sealed))
    }

    /// Opens what a peer sealed; IVs of 12 bytes, and of 16 as some Trystero versions write them.
    ///
    /// # Errors
    /// [`OpenError`], which tells a wrong password from text that nobody sealed.
    pub fn open(&self, text: &str) -> Result<String, OpenError> {
        if text.len() > MAX_SEALED_BYTES {
            return Err(OpenError::TooLong);
        }
        let (iv, body) = text.split_once('$').ok_or(OpenError::Malformed)?;
        let iv =
            iv.split(',').map(str::parse::<u8>).collect::<Result<Vec<u8>, _>>().map_err(|_| OpenError::Malformed)?;
        let body = STANDARD.decode(body).map_err(|_| OpenError::Malformed)?;
        let key = (&self.0).into();
        let plain = match iv.len() {
            12 => AesGcm::<Aes256, U12>::new(key).decrypt(Nonce::<U12>::from_slice(&iv), body.as_slice()),
            16 => AesGcm::<Aes256, U16>::new(key).decrypt(Nonce::<U16>::from_slice(&iv), body.as_slice()),
            _ => return Err(OpenError::Malformed),
        };
        String::from_utf8(plain.map_err(|_| OpenError::WrongKey)?).map_err(|_| OpenError::Malformed)
    }
}

impl std::fmt::Debug for SdpKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SdpKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_opens_only_under_the_password_it_was_sealed_with() {
        let room = Room::graph_sync("my-app");
        let key = SdpKey::derive("secret", "1234", &room);
        let sealed = key.seal([7; 12], "v=0\r\n");
        assert_eq!(key.open(&sealed).as_deref(), Ok("v=0\r\n"));
        assert_eq!(SdpKey::derive("", "1234", &room).open(&sealed), Err(OpenError::WrongKey));
    }

    #[test]
    fn a_sixteen_byte_iv_opens() {
        let key = SdpKey([9; 32]);
        let iv = [3u8; 16];
        let body = AesGcm::<Aes256, U16>::new((&key.0).into())
            .encrypt(Nonce::<U16>::from_slice(&iv), b"v=0".as_slice())
            .unwrap();
        let text = format!("{}${}", ["3"; 16].join(","), STANDARD.encode(body));
        assert_eq!(key.open(&text).as_deref(), Ok("v=0"));
    }

    #[test]
    fn text_that_nobody_sealed_is_refused() {
        let key = SdpKey([0; 32]);
        for text in ["", "$", "1,2$", "256,0$AAAA", "1,2,3,4,5,6,7,8,9,10,11,12$*", "1,2,3,4,5,6,7,8,9,10,11$AAAA"] {
            assert_eq!(key.open(text), Err(OpenError::Malformed), "{text}");
        }
        assert_eq!(key.open(&"1".repeat(MAX_SEALED_BYTES + 1)), Err(OpenError::TooLong));
    }
}
