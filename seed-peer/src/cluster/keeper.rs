//! The task that keeps the leases: it carries what stands in the bucket to [`Leases`], and writes what they want written.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use async_nats::jetstream::kv::{Operation, Store, UpdateErrorKind, Watch};
use async_nats::jetstream::stream;
use futures_util::StreamExt as _;
use service::{Health, State};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::bucket::{Key, PinRecord, RoomHash};
use super::leases::{Action, Leases, WRITE_PATIENCE, Wrote};
use super::seat::{Copy, Happened, Mode, Seat};
use super::{LEASES, SharedRooms, Tenure};
use crate::archive::{ArchiveClient, RoomKey};
use crate::metrics::Metrics;
use crate::rooms::{RoomError, Rooms};

/// The part of the health that says how it goes.
const PART: &str = "rooms of the cluster";
/// How often the leases are looked at.
const TICK: Duration = Duration::from_millis(200);
/// How long to wait before the bucket is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// When our own records do not come back for so long although they are written, the watch has lost its way.
const WATCH_PATIENCE: Duration = Duration::from_secs(4);
/// How long the archive may refuse before rooms are left to others.
const REFUSING: Duration = Duration::from_secs(3);
/// How long everything may take that is given back at shutdown.
const RETIRE_PATIENCE: Duration = Duration::from_secs(4);

/// What the keeper is asked.
#[derive(Debug)]
pub(crate) enum KeeperCommand {
    /// A room could be held here.
    Offer { name: String, key: RoomKey, operations: u64 },
    /// A room is not to be held here any more; it was left.
    Withdraw { name: String },
    /// Who holds which room.
    Overview { respond: oneshot::Sender<BTreeMap<String, Option<String>>> },
    /// A room is to be held by an instance, or by any.
    Move { name: String, instance: Option<String>, respond: oneshot::Sender<Result<(), RoomError>> },
}

/// What the keeper works with.
pub(crate) struct Keeper {
    pub(crate) shared: SharedRooms,
    pub(crate) archive: ArchiveClient,
    pub(crate) rooms: Rooms,
    pub(crate) data: PathBuf,
    pub(crate) tenure: Tenure,
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
}

/// What has become of a write.
struct Written {
    key: Key,
    value: String,
    wrote: Wrote,
    sent: Instant,
}

/// The keeper while it runs.
struct Keeping {
    keeper: Keeper,
    leases: Leases,
    seats: BTreeMap<RoomHash, UnboundedSender<Mode>>,
    tasks: JoinSet<()>,
    writes: JoinSet<Written>,
    happened: UnboundedSender<Happened>,
    /// Since when the archive refuses.
    refusing: Option<Instant>,
}

impl Keeper {
    /// Runs until `stop`; then gives everything back.
    pub(crate) async fn run(self, mut commands: UnboundedReceiver<KeeperCommand>, stop: CancellationToken) {
        let process = format!("{:016x}", rand::random::<u64>());
        let leases = Leases::new(self.shared.cluster.name().to_owned(), process);
        let (happened, mut events) = mpsc::unbounded_channel();
        let mut keeping = Keeping {
            keeper: self,
            leases,
            seats: BTreeMap::new(),
            tasks: JoinSet::new(),
            writes: JoinSet::new(),
            happened,
            refusing: None,
        };
        let mut end = None;
        while end.is_none_or(|end| Instant::now() < end) && !keeping.leases.is_retired() {
            let kept = keeping.keep(&mut commands, &mut events, &stop, &mut end).await;
            if let Err(reason) = kept {
                keeping.say(Some(&reason));
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => {}
                    () = stop.cancelled(), if end.is_none() => {}
                }
            }
            if stop.is_cancelled() && end.is_none() {
                end = Some(Instant::now() + RETIRE_PATIENCE);
                keeping.leases.retire();
            }
        }
        keeping.keeper.tenure.set(None);
        keeping.seats.clear();
        // What a task still does is of no use to anybody.
        keeping.tasks.shutdown().await;
    }
}

