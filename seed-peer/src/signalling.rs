//! The seed's connections to relays: what it says there, and what it hears.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use genosdb::{PeerId, Signal, Topic};
use nostr::event::EventId;
use rand::Rng as _;
use serde::Deserialize;
use serde_json::value::RawValue;
use service::{Health, State};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream};

use crate::mesh::RoomId;
use crate::metrics::Metrics;
use crate::relay_key::RelayKey;

/// Events that wait for one relay, at most.
const QUEUE: usize = 4_096;
/// A relay that does not answer a connection attempt for so long is given up on, until the next.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest wait before a relay is dialled again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A connection that held for so long was a good one: the next failure starts the waits anew.
const GOOD: Duration = Duration::from_secs(60);
/// How often a relay is asked whether it is there, and how long it may be silent.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(50);
/// A subscription that a relay has ended is made again after so long, since some have enough for a moment only; each
/// refusal doubles that, up to 16 times.
const RESUBSCRIBE: Duration = Duration::from_secs(5);
/// Refusals of one connection that a person is told of.
const TOLD_REFUSALS: u32 = 3;
/// Topics in one subscription: relays bound both subscriptions and the size of filters.
const TOPICS_PER_SUBSCRIPTION: usize = 100;
/// How old an event may be by its author's clock when we subscribe, in seconds. Clocks differ; ephemeral events that
/// a relay keeps for minutes should not all come back.
const LOOK_BACK_SECONDS: u64 = 120;
/// The largest message of a relay.
const MAX_MESSAGE: usize = 512 << 10;

/// What names of subscriptions begin with; behind it stands which group of topics it is for.
const SUBSCRIPTION: &str = "homeport-";

/// Names a relay by its place in the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RelayIndex(pub(crate) usize);

/// Whom an event on a topic is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) room: RoomId,
    /// Which of the seed's ids in that room, on the topic of that id; `None` on the room's.
    pub(crate) us: Option<PeerId>,
}

/// Who wants to hear of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Audience {
    Room(Listener),
    /// Whoever tries whether links come to be.
    Check,
}

/// The topics that the seed listens on, as they are grouped in subscriptions.
#[derive(Debug, Clone, Default)]
struct Topics {
    by_name: HashMap<String, (Audience, usize)>,
    groups: Vec<Group>,
}

#[derive(Debug, Clone, Default)]
struct Group {
    topics: Vec<Topic>,
    /// Counts its changes.
    version: u64,
}

impl Topics {
    fn add(&mut self, topic: Topic, audience: Audience) {
        let index = match self.groups.iter().position(|group| group.topics.len() < TOPICS_PER_SUBSCRIPTION) {
            Some(index) => index,
            None => {
                self.groups.push(Group::default());
                self.groups.len() - 1
            }
        };
        if self.by_name.insert(topic.as_str().to_owned(), (audience, index)).is_none() {
            let group = &mut self.groups[index];
            group.topics.push(topic);
            group.version += 1;
        }
    }

    fn remove(&mut self, topic: &Topic) {
        if let Some((_, index)) = self.by_name.remove(topic.as_str()) {
            let group = &mut self.groups[index];
            group.topics.retain(|other| other != topic);
            group.version += 1;
        }
    }
}

/// What comes from the relays.
#[derive(Debug)]
pub(crate) enum Heard {
    /// A relay is reached, and the seed's subscriptions are made.
    Reached,
    /// A peer said something.
    Said { relay: RelayIndex, event_id: EventId, listener: Listener, signal: Signal },
    /// Somebody tries whether a link comes to be.
    Check { relay: RelayIndex, event_id: EventId, content: String },
}

/// The relays, from the side that speaks.
pub(crate) struct Signalling {
    key: RelayKey,
    relays: Vec<mpsc::Sender<Utf8Bytes>>,
    topics: watch::Sender<Arc<Topics>>,
    tasks: Vec<JoinHandle<()>>,
    metrics: Metrics,
}

