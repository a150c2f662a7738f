//! Who made a request (RFC 8489, section 9.2).

use super::{ClientId, Engine, Now, Refused};
use crate::credentials::Denied;
use crate::message::{Algorithm, ErrorCode, Key, Message};
use crate::nonce::Nonces;

/// What PASSWORD-ALGORITHMS says (RFC 8489, section 14.11): SHA-256 and MD5, neither with parameters.
pub(super) const PASSWORD_ALGORITHMS: [u8; 8] = [0, 2, 0, 0, 0, 1, 0, 0];

/// Who made a request.
pub(super) struct Requester {
    pub(super) key: Key,
    /// When the credential ends, in seconds since the Unix epoch.
    pub(super) expires: Option<u64>,
}

impl Engine {
    /// Who made the request, by the long-term credential (RFC 8489, section 9.2.4).
    pub(super) fn authenticate(
        &mut self,
        now: Now,
        client: ClientId,
        message: &Message<'_>,
    ) -> Result<Requester, Refused> {
        let attributes = &message.attributes;
        let fail = |engine: &Self, reason| {
            engine.metrics.auth_failures.with_label_values(&[reason]).inc();
            Err(ErrorCode::Unauthenticated)
        };
        if !attributes.has_integrity() {
            // Not a failure: every client starts like this, to learn realm and nonce.
            return Err(ErrorCode::Unauthenticated);
        }
        let (Some(username), Some(realm), Some(nonce)) = (attributes.username, attributes.realm, attributes.nonce)
        else {
            return Err(ErrorCode::BadRequest);
        };
        if attributes.has_bad_text {
            return Err(ErrorCode::BadRequest);
        }
        let algorithm = match (attributes.password_algorithm, attributes.password_algorithms) {
            (None, None) => Algorithm::Md5,
            // Both or none, what was offered as it was offered, and one of that: else somebody on the way took the
            // better algorithm out.
            (Some(chosen), Some(offered)) if offered == PASSWORD_ALGORITHMS && Nonces::announces_algorithms(nonce) => {
                let chosen_is = |algorithm: Algorithm| {
                    let [high, low] = algorithm.number().to_be_bytes();
                    chosen == [high, low, 0, 0]
                };
                match (chosen_is(Algorithm::Sha256), chosen_is(Algorithm::Md5)) {
                    (true, _) => Algorithm::Sha256,
                    (_, true) => Algorithm::Md5,
                    _ => return Err(ErrorCode::BadRequest),
                }
            }
            _ => return Err(ErrorCode::BadRequest),
        };
        if realm != self.rules.realm {
            return fail(self, "wrong_realm");
        }
        // Who has an allocation may keep it for a while after the credential has ended.
        let grace = if self.by_client.contains_key(&client) { self.rules.expiry_grace } else { 0 };
        let user = match self.rules.credentials.find(username, now.unix, grace) {
            Ok(user) => user,
            Err(Denied::UnknownUser) => return fail(self, "unknown_user"),
            Err(Denied::Expired) => return fail(self, "expired"),
        };
        let mut keys = user.passwords.iter().map(|password| Key::long_term(algorithm, username, realm, password));
        let Some(key) = keys.find(|key| message.is_by(key)) else { return fail(self, "wrong_password") };
        if !self.rules.nonces.is_fresh(nonce, client.address, now.unix) {
            self.metrics.stale_nonces.inc();
            return Err(ErrorCode::StaleNonce);
        }
        Ok(Requester { key, expires: user.expires })
    }
}
