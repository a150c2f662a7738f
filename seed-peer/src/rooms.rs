//! The rooms of a running seed, for who runs it: what they are, and how to change that without a restart.

use genosdb::operation::{Node, Removal};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::archive::{Edit, Imported, Written};
use crate::cluster::KeeperCommand;
use crate::server::RoomConfig;

/// Where a room comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// It stands in the settings.
    Settings,
    /// It was added while the seed ran; the archive remembers it.
    Added,
}

/// A room as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomStatus {
    /// The database's name.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
    /// Whether the seed stays out of it for now.
    pub paused: bool,
    /// The machine of the cluster that holds it; absent when nobody does, and without a cluster.
    #[serde(default)]
    pub held_by: Option<String>,
    /// Whether this machine is not in it because it is for another machine of the cluster.
    #[serde(default)]
    pub elsewhere: bool,
    /// Peers that are present, without the seed.
    pub peers: usize,
    /// Open links, over both rooms of the database.
    pub links: usize,
    /// How many cells there are; absent for a full mesh.
    pub cells: Option<usize>,
    /// How many of them have the seed as their bridge.
    pub bridged_cells: Option<usize>,
    /// The cells, in their order; none for a full mesh.
    #[serde(default)]
    pub members_by_cell: Vec<CellStatus>,
    /// Nodes in the archive.
    pub nodes: u64,
    /// Operations in the archive's log.
    pub logged_operations: u64,
}

/// A cell as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellStatus {
    /// Peers in it, the seed's ids among them.
    pub members: usize,
    /// Whether the seed is its bridge.
    pub bridged: bool,
}

/// A room cannot be changed as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RoomError {
    /// There is no such room.
    #[error("there is no such room")]
    Unknown,
    /// It is there already.
    #[error("the room is there already")]
    Exists,
    /// It stands in the settings, and would be back after a restart.
    #[error("the room stands in the settings: take it out there, or pause it")]
    FromSettings,
    /// The seed itself may not, or cannot, write that.
    #[error("{0}")]
    NotWritten(String),
    /// Another machine of the cluster holds the room, or nobody does.
    #[error("another machine of the cluster holds the room: ask there (homeport rooms list says which)")]
    Elsewhere,
    /// The room cannot be moved there.
    #[error("the room cannot be moved: {0}")]
    NotMoved(String),
    /// The archive does not take it.
    #[error("the archive does not take it: {0}")]
    Archive(String),
    /// The seed is shutting down.
    #[error("the seed is shutting down")]
    Gone,
}

/// What becomes of a wish.
pub(crate) type Respond<T = ()> = oneshot::Sender<Result<T, RoomError>>;

#[derive(Debug)]
pub(crate) enum Command {
    List {
        respond: oneshot::Sender<Vec<RoomStatus>>,
    },
    Add {
        config: RoomConfig,
        respond: Respond,
    },
    Pause {
        name: String,
        paused: bool,
        respond: Respond,
    },
    Remove {
        name: String,
        respond: Respond,
    },
    Edit {
        name: String,
        edits: Vec<Edit>,
        respond: Respond<Written>,
    },
    Import {
        name: String,
        nodes: Vec<Node>,
        removals: Vec<Removal>,
        respond: Respond<Imported>,
    },
    Tell {
        name: String,
        respond: Respond,
    },
    /// A room of the cluster is this machine's: be in it.
    Hold {
        name: String,
        respond: Respond,
    },
    /// It no longer is.
    Release {
        name: String,
        respond: Respond,
    },
}

/// A handle on the rooms of a running seed.
#[derive(Debug, Clone)]
pub struct Rooms {
    commands: mpsc::Sender<Command>,
    /// Who keeps the leases of a cluster.
    keeper: Option<mpsc::UnboundedSender<KeeperCommand>>,
}

impl Rooms {
    pub(crate) fn new(commands: mpsc::Sender<Command>, keeper: Option<mpsc::UnboundedSender<KeeperCommand>>) -> Self {
        Self { commands, keeper }
    }

