//! One client's connection: reads its messages, writes what is for it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use futures_util::SinkExt as _;
use rand::Rng as _;
use rand::distr::Alphanumeric;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::event::{Event, KeyCache};
use crate::filter::{Filter, FilterError};
use crate::limits::{Admitted, ConnectionLimit};
use crate::message::{ClientMessage, MessageError, relay_message};
use crate::outbox::{Delivery, Outbox};
use crate::presence::PresentKey;
use crate::relay::{Accepted, Publisher, Refusal, Relay};
use crate::returning::Asked;
use crate::subscriptions::Subscription;

/// Messages to a client that may wait in the write buffer for one flush of the socket.
const BATCH_MESSAGES: usize = 64;
/// How often a client is asked whether it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// A client of which nothing was heard for so long is gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// How often peers that are present are made known to new subscriptions, within the budget of announces.
const REPLAY_INTERVAL: Duration = Duration::from_secs(1);
/// Authors that may be present over one connection; more are passed on as by any relay.
const MAX_JOINED: usize = 1_024;
/// Present peers that wait to be made known to one client, at most.
const MAX_REPLAYS: usize = 16_384;
/// Messages in a row that are not Nostr before a client is cut off.
const MAX_MALFORMED: usize = 32;

/// Serves one client until it leaves, misbehaves or `stop` is cancelled.
/// The client reached the relay under one of the names in `hosts`.
pub(crate) async fn serve(
    socket: WebSocket,
    relay: Arc<Relay>,
    admitted: Admitted,
    hosts: Vec<String>,
    stop: CancellationToken,
) {
    relay.metrics.connections.inc();
    let number = relay.new_connection();
    let limit = ConnectionLimit::new(&relay.rates);
    let mut connection = Connection {
        socket,
        relay,
        number,
        admitted,
        hosts,
        challenge: rand::rng().sample_iter(Alphanumeric).take(32).map(char::from).collect(),
        proven: None,
        keys: KeyCache::default(),
        limit,
        outbox: Arc::default(),
        unflushed: 0,
        subscriptions: HashMap::new(),
        joined: HashSet::new(),
        replays: VecDeque::new(),
        malformed: 0,
        author: None,
        has_asked: false,
        said_goodbye: false,
        clock_is_known: false,
    };
    let reason = connection.run(stop).await;
    connection.relay.metrics.disconnects.with_label_values(&[reason.label()]).inc();
    if let Some((code, text)) = reason.close_frame() {
        let frame = Message::Close(Some(CloseFrame { code, reason: text.into() }));
        // The client may be gone already: that is what this is about.
        let _ = timeout(Duration::from_millis(500), connection.socket.send(frame)).await;
    }
    connection.relay.metrics.connections.dec();
}

/// Seconds since the Unix epoch.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy)]
enum End {
    Left,
    Stalled,
    Silent,
    TooLarge,
    Malformed,
    Shutdown,
}

impl End {
    fn label(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Stalled => "stalled",
            Self::Silent => "silent",
            Self::TooLarge => "too_large",
            Self::Malformed => "malformed",
            Self::Shutdown => "shutdown",
        }
    }

    fn close_frame(self) -> Option<(u16, &'static str)> {
        match self {
            Self::Left | Self::Silent | Self::Stalled => None,
            Self::TooLarge => Some((close_code::SIZE, "message too large")),
            Self::Malformed => Some((close_code::POLICY, "not Nostr")),
            Self::Shutdown => Some((close_code::RESTART, "restarting")),
        }
    }
}

struct Connection {
    socket: WebSocket,
    relay: Arc<Relay>,
    /// Tells this connection from all others.
    number: u64,
    admitted: Admitted,
    hosts: Vec<String>,
    /// What the client must sign to prove a key (NIP-42).
    challenge: String,
    /// The key that the client has proven.
    proven: Option<[u8; 32]>,
    keys: KeyCache,
    limit: ConnectionLimit,
    outbox: Arc<Outbox>,
    /// Messages written since the socket was last flushed.
    unflushed: usize,
    subscriptions: HashMap<String, Arc<Subscription>>,
    /// Who announced itself over this connection.
    joined: HashSet<PresentKey>,
    /// Present peers that new subscriptions are still to hear of.
    replays: VecDeque<(Arc<Subscription>, PresentKey)>,
    malformed: usize,
    /// Who spoke over this connection first, and speaks there now.
    author: Option<[u8; 32]>,
    /// Whether the client has subscribed to anything, or was given back what it had.
    has_asked: bool,
    /// Whether the client has closed the connection in order.
    said_goodbye: bool,
    /// Whether the client's clock was compared with ours.
    clock_is_known: bool,
}

