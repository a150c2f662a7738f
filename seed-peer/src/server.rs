//! The seed peer as a running service.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use genosdb::{Limits, PeerId, Room};
use rand::Rng as _;
use service::{BindError, Telemetry, listen};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::Connector;
use tokio_util::sync::CancellationToken;

use crate::addresses::{Addresses, ExternalAddress};
use crate::archive::{Archive, Bounds, OpenError, Opened};
use crate::links::{LinkSocket, Links};
use crate::mesh::{Mesh, MeshRoom, State};
use crate::metrics::Metrics;
use crate::relay_key::RelayKey;
use crate::room::RoomPeer;
use crate::signalling::{Listening, Signalling};

/// Signals that wait to be heard, at most; beyond, relays wait.
const HEARD_QUEUE: usize = 1_024;
/// How long the archive may take to finish at shutdown.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A room to stay in.
#[derive(Clone, PartialEq, Eq)]
pub struct RoomConfig {
    /// The database's name, as apps open it.
    pub name: String,
    /// The room's password; empty for none.
    pub password: String,
}

impl fmt::Debug for RoomConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RoomConfig").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How to run the seed peer.
#[derive(Debug, Clone)]
pub struct Config {
    /// The UDP port of all WebRTC links.
    pub listen: SocketAddr,
    /// A public address that is mapped to this machine.
    pub external: Option<ExternalAddress>,
    /// The folder of the archive.
    pub data: PathBuf,
    /// The relays to meet peers through, as `ws://` or `wss://` addresses.
    pub relays: Vec<String>,
    /// The key that events to relays are signed with.
    pub relay_key: RelayKey,
    /// The rooms to stay in.
    pub rooms: Vec<RoomConfig>,
    /// What the archive takes.
    pub bounds: Bounds,
    /// Bytes of one message of a peer, inflated. Default 64 MiB.
    pub message_bytes: usize,
    /// Links at a time, over all rooms. Default 4,096.
    pub max_links: usize,
}

/// The seed peer could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The archive cannot be opened.
    #[error(transparent)]
    Archive(#[from] OpenError),
    /// The archive opened, but does not take rooms.
    #[error("the archive cannot be used: {0}")]
    Rooms(#[from] rusqlite::Error),
    /// The socket does not do what sockets do.
    #[error("the seed's socket failed: {0}")]
    Socket(#[from] std::io::Error),
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// There is nothing to seal links with.
    #[error("cannot make a certificate for links: {0}")]
    Certificate(String),
    /// Without relays nobody is met.
    #[error("there is no relay to meet peers through (setting seed.relays)")]
    NoRelays,
}

/// A running seed peer.
pub struct Server {
    address: SocketAddr,
    telemetry: Telemetry,
    stop: CancellationToken,
    /// `None` once it has ended.
    mesh: Option<JoinHandle<Archive>>,
}

impl Server {
    /// Opens the archive, binds the port of links, and joins the rooms.
    ///
    /// # Errors
    /// [`StartError`], which names the setting at fault. The archive is then untouched.
    pub fn bind(config: Config) -> Result<Self, StartError> {
        if config.relays.is_empty() {
            return Err(StartError::NoRelays);
        }
        let telemetry = Telemetry::default();
        let metrics = Metrics::register(&telemetry.registry)?;
        let provider = str0m::crypto::from_feature_flags();
        let certificate = provider
            .dtls_provider
            .generate_certificate()
            .ok_or_else(|| StartError::Certificate("the crypto provider has none".into()))?;
        provider.install_process_default();
        let connector = tls_connector().map_err(StartError::Certificate)?;

        // The port before the archive: a second process started by mistake is told of the port.
        let socket = LinkSocket::new(listen::udp("seed.listen", config.listen)?)?;
        let address = socket.local_addr();
        let opened = Opened::open(&config.data)?;

        let now = Instant::now();
        let mut rooms = Vec::new();
        let mut names = HashMap::new();
        for RoomConfig { name, password } in &config.rooms {
            let archived = opened.room(name, new_peer_id)?;
            names.insert(archived.key, name.clone());
            let peer = || RoomPeer::new(archived.peer, config.max_links, now);
            let graph = Room::graph_sync(name);
            rooms.push(MeshRoom::new(graph, password, peer(), name.clone(), Some(archived.key), archived.latest));
            rooms.push(MeshRoom::new(Room::app_sync(name), password, peer(), name.clone(), None, None));
            metrics.links.with_label_values(&[name]).set(0);
        }
        let listening = rooms.iter().enumerate().flat_map(|(index, room)| {
            [(room.root().clone(), false), (room.own_topic(), true)].map(|(topic, to_self)| Listening {
                topic,
                room: index,
                to_self,
            })
        });
        let (heard_sender, heard) = mpsc::channel(HEARD_QUEUE);
        let signalling = Signalling::start(
            config.relays,
            config.relay_key,
            listening.collect(),
            heard_sender,
            connector,
            metrics.clone(),
            telemetry.health.clone(),
        );
        let (reply_sender, replies) = mpsc::unbounded_channel();
        let archive = opened.start(names, config.bounds, reply_sender, metrics.clone(), telemetry.health.clone())?;
        let mesh = Mesh {
            rooms,
            links: Links::new(socket, metrics.clone()),
            addresses: Addresses { listen: address, external: config.external },
            certificate,
            limits: Limits {
                message_bytes: config.message_bytes,
                unfinished_bytes: config.message_bytes,
                ..Limits::default()
            },
            max_links: config.max_links,
            signalling,
            archive,
            metrics,
            state: State::default(),
        };
        let stop = CancellationToken::new();
        let mesh = Some(tokio::spawn(mesh.run(heard, replies, stop.clone())));
        Ok(Self { address, telemetry, stop, mesh })
    }

    /// The UDP address of links, with the port that the system chose when it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The seed's metrics and health.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Resolves when the seed has ended by itself, which it never should.
    pub async fn ended(&mut self) {
        match self.mesh.as_mut() {
            Some(mesh) => {
                if let Err(error) = mesh.await {
                    tracing::error!(%error, "the seed peer has ended early");
                }
                self.mesh = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Says goodbye to every room, commits what was accepted, and ends within about two seconds.
    pub async fn shutdown(self) {
        self.stop.cancel();
        let Some(mesh) = self.mesh else { return };
        match mesh.await {
            Ok(archive) => {
                let closing = tokio::task::spawn_blocking(move || archive.close());
                if tokio::time::timeout(CLOSE_TIMEOUT, closing).await.is_err() {
                    tracing::error!("the archive did not finish in time");
                }
            }
            Err(error) => tracing::error!(%error, "the seed peer had ended early"),
        }
    }
}

/// A new id, great among its kind: of two offers that cross, that of the greater id stands, and only offers tell
/// clients that the seed is a superpeer (wire §2).
fn new_peer_id() -> PeerId {
    let mut random = rand::rng();
    let mut first = true;
    PeerId::generate(|range| if std::mem::take(&mut first) { range.end - 1 } else { random.random_range(range) })
}

/// TLS towards `wss://` relays, with the system's roots.
fn tls_connector() -> Result<Connector, String> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Connector::Rustls(Arc::new(config)))
}
