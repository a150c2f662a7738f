//! The connection with the other machines of a cluster, over NATS.

pub mod kept;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::connection::State as Connection;
use async_nats::{Client, ConnectOptions, Event, ServerAddr, jetstream};

use crate::health::{Health, State};
use crate::metrics::Telemetry;

/// The part of the health that says how the connection is.
pub const PART: &str = "cluster";
/// Commands that wait for the connection; each is a message, or a subscription.
const WAITING_COMMANDS: usize = 1_024;
/// How long to wait before NATS is tried again, at most.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);
/// How long an answer of JetStream is waited for.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection that is quiet is tried.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// How to reach NATS.
#[derive(Clone)]
pub struct ClusterConfig {
    /// The servers; any of them will do.
    pub servers: Vec<ServerAddr>,
    /// What this machine is called among the others.
    pub name: String,
    /// Who we are to NATS.
    pub login: ClusterLogin,
    /// Certificates that sign those of the servers, beside the system's.
    pub ca: Option<PathBuf>,
    /// On how many servers of NATS each thing is kept that is kept there: 1, 3 or 5.
    pub replicas: usize,
}

impl fmt::Debug for ClusterConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An address may hold a password.
        f.debug_struct("ClusterConfig").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Who we are to NATS.
#[derive(Clone)]
pub enum ClusterLogin {
    /// Nobody, or whoever the addresses say.
    Anonymous,
    /// A user.
    User {
        /// Its name.
        name: String,
        /// Its password.
        password: String,
    },
    /// Whoever shows this token.
    Token(String),
    /// Whom a credentials file says (JWT and key).
    Credentials(PathBuf),
}

/// The connection cannot be begun.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The file of credentials cannot be read.
    #[error("cannot read {path} (setting cluster.credentials): {source}")]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// NATS cannot be asked for.
    #[error("cannot begin to connect with NATS (setting cluster.nats): {0}")]
    Connect(#[from] async_nats::ConnectError),
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

/// The connection with NATS, which is sought again whenever it is lost. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cluster {
    client: Client,
    jetstream: jetstream::Context,
    name: String,
    replicas: usize,
    telemetry: Telemetry,
}

impl Cluster {
    /// Begins to connect, and goes on by itself: that NATS is out of reach is no error, but said by the health.
    ///
    /// # Errors
    /// [`ClusterError`], which names the setting at fault.
    pub async fn connect(config: ClusterConfig) -> Result<Self, ClusterError> {
        let telemetry = Telemetry::default();
        let connected = prometheus::IntGauge::new("homeport_cluster_connected", "1 while NATS is connected.")?;
        telemetry.registry.register(Box::new(connected.clone()))?;
        let health = telemetry.health.clone();
        health.set(PART, State::Degraded("NATS has not been reached yet".into()));
        let mut options = ConnectOptions::new();
        options = match config.login {
            ClusterLogin::Anonymous => options,
            ClusterLogin::User { name, password } => options.user_and_password(name, password),
            ClusterLogin::Token(token) => options.token(token),
            ClusterLogin::Credentials(path) => {
                options.credentials_file(&path).await.map_err(|source| ClusterError::Credentials { path, source })?
            }
        };
        if let Some(ca) = config.ca {
            options = options.add_root_certificates(ca);
        }
        let client = options
            .name(format!("homeport {}", config.name))
            // What we say ourselves we know.
            .no_echo()
            .client_capacity(WAITING_COMMANDS)
            .ping_interval(PING_INTERVAL)
            .retry_on_initial_connect()
            .max_reconnects(None)
            .reconnect_delay_callback(|attempts| {
                let attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
                Duration::from_millis(100).saturating_mul(attempts).min(MAX_RECONNECT_DELAY)
            })
            .event_callback(move |event| {
                note(&health, &connected, &event);
                std::future::ready(())
            })
            .connect(config.servers)
            .await?;
        let jetstream = jetstream::ContextBuilder::new().timeout(TIMEOUT).ack_timeout(TIMEOUT).build(client.clone());
        Ok(Self { client, jetstream, name: config.name, replicas: config.replicas, telemetry })
    }

    /// What speaks to NATS.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What is kept at NATS: streams, buckets, objects.
    pub fn jetstream(&self) -> &jetstream::Context {
        &self.jetstream
    }

    /// What this machine is called among the others.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether NATS is connected now.
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == Connection::Connected
    }

    /// Whether NATS is connected, and since when it was said so.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }
}

/// Takes note of how the connection is.
fn note(health: &Health, connected: &prometheus::IntGauge, event: &Event) {
    match event {
        Event::Connected => {
            connected.set(1);
            if health.set(PART, State::Ok) {
                tracing::info!("NATS is connected");
            }
        }
        Event::Disconnected | Event::Closed => {
            connected.set(0);
            let reason = "NATS is out of reach (cluster.nats): this machine is alone";
            if health.set(PART, State::Degraded(reason.into())) {
                tracing::warn!("{reason}");
            }
        }
        Event::ServerError(error) => tracing::warn!(error = ?error.to_string(), "NATS refuses something"),
        Event::ClientError(error) => {
            let error = error.to_string();
            tracing::debug!(error = ?error, "speaking to NATS");
            if connected.get() == 0 {
                health.set(
                    PART,
                    State::Degraded(format!("NATS is out of reach (cluster.nats): {}", error.escape_debug())),
                );
            }
        }
        Event::SlowConsumer(_) => tracing::warn!("messages of NATS come faster than they are taken"),
        Event::LameDuckMode | Event::Draining => tracing::info!("a server of NATS is about to end"),
    }
}