impl Connection {
    async fn run(&mut self, stop: CancellationToken) -> End {
        let mut ping = tokio::time::interval(PING_INTERVAL);
        ping.reset();
        let mut replay = tokio::time::interval(REPLAY_INTERVAL);
        replay.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        if self.relay.gate.asks_for_proof()
            && let ControlFlow::Break(end) = self.send_text(relay_message::auth(&self.challenge)).await
        {
            return end;
        }
        let outbox = Arc::clone(&self.outbox);
        loop {
            // In this order, so that all that can be done at once is done before the socket is flushed: a client that
            // has ten events coming gets them in one packet, and one that has a single event gets it without waiting.
            let step = tokio::select! {
                biased;
                () = stop.cancelled() => ControlFlow::Break(End::Shutdown),
                _ = ping.tick() => {
                    if heard.elapsed() > IDLE_TIMEOUT {
                        ControlFlow::Break(End::Silent)
                    } else {
                        self.send(Message::Ping(Default::default())).await
                    }
                }
                _ = replay.tick(), if !self.replays.is_empty() => self.replay().await,
                message = self.socket.recv() => {
                    heard = Instant::now();
                    self.receive(message).await
                }
                delivery = outbox.next() => self.send_event(delivery).await,
                () = std::future::ready(()), if self.unflushed > 0 => self.flush().await,
            };
            if let ControlFlow::Break(end) = step {
                return end;
            }
        }
    }

    async fn receive(&mut self, message: Option<Result<Message, axum::Error>>) -> ControlFlow<End> {
        let text = match message {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => return ControlFlow::Continue(()),
            Some(Ok(Message::Binary(_))) => return self.refuse_message("invalid: binary messages are not Nostr").await,
            Some(Ok(Message::Close(_))) => {
                self.said_goodbye = true;
                return ControlFlow::Break(End::Left);
            }
            None => return ControlFlow::Break(End::Left),
            Some(Err(error)) => return ControlFlow::Break(end_of(&error)),
        };
        match ClientMessage::parse(text.as_str()) {
            Ok(message) => {
                self.malformed = 0;
                self.relay.metrics.messages.with_label_values(&[message.verb()]).inc();
                if !self.limit.allows_message(text.len()) {
                    return Box::pin(self.slow_down(message)).await;
                }
                match message {
                    ClientMessage::Event { event, raw } => self.publish(&event, raw).await,
                    ClientMessage::Req { subscription, filters } => self.subscribe(subscription, &filters).await,
                    ClientMessage::Close { subscription } => {
                        self.unsubscribe(&subscription);
                        self.remember_author();
                        ControlFlow::Continue(())
                    }
                    ClientMessage::Auth { event } => Box::pin(self.prove(&event)).await,
                    ClientMessage::Count { query, filters } => Box::pin(self.count(&query, &filters)).await,
                }
            }
            Err(MessageError::Event { id: Some(id), reason }) => {
                self.relay.metrics.event("malformed", "unknown");
                self.send_text(relay_message::ok(&id, false, &format!("invalid: {reason}"))).await
            }
            Err(error) => self.refuse_message(&error.to_string()).await,
        }
    }

    /// Answers a message that came too fast, without doing what it asks.
    async fn slow_down(&mut self, message: ClientMessage<'_>) -> ControlFlow<End> {
        const REASON: &str = "rate-limited: too many messages, slow down";
        self.relay.metrics.rate_limit_hits.with_label_values(&["messages"]).inc();
        match message {
            ClientMessage::Event { event, .. } | ClientMessage::Auth { event } => {
                self.send_text(relay_message::ok(&hex::encode(event.id), false, REASON)).await
            }
            ClientMessage::Req { subscription, .. } | ClientMessage::Count { query: subscription, .. } => {
                self.send_text(relay_message::closed(&subscription, REASON)).await
            }
            // Ending a subscription lightens the load.
            ClientMessage::Close { subscription } => {
                self.unsubscribe(&subscription);
                ControlFlow::Continue(())
            }
        }
    }

