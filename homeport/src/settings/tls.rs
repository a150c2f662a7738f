//! The settings of TLS: where the certificate of relay and TURN comes from.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use service::TlsFiles;
use service::settings::SettingsError;

use super::{Settings, everywhere};
use crate::acme::AcmeFolder;

/// `[tls]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TlsSettings {
    /// The file of the certificate and those that lead to its root, in PEM; read again when it changes. For relay and TURN.
    cert: Option<PathBuf>,
    /// The file of the certificate's private key, in PEM; read again when it changes.
    key: Option<PathBuf>,
    /// A certificate that is asked for and renewed by itself.
    pub(super) acme: AcmeSettings,
}

/// How a certificate authority is convinced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AcmeChallenge {
    /// RFC 8555, section 8.3.
    #[serde(rename = "http-01")]
    Http01,
    /// RFC 8737.
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn01,
}

/// `[tls.acme]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct AcmeSettings {
    /// The names that the certificate is to be for; apps reach the services under the first.
    pub(crate) domains: Vec<String>,
    /// Where the certificate authority may write to.
    pub(crate) email: Option<String>,
    /// The certificate authority's directory; Let's Encrypt's without it.
    pub(crate) directory: String,
    /// How the certificate authority is convinced: `"http-01"`, by what it gets at port 80 of each domain; `"tls-alpn-01"`,
    /// by what the relay shows at port 443, where it must be.
    pub(crate) challenge: AcmeChallenge,
    /// Where to answer at port 80.
    pub(crate) listen: SocketAddr,
    /// The root of the certificate authority's own certificate, in PEM, if this machine does not know it.
    pub(crate) ca: Option<PathBuf>,
}

impl Default for AcmeSettings {
    fn default() -> Self {
        Self {
            domains: Vec::new(),
            email: None,
            directory: instant_acme::LetsEncrypt::Production.url().to_owned(),
            challenge: AcmeChallenge::Http01,
            listen: everywhere(80),
            ca: None,
        }
    }
}

impl AcmeSettings {
    pub(super) fn check(&self) -> Result<(), SettingsError> {
        if self.domains.is_empty() && *self != Self::default() {
            return Err(SettingsError::of("tls.acme.domains", "a certificate needs a name, such as relay.example.com"));
        }
        let is_name = |name: &String| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
            !name.is_empty() && name.bytes().all(allowed) && name.parse::<std::net::IpAddr>().is_err()
        };
        match self.domains.iter().find(|name| !is_name(name)) {
            // The challenge proves one host, so there are no wildcards.
            Some(name) => Err(SettingsError::of("tls.acme.domains", format_args!("{name:?} is no name of a host"))),
            None => Ok(()),
        }
    }
}

impl TlsSettings {
    fn files(&self, data: &Path) -> Result<Option<TlsFiles>, SettingsError> {
        let asks = !self.acme.domains.is_empty();
        match (&self.cert, &self.key) {
            (None, None) => Ok(asks.then(|| AcmeFolder::in_data(data).files())),
            _ if asks => {
                Err(SettingsError::of("tls.acme", "with the files of a certificate, none is asked for: take one out"))
            }
            (Some(cert), Some(key)) => Ok(Some(TlsFiles {
                cert: cert.clone(),
                key: key.clone(),
                may_come_later: false,
                check_every: Duration::from_secs(30),
            })),
            (None, _) => Err(SettingsError::of("tls.cert", "TLS needs the file of a certificate")),
            (_, None) => Err(SettingsError::of("tls.key", "TLS needs the file of the certificate's key")),
        }
    }
}

impl Settings {
    /// The certificate of relay and TURN.
    pub(crate) fn tls_files(&self) -> Result<Option<TlsFiles>, SettingsError> {
        self.tls.files(&self.seed.data)
    }

    /// Whether relay and TURN have a certificate.
    pub(crate) fn has_tls(&self) -> bool {
        self.tls.cert.is_some() || self.acme().is_some()
    }

    /// How a certificate is asked for.
    pub(crate) fn acme(&self) -> Option<&AcmeSettings> {
        Some(&self.tls.acme).filter(|acme| !acme.domains.is_empty())
    }

    /// The name under which apps reach the services, as far as it is known.
    pub(crate) fn host(&self) -> Option<&str> {
        self.acme()?.domains.first().map(String::as_str)
    }
}
