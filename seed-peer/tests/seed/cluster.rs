//! Seeds side by side, over a real server of NATS.

use std::path::Path;
use std::time::Duration;

use genosdb::Node;
use rusqlite::{Connection, OpenFlags};
use seed_peer::{Config, RoomConfig, RoomError, RoomStatus, Server, SharedRooms};
use service::{Cluster, ClusterConfig, ClusterLogin};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::client::{Client, PATIENCE};
use crate::house::{config, counted, join, nodes, relay, url};
use crate::nats::Nats;

const NAMES: [&str; 3] = ["one", "two", "three"];

async fn cluster(nats: &Nats, name: &str) -> Cluster {
    let config = ClusterConfig {
        servers: vec![format!("nats://{}", nats.address()).parse().unwrap()],
        name: name.into(),
        login: ClusterLogin::Anonymous,
        ca: None,
        replicas: 1,
    };
    Cluster::connect(config).await.unwrap()
}

async fn seed_called(name: &str, nats: &Nats, relay: &str, data: &Path, rooms: Vec<RoomConfig>) -> Server {
    let mut shared = SharedRooms::over(cluster(nats, name).await);
    shared.snapshot_messages = 20;
    Server::bind(Config { shared: Some(shared), ..config(&[relay], data, rooms) }).unwrap()
}

fn rooms(count: usize) -> Vec<RoomConfig> {
    let others = (1..count).map(|number| RoomConfig::named(&format!("room {number}")));
    std::iter::once(RoomConfig::named("my-app")).chain(others).collect()
}

async fn status(seed: &Server, name: &str) -> RoomStatus {
    seed.rooms().list().await.unwrap().into_iter().find(|room| room.name == name).unwrap()
}