    /// Answers what is no message of Nostr; a client that sends nothing else is cut off.
    async fn refuse_message(&mut self, reason: &str) -> ControlFlow<End> {
        self.relay.metrics.messages.with_label_values(&["malformed"]).inc();
        self.malformed += 1;
        if self.malformed > MAX_MALFORMED {
            return ControlFlow::Break(End::Malformed);
        }
        self.send_text(relay_message::notice(reason)).await
    }

    async fn publish(&mut self, event: &Event<'_>, raw: &str) -> ControlFlow<End> {
        if let Err(reason) = self.relay.gate.admits_client(self.proven.as_ref()) {
            return self.send_text(relay_message::ok(&hex::encode(event.id), false, &reason.to_string())).await;
        }
        let client = Publisher {
            origin: self.admitted.origin(),
            connection: self.number,
            proven: self.proven.as_ref(),
            may_join: self.joined.len() < MAX_JOINED,
        };
        let mut is_new = false;
        let (accepted, reason) = match self.relay.publish(event, raw, client, &mut self.keys).await {
            Ok((accepted, joined)) => {
                self.joined.extend(joined);
                // What is stored may have been written long ago, and what comes again may be old.
                is_new = event.is_ephemeral() && accepted != Accepted::Duplicate;
                if is_new && !self.clock_is_known {
                    self.clock_is_known = true;
                    self.relay.compare_clocks(event.pubkey, event.created_at, unix_now());
                }
                (true, accepted.reason().to_owned())
            }
            Err(refusal) => {
                if refusal == Refusal::Protected {
                    // Now the client knows what to sign to prove its key.
                    self.send_text(relay_message::auth(&self.challenge)).await?;
                }
                (false, refusal.to_string())
            }
        };
        self.send_text(relay_message::ok(&hex::encode(event.id), accepted, &reason)).await?;
        if is_new && self.author.is_none() { Box::pin(self.met(event)).await } else { ControlFlow::Continue(()) }
    }

    /// An author speaks over this connection for the first time. If that is one who has come back without asking again, it is
    /// given what it asked for before.
    async fn met(&mut self, event: &Event<'_>) -> ControlFlow<End> {
        // Whoever repeats an old event of another's is not that author.
        if event.created_at.abs_diff(unix_now()) > self.relay.limits.clock_skew_seconds {
            return ControlFlow::Continue(());
        }
        let author = event.pubkey;
        self.author = Some(author);
        if !self.has_asked {
            for (id, filters) in self.relay.returning.asked_by(&author, std::time::Instant::now()) {
                self.has_asked = true;
                self.relay.metrics.resumed.inc();
                self.open(id.into(), filters);
            }
        }
        self.remember_author();
        self.replay().await
    }

    /// Has it remembered what the author who speaks here asks for.
    fn remember_author(&self) {
        if let Some(author) = self.author {
            let asked = |(id, open): (&String, &Arc<Subscription>)| (id.as_str().into(), Arc::clone(&open.filters));
            let asked: Asked = self.subscriptions.iter().map(asked).collect();
            self.relay.returning.note(author, self.number, asked);
        }
    }

    /// Takes a client's proof of its key (NIP-42).
    async fn prove(&mut self, event: &Event<'_>) -> ControlFlow<End> {
        let verdict = match self.relay.verify(event, self.admitted.origin(), &mut self.keys) {
            Ok(()) => {
                self.relay.gate.accepts_proof(event, &self.challenge, &self.hosts, unix_now()).map_err(str::to_owned)
            }
            Err(refusal) => Err(refusal.to_string()),
        };
        if verdict.is_ok() {
            self.proven = Some(event.pubkey);
        }
        let accepted = verdict.is_ok();
        let reason = verdict.err().unwrap_or_default();
        self.send_text(relay_message::ok(&hex::encode(event.id), accepted, &reason)).await
    }

