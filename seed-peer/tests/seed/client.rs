//! A GenosDB peer on the `webrtc` crate, which shares nothing with the seed but the protocol's types. It does what a
//! browser client does: announces, dials and answers, asks for what it lacks, keeps a graph.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::{SinkExt as _, StreamExt as _};
use genosdb::envelope::Letter;
use genosdb::frame::{Frame, Nonces};
use genosdb::json::JsonString;
use genosdb::operation::{DeltaSync, Sync};
use genosdb::{
    APP_ID, Batch, CellIndex, ChannelName, Clock, Content, Envelope, Limits, MemoryGraph, Message, Operation, PeerId,
    Reassembler, Room, SdpKey, SealedDescription, Signal, Topology,
};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use rand::{Rng as _, RngCore as _};
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::tungstenite::Message as Frames;
use webrtc::api::APIBuilder;
use webrtc::api::setting_engine::SettingEngine;
use webrtc::data_channel::RTCDataChannel;
use webrtc::peer_connection::RTCPeerConnection;
use webrtc::peer_connection::configuration::RTCConfiguration;
use webrtc::peer_connection::sdp::session_description::RTCSessionDescription;

/// Nothing that a test awaits takes nearly so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// A dial that has led to nothing for so long is made anew.
const UNANSWERED: Duration = Duration::from_secs(20);

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
}

/// The nodes that somebody has served back to who wrote them.
pub(crate) type Acknowledged = Arc<Mutex<HashSet<String>>>;

/// Writes on and on, and asks again and again for what has come of it.
struct Pump {
    written: usize,
    /// Whether a question waits for its answer.
    asked: bool,
    acknowledged: Acknowledged,
}

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
    /// Have nothing to do with anybody but the seed.
    KeepToTheSeed,
    /// Have a clock that is off by so many milliseconds.
    Skew(i64),
    /// Write a node every few milliseconds, and take note of when the other side has got it.
    Pump(Acknowledged),
    Leave,
}

enum Event {
    Opened(PeerId, Arc<RTCDataChannel>),
    Frame(PeerId, Vec<u8>),
    Closed(PeerId),
}

struct Link {
    made: Instant,
    connection: Arc<RTCPeerConnection>,
    channel: Option<Arc<RTCDataChannel>>,
    reassembler: Reassembler,
    nonces: Nonces,
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
        let peer = Peer {
            id,
            key: SdpKey::derive(password, APP_ID, room),
            room: room.clone(),
            cells: cell_size.map(|size| CellsPeer::new(id, size)),
            relay: relay.to_owned(),
            clock: Clock::starting_at(graph.latest().unwrap_or_default()),
            views,
            skew_ms: 0,
            keeps_to_the_seed: false,
            pump: None,
            view: View { graph, ..View::default() },
            links: HashMap::new(),
            log: Vec::new(),
        };
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

/// What a client in cells knows, by the rules of wire §5 and nothing of the seed's.
struct CellsPeer {
    id: PeerId,
    cell_size: usize,
    roster: BTreeSet<PeerId>,
    /// First and last change since the last seal.
    changed: Option<(Instant, Instant)>,
    sealed: Option<Instant>,
    topology: Topology,
    seen: HashSet<String>,
    sequence: u64,
    stutters: bool,
    lies: bool,
    /// What a stutterer still has to pass on.
    late: Vec<(PeerId, Envelope)>,
}

impl CellsPeer {
    fn new(id: PeerId, cell_size: usize) -> Self {
        Self {
            id,
            cell_size,
            roster: BTreeSet::from([id]),
            changed: None,
            sealed: None,
            topology: Topology::new(&[id], cell_size),
            seen: HashSet::new(),
            sequence: 0,
            stutters: false,
            lies: false,
            late: Vec::new(),
        }
    }

    fn change(&mut self) {
        let now = Instant::now();
        self.changed = Some((self.changed.map_or(now, |(first, _)| first), now));
    }

    /// Whether a link with `peer` has a place; as long as the roster holds nobody else, every first contact has.
    fn wants(&self, peer: &PeerId) -> bool {
        self.sealed.is_none() || self.topology.are_linked(&self.id, peer)
    }

    fn is_due(&self) -> bool {
        self.changed.is_some_and(|(first, last)| {
            last.elapsed() >= Duration::from_secs(2) || first.elapsed() >= Duration::from_secs(10)
        })
    }

