//! What the TURN server counts.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// The server's metrics.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) allocations: IntGauge,
    pub(crate) allocations_total: IntCounterVec,
    pub(crate) auth_failures: IntCounterVec,
    pub(crate) relayed_packets: IntCounterVec,
    pub(crate) relayed_bytes: IntCounterVec,
    pub(crate) client_packets: IntCounterVec,
    pub(crate) denied_peers: IntCounter,
    pub(crate) drops: IntCounterVec,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let vector = |name: &str, help: &str, label: &str, values: &[&str]| {
            let vector = IntCounterVec::new(Opts::new(name, help), &[label])?;
            // Series that a dashboard asks for are there from the start.
            for value in values {
                vector.with_label_values(&[value]);
            }
            registry.register(Box::new(vector.clone()))?;
            Ok::<_, prometheus::Error>(vector)
        };
        let directions = &["to_peer", "from_peer"];
        let metrics = Self {
            allocations: IntGauge::new("homeport_turn_allocations", "Allocations that are open now.")?,
            allocations_total: vector(
                "homeport_turn_allocations_total",
                "Allocations that were asked for, by result.",
                "result",
                &["created", "no_port"],
            )?,
            auth_failures: vector(
                "homeport_turn_auth_failures_total",
                "Requests of users that are not known or whose time is up.",
                "reason",
                &["unknown_user", "expired"],
            )?,
            relayed_packets: vector(
                "homeport_turn_relayed_packets_total",
                "Packets between allocations and their peers, by direction.",
                "direction",
                directions,
            )?,
            relayed_bytes: vector(
                "homeport_turn_relayed_bytes_total",
                "Payload bytes between allocations and their peers, by direction.",
                "direction",
                directions,
            )?,
            client_packets: vector(
                "homeport_turn_client_packets_total",
                "Packets between the server and its clients, by direction.",
                "direction",
                &["from_client", "to_client"],
            )?,
            denied_peers: IntCounter::new(
                "homeport_turn_denied_peers_total",
                "Packets to or from peers in address ranges that are refused.",
            )?,
            drops: vector(
                "homeport_turn_drops_total",
                "Packets that the system did not take, by direction.",
                "direction",
                &["to_peer", "to_client"],
            )?,
        };
        registry.register(Box::new(metrics.allocations.clone()))?;
        registry.register(Box::new(metrics.denied_peers.clone()))?;
        Ok(metrics)
    }
}
