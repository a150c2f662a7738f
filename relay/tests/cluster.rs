//! Relays side by side over servers of NATS, as on several machines.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "support/nats.rs"]
mod nats;
mod support;

use std::path::Path;
use std::time::Duration;

use nats::Nats;
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use relay::{Config, Server, StoreConfig};
use serde_json::{Value, json};
use service::{Cluster, ClusterConfig, ClusterLogin, State};
use support::{Client, PATIENCE, event};

const KIND: u16 = 22_718;

async fn relay(nats: &Nats) -> (Server, Cluster) {
    relay_that_stores(nats, None).await
}

async fn relay_that_stores(nats: &Nats, folder: Option<&Path>) -> (Server, Cluster) {
    let config = ClusterConfig {
        servers: vec![format!("nats://{}", nats.address()).parse().unwrap()],
        name: "test".into(),
        login: ClusterLogin::Anonymous,
        ca: None,
        replicas: 1,
    };
    let cluster = Cluster::connect(config).await.unwrap();
    let store = folder.map(|folder| StoreConfig { folder: folder.to_owned(), max_bytes: 64 << 20 });
    let config = Config { store, cluster: Some(cluster.clone()), ..Config::at("127.0.0.1:0".parse().unwrap()) };
    let server = Server::bind(config).await.unwrap();
    until("NATS is connected", || cluster.is_connected()).await;
    (server, cluster)
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what}: not in time"));
}

fn metric(server: &Server, name: &str, label: &str) -> f64 {
    let families = server.telemetry().registry.gather();
    let metrics = families.iter().filter(|family| family.name() == name).flat_map(|family| family.get_metric());
    let labelled = metrics.filter(|metric| label.is_empty() || metric.get_label().iter().any(|it| it.value() == label));
    labelled.map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value()).sum()
}

/// Tries until an event crosses: the servers tell each other what is asked for, and nothing says when they have.
async fn until_heard(author: &mut Client, reader: &mut Client, topic: &str) {
    for attempt in 0.. {
        assert!(attempt < 200, "nothing crosses");
        author.say(json!(["EVENT", event(KIND, topic, &format!("{attempt}"))])).await;
        author.hear().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        if !reader.hear_all().await.is_empty() {
            return;
        }
    }
}

#[tokio::test]
async fn an_event_reaches_who_asked_for_it_on_another_machine_once_and_no_other_machine() {
    let first = Nats::start(&[]);
    let second = Nats::start(&[&first]);
    let third = Nats::start(&[&first]);
    let ((here, _), (there, _), (elsewhere, _)) = (relay(&first).await, relay(&second).await, relay(&third).await);
    let (mut author, mut near, mut far, mut stranger) = (
        Client::connect(&here).await,
        Client::connect(&here).await,
        Client::connect(&there).await,
        Client::connect(&elsewhere).await,
    );
    let filter = json!({ "kinds": [KIND], "#x": ["room"] });
    near.subscribe("near", filter.clone()).await;
    far.subscribe("far", filter.clone()).await;
    // Asks for the same twice: by topic, and for all of the kind.
    far.subscribe("wide", json!({ "kinds": [KIND] })).await;
    stranger.subscribe("other", json!({ "kinds": [KIND], "#x": ["another room"] })).await;
    until_heard(&mut author, &mut far, "room").await;
    near.hear_all().await;

    let said = event(KIND, "room", "hello");
    author.say(json!(["EVENT", said])).await;
    assert_eq!(author.hear().await, json!(["OK", said["id"], true, ""]));
    let mut heard = [far.hear().await, far.hear().await];
    heard.sort_by_key(|message| message[1].to_string());
    assert_eq!(heard, [json!(["EVENT", "far", said]), json!(["EVENT", "wide", said])]);
    assert_eq!(near.hear_all().await, [json!(["EVENT", "near", said])]);
    assert!(far.hear_all().await.is_empty(), "once for each subscription");
    // The same event on the other machine is known there.
    far.say(json!(["EVENT", said])).await;
    assert!(far.hear().await[3].as_str().unwrap().starts_with("duplicate:"));
    assert!(stranger.hear_all().await.is_empty());
    assert_eq!(
        metric(&elsewhere, "homeport_relay_cluster_messages_total", "in"),
        0.0,
        "nothing is carried to where nobody asked"
    );
    assert_eq!(metric(&there, "homeport_relay_cluster_messages_total", "out"), 0.0, "what was heard is not said again");
    for server in [here, there, elsewhere] {
        server.shutdown().await;
    }
}

