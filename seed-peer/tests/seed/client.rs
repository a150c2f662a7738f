//! A GenosDB peer on the `webrtc` crate, which shares nothing with the seed but the protocol's types. It does what a
//! browser client does: announces, dials and answers, asks for what it lacks, keeps a graph.

// Named, since `tests/crash` includes this file as well, from elsewhere.
#[path = "client/cells.rs"]
mod cells;
#[path = "client/connection.rs"]
mod connection;
#[path = "client/peer.rs"]
mod peer;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use genosdb::{CellIndex, MemoryGraph, PeerId, Room, Topology};
use rand::Rng as _;
use tokio::sync::{mpsc, watch};

use peer::Peer;

/// Nothing that a test awaits takes nearly so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// What a test sees of its peer.
pub(crate) struct Client {
    commands: mpsc::UnboundedSender<Command>,
    state: watch::Receiver<View>,
    task: tokio::task::JoinHandle<()>,
}

/// The peer's graph and its open links, after each change.
#[derive(Clone, Default)]
pub(crate) struct View {
    /// Shared, since a large one is not to be copied with every change of something else.
    pub(crate) graph: Arc<MemoryGraph>,
    pub(crate) linked: Vec<PeerId>,
    /// Every kind of operation that came in, in order.
    pub(crate) heard: Vec<&'static str>,
    /// What the application was sent over cells: bare data as JSON, or how many bytes.
    pub(crate) application: Vec<String>,
    /// The topology that the peer has sealed, when it is in cells.
    pub(crate) topology: Option<Topology>,
    /// Peers that answered a ping over cells.
    pub(crate) ponged: Vec<PeerId>,
    /// The cell that it takes itself to be in, other than the topology has it.
    pub(crate) strays: Option<CellIndex>,
}

/// The nodes that somebody has served back to who wrote them.
pub(crate) type Acknowledged = Arc<Mutex<HashSet<String>>>;

enum Command {
    Write(String),
    Send(Vec<u8>),
    /// The same, with nothing sent: as if every frame of it were dropped on the way.
    WriteUnheard(String),
    /// Send data of the application to everybody, over cells.
    MeshSend(String),
    /// Send bytes to everybody, behind an envelope.
    MeshBytes(usize),
    /// Ask a peer over cells whether it is there.
    MeshPing(PeerId),
    /// Send frames again and out of order.
    Stutter,
    /// Take itself for a bridge and for one of another cell.
    Lie,
    /// Be in another cell than the others take it to be in, or in that again.
    Stray(Option<CellIndex>),
    /// Have nothing to do with anybody but the seed.
    KeepToTheSeed,
    /// Have a clock that is off by so many milliseconds.
    Skew(i64),
    /// Write a node every few milliseconds, and take note of when the other side has got it.
    Pump(Acknowledged),
    Leave,
}

pub(crate) fn new_id() -> PeerId {
    let mut random = rand::rng();
    PeerId::generate(|range| random.random_range(range))
}

pub(crate) fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

impl Client {
    /// Joins the graph room of `database` through `relay`, with what `graph` already holds.
    pub(crate) fn join(
        relay: &str,
        database: &str,
        password: &str,
        id: PeerId,
        graph: impl Into<Arc<MemoryGraph>>,
    ) -> Self {
        Self::join_room(relay, &Room::graph_sync(database), password, id, graph, None)
    }

    /// Joins a room of `database` in cells of `cell_size`.
    pub(crate) fn join_cells(relay: &str, room: &Room, id: PeerId, graph: MemoryGraph, cell_size: usize) -> Self {
        Self::join_room(relay, room, "", id, graph, Some(cell_size))
    }

    fn join_room(
        relay: &str,
        room: &Room,
        password: &str,
        id: PeerId,
        graph: impl Into<Arc<MemoryGraph>>,
        cell_size: Option<usize>,
    ) -> Self {
        let graph = graph.into();
        let (commands, receiver) = mpsc::unbounded_channel();
        let (views, state) = watch::channel(View { graph: graph.clone(), ..View::default() });
        let peer = Peer::new(relay, room, password, id, graph, cell_size, views);
        let task = tokio::spawn(peer.run(receiver));
        Self { commands, state, task }
    }

