//! What all connections share, and the way of an event through it: checks, storage, subscribers, other relays.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName};
use service::{Origin, RecentSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Gate, NotAdmitted};
use crate::clocks::Clocks;
use crate::dials::{self, DialLedger};
use crate::event::{Event, KeyCache, VerifyError};
use crate::limits::{self, AddressLimits, Rates};
use crate::metrics::Metrics;
use crate::neighbours::{self, NEIGHBOUR, Neighbours};
use crate::presence::{Audience, Presence, PresentKey};
use crate::replication::Replication;
use crate::returning::Returning;
use crate::server::{Limits, Page};
use crate::store::{NotStored, Store, Stored};
use crate::subscriptions::Subscriptions;

/// How often addresses that have gone quiet are forgotten.
const TIDY_INTERVAL: Duration = Duration::from_secs(60);

/// How often it is written down who may come back after a restart.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// How often dials whose time is over are counted.
const DIALS_INTERVAL: Duration = Duration::from_secs(1);

/// Ids of events that are remembered.
const REMEMBERED: usize = 16_384;

/// The events that were verified lately: the same again costs neither verification nor delivery.
#[derive(Debug, Default)]
pub(crate) struct RecentEvents(Mutex<RecentSet<[u8; 32], REMEMBERED>>);

impl RecentEvents {
    fn ids(&self) -> MutexGuard<'_, RecentSet<[u8; 32], REMEMBERED>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) limits: Limits,
    pub(crate) rates: Rates,
    pub(crate) addresses: Arc<AddressLimits>,
    pub(crate) proxy_header: Option<HeaderName>,
    pub(crate) store: Option<Store>,
    pub(crate) gate: Gate,
    /// Host and port of the public address.
    pub(crate) public_host: Option<String>,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) presence: Presence,
    pub(crate) dials: Option<DialLedger>,
    /// The other relays of a cluster.
    pub(crate) neighbours: Option<Arc<Neighbours>>,
    /// What makes the stored events of a cluster the same.
    pub(crate) replication: Option<Arc<Replication>>,
    pub(crate) page: Page,
    pub(crate) recent: RecentEvents,
    pub(crate) clocks: Clocks,
    pub(crate) returning: Returning,
    pub(crate) next_connection: AtomicU64,
    pub(crate) metrics: Metrics,
    pub(crate) stop: CancellationToken,
    pub(crate) connections: TaskTracker,
}

/// Why an event is not accepted; the message goes to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("blocked: this relay stores nothing, only ephemeral kinds (20000 to 29999) are accepted")]
    NotEphemeral,
    #[error("auth-required: only its author may publish a protected event")]
    Protected,
    #[error("pow: {0} leading zero bits are less than {1}")]
    Difficulty(u32, u32),
    #[error(transparent)]
    NotStored(NotStored),
    #[error("invalid: too many tags")]
    TooManyTags,
    #[error(transparent)]
    NotAdmitted(NotAdmitted),
    #[error("rate-limited: too many events from your address, slow down")]
    TooFast,
    #[error("invalid: {0}")]
    Unverified(VerifyError),
}

/// Who publishes an event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Publisher<'a> {
    pub(crate) origin: Origin,
    pub(crate) connection: u64,
    /// The key that the client has proven.
    pub(crate) proven: Option<&'a [u8; 32]>,
    /// Whether more authors may become present over this connection.
    pub(crate) may_join: bool,
}

/// What became of an event that was not refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// It is for somebody, now or with a later announce.
    Delivered,
    /// Nobody has asked for it.
    Mute,
    /// It was here before.
    Duplicate,
}

impl Accepted {
    /// What the client is told, behind `OK true`.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Delivered => "",
            Self::Mute => "mute: nobody is listening to this",
            Self::Duplicate => "duplicate: this event was here before",
        }
    }
}

impl Relay {
    /// Where a client comes from: as a trusted proxy says, else as the connection says.
    pub(crate) fn origin(&self, address: SocketAddr, headers: &HeaderMap) -> Origin {
        Origin::of(limits::client_address(address, headers, self.proxy_header.as_ref()))
    }

    /// A number that tells a connection from all others.
    pub(crate) fn new_connection(&self) -> u64 {
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }

