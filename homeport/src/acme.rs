//! Certificates that are asked for and renewed by themselves: ACME (RFC 8555) with the challenge HTTP-01, or TLS-ALPN-01
//! (RFC 8737) at the relay's port.
//!
//! What is got lies in files, which the services read again when they change: the relay and the TURN server share one
//! certificate, also as separate processes on one `seed.data`, of which only one asks.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::Router;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Redirect, Response};
use axum::routing::get;
use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Identifier, NewAccount, NewOrder, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use service::{Proofs, State as PartState, Telemetry, TlsFiles, WebListener, listen};
use tokio::task::JoinHandle;

use crate::private_file;
use crate::rooms::wall_ms;
use crate::settings::{AcmeChallenge, AcmeSettings};

/// The part of health that says how it goes.
const PART: &str = "acme";
/// How often it is looked whether a certificate is due, at least.
const LOOK_INTERVAL: Duration = Duration::from_secs(3_600);
/// How long to wait after a failure, and at most after several: certificate authorities limit failures by the hour.
const RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(4 * 3_600));
/// How often it is looked whether another process still asks.
const OTHERS_INTERVAL: Duration = Duration::from_secs(60);
/// Connections at a time of who is sent on to `https://`, and of the authority.
const MAX_CONNECTIONS: usize = 512;
/// How often services look for a new certificate.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// Where certificates lie that were asked for.
#[derive(Debug, Clone)]
pub(crate) struct AcmeFolder(PathBuf);

impl AcmeFolder {
    pub(crate) fn in_data(data: &Path) -> Self {
        Self(data.join("acme"))
    }

    /// The certificate and its key, once they are there.
    pub(crate) fn files(&self) -> TlsFiles {
        let (cert, key) = (self.0.join("cert.pem"), self.0.join("key.pem"));
        TlsFiles { cert, key, may_come_later: true, check_every: CHECK_EVERY }
    }

    fn account(&self) -> PathBuf {
        self.0.join("account.json")
    }
}

/// What to show to the authority: the key authorization of each token.
#[derive(Debug, Clone, Default)]
struct Challenges(Arc<RwLock<HashMap<String, String>>>);

impl Challenges {
    fn set(&self, shown: HashMap<String, String>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = shown;
    }

    fn insert(&self, token: String, shown: String) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(token, shown);
    }

    fn get(&self, token: &str) -> Option<String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(token).cloned()
    }
}

/// A listener for the authority, for as long as this is held; none where it comes to that of the relay.
struct Answering(Option<JoinHandle<()>>);

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(listening) = &self.0 {
            listening.abort();
        }
    }
}

/// Keeps a certificate in the folder until it is ended.
pub(crate) struct Acme {
    settings: AcmeSettings,
    folder: AcmeFolder,
    challenges: Challenges,
    /// What to show to an authority that comes to the relay's port.
    proofs: Proofs,
    telemetry: Telemetry,
}

impl Acme {
    /// Starts to answer the authority and to keep a certificate, unless another process does so; then this one takes over
    /// when that ends. With TLS-ALPN-01 the relay must show `proofs`. The task runs until it is aborted.
    pub(crate) fn start(
        settings: AcmeSettings,
        folder: AcmeFolder,
        proofs: Proofs,
    ) -> anyhow::Result<(Telemetry, JoinHandle<()>)> {
        fs::create_dir_all(&folder.0).with_context(|| format!("cannot make {}", folder.0.display()))?;
        let path = folder.0.join("lock");
        let lock = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let telemetry = Telemetry::default();
        let challenges = Challenges::default();
        let acme = Self { settings, folder, challenges, proofs, telemetry: telemetry.clone() };
        // Who asks must be able to answer: better said at the start than later.
        let answering = match lock.try_lock() {
            Ok(()) => Some(acme.answer()?),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        };
        // The other one says how it goes.
        telemetry.health.set(PART, if answering.is_some() { PartState::Starting } else { PartState::Ok });
        Ok((telemetry, tokio::spawn(acme.run(lock, answering))))
    }

