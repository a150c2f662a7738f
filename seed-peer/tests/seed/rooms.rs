//! Rooms in a full mesh.

use futures_util::{SinkExt as _, StreamExt as _};
use genosdb::graph::Outcome;
use genosdb::{MemoryGraph, Operation};
use seed_peer::{CellsConfig, RelayKey, RoomConfig, RoomError, Server};
use tokio_tungstenite::tungstenite::Message;

use crate::client::{Client, PATIENCE, View, new_id, wall_ms};
use crate::house::{config, counted, join, nodes, relay, relay_at, relay_with, seed, seed_with, url};

const SCRIPT: &str = r#"
    put a {"text":"hello","n":1.5}
    put b [1,2,3]
    put c "gone soon"
    link a b
    link a c
    put b {"edited":true}
    remove c
"#;

const WRITTEN_ELSEWHERE: [&str; 2] = [
    r#"{"type":"upsert","id":"elsewhere","value":1,"timestamp":{"physical":1700000000000,"logical":1}}"#,
    r#"{"type":"link","sourceId":"elsewhere","targetId":"x1","timestamp":{"physical":1700000000000,"logical":9}}"#,
];

#[tokio::test]
async fn what_a_peer_wrote_outlives_it_and_a_restart() {
    let relay = relay().await;
    let data = tempfile::tempdir().unwrap();
    let first_seed = seed(&[&url(&relay)], data.path());
    let mut writer = join(&url(&relay));
    writer.until("a link to the seed", |view| view.linked.len() == 1).await;
    writer.write(SCRIPT);
    let written = writer.until("the own writes", |view| view.graph.get("b").is_some()).await;
    counted(&first_seed, "homeport_seed_operations_total", "applied", 7.0).await;
    writer.leave().await;

    let mut newcomer = join(&url(&relay));
    let view = newcomer.until("the state", |view| view.graph.get("b").is_some()).await;
    assert_eq!(nodes(&view), nodes(&written));
    assert_eq!(view.graph.full_state(), written.graph.full_state());
    newcomer.leave().await;

    first_seed.shutdown().await;
    let second_seed = seed(&[&url(&relay)], data.path());
    let mut newcomer = join(&url(&relay));
    let view = newcomer.until("the state from disk", |view| view.graph.get("b").is_some()).await;
    assert_eq!(view.graph.full_state(), written.graph.full_state());
    newcomer.leave().await;
    second_seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn a_subscription_that_a_relay_has_ended_is_made_again() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&format!("ws://{}/", listener.local_addr().unwrap())], data.path());
    let (stream, _) = listener.accept().await.unwrap();
    let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
    let mut asked = async |end: Option<&serde_json::Value>| {
        if let Some(name) = end {
            let closed = serde_json::json!(["CLOSED", name, "error: enough for now"]);
            socket.send(Message::text(closed.to_string())).await.unwrap();
        }
        loop {
            let message = tokio::time::timeout(PATIENCE, socket.next()).await.expect("nothing is asked for");
            let Message::Text(text) = message.unwrap().unwrap() else { continue };
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            if value[0] == "REQ" {
                return (value[1].clone(), value[2]["#x"].as_array().unwrap().clone());
            }
        }
    };
    // Two databases are two rooms each, with a topic of the room and one of the seed; and one for who tries links.
    let mut all = asked(None).await;
    while all.1.len() < 9 {
        all = asked(None).await;
    }
    assert_eq!(asked(Some(&all.0)).await, all);
    seed.shutdown().await;
}

