//! Tries the services of this process out, once a minute, as a client would: a word through the relay and back, a packet
//! through TURN and back over each transport, a link with the seed.

pub(crate) mod meeting;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use prometheus::{Gauge, GaugeVec, IntGauge, IntGaugeVec, Opts};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use seed_peer::LinkProbe;
use service::{State, Telemetry};
use turn_server::{PROBE_NAME, Probe, ProbeTransport, mint};

use self::meeting::{Meeting, MeetingPlace};

/// How often.
const INTERVAL: Duration = Duration::from_secs(60);
/// When first: everything has just begun.
const FIRST: Duration = Duration::from_secs(2);
/// How long each step may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// What to try.
#[derive(Clone)]
pub(crate) struct Tries {
    /// The relay.
    pub(crate) relay: Option<MeetingPlace>,
    /// Where to ask for a link with the seed, and how to reach it.
    pub(crate) seed: Option<(MeetingPlace, SocketAddr)>,
    pub(crate) turn: Option<TurnTries>,
}

/// How to try TURN.
#[derive(Clone)]
pub(crate) struct TurnTries {
    pub(crate) credentials: TurnLogin,
    /// The transports by name, and where each is.
    pub(crate) transports: Vec<(&'static str, SocketAddr, ProbeTransport)>,
}

/// Who a probe of TURN is.
#[derive(Clone)]
pub(crate) enum TurnLogin {
    /// Whoever knows the secret may be anybody.
    Secret(String),
    User(String, String),
}

impl TurnTries {
    /// Tries one transport.
    pub(crate) async fn echo(&self, server: SocketAddr, transport: ProbeTransport) -> Result<Duration, String> {
        let (username, password) = match &self.credentials {
            TurnLogin::Secret(secret) => {
                let minted = mint(secret, PROBE_NAME, SystemTime::now(), Duration::from_secs(300));
                (minted.username, minted.password)
            }
            TurnLogin::User(name, password) => (name.clone(), password.clone()),
        };
        let probe = Probe { server, transport, username, password, patience: PATIENCE };
        probe.echo().await.map(|echo| echo.allocated + echo.echoed).map_err(|error| error.to_string())
    }
}

/// Tries whether a link with the seed opens. Returns how long that took.
pub(crate) async fn link(place: MeetingPlace, seed: SocketAddr) -> Result<Duration, String> {
    let patience = place.patience;
    let (probe, offer) = LinkProbe::offer(seed.ip()).await.map_err(|error| error.to_string())?;
    let (mut meeting, _) = Meeting::join(place).await.map_err(|error| format!("the relay: {error}"))?;
    let answer = meeting.ask(&offer).await;
    meeting.leave().await;
    probe.open(&answer.map_err(|error| error.to_string())?, patience).await.map_err(|error| error.to_string())
}

struct Metrics {
    relay: (IntGauge, Gauge),
    seed: (IntGauge, Gauge),
    turn: (IntGaugeVec, GaugeVec),
}

impl Metrics {
    fn register(telemetry: &Telemetry, tries: &Tries) -> Result<Self, prometheus::Error> {
        let success = |service: &str, what: &str| {
            Opts::new(
                format!("homeport_{service}_probe_success"),
                format!("Whether the last try from inside succeeded: {what}."),
            )
        };
        let seconds =
            |service: &str| Opts::new(format!("homeport_{service}_probe_seconds"), "How long the last one took.");
        let (echo, link, packet) =
            ("a word through the relay and back", "a link with the seed", "a packet through TURN and back");
        let metrics = Self {
            relay: (IntGauge::with_opts(success("relay", echo))?, Gauge::with_opts(seconds("relay"))?),
            seed: (IntGauge::with_opts(success("seed", link))?, Gauge::with_opts(seconds("seed"))?),
            turn: (
                IntGaugeVec::new(success("turn", packet), &["transport"])?,
                GaugeVec::new(seconds("turn"), &["transport"])?,
            ),
        };
        let registry = &telemetry.registry;
        if tries.relay.is_some() {
            registry.register(Box::new(metrics.relay.0.clone()))?;
            registry.register(Box::new(metrics.relay.1.clone()))?;
        }
        if tries.seed.is_some() {
            registry.register(Box::new(metrics.seed.0.clone()))?;
            registry.register(Box::new(metrics.seed.1.clone()))?;
        }
        if tries.turn.is_some() {
            registry.register(Box::new(metrics.turn.0.clone()))?;
            registry.register(Box::new(metrics.turn.1.clone()))?;
        }
        Ok(metrics)
    }
}

/// Starts to try, until the task is aborted. What fails is said in the log once, and in the telemetry.
pub(crate) fn start(tries: Tries) -> Result<(Telemetry, tokio::task::JoinHandle<()>), prometheus::Error> {
    let telemetry = Telemetry::default();
    let metrics = Metrics::register(&telemetry, &tries)?;
    let said = telemetry.clone();
    let task = tokio::spawn(async move {
        let mut interval = tokio::time::interval_at((Instant::now() + FIRST).into(), INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            round(&tries, &metrics, &said).await;
        }
    });
    Ok((telemetry, task))
}

async fn round(tries: &Tries, metrics: &Metrics, telemetry: &Telemetry) {
    let say = |part: &'static str, result: &Result<Duration, String>| {
        let state = match result {
            Ok(_) => State::Ok,
            Err(reason) => State::Degraded(reason.clone()),
        };
        if telemetry.health.set(part, state)
            && let Err(reason) = result
        {
            tracing::warn!(%reason, "{part}: a try from inside has failed");
        }
        (i64::from(result.is_ok()), result.as_ref().map_or(0.0, Duration::as_secs_f64))
    };
    if let Some(place) = &tries.relay {
        let result = match Meeting::join(place.clone()).await {
            Ok((meeting, echoed)) => {
                meeting.leave().await;
                Ok(echoed)
            }
            Err(error) => Err(error.to_string()),
        };
        let (success, seconds) = say("relay", &result);
        metrics.relay.0.set(success);
        metrics.relay.1.set(seconds);
    }
    if let Some(turn) = &tries.turn {
        for (name, server, transport) in &turn.transports {
            let (success, seconds) = say(name, &turn.echo(*server, transport.clone()).await);
            let label = name.strip_prefix("turn over ").unwrap_or(name).replace(' ', "_");
            metrics.turn.0.with_label_values(&[&label]).set(success);
            metrics.turn.1.with_label_values(&[&label]).set(seconds);
        }
    }
    if let Some((place, seed)) = &tries.seed {
        let (success, seconds) = say("link with the seed", &link(place.clone(), *seed).await);
        metrics.seed.0.set(success);
        metrics.seed.1.set(seconds);
    }
}

/// TLS that takes any certificate: whether it is the right one, others ask.
pub(crate) fn any_certificate() -> Arc<ClientConfig> {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    struct Any(rustls::crypto::CryptoProvider);

    impl ServerCertVerifier for Any {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls12_signature(message, cert, signed, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, cert, signed, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }

    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let verifier = Arc::new(Any(provider.clone()));
    let config = ClientConfig::builder_with_provider(Arc::new(provider)).with_safe_default_protocol_versions();
    // The provider has both versions of TLS.
    #[allow(clippy::expect_used, reason = "what is given are constants")]
    let config = config.expect("versions of TLS").dangerous().with_custom_certificate_verifier(verifier);
    Arc::new(config.with_no_client_auth())
}
