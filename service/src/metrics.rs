//! The listener for people and programs that watch: `/metrics`, `/healthz`, `/readyz`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus::{Encoder as _, Registry, TextEncoder};
use tokio_util::sync::CancellationToken;

use crate::health::{Health, Report};
use crate::listen::{self, BindError};

/// What a service shows of itself: its metrics, and its health.
#[derive(Debug, Clone, Default)]
pub struct Telemetry {
    /// The service's metrics, all with its own prefix.
    pub registry: Registry,
    /// The service's health.
    pub health: Health,
}

/// Serves the metrics and the health of the services of this process.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl MetricsServer {
    /// Starts to serve `/metrics`, `/healthz` and `/readyz` on `address` (setting `metrics.listen`).
    ///
    /// # Errors
    /// [`BindError`] when the address cannot be listened on.
    pub fn bind(address: SocketAddr, services: Vec<Telemetry>) -> Result<Self, BindError> {
        let listener = listen::tcp("metrics.listen", address)?;
        let address = listener.local_addr().unwrap_or(address);
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(Arc::new(services));
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let task = tokio::spawn(async move { axum::serve(listener, router).with_graceful_shutdown(stopped).await });
        Ok(Self { address, stop, task })
    }

    /// The address in use, with the port that the system chose when it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops listening. Connections that are open are cut: scrapers ask again.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.task.abort();
        match self.task.await {
            Ok(Err(error)) => tracing::warn!(%error, "the metrics listener had failed"),
            Err(error) if error.is_panic() => tracing::error!("the metrics listener had panicked"),
            _ => {}
        }
    }
}

async fn metrics(Shared(services): Shared<Arc<Vec<Telemetry>>>) -> Response {
    // The process's own metrics (memory, CPU, file descriptors) live in the default registry.
    let mut families = prometheus::gather();
    for service in services.iter() {
        families.extend(service.registry.gather());
    }
    let mut body = Vec::new();
    match TextEncoder::new().encode(&families, &mut body) {
        Ok(()) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Whether the process lives. Degraded counts as alive: a restart would not empty a full disk.
async fn healthz(Shared(services): Shared<Arc<Vec<Telemetry>>>) -> Response {
    Json(Report::of(services.iter().map(|service| &service.health))).into_response()
}

/// Whether everything serves as it should.
async fn readyz(Shared(services): Shared<Arc<Vec<Telemetry>>>) -> Response {
    let report = Report::of(services.iter().map(|service| &service.health));
    let status = if report.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report)).into_response()
}