    /// The rooms as they are, ordered by name.
    ///
    /// # Errors
    /// When the seed is gone.
    pub async fn list(&self) -> Result<Vec<RoomStatus>, RoomError> {
        let (respond, response) = oneshot::channel();
        self.commands.send(Command::List { respond }).await.map_err(|_| RoomError::Gone)?;
        let mut rooms = response.await.map_err(|_| RoomError::Gone)?;
        if let Some(keeper) = &self.keeper {
            let (respond, response) = oneshot::channel();
            keeper.send(KeeperCommand::Overview { respond }).map_err(|_| RoomError::Gone)?;
            let mut holders = response.await.map_err(|_| RoomError::Gone)?;
            for room in &mut rooms {
                room.held_by = holders.remove(&room.name).flatten();
            }
        }
        Ok(rooms)
    }

    /// Has a room of the cluster held by the machine called `instance`, as long as that is there; by any without it.
    ///
    /// # Errors
    /// See [`Rooms::add`].
    pub async fn move_to(&self, name: &str, instance: Option<&str>) -> Result<(), RoomError> {
        let Some(keeper) = &self.keeper else {
            return Err(RoomError::NotMoved("this machine is in no cluster (setting cluster.nats)".into()));
        };
        if !self.list().await?.iter().any(|room| room.name == name) {
            return Err(RoomError::Unknown);
        }
        let (respond, response) = oneshot::channel();
        let (name, instance) = (name.to_owned(), instance.map(str::to_owned));
        keeper.send(KeeperCommand::Move { name, instance, respond }).map_err(|_| RoomError::Gone)?;
        response.await.map_err(|_| RoomError::Gone)?
    }

    /// Enters a room of the cluster.
    pub(crate) async fn hold(&self, name: &str) -> Result<(), RoomError> {
        self.ask(|respond| Command::Hold { name: name.into(), respond }).await
    }

    /// Leaves a room of the cluster.
    pub(crate) async fn release(&self, name: &str) -> Result<(), RoomError> {
        self.ask(|respond| Command::Release { name: name.into(), respond }).await
    }

    /// Joins a room, now and after restarts.
    ///
    /// # Errors
    /// [`RoomError`], here and below.
    pub async fn add(&self, config: RoomConfig) -> Result<(), RoomError> {
        self.ask(|respond| Command::Add { config, respond }).await
    }

    /// Leaves a room for now, over restarts; what is archived stays.
    ///
    /// # Errors
    /// See [`Rooms::add`].
    pub async fn pause(&self, name: &str) -> Result<(), RoomError> {
        self.ask(|respond| Command::Pause { name: name.into(), paused: true, respond }).await
    }

    /// Joins a paused room again.
    ///
    /// # Errors
    /// See [`Rooms::add`].
    pub async fn resume(&self, name: &str) -> Result<(), RoomError> {
        self.ask(|respond| Command::Pause { name: name.into(), paused: false, respond }).await
    }

    /// Leaves a room that was added, for good. What is archived stays, and is there again when the room is.
    ///
    /// # Errors
    /// See [`Rooms::add`].
    pub async fn remove(&self, name: &str) -> Result<(), RoomError> {
        self.ask(|respond| Command::Remove { name: name.into(), respond }).await
    }

    /// Writes to a room under the seed's own name: all of `edits`, in their order, or none. Peers follow.
    ///
    /// # Errors
    /// See [`Rooms::add`].
    pub async fn edit(&self, name: &str, edits: Vec<Edit>) -> Result<Written, RoomError> {
        self.ask(|respond| Command::Edit { name: name.into(), edits, respond }).await
    }

    /// Takes nodes and removals over with the timestamps that they have. Peers hear of it with [`Rooms::tell`].
    ///
    /// # Errors
    /// See [`Rooms::add`].
    pub async fn import(&self, name: &str, nodes: Vec<Node>, removals: Vec<Removal>) -> Result<Imported, RoomError> {
        self.ask(|respond| Command::Import { name: name.into(), nodes, removals, respond }).await
    }

    /// Sends a room's whole state to every linked peer.
    ///
    /// # Errors
    /// See [`Rooms::add`].
    pub async fn tell(&self, name: &str) -> Result<(), RoomError> {
        self.ask(|respond| Command::Tell { name: name.into(), respond }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Respond<T>) -> Command) -> Result<T, RoomError> {
        let (respond, response) = oneshot::channel();
        self.commands.send(command(respond)).await.map_err(|_| RoomError::Gone)?;
        response.await.map_err(|_| RoomError::Gone)?
    }
}