#[tokio::test]
async fn who_is_present_elsewhere_is_told_to_newcomers_and_who_leaves_is_not() {
    let nats = Nats::start(&[]);
    let ((here, _), (there, _)) = (relay(&nats).await, relay(&nats).await);
    let (mut peer, mut listener) = (Client::connect(&here).await, Client::connect(&there).await);
    let filter = json!({ "kinds": [KIND], "#x": ["room"] });
    listener.subscribe("listener", filter.clone()).await;
    until_heard(&mut peer, &mut listener, "room").await;
    let announce = event(KIND, "room", r#"{"peerId":"abc"}"#);
    peer.say(json!(["EVENT", announce])).await;
    assert_eq!(listener.hear().await, json!(["EVENT", "listener", announce]));
    let mut newcomer = Client::connect(&there).await;
    newcomer.subscribe("newcomer", filter.clone()).await;
    assert_eq!(newcomer.hear().await, json!(["EVENT", "newcomer", announce]), "as if it were present here");
    drop(peer);
    until("it is gone here", || metric(&here, "homeport_relay_present_peers", "") == 0.0).await;
    until("it is gone there", || metric(&there, "homeport_relay_present_peers", "") == 0.0).await;
    let mut late = Client::connect(&there).await;
    late.subscribe("late", filter).await;
    assert!(late.hear_all().await.is_empty());
    for server in [here, there] {
        server.shutdown().await;
    }
}

#[tokio::test]
async fn without_nats_a_relay_goes_on_alone_and_is_found_again() {
    let mut nats = Nats::start(&[]);
    let ((here, cluster), (there, _)) = (relay(&nats).await, relay(&nats).await);
    let (mut author, mut near, mut far) =
        (Client::connect(&here).await, Client::connect(&here).await, Client::connect(&there).await);
    let filter = json!({ "kinds": [KIND], "#x": ["room"] });
    near.subscribe("near", filter.clone()).await;
    far.subscribe("far", filter.clone()).await;
    until_heard(&mut author, &mut far, "room").await;
    near.hear_all().await;

    nats.kill();
    let health = cluster.telemetry().health.clone();
    until("health says so", || matches!(health.parts().get("cluster"), Some(State::Degraded(_)))).await;
    let said = event(KIND, "room", "alone");
    author.say(json!(["EVENT", said])).await;
    assert_eq!(author.hear().await, json!(["OK", said["id"], true, ""]));
    assert_eq!(near.hear().await, json!(["EVENT", "near", said]));
    assert_eq!(metric(&here, "homeport_relay_cluster_drops_total", "disconnected"), 1.0);
    // What is asked for meanwhile is asked for when NATS is back.
    far.subscribe("meanwhile", json!({ "kinds": [KIND], "#x": ["another"] })).await;

    nats.resume();
    until("NATS is back", || health.parts().get("cluster") == Some(&State::Ok)).await;
    until_heard(&mut author, &mut far, "room").await;
    until_heard(&mut author, &mut far, "another").await;
    for server in [here, there] {
        server.shutdown().await;
    }
}

#[tokio::test]
async fn the_answer_to_a_dial_is_seen_from_where_it_was_made() {
    let nats = Nats::start(&[]);
    let ((here, _), (there, _)) = (relay(&nats).await, relay(&nats).await);
    let (mut dialling, mut dialled) = (Client::connect(&here).await, Client::connect(&there).await);
    dialling.subscribe("own", json!({ "kinds": [KIND], "#x": ["dialling"] })).await;
    dialled.subscribe("own", json!({ "kinds": [KIND], "#x": ["dialled"] })).await;
    until_heard(&mut dialling, &mut dialled, "dialled").await;
    until_heard(&mut dialled, &mut dialling, "dialling").await;
    let signal = |topic: &str, content: Value| {
        let builder = EventBuilder::new(Kind::from(KIND), content.to_string());
        let event = builder.tag(Tag::parse(["x", topic]).unwrap()).finalize(&Keys::generate()).unwrap();
        json!(["EVENT", event])
    };
    dialling.say(signal("dialled", json!({ "peerId": "a", "offer": { "type": "offer", "sdp": "x" } }))).await;
    dialled.hear().await;
    dialled.say(signal("dialling", json!({ "peerId": "b", "answer": { "type": "answer", "sdp": "x" } }))).await;
    assert_eq!(dialling.hear().await[0], "OK");
    assert_eq!(dialling.hear().await[0], "EVENT");
    let answers = |server: &Server| {
        let families = server.telemetry().registry.gather();
        let family = families.iter().find(|family| family.name() == "homeport_relay_answer_seconds").unwrap();
        family.get_metric()[0].get_histogram().get_sample_count()
    };
    assert_eq!((answers(&here), answers(&there)), (1, 0));
    for server in [here, there] {
        server.shutdown().await;
    }
}

async fn stored(client: &mut Client) -> Vec<String> {
    client.say(json!(["REQ", "stored", { "kinds": [1, 30_000] }])).await;
    let mut contents = Vec::new();
    loop {
        let message = client.hear().await;
        match message[0].as_str() {
            Some("EVENT") if message[1] == "stored" => {
                contents.push(message[2]["content"].as_str().unwrap().to_owned());
            }
            Some("EOSE") => break,
            other => panic!("{other:?}"),
        }
    }
    client.say(json!(["CLOSE", "stored"])).await;
    contents.sort();
    contents
}

async fn until_stored(client: &mut Client, expected: &[&str]) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while stored(client).await != expected {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "{expected:?} are not all there");
}

