//! The status page: `/` for browsers, and `/status.json`, which says how the services of this process are, those of other
//! processes, and in a cluster those of all machines.
//!
//! Names of rooms and machines, drawings of meshes and reasons of failures are for who knows the token, or for everybody where
//! the relay listens on loopback alone.

mod machines;
mod others;
mod service_status;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use prometheus::proto::MetricFamily;
use rand::Rng as _;
use seed_peer::{RoomStatus, Rooms};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use service::{Cluster, Telemetry};
use tokio::task::JoinHandle;

use crate::admin::{AdminClient, Request, Response as AdminResponse};
use crate::link_checks::{Checks, check_link};
use crate::turn_credentials::same;
use machines::{Machine, Machines};
use service_status::{PartStatus, ServiceStatus};

pub(crate) use machines::Reporter;
pub(crate) use others::{Others, metrics_of, sum_in};

/// The page itself, which the relay serves at its root.
pub(crate) const PAGE: &str = include_str!("../../web/status.html");

/// What the page may load: what this server sends, and nothing else.
pub(crate) const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The kind of the connection check's events: ephemeral.
const CHECK_KIND: u16 = 29_999;

/// How long numbers are good for who asks.
const FRESH: Duration = Duration::from_secs(1);
/// How often numbers are remembered.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(15);
/// An hour of them.
const SAMPLES: usize = 240;
/// Five minutes of them: what a share of successes is about.
const RECENT: usize = 20;

/// Numbers of one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Sample {
    connections: f64,
    allocations: f64,
    links: f64,
    nodes: f64,
    /// Since the start, per side: attempts that succeeded, and all.
    relay: (f64, f64),
    seed: (f64, f64),
    browsers: (f64, f64),
}

impl Sample {
    /// Only what is there now, and not what was counted.
    fn of_now(self) -> Self {
        Self { relay: (0.0, 0.0), seed: (0.0, 0.0), browsers: (0.0, 0.0), ..self }
    }

    /// Only what a process has counted since an earlier moment; it may have begun anew meanwhile.
    fn counted_since(self, before: Self) -> Self {
        let since = |now: (f64, f64), then: (f64, f64)| {
            if now.0 >= then.0 && now.1 >= then.1 { (now.0 - then.0, now.1 - then.1) } else { now }
        };
        Self {
            relay: since(self.relay, before.relay),
            seed: since(self.seed, before.seed),
            browsers: since(self.browsers, before.browsers),
            ..Self::default()
        }
    }

    /// Together with those of another process.
    fn with(self, other: Self) -> Self {
        let both = |one: (f64, f64), two: (f64, f64)| (one.0 + two.0, one.1 + two.1);
        Self {
            connections: self.connections + other.connections,
            allocations: self.allocations + other.allocations,
            links: self.links + other.links,
            // The seeds of a cluster have the same.
            nodes: self.nodes.max(other.nodes),
            relay: both(self.relay, other.relay),
            seed: both(self.seed, other.seed),
            browsers: both(self.browsers, other.browsers),
        }
    }
}

/// How the services of this process are, now and in the last hour.
#[derive(Default)]
pub(crate) struct Status {
    /// By name; without one, only its numbers count.
    services: Mutex<Vec<(Option<&'static str>, Telemetry)>>,
    rooms: OnceLock<Rooms>,
    /// Where a page may ask for a link with the seed.
    checks: OnceLock<Checks>,
    /// Other processes, and the folder in which a seed among them can be asked for its rooms.
    others: OnceLock<(Others, PathBuf)>,
    /// The machines of the cluster, and the name of this one.
    machines: OnceLock<(Arc<Machines>, String)>,
    /// The numbers of this very second: however often somebody asks, they are gathered once.
    latest: Mutex<Option<(Instant, Sample)>>,
    samples: Mutex<VecDeque<Sample>>,
    /// Shows details; `None`: nothing does, unless `is_private`.
    token: Option<String>,
    /// Whether only this machine can ask.
    is_private: bool,
}

impl Status {
    pub(crate) fn new(token: Option<String>, is_private: bool) -> Arc<Self> {
        Arc::new(Self { token, is_private, ..Self::default() })
    }

    /// A service runs, or something without a name of its own.
    pub(crate) fn add(&self, name: Option<&'static str>, telemetry: Telemetry) {
        self.services.lock().unwrap_or_else(PoisonError::into_inner).push((name, telemetry));
    }

    /// The seed runs, and these are its rooms.
    pub(crate) fn set_rooms(&self, rooms: Rooms) {
        // There is one seed.
        let _ = self.rooms.set(rooms);
    }

    /// Pages may ask for a link with the seed there.
    pub(crate) fn set_checks(&self, checks: Checks) {
        // There is one place.
        let _ = self.checks.set(checks);
    }