    /// Writes through the operations that `script` names, one a line: `put ID JSON`, `link A B`, `remove ID`.
    pub(crate) fn write(&self, script: &str) {
        self.commands.send(Command::Write(script.to_owned())).unwrap();
    }

    /// Writes as [`Client::write`] does, and every frame that says so is lost.
    pub(crate) fn write_unheard(&self, script: &str) {
        self.commands.send(Command::WriteUnheard(script.to_owned())).unwrap();
    }

    /// Sends raw bytes on every data channel.
    pub(crate) fn send_raw(&self, bytes: &[u8]) {
        self.commands.send(Command::Send(bytes.to_owned())).unwrap();
    }

    /// Sends data of the application, a JSON text, to everybody over cells.
    pub(crate) fn mesh_send(&self, data: &str) {
        self.commands.send(Command::MeshSend(data.to_owned())).unwrap();
    }

    /// Sends so many bytes to everybody over cells.
    pub(crate) fn mesh_bytes(&self, count: usize) {
        self.commands.send(Command::MeshBytes(count)).unwrap();
    }

    /// Asks `peer` over cells whether it is there.
    pub(crate) fn mesh_ping(&self, peer: PeerId) {
        self.commands.send(Command::MeshPing(peer)).unwrap();
    }

    /// From now on sends every frame over cells twice, and passes on in another order.
    pub(crate) fn stutter(&self) {
        self.commands.send(Command::Stutter).unwrap();
    }

    /// From now on has nothing to do with anybody but the seed, whose ids start with `z`.
    pub(crate) fn keep_to_the_seed(&self) {
        self.commands.send(Command::KeepToTheSeed).unwrap();
    }

    /// From now on has a clock that is off by so many milliseconds.
    pub(crate) fn skew(&self, ms: i64) {
        self.commands.send(Command::Skew(ms)).unwrap();
    }

    /// From now on writes a node every few milliseconds, called after `self`'s id and a number, and sees what answers
    /// to its questions hold of them.
    pub(crate) fn pump(&self) -> Acknowledged {
        let acknowledged = Acknowledged::default();
        self.commands.send(Command::Pump(Arc::clone(&acknowledged))).unwrap();
        acknowledged
    }

    /// From now on acts as a bridge that it is not, and says that it is in another cell.
    pub(crate) fn lie(&self) {
        self.commands.send(Command::Lie).unwrap();
    }

    /// From now on listens in another cell than its own, and says so when it speaks, as one that has sealed another roster;
    /// `None` ends that.
    pub(crate) async fn stray(&mut self, cell: Option<CellIndex>) {
        self.commands.send(Command::Stray(cell)).unwrap();
        self.until("the other cell", |view| view.strays == cell).await;
    }

    /// What the peer holds now.
    pub(crate) fn view(&self) -> View {
        self.state.borrow().clone()
    }

    /// Waits for as long as it takes until the peer's view is as wanted.
    pub(crate) async fn changed(&mut self, mut wanted: impl FnMut(&View) -> bool) {
        self.state.wait_for(|view| wanted(view)).await.expect("a running peer");
    }

    /// Waits until the peer's view is as wanted.
    pub(crate) async fn until(&mut self, what: &str, mut wanted: impl FnMut(&View) -> bool) -> View {
        let waiting = tokio::time::timeout(PATIENCE, self.state.wait_for(|view| wanted(view)));
        if let Ok(Ok(view)) = waiting.await {
            return view.clone();
        }
        let view = self.view();
        panic!(
            "nothing came of: {what}; {} nodes, {} messages, linked {:?}, {:?}",
            view.graph.iter().count(),
            view.application.len(),
            view.linked,
            view.topology
        )
    }

    /// Says bye, and closes its links.
    pub(crate) async fn leave(self) {
        self.commands.send(Command::Leave).unwrap();
        tokio::time::timeout(PATIENCE, self.task).await.expect("leaving takes too long").unwrap();
    }

    /// Vanishes without a word, as a crashed tab does.
    pub(crate) fn vanish(self) {
        self.task.abort();
    }
}
