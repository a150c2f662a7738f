//! What browsers say of their connections: `/monitor.js`, which an app adds, and `/reports`, which takes what it sends.
//!
//! Anybody can send anything here. So what is not one of a few words is refused, what comes too often is left out, and the
//! metrics say that they are reported and not seen.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts};
use serde::Deserialize;
use service::{Origin, Telemetry};

/// Bytes of a report.
const MAX_BYTES: usize = 32 << 10;
/// Connections in a report.
const MAX_LINKS: usize = 200;
/// Reports a minute from one address; a page sends six.
const PER_MINUTE: NonZeroU32 = NonZeroU32::new(60).expect("not zero");
/// Addresses whose rates are remembered before those that are quiet are forgotten.
const TIDY_AT: usize = 10_000;

/// A report of `monitor.js`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    version: u32,
    links: Vec<ReportedLink>,
}

/// What a page says of one connection.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReportedLink {
    outcome: Outcome,
    /// How long it took, in ms.
    ms: Option<f64>,
    /// STUN and TURN servers that could not be reached (error 701).
    #[serde(default)]
    unreachable: u32,
    #[serde(default)]
    local: Option<CandidateType>,
    #[serde(default)]
    remote: Option<CandidateType>,
    /// How the local relay was reached.
    #[serde(default)]
    relay: Option<RelayProtocol>,
    /// The round-trip time, in ms.
    #[serde(default)]
    rtt: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Connected,
    Failed,
    TimedOut,
    Abandoned,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Connected, Self::Failed, Self::TimedOut, Self::Abandoned];

    fn label(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Abandoned => "abandoned",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CandidateType {
    Host,
    Srflx,
    Prflx,
    Relay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RelayProtocol {
    Udp,
    Tcp,
    Tls,
}

/// Over what a connection goes, as the metrics say it.
const PATHS: [&str; 7] = ["host", "nat", "relay_udp", "relay_tcp", "relay_tls", "relay_remote", "unknown"];

impl ReportedLink {
    fn path(&self) -> &'static str {
        match (self.local, self.remote, self.relay) {
            (Some(CandidateType::Relay), _, Some(RelayProtocol::Udp)) => "relay_udp",
            (Some(CandidateType::Relay), _, Some(RelayProtocol::Tcp)) => "relay_tcp",
            (Some(CandidateType::Relay), _, Some(RelayProtocol::Tls)) => "relay_tls",
            (Some(CandidateType::Host), Some(CandidateType::Host), _) => "host",
            (Some(CandidateType::Relay), _, None) | (None, _, _) | (_, None, _) => "unknown",
            (_, Some(CandidateType::Relay), _) => "relay_remote",
            _ => "nat",
        }
    }
}

/// Takes reports and counts them.
pub(crate) struct Reports {
    links: IntCounterVec,
    paths: IntCounterVec,
    connect_seconds: Histogram,
    round_trip_seconds: Histogram,
    unreachable: IntCounter,
    reports: IntCounterVec,
    rate: DefaultKeyedRateLimiter<Origin>,
    proxy_header: Option<HeaderName>,
}

impl Reports {
    /// Registers the metrics with `telemetry`.
    pub(crate) fn new(telemetry: &Telemetry, proxy_header: Option<HeaderName>) -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, label: &str, values: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            telemetry.registry.register(Box::new(counters.clone()))?;
            values.iter().for_each(|value| drop(counters.with_label_values(&[value])));
            Ok::<_, prometheus::Error>(counters)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            telemetry.registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let unreachable = IntCounter::new(
            "homeport_relay_reported_unreachable_servers_total",
            "STUN and TURN servers that browsers say they could not reach (error 701). Untrusted: anybody can report.",
        )?;
        telemetry.registry.register(Box::new(unreachable.clone()))?;
        Ok(Self {
            links: counters(
                "homeport_relay_reported_links_total",
                "Connections between browsers, by what they say became of them. Untrusted: anybody can report.",
                "outcome",
                &Outcome::ALL.map(Outcome::label),
            )?,
            paths: counters(
                "homeport_relay_reported_paths_total",
                "Connections between browsers that came to be, by what they say they go over. Untrusted.",
                "path",
                &PATHS,
            )?,
            connect_seconds: histogram(
                "homeport_relay_reported_connect_seconds",
                "How long browsers say it took to connect. Untrusted.",
                &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0],
            )?,
            round_trip_seconds: histogram(
                "homeport_relay_reported_round_trip_seconds",
                "Round-trip times between browsers, as they say. Untrusted.",
                &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0],
            )?,
            unreachable,
            reports: counters(
                "homeport_relay_reports_total",
                "Reports of browsers, by what became of them.",
                "result",
                &["taken", "malformed", "too_often"],
            )?,
            rate: RateLimiter::keyed(Quota::per_minute(PER_MINUTE)),
            proxy_header,
        })
    }

    /// The pages, to be served by the relay.
    pub(crate) fn routes(self) -> Router {
        Router::new()
            .route("/monitor.js", get(monitor))
            .route("/reports", post(report))
            .layer(DefaultBodyLimit::max(MAX_BYTES))
            .with_state(Arc::new(self))
    }

    fn take(&self, body: &[u8]) -> Option<()> {
        let report: Report = serde_json::from_slice(body).ok()?;
        if report.version != 1 || report.links.len() > MAX_LINKS {
            return None;
        }
        for link in report.links {
            self.links.with_label_values(&[link.outcome.label()]).inc();
            self.unreachable.inc_by(link.unreachable.min(16).into());
            if link.outcome != Outcome::Connected {
                continue;
            }
            self.paths.with_label_values(&[link.path()]).inc();
            let seconds = |ms: Option<f64>| ms.filter(|ms| (0.0..120_000.0).contains(ms)).map(|ms| ms / 1_000.0);
            if let Some(took) = seconds(link.ms) {
                self.connect_seconds.observe(took);
            }
            if let Some(rtt) = seconds(link.rtt) {
                self.round_trip_seconds.observe(rtt);
            }
        }
        Some(())
    }
}

