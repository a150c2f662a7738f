//! The admin socket: a Unix socket in the data folder through which `homeport rooms` speaks with a running seed.
//!
//! A connection carries requests and their responses in turn, each one line of JSON. Who may open the socket is who may
//! read the archive: its owner.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use genosdb::{Node, Removal};
use relay::ServedRooms;
use seed_peer::{Edit, Imported, RoomConfig, RoomError, RoomStatus, Rooms, Security, Written};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::settings::{self, CellsSettings};

/// The socket's name in the data folder.
const NAME: &str = "admin.sock";
/// Bytes of a request: edits hold values, and those are as large as the settings let them be.
const MAX_REQUEST: u64 = 256 << 20;
/// How long either side waits for the other; a busy disk takes its time.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What `homeport rooms` asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Request {
    /// The rooms as they are.
    List,
    /// Join a room.
    Add {
        name: String,
        password: String,
        cells: Option<CellsSettings>,
        #[serde(default)]
        super_admins: Vec<String>,
    },
    /// Have a room held by a machine of the cluster, or by any.
    Move { name: String, machine: Option<String> },
    /// Stay out of a room for now.
    Pause { name: String },
    /// Join a paused room again.
    Resume { name: String },
    /// Leave a room that was added.
    Remove { name: String },
    /// Write to a room under the seed's own name.
    Edit { name: String, edits: Vec<Edit> },
    /// Take nodes and removals over as they are: each the JSON of one.
    Import { name: String, nodes: Vec<String>, removals: Vec<String> },
    /// Send a room's whole state to its peers.
    Tell { name: String },
}

/// What becomes of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(crate) enum Response {
    /// It is done.
    Done,
    /// The rooms.
    Rooms { rooms: Vec<RoomStatus> },
    /// What became of edits.
    Written(Written),
    /// What became of an import.
    Imported(Imported),
    /// It cannot be.
    Refused { reason: String },
}

/// A running socket.
pub(crate) struct AdminSocket {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl AdminSocket {
    /// Listens in the data folder, which this process has for itself.
    pub(crate) fn bind(data: &Path, rooms: Rooms, served: Option<ServedRooms>) -> std::io::Result<Self> {
        let path = data.join(NAME);
        // One that is left over from a process that was killed.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let (rooms, served) = (rooms.clone(), served.clone());
                        tokio::spawn(async move {
                            if let Err(error) = serve(stream, &rooms, served.as_ref()).await {
                                tracing::debug!(%error, "a request on the admin socket");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the admin socket");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
        });
        Ok(Self { path, task })
    }

    /// Listens no longer.
    pub(crate) fn close(self) {
        self.task.abort();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "the admin socket was gone already");
        }
    }
}

async fn serve(stream: UnixStream, rooms: &Rooms, served: Option<&ServedRooms>) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = tokio::io::BufReader::new(reader).take(MAX_REQUEST);
    loop {
        let mut line = String::new();
        reader.set_limit(MAX_REQUEST);
        match tokio::time::timeout(TIMEOUT, reader.read_line(&mut line)).await {
            Ok(Ok(0)) => return Ok(()),
            Ok(read) => read?,
            Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
        };
        let response = match serde_json::from_str(&line) {
            Ok(request) => {
                let done = grant(request, rooms, served).await;
                done.unwrap_or_else(|error| Response::Refused { reason: error.to_string() })
            }
            Err(error) => Response::Refused { reason: format!("not a request: {error}") },
        };
        let mut text = serde_json::to_string(&response)?;
        text.push('\n');
        writer.write_all(text.as_bytes()).await?;
    }
}

async fn grant(request: Request, rooms: &Rooms, served: Option<&ServedRooms>) -> Result<Response, RoomError> {
    match request {
        Request::List => return Ok(Response::Rooms { rooms: rooms.list().await? }),
        Request::Add { name, password, cells, super_admins } => {
            if name.is_empty() {
                return Ok(Response::Refused { reason: "a room needs the name of its database".into() });
            }
            if let Some(problem) = cells.and_then(CellsSettings::problem) {
                return Ok(Response::Refused { reason: problem.into() });
            }
            let security = match settings::super_admins(&super_admins) {
                Ok(super_admins) => Security::of(super_admins),
                Err(reason) => return Ok(Response::Refused { reason }),
            };
            let config = RoomConfig { name: name.clone(), password, cells: cells.map(CellsSettings::config), security };
            // Before the seed is there: its first announce is to get through.
            if let Some(served) = served {
                served.set(&name, true);
            }
            let added = rooms.add(config).await;
            if let (Some(served), false) = (served, matches!(added, Ok(()) | Err(RoomError::Exists))) {
                served.set(&name, false);
            }
            added?;
        }
        Request::Edit { name, edits } => return Ok(Response::Written(rooms.edit(&name, edits).await?)),
        Request::Import { name, nodes, removals } => {
            let nodes: Result<Vec<_>, _> = nodes.iter().map(|text| Node::parse(text)).collect();
            let removals: Result<Vec<_>, _> = removals.iter().map(|text| Removal::parse(text)).collect();
            return match (nodes, removals) {
                (Ok(nodes), Ok(removals)) => Ok(Response::Imported(rooms.import(&name, nodes, removals).await?)),
                (Err(error), _) | (_, Err(error)) => Ok(Response::Refused { reason: format!("not a node: {error}") }),
            };
        }
        Request::Tell { name } => rooms.tell(&name).await?,
        Request::Move { name, machine } => rooms.move_to(&name, machine.as_deref()).await?,
        Request::Pause { name } => rooms.pause(&name).await?,
        Request::Resume { name } => rooms.resume(&name).await?,
        Request::Remove { name } => {
            rooms.remove(&name).await?;
            if let Some(served) = served {
                served.set(&name, false);
            }
        }
    }
    Ok(Response::Done)
}

/// A connection to the process that has the data folder.
pub(crate) struct AdminClient {
    stream: BufReader<BlockingStream>,
}

impl AdminClient {
    /// Connects to it, if it runs.
    pub(crate) fn connect(data: &Path) -> anyhow::Result<Self> {
        let path = data.join(NAME);
        let stream = BlockingStream::connect(&path)
            .with_context(|| format!("no homeport with a seed runs on {} ({})", data.display(), path.display()))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks for something; what is refused is an error.
    pub(crate) fn ask(&mut self, request: &Request) -> anyhow::Result<Response> {
        let mut text = serde_json::to_string(request)?;
        text.push('\n');
        self.stream.get_mut().write_all(text.as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        if line.is_empty() {
            bail!("homeport did not answer in time");
        }
        match serde_json::from_str(&line)? {
            Response::Refused { reason } => bail!("{reason}"),
            response => Ok(response),
        }
    }
}