impl Signalling {
    /// Connects to every relay, and stays connected.
    pub(crate) fn start(
        urls: Vec<String>,
        key: RelayKey,
        heard: mpsc::Sender<Heard>,
        connector: Connector,
        metrics: Metrics,
        health: Health,
    ) -> Self {
        let topics = watch::Sender::new(Arc::new(Topics::default()));
        health.set("signalling", State::Starting);
        let mut relays = Vec::new();
        let mut tasks = Vec::new();
        for (index, url) in urls.into_iter().enumerate() {
            let (sender, outgoing) = mpsc::channel(QUEUE);
            relays.push(sender);
            let relay = Relay {
                index: RelayIndex(index),
                url,
                key: key.clone(),
                topics: topics.subscribe(),
                subscribed: Vec::new(),
                resubscribe: None,
                refusals: 0,
                heard: heard.clone(),
                connector: connector.clone(),
                metrics: metrics.clone(),
                health: health.clone(),
            };
            tasks.push(tokio::spawn(relay.run(outgoing)));
        }
        Self { key, relays, topics, tasks, metrics }
    }

    /// Listens on more topics, on all relays.
    pub(crate) fn listen(&self, topics: impl IntoIterator<Item = (Topic, Listener)>) {
        self.topics.send_modify(|all| {
            let all = Arc::make_mut(all);
            topics.into_iter().for_each(|(topic, listener)| all.add(topic, Audience::Room(listener)));
        });
    }

    /// Listens for who tries whether links come to be.
    pub(crate) fn listen_for_checks(&self, topic: Topic) {
        self.topics.send_modify(|all| Arc::make_mut(all).add(topic, Audience::Check));
    }

    /// Listens no longer on some topics.
    pub(crate) fn unlisten<'a>(&self, topics: impl IntoIterator<Item = &'a Topic>) {
        self.topics.send_modify(|all| {
            let all = Arc::make_mut(all);
            topics.into_iter().for_each(|topic| all.remove(topic));
        });
    }

    /// Publishes `signal` under `topic`, on one relay or on all.
    pub(crate) fn publish(&self, to: Option<RelayIndex>, topic: &Topic, signal: &Signal) {
        self.publish_content(to, topic, &signal.to_content());
    }

    /// Publishes an event with this content.
    pub(crate) fn publish_content(&self, to: Option<RelayIndex>, topic: &Topic, content: &str) {
        let text = match self.key.event_message(topic.kind(), topic.as_str(), content) {
            Ok(text) => Utf8Bytes::from(text),
            Err(error) => return tracing::error!(%error, "an event could not be signed"),
        };
        let all = self.relays.iter().enumerate();
        for (_, relay) in all.filter(|(index, _)| to.is_none_or(|to| to.0 == *index)) {
            if relay.try_send(text.clone()).is_err() {
                self.metrics.relay_drops.inc();
            }
        }
    }

    /// Sends what is queued, and leaves the relays.
    pub(crate) async fn shutdown(self, timeout: Duration) {
        drop(self.relays);
        let deadline = tokio::time::Instant::now() + timeout;
        for mut task in self.tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                task.abort();
            }
        }
    }
}

/// One relay, from the side that listens.
struct Relay {
    index: RelayIndex,
    url: String,
    key: RelayKey,
    topics: watch::Receiver<Arc<Topics>>,
    /// The version of each group of topics that the relay knows.
    subscribed: Vec<u64>,
    /// When to make subscriptions again that the relay has ended.
    resubscribe: Option<tokio::time::Instant>,
    /// How often the relay has refused something on this connection.
    refusals: u32,
    heard: mpsc::Sender<Heard>,
    connector: Connector,
    metrics: Metrics,
    health: Health,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Why a connection to a relay ended.
enum End {
    /// The seed is shutting down.
    Finished,
    /// The relay went away, or never was there.
    Lost(String),
}

/// What a relay says of an event.
#[derive(Deserialize)]
struct Event<'a> {
    id: EventId,
    #[serde(borrow)]
    content: Cow<'a, str>,
    #[serde(borrow)]
    tags: Vec<Vec<Cow<'a, str>>>,
}