impl Keeping {
    /// Keeps the leases until something fails, or everything is given back.
    async fn keep(
        &mut self,
        commands: &mut UnboundedReceiver<KeeperCommand>,
        events: &mut UnboundedReceiver<Happened>,
        stop: &CancellationToken,
        end: &mut Option<Instant>,
    ) -> Result<(), String> {
        let mut opening = None;
        let mut bucket: Option<(Store, Watch)> = None;
        // Since when the bucket is watched.
        let mut watched: Option<Instant> = None;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if bucket.is_none() && opening.is_none() {
                opening = Some(Box::pin(open(self.keeper.shared.cluster.clone())));
            }
            tokio::select! {
                opened = async { match &mut opening { Some(opening) => opening.await, None => std::future::pending().await } } => {
                    opening = None;
                    let (store, watch, is_empty) = opened?;
                    if is_empty {
                        self.leases.complete();
                    }
                    bucket = Some((store, watch));
                    watched = Some(Instant::now());
                }
                entry = async { match &mut bucket { Some((_, watch)) => watch.next().await, None => std::future::pending().await } } => {
                    let entry = entry.ok_or("the bucket of leases is not watched any more")?.map_err(|error| error.to_string())?;
                    if let (Some(key), Operation::Put) = (Key::parse(&entry.key), entry.operation) {
                        self.leases.entry(&key, &entry.value, entry.revision, Instant::now());
                    }
                    if entry.delta == 0 {
                        self.leases.complete();
                    }
                }
                Some(written) = self.writes.join_next() => {
                    if let Ok(Written { key, value, wrote, sent }) = written {
                        self.leases.wrote(&key, &value, wrote, sent, Instant::now());
                    }
                }
                Some(command) = commands.recv() => self.command(command, bucket.as_ref().map(|(store, _)| store)),
                Some(happened) = events.recv() => match happened {
                    Happened::Exited(room) => self.leases.exited(&room),
                    Happened::Unable(room) => self.leases.unable(&room, Instant::now()),
                },
                () = stop.cancelled(), if end.is_none() => {
                    *end = Some(Instant::now() + RETIRE_PATIENCE);
                    self.leases.retire();
                }
                _ = tick.tick() => {}
            }
            let now = Instant::now();
            self.look_at_archive(now);
            let mut actions = Vec::new();
            self.leases.tick(now, &mut actions);
            self.keeper.tenure.set(self.leases.tenure());
            for action in actions {
                self.act(action, bucket.as_ref().map(|(store, _)| store), now);
            }
            self.publish(now);
            if self.leases.is_retired() || end.is_some_and(|end| now >= end) {
                return Ok(());
            }
            if let Some(watched) = watched
                && self.leases.renewed_since(watched.max(self.leases.own_seen().unwrap_or(watched)) + WATCH_PATIENCE)
            {
                return Err("what this machine writes does not come back".into());
            }
        }
    }

    /// A disk that refuses for long is no place for a room.
    fn look_at_archive(&mut self, now: Instant) {
        let refuses = matches!(self.keeper.health.parts().get("archive"), Some(State::Degraded(_)));
        self.refusing = if refuses { Some(self.refusing.unwrap_or(now)) } else { None };
        self.leases.set_fit(self.refusing.is_none_or(|since| now < since + REFUSING));
    }

    fn act(&mut self, action: Action, bucket: Option<&Store>, now: Instant) {
        match action {
            Action::Enter(room) => self.seat(&room, Mode::Hold),
            Action::Exit(room) => self.seat(&room, Mode::Follow),
            Action::Write { key, value, expected } => {
                let bucket = bucket.cloned();
                self.writes.spawn(async move {
                    let wrote = match bucket {
                        Some(bucket) => write(&bucket, &key, &value, expected).await,
                        None => Wrote::Unknown,
                    };
                    Written { key, value, wrote, sent: now }
                });
            }
        }
    }

    fn seat(&self, room: &RoomHash, mode: Mode) {
        if self.seats.get(room).is_none_or(|seat| seat.send(mode).is_err()) {
            tracing::error!("a room of the cluster has no task any more");
        }
    }

    fn command(&mut self, command: KeeperCommand, bucket: Option<&Store>) {
        match command {
            KeeperCommand::Offer { name, key, operations } => {
                self.leases.offer(&name, operations);
                let hash = RoomHash::of(&name);
                let (keeper, happened) = (&self.keeper, self.happened.clone());
                let cluster = keeper.shared.cluster.clone();
                let (rooms, shared) = (keeper.rooms.clone(), keeper.shared.clone());
                let copy = Copy::new(cluster, &name, key, keeper.archive.clone(), keeper.data.clone());
                self.seats.entry(hash.clone()).or_insert_with(|| {
                    let (seat, modes) = mpsc::unbounded_channel();
                    self.tasks.spawn(Seat { copy, hash, rooms, shared, happened }.run(modes));
                    seat
                });
            }
            KeeperCommand::Withdraw { name } => {
                self.leases.withdraw(&name);
                // Its task ends with it.
                self.seats.remove(&RoomHash::of(&name));
            }
            KeeperCommand::Overview { respond } => {
                let _ = respond.send(self.leases.overview().into_iter().collect());
            }
            KeeperCommand::Move { name, instance, respond } => {
                let alive = self.leases.alive();
                if let Some(unknown) = instance.as_ref().filter(|instance| !alive.contains(instance)) {
                    let reason = format!("no machine called {unknown} is there now: {}", alive.join(", "));
                    return drop(respond.send(Err(RoomError::NotMoved(reason))));
                }
                let Some(bucket) = bucket.cloned() else {
                    return drop(respond.send(Err(RoomError::NotMoved("NATS is out of reach".into()))));
                };
                tokio::spawn(async move {
                    let key = Key::Pin(RoomHash::of(&name)).print();
                    let value = serde_json::json!(PinRecord { instance }).to_string();
                    let put = bucket.put(key, value.into()).await;
                    let put = put.map(drop).map_err(|error| RoomError::NotMoved(error.to_string()));
                    let _ = respond.send(put);
                });
            }
        }
    }

    fn publish(&self, now: Instant) {
        let (held, offered) = self.leases.counts();
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let metrics = &self.keeper.metrics;
        metrics.cluster_rooms.with_label_values(&["held"]).set(number(held));
        metrics.cluster_rooms.with_label_values(&["followed"]).set(number(offered - held));
        metrics.cluster_instances.set(number(self.leases.alive().len()));
        let renewed = self.leases.tenure().is_some_and(|end| now < end);
        if renewed {
            self.say(None);
        } else if self.leases.is_contested(now) {
            self.say(Some("another machine seems to have the same name (cluster.name)"));
        }
    }

    fn say(&self, reason: Option<&str>) {
        let health = &self.keeper.health;
        match reason {
            None => {
                if health.set(PART, State::Ok) {
                    tracing::info!("this machine can hold rooms of the cluster");
                }
            }
            Some(reason) => {
                let reason = format!("no rooms are held here: {}", reason.escape_debug());
                if health.set(PART, State::Degraded(reason.clone())) {
                    tracing::warn!("{reason}");
                }
            }
        }
    }
}