    /// Listens for the authority.
    fn answer(&self) -> anyhow::Result<Answering> {
        if self.settings.challenge == AcmeChallenge::TlsAlpn01 {
            return Ok(Answering(None));
        }
        let listener = listen::tcp("tls.acme.listen", self.settings.listen)?;
        let listener = WebListener::new(listener, None, None, MAX_CONNECTIONS)?;
        let routes = Router::new()
            .route("/.well-known/acme-challenge/{token}", get(show))
            .fallback(to_https)
            .with_state(self.challenges.clone());
        Ok(Answering(Some(tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::error!(%error, "the listener of tls.acme.listen has ended");
            }
        }))))
    }

    async fn run(self, lock: File, mut answering: Option<Answering>) {
        while answering.is_none() {
            tokio::time::sleep(OTHERS_INTERVAL).await;
            if lock.try_lock().is_err() {
                continue;
            }
            match self.answer() {
                Ok(listening) => answering = Some(listening),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "the certificate authority cannot be answered");
                    self.telemetry.health.set(PART, PartState::Degraded(format!("{error:#}")));
                }
            }
        }
        self.keep().await;
    }

    async fn keep(&self) {
        let mut retry = RETRY.0;
        loop {
            let left = self.time_left();
            if !left.is_zero() {
                self.telemetry.health.set(PART, PartState::Ok);
                tokio::time::sleep(left.min(LOOK_INTERVAL)).await;
                continue;
            }
            match self.obtain().await {
                Ok(()) => {
                    tracing::info!(domains = ?self.settings.domains, "a certificate was issued");
                    retry = RETRY.0;
                    // An authority whose certificates are due at once must not be asked again and again.
                    tokio::time::sleep(CHECK_EVERY).await;
                }
                Err(error) => {
                    let reason = format!("{error:#}");
                    tracing::warn!(error = reason, "no certificate was issued; trying again in {retry:?}");
                    self.telemetry.health.set(PART, PartState::Degraded(reason));
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(RETRY.1);
                }
            }
            self.challenges.set(HashMap::new());
            self.proofs.clear();
        }
    }

    /// How long until the certificate is to be renewed: when a third of its time is left. Zero when there is none, or
    /// one for other names.
    fn time_left(&self) -> Duration {
        let left = || {
            let pem = fs::read(self.folder.files().cert).ok()?;
            let certificate = service::tls::first_certificate(&pem)?;
            if !self.settings.domains.iter().all(|domain| service::tls::is_for(&certificate, domain)) {
                return None;
            }
            let (from, until) = service::tls::validity(&certificate)?;
            let due = until - (until - from) / 3;
            let now = i64::try_from(wall_ms() / 1_000).ok()?;
            u64::try_from(due - now).ok()
        };
        Duration::from_secs(left().unwrap_or(0))
    }

    async fn obtain(&self) -> anyhow::Result<()> {
        let account = self.account().await.context("the account with the certificate authority")?;
        let identifiers: Vec<Identifier> = self.settings.domains.iter().cloned().map(Identifier::Dns).collect();
        let mut order = account.new_order(&NewOrder::new(&identifiers)).await?;
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status == AuthorizationStatus::Valid {
                continue;
            }
            let kind = match self.settings.challenge {
                AcmeChallenge::Http01 => ChallengeType::Http01,
                AcmeChallenge::TlsAlpn01 => ChallengeType::TlsAlpn01,
            };
            let Some(mut challenge) = authorization.challenge(kind) else {
                bail!("the certificate authority does not offer the challenge of tls.acme.challenge");
            };
            let (token, shown) = (challenge.token.clone(), challenge.key_authorization());
            match (self.settings.challenge, challenge.identifier().identifier) {
                (AcmeChallenge::TlsAlpn01, Identifier::Dns(name)) => self.prove(name, shown.digest().as_ref())?,
                _ => self.challenges.insert(token, shown.as_str().to_owned()),
            }
            challenge.set_ready().await?;
        }
        let status = order.poll_ready(&RetryPolicy::default()).await?;
        if status != OrderStatus::Ready {
            let refusal = self.refusal(&mut order).await;
            match self.settings.challenge {
                AcmeChallenge::Http01 => bail!(
                    "{refusal}: is {} reachable from the internet at port 80 under each of the domains?",
                    self.settings.listen
                ),
                AcmeChallenge::TlsAlpn01 => {
                    bail!("{refusal}: is the relay reachable from the internet at port 443 under each of the domains?")
                }
            }
        }
        let key = order.finalize().await?;
        let chain = order.poll_certificate(&RetryPolicy::default()).await?;
        let TlsFiles { cert, key: key_file, .. } = self.folder.files();
        // Until both are there, services keep the old ones.
        write_privately(&key_file, key.as_bytes())?;
        write_privately(&cert, chain.as_bytes())
    }

    /// Has the relay show that a name is ours: a certificate with the digest of the key authorization in it (RFC 8737,
    /// section 3).
    fn prove(&self, name: &str, digest: &[u8]) -> anyhow::Result<()> {
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        Ok(self.proofs.show(name, certificate.into(), PrivateKeyDer::from(key))?)
    }

    /// Why the authority is not convinced, in its own words.
    async fn refusal(&self, order: &mut instant_acme::Order) -> String {
        let mut authorizations = order.authorizations();
        while let Some(Ok(mut authorization)) = authorizations.next().await {
            if let Ok(state) = authorization.refresh().await
                && let Some(problem) = state.challenges.iter().find_map(|challenge| challenge.error.as_ref())
            {
                return format!("the certificate authority says: {problem}");
            }
        }
        "the certificate authority is not convinced".to_owned()
    }

    /// The account that was made before with this authority, or a new one.
    async fn account(&self) -> anyhow::Result<Account> {
        let builder = || match &self.settings.ca {
            Some(root) => Account::builder_with_root(root),
            None => Account::builder(),
        };
        let file = self.folder.account();
        if let Ok(text) = fs::read_to_string(&file) {
            let kept: KeptAccount =
                serde_json::from_str(&text).with_context(|| format!("{} holds no account", file.display()))?;
            if kept.directory == self.settings.directory {
                return Ok(builder()?.from_credentials(kept.credentials).await?);
            }
        }
        let contact: Vec<String> = self.settings.email.iter().map(|email| format!("mailto:{email}")).collect();
        let contact: Vec<&str> = contact.iter().map(String::as_str).collect();
        let new = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
        let (account, credentials) = builder()?.create(&new, self.settings.directory.clone(), None).await?;
        let kept = KeptAccount { directory: self.settings.directory.clone(), credentials };
        write_privately(&file, serde_json::to_string(&kept)?.as_bytes())?;
        Ok(account)
    }
}

