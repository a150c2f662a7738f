//! A relay made of the crate `nostr-relay-builder`, to be measured beside ours: `bench-relay-builder PORT`.

use anyhow::Context as _;
use nostr_relay_builder::builder::{RateLimit, RelayBuilder};
use nostr_relay_builder::local::LocalRelay;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).context("expected a port")?;
    rlimit::increase_nofile_limit(u64::MAX)?;
    // Its default of 60 events a minute is not what is measured here.
    let limit = RateLimit { max_reqs: 10_000, notes_per_minute: u32::MAX };
    let relay = LocalRelay::new(RelayBuilder::default().port(port).max_connections(20_000).rate_limit(limit));
    relay.run().await?;
    std::future::pending().await
}
