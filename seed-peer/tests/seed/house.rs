//! Relay and seed, as tests set them up.

use std::net::SocketAddr;
use std::path::Path;

use genosdb::MemoryGraph;
use seed_peer::{Bounds, CellsConfig, Config, RelayKey, RoomConfig, Server};

use crate::client::{Client, PATIENCE, View, new_id};

pub(crate) async fn relay() -> relay::Server {
    relay_at("127.0.0.1:0".parse().unwrap()).await
}

pub(crate) async fn relay_at(listen: SocketAddr) -> relay::Server {
    relay_with(listen, relay::Admission::Open).await
}

pub(crate) async fn relay_with(listen: SocketAddr, admission: relay::Admission) -> relay::Server {
    relay::Server::bind(relay::Config { admission, ..relay::Config::at(listen) }).await.unwrap()
}

pub(crate) fn url(relay: &relay::Server) -> String {
    format!("ws://{}/", relay.address())
}

pub(crate) fn seed(relays: &[&str], data: &Path) -> Server {
    seed_with(relays, data, RelayKey::generate())
}

pub(crate) fn seed_with(relays: &[&str], data: &Path, relay_key: RelayKey) -> Server {
    let rooms = vec![RoomConfig::named("my-app"), RoomConfig { password: "pw1".into(), ..RoomConfig::named("secret") }];
    Server::bind(Config { relay_key, ..config(relays, data, rooms) }).unwrap()
}

/// A seed in a room called `my-app`, in cells.
pub(crate) fn seed_in_cells(relay: &str, data: &Path, cells: CellsConfig) -> Server {
    let room = RoomConfig { cells: Some(cells), ..RoomConfig::named("my-app") };
    Server::bind(config(&[relay], data, vec![room])).unwrap()
}

pub(crate) fn config(relays: &[&str], data: &Path, rooms: Vec<RoomConfig>) -> Config {
    Config {
        relay_key: RelayKey::generate(),
        listen: "127.0.0.1:0".parse().unwrap(),
        external: None,
        data: data.to_owned(),
        relays: relays.iter().map(|url| (*url).to_owned()).collect(),
        identity: None,
        rooms,
        check_room: Some("check".into()),
        bounds: Bounds { value_bytes: 100_000, ..Bounds::default() },
        keep: None,
        message_bytes: 64 << 20,
        operations_per_second: 1_000,
        pass_on: true,
        max_links: 600,
        backup: None,
        shared: None,
    }
}

pub(crate) fn join(relay: &str) -> Client {
    Client::join(relay, "my-app", "", new_id(), MemoryGraph::default())
}

/// How much the seed has counted of something, with a label of that value if one is named.
pub(crate) fn count(seed: &Server, name: &str, label: &str) -> f64 {
    let families = seed.telemetry().registry.gather();
    let metrics = families.iter().filter(|family| family.name() == name).flat_map(|family| family.get_metric());
    metrics
        .filter(|metric| label.is_empty() || metric.get_label().iter().any(|pair| pair.value() == label))
        .map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value())
        .sum()
}

/// Waits until the seed has counted so much of something.
pub(crate) async fn counted(seed: &Server, name: &str, label: &str, wanted: f64) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while count(seed, name, label) < wanted {
        assert!(tokio::time::Instant::now() < deadline, "{name} {label}: {} of {wanted}", count(seed, name, label));
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

pub(crate) fn nodes(view: &View) -> Vec<genosdb::Node> {
    view.graph.full_state().nodes
}