#[tokio::test]
async fn a_password_room_is_for_those_who_know_the_password() {
    let relay = relay().await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url(&relay)], data.path());
    let stranger = Client::join(&url(&relay), "secret", "guess", new_id(), MemoryGraph::default());
    let mut friend = Client::join(&url(&relay), "secret", "pw1", new_id(), MemoryGraph::default());
    friend.until("a link", |view| view.linked.len() == 1).await;
    friend.write(r#"put a {"secret":1}"#);
    counted(&seed, "homeport_seed_operations_total", "applied", 1.0).await;
    counted(&seed, "homeport_seed_link_outcomes_total", "wrong_password", 1.0).await;
    assert!(stranger.view().linked.is_empty());
    stranger.vanish();
    friend.leave().await;
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn the_seed_takes_what_it_lacks_and_gives_what_a_peer_lacks() {
    let relay = relay().await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url(&relay)], data.path());
    let mut first = join(&url(&relay));
    first.until("a link", |view| view.linked.len() == 1).await;
    first.write("put a 1\nput b 2");
    counted(&seed, "homeport_seed_operations_total", "applied", 2.0).await;
    first.leave().await;

    // A peer that wrote while it was alone, more than a client's log keeps, with older and newer timestamps.
    let mut alone = MemoryGraph::default();
    let now = wall_ms();
    for (index, at) in [now - 3_600_000, now + 1_000].into_iter().enumerate() {
        for number in 0..300 {
            let text = format!(
                r#"{{"type":"upsert","id":"x{index}-{number}","value":{number},"timestamp":{{"physical":{at},"logical":{number}}}}}"#
            );
            alone.apply(&Operation::parse(&text, &mut 0).unwrap(), now);
        }
    }
    let mut second = Client::join(&url(&relay), "my-app", "", new_id(), alone);
    second.until("what the seed had", |view| view.graph.get("a").is_some() && view.graph.get("b").is_some()).await;
    counted(&seed, "homeport_seed_nodes", "my-app", 602.0).await;
    let held = nodes(&second.view());
    second.leave().await;

    let mut third = join(&url(&relay));
    let view = third.until("all of it", |view| view.graph.iter().count() >= 602).await;
    assert_eq!(nodes(&view), held);
    third.leave().await;
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn who_is_linked_with_the_seed_alone_hears_what_others_write() {
    let relay = relay().await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url(&relay)], data.path());
    let mut peers: Vec<Client> = (0..3).map(|_| join(&url(&relay))).collect();
    peers.iter().for_each(Client::keep_to_the_seed);
    for peer in &mut peers {
        peer.until("a link", |view| view.linked.len() == 1).await;
    }
    counted(&seed, "homeport_seed_links", "my-app", 3.0).await;
    for (number, peer) in peers.iter().enumerate() {
        peer.write(&format!("put node-{number} {number}"));
    }
    let whole = |view: &View| view.graph.iter().count() == 3;
    for peer in &mut peers {
        peer.until("what the others wrote", whole).await;
    }
    peers[0].write("link node-0 node-1\nremove node-2");
    for peer in &mut peers {
        peer.until("a link and a removal", |view| {
            let node = view.graph.get("node-0");
            view.graph.get("node-2").is_none() && node.is_some_and(|node| node.edges.len() == 1)
        })
        .await;
    }
    // Somebody comes with what it wrote elsewhere, which it is asked for, and tells as a state: it is more than its log
    // keeps.
    let mut graph = MemoryGraph::default();
    for number in 0..600 {
        let text = format!(
            r#"{{"type":"upsert","id":"x{number}","value":1,"timestamp":{{"physical":{},"logical":1}}}}"#,
            wall_ms() - 60_000
        );
        graph.apply(&Operation::parse(&text, &mut 0).unwrap(), wall_ms());
    }
    for text in WRITTEN_ELSEWHERE {
        assert_eq!(graph.apply(&Operation::parse(text, &mut 0).unwrap(), wall_ms()), Outcome::Applied);
    }
    peers.push(Client::join(&url(&relay), "my-app", "", new_id(), graph));
    peers[3].keep_to_the_seed();
    for peer in &mut peers {
        let all = |view: &View| {
            let edges = view.graph.get("elsewhere").map(|node| &node.edges[..]);
            view.graph.iter().count() == 603 && edges.is_some_and(|edges| edges.len() == 1)
        };
        peer.until("what somebody had written", all).await;
    }
    for peer in peers {
        peer.vanish();
    }
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn two_seeds_in_one_room_both_hold_what_is_written() {
    let relay = relay().await;
    let (first_data, second_data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = seed(&[&url(&relay)], first_data.path());
    let mut peer = join(&url(&relay));
    peer.until("a link", |view| view.linked.len() == 1).await;
    peer.write("put before 1");
    counted(&first, "homeport_seed_nodes", "my-app", 1.0).await;
    // The second comes later, and hears of what it has missed from the first alone.
    peer.leave().await;
    let second = seed(&[&url(&relay)], second_data.path());
    counted(&second, "homeport_seed_nodes", "my-app", 1.0).await;
    let mut peer = join(&url(&relay));
    peer.keep_to_the_seed();
    peer.until("links", |view| !view.linked.is_empty()).await;
    peer.write("put after 2");
    for seed in [&first, &second] {
        counted(seed, "homeport_seed_nodes", "my-app", 2.0).await;
    }
    peer.vanish();
    first.shutdown().await;
    second.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn a_reloaded_tab_comes_back_under_its_id() {
    let relay = relay().await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url(&relay)], data.path());
    let id = new_id();
    let mut tab = Client::join(&url(&relay), "my-app", "", id, MemoryGraph::default());
    tab.until("a link", |view| view.linked.len() == 1).await;
    tab.write("put a 1\nput b 2");
    counted(&seed, "homeport_seed_operations_total", "applied", 2.0).await;
    let kept = tab.view().graph;
    // Gone without a bye: the seed still holds the old link.
    tab.vanish();
    let mut tab = Client::join(&url(&relay), "my-app", "", id, kept);
    tab.until("a link again", |view| view.linked.len() == 1).await;
    tab.write("put c 3");
    counted(&seed, "homeport_seed_operations_total", "applied", 3.0).await;
    counted(&seed, "homeport_seed_disconnects_total", "replaced", 1.0).await;
    tab.leave().await;
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn relays_that_come_back_are_joined_again() {
    let first = relay().await;
    let address = first.address();
    let second = relay().await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url(&first), &url(&second)], data.path());
    counted(&seed, "homeport_seed_relays_connected", "", 2.0).await;
    first.shutdown().await;
    // The other relay still leads to the room.
    let mut peer = join(&url(&second));
    peer.until("a link through the second relay", |view| view.linked.len() == 1).await;
    peer.leave().await;
    let first = relay_at(address).await;
    let mut peer = join(&url(&first));
    peer.until("a link through the first relay", |view| view.linked.len() == 1).await;
    peer.leave().await;
    seed.shutdown().await;
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn a_relay_that_asks_for_proof_gets_it() {
    let key = RelayKey::generate();
    let admission = relay::Admission::Auth([key.public_key()].into());
    let closed = relay_with("127.0.0.1:0".parse().unwrap(), admission).await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed_with(&[&url(&closed)], data.path(), key);
    // Its announces are accepted: one in each of the two rooms of two databases.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let accepted = || -> f64 {
        let families = closed.telemetry().registry.gather();
        let events = families.iter().filter(|family| family.name() == "homeport_relay_deliveries_total");
        events.flat_map(|family| family.get_metric()).map(|metric| metric.get_counter().get_value()).sum()
    };
    while accepted() < 4.0 {
        assert!(tokio::time::Instant::now() < deadline, "{}", accepted());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    seed.shutdown().await;
    closed.shutdown().await;
}

