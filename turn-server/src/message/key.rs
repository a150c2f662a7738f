//! Keys of long-term credentials.

use hmac::digest::{KeyInit, Mac};
use md5::Md5;
use sha2::{Digest as _, Sha256};

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
pub(crate) struct Key(pub(super) Vec<u8>);

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

    pub(super) fn mac<M: Mac + KeyInit>(&self) -> Option<M> {
        // HMAC takes keys of any length.
        <M as Mac>::new_from_slice(&self.0).ok()
    }
}
