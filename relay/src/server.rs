//! The relay as a running service.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::serve::ListenerExt as _;
use service::{
    BindError, Certificate, Cluster, Health, Origin, Proofs, StunTaker, Telemetry, TlsError, TlsFiles, WebListener,
    WebTls, listen,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{self, Admission, Gate};
use crate::clocks::Clocks;
use crate::connection;
use crate::dials::DialLedger;
use crate::information;
use crate::limits::{AddressLimits, Rates};
use crate::metrics::Metrics;
use crate::neighbours::{self, Neighbours};
use crate::presence::{AnnounceEconomy, Presence};
use crate::relay::{self, RecentEvents, Relay};
use crate::replication::{self, Replication, ReplicationError};
use crate::returning::{Resume, Returning};
use crate::store::{Store, StoreConfig, StoreError};
use crate::subscriptions::Subscriptions;

/// How long open connections get to say goodbye at shutdown.
const DRAIN: Duration = Duration::from_millis(500);

/// Connections beyond those of clients: who looks at a page, and who is told that there is no room.
const PAGES: usize = 512;

/// What a client may ask of the relay. All of it stands in the NIP-11 document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one WebSocket message. Default 131,072.
    pub message_bytes: usize,
    /// Connections at a time. Default 10,000.
    pub connections: usize,
    /// Subscriptions of one connection. Default 512.
    pub subscriptions: usize,
    /// Filters of one subscription. Default 32.
    pub filters: usize,
    /// Values in all lists of one filter. Default 2,048; Trystero sends 500.
    pub filter_values: usize,
    /// Tags of one event. Default 128.
    pub event_tags: usize,
    /// How far clients' clocks may be apart, in seconds, before a `since` costs an ephemeral event. Default 60.
    pub clock_skew_seconds: u64,
    /// Stored events that one filter gets. Default 500.
    pub stored_events: usize,
    /// Leading zero bits that an event's id must have (NIP-13). Default 0.
    pub difficulty: u32,
    /// A client that takes nothing of what is written to it for so long is cut off. Default 20 s.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 128 << 10,
            connections: 10_000,
            subscriptions: 512,
            filters: 32,
            filter_values: 2_048,
            event_tags: 128,
            clock_skew_seconds: 60,
            stored_events: 500,
            difficulty: 0,
            stall: Duration::from_secs(20),
        }
    }
}

/// How to run the relay.
#[derive(Debug)]
pub struct Config {
    /// Where to listen for WebSocket and HTTP.
    pub listen: SocketAddr,
    /// The certificate for clients that begin with TLS; those that do not are served as well, on the same port.
    pub tls: Option<TlsFiles>,
    /// What a certificate authority is shown that asks at the relay's port, if it does.
    pub proofs: Option<Proofs>,
    /// Takes clients of TURN that come to the relay's port, with TLS or without.
    pub stun: Option<StunTaker>,
    /// What a client may ask.
    pub limits: Limits,
    /// What one client and one address may ask in a second.
    pub rates: Rates,
    /// The header in which a trusted proxy says who the client is, such as `x-forwarded-for`. Without it, the address
    /// of the connection counts, and loopback is spared: everybody may come from there.
    pub trusted_proxy_header: Option<String>,
    /// Where to keep events that are not ephemeral; `None` refuses them.
    pub store: Option<StoreConfig>,
    /// Whom to serve.
    pub admission: Admission,
    /// The relay's address for clients, if it is not the one they connect to; with NIP-42 they name it.
    pub public_url: Option<String>,
    /// How often announces are passed on.
    pub announces: AnnounceEconomy,
    /// What is remembered of clients of signalling whose connection broke.
    pub resume: Resume,
    /// Whether to watch what becomes of dials. Default true.
    pub dial_ledger: bool,
    /// The page at `/` for people, and the `Content-Security-Policy` that it needs.
    pub page: Page,
    /// Other pages to serve on the same port, such as `/client-config.json`.
    pub routes: Router,
    /// The connection with the other relays that serve the same clients, if there are any.
    pub cluster: Option<Cluster>,
}

