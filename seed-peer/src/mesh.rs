//! The one task that moves everything between relays, links and archive.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use genosdb::{
    APP_ID, Batch, ChannelName, Content, Hlc, Limits, Message, Operation, PeerId, Room, SdpKey, SealedDescription,
    Signal, Topic, operation::Sync,
};
use rand::RngCore as _;
use str0m::config::DtlsCert;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio_util::sync::CancellationToken;

use crate::addresses::Addresses;
use crate::archive::{Archive, Known, Reply, RoomKey};
use crate::link::{CloseReason, Link, LinkOutput, Listening, Refused};
use crate::links::{LinkId, Links};
use crate::metrics::Metrics;
use crate::room::{Action, RoomPeer, Said, Why};
use crate::signalling::{Heard, RelayIndex, Signalling};

/// Event ids that are remembered: the same event comes from every relay that has it.
const REMEMBERED_EVENTS: usize = 4_096;
/// Packets are read in so many batches before something else gets its turn.
const BATCHES_IN_A_ROW: usize = 16;
/// How long a shutdown waits for messages that are on their way.
const DRAIN: Duration = Duration::from_millis(400);

/// One of the two rooms of a database.
pub(crate) struct MeshRoom {
    room: Room,
    root: Topic,
    key: SdpKey,
    peer: RoomPeer,
    /// The configured name, for metrics.
    name: String,
    /// Where the graph is kept; `None` for the application's room, which the seed attends without a say.
    archive: Option<RoomKey>,
    latest: Option<Hlc>,
}

impl MeshRoom {
    pub(crate) fn new(
        room: Room,
        password: &str,
        peer: RoomPeer,
        name: String,
        archive: Option<RoomKey>,
        latest: Option<Hlc>,
    ) -> Self {
        let key = SdpKey::derive(password, APP_ID, &room);
        Self { root: room.root_topic(), room, key, peer, name, archive, latest }
    }

    pub(crate) fn root(&self) -> &Topic {
        &self.root
    }

    pub(crate) fn own_topic(&self) -> Topic {
        self.room.self_topic(&self.peer.id())
    }
}

/// Whose link it is.
struct Owner {
    room: usize,
    peer: PeerId,
    made: Instant,
    opened: bool,
    /// The log entry up to which the peer was sent everything on this link.
    sent: Option<u64>,
}

/// Everything that the seed is connected to, and what it is made of.
pub(crate) struct Mesh {
    pub(crate) rooms: Vec<MeshRoom>,
    pub(crate) links: Links,
    pub(crate) addresses: Addresses,
    pub(crate) certificate: DtlsCert,
    pub(crate) limits: Limits,
    pub(crate) max_links: usize,
    pub(crate) signalling: Signalling,
    pub(crate) archive: Archive,
    pub(crate) metrics: Metrics,
    pub(crate) state: State,
}

/// What a mesh learns while it runs.
#[derive(Default)]
pub(crate) struct State {
    owners: HashMap<LinkId, Owner>,
    seen: HashSet<String>,
    seen_order: VecDeque<String>,
    events: Vec<(LinkId, LinkOutput)>,
}

