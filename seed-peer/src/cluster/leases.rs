//! Who holds which room, as state: what stands in the bucket comes in, what is to be written there goes out.
//!
//! Each instance writes a record of itself every second, over its own last one and no other. A room is leased to a session
//! of an instance: from when the instance is first alive until somebody writes over its record. Whoever has not managed
//! to write its record for [`TENURE`] holds nothing any more, by its own clock. Whoever has not seen a record change for
//! [`SILENCE`], which is longer, marks it as dead, over the very record it has seen: if the other is alive after all and
//! has written meanwhile, that fails. So two never hold a room at once, however late anything arrives, as long as clocks
//! run at one speed but for a few per cent.

use std::collections::BTreeMap;
#[cfg(test)]
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::bucket::{InstanceRecord, Key, LeaseRecord, OfferRecord, PinRecord, RoomHash};

/// How often an instance says that it is alive.
const BEAT: Duration = Duration::from_secs(1);
/// For so long after it was last able to say so, an instance holds what it holds.
const TENURE: Duration = Duration::from_secs(7);
/// An instance that has not said so for so long, as far as another can see, is marked as dead by that other.
const SILENCE: Duration = Duration::from_millis(7_500);
/// So many records of one's own must have come back meanwhile: else it is oneself that is cut off, or the bucket.
const OWN_BEATS: u32 = 3;
/// An instance that has been alive for so many beats is there to stay, so that rooms are moved to it.
const SETTLED_BEATS: u32 = 3;
/// A room that nobody has taken for so long is taken by whoever can.
const UNTAKEN: Duration = Duration::from_secs(4);
/// A room is not moved again for so long, unless its holder is gone.
const REST: Duration = Duration::from_secs(5);
/// A room that could not be entered is left to others for so long.
const UNABLE: Duration = Duration::from_secs(10);
/// How long an answer of the bucket is waited for.
pub(super) const WRITE_PATIENCE: Duration = Duration::from_secs(2);

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Write over the record of revision `expected` (0: there is none yet), and over no other.
    Write { key: Key, value: String, expected: u64 },
    /// Bring the room up to date and enter it.
    Enter(RoomHash),
    /// Leave the room, or stop entering it.
    Exit(RoomHash),
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrote {
    /// It stands under this revision.
    Done(u64),
    /// Something else was written meanwhile.
    Conflict,
    /// Nobody knows.
    Unknown,
}

/// An instance as it was last seen.
#[derive(Debug)]
struct Instance {
    record: InstanceRecord,
    revision: u64,
    /// When its record last changed, by our clock.
    seen: Instant,
    /// How often it changed in this session.
    beats: u32,
    /// How often our own changed since.
    own_beats: u32,
}

#[derive(Debug)]
struct Lease {
    record: LeaseRecord,
    revision: u64,
    changed: Instant,
}

/// What we are to a room that we could hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is another's, or nobody's.
    Standby,
    /// The lease is being written. That it seems to be ours is not enough: what gave it back may be on its way.
    Claiming,
    /// It was written, and is ours.
    Granted,
    /// It is ours: entered, or about to be.
    Held,
    /// It is being left; then it is given back if it is still ours.
    Leaving,
    /// It is being given back.
    Releasing,
}

#[derive(Debug)]
struct Offered {
    name: String,
    operations: u64,
    standing: Standing,
    /// Until when it is left to others.
    unable: Option<Instant>,
}

/// Everything that one instance knows of the leases.
#[derive(Debug)]
pub(super) struct Leases {
    us: String,
    /// Makes sessions of this process unlike those of others.
    process: String,
    sessions: u64,
    beat: u64,
    instances: BTreeMap<String, Instance>,
    offers: BTreeMap<String, (OfferRecord, u64)>,
    leases: BTreeMap<RoomHash, Lease>,
    pins: BTreeMap<RoomHash, (PinRecord, u64)>,
    ours: BTreeMap<RoomHash, Offered>,
    /// Whether all that stands in the bucket has been seen.
    is_complete: bool,
    /// When the last record of ours that is known to stand was sent.
    renewed: Option<Instant>,
    next_beat: Option<Instant>,
    /// The newest of our own records that came back, and when: as it does, so does what others write.
    own_seen: Option<(u64, Instant)>,
    /// Writes whose end is not known yet.
    writing: BTreeMap<Key, Instant>,
    /// Whether we give everything back.
    retiring: bool,
    /// Whether we can take rooms: not while our own disk refuses.
    is_fit: bool,
    /// When somebody else was last found to write our record.
    contested: Option<Instant>,
}