async fn monitor() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/javascript; charset=utf-8"),
        // A module of another origin is fetched with CORS.
        (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
        (header::CACHE_CONTROL, "max-age=3600"),
    ];
    (headers, include_str!("../../web/monitor.js")).into_response()
}

async fn report(
    State(reports): State<Arc<Reports>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let origin = Origin::of(relay::client_address(client, &headers, reports.proxy_header.as_ref()));
    if reports.rate.len() > TIDY_AT {
        reports.rate.retain_recent();
    }
    // Behind a proxy that does not say for whom it speaks, everybody comes from there.
    let is_anybody = reports.proxy_header.is_none() && origin.is_loopback();
    let (label, status) = if !is_anybody && reports.rate.check_key(&origin).is_err() {
        ("too_often", StatusCode::TOO_MANY_REQUESTS)
    } else if reports.take(&body).is_some() {
        ("taken", StatusCode::NO_CONTENT)
    } else {
        ("malformed", StatusCode::BAD_REQUEST)
    };
    reports.reports.with_label_values(&[label]).inc();
    (status, [(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*")]).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports() -> Reports {
        Reports::new(&Telemetry::default(), None).unwrap()
    }

    #[test]
    fn what_a_page_says_is_counted_by_a_few_words() {
        let reports = reports();
        let link = |more: &str| format!(r#"{{"outcome":"connected","ms":250,"unreachable":1,{more}"rtt":20}}"#);
        let body = format!(
            r#"{{"version":1,"links":[{},{},{},{},{{"outcome":"failed","ms":null,"unreachable":999}},{{"outcome":"timed_out","ms":null}}]}}"#,
            link(r#""local":"relay","remote":"srflx","relay":"tls","#),
            link(r#""local":"srflx","remote":"relay","relay":null,"#),
            link(r#""local":"prflx","remote":"host","#),
            link(""),
        );
        assert!(reports.take(body.as_bytes()).is_some());
        let outcome = |label| reports.links.with_label_values(&[label]).get();
        assert_eq!((outcome("connected"), outcome("failed"), outcome("timed_out")), (4, 1, 1));
        let path = |label| reports.paths.with_label_values(&[label]).get();
        assert_eq!((path("relay_tls"), path("relay_remote"), path("nat"), path("unknown")), (1, 1, 1, 1));
        assert_eq!((reports.connect_seconds.get_sample_count(), reports.unreachable.get()), (4, 20));
    }

    #[test]
    fn what_is_not_one_of_them_is_refused_and_makes_no_series() {
        let telemetry = Telemetry::default();
        let reports = Reports::new(&telemetry, None).unwrap();
        let series = || telemetry.registry.gather().iter().map(|family| family.get_metric().len()).sum::<usize>();
        let before = series();
        let many = format!(r#"{{"version":1,"links":[{}]}}"#, vec![r#"{"outcome":"failed","ms":1}"#; 201].join(","));
        for body in [
            "",
            "[]",
            r#"{"version":2,"links":[]}"#,
            r#"{"version":1,"links":[{"outcome":"won","ms":1}]}"#,
            r#"{"version":1,"links":[{"outcome":"connected","ms":1,"local":"10.0.0.1"}]}"#,
            r#"{"version":1,"links":[{"outcome":"connected","ms":1,"peer":"x"}]}"#,
            r#"{"version":1,"links":[{"outcome":"connected","ms":1,"unreachable":-1}]}"#,
            &many,
        ] {
            assert!(reports.take(body.as_bytes()).is_none(), "{body}");
        }
        let odd = r#"{"version":1,"links":[{"outcome":"connected","ms":1e300,"rtt":-5}]}"#;
        assert!(reports.take(odd.as_bytes()).is_some());
        assert_eq!(reports.connect_seconds.get_sample_count(), 0);
        assert_eq!(series(), before);
    }
}
