//! The certificate that clients see, read again when its files change.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use crate::health::{Health, State};

/// The files of a certificate, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those that lead to its root, in this order.
    pub cert: PathBuf,
    /// The private key.
    pub key: PathBuf,
    /// Whether they may not be there yet, because something else is still to write them. Until then there is no TLS.
    pub may_come_later: bool,
    /// How often they are read again.
    pub check_every: Duration,
}

/// A certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {} (setting {setting}): {source}", file.display())]
    Read {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} (setting {setting}) holds no {what} in PEM", file.display())]
    Pem {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        file: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// Certificate and key do not belong together, or are of a kind that cannot be used.
    #[error("certificate and key (settings tls.cert and tls.key) cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// The certificate in use.
#[derive(Debug)]
pub struct Certificate {
    files: TlsFiles,
    /// What the files held when they were read last.
    read: Mutex<(Vec<u8>, Vec<u8>)>,
    /// `None` while it is still to come.
    current: RwLock<Option<Arc<CertifiedKey>>>,
}

impl Certificate {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`], unless the files are not there and may come later.
    pub fn load(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let may_wait = files.may_come_later;
        let certificate = Self { files, read: Mutex::default(), current: RwLock::default() };
        match certificate.reload() {
            Err(TlsError::Read { source, .. }) if may_wait && source.kind() == ErrorKind::NotFound => {}
            read => drop(read?),
        }
        Ok(Arc::new(certificate))
    }

    /// Reads the files again. Returns whether there is a new certificate, from the next handshake on. While the files
    /// do not go together, such as between the writing of one and the other, the old one stays.
    ///
    /// # Errors
    /// [`TlsError`], when they cannot be read or used.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let read = read(&self.files)?;
        let mut known = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == read {
            return Ok(false);
        }
        let key = parse(&self.files, &read)?;
        *known = read;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(key));
        Ok(true)
    }

    /// When the certificate ends, in seconds since the Unix epoch; `None` while there is none.
    pub fn expiry(&self) -> Option<i64> {
        Some(validity(self.current()?.cert.first()?)?.1)
    }

    fn current(&self) -> Option<Arc<CertifiedKey>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes new certificates as they come, for ever: says in `health` under `part` when the files cannot be used, and
    /// calls `changed` with when the certificate ends, in seconds since the Unix epoch.
    pub async fn renew(self: Arc<Self>, health: Health, part: &'static str, mut changed: impl FnMut(i64)) {
        let mut interval = tokio::time::interval(self.files.check_every);
        changed(self.expiry().unwrap_or_default());
        loop {
            interval.tick().await;
            match self.reload() {
                Ok(is_new) => {
                    health.set(part, State::Ok);
                    if is_new {
                        tracing::info!(part, "a new certificate is in use");
                        changed(self.expiry().unwrap_or_default());
                    }
                }
                Err(error) => {
                    if health.set(part, State::Degraded(error.to_string())) {
                        tracing::warn!(part, %error, "the certificate stays as it was");
                    }
                }
            }
        }
    }

    /// A configuration for TLS 1.2 and 1.3 with this certificate.
    ///
    /// # Errors
    /// [`TlsError::Unusable`], when the library refuses.
    pub fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        Ok(Arc::new(configured(Current(Arc::clone(self)))?))
    }
}

/// A configuration for TLS 1.2 and 1.3 with the certificates that `resolver` gives.
fn configured(resolver: impl ResolvesServerCert + 'static) -> Result<ServerConfig, TlsError> {
    Ok(ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver)))
}

/// Gives each handshake the certificate that is current then.
#[derive(Debug)]
struct Current(Arc<Certificate>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.current()
    }
}

/// Certificates that prove to a certificate authority who has a name (TLS-ALPN-01, RFC 8737). Nobody else is shown them.
#[derive(Debug, Clone, Default)]
pub struct Proofs(Arc<RwLock<HashMap<String, Arc<CertifiedKey>>>>);

impl Proofs {
    /// What an authority says that it speaks when it asks for a proof (RFC 8737, section 6.2).
    const PROTOCOL: &[u8] = b"acme-tls/1";

    /// Shows `certificate`, whose private key is `key`, to an authority that asks for `name`.
    ///
    /// # Errors
    /// [`TlsError::Unusable`], when the two cannot be used.
    pub fn show(
        &self,
        name: &str,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), TlsError> {
        let key = aws_lc_rs::sign::any_supported_type(&key)?;
        // Whether the two match is not looked at: those who would look refuse what is new to them and marked as critical,
        // and a proof is (RFC 8737, section 3).
        let certified = CertifiedKey::new(vec![certificate], key);
        let mut shown = self.0.write().unwrap_or_else(PoisonError::into_inner);
        shown.insert(name.to_ascii_lowercase(), Arc::new(certified));
        Ok(())
    }

    /// Shows nothing any more.
    pub fn clear(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether a client asks for a proof.
    pub(crate) fn are_asked_for(hello: &ClientHello<'_>) -> bool {
        hello.alpn().is_some_and(|mut protocols| protocols.any(|protocol| protocol == Self::PROTOCOL))
    }

    /// A configuration for handshakes in which one is asked for.
    ///
    /// # Errors
    /// [`TlsError::Unusable`], when the library refuses.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let mut config = configured(self.clone())?;
        config.alpn_protocols = vec![Self::PROTOCOL.to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Proofs {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name()?.to_ascii_lowercase();
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&name).cloned()
    }
}

/// From when until when a certificate in DER is good, in seconds since the Unix epoch.
pub fn validity(certificate: &[u8]) -> Option<(i64, i64)> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let validity = certificate.validity();
    Some((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

/// Whether a certificate in DER is for a DNS name (RFC 6125): it stands there, or a wildcard for its first label does.
pub fn is_for(certificate: &[u8], name: &str) -> bool {
    let rest = name.split_once('.').map(|(_, rest)| format!("*.{rest}"));
    names(certificate).iter().any(|one| one.eq_ignore_ascii_case(name) || Some(one.to_lowercase()) == rest)
}

/// The DNS names that a certificate in DER is for.
pub fn names(certificate: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = x509_parser::certificate::X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.iter().flat_map(|names| &names.value.general_names);
    names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
        .collect()
}

/// The first certificate in PEM, as DER.
pub fn first_certificate(pem: &[u8]) -> Option<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem).next()?.ok()
}

fn read(files: &TlsFiles) -> Result<(Vec<u8>, Vec<u8>), TlsError> {
    let read = |setting, file: &PathBuf| {
        std::fs::read(file).map_err(|source| TlsError::Read { setting, file: file.clone(), source })
    };
    Ok((read("tls.cert", &files.cert)?, read("tls.key", &files.key)?))
}

fn parse(files: &TlsFiles, (cert, key): &(Vec<u8>, Vec<u8>)) -> Result<CertifiedKey, TlsError> {
    let no = |setting, file: &PathBuf, what| TlsError::Pem { setting, file: file.clone(), what };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(cert)
        .collect::<Result<_, _>>()
        .map_err(|_| no("tls.cert", &files.cert, "certificate"))?;
    if chain.is_empty() {
        return Err(no("tls.cert", &files.cert, "certificate"));
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| no("tls.key", &files.key, "private key"))?;
    let certified = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())?;
    certified.keys_match()?;
    Ok(certified)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(files: &TlsFiles, name: &str) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        std::fs::write(&files.cert, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    }

    fn current(certificate: &Certificate) -> Vec<u8> {
        certificate.current().unwrap().cert[0].to_vec()
    }

    fn files(folder: &tempfile::TempDir) -> TlsFiles {
        let file = |name| folder.path().join(name);
        TlsFiles {
            cert: file("cert.pem"),
            key: file("key.pem"),
            may_come_later: false,
            check_every: Duration::from_secs(30),
        }
    }

    #[test]
    fn a_certificate_that_may_come_later_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let files = TlsFiles { may_come_later: true, ..files(&folder) };
        let certificate = Certificate::load(files.clone()).unwrap();
        assert_eq!(certificate.expiry(), None);
        write(&files, "one.example");
        assert!(certificate.reload().unwrap() && certificate.expiry().is_some());
        std::fs::write(&files.cert, "rubbish").unwrap();
        assert!(Certificate::load(files).is_err(), "what is there must be good");
    }

    #[test]
    fn new_files_are_taken_when_they_go_together_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(&folder);
        assert!(matches!(Certificate::load(files.clone()), Err(TlsError::Read { setting: "tls.cert", .. })));
        write(&files, "one.example");
        let certificate = Certificate::load(files.clone()).unwrap();
        assert!(certificate.expiry().unwrap() > 1_700_000_000);
        let first = current(&certificate);
        assert!(!certificate.reload().unwrap());

        let key = std::fs::read(&files.key).unwrap();
        write(&files, "two.example");
        let next = std::fs::read(&files.key).unwrap();
        std::fs::write(&files.key, key).unwrap();
        assert!(matches!(certificate.reload(), Err(TlsError::Unusable(_))));
        std::fs::write(&files.cert, "").unwrap();
        assert!(matches!(certificate.reload(), Err(TlsError::Pem { setting: "tls.cert", .. })));
        assert_eq!(current(&certificate), first);
        write(&files, "two.example");
        assert!(certificate.reload().unwrap());
        assert_ne!(current(&certificate), first);
        drop(next);
    }
}