    async fn subscribe(&mut self, id: String, filters: &[&str]) -> ControlFlow<End> {
        self.has_asked = true;
        // A REQ under an id in use replaces that subscription (NIP-01), also when it is refused.
        self.unsubscribe(&id);
        match self.accept_filters(filters) {
            Ok(accepted) => {
                let stored: Vec<&str> = accepted
                    .iter()
                    .zip(filters)
                    .filter(|(filter, _)| filter.asks_for_stored())
                    .map(|(_, raw)| *raw)
                    .collect();
                let eose = relay_message::eose(&id);
                let subscription = self.open(id, accepted.into());
                self.remember_author();
                // What is published from now on waits in the queue behind what is stored.
                Box::pin(self.send_stored(&subscription, &stored)).await?;
                self.send_text(eose).await?;
                self.replay().await
            }
            Err(reason) => self.send_text(relay_message::closed(&id, &reason)).await,
        }
    }

    /// Opens a subscription: from now on, events for it come into the queue.
    fn open(&mut self, id: String, filters: Arc<[Filter]>) -> Arc<Subscription> {
        let followed = match &self.relay.neighbours {
            Some(neighbours) => {
                let already = self.subscriptions.values().map(|open| open.followed.len()).sum();
                neighbours.follow(&filters, already)
            }
            None => Box::default(),
        };
        let outbox = Arc::clone(&self.outbox);
        let subscription = self.relay.subscriptions.add(&id, self.number, filters, followed, outbox);
        self.relay.metrics.subscriptions.inc();
        self.queue_replays(&subscription);
        self.subscriptions.insert(id, Arc::clone(&subscription));
        subscription
    }

