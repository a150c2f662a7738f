//! Who may use the server: static users, and time-limited credentials that any holder of the secret can mint.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use sha1::Sha1;

/// The users of the server. Debug output shows no secret.
#[derive(Clone, Default)]
pub struct Credentials {
    /// Static long-term credentials: user name to password.
    pub users: BTreeMap<String, String>,
    /// The secrets of time-limited credentials: user name `<expiry>:<name>`, password
    /// `base64(HMAC-SHA1(secret, user name))`, where the expiry is in seconds since the Unix epoch. Any of them will do,
    /// so that a new one can come before the old one goes.
    pub secrets: Vec<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("users", &self.users.len()).field("secrets", &self.secrets.len()).finish()
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

/// A user who may come in with one of these passwords.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct User {
    /// One, or as many as there are secrets.
    pub(crate) passwords: Vec<String>,
    /// When the credential ends, in seconds since the Unix epoch; static ones never do.
    pub(crate) expires: Option<u64>,
}

impl Credentials {
    /// Who `username` is at `unix` seconds since the epoch. One that has expired is let in for `grace` more seconds.
    pub(crate) fn find(&self, username: &str, unix: u64, grace: u64) -> Result<User, Denied> {
        if let Some(password) = self.users.get(username) {
            return Ok(User { passwords: vec![password.clone()], expires: None });
        }
        if self.secrets.is_empty() {
            return Err(Denied::UnknownUser);
        }
        let expiry = username.split(':').next().unwrap_or_default();
        let expiry: u64 = expiry.parse().map_err(|_| Denied::UnknownUser)?;
        if expiry.saturating_add(grace) < unix {
            return Err(Denied::Expired);
        }
        let passwords = self.secrets.iter().map(|secret| password_of(secret, username)).collect();
        Ok(User { passwords, expires: Some(expiry) })
    }

    /// What counts as one user for quotas: the name without the expiry.
    pub(crate) fn name_of<'a>(&self, username: &'a str) -> &'a str {
        match username.split_once(':') {
            Some((expiry, name)) if !self.users.contains_key(username) && expiry.parse::<u64>().is_ok() => name,
            _ => username,
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
        let server = Credentials { secrets: vec!["new".into(), "north".into()], ..Credentials::default() };
        let user = server.find("1060:app", 1_060, 0).unwrap();
        assert!(user.passwords.contains(&minted.password) && user.passwords.len() == 2);
        assert_eq!(user.expires, Some(1_060));
        assert_eq!(server.find("1060:app", 1_061, 0).err(), Some(Denied::Expired));
        assert!(server.find("1060:app", 1_070, 10).is_ok());
        assert_eq!(server.name_of("1060:app"), "app");
        let other = Credentials { secrets: vec!["south".into()], ..Credentials::default() };
        assert!(!other.find("1060:app", 1_000, 0).unwrap().passwords.contains(&minted.password));
    }

    #[test]
    fn the_password_is_that_of_the_rest_api_for_turn() {
        // Made with: printf '1433895918:user' | openssl dgst -sha1 -hmac secret -binary | base64
        assert_eq!(password_of("secret", "1433895918:user"), "duY86vsmGEXM+Ma7pGS//SXJIv0=");
    }

    #[test]
    fn static_users_have_their_password_and_others_none() {
        let users = BTreeMap::from([("alice".to_owned(), "pass".to_owned())]);
        let server = Credentials { users, secrets: Vec::new() };
        let alice = server.find("alice", 0, 0).unwrap();
        assert_eq!((alice.passwords, alice.expires), (vec!["pass".to_owned()], None));
        for unknown in ["bob", "", "1060:app", "99999999999999999999:x"] {
            assert_eq!(server.find(unknown, 0, 0).err(), Some(Denied::UnknownUser), "{unknown}");
        }
        assert!(!format!("{server:?}").contains("pass"));
    }
}