/// The bucket, made when there is none, what is and comes in it, and whether nothing is.
async fn open(cluster: service::Cluster) -> Result<(Store, Watch, bool), String> {
    let jetstream = cluster.jetstream();
    // What a bucket is underneath. The library's own way asks the server for something else first, whose answer by servers
    // before 2.10 it does not understand.
    let config = stream::Config {
        name: format!("KV_{LEASES}"),
        description: Some("which seed of Homeport holds which room".into()),
        subjects: vec![format!("$KV.{LEASES}.>")],
        max_messages_per_subject: 1,
        discard: stream::DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..stream::Config::default()
    };
    cluster.keep(config).await.map_err(|error| error.to_string())?;
    let store = jetstream.get_key_value(LEASES).await.map_err(|error| error.to_string())?;
    let watch = store.watch_with_history(">").await.map_err(|error| error.to_string())?;
    let is_empty = store.status().await.map_err(|error| error.to_string())?.values() == 0;
    Ok((store, watch, is_empty))
}

async fn write(bucket: &Store, key: &Key, value: &str, expected: u64) -> Wrote {
    let writing = bucket.update(key.print(), value.to_owned().into(), expected);
    match tokio::time::timeout(WRITE_PATIENCE, writing).await {
        Ok(Ok(revision)) => Wrote::Done(revision),
        Ok(Err(error)) if error.kind() == UpdateErrorKind::WrongLastRevision => Wrote::Conflict,
        Ok(Err(error)) => {
            tracing::debug!(error = ?error.to_string(), "writing to the bucket of leases");
            Wrote::Unknown
        }
        Err(_) => Wrote::Unknown,
    }
}
