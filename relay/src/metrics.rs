//! What the relay counts.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

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
    pub(crate) present: IntGauge,
    pub(crate) verification_seconds: Histogram,
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
            present: IntGauge::new("homeport_relay_present_peers", "Peers that are present under a topic now.")?,
            verification_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "homeport_relay_verification_seconds",
                    "Time to check id and signature of an event.",
                )
                .buckets(vec![2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3]),
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
        registry.register(Box::new(metrics.present.clone()))?;
        registry.register(Box::new(metrics.verification_seconds.clone()))?;
        // Series that a dashboard asks for are there from the start, not from the first event on.
        for verb in ["EVENT", "REQ", "CLOSE", "AUTH", "COUNT", "malformed"] {
            metrics.messages.with_label_values(&[verb]);
        }
        metrics.events.with_label_values(&["accepted", "ephemeral"]);
        metrics.drops.with_label_values(&["slow_client"]);
        for limit in ["messages", "verifications", "connections"] {
            metrics.rate_limit_hits.with_label_values(&[limit]);
        }
        Ok(metrics)
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