impl Leases {
    /// The leases as the instance `us` sees them; `process` is unlike that of any other process.
    pub(super) fn new(us: String, process: String) -> Self {
        Self {
            us,
            process,
            sessions: 0,
            beat: 0,
            instances: BTreeMap::new(),
            offers: BTreeMap::new(),
            leases: BTreeMap::new(),
            pins: BTreeMap::new(),
            ours: BTreeMap::new(),
            is_complete: false,
            renewed: None,
            next_beat: None,
            own_seen: None,
            writing: BTreeMap::new(),
            retiring: false,
            is_fit: true,
            contested: None,
        }
    }

    fn session(&self) -> String {
        format!("{}-{}", self.process, self.sessions)
    }

    /// Until when what we hold is ours, by our clock.
    pub(super) fn tenure(&self) -> Option<Instant> {
        self.renewed.map(|at| at + TENURE)
    }

    fn is_tenant(&self, now: Instant) -> bool {
        self.tenure().is_some_and(|end| now < end)
    }

    /// We could hold a room, of which we have so many operations.
    pub(super) fn offer(&mut self, name: &str, operations: u64) {
        let offered = Offered { name: name.to_owned(), operations, standing: Standing::Standby, unable: None };
        self.ours.entry(RoomHash::of(name)).or_insert(offered).operations = operations;
    }

    /// We no longer want to hold a room; it was left already.
    pub(super) fn withdraw(&mut self, name: &str) {
        self.ours.remove(&RoomHash::of(name));
    }

    /// Give everything back, and be no longer there.
    pub(super) fn retire(&mut self) {
        self.retiring = true;
    }

    /// Whether everything was given back.
    pub(super) fn is_retired(&self) -> bool {
        let ours = self.instances.get(&self.us);
        self.retiring
            && (ours.is_none_or(|ours| ours.record.session != self.session() || !ours.record.alive)
                || self.renewed.is_none())
    }

    /// Whether we can take rooms now.
    pub(super) fn set_fit(&mut self, is_fit: bool) {
        self.is_fit = is_fit;
    }

    /// Whether another process seems to have our name.
    pub(super) fn is_contested(&self, now: Instant) -> bool {
        self.contested.is_some_and(|at| now < at + Duration::from_secs(60))
    }

    /// All that stands in the bucket has been seen.
    pub(super) fn complete(&mut self) {
        self.is_complete = true;
    }

    /// A room that was to be left is left.
    pub(super) fn exited(&mut self, room: &RoomHash) {
        if let Some(offered) = self.ours.get_mut(room).filter(|offered| offered.standing == Standing::Leaving) {
            offered.standing = Standing::Releasing;
        }
    }

    /// A room that was to be entered cannot be, and is out of it.
    pub(super) fn unable(&mut self, room: &RoomHash, now: Instant) {
        if let Some(offered) = self.ours.get_mut(room) {
            offered.unable = Some(now + UNABLE);
            if offered.standing == Standing::Held {
                offered.standing = Standing::Releasing;
            }
        }
    }

    /// Who holds what, and who is alive: for people.
    pub(super) fn overview(&self) -> Vec<(String, Option<String>)> {
        let holder = |lease: &Lease| self.holder(lease).map(|(name, _)| name.clone());
        self.leases.values().map(|lease| (lease.record.room.clone(), holder(lease))).collect()
    }

    /// Instances that are alive as far as we see.
    pub(super) fn alive(&self) -> Vec<String> {
        self.instances.iter().filter(|(_, one)| one.record.alive).map(|(name, _)| name.clone()).collect()
    }

    /// How many rooms we hold, and how many we could.
    pub(super) fn counts(&self) -> (usize, usize) {
        let held = self.ours.values().filter(|offered| offered.standing == Standing::Held).count();
        (held, self.ours.len())
    }

    /// When our own record last came back.
    pub(super) fn own_seen(&self) -> Option<Instant> {
        self.own_seen.map(|(_, at)| at)
    }

    /// Whether a record of ours was sent at `since` or later, and stands.
    pub(super) fn renewed_since(&self, since: Instant) -> bool {
        self.renewed.is_some_and(|at| at >= since)
    }

