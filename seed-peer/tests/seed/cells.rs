//! Rooms in cells, with clients that know nothing of the seed but that it is a peer.

use std::time::Duration;

use genosdb::cells::HashedId;
use genosdb::{CellIndex, MemoryGraph, PeerId, Room};
use seed_peer::{Bridge, CellsConfig};

use crate::client::{Client, PATIENCE, View, new_id};
use crate::house::{counted, relay, seed_in_cells, url};

const CELL_SIZE: usize = 4;

fn cells(bridge: Bridge) -> CellsConfig {
    CellsConfig { cell_size: CELL_SIZE, bridge }
}

fn join(relay: &str) -> (PeerId, Client) {
    join_room(relay, &Room::graph_sync("my-app"))
}

fn join_room(relay: &str, room: &Room) -> (PeerId, Client) {
    join_as(relay, room, new_id())
}

fn join_as(relay: &str, room: &Room, id: PeerId) -> (PeerId, Client) {
    (id, Client::join_cells(relay, room, id, MemoryGraph::default(), CELL_SIZE))
}

/// An id that is in `cell` wherever there are `total` of them.
fn id_in(cell: CellIndex, total: u32) -> PeerId {
    std::iter::repeat_with(new_id).find(|id| HashedId::new(id).cell_among(total) == cell).unwrap()
}

/// The bridges that a client has elected, in a room of so many cells.
fn bridges(view: &View) -> Vec<PeerId> {
    let Some(topology) = &view.topology else { return Vec::new() };
    topology.roster().filter(|peer| topology.is_bridge(peer)).copied().collect()
}

/// Waits until all clients have the same view of who is there, with `ours` ids of the seed, and every link of it.
async fn settled(clients: &mut [(PeerId, Client)], ours: usize) {
    let present = clients.len() + ours;
    for (id, client) in clients {
        let is_settled = |view: &View| {
            view.topology.as_ref().is_some_and(|topology| {
                topology.roster().count() == present && topology.links(id).iter().all(|peer| view.linked.contains(peer))
            })
        };
        client.until("the same topology as the others", is_settled).await;
    }
}

