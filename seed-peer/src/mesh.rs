//! The one task that moves everything between relays, links and archive.

mod checks;
mod databases;
mod linking;
mod live;
mod messages;
mod room;
mod signals;
mod topology;
mod watermarks;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use genosdb::signature::Identity;
use genosdb::{ChannelName, Limits, Message, PeerId, Signal};
use nostr::event::EventId;
use service::RecentSet;
use str0m::config::DtlsCert;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender};
use tokio_util::sync::CancellationToken;

use crate::addresses::Addresses;
use crate::archive::{Archive, Reply};
use crate::check::CheckRoom;
use crate::cluster::{KeeperCommand, Tenure};
use crate::link::{CloseReason, LinkOutput, Refused, Step};
use crate::links::{LinkId, Links};
use crate::metrics::Metrics;
use crate::notices::Notices;
use crate::room::Action;
use crate::rooms::Command;
use crate::signalling::{Heard, RelayIndex, Signalling};
use crate::time_of_day::wall_ms;

pub(crate) use databases::Database;
use messages::OperationRate;
use room::MeshRoom;

/// Event ids that are remembered: the same event comes from every relay that has it.
const REMEMBERED_EVENTS: usize = 4_096;
/// Packets are read in so many batches before something else gets its turn.
const BATCHES_IN_A_ROW: usize = 16;
/// How long a shutdown waits for messages that are on their way.
const DRAIN: Duration = Duration::from_millis(400);
/// Rooms announce themselves so far apart when a relay is reached: with hundreds, all at once would be too much for it.
const ANNOUNCE_SPACING: Duration = Duration::from_millis(3);

/// Names a room for as long as the process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RoomId(pub(crate) u64);

/// Whose link it is.
struct Owner {
    room: RoomId,
    us: PeerId,
    peer: PeerId,
    relay: RelayIndex,
    made: Instant,
    /// When it opened.
    opened: Option<Instant>,
    /// Whether the peer has asked for what it lacks.
    asked: bool,
    /// The log entry up to which the peer was sent everything on this link.
    sent: Option<u64>,
    /// When the peer was asked for all that it has.
    asked_for_all: Option<Instant>,
    /// What came of what the peer knows.
    heard: watermarks::Heard,
    /// Whether the peer has sent a frame on a cell's channel.
    speaks_cells: bool,
    /// Whether the peer is in a full mesh while the room is in cells.
    in_full_mesh: bool,
    /// Operations of the peer's own.
    rate: OperationRate,
    /// Operations of others, which it passes on from cell to cell.
    rate_of_others: OperationRate,
}

/// Everything that the seed is connected to, and what it is made of.
pub(crate) struct Mesh {
    pub(crate) links: Links,
    pub(crate) addresses: Addresses,
    pub(crate) certificate: DtlsCert,
    pub(crate) limits: Limits,
    /// Who signs what the seed sends.
    pub(crate) identity: Option<Arc<Identity>>,
    pub(crate) max_links: usize,
    pub(crate) operations_per_second: u32,
    /// Whether what one peer writes is sent to the others of a full mesh.
    pub(crate) pass_on: bool,
    /// The cluster that rooms are shared with.
    pub(crate) shared: Option<Shared>,
    /// Where links are tried.
    pub(crate) check_room: Option<CheckRoom>,
    pub(crate) signalling: Signalling,
    pub(crate) archive: Archive,
    pub(crate) metrics: Metrics,
    pub(crate) state: State,
}

/// The cluster that rooms are shared with, as the mesh needs it.
pub(crate) struct Shared {
    /// Until when what we hold is ours.
    pub(crate) tenure: Tenure,
    /// Who keeps the leases.
    pub(crate) keeper: UnboundedSender<KeeperCommand>,
}

impl Shared {
    fn tell(&self, command: KeeperCommand) {
        // At shutdown nobody keeps the leases any more.
        let _ = self.keeper.send(command);
    }
}

/// What a mesh learns while it runs.
#[derive(Default)]
pub(crate) struct State {
    /// By name.
    databases: BTreeMap<String, Database>,
    rooms: HashMap<RoomId, MeshRoom>,
    next_room: u64,
    /// When each room is to be looked at.
    deadlines: BTreeSet<(Instant, RoomId)>,
    owners: HashMap<LinkId, Owner>,
    /// Links that are tried, and until when.
    checks: Vec<(LinkId, Instant)>,
    heard: RecentSet<EventId, REMEMBERED_EVENTS>,
    events: Vec<(LinkId, LinkOutput)>,
    /// About peers that are too fast, by room.
    notices: Notices<RoomId>,
}

