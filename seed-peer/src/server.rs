//! The seed peer as a running service.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use genosdb::Limits;
use genosdb::signature::Identity;
use service::{BindError, Telemetry, listen};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::Connector;
use tokio_util::sync::CancellationToken;

use crate::addresses::{Addresses, ExternalAddress};
use crate::archive::{Archive, ArchiveConfig, Bounds, OpenError, Opened, Shipping};
use crate::backup::{BackupConfig, BackupSchedule, TargetError};
use crate::cells::CellsConfig;
use crate::check::CheckRoom;
use crate::cluster::{Keeper, SharedRooms, Tenure};
use crate::links::{LinkSocket, Links};
use crate::mesh::{Mesh, Shared, State};
use crate::metrics::Metrics;
use crate::relay_key::RelayKey;
use crate::rooms::{Rooms, Source};
use crate::security::Security;
use crate::signalling::Signalling;

/// Signals that wait to be heard, at most; beyond, relays wait.
const HEARD_QUEUE: usize = 1_024;
/// Wishes of who runs the seed that wait, at most.
const COMMAND_QUEUE: usize = 64;
/// How long the archive may take to finish at shutdown.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A room to stay in.
#[derive(Clone)]
pub struct RoomConfig {
    /// The database's name, as apps open it.
    pub name: String,
    /// The room's password; empty for none.
    pub password: String,
    /// Cells, as the apps have them; `None` is a full mesh.
    pub cells: Option<CellsConfig>,
    /// Who rules the room, when its apps have a Security Manager.
    pub security: Option<Arc<Security>>,
}

impl RoomConfig {
    /// A room in a full mesh, without a password, where nobody rules.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), password: String::new(), cells: None, security: None }
    }
}