/// Waits until a word of each reaches all others. Rosters may agree a moment before links and bridges do, and what an
/// application says meanwhile is lost to some: nobody can ask for it again.
async fn hear_each_other(clients: &mut [(PeerId, Client)]) {
    for round in 0.. {
        let words: Vec<String> =
            (0..clients.len()).map(|index| format!(r#"{{"settle":"{index} in {round}"}}"#)).collect();
        for ((_, client), word) in clients.iter().zip(&words) {
            client.mesh_send(word);
        }
        let all = clients.iter_mut().enumerate().map(|(index, (_, client))| {
            let words = &words;
            let heard = move |view: &View| {
                words.iter().enumerate().all(|(other, word)| other == index || view.application.contains(word))
            };
            Box::pin(client.changed(heard))
        });
        if tokio::time::timeout(Duration::from_secs(5), futures_util::future::join_all(all)).await.is_ok() {
            return;
        }
    }
}

/// What an application was told, those words aside.
fn told(view: &View) -> Vec<&String> {
    view.application.iter().filter(|word| !word.contains("settle")).collect()
}

/// Waits until nobody asks for anything any more: not the peers as they come, nor the seed when they have settled.
async fn quiet(clients: &mut [(PeerId, Client)]) {
    let silence = Duration::from_secs(8);
    loop {
        let any = clients.iter_mut().map(|(_, client)| {
            let heard = client.view().heard.len();
            Box::pin(client.changed(move |view| view.heard.len() > heard))
        });
        if tokio::time::timeout(silence, futures_util::future::select_all(any)).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn with_a_bridge_in_every_cell_a_burst_of_twelve_peers_relies_on_the_seed_alone() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::Every));
    let mut clients: Vec<(PeerId, Client)> = (0..12).map(|_| join(&url)).collect();
    // Three browsers to each cell, and one id of the seed.
    settled(&mut clients, 4).await;
    let theirs: Vec<PeerId> = clients.iter().map(|(id, _)| *id).collect();
    for (_, client) in &mut clients {
        let is_bridged = |view: &View| {
            let bridges = bridges(view);
            bridges.len() == 4 && bridges.iter().all(|bridge| !theirs.contains(bridge))
        };
        client.until("four bridges, none of them a browser", is_bridged).await;
    }
    counted(&seed, "homeport_seed_bridged_cells", "my-app", 4.0).await;
    counted(&seed, "homeport_seed_present_peers", "my-app", 12.0).await;
    hear_each_other(&mut clients).await;

    clients[0].1.write("put a {\"text\":\"over all cells\"}");
    clients[5].1.mesh_send(r#"{"hello":"everybody"}"#);
    clients[7].1.mesh_bytes(300_000);
    let pinged = theirs[11];
    clients[2].1.mesh_ping(pinged);
    for (index, (_, client)) in clients.iter_mut().enumerate() {
        client.until("the node", |view| view.graph.get("a").is_some()).await;
        let expected = usize::from(index != 5) + usize::from(index != 7);
        let view = client.until("messages of the application", |view| told(view).len() >= expected).await;
        assert_eq!(told(&view).len(), expected, "each once");
        assert!(index == 7 || view.application.contains(&"300000 bytes".to_owned()));
    }
    let view = clients[2].1.until("a pong", |view| !view.ponged.is_empty()).await;
    assert_eq!(view.ponged, [pinged]);

    // A late joiner, and everybody gone but it: the archive has what was written.
    let (_, mut late) = join(&url);
    late.until("the node", |view| view.graph.get("a").is_some()).await;
    for (_, client) in clients {
        client.vanish();
    }
    late.leave().await;
    seed.shutdown().await;
    let (_, mut alone) = join(&url);
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::Every));
    let view = alone.until("the node from the archive", |view| view.graph.get("a").is_some()).await;
    assert_eq!(view.graph.iter().count(), 1, "what was only said is not kept");
    alone.leave().await;
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn with_one_bridge_the_room_outlives_a_browser_that_was_another() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::One));
    let mut clients: Vec<(PeerId, Client)> = (0..12).map(|_| join(&url)).collect();
    settled(&mut clients, 1).await;
    counted(&seed, "homeport_seed_bridged_cells", "my-app", 1.0).await;
    let view = clients[0].1.view();
    let topology = view.topology.unwrap();
    assert_eq!(topology.total_cells(), 4);
    let theirs: Vec<PeerId> = clients.iter().map(|(id, _)| *id).collect();
    let elected = |peer: &&PeerId| topology.is_bridge(peer);
    let seeds: Vec<&PeerId> = topology.roster().filter(elected).filter(|peer| !theirs.contains(peer)).collect();
    assert_eq!(seeds.len(), 1, "the seed is elected in its cell");
    clients[3].1.write("put before 1");
    for (_, client) in &mut clients {
        client.until("the node", |view| view.graph.get("before").is_some()).await;
    }

    if let Some(index) = theirs.iter().position(|peer| topology.is_bridge(peer)) {
        // Says bye: its cell elects the next in line.
        clients.remove(index).1.leave().await;
    }
    settled(&mut clients, 1).await;
    clients[0].1.write("put after 1\nremove before");
    let (late_id, late) = join(&url);
    clients.push((late_id, late));
    for (_, client) in &mut clients {
        let view = client.until("what was written since", |view| view.graph.get("after").is_some()).await;
        client.until("what was removed since", |view| view.graph.get("before").is_none()).await;
        drop(view);
    }
    for (_, client) in clients {
        client.vanish();
    }
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn what_was_lost_while_cells_changed_reaches_everybody_once_they_have_settled() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    // No browser is a bridge, so that one that leaves makes no new links.
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::Every));
    let mut clients: Vec<(PeerId, Client)> = (0..9).map(|_| join(&url)).collect();
    settled(&mut clients, 3).await;
    clients[0].1.write("put before 1");
    for (_, client) in &mut clients {
        client.until("the node", |view| view.graph.get("before").is_some()).await;
    }
    quiet(&mut clients).await;
    clients[4].1.write_unheard("put lost 1");
    // Somebody goes: rosters are sealed anew, and no peer that is new asks for anything.
    clients.remove(7).1.leave().await;
    let questions = |view: &View| view.heard.iter().filter(|kind| **kind == "sync").count();
    let asked = clients.iter_mut().map(|(_, client)| {
        let before = questions(&client.view());
        Box::pin(client.changed(move |view| questions(view) > before))
    });
    let asked = tokio::time::timeout(PATIENCE, futures_util::future::select_all(asked));
    asked.await.expect("the seed asks what it has missed");
    for (_, client) in &mut clients {
        client.until("what was lost", |view| view.graph.get("lost").is_some()).await;
    }
    for (_, client) in clients {
        client.vanish();
    }
    counted(&seed, "homeport_seed_nodes", "my-app", 2.0).await;
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn who_takes_itself_to_be_in_another_cell_lacks_nothing_once_it_has_said_so_or_is_back() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::Every));
    // Three in each of two cells; the seed has an id in each.
    let room = Room::graph_sync("my-app");
    let mut clients: Vec<(PeerId, Client)> =
        (0..6).map(|index| join_as(&url, &room, id_in(CellIndex(index % 2), 2))).collect();
    settled(&mut clients, 2).await;
    quiet(&mut clients).await;
    let [(id, strayed), (_, writer), ..] = clients.as_mut_slice() else { unreachable!() };
    assert_eq!(writer.view().topology.unwrap().cell_of(id), Some(CellIndex(0)));

    strayed.stray(Some(CellIndex(1))).await;
    writer.write("put dropped 1");
    counted(&seed, "homeport_seed_nodes", "my-app", 1.0).await;
    assert!(strayed.view().graph.get("dropped").is_none(), "it came on the channel of a cell that is not its own");
    strayed.mesh_send(r#"{"here":1}"#);
    strayed.until("what it has dropped", |view| view.graph.get("dropped").is_some()).await;
    // What it has said is minded, and it need not say so when it is back.
    writer.write("put elsewhere 1");
    strayed.until("the node", |view| view.graph.get("elsewhere").is_some()).await;
    strayed.stray(None).await;
    writer.write("put home 1");
    strayed.until("the node", |view| view.graph.get("home").is_some()).await;
    for (_, client) in clients {
        client.vanish();
    }
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn a_peer_that_lies_and_one_that_stutters_cost_nobody_a_message() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::Every));
    let mut clients: Vec<(PeerId, Client)> = (0..6).map(|_| join(&url)).collect();
    settled(&mut clients, 2).await;
    counted(&seed, "homeport_seed_bridged_cells", "my-app", 2.0).await;
    hear_each_other(&mut clients).await;
    clients[0].1.lie();
    clients[1].1.stutter();
    for round in 0..5 {
        for (index, (_, client)) in clients.iter().enumerate() {
            client.write(&format!("put n{index}-{round} {round}"));
            client.mesh_send(&format!("{{\"from\":{index},\"round\":{round}}}"));
        }
    }
    for (index, (_, client)) in clients.iter_mut().enumerate() {
        let view = client.until("every node", |view| view.graph.iter().count() == 30).await;
        drop(view);
        let view = client.until("every message", |view| told(view).len() >= 25).await;
        let mut said = told(&view);
        said.sort();
        said.dedup();
        assert_eq!((said.len(), told(&view).len()), (25, 25), "peer {index} heard each once");
    }
    counted(&seed, "homeport_seed_operations_total", "applied", 30.0).await;
    for (_, client) in clients {
        client.vanish();
    }
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn the_application_s_room_is_bridged_too() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::Every));
    let room = Room::app_sync("my-app");
    let mut clients: Vec<(PeerId, Client)> = (0..6).map(|_| join_room(&url, &room)).collect();
    settled(&mut clients, 2).await;
    hear_each_other(&mut clients).await;
    clients[0].1.mesh_send(r#""in the application's room""#);
    clients[1].1.mesh_bytes(100_000);
    for (_, client) in clients.iter_mut().skip(2) {
        let view = client.until("both messages", |view| told(view).len() == 2).await;
        assert!(view.application.contains(&"100000 bytes".to_owned()));
    }
    for (_, client) in clients {
        client.leave().await;
    }
    seed.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn clients_that_disagree_with_the_room_on_cells_are_served_and_told_of() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let seed = seed_in_cells(&url, data.path(), cells(Bridge::One));
    let mut full_mesh = Client::join(&url, "my-app", "", new_id(), MemoryGraph::default());
    full_mesh.until("a link", |view| view.linked.len() == 1).await;
    full_mesh.write("put a 1");
    counted(&seed, "homeport_seed_operations_total", "applied", 1.0).await;
    // A newcomer may take its time to seal its roster: only then is it clear that it has none.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let mut number = 0;
    while tokio::time::Instant::now() < deadline && mismatches(&seed) < 1.0 {
        number += 1;
        full_mesh.write(&format!("put b {number}"));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    counted(&seed, "homeport_seed_cell_mismatches_total", "", 1.0).await;
    full_mesh.leave().await;
    let mut newcomer = Client::join(&url, "my-app", "", new_id(), MemoryGraph::default());
    newcomer.until("what the other wrote", |view| view.graph.get("a").is_some()).await;
    newcomer.leave().await;
    seed.shutdown().await;

    let data = tempfile::tempdir().unwrap();
    let seed = crate::house::seed(&[&url], data.path());
    let (_, mut in_cells) = join(&url);
    in_cells.until("a link, and a roster", |view| !view.linked.is_empty() && view.topology.is_some()).await;
    in_cells.write("put a 1");
    counted(&seed, "homeport_seed_cell_mismatches_total", "", 1.0).await;
    in_cells.leave().await;
    seed.shutdown().await;
    relay.shutdown().await;
}

fn mismatches(seed: &seed_peer::Server) -> f64 {
    let families = seed.telemetry().registry.gather();
    let family = families.iter().find(|family| family.name() == "homeport_seed_cell_mismatches_total");
    family.map_or(0.0, |family| family.get_metric()[0].get_counter().get_value())
}
