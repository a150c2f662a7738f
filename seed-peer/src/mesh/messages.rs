//! What comes over links: the graph's operations, and what cells pass on.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use genosdb::envelope::{Envelope, Letter};
use genosdb::operation::Sync;
use genosdb::signature::Identity;
use genosdb::{Batch, CellIndex, ChannelName, Content, Hlc, Message, Operation, PeerId};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use super::room::{MeshRoom, Part};
use super::{Mesh, Owner, RoomId};
use crate::archive::{Asker, Known, Received, Reply, RoomKey};
use crate::link::Refused;
use crate::links::LinkId;
use crate::time_of_day::wall_ms;

/// Operations that may come at once, as seconds of the rate.
const OPERATION_BURST_SECONDS: u32 = 10;
/// For how many peers' operations one may pass on: a bridge does so for all of its cell, and for cells behind it.
pub(super) const PASSED_ON_BY_ONE: u32 = 10;
/// How often a peer is asked for all that it has.
const ASK_FOR_ALL_INTERVAL: Duration = Duration::from_secs(30);
/// Bytes, deflated, of an answer that is sent to everybody in a room.
const MAX_ROOM_ANSWER: usize = 2 << 20;
/// How long a peer may speak as in a full mesh before it is taken to be in one: it may not have sealed its roster.
const MISMATCH_AFTER: Duration = Duration::from_secs(5);

/// How many operations a peer may send. What it sends when it joins, a delta or a whole state, is not meant.
pub(super) struct OperationRate(Option<DefaultDirectRateLimiter>);

impl OperationRate {
    /// So many a second, and ten times as many at once; 0 is without limit.
    pub(super) fn new(per_second: u32) -> Self {
        let rate = NonZeroU32::new(per_second);
        let burst = NonZeroU32::new(per_second.saturating_mul(OPERATION_BURST_SECONDS));
        Self(rate.zip(burst).map(|(rate, burst)| RateLimiter::direct(Quota::per_second(rate).allow_burst(burst))))
    }

    fn allows(&self) -> bool {
        self.0.as_ref().is_none_or(|limiter| limiter.check().is_ok())
    }
}

/// Over which link operations came, and whether its peer has written them. Who wrote what it passes on, only signatures could
/// tell: so it counts as that peer's doing, or whoever forges an origin would spend another's share, or have one without end.
#[derive(Debug, Clone, Copy)]
struct Bearer {
    link: LinkId,
    is_author: bool,
}

/// How a client and the seed disagree on a room.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mismatch {
    /// The client is in cells, the seed in a full mesh.
    ClientInCells,
    /// The client is in a full mesh, the seed in cells.
    ClientInFullMesh,
}

impl Owner {
    fn rate_of(&self, bearer: Bearer) -> &OperationRate {
        if bearer.is_author { &self.rate } else { &self.rate_of_others }
    }
}

impl Mesh {
    pub(super) fn handle_message(
        &mut self,
        now: Instant,
        link: LinkId,
        channel: ChannelName,
        content: Content,
        bytes: usize,
    ) {
        let Some(owner) = self.state.owners.get_mut(&link) else { return };
        let (id, peer) = (owner.room, owner.peer);
        if CellIndex::of_channel(channel).is_some() {
            owner.speaks_cells = true;
            owner.in_full_mesh = false;
            return self.handle_cell_frame(now, id, peer, link, content, bytes);
        }
        let Content::Json(text) = content else { return self.refuse_message(link) };
        let Some(said) = self.handle_graph(now, id, Asker::Link(link), Bearer { link, is_author: true }, &text, bytes)
        else {
            return self.refuse_message(link);
        };
        // Answers go to one peer in cells as well; what is meant for everybody does not.
        let Some(owner) = self.state.owners.get_mut(&link) else { return };
        let for_everybody = said.questions || said.changes;
        if for_everybody && !owner.speaks_cells && owner.opened.is_some_and(|opened| now >= opened + MISMATCH_AFTER) {
            let is_in_cells = self.state.rooms.get(&id).is_some_and(|room| room.cells.is_some());
            if is_in_cells {
                owner.in_full_mesh = true;
                self.mismatch(id, Mismatch::ClientInFullMesh);
            }
        }
    }