    /// Checks an event, stores it unless it is ephemeral, and queues it for every subscription that it belongs to, as
    /// the very text that its author sent. With it, the author's key when it has just become present, which
    /// `client.may_join` allows.
    pub(crate) async fn publish(
        &self,
        event: &Event<'_>,
        raw: &str,
        client: Publisher<'_>,
        keys: &mut KeyCache,
    ) -> Result<(Accepted, Option<PresentKey>), Refusal> {
        if self.recent.ids().contains(&event.id) {
            self.metrics.event("duplicate", class_of(event));
            return Ok((Accepted::Duplicate, None));
        }
        self.check(event, &client, keys)?;
        if !event.is_ephemeral()
            && let Some(store) = &self.store
        {
            // Boxed, here and where else the store is asked: most connections never do, and all would pay for the room.
            let stored = Box::pin(store.save(raw)).await.and_then(|stored| self.replicate(raw).map(|()| stored));
            match stored {
                Ok(Stored::New) => {}
                Ok(Stored::Duplicate) => return Ok((Accepted::Duplicate, None)),
                Err(reason) => {
                    self.metrics.event("not_stored", class_of(event));
                    return Err(Refusal::NotStored(reason));
                }
            }
        }
        // Of two connections that verify the same event at the same time, one is first.
        if !self.recent.ids().insert(event.id) {
            return Ok((Accepted::Duplicate, None));
        }
        let raw: Arc<str> = raw.into();
        let told = event.is_ephemeral() && self.neighbours.as_ref().is_some_and(|others| others.tell(event, &raw));
        let (heard_by, joined) = self.spread(event, &raw, client.connection, client.may_join, told);
        if joined.is_some() {
            self.count_present();
        }
        let unheard = event.is_ephemeral() && heard_by == 0 && !told;
        Ok((if unheard { Accepted::Mute } else { Accepted::Delivered }, joined))
    }

    /// Takes note of what a client's clock says, in seconds since the Unix epoch, and of what ours says.
    pub(crate) fn compare_clocks(&self, author: [u8; 32], theirs: u64, ours: u64) {
        let ahead = i64::try_from(i128::from(theirs) - i128::from(ours)).unwrap_or(i64::MAX);
        let is_near = ahead.unsigned_abs() <= self.limits.clock_skew_seconds;
        let clock = if is_near {
            "near"
        } else if ahead > 0 {
            "ahead"
        } else {
            "behind"
        };
        self.metrics.client_clocks.with_label_values(&[clock]).inc();
        if let Some(median) = self.clocks.note(author, ahead) {
            self.metrics.client_clock_ahead.set(median);
        }
    }

    /// Has the other relays store what is stored here; also what was here already: its author may say it again because
    /// it was not told that we have it.
    fn replicate(&self, raw: &str) -> Result<(), NotStored> {
        let Some(replication) = &self.replication else { return Ok(()) };
        replication.tell(raw).map_err(|error| {
            tracing::warn!(%error, "a stored event cannot be written down for the other relays");
            NotStored::Failed
        })
    }

