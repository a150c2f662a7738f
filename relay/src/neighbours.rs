//! The other relays of a cluster: what is published here reaches who listens there, over NATS.
//!
//! Ephemeral events travel by subjects that follow from a kind and the value of a tag (`homeport.live.x<hash>.<kind>`), and
//! only to relays where somebody asked for such: NATS carries nothing to where nobody subscribed. An event is verified
//! where it entered, once; from a neighbour it is taken as it is. It goes on to clients alone, never to neighbours, so
//! nothing can go around in circles; and an event that comes by two subjects is known by its id.
//!
//! While NATS is out of reach, clients of this relay go on among themselves, and what is said meanwhile is not kept for
//! others: signalling that is late is of no use, and clients say it again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use service::Cluster;
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::event::Event;
use crate::filter::Filter;
use crate::presence::PresentKey;
use crate::relay::Relay;

/// What neighbours do counts as done over one connection, which no client has.
pub(crate) const NEIGHBOUR: u64 = u64::MAX - 1;

/// Where ephemeral events travel.
const SUBJECTS: &str = "homeport.live";
/// What stands before an author that is gone; before an event, nothing does.
pub(crate) const GONE: &[u8] = b"gone ";
/// Stands in place of a tag for events that have none to be found by.
const NO_TAG: &str = "-";
/// An event goes by so many of its tags at most: each is a message.
const MAX_EVENT_TAGS: usize = 8;
/// Up to so many pairs of kind and value, a filter asks for the pairs; beyond, for every kind of a value.
const MAX_PAIRS: usize = 64;
/// Subjects that one connection may have us ask for; what it asks for beyond, it hears of from this relay alone.
const MAX_SUBJECTS_PER_CONNECTION: usize = 4_096;
/// Subjects that we ask for.
const MAX_SUBJECTS: usize = 200_000;
/// Messages that wait to be said to neighbours, and their bytes.
const QUEUE_MESSAGES: usize = 8_192;
const QUEUE_BYTES: usize = 16 << 20;
/// How long a subject is still asked for when nobody needs it any more: who reconnects wants it again.
const LINGER: Duration = Duration::from_secs(5);

/// A subject of NATS, or a pattern of such.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Subject(Arc<str>);

impl Subject {
    fn of(tag: &str, kind: &str) -> Self {
        Self(format!("{SUBJECTS}.{tag}.{kind}").into())
    }

    /// The subjects by which an event travels.
    fn of_event(event: &Event<'_>) -> Vec<Self> {
        let kind = event.kind.to_string();
        let mut tags: Vec<String> =
            event.letter_tags().take(MAX_EVENT_TAGS).map(|(letter, value)| token(letter, value)).collect();
        tags.sort_unstable();
        tags.dedup();
        if tags.is_empty() {
            tags.push(NO_TAG.into());
        }
        tags.iter().map(|tag| Self::of(tag, &kind)).collect()
    }

    /// The subjects by which every ephemeral event travels that a filter may ask for.
    fn of_filter(filter: &Filter) -> Vec<Self> {
        let kinds: Option<Vec<String>> = filter.kinds.as_ref().map(|kinds| {
            kinds.iter().filter(|kind| (20_000..30_000).contains(*kind)).map(ToString::to_string).collect()
        });
        let narrowest = filter.tags.iter().min_by_key(|(_, values)| values.len());
        match (kinds, narrowest) {
            (Some(kinds), _) if kinds.is_empty() => Vec::new(),
            (Some(kinds), Some((letter, values))) if kinds.len() * values.len() <= MAX_PAIRS => values
                .iter()
                .flat_map(|value| {
                    let tag = token(*letter, value);
                    kinds.iter().map(move |kind| Self::of(&tag, kind)).collect::<Vec<_>>()
                })
                .collect(),
            (_, Some((letter, values))) => values.iter().map(|value| Self::of(&token(*letter, value), "*")).collect(),
            (Some(kinds), None) => kinds.iter().map(|kind| Self::of("*", kind)).collect(),
            (None, None) => vec![Self::of("*", "*")],
        }
    }
}

/// A tag's letter and value as they stand in a subject, where most characters may not.
fn token(letter: u8, value: &str) -> String {
    format!("{}{}", char::from(letter), hex::encode(&Sha256::digest(value)[..16]))
}

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