    fn refuse_message(&mut self, link: LinkId) {
        self.metrics.refused.with_label_values(&["message"]).inc();
        if let Some(link) = self.links.get_mut(link) {
            link.refuse(Refused::Message);
        }
    }

    /// Says once for each room that clients and the seed disagree, and what to change.
    pub(super) fn mismatch(&mut self, id: RoomId, what: Mismatch) {
        self.metrics.mismatches.inc();
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        if std::mem::replace(&mut room.warned, true) {
            return;
        }
        let name = &room.name;
        match what {
            Mismatch::ClientInCells => tracing::warn!(
                room = %name,
                "a client is in cells (rtc.cells), but the seed is not: give the room cells = true or \
                 cells = {{ cell_size = … }} as in the app, or take them out of the app"
            ),
            Mismatch::ClientInFullMesh => tracing::warn!(
                room = %name,
                "a client is in a full mesh, but the room has cells here: give the app the same rtc.cells, or take \
                 cells out of the room's settings"
            ),
        }
    }

    /// A frame came on a cell's channel.
    fn handle_cell_frame(
        &mut self,
        now: Instant,
        id: RoomId,
        from: PeerId,
        link: LinkId,
        content: Content,
        bytes: usize,
    ) {
        let text = match &content {
            Content::Text(text) | Content::Json(text) => text,
            // Bytes travel behind the envelope that describes them.
            Content::Binary { meta: Some(meta), .. } => meta,
            Content::Binary { meta: None, .. } => return self.metrics.refused.with_label_values(&["message"]).inc(),
        };
        // Later clients may say more on these channels than we understand: that costs nobody the link.
        let Ok(envelope) = Envelope::parse(text) else {
            return self.metrics.refused.with_label_values(&["message"]).inc();
        };
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        let Some(cells) = &mut room.cells else { return };
        let before = cells.next_tick();
        let envelope = cells.receive(from, envelope, now);
        if cells.next_tick() != before {
            self.schedule(id, now);
        }
        let Some(envelope) = envelope else {
            self.metrics.cell_messages.with_label_values(&["seen"]).inc();
            return;
        };
        if let Some(passed_on) = envelope.passed_on() {
            let passed_on = match content {
                Content::Binary { bytes, .. } => Content::Binary { meta: Some(passed_on.print()), bytes },
                Content::Text(_) | Content::Json(_) => Content::Text(passed_on.print()),
            };
            self.pass_on(id, passed_on, &[from, envelope.origin]);
        } else {
            self.metrics.cell_messages.with_label_values(&["expired"]).inc();
        }
        self.read_letter(now, id, link, &envelope, bytes);
    }

    /// Reads what was sent to everybody, the seed among them.
    fn read_letter(&mut self, now: Instant, id: RoomId, link: LinkId, envelope: &Envelope, bytes: usize) {
        match envelope.letter() {
            Letter::Channel { name: ChannelName::SYNC_GRAPH, payload } => {
                let Some(room) = self.state.rooms.get(&id).filter(|room| room.part == Part::Graph) else { return };
                let is_author = self.state.owners.get(&link).is_some_and(|owner| owner.peer == envelope.origin);
                let bearer = Bearer { link, is_author };
                // Who is linked is answered alone.
                let asker = room.link_to(&envelope.origin).map_or(Asker::Room(id), Asker::Link);
                if self.handle_graph(now, id, asker, bearer, payload.as_str(), bytes).is_none() {
                    self.refuse_message(link);
                }
            }
            Letter::Ping { id: ping_id, target } => {
                let Some(room) = self.state.rooms.get_mut(&id) else { return };
                if let Some(cells) = room.cells.as_mut().filter(|cells| cells.ours().contains(&target)) {
                    let pong = cells.pong(target, wall_ms(), &ping_id);
                    self.pass_on(id, Content::Text(pong.print()), &[]);
                }
            }
            Letter::Channel { .. } | Letter::Bare | Letter::Other => {}
        }
    }

