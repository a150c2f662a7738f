//! Whether the other machines of a cluster can be reached.

use std::time::{Duration, Instant};

use service::cluster::PART;
use service::{Cluster, State};

use super::Finding;
use crate::probe::PATIENCE;
use crate::settings::Settings;

const WHAT: &str = "cluster";
/// How often it is looked whether NATS is connected.
const LOOK: Duration = Duration::from_millis(20);

/// Connects with NATS as the services do, and has it answer.
pub(super) async fn ask(settings: &Settings) -> anyhow::Result<Option<Finding>> {
    let Some(config) = settings.cluster()? else { return Ok(None) };
    let name = config.name.clone();
    let cluster = Cluster::connect(config).await?;
    let state = || cluster.telemetry().health.parts().remove(PART);
    let start = Instant::now();
    while state() != Some(State::Ok) {
        if start.elapsed() > PATIENCE {
            let reason = match state() {
                Some(State::Degraded(reason)) => reason,
                _ => "NATS does not answer".to_owned(),
            };
            let advice = "start it, let its port through the firewall between the machines, and look at cluster.nats and who \
                          we are to it (cluster.user, cluster.token or cluster.credentials)";
            return Ok(Some(Finding::failure(WHAT, reason, advice)));
        }
        tokio::time::sleep(LOOK).await;
    }
    // Answered by the server once it has seen to all that was said before.
    let asked = Instant::now();
    cluster.client().flush().await?;
    let (version, took) = (cluster.client().server_info().version, asked.elapsed().as_millis());
    Ok(Some(Finding::ok(WHAT, format!("{name} is connected with NATS {version}, which answers after {took} ms"))))
}
