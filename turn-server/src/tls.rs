//! The certificate of TLS clients, read again when its files change.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::FromDer as _;

/// The files of a certificate, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those that lead to its root, in this order.
    pub cert: PathBuf,
    /// The private key.
    pub key: PathBuf,
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
pub(crate) struct Certificate {
    files: TlsFiles,
    /// What the files held when they were read last.
    read: Mutex<(Vec<u8>, Vec<u8>)>,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    pub(crate) fn load(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let read = read(&files)?;
        let key = parse(&files, &read)?;
        Ok(Arc::new(Self { files, read: Mutex::new(read), current: RwLock::new(Arc::new(key)) }))
    }

    /// Reads the files again. Returns whether there is a new certificate, from the next handshake on. While the files
    /// do not go together, such as between the writing of one and the other, the old one stays.
    pub(crate) fn reload(&self) -> Result<bool, TlsError> {
        let read = read(&self.files)?;
        let mut known = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == read {
            return Ok(false);
        }
        let key = parse(&self.files, &read)?;
        *known = read;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
        Ok(true)
    }

    /// When the certificate ends, in seconds since the Unix epoch.
    pub(crate) fn expiry(&self) -> Option<i64> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(current.cert.first()?).ok()?;
        Some(certificate.validity().not_after.timestamp())
    }

    /// A configuration for TLS 1.2 and 1.3 with this certificate.
    pub(crate) fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Current(Arc::clone(self))));
        Ok(Arc::new(config))
    }
}

/// Gives each handshake the certificate that is current then.
#[derive(Debug)]
struct Current(Arc<Certificate>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
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
        certificate.current.read().unwrap().cert[0].to_vec()
    }

    #[test]
    fn new_files_are_taken_when_they_go_together_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let files = TlsFiles { cert: folder.path().join("cert.pem"), key: folder.path().join("key.pem") };
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