    /// There are other processes; a seed among them keeps its archive in `data`.
    pub(crate) fn set_others(&self, others: Others, data: PathBuf) {
        // They are set once.
        let _ = self.others.set((others, data));
    }

    /// Listens to what the machines of the cluster say of themselves, until the task is ended.
    pub(crate) fn hear_of_machines(&self, cluster: &Cluster) -> JoinHandle<()> {
        // Who is told of the other processes of this machine need not hear of them too.
        let known = self.others.get().map(|_| cluster.name().to_owned());
        let machines = Arc::new(Machines::new(known));
        let listening = machines.listen(cluster);
        // There is one cluster.
        let _ = self.machines.set((machines, cluster.name().to_owned()));
        listening
    }

    /// The rooms of the seed of this process.
    async fn own_rooms(&self) -> Vec<RoomStatus> {
        match self.rooms.get() {
            // A seed that is shutting down has none any more.
            Some(rooms) => rooms.list().await.unwrap_or_default(),
            None => Vec::new(),
        }
    }

    /// The rooms of this machine, and in a cluster those of all: as whoever holds them says.
    async fn rooms(&self) -> Vec<RoomStatus> {
        let mut rooms: BTreeMap<String, RoomStatus> =
            self.rooms_here().await.into_iter().map(|room| (room.name.clone(), room)).collect();
        if let Some((machines, _)) = self.machines.get() {
            for room in machines.rooms(Instant::now()) {
                if rooms.get(&room.name).is_none_or(|known| known.elsewhere) {
                    rooms.insert(room.name.clone(), room);
                }
            }
        }
        rooms.into_values().collect()
    }

