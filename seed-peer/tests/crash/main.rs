//! A seed that is killed while peers write. A test of its own, since nothing else should keep the machine busy.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../seed/client.rs"]
mod client;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../seed/house.rs"]
mod house;

use std::collections::HashSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::Rng as _;
use seed_peer::Server;

use house::{config, join, relay, url};

/// How often the seed is killed.
const KILLS: usize = 50;

const DATA: &str = "HOMEPORT_TEST_SEED_DATA";
const RELAY: &str = "HOMEPORT_TEST_SEED_RELAY";

/// The seed that [`whatever_a_seed_that_is_killed_had_served_is_there_after_it`] starts and kills.
#[tokio::test]
#[ignore = "runs in a process of its own, which another test starts"]
async fn a_seed_of_its_own() {
    let (data, relay) = (std::env::var(DATA).unwrap(), std::env::var(RELAY).unwrap());
    let room = seed_peer::RoomConfig::named("my-app");
    let mut seed = Server::bind(config(&[&relay], Path::new(&data), vec![room])).unwrap();
    seed.ended().await;
}

fn start(data: &Path, relay: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["a_seed_of_its_own", "--exact", "--include-ignored", "--quiet"])
        .env(DATA, data)
        .env(RELAY, relay)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// The ids that the archive holds, opened as a seed would.
fn archived(data: &Path) -> HashSet<String> {
    let file = rusqlite::Connection::open(data.join("archive.sqlite")).unwrap();
    let verdict: String = file.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
    let mut select = file.prepare("SELECT json_extract(operation, '$.id') FROM log").unwrap();
    select.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_seed_that_is_killed_had_served_is_there_after_it() {
    let relay = relay().await;
    let url = url(&relay);
    let data = tempfile::tempdir().unwrap();
    let mut due = HashSet::new();
    for kill in 0..KILLS {
        let mut seed = start(data.path(), &url);
        let mut peer = join(&url);
        peer.until("a link", |view| view.linked.len() == 1).await;
        let acknowledged = peer.pump();
        let pause = rand::rng().random_range(300..700);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        seed.kill().unwrap();
        seed.wait().unwrap();
        due.extend(acknowledged.lock().unwrap().iter().cloned());
        peer.vanish();
        let held = archived(data.path());
        let missing: Vec<&String> = due.difference(&held).collect();
        assert!(missing.is_empty(), "kill {kill} lost {missing:?} of {}", due.len());
    }
    println!("{KILLS} kills: all {} operations that the seed had served are there", due.len());
    assert!(due.len() > KILLS);
    relay.shutdown().await;
}
