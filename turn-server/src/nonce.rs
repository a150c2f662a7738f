//! Nonces that the server does not have to remember: each carries when and for whom it was made, and proof of that.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// "obMatJos2" and 24 bits of security features in base64 (RFC 8489, section 9.2). The bit that is set says that
/// PASSWORD-ALGORITHMS came along, so that nobody on the way can take the better ones out of it unnoticed.
const COOKIE: &[u8] = b"obMatJos2AAAB";
/// Bytes of the proof: enough that guessing is hopeless within a nonce's life, and no more, since answers to strangers
/// are to be small.
const PROOF: usize = 11;

/// Makes nonces and knows them again.
#[derive(Clone)]
pub(crate) struct Nonces {
    secret: [u8; 32],
    /// Seconds that a nonce is good for.
    lifetime: u64,
}

impl std::fmt::Debug for Nonces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nonces").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}

impl Nonces {
    /// `secret` is drawn at random at each start.
    pub(crate) fn new(secret: [u8; 32], lifetime: u64) -> Self {
        Self { secret, lifetime }
    }

    /// A nonce for `client`; `unix` is in seconds since the Unix epoch.
    pub(crate) fn make(&self, client: SocketAddr, unix: u64) -> Vec<u8> {
        let mut bytes = vec![0; 5];
        bytes.copy_from_slice(&unix.to_be_bytes()[3..]);
        let proof = self.proof(client, &bytes).finalize().into_bytes();
        bytes.extend_from_slice(&proof[..PROOF]);
        let mut nonce = COOKIE.to_vec();
        nonce.extend_from_slice(URL_SAFE_NO_PAD.encode(bytes).as_bytes());
        nonce
    }

    /// Whether a nonce was made for `client`, and not too long ago.
    pub(crate) fn is_fresh(&self, nonce: &[u8], client: SocketAddr, unix: u64) -> bool {
        let Some(Ok(bytes)) = nonce.strip_prefix(COOKIE).map(|rest| URL_SAFE_NO_PAD.decode(rest)) else { return false };
        let Some((made, proof)) = bytes.split_first_chunk::<5>() else { return false };
        let mut seconds = [0; 8];
        seconds[3..].copy_from_slice(made);
        let age = unix.checked_sub(u64::from_be_bytes(seconds));
        proof.len() == PROOF
            && age.is_some_and(|age| age <= self.lifetime)
            && self.proof(client, made).verify_truncated_left(proof).is_ok()
    }

    /// Whether a nonce says that PASSWORD-ALGORITHMS came along with it.
    pub(crate) fn announces_algorithms(nonce: &[u8]) -> bool {
        nonce.starts_with(COOKIE)
    }

    fn proof(&self, client: SocketAddr, made: &[u8]) -> Hmac<Sha256> {
        // HMAC takes keys of any length.
        #[expect(clippy::expect_used, reason = "see above")]
        let mac = Hmac::<Sha256>::new_from_slice(&self.secret).expect("a key of 32 bytes");
        let ip = match client.ip() {
            std::net::IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            std::net::IpAddr::V6(ip) => ip,
        };
        mac.chain_update(made).chain_update(ip.octets()).chain_update(client.port().to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_good_for_its_client_and_its_time() {
        let nonces = Nonces::new([1; 32], 600);
        let client: SocketAddr = "192.0.2.1:5000".parse().unwrap();
        let nonce = nonces.make(client, 1_000_000);
        assert!(nonce.len() <= 40 && nonce.is_ascii(), "{}", nonce.len());
        assert!(nonces.is_fresh(&nonce, client, 1_000_000) && nonces.is_fresh(&nonce, client, 1_000_600));
        assert!(!nonces.is_fresh(&nonce, client, 1_000_601), "too old");
        assert!(!nonces.is_fresh(&nonce, client, 999_999), "of the future");
        for other in ["192.0.2.1:5001", "192.0.2.2:5000", "[2001:db8::1]:5000"] {
            assert!(!nonces.is_fresh(&nonce, other.parse().unwrap(), 1_000_000), "{other}");
        }
        assert!(!Nonces::new([2; 32], 600).is_fresh(&nonce, client, 1_000_000), "of another server");
        for at in 0..nonce.len() {
            let mut forged = nonce.clone();
            forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
            assert!(!nonces.is_fresh(&forged, client, 1_000_000), "byte {at}");
        }
        for cut in 0..nonce.len() {
            assert!(!nonces.is_fresh(&nonce[..cut], client, 1_000_000));
        }
    }
}