    /// The rooms of the seed, in this process or another.
    async fn rooms_here(&self) -> Vec<RoomStatus> {
        if self.rooms.get().is_some() {
            return self.own_rooms().await;
        }
        let Some(data) = self.others.get().map(|(_, data)| data.clone()) else { return Vec::new() };
        let asking = tokio::task::spawn_blocking(move || match AdminClient::connect(&data)?.ask(&Request::List)? {
            AdminResponse::Rooms { rooms } => Ok(rooms),
            _ => anyhow::bail!("the seed answers something else"),
        });
        match asking.await {
            Ok(Ok(rooms)) => rooms,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the rooms of the seed");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    /// Remembers numbers until the task is ended.
    pub(crate) fn watch(self: &Arc<Self>) -> JoinHandle<()> {
        let status = Arc::clone(self);
        tokio::spawn(async move {
            let mut interval = tokio::time::interval(SAMPLE_INTERVAL);
            loop {
                interval.tick().await;
                if let Some((others, _)) = status.others.get() {
                    others.look().await;
                }
                let sample = status.sample();
                let mut samples = status.samples.lock().unwrap_or_else(PoisonError::into_inner);
                samples.push_back(sample);
                if samples.len() > SAMPLES {
                    samples.pop_front();
                }
            }
        })
    }

    /// The pages, to be served by the relay.
    pub(crate) fn routes(self: Arc<Self>) -> Router {
        let file = |kind: &'static str, content: &'static str| {
            get(move || async move { ([(header::CONTENT_TYPE, kind)], content) })
        };
        Router::new()
            .route("/status.json", get(document))
            .route("/check", get(check_page))
            .route("/check/event", get(check_event))
            .route("/check/link", post(check_link))
            .route("/check.js", file("text/javascript; charset=utf-8", include_str!("../../web/check.js")))
            .route("/status.js", file("text/javascript; charset=utf-8", include_str!("../../web/status.js")))
            .route("/status.css", file("text/css; charset=utf-8", include_str!("../../web/status.css")))
            .with_state(self)
    }

    pub(crate) fn checks(&self) -> Option<&Checks> {
        self.checks.get()
    }

    fn sample(&self) -> Sample {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        match *latest {
            Some((at, sample)) if at.elapsed() < FRESH => sample,
            _ => latest.insert((Instant::now(), self.gather())).1,
        }
    }

    /// The numbers of this process, of others on this machine, and of other machines.
    fn gather(&self) -> Sample {
        let here =
            self.numbers_of(|name, labels| self.others.get().map_or(0.0, |(others, _)| others.sum(name, labels)));
        let Some((machines, _)) = self.machines.get() else { return here };
        here.with(machines.numbers(Instant::now()))
    }

    /// The numbers of this process.
    fn own_numbers(&self) -> Sample {
        self.numbers_of(|_, _| 0.0)
    }

    /// The numbers of this process, and what is elsewhere of each metric.
    fn numbers_of(&self, elsewhere: impl Fn(&str, &[&str]) -> f64) -> Sample {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let families: Vec<MetricFamily> =
            services.iter().flat_map(|(_, telemetry)| telemetry.registry.gather()).collect();
        let of = |name: &str, labels: &[&str]| sum(&families, name, labels) + elsewhere(name, labels);
        let dials = "homeport_relay_dials_total";
        let outcomes = "homeport_seed_link_outcomes_total";
        let reported = "homeport_relay_reported_links_total";
        Sample {
            connections: of("homeport_relay_connections", &[]),
            allocations: of("homeport_turn_allocations", &[]),
            links: of("homeport_seed_links", &[]),
            nodes: of("homeport_seed_nodes", &[]),
            relay: (of(dials, &["connected"]), of(dials, &[])),
            seed: (of(outcomes, &["opened"]), of(outcomes, &["opened", "no_path", "no_dtls", "no_channel"])),
            browsers: (of(reported, &["connected"]), of(reported, &["connected", "failed", "timed_out"])),
        }
    }

    fn shows_details(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.strip_prefix("Bearer "));
        self.is_private
            || self.token.as_ref().zip(shown).is_some_and(|(token, shown)| same(token.as_bytes(), shown.as_bytes()))
    }

    /// The services of this process.
    fn own_services(&self) -> Vec<ServiceStatus> {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let service = |(name, telemetry): &(Option<&str>, Telemetry)| {
            let parts = telemetry.health.parts().into_iter().map(PartStatus::of).collect();
            name.map(|name| ServiceStatus::new(name, parts))
        };
        services.iter().filter_map(service).collect()
    }

    /// The services of this machine, as far as they are known.
    fn services(&self, details: bool) -> Vec<ServiceStatus> {
        let others = self.others.get().map(|(others, _)| others.services(details));
        let all = self.own_services().into_iter().chain(others.into_iter().flatten());
        all.map(|service| if details { service } else { service.without_reasons() }).collect()
    }

    /// The machines of the cluster; none without one.
    fn machines(&self, details: bool) -> Vec<Machine> {
        let Some((machines, own)) = self.machines.get() else { return Vec::new() };
        let mut all = machines.all(Instant::now());
        let here = self.services(true);
        match all.iter_mut().find(|machine| machine.name == *own) {
            Some(machine) => {
                // What is known at first hand counts.
                machine.services.retain(|heard| here.iter().all(|service| service.name != heard.name));
                machine.services.splice(..0, here);
            }
            None => {
                let version = env!("CARGO_PKG_VERSION").to_owned();
                all.push(Machine { name: own.clone(), version, services: here });
                all.sort_by(|one, other| one.name.cmp(&other.name));
            }
        }
        if !details {
            for (machine, number) in all.iter_mut().zip(1..) {
                // It may be the name of a host.
                machine.name = format!("machine {number}");
                machine.services = machine.services.drain(..).map(ServiceStatus::without_reasons).collect();
            }
        }
        all
    }

    fn numbers(&self) -> Value {
        let now = self.sample();
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = samples.iter().rev().nth(RECENT - 1).or(samples.front()).copied().unwrap_or_default();
        // What another process of this machine has counted may have begun anew.
        let since = |now: (f64, f64), then: (f64, f64)| json!([(now.0 - then.0).max(0.0), (now.1 - then.1).max(0.0)]);
        let series = |value: fn(&Sample) -> f64| samples.iter().chain([&now]).map(value).collect::<Vec<_>>();
        // The share of each five minutes that end at a sample.
        let success: Vec<Value> = (0..samples.len())
            .map(|index| {
                let (then, now) = (samples[index.saturating_sub(RECENT)], samples[index]);
                let all = |sample: Sample| {
                    let sides = [sample.relay, sample.seed, sample.browsers];
                    sides.iter().fold((0.0, 0.0), |sum, side| (sum.0 + side.0, sum.1 + side.1))
                };
                let (ok, tried) = (all(now).0 - all(then).0, all(now).1 - all(then).1);
                if tried >= 5.0 { json!((ok / tried).clamp(0.0, 1.0)) } else { Value::Null }
            })
            .collect();
        json!({
            "now": { "connections": now.connections, "allocations": now.allocations, "links": now.links, "nodes": now.nodes },
            "success": {
                "relay": since(now.relay, earlier.relay),
                "seed": since(now.seed, earlier.seed),
                "browsers": since(now.browsers, earlier.browsers),
            },
            "history": {
                "interval_seconds": SAMPLE_INTERVAL.as_secs(),
                "connections": series(|sample| sample.connections),
                "allocations": series(|sample| sample.allocations),
                "links": series(|sample| sample.links),
                "success": success,
            },
        })
    }
}

/// The sum of a metric's series, of those with one of `labels` if there are any.
fn sum(families: &[MetricFamily], name: &str, labels: &[&str]) -> f64 {
    let metrics = families.iter().filter(|family| family.name() == name).flat_map(MetricFamily::get_metric);
    metrics
        .filter(|metric| labels.is_empty() || metric.get_label().iter().any(|pair| labels.contains(&pair.value())))
        .map(|metric| metric.get_gauge().get_value() + metric.get_counter().get_value())
        .sum()
}

async fn document(State(status): State<Arc<Status>>, headers: HeaderMap) -> Response {
    let details = status.shows_details(&headers);
    let rooms = if details { status.rooms().await } else { Vec::new() };
    let services = json!(status.services(details));
    let mut document = status.numbers();
    document["version"] = env!("CARGO_PKG_VERSION").into();
    document["details"] = details.into();
    document["services"] = services;
    document["machines"] = json!(status.machines(details));
    document["rooms"] = rooms
        .iter()
        .map(|room| {
            json!({
                "name": room.name, "paused": room.paused, "held_by": room.held_by, "peers": room.peers, "links": room.links,
                "nodes": room.nodes, "operations": room.logged_operations,
                "cells": room.members_by_cell.iter().map(|cell| json!({ "members": cell.members, "bridged": cell.bridged })).collect::<Vec<_>>(),
            })
        })
        .collect();
    let headers = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (headers, Json(document)).into_response()
}

/// The connection check: what works from where a user is.
async fn check_page() -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_SECURITY_POLICY)),
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    (headers, include_str!("../../web/check.html")).into_response()
}