    /// Stores what another relay has stored, and tells it to who listens here. What is of no use here is left out.
    ///
    /// # Errors
    /// When it is to come again: the store does not take it now.
    pub(crate) async fn take_in(&self, raw: &str) -> Result<(), NotStored> {
        let Some(store) = &self.store else { return Ok(()) };
        let event = match serde_json::from_str::<Event<'_>>(raw) {
            Ok(event) if !event.is_ephemeral() => event,
            _ => {
                tracing::warn!("something in the stream of stored events is none");
                return Ok(());
            }
        };
        match store.save(raw).await {
            Ok(Stored::New) => {
                if self.recent.ids().insert(event.id) {
                    self.spread(&event, &raw.into(), NEIGHBOUR, false, false);
                }
                Ok(())
            }
            Err(NotStored::Failed) => Err(NotStored::Failed),
            Ok(Stored::Duplicate)
            | Err(NotStored::Deleted | NotStored::Expired | NotStored::Replaced | NotStored::InvalidDelete) => Ok(()),
        }
    }

    /// Takes what came from a neighbour, which has checked it.
    pub(crate) fn hear(&self, message: &[u8]) {
        let Some(neighbours) = &self.neighbours else { return };
        if let Some(gone) = message.strip_prefix(neighbours::GONE) {
            let key: Option<PresentKey> = serde_json::from_slice(gone).ok();
            neighbours.heard(key.is_some());
            self.presence.leave(NEIGHBOUR, key);
            return self.count_present();
        }
        let text = std::str::from_utf8(message).ok();
        let event = text.and_then(|raw| Some((serde_json::from_str::<Event<'_>>(raw).ok()?, raw)));
        let Some((event, raw)) = event.filter(|(event, _)| event.is_ephemeral()) else {
            return neighbours.heard(false);
        };
        neighbours.heard(true);
        if self.recent.ids().insert(event.id) {
            let (_, joined) = self.spread(&event, &raw.into(), NEIGHBOUR, true, false);
            if joined.is_some() {
                self.count_present();
            }
        }
    }

    /// Queues an event that came over `connection` for every subscription that it belongs to, and takes note of what it
    /// says. Returns how many subscriptions it is for, now or with a later announce, and its author's key when it has
    /// just become present, which `may_join` allows. `told`: whether neighbours have it too.
    fn spread(
        &self,
        event: &Event<'_>,
        raw: &Arc<str>,
        connection: u64,
        may_join: bool,
        told: bool,
    ) -> (u64, Option<PresentKey>) {
        let now = Instant::now();
        self.gate.learn(event, now);
        let (audience, joined) = if event.is_ephemeral() {
            self.presence.hear(event, raw, connection, may_join, now)
        } else {
            (Audience::All, None)
        };
        let (subscriptions, held_back) = self.subscriptions.matching(event, audience);
        for subscription in &subscriptions {
            match subscription.outbox.deliver(subscription, raw, now) {
                Some(queued) => self.metrics.see_queue(queued),
                None => self.metrics.drops.with_label_values(&["slow_client"]).inc(),
            }
        }
        self.metrics.held_back.inc_by(held_back);
        // What was dialled at a neighbour is watched there; what becomes of our dials to its clients, here.
        let is_offer = event.content.contains("\"offer\"");
        let is_watched = dials::may_be_of_a_dial(event) && !(is_offer && connection == NEIGHBOUR);
        if let Some(dials) = self.dials.as_ref().filter(|_| is_watched) {
            let mut receivers: Vec<u64> = subscriptions.iter().map(|subscription| subscription.connection).collect();
            if told && is_offer && receivers.is_empty() {
                receivers.push(NEIGHBOUR);
            }
            self.metrics.note_dials(dials.note(event, connection, &receivers, now));
        }
        (u64::try_from(subscriptions.len()).unwrap_or(u64::MAX).saturating_add(held_back), joined)
    }

    /// Brings the gauge of present authors up to date.
    pub(crate) fn count_present(&self) {
        self.metrics.present.set(i64::try_from(self.presence.len()).unwrap_or(i64::MAX));
    }

    /// Checks id and signature of an event, if its origin has not asked for that too often.
    pub(crate) fn verify(&self, event: &Event<'_>, origin: Origin, keys: &mut KeyCache) -> Result<(), Refusal> {
        if !self.addresses.allows_verification(origin) {
            self.metrics.rate_limit_hits.with_label_values(&["verifications"]).inc();
            return Err(Refusal::TooFast);
        }
        let start = Instant::now();
        let verified = event.verify(keys);
        self.metrics.verification_seconds.observe(start.elapsed().as_secs_f64());
        verified.map_err(Refusal::Unverified)
    }

    /// Whether an event is one for this relay; limits come before the signature, which costs most.
    fn check(&self, event: &Event<'_>, client: &Publisher<'_>, keys: &mut KeyCache) -> Result<(), Refusal> {
        let difficulty = event.difficulty();
        let result = if !event.is_ephemeral() && self.store.is_none() {
            Err(Refusal::NotEphemeral)
        } else if let Err(reason) = self.gate.admits_event(event, Instant::now()) {
            Err(Refusal::NotAdmitted(reason))
        } else if event.tags.len() > self.limits.event_tags {
            Err(Refusal::TooManyTags)
        } else if difficulty < self.limits.difficulty {
            Err(Refusal::Difficulty(difficulty, self.limits.difficulty))
        } else if event.is_protected() && client.proven != Some(&event.pubkey) {
            Err(Refusal::Protected)
        } else {
            self.verify(event, client.origin, keys)
        };
        let label = match result {
            Ok(()) => "accepted",
            Err(Refusal::NotEphemeral) => "not_ephemeral",
            Err(Refusal::TooManyTags) => "too_many_tags",
            Err(Refusal::NotAdmitted(_)) => "not_admitted",
            Err(Refusal::Protected) => "protected",
            Err(Refusal::Difficulty(..)) => "too_easy",
            Err(Refusal::NotStored(_)) => "not_stored",
            Err(Refusal::TooFast) => "rate_limited",
            Err(Refusal::Unverified(VerifyError::Id)) => "wrong_id",
            Err(Refusal::Unverified(VerifyError::Signature)) => "wrong_signature",
        };
        self.metrics.event(label, class_of(event));
        result
    }
}

/// The class of an event, for metrics.
fn class_of(event: &Event<'_>) -> &'static str {
    if event.is_ephemeral() { "ephemeral" } else { "stored" }
}

/// Forgets addresses that have gone quiet, and counts dials whose time is over, until `stop`.
pub(crate) async fn tidy(relay: Arc<Relay>, stop: CancellationToken) {
    let mut interval = tokio::time::interval(TIDY_INTERVAL);
    let mut dials = tokio::time::interval(DIALS_INTERVAL);
    let mut save = tokio::time::interval(SAVE_INTERVAL);
    loop {
        tokio::select! {
            _ = interval.tick() => {
                relay.addresses.tidy();
                relay.returning.tidy(Instant::now());
                relay.presence.tidy(NEIGHBOUR, Instant::now());
            }
            _ = dials.tick() => {
                if let Some(dials) = &relay.dials {
                    relay.metrics.count_dials(&dials.expire(Instant::now()));
                }
            }
            _ = save.tick() => save_returning(&relay, false).await,
            () = stop.cancelled() => return,
        }
    }
}

/// Writes down who may come back after a restart: when it is time, or `at_once`.
pub(crate) async fn save_returning(relay: &Arc<Relay>, at_once: bool) {
    let relay = Arc::clone(relay);
    if tokio::task::spawn_blocking(move || relay.returning.save(Instant::now(), at_once)).await.is_err() {
        tracing::error!("writing down who is connected had panicked");
    }
}
