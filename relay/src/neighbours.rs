//! The other relays of a cluster: what is published here reaches who listens there, over NATS.
//!
//! Ephemeral events travel by subjects that follow from a kind and the value of a tag (`homeport.live.x<hash>.<kind>`), and
//! only to relays where somebody asked for such: NATS carries nothing to where nobody subscribed. An event is verified
//! where it entered, once; from a neighbour it is taken as it is. It goes on to clients alone, never to neighbours, so
//! nothing can go around in circles; and an event that comes by two subjects is known by its id.
//!
//! While NATS is out of reach, clients of this relay go on among themselves, and what is said meanwhile is not kept for
//! others: signalling that is late is of no use, and clients say it again.

mod interests;
mod subject;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use service::Cluster;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::event::Event;
use crate::filter::Filter;
use crate::presence::PresentKey;
use crate::relay::Relay;

use interests::Interests;
pub(crate) use subject::Subject;

/// What neighbours do counts as done over one connection, which no client has.
pub(crate) const NEIGHBOUR: u64 = u64::MAX - 1;

/// What stands before an author that is gone; before an event, nothing does.
pub(crate) const GONE: &[u8] = b"gone ";
/// Subjects that one connection may have us ask for; what it asks for beyond, it hears of from this relay alone.
const MAX_SUBJECTS_PER_CONNECTION: usize = 4_096;
/// Messages that wait to be said to neighbours, and their bytes.
const QUEUE_MESSAGES: usize = 8_192;
const QUEUE_BYTES: usize = 16 << 20;
/// How long a subject is still asked for when nobody needs it any more: who reconnects wants it again.
const LINGER: Duration = Duration::from_secs(5);

/// What is said to neighbours.
#[derive(Debug)]
enum Said {
    /// An event, as its author sent it.
    Event(Vec<Subject>, Arc<str>),
    /// An author is no longer present under a topic: the connection is gone.
    Gone(PresentKey),
}

impl Said {
    fn bytes(&self) -> usize {
        match self {
            Self::Event(subjects, raw) => subjects.len() * raw.len(),
            Self::Gone(key) => key.topic().len(),
        }
    }
}

#[derive(Debug)]
struct NeighbourMetrics {
    messages: IntCounterVec,
    drops: IntCounterVec,
    subjects: IntGauge,
}

impl NeighbourMetrics {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            messages: IntCounterVec::new(
                Opts::new("homeport_relay_cluster_messages_total", "Messages to and from other relays, by direction."),
                &["direction"],
            )?,
            drops: IntCounterVec::new(
                Opts::new("homeport_relay_cluster_drops_total", "Messages that other relays were not told, by reason."),
                &["reason"],
            )?,
            subjects: IntGauge::new("homeport_relay_cluster_subjects", "Subjects that are asked of other relays now.")?,
        };
        registry.register(Box::new(metrics.messages.clone()))?;
        registry.register(Box::new(metrics.drops.clone()))?;
        registry.register(Box::new(metrics.subjects.clone()))?;
        for direction in ["in", "out"] {
            metrics.messages.with_label_values(&[direction]);
        }
        for reason in ["disconnected", "busy", "too_many_subjects", "malformed"] {
            metrics.drops.with_label_values(&[reason]);
        }
        Ok(metrics)
    }
}

/// What is to be said to the neighbours.
pub(crate) struct Queue(Receiver<Said>);

/// The other relays, as one.
#[derive(Debug)]
pub(crate) struct Neighbours {
    cluster: Cluster,
    queue: Sender<Said>,
    queued_bytes: AtomicUsize,
    interests: Mutex<Interests>,
    changed: Notify,
    metrics: NeighbourMetrics,
}