    fn envelope(&mut self, kind: &str, data: &str) -> Envelope {
        self.sequence += 1;
        let (id, ttl) = (self.id, self.topology.ttl());
        let cell = self.topology.cell_of(&id).unwrap();
        let cell = if self.lies { CellIndex(cell.0 + 1) } else { cell };
        let text = format!(
            r#"{{"t":"{kind}","id":"{id}:x:{}","ttl":{ttl},"data":{data},"origin":"{id}","originCell":"{cell}"}}"#,
            self.sequence
        );
        Envelope::parse(&text).unwrap()
    }

    /// The channels that this peer sends and listens on.
    fn channels(&self) -> Vec<CellIndex> {
        if self.lies {
            return (0..u32::try_from(self.topology.total_cells()).unwrap()).map(CellIndex).collect();
        }
        self.topology.channels(&self.id)
    }
}

struct Peer {
    id: PeerId,
    key: SdpKey,
    room: Room,
    cells: Option<CellsPeer>,
    relay: String,
    skew_ms: i64,
    keeps_to_the_seed: bool,
    pump: Option<Pump>,
    clock: Clock,
    views: watch::Sender<View>,
    view: View,
    links: HashMap<PeerId, Link>,
    /// The last operations, as clients keep them.
    log: Vec<Operation>,
}

impl Peer {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let (mut socket, _) = tokio_tungstenite::connect_async(self.relay.as_str()).await.unwrap();
        let keys = Keys::generate();
        let (root, own) = (self.room.root_topic(), self.room.self_topic(&self.id));
        for (name, topic) in [("root", &root), ("own", &own)] {
            let filter = serde_json::json!({
                "kinds": [topic.kind()], "since": wall_ms() / 1000, "#x": [topic.as_str()]
            });
            let request = serde_json::json!(["REQ", name.repeat(16), filter]);
            socket.send(Frames::text(request.to_string())).await.unwrap();
        }
        let (event_sender, mut events) = mpsc::unbounded_channel();
        let mut announce = tokio::time::interval(Duration::from_millis(2_500));
        let mut pump = tokio::time::interval(Duration::from_millis(4));
        pump.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut look = tokio::time::interval(Duration::from_millis(200));
        loop {
            let mut out: Vec<(genosdb::Topic, Signal)> = Vec::new();
            tokio::select! {
                // What a test wants comes first.
                biased;
                command = commands.recv() => match command {
                    Some(Command::Write(script)) => self.write(&script).await,
                    Some(Command::WriteUnheard(script)) => drop(self.apply(&script)),
                    Some(Command::Send(bytes)) => for link in self.links.values() {
                        if let Some(channel) = &link.channel {
                            // The other side may have had enough of it, and closed.
                            let _ = channel.send(&bytes.clone().into()).await;
                        }
                    },
                    Some(Command::MeshSend(data)) => {
                        let envelope = self.cells.as_mut().unwrap().envelope("msg", &data);
                        self.send_to_cells(&envelope, None).await;
                    }
                    Some(Command::MeshBytes(count)) => {
                        let envelope = self.cells.as_mut().unwrap().envelope("msg", "null");
                        self.send_to_cells(&envelope, Some(vec![7; count])).await;
                    }
                    Some(Command::MeshPing(target)) => {
                        let data = format!(r#"{{"pingId":"p","target":"{target}"}}"#);
                        let envelope = self.cells.as_mut().unwrap().envelope("ping", &data);
                        self.send_to_cells(&envelope, None).await;
                    }
                    Some(Command::Stutter) => self.cells.as_mut().unwrap().stutters = true,
                    Some(Command::KeepToTheSeed) => self.keeps_to_the_seed = true,
                    Some(Command::Skew(ms)) => self.skew_ms = ms,
                    Some(Command::Pump(acknowledged)) => {
                        self.pump = Some(Pump { written: 0, asked: false, acknowledged });
                    }
                    Some(Command::Lie) => self.cells.as_mut().unwrap().lies = true,
                    Some(Command::Leave) | None => {
                        socket.send(sign(&keys, &root, &Signal::Bye { peer: self.id })).await.unwrap();
                        socket.close(None).await.unwrap();
                        for link in self.links.values() {
                            // Closing what is closed already is an error there.
                            let _ = link.connection.close().await;
                        }
                        return;
                    }
                },
                _ = announce.tick() => out.push((root.clone(), Signal::Announce { peer: self.id })),
                message = socket.next() => {
                    let Some(Ok(message)) = message else { return };
                    let Frames::Text(text) = message else { continue };
                    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
                    if value[0] == "EVENT" && let Some(signal) = Signal::parse(value[2]["content"].as_str().unwrap()) {
                        out.extend(self.hear(signal, &event_sender).await);
                    }
                }
                _ = pump.tick(), if self.pump.is_some() => self.pump_on().await,
                _ = look.tick(), if self.cells.is_some() => out.extend(self.look_at_cells(&event_sender).await),
                Some(event) = events.recv() => self.handle(event).await,
            }
            for (topic, signal) in out {
                if socket.send(sign(&keys, &topic, &signal)).await.is_err() {
                    return;
                }
            }
            let _ = self.views.send(self.view.clone());
        }
    }