    /// Sends the stored events that a new subscription asks for, each once, newest first for each filter.
    async fn send_stored(&mut self, subscription: &Arc<Subscription>, filters: &[&str]) -> ControlFlow<End> {
        let relay = Arc::clone(&self.relay);
        let Some(store) = &relay.store else { return ControlFlow::Continue(()) };
        let mut sent = HashSet::new();
        for filter in filters {
            for event in store.query(filter, relay.limits.stored_events).await {
                if sent.insert(event.id) {
                    let text = format!("{}{}]", subscription.prefix, serde_json::json!(event));
                    self.send_text(text).await?;
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Counts stored events (NIP-45); of several filters, the counts are added.
    async fn count(&mut self, query: &str, filters: &[&str]) -> ControlFlow<End> {
        let counted = match (self.accept_filters(filters), &self.relay.store) {
            (Err(reason), _) => Err(reason),
            (Ok(_), None) => Err("unsupported: this relay stores nothing that could be counted".to_owned()),
            (Ok(_), Some(store)) => {
                let mut total = Ok(0);
                for filter in filters {
                    total = match (total, store.count(filter).await) {
                        (Ok(total), Some(count)) => Ok(total + count),
                        _ => Err("error: the store does not answer".to_owned()),
                    };
                }
                total
            }
        };
        match counted {
            Ok(count) => self.send_text(relay_message::count(query, count)).await,
            Err(reason) => self.send_text(relay_message::closed(query, &reason)).await,
        }
    }

    /// Takes note of who is present under the topics of a new subscription.
    fn queue_replays(&mut self, subscription: &Arc<Subscription>) {
        if !self.relay.presence.is_on() {
            return;
        }
        let now = std::time::Instant::now();
        for topic in subscription.topics() {
            for key in self.relay.presence.present(topic, self.number, now) {
                if self.replays.len() < MAX_REPLAYS {
                    self.replays.push_back((Arc::clone(subscription), key));
                }
            }
        }
    }

    /// Makes some more of those who are present known to this client, as many as the budget of a second allows.
    async fn replay(&mut self) -> ControlFlow<End> {
        let mut sent = 0;
        while sent < self.relay.presence.budget()
            && let Some((subscription, key)) = self.replays.pop_front()
        {
            let Some(raw) = self.relay.presence.latest(&key) else { continue };
            let Ok(event) = serde_json::from_str::<Event<'_>>(&raw) else { continue };
            if subscription.matches(&event) && self.is_open(&subscription) {
                sent += 1;
                self.relay.metrics.replayed.inc();
                self.send_text(format!("{}{raw}]", subscription.prefix)).await?;
            }
        }
        ControlFlow::Continue(())
    }

    fn is_open(&self, subscription: &Arc<Subscription>) -> bool {
        self.subscriptions.values().any(|open| Arc::ptr_eq(open, subscription))
    }

    fn accept_filters(&self, filters: &[&str]) -> Result<Vec<Filter>, String> {
        self.relay.gate.admits_client(self.proven.as_ref()).map_err(|reason| reason.to_string())?;
        let limits = &self.relay.limits;
        if self.subscriptions.len() >= limits.subscriptions {
            return Err(format!("rate-limited: {} subscriptions per connection at most", limits.subscriptions));
        }
        if filters.len() > limits.filters {
            return Err(format!("invalid: {} filters per subscription at most", limits.filters));
        }
        filters
            .iter()
            .map(|filter| Filter::parse(filter, limits.filter_values, limits.clock_skew_seconds))
            .collect::<Result<_, FilterError>>()
            .map_err(|error| error.to_string())
    }

    fn unsubscribe(&mut self, id: &str) {
        if let Some(subscription) = self.subscriptions.remove(id) {
            self.relay.subscriptions.remove(&subscription);
            if let Some(neighbours) = &self.relay.neighbours {
                neighbours.unfollow(&subscription.followed);
            }
            self.relay.metrics.subscriptions.dec();
        }
    }

    async fn send_event(&mut self, delivery: Delivery) -> ControlFlow<End> {
        let Delivery { subscription, event, published } = delivery;
        let mut text = String::with_capacity(subscription.prefix.len() + event.len() + 1);
        text.push_str(&subscription.prefix);
        text.push_str(&event);
        text.push(']');
        self.send_text(text).await?;
        self.relay.metrics.deliveries.inc();
        self.relay.metrics.delivery_seconds.observe(published.elapsed().as_secs_f64());
        ControlFlow::Continue(())
    }

    async fn send_text(&mut self, text: String) -> ControlFlow<End> {
        self.send(Message::Text(text.into())).await
    }

    /// Writes a message. It leaves when nothing else is to be done at once, or when enough others wait with it.
    async fn send(&mut self, message: Message) -> ControlFlow<End> {
        written(timeout(self.relay.limits.stall, self.socket.feed(message)).await)?;
        self.unflushed += 1;
        if self.unflushed < BATCH_MESSAGES { ControlFlow::Continue(()) } else { self.flush().await }
    }

    async fn flush(&mut self) -> ControlFlow<End> {
        self.unflushed = 0;
        written(timeout(self.relay.limits.stall, self.socket.flush()).await)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(author) = &self.author {
            self.relay.returning.left(author, self.number, self.said_goodbye, std::time::Instant::now());
        }
        let ids: Vec<String> = self.subscriptions.keys().cloned().collect();
        for id in ids {
            self.unsubscribe(&id);
        }
        if !self.joined.is_empty() {
            let gone = self.relay.presence.leave(self.number, self.joined.drain());
            if let Some(neighbours) = &self.relay.neighbours {
                gone.into_iter().for_each(|key| neighbours.tell_gone(key));
            }
            self.relay.count_present();
        }
    }
}

fn written(result: Result<Result<(), axum::Error>, tokio::time::error::Elapsed>) -> ControlFlow<End> {
    match result {
        Ok(Ok(())) => ControlFlow::Continue(()),
        Ok(Err(_)) => ControlFlow::Break(End::Left),
        Err(_) => ControlFlow::Break(End::Stalled),
    }
}

/// What a failed read says about the client.
fn end_of(error: &axum::Error) -> End {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        match cause.downcast_ref::<tokio_tungstenite::tungstenite::Error>() {
            Some(tokio_tungstenite::tungstenite::Error::Capacity(_)) => return End::TooLarge,
            Some(
                tokio_tungstenite::tungstenite::Error::Protocol(_) | tokio_tungstenite::tungstenite::Error::Utf8(_),
            ) => return End::Malformed,
            _ => source = cause.source(),
        }
    }
    End::Left
}