    /// Sends a message for everybody to each linked peer, once, but for those `except`.
    fn pass_on(&mut self, id: RoomId, content: Content, except: &[PeerId]) {
        let Some(room) = self.state.rooms.get(&id) else { return };
        let Some(cells) = &room.cells else { return };
        let is_ours = except.is_empty();
        let changing = room.roster.is_changing();
        let mut targets: HashMap<PeerId, (PeerId, LinkId)> = HashMap::new();
        for (us, peer, link) in room.links() {
            if except.contains(&peer) || !(is_ours || cells.passes_on(&us, changing)) {
                continue;
            }
            // Of several ids that could reach a peer, the one in its own cell.
            let best = targets.entry(peer).or_insert((us, link));
            if cells.is_in_cell_of(&us, &peer) {
                *best = (us, link);
            }
        }
        let targets: Vec<(ChannelName, LinkId)> = targets
            .into_iter()
            .flat_map(|(peer, (_, link))| cells.channels_to(&peer).map(move |on| (on, link)))
            .collect();
        let Some((first, _)) = targets.first() else { return };
        let message = Message::new(*first, content);
        let counted = u64::try_from(targets.len()).unwrap_or(u64::MAX);
        self.metrics.cell_messages.with_label_values(&["sent"]).inc_by(counted);
        for (channel, link) in targets {
            self.send(link, message.on(channel));
        }
    }

    fn owner_of(&self, asker: Asker) -> Option<&Owner> {
        match asker {
            Asker::Link(link) => self.state.owners.get(&link),
            Asker::Room(_) | Asker::Linked(_) => None,
        }
    }

    /// Takes in a message of operations. Returns what it was about; `None` when it is not one.
    fn handle_graph(
        &mut self,
        now: Instant,
        id: RoomId,
        asker: Asker,
        bearer: Bearer,
        text: &str,
        bytes: usize,
    ) -> Option<Said> {
        let is_ruled = self.state.rooms.get(&id)?.is_ruled;
        let (operations, malformed) = Batch::parse_with_text(text).ok()?;
        self.metrics.refused.with_label_values(&["operation"]).inc_by(u64::try_from(malformed).unwrap_or(u64::MAX));
        let archive = self.state.rooms.get(&id)?.archive;
        let sent = self.owner_of(asker).and_then(|owner| owner.sent);
        let rate = self.state.owners.get(&bearer.link).map(|owner| owner.rate_of(bearer));
        let (questions, mut changes): (Vec<_>, Vec<_>) =
            operations.into_iter().partition(|(operation, _)| matches!(operation, Operation::Sync(_)));
        let is_live = |(operation, _): &(Operation, &str)| {
            matches!(operation, Operation::Upsert(_) | Operation::Remove(_) | Operation::Link(_))
        };
        let said = Said { questions: !questions.is_empty(), changes: changes.iter().any(is_live) };
        let received = changes.len();
        changes.retain(|change| !is_live(change) || rate.is_none_or(OperationRate::allows));
        let too_fast = u64::try_from(received - changes.len()).unwrap_or(u64::MAX);
        self.metrics.operations.with_label_values(&["too_fast"]).inc_by(too_fast);
        if too_fast > 0
            && self.state.notices.is_due(id, now)
            && let Some(room) = self.state.rooms.get(&id)
        {
            tracing::warn!(
                room = %room.name,
                "a peer sends operations faster than seed.operations_per_second allows: some are left out"
            );
        }
        if let Asker::Link(link) = asker
            && let Some(owner) = self.state.owners.get_mut(&link)
        {
            changes.iter().for_each(|(operation, _)| owner.heard.hear(operation));
        }
        let is_empty = changes.is_empty();
        let changes = if is_ruled {
            Received::WithText(changes.into_iter().map(|(operation, text)| (operation, text.to_owned())).collect())
        } else {
            Received::Plain(changes.into_iter().map(|(operation, _)| operation).collect())
        };
        if !is_empty && !self.archive.merge(archive, asker, changes, wall_ms(), bytes) {
            tracing::debug!(?archive, "the archive is too busy for a message");
        }
        // One answer is enough, however often the question stands in one message.
        let may_ask = self.state.owners.get(&bearer.link).is_none_or(|owner| owner.rate_of(bearer).allows());
        if may_ask && let Some((Operation::Sync(Sync { timestamp, .. }), _)) = questions.into_iter().next() {
            self.ask_archive(now, asker, id, Known { timestamp, sent });
        }
        Some(said)
    }

