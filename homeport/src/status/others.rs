//! The other processes of this Homeport: how they are, by what they say on their metrics listeners.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::service_status::{PartStatus, ServiceStatus, Shown};

/// How long one may take to answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The longest answer that is read.
const MAX_ANSWER: u64 = 4 << 20;

/// The others, as they were when they were last looked at.
#[derive(Debug)]
pub(crate) struct Others(Mutex<Vec<Other>>);

#[derive(Debug, Clone)]
struct Other {
    address: SocketAddr,
    /// Which service it runs; not known before it has answered once.
    name: Option<&'static str>,
    /// Its parts as it names them, or why it does not answer.
    parts: Result<Vec<PartStatus>, String>,
    /// Its metrics, in Prometheus's text.
    metrics: String,
}

impl Others {
    pub(crate) fn new(addresses: &[SocketAddr]) -> Self {
        let other = |address: &SocketAddr| Other {
            address: *address,
            name: None,
            parts: Err("it was not asked yet".into()),
            metrics: String::new(),
        };
        Self(Mutex::new(addresses.iter().map(other).collect()))
    }

    fn all(&self) -> Vec<Other> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks each how it is.
    pub(crate) async fn look(&self) {
        let mut all = self.all();
        for other in &mut all {
            match ask(other.address).await {
                Ok((parts, metrics)) => {
                    other.name = service_of(&metrics);
                    (other.parts, other.metrics) = (Ok(parts), metrics);
                }
                Err(error) => {
                    other.parts = Err(format!("{error:#}"));
                    other.metrics.clear();
                }
            }
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }

    /// How they are; where they are is a detail, as reasons are.
    pub(super) fn services(&self, details: bool) -> Vec<ServiceStatus> {
        let service = |other: Other| {
            let name = other.name.map_or_else(|| format!("the service at {}", other.address), str::to_owned);
            let name = if details { name } else { other.name.unwrap_or("another service").to_owned() };
            let parts = other.parts.unwrap_or_else(|reason| {
                vec![PartStatus { name: "the process".into(), state: Shown::Down, reason: Some(reason) }]
            });
            ServiceStatus::new(name, parts)
        };
        self.all().into_iter().map(service).collect()
    }

    /// The sum of a metric's series over all, of those with one of `labels` as the value of a label if there are any.
    pub(crate) fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|other| sum_in(&other.metrics, name, labels)).sum()
    }
}

/// The sum of a metric's series, of those with one of `labels` as the value of a label if there are any.
pub(crate) fn sum_in(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let series = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // The name may be the beginning of another.
        let (described, value) = rest.rsplit_once(' ')?;
        let is_it = described.is_empty() || described.starts_with('{');
        let fits = labels.is_empty() || labels.iter().any(|label| described.contains(&format!("=\"{label}\"")));
        (is_it && fits).then_some(value)
    });
    series.filter_map(|value| value.parse::<f64>().ok()).sum()
}

/// The service whose metrics these are; of several in one process, the first.
fn service_of(metrics: &str) -> Option<&'static str> {
    ["relay", "turn", "seed"]
        .into_iter()
        .find(|service| metrics.lines().any(|line| line.starts_with(&format!("homeport_{service}_"))))
}

async fn ask(address: SocketAddr) -> anyhow::Result<(Vec<PartStatus>, String)> {
    #[derive(Deserialize)]
    struct Report {
        parts: BTreeMap<String, Part>,
    }
    #[derive(Deserialize)]
    struct Part {
        state: Shown,
        reason: Option<String>,
    }
    let report: Report =
        serde_json::from_str(&get(address, "/healthz").await?).context("what answers there is no Homeport")?;
    let part = |(name, Part { state, reason })| PartStatus { name, state, reason };
    Ok((report.parts.into_iter().map(part).collect(), metrics_of(address).await?))
}

/// The metrics of a Homeport, as Prometheus reads them.
pub(crate) async fn metrics_of(address: SocketAddr) -> anyhow::Result<String> {
    get(address, "/metrics").await
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(TIMEOUT, asking).await.context("it does not answer")??;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.to_owned()),
        _ => bail!("it does not answer as homeport does"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_prometheus_writes_them() {
        let text = "# HELP homeport_seed_links x\nhomeport_seed_links{room=\"a\"} 3\nhomeport_seed_links{room=\"b\"} 4\n\
                    homeport_seed_links_more 100\nhomeport_seed_nodes 7\n";
        assert_eq!(sum_in(text, "homeport_seed_links", &[]), 7.0);
        assert_eq!(sum_in(text, "homeport_seed_links", &["b", "c"]), 4.0);
        assert_eq!(sum_in(text, "homeport_seed_nodes", &[]), 7.0);
        assert_eq!(sum_in(text, "homeport_turn_allocations", &[]), 0.0);
        assert_eq!(service_of(text), Some("seed"));
    }

    #[tokio::test]
    async fn another_is_shown_as_it_is_and_when_it_is_gone() {
        let telemetry = service::Telemetry::default();
        let links = prometheus::IntGauge::new("homeport_seed_links", "x").unwrap();
        telemetry.registry.register(Box::new(links.clone())).unwrap();
        links.set(5);
        telemetry.health.set("archive", service::State::Degraded("the disk at /secret is full".into()));
        let server = service::MetricsServer::bind("127.0.0.1:0".parse().unwrap(), vec![telemetry]).unwrap();
        let others = Others::new(&[server.address()]);
        others.look().await;
        assert_eq!(others.sum("homeport_seed_links", &[]), 5.0);
        let part = PartStatus {
            name: "archive".into(),
            state: Shown::Degraded,
            reason: Some("the disk at /secret is full".into()),
        };
        assert_eq!(others.services(true), [ServiceStatus::new("seed", vec![part])]);
        server.shutdown().await;
        others.look().await;
        let gone = &others.services(false)[0];
        assert_eq!((gone.state, &*gone.name, others.sum("homeport_seed_links", &[])), (Shown::Down, "seed", 0.0));
    }
}