impl Mesh {
    /// Runs until `stop` is cancelled; then says goodbye and returns the archive, to be closed.
    pub(crate) async fn run(
        mut self,
        mut heard: Receiver<Heard>,
        mut replies: UnboundedReceiver<Reply>,
        mut commands: Receiver<Command>,
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
                    self.end_tenure(now);
                    for _ in 0..BATCHES_IN_A_ROW {
                        if !self.links.receive(now, &mut self.state.events) {
                            break;
                        }
                    }
                    self.handle_events(now);
                }
                Some(reply) = replies.recv() => {
                    self.end_tenure(Instant::now());
                    self.handle_reply(reply);
                }
                Some(heard) = heard.recv() => {
                    self.end_tenure(Instant::now());
                    self.handle_heard(heard);
                }
                Some(command) = commands.recv() => self.handle_command(command),
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            self.handle_time(Instant::now());
        }
        self.say_goodbye().await
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let room = self.state.deadlines.first().map(|(at, _)| *at);
        let wake = room.into_iter().chain(self.links.next_deadline()).chain(self.next_check_end()).min();
        wake.unwrap_or(now + Duration::from_secs(1)).min(now + Duration::from_secs(3600))
    }

    fn handle_time(&mut self, now: Instant) {
        self.end_tenure(now);
        self.links.handle_timeouts(now, &mut self.state.events);
        self.end_checks(now);
        self.handle_events(now);
        while let Some(&(at, room)) = self.state.deadlines.first()
            && at <= now
        {
            self.look_at(room, now);
            self.schedule(room, now);
        }
    }

    /// Puts a room into the queue again, for when it has something to do.
    fn schedule(&mut self, id: RoomId, now: Instant) {
        if let Some(room) = self.state.rooms.get_mut(&id) {
            // Never twice at one moment.
            let at = room.next_tick().max(now + Duration::from_millis(1));
            self.state.deadlines.remove(&(room.deadline, id));
            room.deadline = at;
            self.state.deadlines.insert((at, id));
        } else {
            self.state.deadlines.retain(|(_, other)| *other != id);
        }
    }

    fn look_at(&mut self, id: RoomId, now: Instant) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        if self.metrics.relays_connected.get() > 0 {
            room.roster.look_through(now);
        }
        let mut actions = Vec::new();
        for member in &mut room.members {
            let mut its_actions = Vec::new();
            member.tick(now, &mut its_actions);
            actions.push((member.id(), its_actions));
        }
        let answer = room.room_answers.due(now);
        let (live, behind) = (room.live.due(now), room.live.behind(now));
        let (archive, is_due) = (room.archive, room.roster.is_due(now));
        let governs = room.governor.as_mut().is_some_and(|governor| governor.is_due(now));
        let is_unfinished = room.cells.as_ref().is_some_and(|cells| cells.is_unfinished(now));
        // Where somebody comes or goes, another seal follows.
        let has_settled = !is_due && room.cells.as_mut().is_some_and(|cells| cells.has_settled(now));
        let strays = room.cells.as_mut().map(|cells| cells.strays(now)).unwrap_or_default();
        for (us, actions) in actions {
            self.act(now, id, us, actions);
        }
        if let Some(known) = answer {
            self.archive.answer(archive, crate::archive::Asker::Room(id), known);
        }
        if let Some(first) = live
            && !self.archive.live(archive, id, first)
            && let Some(room) = self.state.rooms.get_mut(&id)
        {
            room.live.sent(first.saturating_sub(1), now);
        }
        self.catch_up(now, id, behind);
        if governs {
            self.archive.govern(archive, wall_ms());
        }
        if is_due || is_unfinished {
            self.seal(id, now);
        }
        if has_settled {
            self.ask_around(id);
            self.bring_up_to_date(now, id, |_| true);
        } else if !strays.is_empty() {
            self.bring_up_to_date(now, id, |peer| strays.contains(peer));
        }
        self.prune(id, now);
        self.count_presence(id);
    }

    fn act(&mut self, now: Instant, room: RoomId, us: PeerId, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Announce => {
                    if let Some(room) = self.state.rooms.get(&room) {
                        self.signalling.publish(None, &room.root, &Signal::Announce { peer: us });
                    }
                }
                Action::Dial { peer, relay } => self.dial(now, room, us, peer, relay),
                Action::Accept { peer, relay, sdp } => self.accept(now, room, us, peer, relay, &sdp),
                Action::Complete { link, sdp, .. } => self.complete(now, link, &sdp),
                Action::Drop { link, why } => self.drop_link(link, why, now),
                Action::Joined { peer, link } => self.joined(room, peer, link),
                Action::Left { peer } => {
                    if let Some(room) = self.state.rooms.get(&room) {
                        tracing::debug!(room = %room.name, %peer, "a peer has left");
                    }
                }
            }
        }
        self.handle_events(now);
    }

    /// Publishes who is there as a number.
    fn count_presence(&self, id: RoomId) {
        if let Some(room) = self.state.rooms.get(&id)
            && room.part == room::Part::Graph
        {
            let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
            self.metrics.present.with_label_values(&[&room.name]).set(number(room.roster.len()));
            if let Some(cells) = &room.cells {
                self.metrics.cells.with_label_values(&[&room.name]).set(number(cells.total_cells()));
                self.metrics.bridged_cells.with_label_values(&[&room.name]).set(number(cells.bridged()));
            }
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
        if self.is_of_check(link, &output) {
            return;
        }
        let Some(owner) = self.state.owners.get_mut(&link) else { return };
        let (id, us, peer) = (owner.room, owner.us, owner.peer);
        match output {
            LinkOutput::Step(step) => {
                let took = now.saturating_duration_since(owner.made).as_secs_f64();
                self.metrics.link_step_seconds.with_label_values(&[step.label()]).observe(took);
            }
            LinkOutput::Opened => {
                owner.opened = Some(now);
                if let Some(link) = self.links.get_mut(link) {
                    self.metrics.link_paths.with_label_values(&[link.remote_candidate_type()]).inc();
                }
                self.metrics.link_outcomes.with_label_values(&["opened"]).inc();
                self.metrics.link_open_seconds.observe((now - owner.made).as_secs_f64());
                let relay = owner.relay;
                let mut actions = Vec::new();
                if let Some(room) = self.state.rooms.get_mut(&id) {
                    room.roster.linked(peer, relay, now);
                    if let Some(member) = room.member(us) {
                        member.link_opened(peer, link, &mut actions);
                    }
                }
                self.act_later(now, id, us, actions);
                self.schedule(id, now);
            }
            LinkOutput::Message { channel, content, bytes } => {
                self.metrics.messages.with_label_values(&["in"]).inc();
                let counted = u64::try_from(bytes).unwrap_or(u64::MAX);
                self.metrics.message_bytes.with_label_values(&["in"]).inc_by(counted);
                self.handle_message(now, link, channel, content, bytes);
            }
            LinkOutput::SpeaksCells => self.mismatch(id, messages::Mismatch::ClientInCells),
            LinkOutput::Refused(what) => {
                let label = match what {
                    Refused::Frame => "frame",
                    Refused::Message => "message",
                };
                self.metrics.refused.with_label_values(&[label]).inc();
            }
            LinkOutput::Closed(reason) => {
                let Some(owner) = self.state.owners.remove(&link) else { return };
                let step = self.links.get_mut(link).and_then(|link| link.step());
                self.links.remove(link);
                if owner.opened.is_some() {
                    self.metrics.disconnects.with_label_values(&[reason.label()]).inc();
                    let died = matches!(reason, CloseReason::Silent | CloseReason::Failed);
                    self.unlinked(&owner, died, now);
                } else {
                    self.metrics.link_outcomes.with_label_values(&[Step::outcome_without_next(step)]).inc();
                }
                let mut actions = Vec::new();
                if let Some(room) = self.state.rooms.get_mut(&id) {
                    tracing::debug!(room = %room.name, %peer, reason = reason.label(), "a link has ended");
                    if let Some(member) = room.member(us) {
                        member.link_closed(peer, link, &mut actions);
                    }
                }
                self.act_later(now, id, us, actions);
                self.count_links(id);
                self.schedule(id, now);
            }
            LinkOutput::Transmit { .. } | LinkOutput::Timeout(_) => {}
        }
    }

    /// Acts from within [`Mesh::handle_events`], which goes on with what follows.
    fn act_later(&mut self, now: Instant, room: RoomId, us: PeerId, actions: Vec<Action>) {
        let pending = std::mem::take(&mut self.state.events);
        self.act(now, room, us, actions);
        self.state.events.splice(0..0, pending);
    }

    async fn say_goodbye(mut self) -> Archive {
        let now = Instant::now();
        for room in self.state.rooms.values() {
            for us in room.ours() {
                self.signalling.publish(None, &room.root, &Signal::Bye { peer: us });
            }
        }
        let open: Vec<LinkId> =
            self.state.rooms.values().flat_map(|room| room.links().map(|(_, _, link)| link)).collect();
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