    /// Sends the state of a room in cells to linked peers that have not asked for it. A client asks everybody when it
    /// is joined; as long as its roster holds nobody, that may reach no one.
    pub(super) fn answer_the_silent(&mut self, id: RoomId) {
        let Some(room) = self.state.rooms.get(&id).filter(|room| room.part == Part::Graph) else { return };
        for (_, _, link) in room.links() {
            if let Some(owner) = self.state.owners.get_mut(&link).filter(|owner| !owner.asked) {
                owner.asked = true;
                self.archive.answer(room.archive, Asker::Link(link), Known { timestamp: None, sent: None });
            }
        }
    }

    /// Asks one peer of each cell for what the seed lacks. While rosters differ, peers disagree on channels and bridges,
    /// and what they send may not leave their cell; nobody would ask for it before the next peer joins. Answers go to
    /// everybody (wire §4), so this mends the others as well.
    pub(super) fn ask_around(&mut self, id: RoomId) {
        let Some(room) = self.state.rooms.get(&id).filter(|room| room.part == Part::Graph) else { return };
        let Some(cells) = &room.cells else { return };
        let asked = cells.one_of_each_cell(room.links().map(|(_, peer, link)| (peer, link)));
        let question = sync_message(room.latest, self.identity.as_deref());
        for link in asked {
            self.send(link, question.clone());
        }
    }

    /// Sends each linked peer that `is_meant` what came since it was last sent something. What crossed between cells while
    /// rosters differed was dropped by who took itself to be in another; this comes on the link itself, and counts whatever
    /// the cell.
    pub(super) fn bring_up_to_date(&mut self, now: Instant, id: RoomId, is_meant: impl Fn(&PeerId) -> bool) {
        let Some(room) = self.state.rooms.get(&id).filter(|room| room.part == Part::Graph) else { return };
        // Several of our ids may be linked with a peer: it has what came over any of them.
        let mut peers: HashMap<PeerId, (u64, LinkId)> = HashMap::new();
        for (_, peer, link) in room.links().filter(|(_, peer, _)| is_meant(peer)) {
            if let Some(sent) = self.state.owners.get(&link).and_then(|owner| owner.sent) {
                let most = peers.entry(peer).or_insert((sent, link));
                *most = (*most).max((sent, link));
            }
        }
        let logged = room.logged;
        let behind = peers.into_values().filter(|(sent, _)| *sent < logged).map(|(_, link)| link).collect();
        self.catch_up(now, id, behind);
    }

