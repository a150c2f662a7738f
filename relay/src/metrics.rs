//! What the relay counts.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::dials::{Noted, Outcome};

/// The relay's metrics; none is labelled by anything that a client chooses.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) connections: IntGauge,
    pub(crate) disconnects: IntCounterVec,
    pub(crate) subscriptions: IntGauge,
    pub(crate) messages: IntCounterVec,
    events: IntCounterVec,
    pub(crate) deliveries: IntCounter,
    pub(crate) drops: IntCounterVec,
    pub(crate) delivery_seconds: Histogram,
    queue_high_water: IntGauge,
    pub(crate) rate_limit_hits: IntCounterVec,
    pub(crate) held_back: IntCounter,
    pub(crate) replayed: IntCounter,
    pub(crate) resumed: IntCounter,
    pub(crate) present: IntGauge,
    pub(crate) client_clocks: IntCounterVec,
    pub(crate) client_clock_ahead: IntGauge,
    pub(crate) tls_handshakes: IntCounterVec,
    pub(crate) certificate_expiry: IntGauge,
    pub(crate) verification_seconds: Histogram,
    dials: IntCounterVec,
    unwatched_dials: IntCounter,
    answer_seconds: Histogram,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            connections: IntGauge::new("homeport_relay_connections", "Clients that are connected now.")?,
            disconnects: IntCounterVec::new(
                Opts::new("homeport_relay_disconnects_total", "Connections that ended, by reason."),
                &["reason"],
            )?,
            subscriptions: IntGauge::new("homeport_relay_subscriptions", "Subscriptions that are open now.")?,
            messages: IntCounterVec::new(
                Opts::new("homeport_relay_messages_total", "Messages that clients sent, by verb; malformed ones too."),
                &["verb"],
            )?,
            events: IntCounterVec::new(
                Opts::new("homeport_relay_events_total", "Events that clients published, by result and class."),
                &["result", "class"],
            )?,
            deliveries: IntCounter::new(
                "homeport_relay_deliveries_total",
                "Events written to a subscriber; one event counts once for each.",
            )?,
            drops: IntCounterVec::new(
                Opts::new("homeport_relay_drops_total", "Deliveries that were dropped, by reason."),
                &["reason"],
            )?,
            delivery_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "homeport_relay_delivery_seconds",
                    "From a published event to its writing to a subscriber.",
                )
                .buckets(vec![1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5, 2.5]),
            )?,
            queue_high_water: IntGauge::new(
                "homeport_relay_queue_high_water_bytes",
                "The most that ever waited for one client since the start.",
            )?,
            rate_limit_hits: IntCounterVec::new(
                Opts::new("homeport_relay_rate_limit_hits_total", "Messages and connections refused, by limit."),
                &["limit"],
            )?,
            held_back: IntCounter::new(
                "homeport_relay_announces_held_back_total",
                "Deliveries of repeated announces that were saved, since their author is known to be present.",
            )?,
            replayed: IntCounter::new(
                "homeport_relay_announces_replayed_total",
                "Announces of present peers that a new subscriber was given at once.",
            )?,
            resumed: IntCounter::new(
                "homeport_relay_subscriptions_resumed_total",
                "Subscriptions that were given back to clients whose connection broke, and that do not ask again themselves.",
            )?,
            present: IntGauge::new("homeport_relay_present_peers", "Peers that are present under a topic now.")?,
            client_clocks: IntCounterVec::new(
                Opts::new(
                    "homeport_relay_client_clocks_total",
                    "Clocks of clients beside ours, when they first spoke on a connection: near (within relay.clock_skew), ahead, behind.",
                ),
                &["clock"],
            )?,
            client_clock_ahead: IntGauge::new(
                "homeport_relay_client_clock_ahead_seconds",
                "By how much the clocks of clients are ahead of ours: the median of the last 128 authors, 0 until five are known.",
            )?,
            tls_handshakes: IntCounterVec::new(
                Opts::new("homeport_relay_tls_handshakes_total", "TLS handshakes of clients, by how they went."),
                &["result"],
            )?,
            certificate_expiry: IntGauge::new(
                "homeport_relay_certificate_expiry_timestamp_seconds",
                "When the certificate ends, in seconds since the Unix epoch; 0 without TLS.",
            )?,
            verification_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "homeport_relay_verification_seconds",
                    "Time to check id and signature of an event.",
                )
                .buckets(vec![2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3]),
            )?,
            dials: IntCounterVec::new(
                Opts::new(
                    "homeport_relay_dials_total",
                    "Offers between peers, by what became of them: answered and not dialled again within 75 s, dialled again, unanswered.",
                ),
                &["outcome"],
            )?,
            unwatched_dials: IntCounter::new(
                "homeport_relay_unwatched_dials_total",
                "Offers that were not watched, since too many are at a time.",
            )?,
            answer_seconds: Histogram::with_opts(
                HistogramOpts::new("homeport_relay_answer_seconds", "From an offer to its answer, at the relay.")
                    .buckets(vec![0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]),
            )?,
        };
        registry.register(Box::new(metrics.connections.clone()))?;
        registry.register(Box::new(metrics.disconnects.clone()))?;
        registry.register(Box::new(metrics.subscriptions.clone()))?;
        registry.register(Box::new(metrics.messages.clone()))?;
        registry.register(Box::new(metrics.events.clone()))?;
        registry.register(Box::new(metrics.deliveries.clone()))?;
        registry.register(Box::new(metrics.drops.clone()))?;
        registry.register(Box::new(metrics.delivery_seconds.clone()))?;
        registry.register(Box::new(metrics.queue_high_water.clone()))?;
        registry.register(Box::new(metrics.rate_limit_hits.clone()))?;
        registry.register(Box::new(metrics.held_back.clone()))?;
        registry.register(Box::new(metrics.replayed.clone()))?;
        registry.register(Box::new(metrics.resumed.clone()))?;
        registry.register(Box::new(metrics.present.clone()))?;
        registry.register(Box::new(metrics.client_clocks.clone()))?;
        registry.register(Box::new(metrics.client_clock_ahead.clone()))?;
        registry.register(Box::new(metrics.tls_handshakes.clone()))?;
        registry.register(Box::new(metrics.certificate_expiry.clone()))?;
        registry.register(Box::new(metrics.verification_seconds.clone()))?;
        registry.register(Box::new(metrics.dials.clone()))?;
        registry.register(Box::new(metrics.unwatched_dials.clone()))?;
        registry.register(Box::new(metrics.answer_seconds.clone()))?;
        // Series that a dashboard asks for are there from the start, not from the first event on.
        for verb in ["EVENT", "REQ", "CLOSE", "AUTH", "COUNT", "malformed"] {
            metrics.messages.with_label_values(&[verb]);
        }
        metrics.events.with_label_values(&["accepted", "ephemeral"]);
        metrics.drops.with_label_values(&["slow_client"]);
        for clock in ["near", "ahead", "behind"] {
            metrics.client_clocks.with_label_values(&[clock]);
        }
        for result in ["ok", "failed"] {
            metrics.tls_handshakes.with_label_values(&[result]);
        }
        for limit in ["messages", "verifications", "connections"] {
            metrics.rate_limit_hits.with_label_values(&[limit]);
        }
        for outcome in [Outcome::Connected, Outcome::Redialled, Outcome::Unanswered] {
            metrics.dials.with_label_values(&[outcome.label()]);
        }
        Ok(metrics)
    }

    /// Counts what the dial ledger has to say.
    pub(crate) fn note_dials(&self, noted: Noted) {
        let Noted { outcomes, answered_after, is_unwatched } = noted;
        self.count_dials(&outcomes);
        if let Some(after) = answered_after {
            self.answer_seconds.observe(after.as_secs_f64());
        }
        self.unwatched_dials.inc_by(is_unwatched.into());
    }

    /// Counts dials by what became of them.
    pub(crate) fn count_dials(&self, outcomes: &[Outcome]) {
        for outcome in outcomes {
            self.dials.with_label_values(&[outcome.label()]).inc();
        }
    }

    /// Takes note of how much waits for a client.
    pub(crate) fn see_queue(&self, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        if bytes > self.queue_high_water.get() {
            self.queue_high_water.set(bytes);
        }
    }

    /// Counts a published event.
    pub(crate) fn event(&self, result: &str, class: &str) {
        self.events.with_label_values(&[result, class]).inc();
    }
}
