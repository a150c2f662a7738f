//! What becomes of data: clocks that disagree, removals against edits, much at once.

use genosdb::{MemoryGraph, Operation};

use crate::client::{Client, View, new_id, wall_ms};
use crate::house::{counted, join, nodes, relay, seed, url};

/// Two clients that are linked with the seed and with each other.
async fn pair(relay: &str) -> (Client, Client) {
    let (mut one, mut other) = (join(relay), join(relay));
    one.until("links", |view| view.linked.len() == 2).await;
    other.until("links", |view| view.linked.len() == 2).await;
    (one, other)
}

/// What a newcomer is told, when nobody but the seed is left to tell it.
async fn archived(relay: &str, ready: impl FnMut(&View) -> bool) -> View {
    let mut newcomer = join(relay);
    let view = newcomer.until("what is archived", ready).await;
    newcomer.leave().await;
    view
}

#[tokio::test]
async fn clocks_hours_apart_lead_to_one_graph() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url], data.path());
    let (mut slow, mut fast) = pair(&url).await;
    slow.skew(-50 * 60_000);
    fast.skew(50 * 60_000);
    slow.write("put a \"slow\"\nput b \"slow\"");
    fast.until("what the slow one wrote", |view| view.graph.get("b").is_some()).await;
    fast.write("put a \"fast\"\nput c \"fast\"");
    let value = |view: &View, id: &str| view.graph.get(id).and_then(|node| node.value.clone()).map(|it| it.to_string());
    let seen = |view: &View| value(view, "a") == Some("\"fast\"".into()) && view.graph.get("c").is_some();
    slow.until("what the fast one wrote", seen).await;
    // Whoever heard of the future writes after it, however slow its own clock is.
    slow.write("put a \"slow again\"");
    fast.until("the last word", |view| value(view, "a") == Some("\"slow again\"".into())).await;
    counted(&seed, "homeport_seed_operations_total", "applied", 5.0).await;
    for client in [slow, fast] {
        client.leave().await;
    }
    let view = archived(&url, |view| view.graph.iter().count() == 3).await;
    assert_eq!(value(&view, "a"), Some("\"slow again\"".into()));

    // A clock of tomorrow does not win for a day: what it writes is capped at two hours from now.
    let mut tomorrow = join(&url);
    tomorrow.until("a link", |view| view.linked.len() == 1).await;
    tomorrow.skew(24 * 3_600_000);
    tomorrow.write("put d \"tomorrow\"");
    counted(&seed, "homeport_seed_operations_total", "applied", 6.0).await;
    tomorrow.vanish();
    let view = archived(&url, |view| view.graph.get("d").is_some()).await;
    let stamped = view.graph.get("d").unwrap().timestamp.physical;
    let cap = wall_ms() + 2 * 3_600_000;
    assert!((cap - 60_000..=cap).contains(&stamped));
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn of_a_removal_and_an_edit_at_one_time_the_later_stands_and_nothing_old_comes_back() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url], data.path());
    let (mut one, mut other) = pair(&url).await;
    one.write("put a 1\nput b 1\nput hub 1\nlink hub a\nlink hub b");
    let stale = other.until("the nodes", |view| view.graph.get("hub").is_some_and(|hub| hub.edges.len() == 2)).await;
    counted(&seed, "homeport_seed_operations_total", "applied", 5.0).await;
    // A minute apart by their clocks, at one time by ours: the removal of a is older than the edit, that of b is newer.
    one.skew(60_000);
    other.write("remove a\nput b 2");
    one.write("put a 2\nremove b");
    let settled = |view: &View| {
        view.graph.get("b").is_none()
            && view.graph.get("a").is_some_and(|a| a.value.as_ref().is_some_and(|value| value.as_str() == "2"))
    };
    one.until("the later of each", settled).await;
    other.until("the later of each", settled).await;
    counted(&seed, "homeport_seed_operations_total", "applied", 7.0).await;
    one.leave().await;
    other.leave().await;

    // A page that slept through all of that brings its old state along.
    let mut sleeper = Client::join(&url, "my-app", "", new_id(), stale.graph.clone());
    sleeper.until("the later of each", settled).await;
    let held = nodes(&sleeper.view());
    sleeper.leave().await;
    let view = archived(&url, settled).await;
    assert_eq!(nodes(&view), held);
    assert!(view.graph.get("hub").is_some_and(|hub| hub.edges.iter().all(|edge| edge.as_printed() != "b")));
    seed.shutdown().await;
    relay.shutdown().await;
}

/// A graph of so many nodes.
fn large(count: usize) -> MemoryGraph {
    let mut graph = MemoryGraph::default();
    let at = wall_ms() - 3_600_000;
    for number in 0..count {
        let text = format!(
            r#"{{"type":"upsert","id":"node-{number}","value":{{"text":"this is node number {number}","n":{number}}},"timestamp":{{"physical":{at},"logical":{number}}}}}"#
        );
        graph.apply(&Operation::parse(&text, &mut 0).unwrap(), wall_ms());
    }
    graph
}

#[tokio::test]
async fn a_hundred_thousand_nodes_go_to_ten_peers_at_once() {
    const NODES: usize = 100_000;
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url], data.path());
    let mut source = Client::join(&url, "my-app", "", new_id(), large(NODES));
    source.until("a link", |view| view.linked.len() == 1).await;
    counted(&seed, "homeport_seed_nodes", "my-app", 100_000.0).await;
    source.leave().await;
    let mut peers: Vec<Client> = (0..10).map(|_| join(&url)).collect();
    peers.iter().for_each(Client::keep_to_the_seed);
    for peer in &mut peers {
        let view = peer.until("every node", |view| view.graph.iter().count() == NODES).await;
        assert!(view.graph.get("node-99999").is_some());
    }
    // One was read from disk, the others were sent what was kept.
    counted(&seed, "homeport_seed_cached_answers_total", "", 9.0).await;
    for peer in peers {
        peer.vanish();
    }
    seed.shutdown().await;
    relay.shutdown().await;
}
