//! The peer behind a [`Client`](super::Client): what it hears, dials, holds and says.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use genosdb::frame::{Frame, Nonces};
use genosdb::json::JsonString;
use genosdb::operation::{DeltaSync, Sync};
use genosdb::{
    APP_ID, Batch, CellIndex, ChannelName, Clock, Content, Limits, MemoryGraph, Message, Operation, PeerId,
    Reassembler, Room, SdpKey, SealedDescription, Signal,
};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use rand::RngCore as _;
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::tungstenite::Message as Frames;
use webrtc::data_channel::RTCDataChannel;
use webrtc::peer_connection::RTCPeerConnection;
use webrtc::peer_connection::sdp::session_description::RTCSessionDescription;

use super::cells::CellsPeer;
use super::connection::{Event, connection, described, watch_channel};
use super::{Acknowledged, Command, View, wall_ms};

/// A dial that has led to nothing for so long is made anew.
const UNANSWERED: Duration = Duration::from_secs(20);

/// Writes on and on, and asks again and again for what has come of it.
struct Pump {
    written: usize,
    /// Whether a question waits for its answer.
    asked: bool,
    acknowledged: Acknowledged,
}

pub(super) struct Link {
    made: Instant,
    pub(super) connection: Arc<RTCPeerConnection>,
    pub(super) channel: Option<Arc<RTCDataChannel>>,
    reassembler: Reassembler,
    nonces: Nonces,
}

/// The peer itself, as a task.
pub(super) struct Peer {
    pub(super) id: PeerId,
    key: SdpKey,
    room: Room,
    pub(super) cells: Option<CellsPeer>,
    relay: String,
    skew_ms: i64,
    keeps_to_the_seed: bool,
    pump: Option<Pump>,
    clock: Clock,
    views: watch::Sender<View>,
    pub(super) view: View,
    pub(super) links: HashMap<PeerId, Link>,
    /// The last operations, as clients keep them.
    log: Vec<Operation>,
}

impl Peer {
    pub(super) fn new(
        relay: &str,
        room: &Room,
        password: &str,
        id: PeerId,
        graph: Arc<MemoryGraph>,
        cell_size: Option<usize>,
        views: watch::Sender<View>,
    ) -> Self {
        Self {
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
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
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
                    Some(Command::Stray(cell)) => {
                        self.cells.as_mut().unwrap().strays = cell;
                        self.view.strays = cell;
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
                let Ok(sdp) = self.key.open(&sdp) else { return None };
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
                let sdp = self.key.open(&sdp).ok()?;
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

    pub(super) async fn dial(
        &mut self,
        peer: PeerId,
        events: &mpsc::UnboundedSender<Event>,
    ) -> (genosdb::Topic, Signal) {
        let connection = connection().await;
        let channel = connection.create_data_channel("data", None).await.unwrap();
        watch_channel(peer, &channel, events);
        let offer = connection.create_offer(None).await.unwrap();
        let sdp = self.seal(&described(&connection, offer).await);
        self.add_link(peer, connection);
        (self.room.self_topic(&peer), Signal::Offer { peer: self.id, sdp, superpeer: false })
    }

    fn seal(&self, sdp: &str) -> SealedDescription {
        let mut iv = [0; 12];
        rand::rng().fill_bytes(&mut iv);
        self.key.seal(iv, sdp)
    }

    fn add_link(&mut self, peer: PeerId, connection: Arc<RTCPeerConnection>) {
        let reassembler = Reassembler::new(Limits::default());
        let made = Instant::now();
        self.links.insert(peer, Link { made, connection, channel: None, reassembler, nonces: Nonces::default() });
    }

    pub(super) fn unlinked(&mut self, peer: PeerId) {
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

    pub(super) async fn receive(&mut self, text: &str) {
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

    pub(super) fn wall_ms(&self) -> u64 {
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

    pub(super) async fn send(&mut self, peer: PeerId, message: &Message) {
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