    /// What has come from the bucket, in the order in which it was written: what stands under a key since `revision`.
    pub(super) fn entry(&mut self, key: &Key, value: &[u8], revision: u64, now: Instant) {
        if *key == Key::Instance(self.us.clone()) && revision > self.own_seen.map_or(0, |(seen, _)| seen) {
            self.own_seen = Some((revision, now));
            self.instances.values_mut().for_each(|other| other.own_beats = other.own_beats.saturating_add(1));
        }
        self.learn(key, value, revision, now);
    }

    fn learn(&mut self, key: &Key, value: &[u8], revision: u64, now: Instant) {
        match key {
            Key::Instance(name) => {
                let Ok(record) = serde_json::from_slice::<InstanceRecord>(value) else { return };
                self.instance(name, record, revision, now);
            }
            Key::Offers(name) => {
                let record = serde_json::from_slice(value).unwrap_or_default();
                if self.offers.get(name).is_none_or(|(_, known)| *known < revision) {
                    self.offers.insert(name.clone(), (record, revision));
                }
            }
            Key::Lease(room) => {
                let Ok(record) = serde_json::from_slice::<LeaseRecord>(value) else { return };
                if self.leases.get(room).is_none_or(|known| known.revision < revision) {
                    self.leases.insert(room.clone(), Lease { record, revision, changed: now });
                }
            }
            Key::Pin(room) => {
                let record = serde_json::from_slice(value).unwrap_or(PinRecord { instance: None });
                if self.pins.get(room).is_none_or(|(_, known)| *known < revision) {
                    self.pins.insert(room.clone(), (record, revision));
                }
            }
        }
    }

    fn instance(&mut self, name: &str, record: InstanceRecord, revision: u64, now: Instant) {
        let known = self.instances.get(name);
        if known.is_some_and(|known| known.revision >= revision) {
            return;
        }
        let beats = known.filter(|known| known.record.session == record.session).map_or(0, |known| known.beats + 1);
        let is_another = record.session != self.session() || !(record.alive || self.retiring);
        if name == self.us && is_another && self.renewed.take().is_some() {
            self.sessions += 1;
            self.contested = record.alive.then_some(now);
        }
        self.instances.insert(name.to_owned(), Instance { record, revision, seen: now, beats, own_beats: 0 });
    }

