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

/// A session description as it travels: sealed, of at most [`MAX_SEALED_BYTES`], in characters that JSON does not escape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedDescription(String);

impl SealedDescription {
    /// Takes what a peer sent; `None` when nobody can have sealed it.
    pub fn parse(text: &str) -> Option<Self> {
        let is_of_a_seal = |byte: u8| byte.is_ascii_alphanumeric() || b",$+/=".contains(&byte);
        (text.len() <= MAX_SEALED_BYTES && text.bytes().all(is_of_a_seal)).then(|| Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A sealed session description could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
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
    pub fn seal(&self, iv: [u8; 12], sdp: &str) -> SealedDescription {
        let cipher = AesGcm::<Aes256, U12>::new((&self.0).into());
        let sealed = cipher
            .encrypt(Nonce::<U12>::from_slice(&iv), sdp.as_bytes())
            // AES-GCM fails only beyond 64 GiB, which no session description in memory is.
            .unwrap_or_default();
        let iv: Vec<String> = iv.iter().map(u8::to_string).collect();
        SealedDescription(format!("{}${}", iv.join(","), STANDARD.encode(sealed)))
    }

    /// Opens what a peer sealed; IVs of 12 bytes, and of 16 as some Trystero versions write them.
    ///
    /// # Errors
    /// [`OpenError`], which tells a wrong password from text that nobody sealed.
    pub fn open(&self, sealed: &SealedDescription) -> Result<String, OpenError> {
        let (iv, body) = sealed.0.split_once('$').ok_or(OpenError::Malformed)?;
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
        let sealed = SealedDescription::parse(&format!("{}${}", ["3"; 16].join(","), STANDARD.encode(body))).unwrap();
        assert_eq!(key.open(&sealed).as_deref(), Ok("v=0"));
    }

    #[test]
    fn text_that_nobody_sealed_is_refused() {
        let key = SdpKey([0; 32]);
        for text in ["", "$", "1,2$", "256,0$AAAA", "1,2,3,4,5,6,7,8,9,10,11,12$=", "1,2,3,4,5,6,7,8,9,10,11$AAAA"] {
            let sealed = SealedDescription::parse(text).unwrap();
            assert_eq!(key.open(&sealed), Err(OpenError::Malformed), "{text}");
        }
        for text in ["1,2$\"", "1,2$\\u0041", "1,2$é", "1, 2$AA==", &"1".repeat(MAX_SEALED_BYTES + 1)] {
            assert_eq!(SealedDescription::parse(text), None, "{text}");
        }
    }
}
