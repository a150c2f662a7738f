//! Whether the other machines of a cluster can be reached.

use std::time::{Duration, Instant};

use service::{Cluster, ClusterConfig, State};

use super::Finding;
use crate::probe::PATIENCE;
use crate::settings::Settings;

const WHAT: &str = "cluster";
/// How often it is looked whether NATS is connected.
const LOOK: Duration = Duration::from_millis(20);

/// Connects with NATS as the services do, and has it carry a word around.
pub(super) async fn ask(settings: &Settings) -> anyhow::Result<Option<Finding>> {
    let Some(config) = settings.cluster()? else { return Ok(None) };
    Ok(Some(match tokio::time::timeout(PATIENCE, meet(config)).await {
        Ok(Ok(found)) => Finding::ok(WHAT, found),
        Ok(Err(error)) => Finding::failure(WHAT, error.to_string(), "look at the [cluster] settings"),
        Err(_) => Finding::failure(
            WHAT,
            "NATS does not answer, or does not let us in",
            "start it, let its port through the firewall between the machines, and look at cluster.nats and who we are to \
             it (cluster.user, cluster.token or cluster.credentials)",
        ),
    }))
}

async fn meet(config: ClusterConfig) -> anyhow::Result<String> {
    let name = config.name.clone();
    let cluster = Cluster::connect(config).await?;
    while cluster.telemetry().health.parts().get("cluster") != Some(&State::Ok) {
        tokio::time::sleep(LOOK).await;
    }
    let client = cluster.client();
    let start = Instant::now();
    // Answered by the server once it has seen to all that was said before.
    client.flush().await?;
    let server = client.server_info();
    Ok(format!(
        "{name} is connected with NATS {} ({} ms), which knows {} servers",
        server.version,
        start.elapsed().as_millis(),
        server.connect_urls.len().max(1)
    ))
}