impl Relay {
    async fn run(mut self, mut outgoing: mpsc::Receiver<Utf8Bytes>) {
        let mut wait = BACKOFF.0;
        loop {
            let start = Instant::now();
            let reason = match self.connect().await {
                Ok(socket) => {
                    self.connected(1);
                    let end = self.converse(socket, &mut outgoing).await;
                    self.connected(-1);
                    match end {
                        End::Finished => return,
                        End::Lost(reason) => reason,
                    }
                }
                Err(reason) => reason,
            };
            if start.elapsed() > GOOD {
                wait = BACKOFF.0;
            }
            tracing::warn!(relay = %self.url, %reason, retry_seconds = wait.as_secs(), "a relay is not reached");
            let jitter = wait.mul_f64(rand::rng().random_range(0.0..0.2));
            let again = tokio::time::sleep(wait + jitter);
            tokio::pin!(again);
            // What is said meanwhile is said to nobody: signals do not keep.
            loop {
                tokio::select! {
                    () = &mut again => break,
                    said = outgoing.recv() => if said.is_none() { return },
                }
            }
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    fn connected(&self, change: i64) {
        self.metrics.relays_connected.add(change);
        let state = if self.metrics.relays_connected.get() > 0 {
            State::Ok
        } else {
            State::Degraded("no relay is reached".into())
        };
        self.health.set("signalling", state);
    }

    async fn connect(&self) -> Result<Socket, String> {
        let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let connecting = tokio_tungstenite::connect_async_tls_with_config(
            self.url.as_str(),
            Some(config),
            true,
            Some(self.connector.clone()),
        );
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok((socket, _))) => Ok(socket),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("it does not answer".into()),
        }
    }

    async fn converse(&mut self, mut socket: Socket, outgoing: &mut mpsc::Receiver<Utf8Bytes>) -> End {
        self.subscribed.clear();
        (self.resubscribe, self.refusals) = (None, 0);
        if let Err(error) = self.subscribe(&mut socket).await {
            return End::Lost(error.to_string());
        }
        tracing::info!(relay = %self.url, "relay reached");
        if self.heard.send(Heard::Reached).await.is_err() {
            return End::Finished;
        }
        let mut ping = tokio::time::interval(PING_INTERVAL);
        ping.reset();
        let mut last_heard = Instant::now();
        loop {
            let sent = tokio::select! {
                message = socket.next() => {
                    last_heard = Instant::now();
                    match message {
                        Some(Ok(Message::Text(text))) if text.starts_with(r#"["AUTH""#) => {
                            self.prove(&mut socket, &text).await
                        }
                        Some(Ok(Message::Text(text))) => {
                            if let Some(heard) = self.understand(&text)
                                && self.heard.send(heard).await.is_err()
                            {
                                return End::Finished;
                            }
                            Ok(())
                        }
                        Some(Ok(Message::Close(_))) | None => return End::Lost("it closed the connection".into()),
                        Some(Ok(_)) => Ok(()),
                        Some(Err(error)) => Err(error),
                    }
                }
                said = outgoing.recv() => match said {
                    Some(text) => self.send(&mut socket, text, outgoing).await,
                    None => {
                        // Goodbye is said; a relay that is gone already has not missed it.
                        let _ = tokio::time::timeout(Duration::from_millis(300), socket.close(None)).await;
                        return End::Finished;
                    }
                },
                changed = self.topics.changed() => match changed {
                    Ok(()) => self.subscribe(&mut socket).await,
                    // The other side goes together with that of `outgoing`, which is heard of next.
                    Err(_) => Ok(()),
                },
                () = until(self.resubscribe) => {
                    self.resubscribe = None;
                    self.subscribe(&mut socket).await
                }
                _ = ping.tick() => {
                    if last_heard.elapsed() > SILENCE {
                        return End::Lost("it has gone silent".into());
                    }
                    socket.send(Message::Ping(Default::default())).await
                }
            };
            if let Err(error) = sent {
                return End::Lost(error.to_string());
            }
        }
    }

    async fn send(
        &self,
        socket: &mut Socket,
        first: Utf8Bytes,
        outgoing: &mut mpsc::Receiver<Utf8Bytes>,
    ) -> Result<(), Error> {
        let mut next = Some(first);
        while let Some(text) = next {
            socket.feed(Message::Text(text)).await?;
            next = outgoing.try_recv().ok();
        }
        socket.flush().await
    }