impl Config {
    /// A relay on `listen` for everybody, which stores nothing and is alone.
    pub fn at(listen: SocketAddr) -> Self {
        Self {
            listen,
            tls: None,
            proofs: None,
            stun: None,
            limits: Limits::default(),
            rates: Rates::default(),
            trusted_proxy_header: None,
            store: None,
            admission: Admission::Open,
            public_url: None,
            announces: AnnounceEconomy::default(),
            resume: Resume::default(),
            dial_ledger: true,
            page: Page::default(),
            routes: Router::new(),
            cluster: None,
        }
    }
}

/// A page for people.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// HTML.
    pub html: &'static str,
    /// What it may load.
    pub content_security_policy: &'static str,
}

impl Default for Page {
    /// A few words about the relay.
    fn default() -> Self {
        Self {
            html: include_str!("page.html"),
            content_security_policy: "default-src 'none'; style-src 'unsafe-inline'",
        }
    }
}

/// The relay could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The store of events cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Stored events cannot be exchanged with other relays.
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The header is none.
    #[error("{0:?} is no name of a header (setting relay.trusted_proxy_header)")]
    Header(String),
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

/// A running relay.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    relay: Arc<Relay>,
    telemetry: Telemetry,
    stop: CancellationToken,
    connections: TaskTracker,
    task: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// Starts the relay.
    ///
    /// # Errors
    /// [`StartError`], which names the setting at fault.
    pub async fn bind(config: Config) -> Result<Self, StartError> {
        let proxy_header = match &config.trusted_proxy_header {
            Some(name) => Some(HeaderName::try_from(name.as_str()).map_err(|_| StartError::Header(name.clone()))?),
            None => None,
        };
        let telemetry = Telemetry::default();
        let metrics = Metrics::register(&telemetry.registry)?;
        let certificate = config.tls.map(Certificate::load).transpose()?;
        let listener = listen::tcp("relay.listen", config.listen)?;
        let address = listener.local_addr().unwrap_or(config.listen);
        let store = match &config.store {
            Some(store) => Some(Store::open(store).await?),
            None => None,
        };
        let stop = CancellationToken::new();
        let connections = TaskTracker::new();
        let replication = match (&config.cluster, &config.store) {
            (Some(cluster), Some(store)) => {
                let health = telemetry.health.clone();
                let replication = Replication::open(cluster.clone(), store, &telemetry.registry, health)?;
                Some(Arc::new(replication))
            }
            _ => None,
        };
        let neighbours = config.cluster.map(|cluster| Neighbours::new(cluster, &telemetry.registry)).transpose()?;
        let (neighbours, to_neighbours) = neighbours.unzip();
        let neighbours = neighbours.map(Arc::new);
        let relay = Arc::new(Relay {
            returning: Returning::new(config.resume, config.limits.clock_skew_seconds, Instant::now()),
            limits: config.limits,
            rates: config.rates,
            addresses: Arc::new(AddressLimits::new(&config.rates, proxy_header.is_none())),
            proxy_header,
            store,
            gate: Gate::new(config.admission),
            public_host: config.public_url.as_deref().and_then(admission::host_of).map(str::to_owned),
            subscriptions: Subscriptions::default(),
            presence: Presence::new(config.announces, Instant::now()),
            page: config.page,
            dials: config.dial_ledger.then(DialLedger::default),
            neighbours,
            replication,
            recent: RecentEvents::default(),
            clocks: Clocks::default(),
            next_connection: AtomicU64::new(1),
            metrics,
            stop: stop.clone(),
            connections: connections.clone(),
        });
        tokio::spawn(relay::tidy(Arc::clone(&relay), stop.clone()));
        if let Some(queue) = to_neighbours {
            neighbours::start(&relay, queue, stop.clone());
        }
        replication::start(&relay, &stop);
        let router = Router::new()
            .route("/", get(root))
            .route("/healthz", get(healthz))
            .with_state(Arc::clone(&relay))
            .merge(config.routes);
        let stopped = stop.clone().cancelled_owned();
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        let tls = match &certificate {
            Some(certificate) => {
                let proofs = config.proofs.as_ref().map(Proofs::server_config).transpose()?;
                let handshakes = relay.metrics.tls_handshakes.clone();
                Some(WebTls { config: certificate.server_config()?, proofs, handshakes })
            }
            None => None,
        };
        let sockets = relay.limits.connections.saturating_add(PAGES);
        let listener = WebListener::new(listener, tls, config.stun, sockets)
            .map_err(|source| BindError { setting: "relay.listen", address, protocol: "TCP", source })?
            // Of a tapped listener, axum knows where clients come from.
            .tap_io(|_| ());
        if let Some(certificate) = certificate {
            let (health, metrics) = (telemetry.health.clone(), relay.metrics.clone());
            let renewing =
                certificate.renew(health, "relay certificate", move |ends| metrics.certificate_expiry.set(ends));
            tokio::spawn(stop.clone().run_until_cancelled_owned(renewing));
        }
        let task = tokio::spawn(async move { axum::serve(listener, service).with_graceful_shutdown(stopped).await });
        telemetry.health.set("relay", service::State::Ok);
        Ok(Self { address, relay, telemetry, stop, connections, task })
    }

    /// The address in use, with the port that the system chose when it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The relay's metrics and health.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// The relay's health.
    pub fn health(&self) -> &Health {
        &self.telemetry.health
    }

    /// The rooms that are served, to be changed while the relay runs.
    pub fn served_rooms(&self) -> ServedRooms {
        ServedRooms(Arc::clone(&self.relay))
    }

    /// Stops accepting, tells every client that it may reconnect elsewhere (1012), and ends within about half a second.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.connections.close();
        if tokio::time::timeout(DRAIN, self.connections.wait()).await.is_err() {
            tracing::debug!(left = self.connections.len(), "clients did not take their goodbye in time");
        }
        relay::save_returning(&self.relay, true).await;
        self.task.abort();
        match self.task.await {
            Ok(Err(error)) => tracing::warn!(%error, "the relay's listener had failed"),
            Err(error) if error.is_panic() => tracing::error!("the relay's listener had panicked"),
            _ => {}
        }
    }
}