    /// A write that was sent at `sent` has come to an end.
    pub(super) fn wrote(&mut self, key: &Key, value: &str, wrote: Wrote, sent: Instant, now: Instant) {
        self.writing.remove(key);
        if let Wrote::Done(revision) = wrote {
            self.learn(key, value.as_bytes(), revision, now);
        }
        match key {
            Key::Instance(name) if *name == self.us => match wrote {
                Wrote::Done(_) => self.renewed = Some(sent),
                // Somebody took us for dead, or what we sent before has arrived after all: which of both, the bucket says. What
                // we hold is ours to the end of our tenure in any case: nobody writes over a record before.
                Wrote::Conflict | Wrote::Unknown => {}
            },
            Key::Lease(room) => {
                let is_ours = self.is_ours(room);
                let Some(offered) = self.ours.get_mut(room) else { return };
                match (offered.standing, wrote) {
                    (Standing::Claiming, Wrote::Done(_)) if is_ours => offered.standing = Standing::Granted,
                    // Where nobody knows, it is tried again, and then known.
                    (Standing::Claiming, _) => offered.standing = Standing::Standby,
                    (Standing::Releasing, Wrote::Done(_) | Wrote::Conflict) => offered.standing = Standing::Standby,
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// Who holds a lease, if whoever stands there is still alive.
    fn holder<'a>(&self, lease: &'a Lease) -> Option<&'a (String, String)> {
        let holder = lease.record.holder.as_ref()?;
        let instance = self.instances.get(&holder.0)?;
        (instance.record.alive && instance.record.session == holder.1).then_some(holder)
    }

    fn is_ours(&self, room: &RoomHash) -> bool {
        let holder = self.leases.get(room).and_then(|lease| lease.record.holder.as_ref());
        holder.is_some_and(|(name, session)| *name == self.us && *session == self.session())
    }

    /// Who should hold a room, of those who are alive and could.
    fn chosen(&self, room: &RoomHash) -> Option<&str> {
        let mut able: Vec<(&str, u64)> = Vec::new();
        for (name, instance) in &self.instances {
            let offered = self.offers.get(name).and_then(|(offers, _)| offers.rooms.get(room));
            if let Some(operations) = offered.filter(|_| instance.record.alive) {
                able.push((name, *operations));
            }
        }
        let pinned = self.pins.get(room).and_then(|(pin, _)| pin.instance.as_deref());
        if let Some((name, _)) = able.iter().find(|(name, _)| Some(*name) == pinned) {
            return Some(name);
        }
        // A room that nobody has held yet begins with whoever has most of it; else all have the same.
        let is_new = !self.leases.contains_key(room);
        let rank = |(name, operations): &(&str, u64)| (if is_new { *operations } else { 0 }, weight(name, room));
        able.into_iter().max_by_key(rank).map(|(name, _)| name)
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        // An answer that never comes is given up by who waits for it; this is for one who does not.
        self.writing.retain(|_, since| now < *since + 2 * WRITE_PATIENCE);
        if !self.is_complete {
            return;
        }
        self.live(now, actions);
        if !self.is_tenant(now) {
            for (room, offered) in &mut self.ours {
                match offered.standing {
                    Standing::Held => {
                        offered.standing = Standing::Leaving;
                        actions.push(Action::Exit(room.clone()));
                    }
                    Standing::Claiming | Standing::Granted | Standing::Releasing => {
                        offered.standing = Standing::Standby;
                    }
                    Standing::Standby | Standing::Leaving => {}
                }
            }
            return;
        }
        self.bury(now, actions);
        self.say_offers(now, actions);
        self.look_at_rooms(now, actions);
    }

    fn write(&mut self, key: Key, value: String, expected: u64, now: Instant, actions: &mut Vec<Action>) {
        if !self.writing.contains_key(&key) {
            self.writing.insert(key.clone(), now);
            actions.push(Action::Write { key, value, expected });
        }
    }

    /// Says that we are alive, or no longer.
    fn live(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.next_beat.is_some_and(|at| now < at) {
            return;
        }
        let ours = self.instances.get(&self.us);
        let expected = ours.map_or(0, |ours| ours.revision);
        if let Some(other) = ours.filter(|ours| ours.record.session != self.session()) {
            // Of an earlier life, or of another process that has our name: as dead as any other.
            if other.record.alive && now < other.seen + SILENCE {
                return;
            }
        }
        // A new life begins once everything of the last is left: its tenure would be taken for that of what is not.
        let is_in = |offered: &Offered| matches!(offered.standing, Standing::Held | Standing::Leaving);
        if self.renewed.is_none() && self.ours.values().any(is_in) {
            return;
        }
        let has_left = self.ours.values().all(|offered| offered.standing == Standing::Standby);
        let alive = !(self.retiring && has_left);
        if !alive && (ours.is_none() || self.renewed.is_none()) {
            return;
        }
        self.next_beat = Some(now + BEAT);
        self.beat += 1;
        let record = InstanceRecord { session: self.session(), alive, beat: self.beat };
        self.write(Key::Instance(self.us.clone()), serde_json::json!(record).to_string(), expected, now, actions);
    }

    /// Marks instances as dead that have been silent for too long.
    fn bury(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let dead = self.instances.iter().filter(|(name, one)| {
            **name != self.us && one.record.alive && now >= one.seen + SILENCE && one.own_beats >= OWN_BEATS
        });
        let dead: Vec<(Key, String, u64)> = dead
            .map(|(name, one)| {
                let record = InstanceRecord { alive: false, beat: one.record.beat + 1, ..one.record.clone() };
                (Key::Instance(name.clone()), serde_json::json!(record).to_string(), one.revision)
            })
            .collect();
        for (key, value, expected) in dead {
            self.write(key, value, expected, now, actions);
        }
    }

    /// Says which rooms we could hold.
    fn say_offers(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let is_open = self.is_fit && !self.retiring;
        let rooms = self.ours.iter().filter(|_| is_open);
        let (said, revision) = self.offers.get(&self.us).cloned().unwrap_or_default();
        // How many operations there are only counts where a room begins.
        let rooms: BTreeMap<RoomHash, u64> = rooms
            .filter(|(_, offered)| offered.unable.is_none_or(|until| now >= until))
            .map(|(room, offered)| {
                let said = said.rooms.get(room).filter(|_| self.leases.contains_key(room));
                (room.clone(), said.copied().unwrap_or(offered.operations))
            })
            .collect();
        if said.rooms != rooms {
            let value = serde_json::json!(OfferRecord { rooms }).to_string();
            self.write(Key::Offers(self.us.clone()), value, revision, now, actions);
        }
    }

    fn look_at_rooms(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let rooms: Vec<(RoomHash, Standing)> =
            self.ours.iter().map(|(room, offered)| (room.clone(), offered.standing)).collect();
        for (room, standing) in rooms {
            let is_ours = self.is_ours(&room);
            match standing {
                Standing::Standby if self.retiring || !self.is_fit => {
                    if is_ours {
                        self.give_back(&room, now, actions);
                    }
                }
                Standing::Standby => self.claim(&room, now, actions),
                Standing::Granted => self.stand(&room, Standing::Held, Action::Enter(room.clone()), actions),
                Standing::Held if !is_ours || self.is_to_go(&room, now) => {
                    self.stand(&room, Standing::Leaving, Action::Exit(room.clone()), actions);
                }
                Standing::Releasing if is_ours => self.give_back(&room, now, actions),
                Standing::Releasing => {
                    if let Some(offered) = self.ours.get_mut(&room) {
                        offered.standing = Standing::Standby;
                    }
                }
                Standing::Claiming | Standing::Held | Standing::Leaving => {}
            }
        }
    }

    fn stand(&mut self, room: &RoomHash, standing: Standing, action: Action, actions: &mut Vec<Action>) {
        if let Some(offered) = self.ours.get_mut(room) {
            offered.standing = standing;
            actions.push(action);
        }
    }

    /// Takes a room that nobody holds, if it is for us; or makes sure that what we held is still ours.
    fn claim(&mut self, room: &RoomHash, now: Instant, actions: &mut Vec<Action>) {
        let Some(offered) = self.ours.get(room) else { return };
        if offered.unable.is_some_and(|until| now < until) {
            return;
        }
        let lease = self.leases.get(room);
        if !self.is_ours(room) && lease.is_some_and(|lease| self.holder(lease).is_some()) {
            return;
        }
        let changed = lease.map(|lease| {
            let holder = lease.record.holder.as_ref().and_then(|(name, _)| self.instances.get(name));
            holder.map_or(lease.changed, |holder| holder.seen.max(lease.changed))
        });
        let is_left = changed.is_some_and(|changed| now >= changed + UNTAKEN);
        if self.chosen(room) != Some(&self.us) && !is_left && !self.is_ours(room) {
            return;
        }
        let expected = lease.map_or(0, |lease| lease.revision);
        let record = LeaseRecord { room: offered.name.clone(), holder: Some((self.us.clone(), self.session())) };
        let key = Key::Lease(room.clone());
        if !self.writing.contains_key(&key) {
            self.write(key, serde_json::json!(record).to_string(), expected, now, actions);
            if let Some(offered) = self.ours.get_mut(room) {
                offered.standing = Standing::Claiming;
            }
        }
    }

    /// Whether a room that we hold is for another.
    fn is_to_go(&self, room: &RoomHash, now: Instant) -> bool {
        if self.retiring {
            return true;
        }
        let (Some(chosen), Some(lease)) = (self.chosen(room), self.leases.get(room)) else { return false };
        let pinned = self.pins.get(room).and_then(|(pin, _)| pin.instance.as_deref());
        let is_settled = self.instances.get(chosen).is_some_and(|one| one.beats >= SETTLED_BEATS);
        let is_time = is_settled && (pinned == Some(chosen) || now >= lease.changed + REST);
        chosen != self.us && (is_time || !self.is_fit)
    }

    fn give_back(&mut self, room: &RoomHash, now: Instant, actions: &mut Vec<Action>) {
        let (Some(offered), Some(lease)) = (self.ours.get(room), self.leases.get(room)) else { return };
        let record = LeaseRecord { room: offered.name.clone(), holder: None };
        let expected = lease.revision;
        self.write(Key::Lease(room.clone()), serde_json::json!(record).to_string(), expected, now, actions);
    }

    /// Rooms that we hold, by what we know.
    #[cfg(test)]
    fn held(&self) -> BTreeSet<RoomHash> {
        let held = self.ours.iter().filter(|(_, offered)| offered.standing == Standing::Held);
        held.map(|(room, _)| room.clone()).collect()
    }
}

/// How much an instance is for a room (rendezvous hashing): the same wherever it is reckoned, and little changes when
/// instances come and go.
fn weight(instance: &str, room: &RoomHash) -> [u8; 8] {
    let digest = Sha256::new().chain_update(instance).chain_update([0]).chain_update(room.as_str()).finalize();
    let mut weight = [0; 8];
    weight.copy_from_slice(&digest[..8]);
    weight
}

#[cfg(test)]
mod simulation;