/// Waits until a room has a holder that `is_right`, as this seed sees it, and says who.
async fn until_held(seed: &Server, room: &str, is_right: impl Fn(&str) -> bool) -> String {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match status(seed, room).await.held_by {
            Some(holder) if is_right(&holder) => return holder,
            other => {
                let health = seed.telemetry().health.parts();
                assert!(tokio::time::Instant::now() < deadline, "held by {other:?}: {health:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Which of all instances is to hold a room once they have settled (rendezvous hashing), reckoned anew.
fn rightful(room: &str) -> &'static str {
    let room: String = Sha256::digest(room)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    NAMES.into_iter().max_by_key(|name| Sha256::digest(format!("{name}\0{room}"))).unwrap()
}

/// What is in an archive, whoever has it open.
fn archived(data: &TempDir, room: &str) -> (u64, Vec<String>) {
    let file = data.path().join("archive.sqlite");
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let operations = connection
        .query_row("SELECT seq FROM room WHERE name = ?", [room], |row| row.get::<_, i64>(0))
        .map_or(0, |seq| u64::try_from(seq).unwrap());
    let mut select = connection
        .prepare("SELECT node.id || ' ' || value || ' ' || edges FROM node JOIN room ON room.id = node.room WHERE room.name = ? ORDER BY node.id")
        .unwrap();
    let nodes = select.query_map([room], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    (operations, nodes)
}

async fn until_archived(data: &TempDir, room: &str, operations: u64) -> Vec<String> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let (found, nodes) = archived(data, room);
        if found >= operations {
            return nodes;
        }
        assert!(tokio::time::Instant::now() < deadline, "{found} of {operations} operations");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn write(peer: &Client, seed: &Server, from: u64, count: u64) {
    for number in from..from + count {
        peer.write(&format!("put node-{} {number}", number % 7));
        counted(seed, "homeport_seed_logged_operations", "my-app", (number + 1) as f64).await;
    }
}

fn values(view: &[Node]) -> Vec<(String, String)> {
    view.iter()
        .map(|node| (node.id.to_text(), node.value.as_ref().map_or(String::new(), |value| value.as_str().to_owned())))
        .collect()
}

#[tokio::test]
async fn a_room_is_held_by_one_followed_by_others_and_taken_over_with_all_that_counts() {
    let (nats, relay) = (Nats::with_streams(), relay().await);
    let data = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let first = seed_called("one", &nats, &url(&relay), data[0].path(), rooms(1)).await;
    assert_eq!(until_held(&first, "my-app", |_| true).await, "one");
    let mut peer = join(&url(&relay));
    peer.until("a link", |view| view.linked.len() == 1).await;
    write(&peer, &first, 0, 30).await;

    // Another comes, and has what was written before and what is written now.
    let second = seed_called("two", &nats, &url(&relay), data[1].path(), rooms(1)).await;
    until_archived(&data[1], "my-app", 30).await;
    write(&peer, &first, 30, 5).await;
    let followed = until_archived(&data[1], "my-app", 35).await;
    assert_eq!(archived(&data[0], "my-app"), (35, followed));
    let holder = until_held(&second, "my-app", |_| true).await;
    let (holding, following) = if holder == "one" { (&first, &second) } else { (&second, &first) };
    assert!(!status(holding, "my-app").await.elsewhere && status(following, "my-app").await.elsewhere);
    assert_eq!(following.rooms().edit("my-app", Vec::new()).await, Err(RoomError::Elsewhere));

    // It is moved, and the peer is linked with the other.
    let other = if holder == "one" { "two" } else { "one" };
    holding.rooms().move_to("my-app", Some(other)).await.unwrap();
    until_held(holding, "my-app", |holder| holder == other).await;
    counted(following, "homeport_seed_links", "my-app", 1.0).await;
    write(&peer, following, 35, 5).await;
    assert!(matches!(holding.rooms().move_to("my-app", Some("nobody")).await, Err(RoomError::NotMoved(_))));

    // Who holds it leaves: the other has it at once.
    let (leaving, staying, stays) = if other == "one" { (first, second, 1) } else { (second, first, 0) };
    leaving.shutdown().await;
    until_held(&staying, "my-app", |holder| holder != other).await;
    counted(&staying, "homeport_seed_links", "my-app", 1.0).await;
    write(&peer, &staying, 40, 5).await;
    let written = values(&nodes(&peer.view()));
    peer.leave().await;
    let mut newcomer = join(&url(&relay));
    let view = newcomer.until("the state", |view| view.graph.iter().count() == 7).await;
    assert_eq!(values(&nodes(&view)), written);

    // A machine that is new long after the stream was shortened.
    let third = seed_called("three", &nats, &url(&relay), data[2].path(), rooms(1)).await;
    let fetched = until_archived(&data[2], "my-app", 45).await;
    assert_eq!((45, fetched), archived(&data[stays], "my-app"));
    newcomer.vanish();
    third.shutdown().await;
    staying.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn rooms_are_spread_and_taken_from_who_dies() {
    let (nats, relay) = (Nats::with_streams(), relay().await);
    let data = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let mut seeds = Vec::new();
    for (name, data) in NAMES.iter().zip(&data) {
        seeds.push(seed_called(name, &nats, &url(&relay), data.path(), rooms(9)).await);
    }
    let holders = async |seed: &Server| -> Vec<Option<String>> {
        seed.rooms().list().await.unwrap().into_iter().map(|room| room.held_by).collect()
    };
    // Until the last has moved: what is under way would be moved on after the death as well.
    let listed = seeds[0].rooms().list().await.unwrap();
    let spread: Vec<_> = listed.into_iter().map(|room| Some(rightful(&room.name).to_owned())).collect();
    assert!(NAMES.iter().all(|name| spread.contains(&Some((*name).to_owned()))), "each is to hold some: {spread:?}");
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let held = holders(&seeds[0]).await;
        if held == spread {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{held:?}, not {spread:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Its machine dies: nothing is given back.
    let dead = seeds.remove(0);
    dead.kill();
    let start = tokio::time::Instant::now();
    loop {
        let held = holders(&seeds[0]).await;
        if held.iter().all(|holder| holder.as_deref().is_some_and(|holder| holder != "one")) {
            let kept = held.iter().zip(&spread).filter(|(now, before)| now == before).count();
            let others = spread.iter().filter(|holder| holder.as_deref() != Some("one")).count();
            assert_eq!(kept, others, "nobody else's are moved");
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{held:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("rooms of a machine that died were taken after {:?}", start.elapsed());
    for seed in seeds {
        seed.shutdown().await;
    }
    relay.shutdown().await;
}

#[tokio::test]
async fn while_nats_is_away_nothing_counts_and_nothing_is_lost() {
    let (mut nats, relay) = (Nats::with_streams(), relay().await);
    let data = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let seed = seed_called("one", &nats, &url(&relay), data[0].path(), rooms(1)).await;
    until_held(&seed, "my-app", |_| true).await;
    let mut peer = join(&url(&relay));
    peer.until("a link", |view| view.linked.len() == 1).await;
    write(&peer, &seed, 0, 3).await;
    nats.kill();
    for number in 3..20 {
        peer.write(&format!("put node-{} {number}", number % 7));
    }
    counted(&seed, "homeport_seed_archive_failures_total", "", 1.0).await;
    assert_eq!(archived(&data[0], "my-app").0, 3, "the archive is not ahead of the stream");
    nats.resume();
    counted(&seed, "homeport_seed_logged_operations", "my-app", 10.0).await;
    let written = values(&nodes(&peer.view()));
    let second = seed_called("two", &nats, &url(&relay), data[1].path(), rooms(1)).await;
    let operations = archived(&data[0], "my-app").0;
    until_archived(&data[1], "my-app", operations).await;
    peer.leave().await;
    let mut newcomer = join(&url(&relay));
    let view = newcomer.until("the state", |view| view.graph.iter().count() == 7).await;
    assert_eq!(values(&nodes(&view)), written);
    newcomer.vanish();
    seed.shutdown().await;
    second.shutdown().await;
    relay.shutdown().await;
}

#[tokio::test]
async fn one_machine_becomes_a_cluster_and_a_cluster_one_machine() {
    let (nats, relay) = (Nats::with_streams(), relay().await);
    let data = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let alone = Server::bind(config(&[&url(&relay)], data[0].path(), rooms(1))).unwrap();
    let mut peer = join(&url(&relay));
    peer.until("a link", |view| view.linked.len() == 1).await;
    write(&peer, &alone, 0, 12).await;
    peer.leave().await;
    alone.shutdown().await;

    let cluster = cluster(&nats, "one").await;
    let founded = seed_peer::found_rooms(&cluster, data[0].path(), |_| {}).await.unwrap();
    assert_eq!(founded.iter().map(|one| (one.room.as_str(), one.operations)).collect::<Vec<_>>(), [("my-app", 12)]);
    let again = seed_peer::found_rooms(&cluster, data[0].path(), |_| {}).await;
    assert!(again.unwrap_err().to_string().contains("already"), "a room is not begun twice");

    // Another machine has a history of its own, which is not the cluster's: it stands aside.
    let foreign = Server::bind(config(&[&url(&relay)], data[1].path(), rooms(1))).unwrap();
    let mut peer = join(&url(&relay));
    peer.until("a link", |view| view.linked.len() == 1).await;
    peer.write("put stranger 1");
    counted(&foreign, "homeport_seed_logged_operations", "my-app", 1.0).await;
    peer.leave().await;
    foreign.shutdown().await;
    let seed = seed_called("two", &nats, &url(&relay), data[1].path(), rooms(1)).await;
    until_held(&seed, "my-app", |_| true).await;
    let taken = until_archived(&data[1], "my-app", 12).await;
    assert_eq!((12, taken), archived(&data[0], "my-app"));
    let connection = Connection::open(data[1].path().join("archive.sqlite")).unwrap();
    let aside: String =
        connection.query_row("SELECT name FROM room WHERE name LIKE 'my-app (%'", [], |row| row.get(0)).unwrap();
    drop(connection);
    assert_eq!(archived(&data[1], &aside).1.len(), 1);
    let mut peer = join(&url(&relay));
    peer.until("the state", |view| view.graph.iter().count() == 7).await;
    write(&peer, &seed, 12, 30).await;
    peer.leave().await;
    seed.shutdown().await;

    let fetched = seed_peer::fetch_rooms(&cluster, data[2].path(), |_| {}).await.unwrap();
    assert_eq!(fetched.iter().map(|one| (one.room.as_str(), one.operations)).collect::<Vec<_>>(), [("my-app", 42)]);
    assert_eq!(archived(&data[2], "my-app"), archived(&data[1], "my-app"));
    // And alone again.
    let alone = Server::bind(config(&[&url(&relay)], data[2].path(), rooms(1))).unwrap();
    let mut newcomer = join(&url(&relay));
    newcomer.until("the state", |view| view.graph.iter().count() == 7).await;
    newcomer.vanish();
    alone.shutdown().await;
    relay.shutdown().await;
}
