//! What the seed peer counts.

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::Collector,
};

/// The seed's metrics. Rooms are labelled by their configured names, of which there are as many as were configured.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) links: IntGaugeVec,
    pub(crate) present: IntGaugeVec,
    pub(crate) cells: IntGaugeVec,
    pub(crate) bridged_cells: IntGaugeVec,
    pub(crate) cell_messages: IntCounterVec,
    pub(crate) mismatches: IntCounter,
    pub(crate) link_outcomes: IntCounterVec,
    pub(crate) link_paths: IntCounterVec,
    pub(crate) link_step_seconds: HistogramVec,
    pub(crate) link_open_seconds: Histogram,
    pub(crate) disconnects: IntCounterVec,
    pub(crate) messages: IntCounterVec,
    pub(crate) message_bytes: IntCounterVec,
    pub(crate) refused: IntCounterVec,
    pub(crate) operations: IntCounterVec,
    pub(crate) signatures: IntCounterVec,
    pub(crate) rulings: IntCounter,
    pub(crate) answers: IntCounterVec,
    pub(crate) cached_answers: IntCounter,
    pub(crate) passed_on: IntCounter,
    pub(crate) nodes: IntGaugeVec,
    pub(crate) node_bytes: IntGaugeVec,
    pub(crate) logged: IntGaugeVec,
    pub(crate) archive_commit_seconds: Histogram,
    pub(crate) archive_failures: IntCounter,
    pub(crate) cluster_rooms: IntGaugeVec,
    pub(crate) cluster_instances: IntGauge,
    pub(crate) cluster_acknowledge_seconds: Histogram,
    pub(crate) compacted: IntCounter,
    pub(crate) backups: IntCounterVec,
    pub(crate) backup_time: IntGauge,
    pub(crate) backup_seconds: Histogram,
    pub(crate) backup_bytes: IntCounter,
    pub(crate) relays_connected: IntGauge,
    pub(crate) relay_drops: IntCounter,
    pub(crate) udp_drops: IntCounterVec,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        }
        let counters = |name: &str, help: &str, label: &str, values: &[&str]| {
            let vector = add(registry, IntCounterVec::new(Opts::new(name, help), &[label])?)?;
            // Series that a dashboard asks for are there from the start.
            for value in values {
                vector.with_label_values(&[value]);
            }
            Ok::<_, prometheus::Error>(vector)
        };
        let gauges = |name: &str, help: &str| add(registry, IntGaugeVec::new(Opts::new(name, help), &["room"])?);
        let labelled_gauges = |name: &str, help: &str, label: &str, values: &[&str]| {
            let vector = add(registry, IntGaugeVec::new(Opts::new(name, help), &[label])?)?;
            for value in values {
                vector.with_label_values(&[value]);
            }
            Ok::<_, prometheus::Error>(vector)
        };
        let directions = &["in", "out"];
        Ok(Self {
            links: gauges("homeport_seed_links", "Open links to peers, by room.")?,
            present: gauges("homeport_seed_present_peers", "Peers that are present, without the seed, by room.")?,
            cells: gauges("homeport_seed_cells", "Cells of a room in cells, by room.")?,
            bridged_cells: gauges("homeport_seed_bridged_cells", "Cells whose bridge is the seed, by room.")?,
            cell_messages: counters(
                "homeport_seed_cell_messages_total",
                "Messages between cells: sent to a peer, seen before, or passed on too often.",
                "event",
                &["sent", "seen", "expired"],
            )?,
            mismatches: add(
                registry,
                IntCounter::new(
                    "homeport_seed_cell_mismatches_total",
                    "Times that a client was in cells in a room that is not, or the reverse.",
                )?,
            )?,
            link_outcomes: counters(
                "homeport_seed_link_outcomes_total",
                "Attempts to link, by outcome.",
                "outcome",
                &["opened", "unanswered", "no_path", "no_dtls", "no_channel", "wrong_password"],
            )?,
            link_paths: counters(
                "homeport_seed_link_paths_total",
                "Links that opened, by the kind of the peer's candidate that packets go to.",
                "remote",
                &["host", "srflx", "prflx", "relay"],
            )?,
            link_step_seconds: add(
                registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "homeport_seed_link_step_seconds",
                        "From the start of an attempt to each step: the peer's description, ICE, DTLS.",
                    )
                    .buckets(vec![0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0]),
                    &["step"],
                )?,
            )?,
            link_open_seconds: add(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "homeport_seed_link_open_seconds",
                        "From the start of an attempt to the open data channel.",
                    )
                    .buckets(vec![0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0]),
                )?,
            )?,
            disconnects: counters(
                "homeport_seed_disconnects_total",
                "Open links that ended, by reason.",
                "reason",
                &["bye", "silent", "replaced"],
            )?,
            messages: counters(
                "homeport_seed_messages_total",
                "Messages over data channels, by direction.",
                "direction",
                directions,
            )?,
            message_bytes: counters(
                "homeport_seed_message_bytes_total",
                "Bytes of frames over data channels, by direction.",
                "direction",
                directions,
            )?,
            refused: counters(
                "homeport_seed_refused_total",
                "Frames, messages, operations and descriptions that were malformed or too much, by reason.",
                "reason",
                &["frame", "message", "operation", "description"],
            )?,
            operations: counters(
                "homeport_seed_operations_total",
                "Operations that peers sent, by what became of them.",
                "result",
                &[
                    "applied",
                    "superseded",
                    "incomplete",
                    "too_large",
                    "room_full",
                    "too_fast",
                    "unsigned",
                    "forged",
                    "not_permitted",
                ],
            )?,
            signatures: counters(
                "homeport_seed_signatures_total",
                "Operations whose signature was checked, in rooms with super admins, by what was found.",
                "result",
                &["valid", "unsigned", "forged"],
            )?,
            rulings: add(
                registry,
                IntCounter::new("homeport_seed_rulings_total", "Roles that the seed gave or took by a room's rules.")?,
            )?,
            answers: counters(
                "homeport_seed_answers_total",
                "Answers to peers that asked for what they lack, by kind.",
                "kind",
                &["sync", "full_state", "withheld"],
            )?,
            cached_answers: add(
                registry,
                IntCounter::new(
                    "homeport_seed_cached_answers_total",
                    "Whole states that were sent from memory, with the operations since.",
                )?,
            )?,
            passed_on: add(
                registry,
                IntCounter::new(
                    "homeport_seed_passed_on_messages_total",
                    "Messages with what one peer of a full mesh has written, to another, by link.",
                )?,
            )?,
            nodes: gauges("homeport_seed_nodes", "Nodes in the archive, by room.")?,
            node_bytes: gauges("homeport_seed_node_bytes", "Bytes of all nodes in the archive, by room.")?,
            logged: gauges("homeport_seed_logged_operations", "Operations in the archive's log, by room.")?,
            archive_commit_seconds: add(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new("homeport_seed_archive_commit_seconds", "Time to merge and commit a group.")
                        .buckets(vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5]),
                )?,
            )?,
            archive_failures: add(
                registry,
                IntCounter::new("homeport_seed_archive_failures_total", "Commits that the disk refused.")?,
            )?,
            cluster_rooms: labelled_gauges(
                "homeport_seed_cluster_rooms",
                "Rooms of the cluster, by what this machine does with them.",
                "state",
                &["held", "followed"],
            )?,
            cluster_instances: add(
                registry,
                IntGauge::new(
                    "homeport_seed_cluster_instances",
                    "Seeds of the cluster that are alive, as far as this one sees.",
                )?,
            )?,
            cluster_acknowledge_seconds: add(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "homeport_seed_cluster_acknowledge_seconds",
                        "Time until the streams of rooms have acknowledged a group of operations.",
                    )
                    .buckets(vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5]),
                )?,
            )?,
            compacted: add(
                registry,
                IntCounter::new(
                    "homeport_seed_compacted_operations_total",
                    "Operations that were older than seed.keep, and were compacted.",
                )?,
            )?,
            backups: counters(
                "homeport_seed_backups_total",
                "Backups of the archive, by what became of them.",
                "result",
                &["made", "failed"],
            )?,
            backup_time: add(
                registry,
                IntGauge::new(
                    "homeport_seed_backup_timestamp_seconds",
                    "When the newest backup was made, as Unix time; 0 before the first.",
                )?,
            )?,
            backup_seconds: add(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new("homeport_seed_backup_seconds", "Time to make and verify a backup.")
                        .buckets(vec![0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1_800.0]),
                )?,
            )?,
            backup_bytes: add(
                registry,
                IntCounter::new("homeport_seed_backup_bytes_total", "Bytes that were written for backups.")?,
            )?,
            relays_connected: add(
                registry,
                IntGauge::new("homeport_seed_relays_connected", "Relays that the seed is connected to.")?,
            )?,
            relay_drops: add(
                registry,
                IntCounter::new(
                    "homeport_seed_relay_drops_total",
                    "Events that were not sent because a relay takes them too slowly.",
                )?,
            )?,
            udp_drops: counters(
                "homeport_seed_udp_drops_total",
                "UDP packets that were dropped, by reason.",
                "reason",
                &["unknown_source", "send_failed"],
            )?,
        })
    }
}