#[tokio::test]
async fn rubbish_is_counted_and_the_room_goes_on() {
    use genosdb::{ChannelName, Content, Message};

    let relay = relay().await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url(&relay)], data.path());
    let mut calm = join(&url(&relay));
    calm.until("a link", |view| view.linked.len() == 1).await;
    let mut rude = join(&url(&relay));
    let seed_id = calm.view().linked[0];
    rude.until("a link to the seed", |view| view.linked.contains(&seed_id)).await;
    // The calm client is a test client that does not put up with rubbish: only the seed shall get it.
    calm.leave().await;
    rude.until("being alone with the seed", |view| view.linked == [seed_id]).await;

    let frame = |text: &str| Message::new(ChannelName::SYNC_GRAPH, Content::Json(text.into())).frame(0, 0);
    rude.send_raw(b"short");
    counted(&seed, "homeport_seed_refused_total", "frame", 1.0).await;
    rude.send_raw(&frame("{\"no\":\"array\"}"));
    counted(&seed, "homeport_seed_refused_total", "message", 1.0).await;
    rude.send_raw(&frame(
        r#"[{"type":"upsert","id":5},{"type":"nonsense"},{"type":"upsert","id":"good","value":1,"timestamp":{"physical":1795337371021,"logical":1}}]"#,
    ));
    counted(&seed, "homeport_seed_refused_total", "operation", 2.0).await;
    counted(&seed, "homeport_seed_operations_total", "applied", 1.0).await;
    let id = "x".repeat(2_000);
    rude.send_raw(&frame(&format!(
        r#"[{{"type":"upsert","id":"{id}","value":1,"timestamp":{{"physical":1795337371021,"logical":1}}}}]"#
    )));
    counted(&seed, "homeport_seed_operations_total", "too_large", 1.0).await;
    for _ in 0..100 {
        rude.send_raw(b"rubbish");
    }
    counted(&seed, "homeport_seed_disconnects_total", "misbehaved", 1.0).await;
    rude.vanish();

    let mut newcomer = join(&url(&relay));
    let view = newcomer.until("the good node", |view| view.graph.get("good").is_some()).await;
    assert_eq!(view.graph.iter().count(), 1);
    newcomer.leave().await;
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn a_peer_that_stays_silent_is_dropped() {
    let relay = relay().await;
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url(&relay)], data.path());
    let mut peer = join(&url(&relay));
    peer.until("a link", |view| view.linked.len() == 1).await;
    peer.vanish();
    counted(&seed, "homeport_seed_disconnects_total", "", 1.0).await;
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn a_seed_in_hundreds_of_rooms_is_found_in_each() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let cells =
        |number: usize| (number % 2 == 1).then_some(CellsConfig { cell_size: 10, bridge: seed_peer::Bridge::One });
    let room = |number: usize| RoomConfig { cells: cells(number), ..RoomConfig::named(&format!("room-{number}")) };
    let seed = Server::bind(config(&[&url], data.path(), (0..300).map(room).collect())).unwrap();
    for number in [0, 1, 149, 150, 298, 299] {
        let name = format!("room-{number}");
        let graph = genosdb::Room::graph_sync(&name);
        let mut client = match cells(number) {
            Some(_) => Client::join_cells(&url, &graph, new_id(), MemoryGraph::default(), 10),
            None => Client::join(&url, &name, "", new_id(), MemoryGraph::default()),
        };
        let in_cells = cells(number).is_some();
        client.until("a link", |view| view.linked.len() == 1 && (!in_cells || view.topology.is_some())).await;
        client.write(&format!("put only-{number} 1"));
        counted(&seed, "homeport_seed_nodes", &name, 1.0).await;
        client.leave().await;
    }
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn rooms_are_added_paused_and_removed_under_the_feet_of_their_peers() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed(&[&url], data.path());
    let extra = RoomConfig { password: "pw".into(), ..RoomConfig::named("extra") };
    seed.rooms().add(extra.clone()).await.unwrap();
    assert_eq!(seed.rooms().add(extra.clone()).await, Err(RoomError::Exists));
    let join = || Client::join(&url, "extra", "pw", new_id(), MemoryGraph::default());
    let mut client = join();
    client.until("a link", |view| view.linked.len() == 1).await;
    client.write("put a 1");
    counted(&seed, "homeport_seed_nodes", "extra", 1.0).await;

    seed.rooms().pause("extra").await.unwrap();
    client.until("the seed's leaving", |view| view.linked.is_empty()).await;
    client.write("put b 2");
    seed.rooms().resume("extra").await.unwrap();
    client.until("the seed again", |view| view.linked.len() == 1).await;
    // What was written meanwhile is asked for.
    counted(&seed, "homeport_seed_nodes", "extra", 2.0).await;
    client.leave().await;

    seed.rooms().remove("extra").await.unwrap();
    let names = |rooms: Vec<seed_peer::RoomStatus>| rooms.into_iter().map(|room| room.name).collect::<Vec<_>>();
    assert_eq!(names(seed.rooms().list().await.unwrap()), ["my-app", "secret"]);
    assert_eq!(seed.rooms().remove("my-app").await, Err(RoomError::FromSettings));
    assert_eq!(seed.rooms().pause("extra").await, Err(RoomError::Unknown));
    // What is archived is there again when the room is.
    seed.rooms().add(extra).await.unwrap();
    let mut newcomer = join();
    let view = newcomer.until("what was archived", |view| view.graph.iter().count() == 2).await;
    assert!(view.graph.get("b").is_some());
    newcomer.leave().await;
    seed.shutdown().await;
    relay.shutdown().await;
}