/// An event for the connection check to publish, since a page has nothing to sign one with: ephemeral, of a key of its own,
/// with nothing of the client in it.
async fn check_event() -> Response {
    let topic: String = rand::rng().sample_iter(rand::distr::Alphanumeric).take(32).map(char::from).collect();
    let tag = Tag::parse(["x", &topic]);
    let event = tag.ok().and_then(|tag| {
        EventBuilder::new(Kind::from(CHECK_KIND), r#"{"check":1}"#).tag(tag).finalize(&Keys::generate()).ok()
    });
    let headers = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    match event {
        Some(event) => (headers, Json(json!({ "topic": topic, "event": event }))).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{IntCounterVec, IntGauge, Opts};

    use super::*;

    fn with_token(token: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {token}")).unwrap())])
    }

    #[test]
    fn details_are_for_who_knows_the_token_or_is_on_this_machine() {
        for (token, is_private, shown, expected) in [
            (None, true, None, true),
            (None, false, None, false),
            (None, false, Some(""), false),
            (Some("north"), false, None, false),
            (Some("north"), false, Some("south"), false),
            (Some("north"), false, Some("north"), true),
        ] {
            let status = Status::new(token.map(str::to_owned), is_private);
            let headers = shown.map(with_token).unwrap_or_default();
            assert_eq!(status.shows_details(&headers), expected, "{token:?} {is_private} {shown:?}");
        }
    }

    #[test]
    fn reasons_are_details() {
        let status = Status::new(None, false);
        let telemetry = Telemetry::default();
        telemetry.health.set("archive", service::State::Degraded("cannot write: /secret/place".into()));
        status.add(Some("seed"), telemetry);
        assert_eq!(json!(status.services(false))[0]["state"], "degraded");
        assert!(!json!(status.services(false)).to_string().contains("secret"));
        assert!(json!(status.services(true)).to_string().contains("secret"));
    }

    #[test]
    fn numbers_are_those_of_the_metrics_and_shares_those_of_five_minutes() {
        let status = Status::new(None, true);
        let telemetry = Telemetry::default();
        let connections = IntGauge::new("homeport_relay_connections", "x").unwrap();
        let dials = IntCounterVec::new(Opts::new("homeport_relay_dials_total", "x"), &["outcome"]).unwrap();
        telemetry.registry.register(Box::new(connections.clone())).unwrap();
        telemetry.registry.register(Box::new(dials.clone())).unwrap();
        status.add(Some("relay"), telemetry);
        let sample = |status: &Status| status.samples.lock().unwrap().push_back(status.gather());
        connections.set(7);
        dials.with_label_values(&["unanswered"]).inc_by(100);
        sample(&status);
        for _ in 0..30 {
            dials.with_label_values(&["connected"]).inc_by(3);
            dials.with_label_values(&["redialled"]).inc();
            sample(&status);
        }
        let numbers = status.numbers();
        assert_eq!(numbers["now"]["connections"], 7.0);
        assert_eq!(numbers["success"]["relay"], json!([57.0, 76.0]), "19 steps back to the sample 20 ago");
        assert_eq!(numbers["history"]["success"][0], Value::Null);
        assert_eq!(numbers["history"]["success"][30], 0.75);
    }
}