impl Mesh {
    /// Runs until `stop` is cancelled; then says goodbye and returns the archive, to be closed.
    pub(crate) async fn run(
        mut self,
        mut heard: Receiver<Heard>,
        mut replies: UnboundedReceiver<Reply>,
        stop: CancellationToken,
    ) -> Archive {
        loop {
            let now = Instant::now();
            let wake = self.next_wake(now);
            tokio::select! {
                () = stop.cancelled() => break,
                readable = self.links.readable() => {
                    if let Err(error) = readable {
                        tracing::warn!(%error, "the socket for links is not readable");
                    }
                    let now = Instant::now();
                    for _ in 0..BATCHES_IN_A_ROW {
                        if !self.links.receive(now, &mut self.state.events) {
                            break;
                        }
                    }
                    self.handle_events(now);
                }
                Some(reply) = replies.recv() => self.handle_reply(reply),
                Some(heard) = heard.recv() => self.handle_heard(heard),
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            self.handle_time(Instant::now());
        }
        self.say_goodbye().await
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let rooms = self.rooms.iter().map(|room| room.peer.next_tick()).min();
        let wake = rooms.into_iter().chain(self.links.next_deadline()).min();
        wake.unwrap_or(now + Duration::from_secs(1)).min(now + Duration::from_secs(3600))
    }

    fn handle_time(&mut self, now: Instant) {
        self.links.handle_timeouts(now, &mut self.state.events);
        self.handle_events(now);
        for room in 0..self.rooms.len() {
            let mut actions = Vec::new();
            self.rooms[room].peer.tick(now, &mut actions);
            self.act(now, room, actions);
        }
    }

    fn handle_heard(&mut self, heard: Heard) {
        let now = Instant::now();
        match heard {
            Heard::Reached => self.rooms.iter_mut().for_each(|room| room.peer.relay_reached(now)),
            Heard::Said { relay, event_id, room, to_self, signal } => {
                if self.is_known_event(event_id) {
                    return;
                }
                let peer = signal.peer();
                if let Some(said) = self.said(room, signal, to_self) {
                    let mut actions = Vec::new();
                    self.rooms[room].peer.handle(peer, said, relay, now, &mut actions);
                    self.act(now, room, actions);
                }
            }
        }
    }

    /// What a signal says, its description opened; `None` where it says nothing to us.
    fn said(&self, room: usize, signal: Signal, to_self: bool) -> Option<Said> {
        match (signal, to_self) {
            (Signal::Announce { .. }, false) => Some(Said::Announce),
            (Signal::Bye { .. }, false) => Some(Said::Bye),
            (Signal::Offer { sdp, .. }, true) => Some(Said::Offer { sdp: self.open(room, &sdp)? }),
            (Signal::Answer { sdp, .. }, true) => Some(Said::Answer { sdp: self.open(room, &sdp)? }),
            // Said on a topic where it means nothing.
            _ => None,
        }
    }

    fn is_known_event(&mut self, id: String) -> bool {
        if !self.state.seen.insert(id.clone()) {
            return true;
        }
        self.state.seen_order.push_back(id);
        if self.state.seen_order.len() > REMEMBERED_EVENTS
            && let Some(oldest) = self.state.seen_order.pop_front()
        {
            self.state.seen.remove(&oldest);
        }
        false
    }

    fn act(&mut self, now: Instant, room: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Announce => {
                    let MeshRoom { root, peer, .. } = &self.rooms[room];
                    self.signalling.publish(None, root, &Signal::Announce { peer: peer.id() });
                }
                Action::Dial { peer, relay } => self.dial(now, room, peer, relay),
                Action::Accept { peer, relay, sdp } => self.accept(now, room, peer, relay, &sdp),
                Action::Complete { peer, link, sdp } => self.complete(now, room, peer, link, &sdp),
                Action::Drop { link, why } => self.drop_link(link, why),
                Action::Joined { peer, link } => self.joined(room, peer, link),
                Action::Left { peer } => {
                    tracing::debug!(room = %self.rooms[room].name, %peer, "a peer has left");
                }
            }
        }
        self.handle_events(now);
    }

    fn dial(&mut self, now: Instant, room: usize, peer: PeerId, relay: RelayIndex) {
        if self.links.len() >= self.max_links {
            return;
        }
        let candidates = self.addresses.candidates();
        match Link::offer(now, self.certificate.clone(), candidates, self.listening(room)) {
            Ok((link, sdp)) => {
                let link = self.add_link(now, room, peer, link);
                let MeshRoom { room: name, key, peer: us, .. } = &mut self.rooms[room];
                us.dialled(peer, link, now);
                let signal = Signal::Offer { peer: us.id(), sdp: seal(key, &sdp), superpeer: true };
                self.signalling.publish(Some(relay), &name.self_topic(&peer), &signal);
            }
            Err(error) => tracing::warn!(%error, "cannot dial"),
        }
    }

    fn accept(&mut self, now: Instant, room: usize, peer: PeerId, relay: RelayIndex, offer: &str) {
        if self.links.len() >= self.max_links {
            return;
        }
        let candidates = self.addresses.candidates();
        match Link::answer(now, self.certificate.clone(), candidates, self.listening(room), offer) {
            Ok((link, sdp)) => {
                let link = self.add_link(now, room, peer, link);
                let MeshRoom { room: name, key, peer: us, .. } = &mut self.rooms[room];
                us.accepted(peer, link, now);
                let signal = Signal::Answer { peer: us.id(), sdp: seal(key, &sdp) };
                self.signalling.publish(Some(relay), &name.self_topic(&peer), &signal);
            }
            Err(error) => self.refuse_description(&error),
        }
    }

    fn complete(&mut self, now: Instant, room: usize, peer: PeerId, link: LinkId, answer: &str) {
        let Some(dialled) = self.links.get_mut(link) else { return };
        let accepted = dialled.accept_answer(answer);
        if let Err(error) = accepted {
            self.refuse_description(&error);
            return;
        }
        tracing::trace!(room = %self.rooms[room].name, %peer, "a peer has answered");
        self.links.touch(now, link);
    }

    /// Opens a sealed description; what does not open was sealed with another password, or by nobody.
    fn open(&self, room: usize, sealed: &SealedDescription) -> Option<String> {
        match self.rooms[room].key.open(&sealed.0) {
            Ok(sdp) => Some(sdp),
            Err(error) => {
                self.metrics.link_outcomes.with_label_values(&["wrong_password"]).inc();
                tracing::debug!(room = %self.rooms[room].name, %error, "a description did not open");
                None
            }
        }
    }

    /// What the links of a room listen to: the application's own messages are not for us.
    fn listening(&self, room: usize) -> Listening {
        let channel = self.rooms[room].archive.map(|_| ChannelName::SYNC_GRAPH);
        Listening { channel, limits: self.limits }
    }

    fn refuse_description(&self, error: &crate::link::DescriptionError) {
        self.metrics.refused.with_label_values(&["description"]).inc();
        tracing::debug!(error = ?error.to_string(), "a description was refused");
    }

    fn add_link(&mut self, now: Instant, room: usize, peer: PeerId, link: Link) -> LinkId {
        let id = self.links.add(now, link);
        self.state.owners.insert(id, Owner { room, peer, made: now, opened: false, sent: None });
        id
    }

    /// Ends a link that the room no longer wants.
    fn drop_link(&mut self, link: LinkId, why: Why) {
        let Some(owner) = self.state.owners.remove(&link) else { return };
        if owner.opened {
            self.metrics.disconnects.with_label_values(&[why.label()]).inc();
        } else {
            self.metrics.link_outcomes.with_label_values(&["failed"]).inc();
        }
        self.links.close(link, CloseReason::Left, &mut self.state.events);
        self.links.remove(link);
        self.count_links(owner.room);
    }

    fn count_links(&self, room: usize) {
        let name = &self.rooms[room].name;
        let open: usize =
            self.rooms.iter().filter(|other| other.name == *name).map(|other| other.peer.open_links()).sum();
        self.metrics.links.with_label_values(&[name]).set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// A peer is here: ask it for what we lack (wire §4).
    fn joined(&mut self, room: usize, peer: PeerId, link: LinkId) {
        self.count_links(room);
        let MeshRoom { archive, latest, name, .. } = &self.rooms[room];
        tracing::debug!(room = %name, %peer, "a peer has joined");
        if archive.is_some() {
            let question = sync_message(*latest);
            self.send(link, question);
        }
    }

    fn send(&mut self, link: LinkId, message: Message) {
        if let Some(link) = self.links.get_mut(link) {
            self.metrics.messages.with_label_values(&["out"]).inc();
            self.metrics
                .message_bytes
                .with_label_values(&["out"])
                .inc_by(u64::try_from(message.len()).unwrap_or(u64::MAX));
            link.send(message);
        }
        self.links.drive(link, &mut self.state.events);
    }

    fn handle_events(&mut self, now: Instant) {
        while !self.state.events.is_empty() {
            for (link, output) in std::mem::take(&mut self.state.events) {
                self.handle_event(now, link, output);
            }
        }
    }

    fn handle_event(&mut self, now: Instant, link: LinkId, output: LinkOutput) {
        let Some(owner) = self.state.owners.get_mut(&link) else { return };
        let (room, peer) = (owner.room, owner.peer);
        match output {
            LinkOutput::Opened => {
                owner.opened = true;
                self.metrics.link_outcomes.with_label_values(&["opened"]).inc();
                self.metrics.link_open_seconds.observe((now - owner.made).as_secs_f64());
                let mut actions = Vec::new();
                self.rooms[room].peer.link_opened(peer, link, &mut actions);
                self.act_later(now, room, actions);
            }
            LinkOutput::Message { channel, content, bytes } => {
                self.metrics.messages.with_label_values(&["in"]).inc();
                let counted = u64::try_from(bytes).unwrap_or(u64::MAX);
                self.metrics.message_bytes.with_label_values(&["in"]).inc_by(counted);
                self.handle_message(room, link, channel, content, bytes);
            }
            LinkOutput::Refused(what) => {
                let label = match what {
                    Refused::Frame => "frame",
                    Refused::Message => "message",
                };
                self.metrics.refused.with_label_values(&[label]).inc();
            }
            LinkOutput::Closed(reason) => {
                if owner.opened {
                    self.metrics.disconnects.with_label_values(&[reason.label()]).inc();
                } else {
                    self.metrics.link_outcomes.with_label_values(&["failed"]).inc();
                }
                tracing::debug!(room = %self.rooms[room].name, %peer, reason = reason.label(), "a link has ended");
                self.state.owners.remove(&link);
                self.links.remove(link);
                let mut actions = Vec::new();
                self.rooms[room].peer.link_closed(peer, link, &mut actions);
                self.act_later(now, room, actions);
                self.count_links(room);
            }
            LinkOutput::Transmit { .. } | LinkOutput::Timeout(_) => {}
        }
    }

    /// Acts from within [`Mesh::handle_events`], which goes on with what follows.
    fn act_later(&mut self, now: Instant, room: usize, actions: Vec<Action>) {
        let pending = std::mem::take(&mut self.state.events);
        self.act(now, room, actions);
        self.state.events.splice(0..0, pending);
    }

    fn handle_message(&mut self, room: usize, link: LinkId, channel: ChannelName, content: Content, bytes: usize) {
        let Some(archive) = self.rooms[room].archive.filter(|_| channel == ChannelName::SYNC_GRAPH) else { return };
        let batch = match content {
            Content::Json(text) => Batch::parse(&text).ok(),
            Content::Text(_) | Content::Binary { .. } => None,
        };
        let Some(Batch { operations, malformed }) = batch else {
            self.metrics.refused.with_label_values(&["message"]).inc();
            if let Some(link) = self.links.get_mut(link) {
                link.refuse(Refused::Message);
            }
            return;
        };
        self.metrics.refused.with_label_values(&["operation"]).inc_by(u64::try_from(malformed).unwrap_or(u64::MAX));
        let sent = self.state.owners.get(&link).and_then(|owner| owner.sent);
        let (questions, changes): (Vec<Operation>, Vec<Operation>) =
            operations.into_iter().partition(|operation| matches!(operation, Operation::Sync(_)));
        if !changes.is_empty() && !self.archive.merge(archive, link, changes, wall_ms(), bytes) {
            tracing::debug!(room = %self.rooms[room].name, "the archive is too busy for a message");
        }
        // One answer is enough, however often the question stands in one message.
        if let Some(Operation::Sync(Sync { timestamp, .. })) = questions.into_iter().next() {
            self.archive.answer(archive, link, Known { timestamp, sent });
        }
    }

    fn handle_reply(&mut self, reply: Reply) {
        let now = Instant::now();
        match reply {
            Reply::Send { link, message, sent } => {
                if let Some(owner) = self.state.owners.get_mut(&link) {
                    owner.sent = Some(sent);
                    self.send(link, message);
                }
            }
            Reply::Latest { room, latest } => {
                for one in self.rooms.iter_mut().filter(|one| one.archive == Some(room)) {
                    one.latest = Some(latest);
                }
            }
            Reply::Missed { room } => {
                let links: Vec<LinkId> = self
                    .rooms
                    .iter()
                    .filter(|one| one.archive == Some(room))
                    .flat_map(|one| one.peer.links())
                    .collect();
                // "We have nothing": each peer answers with all it has.
                for link in links {
                    self.send(link, sync_message(None));
                }
            }
        }
        self.handle_events(now);
    }

    async fn say_goodbye(mut self) -> Archive {
        let now = Instant::now();
        for room in &self.rooms {
            self.signalling.publish(None, &room.root, &Signal::Bye { peer: room.peer.id() });
        }
        let open: Vec<LinkId> = self.rooms.iter().flat_map(|room| room.peer.links()).collect();
        for link in &open {
            self.send(*link, Message::empty(ChannelName::LEAVE));
        }
        // Let what was sent arrive, within reason.
        let deadline = now + DRAIN;
        while Instant::now() < deadline
            && open.iter().any(|link| self.links.get_mut(*link).is_some_and(|link| !link.is_idle()))
        {
            let wake = self.links.next_deadline().unwrap_or(deadline).min(deadline);
            tokio::select! {
                _ = self.links.readable() => while self.links.receive(Instant::now(), &mut self.state.events) {},
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            self.links.handle_timeouts(Instant::now(), &mut self.state.events);
            self.state.events.clear();
        }
        for link in open {
            self.links.close(link, CloseReason::Left, &mut self.state.events);
        }
        self.signalling.shutdown(DRAIN).await;
        self.archive
    }
}

fn sync_message(timestamp: Option<Hlc>) -> Message {
    let operation = Operation::Sync(Sync { timestamp, extra: Vec::new() });
    Message::new(ChannelName::SYNC_GRAPH, Content::Json(Batch::print(&[operation])))
}

fn seal(key: &SdpKey, sdp: &str) -> SealedDescription {
    let mut iv = [0; 12];
    rand::rng().fill_bytes(&mut iv);
    SealedDescription(key.seal(iv, sdp))
}

/// The time of day, in ms since the Unix epoch.
fn wall_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}