impl Neighbours {
    /// The relays that are reached over `cluster`, and what is to be said to them, for [`start`].
    pub(crate) fn new(cluster: Cluster, registry: &Registry) -> prometheus::Result<(Self, Queue)> {
        let (queue, said) = mpsc::channel(QUEUE_MESSAGES);
        let neighbours = Self {
            cluster,
            queue,
            queued_bytes: AtomicUsize::new(0),
            interests: Mutex::default(),
            changed: Notify::new(),
            metrics: NeighbourMetrics::register(registry)?,
        };
        Ok((neighbours, Queue(said)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Interests> {
        self.interests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, somebody listens to what `filters` ask for, who has us ask for `already` subjects. Returns what to
    /// [`Neighbours::unfollow`] in the end.
    pub(crate) fn follow(&self, filters: &[Filter], already: usize) -> Box<[Subject]> {
        let mut subjects: Vec<Subject> = filters.iter().flat_map(Subject::of_filter).collect();
        let asked = subjects.len();
        subjects.truncate(MAX_SUBJECTS_PER_CONNECTION.saturating_sub(already));
        let mut interests = self.lock();
        subjects.retain(|subject| interests.want(subject));
        drop(interests);
        self.dropped("too_many_subjects", asked - subjects.len());
        self.changed.notify_one();
        subjects.into()
    }

    /// Somebody no longer listens.
    pub(crate) fn unfollow(&self, subjects: &[Subject]) {
        let mut interests = self.lock();
        subjects.iter().for_each(|subject| interests.leave(subject));
        drop(interests);
        self.changed.notify_one();
    }

    /// Says an ephemeral event to who listens elsewhere. Returns whether it is on its way.
    pub(crate) fn tell(&self, event: &Event<'_>, raw: &Arc<str>) -> bool {
        self.say(Said::Event(Subject::of_event(event), Arc::clone(raw)))
    }

    /// Says that an author is gone.
    pub(crate) fn tell_gone(&self, key: PresentKey) {
        self.say(Said::Gone(key));
    }

    fn say(&self, said: Said) -> bool {
        if !self.cluster.is_connected() {
            self.dropped("disconnected", 1);
            return false;
        }
        let bytes = said.bytes();
        let fits = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUE_BYTES;
        if fits && self.queue.try_send(said).is_ok() {
            return true;
        }
        self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.dropped("busy", 1);
        false
    }

    fn dropped(&self, reason: &str, count: usize) {
        self.metrics.drops.with_label_values(&[reason]).inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    /// Speaks with NATS until it is dropped. Subjects are asked for before anything is said that came after: whoever
    /// answers it finds us listening.
    async fn run(self: Arc<Self>, relay: Weak<Relay>, mut queue: Receiver<Said>) {
        let mut followed = Followed { relay, tasks: HashMap::new(), leaving: VecDeque::new() };
        loop {
            let said = tokio::select! {
                () = self.changed.notified() => None,
                said = queue.recv() => match said {
                    Some(said) => Some(said),
                    None => return,
                },
                () = followed.next_end() => None,
            };
            self.keep_up(&mut followed).await;
            if let Some(said) = said {
                self.queued_bytes.fetch_sub(said.bytes(), Ordering::Relaxed);
                self.publish(said).await;
            }
        }
    }

    /// Makes our subscriptions what they should be.
    async fn keep_up(&self, followed: &mut Followed) {
        let (fresh, stale) = self.lock().changes();
        let now = Instant::now();
        followed.leaving.extend(stale.into_iter().map(|subject| (now + LINGER, subject)));
        for subject in fresh {
            match self.cluster.client().subscribe(subject.as_str().to_owned()).await {
                Ok(subscriber) => {
                    let task = tokio::spawn(listen(followed.relay.clone(), subscriber));
                    followed.tasks.insert(subject, task.abort_handle());
                }
                Err(error) => {
                    self.lock().not_asked(&subject);
                    tracing::warn!(error = ?error.to_string(), "NATS cannot be asked for a subject");
                }
            }
        }
        while let Some((_, subject)) = followed.leaving.pop_front_if(|(at, _)| *at <= now) {
            if self.lock().give_up(&subject)
                // With its subscriber goes the subscription.
                && let Some(task) = followed.tasks.remove(&subject)
            {
                task.abort();
            }
        }
        self.metrics.subjects.set(i64::try_from(followed.tasks.len()).unwrap_or(i64::MAX));
    }

    async fn publish(&self, said: Said) {
        if !self.cluster.is_connected() {
            return self.dropped("disconnected", 1);
        }
        let (subjects, payload) = match said {
            Said::Event(subjects, raw) => (subjects, bytes::Bytes::copy_from_slice(raw.as_bytes())),
            Said::Gone(key) => {
                let payload = [GONE, serde_json::json!(key).to_string().as_bytes()].concat();
                (vec![Subject::of_gone(&key)], payload.into())
            }
        };
        for subject in subjects {
            match self.cluster.client().publish(subject.as_str().to_owned(), payload.clone()).await {
                Ok(()) => self.metrics.messages.with_label_values(&["out"]).inc(),
                Err(error) => {
                    self.dropped("busy", 1);
                    tracing::debug!(error = ?error.to_string(), "NATS does not take a message");
                }
            }
        }
    }

    /// A message has come from a neighbour, and was understood or not.
    pub(crate) fn heard(&self, understood: bool) {
        self.metrics.messages.with_label_values(&["in"]).inc();
        if !understood {
            self.dropped("malformed", 1);
        }
    }
}

/// The subjects that NATS was asked for.
struct Followed {
    relay: Weak<Relay>,
    /// What listens to each.
    tasks: HashMap<Subject, AbortHandle>,
    /// Those that nobody needs any more, and until when they are kept.
    leaving: VecDeque<(Instant, Subject)>,
}

impl Followed {
    async fn next_end(&self) {
        match self.leaving.front() {
            Some((at, _)) => tokio::time::sleep_until((*at).into()).await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.tasks.values().for_each(AbortHandle::abort);
    }
}

/// Hands what comes by one subject to the relay, until there is none any more.
async fn listen(relay: Weak<Relay>, mut subscriber: async_nats::Subscriber) {
    while let Some(message) = subscriber.next().await {
        let Some(relay) = relay.upgrade() else { return };
        relay.hear(&message.payload);
    }
}

/// Starts to speak with the neighbours of a relay, until `stop`.
pub(crate) fn start(relay: &Arc<Relay>, Queue(queue): Queue, stop: CancellationToken) {
    if let Some(neighbours) = &relay.neighbours {
        let speaking = Arc::clone(neighbours).run(Arc::downgrade(relay), queue);
        tokio::spawn(stop.run_until_cancelled_owned(speaking));
    }
}
