//! Stored events of a cluster: each relay keeps all of them, whichever they were published to.
//!
//! They travel by one stream of JetStream, which every relay reads from where it last was. What is published here goes
//! through a journal on disk: it waits there while NATS is away, also over a restart, and leaves it once the stream has
//! acknowledged it. An event that comes twice is known by its id, in the stream and in the store; of replaceable ones and
//! deletions the order does not matter (NIP-01, NIP-09). So all relays come to the same.

mod journal;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::stream::{self, Stream};
use async_nats::jetstream::{self, message::PublishMessage};
use futures_util::StreamExt as _;
use journal::Journal;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use serde::{Deserialize, Serialize};
use service::{Cluster, Health, State};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::relay::Relay;
use crate::store::{NotStored, StoreConfig};

/// The stream, and the subject by which events reach it.
pub const STREAM: &str = "homeport_events";
const SUBJECT: &str = "homeport.events";
/// The part of the health that says how it goes.
const PART: &str = "stored events of the cluster";
/// How long to wait before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// After so many events that came, where we are is written down; and whenever there are no more.
const WRITE_POSITION_EVERY: u64 = 256;

/// What does not work; it is tried again.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("JetStream: {0}")]
    JetStream(String),
    #[error("{0}")]
    File(#[from] io::Error),
    #[error("this relay's store: {0}")]
    Store(NotStored),
}

impl Failure {
    fn of(error: impl std::fmt::Display) -> Self {
        Self::JetStream(error.to_string())
    }
}

/// How far the stream has been read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    /// When the stream was made, in seconds: another one begins anew.
    stream: i64,
    sequence: u64,
}

impl Position {
    fn path(folder: &Path) -> PathBuf {
        folder.join("cluster-position.json")
    }

    /// Where we were; the beginning when that is not known: what comes twice is known.
    fn read(folder: &Path) -> Self {
        std::fs::read(Self::path(folder)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    fn write(&self, folder: &Path) -> io::Result<()> {
        let path = Self::path(folder);
        let unfinished = path.with_extension("new");
        std::fs::write(&unfinished, serde_json::to_vec(self)?)?;
        std::fs::rename(unfinished, path)
    }
}

#[derive(Debug)]
struct ReplicationMetrics {
    events: IntCounterVec,
    waiting: IntGauge,
}

impl ReplicationMetrics {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            events: IntCounterVec::new(
                Opts::new(
                    "homeport_relay_cluster_stored_events_total",
                    "Stored events to and from the stream of a cluster, by direction; this relay's own come back.",
                ),
                &["direction"],
            )?,
            waiting: IntGauge::new(
                "homeport_relay_cluster_waiting_bytes",
                "Bytes of stored events that the stream of the cluster has not acknowledged yet.",
            )?,
        };
        registry.register(Box::new(metrics.events.clone()))?;
        registry.register(Box::new(metrics.waiting.clone()))?;
        for direction in ["in", "out"] {
            metrics.events.with_label_values(&[direction]);
        }
        Ok(metrics)
    }
}

/// What makes the stored events of all relays the same.
#[derive(Debug)]
pub(crate) struct Replication {
    cluster: Cluster,
    folder: PathBuf,
    max_bytes: usize,
    journal: Mutex<Journal>,
    appended: Notify,
    metrics: ReplicationMetrics,
    health: Health,
}