/// A handle on the rooms that a relay serves with [`Admission::Rooms`]; any other relay serves all.
#[derive(Debug, Clone)]
pub struct ServedRooms(Arc<Relay>);

impl ServedRooms {
    /// Serves the rooms of a database from now on, or no longer.
    pub fn set(&self, database: &str, served: bool) {
        self.0.gate.set_served(database, served);
    }
}

/// `/`: Nostr for a WebSocket, the NIP-11 document for who asks for it, a page for people.
async fn root(
    State(relay): State<Arc<Relay>>,
    ConnectInfo(address): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    if let Ok(upgrade) = upgrade {
        let origin = relay.origin(address, &headers);
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).map(str::to_owned);
        let hosts = relay.public_host.iter().cloned().chain(host).collect();
        return accept(upgrade, relay, origin, hosts);
    }
    let accepts = |kind: &str| {
        headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).is_some_and(|value| value.contains(kind))
    };
    if accepts("application/nostr+json") {
        let headers = [
            (header::CONTENT_TYPE, "application/nostr+json"),
            (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, "*"),
            (header::ACCESS_CONTROL_ALLOW_METHODS, "GET"),
        ];
        return (headers, information::document(&relay).to_string()).into_response();
    }
    let headers = [
        (header::CONTENT_SECURITY_POLICY, relay.page.content_security_policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, Html(relay.page.html)).into_response()
}

/// `/healthz` on the relay's own port, for who cannot reach the metrics listener, such as a balancer.
async fn healthz() -> &'static str {
    "ok\n"
}

fn accept(upgrade: WebSocketUpgrade, relay: Arc<Relay>, origin: Origin, hosts: Vec<String>) -> Response {
    if relay.connections.len() >= relay.limits.connections {
        relay.metrics.disconnects.with_label_values(&["full"]).inc();
        return (StatusCode::SERVICE_UNAVAILABLE, "too many connections").into_response();
    }
    let Some(admitted) = relay.addresses.connect(origin) else {
        relay.metrics.rate_limit_hits.with_label_values(&["connections"]).inc();
        return (StatusCode::TOO_MANY_REQUESTS, "too many connections from your address").into_response();
    };
    let limit = relay.limits.message_bytes;
    upgrade
        .max_message_size(limit)
        .max_frame_size(limit)
        // The library's defaults cost 137 KB a connection; signalling messages are small.
        .read_buffer_size(2 << 10)
        .write_buffer_size(4 << 10)
        .on_upgrade(move |socket| {
            let stop = relay.stop.clone();
            let tracker = relay.connections.clone();
            tracker.track_future(connection::serve(socket, relay, admitted, hosts, stop))
        })
}