/// An account as it lies on disk, its key included.
#[derive(serde::Serialize, serde::Deserialize)]
struct KeptAccount {
    directory: String,
    credentials: instant_acme::AccountCredentials,
}

fn write_privately(file: &Path, content: &[u8]) -> anyhow::Result<()> {
    private_file::write(file, content).with_context(|| format!("cannot write {}", file.display()))
}

/// `/.well-known/acme-challenge/…` (RFC 8555, section 8.3).
async fn show(State(challenges): State<Challenges>, UrlPath(token): UrlPath<String>) -> Response {
    match challenges.get(&token) {
        Some(authorization) => ([(header::CONTENT_TYPE, "application/octet-stream")], authorization).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// Everything else is served with TLS.
async fn to_https(headers: HeaderMap, uri: Uri) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.and_then(|host| host.split(':').next()).filter(|host| crate::client_config::is_host(host));
    match (host, uri.path_and_query()) {
        (Some(host), Some(path)) => Redirect::permanent(&format!("https://{host}{path}")).into_response(),
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acme(folder: &Path, domains: &[&str]) -> Acme {
        Acme {
            settings: AcmeSettings {
                domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
                ..AcmeSettings::default()
            },
            folder: AcmeFolder(folder.to_owned()),
            challenges: Challenges::default(),
            proofs: Proofs::default(),
            telemetry: Telemetry::default(),
        }
    }

    #[tokio::test]
    async fn of_two_processes_one_answers_and_asks() {
        let folder = tempfile::tempdir().unwrap();
        let other = File::create(folder.path().join("lock")).unwrap();
        other.try_lock().unwrap();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = AcmeSettings {
            domains: vec!["a.example".into()],
            listen: taken.local_addr().unwrap(),
            ..AcmeSettings::default()
        };
        let start = || Acme::start(settings.clone(), AcmeFolder(folder.path().to_owned()), Proofs::default());
        let (telemetry, task) = start().unwrap();
        assert_eq!(telemetry.health.parts()[PART], PartState::Ok, "the port is the other's, and so is the certificate");
        task.abort();
        drop(other);
        assert!(start().unwrap_err().to_string().contains("tls.acme.listen"));
    }

    #[test]
    fn a_certificate_is_due_when_a_third_of_its_time_is_left_or_a_name_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = acme(folder.path(), &["a.example", "b.example"]);
        assert_eq!(keeper.time_left(), Duration::ZERO, "there is none");
        let now = i64::try_from(wall_ms() / 1_000).unwrap();
        for (from, until, names, expected) in [
            (-10, 90 * 86_400, &["a.example", "b.example"][..], 60 * 86_400 - 10),
            (-70 * 86_400, 20 * 86_400, &["a.example", "b.example"], 0),
            (-10, 90 * 86_400, &["a.example"], 0),
            (-20, -10, &["a.example", "b.example"], 0),
        ] {
            let mut params =
                rcgen::CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
            let at = |seconds| time::OffsetDateTime::from_unix_timestamp(now + seconds).unwrap();
            (params.not_before, params.not_after) = (at(from), at(until));
            let made = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
            std::fs::write(keeper.folder.files().cert, made.pem()).unwrap();
            let left = i64::try_from(keeper.time_left().as_secs()).unwrap();
            assert!((left - expected).abs() < 20, "{left} {expected}");
        }
    }
}