    async fn hear(
        &mut self,
        signal: Signal,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Option<(genosdb::Topic, Signal)> {
        let peer = signal.peer();
        if peer == self.id || (self.keeps_to_the_seed && !peer.as_str().starts_with('z')) {
            return None;
        }
        let topic = self.room.self_topic(&peer);
        if let Some(cells) = &mut self.cells {
            match signal {
                Signal::Announce { .. } if cells.roster.insert(peer) => cells.change(),
                Signal::Bye { .. } if cells.roster.remove(&peer) => cells.change(),
                _ => {}
            }
        }
        let is_wanted = self.cells.as_ref().is_none_or(|cells| cells.wants(&peer));
        if let Some(link) = self.links.get(&peer)
            && link.channel.is_none()
            && link.made.elapsed() > UNANSWERED
        {
            let _ = link.connection.close().await;
            self.unlinked(peer);
        }
        match signal {
            Signal::Announce { .. } if is_wanted && !self.links.contains_key(&peer) => {
                Some(self.dial(peer, events).await)
            }
            Signal::Offer { sdp, .. } => {
                if let Some(link) = self.links.get(&peer) {
                    if link.channel.is_none() && self.id > peer {
                        return None;
                    }
                    let _ = link.connection.close().await;
                    self.unlinked(peer);
                }
                let Ok(sdp) = self.key.open(&sdp.0) else { return None };
                let connection = connection().await;
                let sender = events.clone();
                connection.on_data_channel(Box::new(move |channel| {
                    watch_channel(peer, &channel, &sender);
                    Box::pin(async {})
                }));
                connection.set_remote_description(RTCSessionDescription::offer(sdp).unwrap()).await.unwrap();
                let answer = connection.create_answer(None).await.unwrap();
                let sdp = self.seal(&described(&connection, answer).await);
                self.add_link(peer, connection);
                Some((topic, Signal::Answer { peer: self.id, sdp }))
            }
            Signal::Answer { sdp, .. } => {
                let link = self.links.get(&peer)?;
                let sdp = self.key.open(&sdp.0).ok()?;
                let answer = RTCSessionDescription::answer(sdp).unwrap();
                // A second answer to one offer is late, and refused.
                let _ = link.connection.set_remote_description(answer).await;
                None
            }
            Signal::Bye { .. } => {
                self.unlinked(peer);
                None
            }
            Signal::Announce { .. } => None,
        }
    }

    async fn dial(&mut self, peer: PeerId, events: &mpsc::UnboundedSender<Event>) -> (genosdb::Topic, Signal) {
        let connection = connection().await;
        let channel = connection.create_data_channel("data", None).await.unwrap();
        watch_channel(peer, &channel, events);
        let offer = connection.create_offer(None).await.unwrap();
        let sdp = self.seal(&described(&connection, offer).await);
        self.add_link(peer, connection);
        (self.room.self_topic(&peer), Signal::Offer { peer: self.id, sdp, superpeer: false })
    }

    /// Seals the roster when it is due, dials whom the topology asks for, and drops whom it has no place for.
    async fn look_at_cells(&mut self, events: &mpsc::UnboundedSender<Event>) -> Vec<(genosdb::Topic, Signal)> {
        let mut signals = Vec::new();
        let Some(cells) = &mut self.cells else { return signals };
        let late = std::mem::take(&mut cells.late);
        let mut wanted = Vec::new();
        if cells.is_due() {
            cells.changed = None;
            let roster: Vec<PeerId> = cells.roster.iter().copied().collect();
            cells.topology = Topology::new(&roster, cells.cell_size);
            cells.sealed = Some(Instant::now());
            self.view.topology = Some(cells.topology.clone());
            wanted = cells.topology.links(&self.id);
        }
        let prunes = cells.changed.is_none() && cells.sealed.is_some_and(|at| at.elapsed() >= Duration::from_secs(5));
        let surplus: Vec<PeerId> = self
            .links
            .iter()
            .filter(|(peer, link)| prunes && link.channel.is_some() && !cells.wants(peer))
            .map(|(peer, _)| *peer)
            .collect();
        for peer in wanted {
            if !self.links.contains_key(&peer) {
                signals.push(self.dial(peer, events).await);
            }
        }
        for peer in surplus {
            if let Some(link) = self.links.get(&peer) {
                let _ = link.connection.close().await;
            }
            self.unlinked(peer);
        }
        for (from, envelope) in late.into_iter().rev() {
            self.pass_on(from, &envelope, None).await;
        }
        signals
    }

    /// Sends an envelope of this peer's own on every channel that it sends on.
    async fn send_to_cells(&mut self, envelope: &Envelope, bytes: Option<Vec<u8>>) {
        if let Some(cells) = &mut self.cells {
            cells.seen.insert(envelope.id.to_text());
        }
        self.send_on_channels(envelope, bytes, None).await;
    }

    async fn pass_on(&mut self, from: PeerId, envelope: &Envelope, bytes: Option<Vec<u8>>) {
        if let Some(passed_on) = envelope.passed_on() {
            self.send_on_channels(&passed_on, bytes, Some(from)).await;
        }
    }

    async fn send_on_channels(&mut self, envelope: &Envelope, bytes: Option<Vec<u8>>, except: Option<PeerId>) {
        let Some(cells) = &self.cells else { return };
        let (topology, stutters) = (cells.topology.clone(), cells.stutters);
        for cell in cells.channels() {
            let content = match &bytes {
                Some(bytes) => Content::Binary { meta: Some(envelope.print()), bytes: bytes.clone() },
                None => Content::Text(envelope.print()),
            };
            let message = Message::new(cell.channel(), content);
            let audience: Vec<PeerId> = self
                .links
                .keys()
                .filter(|peer| Some(**peer) != except && topology.cell_of(peer) == Some(cell))
                .copied()
                .collect();
            for peer in audience {
                for _ in 0..1 + usize::from(stutters) {
                    self.send(peer, &message).await;
                }
            }
        }
    }

    /// A frame came on a cell's channel.
    async fn hear_cell(&mut self, from: PeerId, cell: CellIndex, content: Content) {
        let Some(cells) = &mut self.cells else { return };
        if !cells.channels().contains(&cell) && cells.sealed.is_some() {
            return;
        }
        let (text, bytes) = match content {
            Content::Text(text) => (text, None),
            Content::Binary { meta: Some(meta), bytes } => (meta, Some(bytes)),
            other => panic!("{other:?}"),
        };
        let envelope = Envelope::parse(&text).unwrap();
        if !cells.seen.insert(envelope.id.to_text()) {
            return;
        }
        if cells.topology.is_bridge(&self.id) || cells.lies {
            if cells.stutters && bytes.is_none() {
                cells.late.push((from, envelope.clone()));
            } else {
                self.pass_on(from, &envelope, bytes.clone()).await;
            }
        }
        match envelope.letter() {
            Letter::Channel { payload, .. } => self.receive(payload.as_str()).await,
            Letter::Bare => self.view.application.push(match bytes {
                Some(bytes) => format!("{} bytes", bytes.len()),
                None => envelope.data.to_string(),
            }),
            Letter::Ping { id, target } if target == self.id => {
                let data = format!(r#"{{"pingId":{id},"receivedAt":{}}}"#, self.wall_ms());
                let pong = self.cells.as_mut().unwrap().envelope("pong", &data);
                self.send_to_cells(&pong, None).await;
            }
            Letter::Ping { .. } => {}
            Letter::Other => self.view.ponged.push(envelope.origin),
        }
    }

    fn seal(&self, sdp: &str) -> SealedDescription {
        let mut iv = [0; 12];
        rand::rng().fill_bytes(&mut iv);
        SealedDescription(self.key.seal(iv, sdp))
    }

    fn add_link(&mut self, peer: PeerId, connection: Arc<RTCPeerConnection>) {
        let reassembler = Reassembler::new(Limits::default());
        let made = Instant::now();
        self.links.insert(peer, Link { made, connection, channel: None, reassembler, nonces: Nonces::default() });
    }

    fn unlinked(&mut self, peer: PeerId) {
        self.links.remove(&peer);
        self.view.linked.retain(|linked| *linked != peer);
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Opened(peer, channel) => {
                let Some(link) = self.links.get_mut(&peer) else { return };
                link.channel = Some(channel);
                self.view.linked.push(peer);
                if let Some(pump) = &mut self.pump {
                    // What was asked on a link before this one may have been lost with it.
                    pump.asked = false;
                }
                // Sent to everyone whenever a peer joins.
                let sync = Operation::Sync(Sync { timestamp: self.view.graph.latest(), extra: Vec::new() });
                self.broadcast(&[sync]).await;
            }
            Event::Closed(peer) => self.unlinked(peer),
            Event::Frame(peer, bytes) => {
                let Some(link) = self.links.get_mut(&peer) else { return };
                let frame = Frame::parse(&bytes).unwrap();
                match link.reassembler.push(&frame).unwrap() {
                    Some((ChannelName::PING, _)) => self.send(peer, &Message::empty(ChannelName::PONG)).await,
                    Some((ChannelName::LEAVE, _)) => self.unlinked(peer),
                    Some((ChannelName::SYNC_GRAPH, Content::Json(text))) => self.receive(&text).await,
                    Some((channel, content)) if CellIndex::of_channel(channel).is_some() => {
                        self.hear_cell(peer, CellIndex::of_channel(channel).unwrap(), content).await;
                    }
                    _ => {}
                }
            }
        }
    }

    fn graph(&mut self) -> &mut MemoryGraph {
        Arc::make_mut(&mut self.view.graph)
    }

    async fn receive(&mut self, text: &str) {
        let wall_ms = self.wall_ms();
        let batch = Batch::parse(text).unwrap();
        assert_eq!(batch.malformed, 0, "{text}");
        for operation in batch.operations {
            let kind = match &operation {
                Operation::Sync(_) => "sync",
                Operation::DeltaSync(_) => "deltaSync",
                Operation::FullStateSync(_) => "fullStateSync",
                Operation::Upsert(_) => "upsert",
                Operation::Remove(_) => "remove",
                Operation::Link(_) => "link",
            };
            self.view.heard.push(kind);
            match operation {
                Operation::Sync(Sync { timestamp, .. }) => {
                    let oldest = self.log.first().map(timestamp_of);
                    let recent = timestamp.is_some() && oldest.is_some() && timestamp >= oldest;
                    let answer = if recent {
                        Operation::DeltaSync(DeltaSync {
                            operations: self.log.clone(),
                            timestamp: self.view.graph.latest(),
                            extra: Vec::new(),
                        })
                    } else {
                        Operation::FullStateSync(self.view.graph.full_state())
                    };
                    self.broadcast(&[answer]).await;
                }
                Operation::DeltaSync(delta) => {
                    self.acknowledge(delta.operations.iter().filter_map(|operation| match operation {
                        Operation::Upsert(upsert) => Some(&upsert.id),
                        _ => None,
                    }));
                    for operation in &delta.operations {
                        self.graph().apply(operation, wall_ms);
                    }
                }
                Operation::FullStateSync(state) => {
                    self.acknowledge(state.nodes.iter().map(|node| &node.id));
                    if self.graph().merge(&state, wall_ms).sender_lacks {
                        let answer = Operation::FullStateSync(self.view.graph.full_state());
                        self.broadcast(&[answer]).await;
                    }
                }
                change => {
                    self.clock.receive(timestamp_of(&change), self.wall_ms());
                    self.graph().apply(&change, wall_ms);
                }
            }
        }
    }

    async fn write(&mut self, script: &str) {
        let operations = self.apply(script);
        self.broadcast(&operations).await;
    }

    /// Applies the operations of a script to the own graph and log.
    fn apply(&mut self, script: &str) -> Vec<Operation> {
        let wall_ms = self.wall_ms();
        let mut operations = Vec::new();
        for line in script.lines().filter(|line| !line.trim().is_empty()) {
            let at = self.clock.now(self.wall_ms());
            let at = format!(r#"{{"physical":{},"logical":{}}}"#, at.physical, at.logical);
            let words: Vec<&str> = line.trim().splitn(3, ' ').collect();
            let text = match words.as_slice() {
                ["put", id, value] => format!(r#"{{"type":"upsert","id":"{id}","value":{value},"timestamp":{at}}}"#),
                ["link", one, other] => {
                    format!(r#"{{"type":"link","sourceId":"{one}","targetId":"{other}","timestamp":{at}}}"#)
                }
                ["remove", id] => format!(r#"{{"type":"remove","id":"{id}","timestamp":{at}}}"#),
                other => panic!("{other:?}"),
            };
            let operation = Operation::parse(&text, &mut 0).unwrap();
            self.graph().apply(&operation, wall_ms);
            operations.push(operation);
        }
        self.log.extend(operations.iter().cloned());
        self.log.drain(..self.log.len().saturating_sub(200));
        operations
    }

    fn wall_ms(&self) -> u64 {
        wall_ms().saturating_add_signed(self.skew_ms)
    }

    /// Writes one more node, and asks for what has come of all unless that was asked already.
    async fn pump_on(&mut self) {
        let Some(pump) = &mut self.pump else { return };
        pump.written += 1;
        let asks = !std::mem::replace(&mut pump.asked, true);
        let script = format!("put {}-{} {{\"pumped\":true}}", self.id, pump.written);
        self.write(&script).await;
        if asks {
            let sync = Operation::Sync(Sync { timestamp: self.view.graph.latest(), extra: Vec::new() });
            self.broadcast(&[sync]).await;
        }
    }

    /// Takes note of what somebody else holds.
    fn acknowledge<'a>(&mut self, ids: impl Iterator<Item = &'a JsonString>) {
        let Some(pump) = &mut self.pump else { return };
        pump.asked = false;
        pump.acknowledged.lock().unwrap().extend(ids.map(|id| id.to_text()));
    }

    async fn broadcast(&mut self, operations: &[Operation]) {
        if let Some(cells) = &mut self.cells {
            let data = format!(r#"{{"_ch":"syncGraph","_d":{}}}"#, Batch::print(operations));
            let envelope = cells.envelope("msg", &data);
            return self.send_to_cells(&envelope, None).await;
        }
        let message = Message::new(ChannelName::SYNC_GRAPH, Content::Json(Batch::print(operations)));
        let peers: Vec<PeerId> = self.links.keys().copied().collect();
        for peer in peers {
            self.send(peer, &message).await;
        }
    }

    async fn send(&mut self, peer: PeerId, message: &Message) {
        let Some(Link { channel: Some(channel), nonces, .. }) = self.links.get_mut(&peer) else { return };
        let nonce = nonces.next(message.channel());
        for index in 0..message.frames() {
            // A link that has just closed says so by itself.
            let _ = channel.send(&message.frame(nonce, index).into()).await;
        }
    }
}

fn timestamp_of(operation: &Operation) -> genosdb::Hlc {
    match operation {
        Operation::Upsert(upsert) => upsert.timestamp,
        Operation::Remove(remove) => remove.timestamp,
        Operation::Link(link) => link.timestamp,
        _ => genosdb::Hlc::default(),
    }
}

fn sign(keys: &Keys, topic: &genosdb::Topic, signal: &Signal) -> Frames {
    let event = EventBuilder::new(Kind::from(topic.kind()), signal.to_content())
        .tag(Tag::parse(["x", topic.as_str()]).unwrap())
        .finalize(keys)
        .unwrap();
    Frames::text(serde_json::json!(["EVENT", event]).to_string())
}

async fn connection() -> Arc<RTCPeerConnection> {
    // The crate asks for the process's provider; a second test of the process finds it there.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut settings = SettingEngine::default();
    settings.set_include_loopback_candidate(true);
    settings.set_ice_multicast_dns_mode(webrtc::ice::mdns::MulticastDnsMode::Disabled);
    let api = APIBuilder::new().with_setting_engine(settings).build();
    Arc::new(api.new_peer_connection(RTCConfiguration::default()).await.unwrap())
}

/// Sets the local description, waits for its candidates, and returns it whole: nothing is trickled.
async fn described(connection: &RTCPeerConnection, description: RTCSessionDescription) -> String {
    let mut gathered = connection.gathering_complete_promise().await;
    connection.set_local_description(description).await.unwrap();
    let _ = gathered.recv().await;
    connection.local_description().await.unwrap().sdp
}

fn watch_channel(peer: PeerId, channel: &Arc<RTCDataChannel>, events: &mpsc::UnboundedSender<Event>) {
    let (sender, opened) = (events.clone(), Arc::clone(channel));
    channel.on_open(Box::new(move || {
        let _ = sender.send(Event::Opened(peer, opened));
        Box::pin(async {})
    }));
    let sender = events.clone();
    channel.on_message(Box::new(move |message| {
        let _ = sender.send(Event::Frame(peer, message.data.to_vec()));
        Box::pin(async {})
    }));
    let sender = events.clone();
    channel.on_close(Box::new(move || {
        let _ = sender.send(Event::Closed(peer));
        Box::pin(async {})
    }));
}