impl Replication {
    /// Replication of the events in `store`.
    ///
    /// # Errors
    /// When the journal cannot be opened.
    pub(crate) fn open(
        cluster: Cluster,
        store: &StoreConfig,
        registry: &Registry,
        health: Health,
    ) -> Result<Self, ReplicationError> {
        let journal = Journal::open(&store.folder)
            .map_err(|source| ReplicationError::Journal { folder: store.folder.clone(), source })?;
        Ok(Self {
            cluster,
            folder: store.folder.clone(),
            max_bytes: store.max_bytes,
            journal: Mutex::new(journal),
            appended: Notify::new(),
            metrics: ReplicationMetrics::register(registry)?,
            health,
        })
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event was stored here: the others are to have it.
    ///
    /// # Errors
    /// When it cannot be written down: then it must come again.
    pub(crate) fn tell(&self, raw: &str) -> io::Result<()> {
        let mut journal = self.journal();
        let appended = journal.append(raw.as_bytes());
        self.count_waiting(&journal);
        drop(journal);
        self.appended.notify_one();
        appended
    }

    fn count_waiting(&self, journal: &Journal) {
        self.metrics.waiting.set(i64::try_from(journal.waiting()).unwrap_or(i64::MAX));
    }

    /// The stream, made when there is none.
    async fn stream(&self) -> Result<Stream, Failure> {
        let config = stream::Config {
            name: STREAM.into(),
            description: Some("stored events of Homeport's relays".into()),
            subjects: vec![SUBJECT.into()],
            // What a relay keeps at most: what is older is in their stores.
            max_bytes: i64::try_from(self.max_bytes).unwrap_or(i64::MAX),
            ..stream::Config::default()
        };
        self.cluster.keep(config).await.map_err(Failure::of)
    }

    /// Sends what is in the journal, for ever.
    async fn send(self: Arc<Self>) {
        loop {
            match self.send_some().await {
                Ok(true) => self.works(),
                Ok(false) => self.appended.notified().await,
                Err(failure) => self.fails(&failure).await,
            }
        }
    }

    /// Sends some of what is in the journal. Returns whether there was anything.
    async fn send_some(&self) -> Result<bool, Failure> {
        let (events, end) = self.journal().some()?;
        if events.is_empty() {
            return Ok(false);
        }
        let jetstream = self.cluster.jetstream();
        let mut acknowledgements = Vec::with_capacity(events.len());
        for raw in events {
            let Ok(event) = serde_json::from_slice::<crate::event::Event<'_>>(&raw) else { continue };
            let id = hex::encode(event.id);
            let message = PublishMessage::build().message_id(id).payload(raw.into());
            acknowledgements.push(jetstream.send_publish(SUBJECT, message).await);
        }
        for acknowledgement in acknowledgements {
            let waited = match acknowledgement {
                Ok(acknowledgement) => acknowledgement.await,
                Err(error) => Err(error),
            };
            match waited {
                Ok(_) => self.metrics.events.with_label_values(&["out"]).inc(),
                Err(error) => {
                    if error.kind() == jetstream::context::PublishErrorKind::StreamNotFound {
                        self.stream().await?;
                    }
                    return Err(Failure::of(error));
                }
            }
        }
        let mut journal = self.journal();
        journal.done(end)?;
        self.count_waiting(&journal);
        Ok(true)
    }

    /// Takes in what comes, for ever.
    async fn receive(self: Arc<Self>, relay: Weak<Relay>) {
        while let Some(failure) = self.follow(&relay).await.err() {
            self.fails(&failure).await;
        }
    }

    /// Takes in what comes. Returns when the relay is gone.
    async fn follow(&self, relay: &Weak<Relay>) -> Result<(), Failure> {
        let stream = self.stream().await?;
        let made = stream.cached_info().created.unix_timestamp();
        let mut position = Position::read(&self.folder);
        if position.stream != made {
            position = Position { stream: made, sequence: 0 };
        }
        let start_sequence = position.sequence + 1;
        let consumer = pull::OrderedConfig {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence },
            ..pull::OrderedConfig::default()
        };
        let consumer = stream.create_consumer(consumer).await.map_err(Failure::of)?;
        let mut messages = consumer.messages().await.map_err(Failure::of)?;
        self.works();
        let mut unwritten = 0;
        while let Some(message) = messages.next().await {
            let message = message.map_err(Failure::of)?;
            let Some(relay) = relay.upgrade() else { return Ok(()) };
            let (sequence, pending) =
                message.info().map(|info| (info.stream_sequence, info.pending)).map_err(Failure::of)?;
            self.metrics.events.with_label_values(&["in"]).inc();
            match std::str::from_utf8(&message.payload) {
                Ok(raw) => relay.take_in(raw).await.map_err(Failure::Store)?,
                Err(error) => tracing::warn!(%error, "something in the stream of events is none"),
            }
            position.sequence = sequence;
            unwritten += 1;
            if pending == 0 || unwritten >= WRITE_POSITION_EVERY {
                position.write(&self.folder)?;
                unwritten = 0;
            }
        }
        Err(Failure::JetStream("the stream ends".into()))
    }

    fn works(&self) {
        self.health.set(PART, State::Ok);
    }

    async fn fails(&self, failure: &Failure) {
        let reason = failure.to_string().escape_debug().to_string();
        // That NATS is away is said already.
        if self.cluster.is_connected()
            && self.health.set(PART, State::Degraded(format!("they do not cross between relays: {reason}")))
        {
            tracing::warn!(reason, "stored events do not cross between relays");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The stored events of a cluster cannot be made the same.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    /// Its journal cannot be opened.
    #[error("cannot open the journal of events for other relays in {folder} (setting seed.data): {source}")]
    Journal {
        /// The folder of the store.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

/// Starts to exchange events with the other relays, until `stop`.
pub(crate) fn start(relay: &Arc<Relay>, stop: &CancellationToken) {
    if let Some(replication) = &relay.replication {
        let sending = Arc::clone(replication).send();
        tokio::spawn(stop.clone().run_until_cancelled_owned(sending));
        let receiving = Arc::clone(replication).receive(Arc::downgrade(relay));
        tokio::spawn(stop.clone().run_until_cancelled_owned(receiving));
    }
}
