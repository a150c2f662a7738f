//! Who may use the server: static users, and time-limited credentials that any holder of the secret can mint.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use sha1::Sha1;
use turn::auth::{AuthHandler, generate_auth_key};

use crate::metrics::Metrics;

/// The users of the server. Debug output shows no secret.
#[derive(Clone, Default)]
pub struct Credentials {
    /// Static long-term credentials: user name to password.
    pub users: BTreeMap<String, String>,
    /// The secret of time-limited credentials: user name `<expiry>:<name>`, password
    /// `base64(HMAC-SHA1(secret, user name))`, where the expiry is in seconds since the Unix epoch.
    pub secret: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("users", &self.users.len())
            .field("secret", &self.secret.as_ref().map(|_| "…"))
            .finish()
    }
}

/// A time-limited user name and its password.
#[derive(Clone, PartialEq, Eq)]
pub struct Minted {
    /// `<expiry>:<name>`.
    pub username: String,
    /// Base64.
    pub password: String,
}

/// Mints credentials that are good until `now` + `lifetime`.
pub fn mint(secret: &str, name: &str, now: SystemTime, lifetime: Duration) -> Minted {
    let expiry = now.duration_since(UNIX_EPOCH).unwrap_or_default() + lifetime;
    let username = format!("{}:{name}", expiry.as_secs());
    let password = password_of(secret, &username);
    Minted { username, password }
}

fn password_of(secret: &str, username: &str) -> String {
    // HMAC takes a key of any length.
    let Ok(mut mac) = Hmac::<Sha1>::new_from_slice(secret.as_bytes()) else { return String::new() };
    mac.update(username.as_bytes());
    STANDARD.encode(mac.finalize().into_bytes())
}

/// Why a user is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    UnknownUser,
    Expired,
}

impl Credentials {
    /// The password of `username` at `now`.
    pub(crate) fn password(&self, username: &str, now: SystemTime) -> Result<String, Denied> {
        if let Some(password) = self.users.get(username) {
            return Ok(password.clone());
        }
        let secret = self.secret.as_deref().ok_or(Denied::UnknownUser)?;
        let expiry = username.split(':').next().unwrap_or_default();
        let expiry: u64 = expiry.parse().map_err(|_| Denied::UnknownUser)?;
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if expiry < now {
            return Err(Denied::Expired);
        }
        Ok(password_of(secret, username))
    }
}

/// Answers the engine's question for a user's key.
pub(crate) struct Authenticator {
    pub(crate) credentials: Credentials,
    pub(crate) metrics: Metrics,
}

impl AuthHandler for Authenticator {
    fn auth_handle(&self, username: &str, realm: &str, _source: SocketAddr) -> Result<Vec<u8>, turn::Error> {
        match self.credentials.password(username, SystemTime::now()) {
            Ok(password) => Ok(generate_auth_key(username, realm, &password)),
            Err(denied) => {
                let reason = match denied {
                    Denied::UnknownUser => "unknown_user",
                    Denied::Expired => "expired",
                };
                self.metrics.auth_failures.with_label_values(&[reason]).inc();
                Err(turn::Error::ErrNoSuchUser)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn minted_credentials_hold_until_they_expire() {
        let minted = mint("north", "app", at(1_000), Duration::from_secs(60));
        assert_eq!(minted.username, "1060:app");
        let server = Credentials { secret: Some("north".into()), ..Credentials::default() };
        assert_eq!(server.password("1060:app", at(1_060)).as_ref(), Ok(&minted.password));
        assert_eq!(server.password("1060:app", at(1_061)), Err(Denied::Expired));
        let other = Credentials { secret: Some("south".into()), ..Credentials::default() };
        assert_ne!(other.password("1060:app", at(1_000)), Ok(minted.password));
    }

    #[test]
    fn the_password_is_that_of_the_rest_api_for_turn() {
        // Made with: printf '1433895918:user' | openssl dgst -sha1 -hmac secret -binary | base64
        assert_eq!(password_of("secret", "1433895918:user"), "duY86vsmGEXM+Ma7pGS//SXJIv0=");
    }

    #[test]
    fn static_users_have_their_password_and_others_none() {
        let users = BTreeMap::from([("alice".to_owned(), "pass".to_owned())]);
        let server = Credentials { users, secret: None };
        assert_eq!(server.password("alice", at(0)).as_deref(), Ok("pass"));
        for unknown in ["bob", "", "1060:app", "99999999999999999999:x"] {
            assert_eq!(server.password(unknown, at(0)), Err(Denied::UnknownUser), "{unknown}");
        }
        assert!(!format!("{server:?}").contains("pass"));
    }
}