    fn ask_archive(&mut self, now: Instant, asker: Asker, id: RoomId, known: Known) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        let known = match asker {
            Asker::Link(link) => {
                if let Some(owner) = self.state.owners.get_mut(&link) {
                    owner.asked = true;
                }
                Some(known)
            }
            Asker::Room(_) | Asker::Linked(_) => room.room_answers.asked(known, now),
        };
        let archive = room.archive;
        if let Some(known) = known {
            self.archive.answer(archive, asker, known);
        }
        self.schedule(id, now);
    }

    /// Tells the peers of a database what the seed has written.
    fn tell(&mut self, key: RoomKey, message: &Message) {
        let rooms = self.state.rooms.values().filter(|room| room.archive == key && room.part == Part::Graph);
        let rooms: Vec<(RoomId, bool)> = rooms.map(|room| (room.id, room.cells.is_some())).collect();
        for (id, in_cells) in rooms {
            if in_cells {
                self.answer_room(id, std::slice::from_ref(message));
                continue;
            }
            let links: Vec<LinkId> =
                self.state.rooms.get(&id).into_iter().flat_map(|room| room.links().map(|(_, _, link)| link)).collect();
            for link in links {
                self.send(link, message.clone());
            }
        }
    }

    /// Sends the whole state of a database to every linked peer.
    pub(super) fn tell_everything(&mut self, key: RoomKey) {
        let rooms = self.state.rooms.values().filter(|room| room.archive == key && room.part == Part::Graph);
        for (_, _, link) in rooms.flat_map(MeshRoom::links) {
            self.archive.answer(key, Asker::Link(link), Known { timestamp: None, sent: None });
        }
    }

    /// Answers everybody in a room, for one whom no link reaches.
    fn answer_room(&mut self, id: RoomId, messages: &[Message]) {
        for message in messages {
            if message.len() > MAX_ROOM_ANSWER {
                // The members of its own cell have it as well, and who is linked with the seed is answered alone.
                self.metrics.answers.with_label_values(&["withheld"]).inc();
                continue;
            }
            if let Some(payload) = message.json()
                && let Some(cells) = self.state.rooms.get_mut(&id).and_then(|room| room.cells.as_mut())
            {
                let envelope = cells.message(wall_ms(), ChannelName::SYNC_GRAPH, &payload);
                self.pass_on(id, Content::Text(envelope.print()), &[]);
            }
        }
    }

    /// A peer is here: ask it for what we lack (wire §4).
    pub(super) fn joined(&mut self, id: RoomId, peer: PeerId, link: LinkId) {
        self.count_links(id);
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        tracing::debug!(room = %room.name, %peer, "a peer has joined");
        if room.part == Part::Graph {
            let from = room.watermarks.ask_from(&peer, room.latest);
            if let Some(owner) = self.state.owners.get_mut(&link) {
                owner.heard.asked(from);
            }
            self.send(link, sync_message(from, self.identity.as_deref()));
            if let Some(room) = self.state.rooms.get_mut(&id)
                && let Some(governor) = &mut room.governor
            {
                governor.met(Instant::now());
                self.schedule(id, Instant::now());
            }
        }
    }

    pub(super) fn handle_reply(&mut self, reply: Reply) {
        let now = Instant::now();
        match reply {
            Reply::Send { to: Asker::Link(link), messages, sent } => {
                if let Some(owner) = self.state.owners.get_mut(&link) {
                    owner.sent = Some(sent);
                    messages.into_iter().for_each(|message| self.send(link, message));
                }
            }
            Reply::Send { to: Asker::Room(id), messages, .. } => self.answer_room(id, &messages),
            Reply::Send { to: Asker::Linked(id), messages, sent } => self.send_live(now, id, messages, sent),
            Reply::Lacks { link } => {
                // What it was sent before has arrived, or will; a whole state would have it answer with its own again.
                if let Some(owner) = self.state.owners.get(&link) {
                    let (id, sent) = (owner.room, owner.sent);
                    let latest = self.state.rooms.get(&id).and_then(|room| room.latest);
                    self.ask_archive(now, Asker::Link(link), id, Known { timestamp: sent.and(latest), sent });
                }
            }
            Reply::RoomLacks { room } => {
                self.ask_archive(now, Asker::Room(room), room, Known { timestamp: None, sent: None });
            }
            Reply::Latest { room, latest } => {
                for one in self.state.rooms.values_mut().filter(|one| one.archive == room) {
                    one.latest = Some(latest);
                    if let Some(governor) = &mut one.governor {
                        governor.heard(now);
                    }
                }
            }
            Reply::MayLack { link } => {
                if let Some(owner) = self.state.owners.get_mut(&link)
                    && owner.asked_for_all.is_none_or(|at| now >= at + ASK_FOR_ALL_INTERVAL)
                {
                    owner.asked_for_all = Some(now);
                    self.send(link, sync_message(None, self.identity.as_deref()));
                }
            }
            Reply::Logged { room, first, last, over } => self.logged(now, room, first, last, over),
            Reply::Wrote { room, message } => self.tell(room, &message),
            Reply::Missed { room } => {
                let rooms = self.state.rooms.values().filter(|one| one.archive == room && one.part == Part::Graph);
                let links: Vec<LinkId> = rooms.flat_map(|one| one.links().map(|(_, _, link)| link)).collect();
                // "We have nothing": each peer answers with all it has.
                for link in links {
                    self.send(link, sync_message(None, self.identity.as_deref()));
                }
            }
            Reply::Held { room, latest, respond } => self.held(room, latest, respond, now),
            Reply::Opened { config, opened, added, respond } => {
                self.join(config, &opened, added, now);
                // Who asked may have given up waiting.
                let _ = respond.send(Ok(()));
            }
        }
        self.handle_events(now);
    }
}

/// What a message of operations was about.
struct Said {
    /// It asked for what its sender lacks.
    questions: bool,
    /// It told of changes as they happen.
    changes: bool,
}

fn sync_message(timestamp: Option<Hlc>, identity: Option<&Identity>) -> Message {
    let operation = Operation::Sync(Sync { timestamp, extra: Vec::new() }).to_string();
    // What we print is JSON, so it can be signed.
    let signed = identity.and_then(|identity| identity.sign(&operation).ok());
    Message::new(ChannelName::SYNC_GRAPH, Content::Json(format!("[{}]", signed.unwrap_or(operation))))
}