async fn publish(client: &mut Client, event: &Value) {
    client.say(json!(["EVENT", event])).await;
    assert_eq!(client.hear().await, json!(["OK", event["id"], true, ""]));
}

#[tokio::test]
async fn stored_events_reach_every_relay_also_those_that_were_away() {
    let mut nats = Nats::with_streams();
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (here, _) = relay_that_stores(&nats, Some(folders[0].path())).await;
    let (there, _) = relay_that_stores(&nats, Some(folders[1].path())).await;
    let (mut author, mut reader) = (Client::connect(&here).await, Client::connect(&there).await);
    let keys = Keys::generate();
    let replaceable = |at: u64, content: &str| {
        let builder = EventBuilder::new(Kind::from(30_000), content).tag(Tag::parse(["d", "same"]).unwrap());
        let event = builder.custom_created_at(at.into()).finalize(&keys).unwrap();
        serde_json::to_value(event).unwrap()
    };
    reader.subscribe("live", json!({ "kinds": [1] })).await;
    let first = event(1, "topic", "first");
    publish(&mut author, &first).await;
    assert_eq!(reader.hear().await, json!(["EVENT", "live", first]), "who listens hears it");
    reader.say(json!(["CLOSE", "live"])).await;
    publish(&mut author, &replaceable(1_000, "old")).await;
    publish(&mut author, &replaceable(2_000, "new")).await;
    until_stored(&mut reader, &["first", "new"]).await;

    // While NATS is away, both take events, and are started again.
    nats.kill();
    publish(&mut author, &event(1, "topic", "from here")).await;
    publish(&mut reader, &event(1, "topic", "from there")).await;
    there.shutdown().await;
    here.shutdown().await;
    nats.resume();
    let (here, _) = relay_that_stores(&nats, Some(folders[0].path())).await;
    let (there, _) = relay_that_stores(&nats, Some(folders[1].path())).await;
    let (late, _) = relay_that_stores(&nats, Some(folders[2].path())).await;
    let all = ["first", "from here", "from there", "new"];
    for server in [&here, &there, &late] {
        until_stored(&mut Client::connect(server).await, &all).await;
    }
    until("nothing waits", || {
        metric(&here, "homeport_relay_cluster_waiting_bytes", "")
            + metric(&there, "homeport_relay_cluster_waiting_bytes", "")
            == 0.0
    })
    .await;

    // What an author deletes is gone everywhere.
    let mut author = Client::connect(&late).await;
    let deleted = EventBuilder::new(Kind::from(5), "")
        .tag(Tag::parse(["a", &format!("30000:{}:same", keys.public_key())]).unwrap())
        .finalize(&keys)
        .unwrap();
    publish(&mut author, &serde_json::to_value(deleted).unwrap()).await;
    for server in [&here, &there, &late] {
        until_stored(&mut Client::connect(server).await, &["first", "from here", "from there"]).await;
    }
    for server in [here, there, late] {
        server.shutdown().await;
    }
}