impl fmt::Debug for RoomConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RoomConfig").field("name", &self.name).field("cells", &self.cells).finish_non_exhaustive()
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
    /// The identity that signs all that the seed sends.
    pub identity: Option<Arc<Identity>>,
    /// The rooms to stay in.
    pub rooms: Vec<RoomConfig>,
    /// The name of the room in which links may be tried; `None`: nobody can.
    pub check_room: Option<String>,
    /// What the archive takes.
    pub bounds: Bounds,
    /// How long operations are kept as such; older ones are compacted into what they amounted to. `None`: for ever.
    pub keep: Option<Duration>,
    /// Bytes of one message of a peer, inflated. Default 64 MiB.
    pub message_bytes: usize,
    /// Operations a second of one peer, and ten times as many at once; what it sends when it joins is not meant. What a
    /// peer passes on for others, as cells do, may be ten times as much. 0 is without limit. Default 1,000.
    pub operations_per_second: u32,
    /// Whether what one peer of a full mesh writes is sent to the others as well, for those without a link. Default true.
    pub pass_on: bool,
    /// Links at a time, over all rooms. Default 4,096.
    pub max_links: usize,
    /// When and where to back the archive up.
    pub backup: Option<BackupConfig>,
    /// The other instances that the rooms are shared with; `None`: this one is in all of them.
    pub shared: Option<SharedRooms>,
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
    /// Backups cannot be kept where they should be.
    #[error("backups cannot be kept there (setting seed.backup.to): {0}")]
    Backup(#[from] TargetError),
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
    rooms: Rooms,
    stop: CancellationToken,
    /// `None` once it has ended.
    mesh: Option<JoinHandle<Archive>>,
    /// Has the keeper of leases give everything back.
    retire: CancellationToken,
    keeper: Option<JoinHandle<()>>,
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
        let connector = Connector::Rustls(relay_tls().map_err(|error| StartError::Certificate(error.to_string()))?);

        let backup = config
            .backup
            .map(|backup| BackupSchedule::new(backup, config.data.clone(), metrics.clone(), telemetry.health.clone()));
        let backup = backup.transpose()?;

        // The port before the archive: a second process started by mistake is told of the port.
        let socket = LinkSocket::new(listen::udp("seed.listen", config.listen)?)?;
        let address = socket.local_addr();
        let mut opened = Opened::open(&config.data)?;

        let (heard_sender, heard) = mpsc::channel(HEARD_QUEUE);
        let signalling = Signalling::start(
            config.relays,
            config.relay_key,
            heard_sender,
            connector,
            metrics.clone(),
            telemetry.health.clone(),
        );
        let (reply_sender, replies) = mpsc::unbounded_channel();
        let mut rooms = Vec::new();
        for room in config.rooms {
            rooms.push((opened.room(&room, Source::Settings)?, room, Source::Settings));
        }
        for room in opened.added()? {
            rooms.push((opened.room(&room, Source::Added)?, room, Source::Added));
        }
        let archive = opened.start(
            ArchiveConfig {
                bounds: config.bounds,
                keep: config.keep,
                identity: config.identity.clone(),
                shipping: config
                    .shared
                    .as_ref()
                    .map(|shared| Shipping::new(tokio::runtime::Handle::current(), shared.cluster.clone())),
            },
            reply_sender,
            metrics.clone(),
            telemetry.health.clone(),
        )?;
        let tenure = Tenure::default();
        let (keeper, leases) = mpsc::unbounded_channel();
        let is_shared = config.shared.is_some();
        let mut mesh = Mesh {
            shared: is_shared.then(|| Shared { tenure: tenure.clone(), keeper: keeper.clone() }),
            links: Links::new(socket, metrics.clone()),
            addresses: Addresses { listen: address, external: config.external },
            certificate,
            limits: Limits {
                message_bytes: config.message_bytes,
                unfinished_bytes: config.message_bytes,
                ..Limits::default()
            },
            identity: config.identity,
            max_links: config.max_links,
            operations_per_second: config.operations_per_second,
            pass_on: config.pass_on,
            check_room: config.check_room.as_deref().map(CheckRoom::new),
            signalling,
            archive,
            metrics: metrics.clone(),
            state: State::default(),
        };
        let now = Instant::now();
        for (opened, room, source) in rooms {
            mesh.join(room, &opened, source, now);
        }
        if let Some(room) = &mesh.check_room {
            mesh.signalling.listen_for_checks(room.root_topic());
        }
        let (commands, wishes) = mpsc::channel(COMMAND_QUEUE);
        let rooms = Rooms::new(commands, is_shared.then_some(keeper));
        let stop = CancellationToken::new();
        let retire = CancellationToken::new();
        let keeper = config.shared.map(|shared| {
            let keeper = Keeper {
                shared,
                archive: mesh.archive.client(),
                rooms: rooms.clone(),
                data: config.data,
                tenure,
                health: telemetry.health.clone(),
                metrics,
            };
            tokio::spawn(keeper.run(leases, retire.clone()))
        });
        if let Some(backup) = backup {
            tokio::spawn(backup.run(stop.clone()));
        }
        let mesh = Some(tokio::spawn(mesh.run(heard, replies, wishes, stop.clone())));
        Ok(Self { address, telemetry, rooms, stop, mesh, retire, keeper })
    }

    /// The UDP address of links, with the port that the system chose when it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The seed's metrics and health.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// The rooms, to look at and to change.
    pub fn rooms(&self) -> &Rooms {
        &self.rooms
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

    /// Ends as a machine does whose power fails: nobody is told anything. For tests.
    #[doc(hidden)]
    pub fn kill(self) {
        self.keeper.iter().for_each(JoinHandle::abort);
        self.mesh.iter().for_each(JoinHandle::abort);
    }

    /// Says goodbye to every room, commits what was accepted, and ends within about two seconds; in a cluster that is out
    /// of reach, within six.
    pub async fn shutdown(self) {
        self.retire.cancel();
        // Others take the rooms at once.
        if let Some(keeper) = self.keeper
            && let Err(error) = keeper.await
        {
            tracing::error!(%error, "the keeper of leases had ended early");
        }
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

/// TLS towards relays and other servers, with the system's roots.
///
/// # Errors
/// When the library cannot.
pub fn relay_tls() -> Result<Arc<rustls::ClientConfig>, rustls::Error> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