    /// Answers a relay that asks who is there (NIP-42). What was asked before was refused: it is asked again.
    async fn prove(&mut self, socket: &mut Socket, text: &str) -> Result<(), Error> {
        let Ok((_, challenge)) = serde_json::from_str::<(&str, String)>(text) else { return Ok(()) };
        match self.key.auth_message(&self.url, &challenge) {
            Ok(proof) => socket.send(Message::text(proof)).await?,
            Err(error) => tracing::error!(%error, "a proof could not be signed"),
        }
        self.subscribed.clear();
        self.subscribe(socket).await?;
        // The announce that was refused meanwhile is said again. A mesh that is gone no longer cares.
        let _ = self.heard.send(Heard::Reached).await;
        Ok(())
    }

    /// Makes the relay's subscriptions what they should be.
    async fn subscribe(&mut self, socket: &mut Socket) -> Result<(), Error> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let topics = Arc::clone(&self.topics.borrow_and_update());
        self.subscribed.resize(topics.groups.len(), 0);
        for (index, (group, known)) in topics.groups.iter().zip(&mut self.subscribed).enumerate() {
            if group.version == *known {
                continue;
            }
            *known = group.version;
            let name = format!("{SUBSCRIPTION}{index}");
            let request = if group.topics.is_empty() {
                serde_json::json!(["CLOSE", name])
            } else {
                let mut kinds: Vec<u16> = group.topics.iter().map(Topic::kind).collect();
                kinds.sort_unstable();
                kinds.dedup();
                let names: Vec<&str> = group.topics.iter().map(Topic::as_str).collect();
                let since = now.saturating_sub(LOOK_BACK_SECONDS);
                serde_json::json!(["REQ", name, { "kinds": kinds, "#x": names, "since": since }])
            };
            socket.feed(Message::text(request.to_string())).await?;
        }
        socket.flush().await
    }

    /// The relay has ended a subscription, whose name is given as JSON.
    fn closed(&mut self, name: &str) {
        let index = name.trim_matches('"').strip_prefix(SUBSCRIPTION).and_then(|index| index.parse::<usize>().ok());
        if let Some(known) = index.and_then(|index| self.subscribed.get_mut(index)) {
            *known = 0;
            let wait = RESUBSCRIBE * (1 << self.refusals.min(4));
            self.resubscribe.get_or_insert_with(|| tokio::time::Instant::now() + wait);
        }
    }

    /// Makes sense of a relay's message; most of what is not an event is of no interest.
    fn understand(&mut self, text: &str) -> Option<Heard> {
        let parts: Vec<&RawValue> = serde_json::from_str(text).ok()?;
        match parts.as_slice() {
            [verb, _, event] if verb.get() == r#""EVENT""# => {
                let event: Event<'_> = serde_json::from_str(event.get()).ok()?;
                let topic = event.tags.iter().find(|tag| tag.first().is_some_and(|name| name == "x"))?.get(1)?;
                let audience = self.topics.borrow().by_name.get(topic.as_ref())?.0;
                let (relay, event_id) = (self.index, event.id);
                match audience {
                    Audience::Room(listener) => {
                        let signal = Signal::parse(&event.content)?;
                        Some(Heard::Said { relay, event_id, listener, signal })
                    }
                    Audience::Check => Some(Heard::Check { relay, event_id, content: event.content.into_owned() }),
                }
            }
            [verb, rest @ ..] if matches!(verb.get(), r#""CLOSED""# | r#""NOTICE""#) => {
                if let (r#""CLOSED""#, [name, ..]) = (verb.get(), rest) {
                    self.closed(name.get());
                }
                let reason = truncated(rest.last().map_or("", |reason| reason.get()));
                self.refusals = self.refusals.saturating_add(1);
                // Worth a person's attention, since a relay that refuses is no relay; but not each time.
                if self.refusals <= TOLD_REFUSALS {
                    tracing::warn!(relay = %self.url, ?reason, "a relay refuses");
                } else {
                    tracing::debug!(relay = %self.url, ?reason, "a relay refuses");
                }
                None
            }
            [verb, _, accepted, reason] if verb.get() == r#""OK""# && accepted.get() == "false" => {
                tracing::debug!(relay = %self.url, reason = ?truncated(reason.get()), "a relay refused an event");
                None
            }
            _ => None,
        }
    }
}

/// Waits until then; without a time, for ever.
async fn until(time: Option<tokio::time::Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The start of a text from outside, for the log.
fn truncated(text: &str) -> &str {
    text.char_indices().nth(200).map_or(text, |(end, _)| &text[..end])
}