/// What somebody here listens to.
#[derive(Debug, Default)]
struct Interests {
    /// By how many.
    wanted: HashMap<Subject, usize>,
    /// What NATS was asked for.
    asked: HashSet<Subject>,
    /// Of those wanted, what NATS was not asked for yet.
    fresh: HashSet<Subject>,
    /// Of those asked for, what nobody wants any more.
    stale: HashSet<Subject>,
}

impl Interests {
    /// Somebody wants a subject. Returns whether there was room for it.
    fn want(&mut self, subject: &Subject) -> bool {
        if let Some(count) = self.wanted.get_mut(subject) {
            *count += 1;
            return true;
        }
        if self.wanted.len() >= MAX_SUBJECTS {
            return false;
        }
        self.wanted.insert(subject.clone(), 1);
        if !self.stale.remove(subject) && !self.asked.contains(subject) {
            self.fresh.insert(subject.clone());
        }
        true
    }

    /// Somebody who wanted a subject no longer does.
    fn leave(&mut self, subject: &Subject) {
        let Some(count) = self.wanted.get_mut(subject) else { return };
        *count -= 1;
        if *count == 0 {
            self.wanted.remove(subject);
            // What comes and goes while NATS is away leaves nothing behind.
            if !self.fresh.remove(subject) && self.asked.contains(subject) {
                self.stale.insert(subject.clone());
            }
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
        let (fresh, stale) = {
            let mut interests = self.lock();
            let fresh = std::mem::take(&mut interests.fresh);
            interests.asked.extend(fresh.iter().cloned());
            (fresh, std::mem::take(&mut interests.stale))
        };
        let now = Instant::now();
        followed.leaving.extend(stale.into_iter().map(|subject| (now + LINGER, subject)));
        for subject in fresh {
            match self.cluster.client().subscribe(subject.0.to_string()).await {
                Ok(subscriber) => {
                    let task = tokio::spawn(listen(followed.relay.clone(), subscriber));
                    followed.tasks.insert(subject, task.abort_handle());
                }
                Err(error) => {
                    self.lock().asked.remove(&subject);
                    tracing::warn!(error = ?error.to_string(), "NATS cannot be asked for a subject");
                }
            }
        }
        while let Some((_, subject)) = followed.leaving.pop_front_if(|(at, _)| *at <= now) {
            let mut interests = self.lock();
            if !interests.wanted.contains_key(&subject) {
                interests.asked.remove(&subject);
                interests.stale.remove(&subject);
                // With its subscriber goes the subscription.
                if let Some(task) = followed.tasks.remove(&subject) {
                    task.abort();
                }
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
                (vec![Subject::of(&token(b'x', key.topic()), &key.kind().to_string())], payload.into())
            }
        };
        for subject in subjects {
            match self.cluster.client().publish(subject.0.to_string(), payload.clone()).await {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::OneOf;

    /// Whether a pattern of NATS takes a subject.
    fn takes(pattern: &Subject, subject: &Subject) -> bool {
        let (mut pattern, mut subject) = (pattern.0.split('.'), subject.0.split('.'));
        loop {
            match (pattern.next(), subject.next()) {
                (None, None) => return true,
                (Some(one), Some(other)) if one == "*" || one == other => {}
                _ => return false,
            }
        }
    }

    fn filters() -> impl Strategy<Value = Filter> {
        let kinds = prop::option::of(
            prop::collection::vec(prop_oneof![Just(1_u16), 20_000..20_070_u16], 0..70).prop_map(OneOf::from_iter),
        );
        let values = || prop::collection::vec((0..3u8).prop_map(|value| value.to_string().into()), 0..3);
        let tags = prop::collection::btree_map(b'a'..=b'c', values().prop_map(OneOf::from_iter), 0..3)
            .prop_map(|tags| tags.into_iter().collect());
        (kinds, tags).prop_map(|(kinds, tags)| Filter { kinds, tags, ..Filter::default() })
    }

    fn events() -> impl Strategy<Value = Event<'static>> {
        let tag = (b'a'..=b'd', 0..4u8)
            .prop_map(|(letter, value)| vec![char::from(letter).to_string().into(), value.to_string().into()]);
        (20_000..20_070_u16, prop::collection::vec(tag, 0..MAX_EVENT_TAGS)).prop_map(|(kind, tags)| Event {
            id: [0; 32],
            pubkey: [0; 32],
            created_at: 0,
            kind,
            tags,
            content: "".into(),
            sig: [0; 64],
        })
    }

    proptest! {
        #[test]
        fn what_a_filter_asks_for_travels_by_its_subjects(filter in filters(), event in events()) {
            if filter.matches(&event) {
                let subjects = Subject::of_event(&event);
                let patterns = Subject::of_filter(&filter);
                prop_assert!(
                    patterns.iter().any(|pattern| subjects.iter().any(|subject| takes(pattern, subject))),
                    "{patterns:?} {subjects:?}"
                );
            }
        }
    }

    /// A million clients in rooms, over up to a hundred relays: messages between relays when somebody in each room says
    /// something once. The servers of NATS are taken to carry a message once to each relay that asked for its subject, as
    /// they do.
    #[test]
    fn messages_grow_with_the_relays_of_a_rooms_members_and_not_with_others() {
        const CLIENTS: usize = 1_000_000;
        // Any numbers that are spread well (SplitMix64).
        let mixed = |number: usize| {
            let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        for members in [2, 10, 100, 1_000] {
            let rooms = CLIENTS / members;
            let mut asked: HashMap<Subject, usize> = HashMap::new();
            let mut said = Vec::new();
            for room in 0..rooms {
                let topic = format!("topic of room {room}");
                let kind = 20_000 + u16::try_from(room % 10_000).unwrap();
                let tags = Box::new([(b'x', OneOf::from_iter([topic.clone().into()]))]);
                let filter = Filter { kinds: Some(OneOf::from_iter([kind])), tags, ..Filter::default() };
                asked.extend(Subject::of_filter(&filter).into_iter().map(|subject| (subject, room)));
                let tags = vec![vec!["x".into(), topic.into()]];
                let (id, pubkey, sig) = ([0; 32], [0; 32], [0; 64]);
                said.push(Subject::of_event(&Event { id, pubkey, created_at: 0, kind, tags, content: "".into(), sig }));
            }
            assert_eq!(asked.len(), rooms, "no two rooms share a subject");
            for relays in [1, 3, 10, 100] {
                let relay_of = |room: usize, member: usize| mixed(room * members + member) % relays;
                let mut messages = 0;
                for (room, subjects) in said.iter().enumerate() {
                    for subject in subjects {
                        let listening = (0..members).map(|member| relay_of(asked[subject], member));
                        let elsewhere: HashSet<usize> = listening.filter(|relay| *relay != relay_of(room, 0)).collect();
                        messages += elsewhere.len();
                    }
                }
                let per_delivery = messages as f64 / (rooms * (members - 1)) as f64;
                println!("rooms of {members} over {relays} relays: {per_delivery:.3} messages for each delivery");
                // At most one to each relay that has a member, however many others there are.
                assert!(messages <= rooms * (members.min(relays) - 1));
            }
        }
    }

    #[test]
    fn what_comes_and_goes_while_nats_is_away_leaves_nothing_behind() {
        let mut interests = Interests::default();
        let subject = |number: usize| Subject::of("x", &number.to_string());
        interests.asked.insert(subject(0));
        for number in 0..10_000 {
            assert!(interests.want(&subject(number)) && interests.want(&subject(number)));
            interests.leave(&subject(number));
            interests.leave(&subject(number));
        }
        assert!(interests.wanted.is_empty() && interests.fresh.is_empty());
        assert_eq!(interests.stale, HashSet::from([subject(0)]));
        assert!(interests.want(&subject(0)) && interests.stale.is_empty() && interests.fresh.is_empty());
        assert!(interests.want(&subject(1)) && interests.fresh.contains(&subject(1)));
    }

    #[test]
    fn a_room_is_one_subject_and_a_crowd_of_rooms_one_for_each() {
        let filter = |text: &str| Filter::parse(text, 2_048, 60).unwrap();
        let room = Subject::of_filter(&filter(r##"{"kinds":[20001],"since":1,"#x":["a.b *>"]}"##));
        assert_eq!(room.len(), 1);
        assert!(room[0].0.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.'), "{room:?}");
        let kinds: Vec<u16> = (20_000..20_250).collect();
        let values: Vec<String> = kinds.iter().map(ToString::to_string).collect();
        let many = serde_json::json!({ "kinds": kinds, "#x": values }).to_string();
        assert_eq!(Subject::of_filter(&filter(&many)).len(), 250);
        assert_eq!(Subject::of_filter(&filter(r#"{"kinds":[0,1]}"#)), [], "what is stored travels otherwise");
        assert_eq!(Subject::of_filter(&filter("{}")).len(), 1);
    }
}
