//! What the TURN server counts.

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, core::Collector,
};

/// The server's metrics.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) allocations: IntGauge,
    pub(crate) created: IntCounterVec,
    pub(crate) ended: IntCounterVec,
    pub(crate) outcomes: IntCounterVec,
    pub(crate) lifetime_seconds: Histogram,
    pub(crate) first_byte_seconds: Histogram,
    pub(crate) no_port: IntCounter,
    pub(crate) ports_in_use: IntGauge,
    pub(crate) relay_ports: IntGauge,
    pub(crate) requests: IntCounterVec,
    pub(crate) malformed: IntCounterVec,
    pub(crate) auth_failures: IntCounterVec,
    pub(crate) stale_nonces: IntCounter,
    pub(crate) quota_hits: IntCounterVec,
    pub(crate) denied_peers: IntCounter,
    pub(crate) relayed_packets: IntCounterVec,
    pub(crate) relayed_bytes: IntCounterVec,
    pub(crate) client_packets: IntCounterVec,
    pub(crate) drops: IntCounterVec,
    pub(crate) batch_packets: Histogram,
    pub(crate) streams: IntGaugeVec,
    pub(crate) streams_ended: IntCounterVec,
    pub(crate) tls_handshakes: IntCounterVec,
    pub(crate) certificate_expiry: IntGauge,
    pub(crate) address_changes: IntCounter,
}

/// Registers metrics one after the other.
struct Register<'a>(&'a Registry);

impl Register<'_> {
    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(IntCounter::new(name, help)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(name, help)?)
    }

    /// Series that a dashboard asks for are there from the start: those of `values`.
    fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        let counters = self.add(IntCounterVec::new(Opts::new(name, help), &[label])?)?;
        for value in values {
            counters.with_label_values(&[value]);
        }
        Ok(counters)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let register = Register(registry);
        let directions = &["to_peer", "from_peer"];
        let metrics = Self {
            allocations: register.gauge("homeport_turn_allocations", "Allocations that are open now.")?,
            created: register.add(IntCounterVec::new(
                Opts::new(
                    "homeport_turn_allocations_total",
                    "Allocations made, by transport of the client and family.",
                ),
                &["transport", "family"],
            )?)?,
            ended: register.counters(
                "homeport_turn_allocations_ended_total",
                "Allocations that ended, by reason.",
                "reason",
                &["expired", "by_request", "disconnected", "shutdown"],
            )?,
            outcomes: register.counters(
                "homeport_turn_allocation_outcomes_total",
                "Allocations that ended, by what went through them: nothing, packets one way, packets both ways.",
                "outcome",
                &["unused", "one_way", "both_ways"],
            )?,
            lifetime_seconds: register.histogram(
                "homeport_turn_allocation_lifetime_seconds",
                "How long allocations lived.",
                &[1.0, 10.0, 60.0, 300.0, 600.0, 1_800.0, 3_600.0, 14_400.0, 86_400.0],
            )?,
            first_byte_seconds: register.histogram(
                "homeport_turn_first_byte_seconds",
                "From an allocation to the first packet of a peer.",
                &[0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0],
            )?,
            no_port: register.counter(
                "homeport_turn_no_port_total",
                "Allocations that were refused because no relay port was free.",
            )?,
            ports_in_use: register.gauge("homeport_turn_ports_in_use", "Relay ports that are open now.")?,
            relay_ports: register
                .gauge("homeport_turn_relay_ports", "Relay ports that there are (turn.relay_ports).")?,
            requests: register.add(IntCounterVec::new(
                Opts::new("homeport_turn_requests_total", "Requests answered, by method and error code."),
                &["method", "code"],
            )?)?,
            malformed: register.counters(
                "homeport_turn_malformed_total",
                "Messages of clients that make no sense, by reason.",
                "reason",
                &["not_stun", "length", "method", "fingerprint", "unexpected"],
            )?,
            auth_failures: register.counters(
                "homeport_turn_auth_failures_total",
                "Requests with credentials that do not hold, by reason.",
                "reason",
                &["unknown_user", "wrong_password", "expired", "wrong_realm"],
            )?,
            stale_nonces: register.counter(
                "homeport_turn_stale_nonces_total",
                "Requests with a nonce that is too old or not of this server; clients repeat them with a new one.",
            )?,
            quota_hits: register.counters(
                "homeport_turn_quota_hits_total",
                "Allocations that were refused because a quota was used up, by quota.",
                "quota",
                &["user", "address", "total"],
            )?,
            denied_peers: register
                .counter("homeport_turn_denied_peers_total", "Peers that were refused because of their address.")?,
            relayed_packets: register.counters(
                "homeport_turn_relayed_packets_total",
                "Packets between allocations and their peers, by direction.",
                "direction",
                directions,
            )?,
            relayed_bytes: register.counters(
                "homeport_turn_relayed_bytes_total",
                "Payload bytes between allocations and their peers, by direction.",
                "direction",
                directions,
            )?,
            client_packets: register.counters(
                "homeport_turn_client_packets_total",
                "Messages between the server and its clients, by direction.",
                "direction",
                &["from_client", "to_client"],
            )?,
            drops: register.counters(
                "homeport_turn_drops_total",
                "Packets that were not relayed or answered, by reason.",
                "reason",
                &[
                    "no_allocation",
                    "no_permission",
                    "no_channel",
                    "malformed",
                    "bandwidth",
                    "unauthenticated",
                    "to_peer",
                    "to_client",
                    "slow_client",
                ],
            )?,
            batch_packets: register.histogram(
                "homeport_turn_batch_packets",
                "Packets that one system call received.",
                &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0],
            )?,
            streams: register.add(IntGaugeVec::new(
                Opts::new("homeport_turn_streams", "TCP and TLS connections that are open now."),
                &["transport"],
            )?)?,
            streams_ended: register.counters(
                "homeport_turn_streams_ended_total",
                "TCP and TLS connections that ended, by reason.",
                "reason",
                &["left", "malformed", "idle", "refused", "tls", "io", "shutdown"],
            )?,
            tls_handshakes: register.counters(
                "homeport_turn_tls_handshakes_total",
                "TLS handshakes, by result.",
                "result",
                &["ok", "failed"],
            )?,
            certificate_expiry: register.gauge(
                "homeport_turn_certificate_expiry_timestamp_seconds",
                "When the certificate ends, in seconds since the Unix epoch; 0 without TLS.",
            )?,
            address_changes: register.counter(
                "homeport_turn_external_address_changes_total",
                "Times that the server's own external address was found changed.",
            )?,
        };
        for transport in ["udp", "tcp", "tls"] {
            metrics.created.with_label_values(&[transport, "ipv4"]);
        }
        for transport in ["tcp", "tls"] {
            metrics.streams.with_label_values(&[transport]);
        }
        for method in ["binding", "allocate", "refresh", "create_permission", "channel_bind"] {
            metrics.requests.with_label_values(&[method, "ok"]);
        }
        Ok(metrics)
    }
}
