//! The relay over real sockets, with events made by an independent implementation of Nostr.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::time::Duration;

use futures_util::SinkExt as _;
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag, Timestamp};
use relay::{Admission, Config, Limits, Rates, Server, StoreConfig};
use serde_json::{Value, json};
use support::{Client, PATIENCE, event};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};

async fn start(limits: Limits) -> Server {
    start_with(Config { limits, ..config() }).await
}

fn config() -> Config {
    Config::at("127.0.0.1:0".parse().unwrap())
}

async fn start_with(config: Config) -> Server {
    Server::bind(config).await.unwrap()
}

#[tokio::test]
async fn an_ephemeral_event_reaches_who_asked_for_it_and_nobody_else() {
    let server = start(Limits::default()).await;
    let (mut near, mut far, mut author) =
        (Client::connect(&server).await, Client::connect(&server).await, Client::connect(&server).await);
    near.subscribe("near", json!({ "kinds": [22_718], "#x": ["topic"] })).await;
    far.subscribe("far", json!({ "kinds": [22_718], "#x": ["elsewhere"] })).await;

    let event = event(22_718, "topic", "hello \u{1} é 😀");
    author.say(json!(["EVENT", event])).await;
    assert_eq!(author.hear().await, json!(["OK", event["id"], true, ""]));
    assert_eq!(near.hear().await, json!(["EVENT", "near", event]));
    // Nothing is stored: who asks later gets nothing.
    assert!(far.hear_all().await.is_empty());
    far.subscribe("late", json!({ "kinds": [22_718], "#x": ["topic"] })).await;
    assert!(far.hear_all().await.is_empty());
    server.shutdown().await;
}

#[tokio::test]
async fn the_author_is_told_when_nobody_listens_and_when_it_repeats_itself() {
    let server = start(Limits::default()).await;
    let (mut client, mut author) = (Client::connect(&server).await, Client::connect(&server).await);
    let unheard = event(20_001, "topic", "unheard");
    author.say(json!(["EVENT", unheard])).await;
    let answer = author.hear().await;
    assert!(answer[2] == true && answer[3].as_str().unwrap().starts_with("mute:"), "{answer}");
    client.subscribe("s", json!({ "#x": ["topic"] })).await;
    author.say(json!(["EVENT", unheard])).await;
    let answer = author.hear().await;
    assert!(answer[2] == true && answer[3].as_str().unwrap().starts_with("duplicate:"), "{answer}");
    assert!(client.hear_all().await.is_empty());
    server.shutdown().await;
}

#[tokio::test]
async fn a_new_subscriber_hears_at_once_of_who_is_present_and_of_nobody_who_left() {
    let server = start(Limits::default()).await;
    let mut peers = Vec::new();
    for number in 0..4 {
        let mut peer = Client::connect(&server).await;
        let announce = event(20_001, "topic", &format!(r#"{{"peerId":"peer{number}"}}"#));
        peer.say(json!(["EVENT", announce])).await;
        assert_eq!(peer.hear().await[2], true);
        peers.push((peer, announce));
    }
    // One says bye, under the key that it announced itself with; one just goes.
    let keys = Keys::generate();
    let signed = |content: &str| {
        let tag = Tag::parse(["x", "topic"]).unwrap();
        EventBuilder::new(Kind::from(20_001), content).tag(tag).finalize(&keys).unwrap()
    };
    let (leaver, _) = &mut peers[0];
    for content in [r#"{"peerId":"leaver"}"#, r#"{"peerId":"leaver","bye":1}"#] {
        leaver.say(json!(["EVENT", signed(content)])).await;
        assert_eq!(leaver.hear().await[2], true);
    }
    let (mut gone, _) = peers.remove(1);
    gone.0.close(None).await.unwrap();
    while let Some(Ok(_)) = gone.frame().await {}

    let mut expected: Vec<String> = peers.iter().map(|(_, event)| event["id"].to_string()).collect();
    expected.sort();
    // The relay may take a moment to see that a connection is gone.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let mut newcomer = Client::connect(&server).await;
        newcomer.subscribe("late", json!({ "kinds": [20_001], "#x": ["topic"] })).await;
        let heard = newcomer.hear_all().await;
        let mut ids: Vec<String> = heard.iter().map(|message| message[2]["id"].to_string()).collect();
        ids.sort();
        if ids == expected {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{ids:?} is not {expected:?}");
    }
    server.shutdown().await;
}

#[tokio::test]
async fn a_subscription_is_replaced_under_its_id_and_ends_when_closed() {
    let server = start(Limits::default()).await;
    let (mut client, mut author) = (Client::connect(&server).await, Client::connect(&server).await);
    let id = "s".repeat(64);
    client.subscribe(&id, json!({ "#x": ["first"] })).await;
    client.subscribe(&id, json!({ "#x": ["second"] })).await;
    for topic in ["first", "second"] {
        author.say(json!(["EVENT", event(20_001, topic, topic)])).await;
        author.hear().await;
    }
    let heard = client.hear_all().await;
    assert_eq!(heard.len(), 1);
    assert_eq!(heard[0][2]["content"], "second");

    client.say(json!(["CLOSE", id])).await;
    client.hear_all().await;
    author.say(json!(["EVENT", event(20_001, "second", "again")])).await;
    author.hear().await;
    assert!(client.hear_all().await.is_empty());
    server.shutdown().await;
}

#[tokio::test]
async fn a_trystero_filter_of_250_kinds_and_values_is_served() {
    let server = start(Limits::default()).await;
    let (mut client, mut author) = (Client::connect(&server).await, Client::connect(&server).await);
    let kinds: Vec<u16> = (20_000..20_250).collect();
    let topics: Vec<String> = (0..250).map(|index| format!("topic-{index}")).collect();
    client.subscribe("all", json!({ "kinds": kinds, "#x": topics, "since": 1_000 })).await;
    author.say(json!(["EVENT", event(20_249, "topic-7", "in")])).await;
    author.say(json!(["EVENT", event(20_250, "topic-7", "out")])).await;
    author.hear().await;
    author.hear().await;
    let heard = client.hear_all().await;
    assert_eq!(heard.len(), 1);
    assert_eq!(heard[0][2]["content"], "in");
    server.shutdown().await;
}

#[tokio::test]
async fn what_is_refused_is_refused_with_a_reason() {
    let server =
        start(Limits { subscriptions: 3, filters: 2, filter_values: 10, event_tags: 1, ..Limits::default() }).await;
    let mut client = Client::connect(&server).await;
    let mut refusal = async |message: Value, verb: &str, prefix: &str| {
        client.say(message.clone()).await;
        let answer = client.hear().await;
        let reason = answer.as_array().unwrap().last().unwrap().as_str().unwrap();
        assert_eq!(answer[0], verb, "{message}");
        assert!(reason.starts_with(prefix), "{message}: {answer}");
        answer
    };
    let stored = refusal(json!(["EVENT", event(1, "topic", "note")]), "OK", "blocked:").await;
    assert_eq!(stored[2], false);
    let good = event(20_001, "topic", "x");
    let mut forged = good.clone();
    forged["content"] = json!("y");
    refusal(json!(["EVENT", forged]), "OK", "invalid:").await;
    let mut unsigned = good.clone();
    unsigned["sig"] = json!("0".repeat(128));
    refusal(json!(["EVENT", unsigned]), "OK", "invalid:").await;
    let mut broken = good.clone();
    broken["kind"] = json!("20001");
    let answer = refusal(json!(["EVENT", broken]), "OK", "invalid:").await;
    assert_eq!(answer[1], good["id"]);
    let tagged = EventBuilder::new(Kind::from(20_001), "")
        .tags([Tag::parse(["x", "a"]).unwrap(), Tag::parse(["x", "b"]).unwrap()])
        .finalize(&Keys::generate())
        .unwrap();
    refusal(json!(["EVENT", tagged]), "OK", "invalid:").await;

    refusal(json!(["REQ", "a", { "kinds": "all" }]), "CLOSED", "invalid:").await;
    refusal(json!(["REQ", "a", { "search": "x" }]), "CLOSED", "unsupported:").await;
    refusal(json!(["REQ", "a", {}, {}, {}]), "CLOSED", "invalid:").await;
    refusal(json!(["REQ", "a", { "kinds": (0..11).collect::<Vec<_>>() }]), "CLOSED", "invalid:").await;
    refusal(json!(["REQ", "x".repeat(65), {}]), "NOTICE", "invalid:").await;
    refusal(json!(["COUNT", "a", {}]), "CLOSED", "unsupported:").await;
    refusal(json!(["HELLO", "a", {}]), "NOTICE", "unsupported:").await;
    refusal(json!({ "not": "nostr" }), "NOTICE", "invalid:").await;
    for id in ["1", "2", "3"] {
        client.subscribe(id, json!({ "kinds": [20_001] })).await;
    }
    let mut refusal = async |message: Value, verb: &str, prefix: &str| {
        client.say(message).await;
        let answer = client.hear().await;
        assert!(answer[0] == verb && answer[2].as_str().unwrap().starts_with(prefix), "{answer}");
    };
    refusal(json!(["REQ", "4", {}]), "CLOSED", "rate-limited:").await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_message_that_is_too_large_or_no_text_ends_its_connection_alone() {
    let server = start(Limits { message_bytes: 10_000, ..Limits::default() }).await;
    let mut calm = Client::connect(&server).await;
    calm.subscribe("calm", json!({ "#x": ["topic"] })).await;

    let mut large = Client::connect(&server).await;
    large.0.send(Message::text("x".repeat(20_000))).await.unwrap();
    match large.frame().await {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(frame.code, CloseCode::Size),
        other => panic!("{other:?}"),
    }

    let mut garbage = Client::connect(&server).await;
    for _ in 0..40 {
        if garbage.0.send(Message::binary(vec![0xff; 10])).await.is_err() {
            break;
        }
    }
    let mut notices = 0;
    loop {
        match garbage.frame().await {
            Some(Ok(Message::Text(_))) => notices += 1,
            Some(Ok(Message::Close(Some(frame)))) => {
                assert_eq!(frame.code, CloseCode::Policy);
                break;
            }
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(notices, 32);

    let mut author = Client::connect(&server).await;
    author.say(json!(["EVENT", event(20_001, "topic", "still here")])).await;
    assert_eq!(calm.hear().await[2]["content"], "still here");
    server.shutdown().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_loses_events_that_are_counted_and_others_lose_none() {
    let rates = Rates { bytes: 0, ..Rates::default() };
    let server = start_with(Config { rates, ..config() }).await;
    let mut stalled = Client::connect(&server).await;
    stalled.subscribe("stalled", json!({ "#x": ["topic"] })).await;
    let mut reader = Client::connect(&server).await;
    reader.subscribe("reader", json!({ "#x": ["topic"] })).await;
    let mut author = Client::connect(&server).await;
    for number in 0..300 {
        let large = event(20_001, "topic", &format!("{number:060000}"));
        author.say(json!(["EVENT", large])).await;
        assert_eq!(author.hear().await[2], true);
        assert_eq!(reader.hear().await[0], "EVENT");
    }
    let families = server.telemetry().registry.gather();
    let dropped: f64 = families
        .iter()
        .filter(|family| family.name() == "homeport_relay_drops_total")
        .flat_map(|family| family.get_metric())
        .map(|metric| metric.get_counter().get_value())
        .sum();
    assert!(dropped > 0.0, "18 MB fit nowhere");
    server.shutdown().await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_off_and_one_that_is_slow_is_not() {
    let limits = Limits { stall: Duration::from_millis(500), ..Limits::default() };
    let rates = Rates { bytes: 0, messages: 0, verifications: 0, ..Rates::default() };
    let server = start_with(Config { limits, rates, ..config() }).await;
    let stalled_clients = || -> f64 {
        let families = server.telemetry().registry.gather();
        let family = families.iter().find(|family| family.name() == "homeport_relay_disconnects_total");
        let stalled = |metric: &&prometheus::proto::Metric| metric.get_label()[0].value() == "stalled";
        family.map_or(0.0, |family| {
            family.get_metric().iter().filter(stalled).map(|metric| metric.get_counter().get_value()).sum()
        })
    };
    let mut stalled = Client::connect(&server).await;
    stalled.subscribe("stalled", json!({ "#x": ["topic"] })).await;
    let mut slow = Client::connect(&server).await;
    slow.subscribe("slow", json!({ "#x": ["topic"] })).await;
    let mut author = Client::connect(&server).await;
    // More than all buffers hold, until the one that takes nothing has been cut off.
    let mut heard = 0;
    while stalled_clients() == 0.0 {
        for number in 0..40 {
            author.say(json!(["EVENT", event(20_001, "topic", &format!("{number:060000}"))])).await;
            assert_eq!(author.hear().await[2], true);
        }
        // Far less than what comes: its socket is full all the time, for longer than the limit.
        for _ in 0..4 {
            assert_eq!(slow.hear().await[0], "EVENT");
            heard += 1;
        }
    }
    assert_eq!(stalled_clients(), 1.0);
    assert!(heard > 0);
    slow.hear_all().await;
    server.shutdown().await;
}

#[tokio::test]
async fn what_clocks_say_hinders_no_live_event() {
    let server = start(Limits::default()).await;
    let (mut client, mut author) = (Client::connect(&server).await, Client::connect(&server).await);
    client.subscribe("s", json!({ "kinds": [20_001], "#x": ["topic"] })).await;
    let keys = Keys::generate();
    let now = Timestamp::now().as_secs();
    // The author's clock jumps to the ends of time and back, and its announces go on.
    let moments = [now, 0, now + 86_400, u64::from(u32::MAX), now - 10_800, now + 1];
    let mut last = Value::Null;
    for (number, created_at) in moments.into_iter().enumerate() {
        let announce = signed(&keys, 20_001, created_at, &[&["x", "topic"]], r#"{"peerId":"jumper"}"#);
        author.say(json!(["EVENT", announce])).await;
        assert_eq!(author.hear().await[2], true, "announce {number}");
        let offer = signed(&keys, 20_001, created_at, &[&["x", "topic"]], &format!("offer {number}"));
        author.say(json!(["EVENT", offer])).await;
        assert_eq!(author.hear().await[2], true, "offer {number}");
        last = announce;
        loop {
            let heard = client.hear().await;
            if heard[2]["content"] == format!("offer {number}") {
                break;
            }
            assert_eq!(heard[2]["content"], r#"{"peerId":"jumper"}"#);
        }
    }
    // Whoever comes now hears what was said last, whatever its date.
    let mut late = Client::connect(&server).await;
    late.subscribe("s", json!({ "kinds": [20_001], "#x": ["topic"] })).await;
    assert_eq!(late.hear_all().await, [json!(["EVENT", "s", last])]);
    server.shutdown().await;
}

#[tokio::test]
async fn who_is_too_fast_is_told_so_and_others_go_on() {
    let rates = Rates { messages: 1, ..Rates::default() };
    let server = start_with(Config { rates, ..config() }).await;
    let mut calm = Client::connect(&server).await;
    calm.subscribe("calm", json!({ "#x": ["topic"] })).await;
    let mut flood = Client::connect(&server).await;
    let mut refused = 0;
    for number in 0..200 {
        flood.say(json!(["EVENT", event(20_001, "elsewhere", &number.to_string())])).await;
        let answer = flood.hear().await;
        if answer[2] == false {
            assert!(answer[3].as_str().unwrap().starts_with("rate-limited:"), "{answer}");
            refused += 1;
        }
    }
    // Five at once, and one more for each second that this takes.
    assert!((100..=195).contains(&refused), "{refused}");
    flood.say(json!(["REQ", "s", { "kinds": [20_001] }])).await;
    let answer = flood.hear().await;
    assert!(answer[0] == "CLOSED" && answer[2].as_str().unwrap().starts_with("rate-limited:"), "{answer}");
    let mut author = Client::connect(&server).await;
    author.say(json!(["EVENT", event(20_001, "topic", "calmly")])).await;
    assert_eq!(calm.hear().await[2]["content"], "calmly");
    server.shutdown().await;
}

#[tokio::test]
async fn only_the_rooms_of_the_owner_are_served_when_set_so() {
    let server = start_with(Config { admission: Admission::Rooms(vec!["my-app".into()]), ..config() }).await;
    let (mut client, mut author) = (Client::connect(&server).await, Client::connect(&server).await);
    let room = genosdb::Room::graph_sync("my-app");
    let peer = genosdb::PeerId::parse("rP5xrSA37VoHEv5F0C0U").unwrap();
    let (root, own) = (room.root_topic(), room.self_topic(&peer));
    let announce = genosdb::Signal::Announce { peer }.to_content();
    client.subscribe("s", json!({ "#x": [root.as_str(), own.as_str(), "elsewhere"] })).await;
    let mut publish = async |topic: &str, content: &str| {
        author.say(json!(["EVENT", event(22_718, topic, content)])).await;
        author.hear().await
    };
    for topic in ["elsewhere", own.as_str()] {
        let answer = publish(topic, "{}").await;
        assert!(answer[2] == false && answer[3].as_str().unwrap().starts_with("blocked:"), "{answer}");
    }
    assert_eq!(publish(root.as_str(), &announce).await[2], true);
    assert_eq!(publish(own.as_str(), "an offer").await[2], true);
    assert_eq!(client.hear_all().await.len(), 2);
    server.shutdown().await;
}

#[tokio::test]
async fn a_relay_for_known_keys_asks_who_is_there() {
    let keys = Keys::generate();
    let known = hex::decode(keys.public_key().to_hex()).unwrap().try_into().unwrap();
    let server = start_with(Config { admission: Admission::Auth([known].into()), ..config() }).await;
    let mut client = Client::connect(&server).await;
    let challenge = client.hear().await;
    assert_eq!(challenge[0], "AUTH");
    let note = event(20_001, "topic", "x");
    client.say(json!(["EVENT", note])).await;
    let answer = client.hear().await;
    assert!(answer[2] == false && answer[3].as_str().unwrap().starts_with("auth-required:"), "{answer}");
    client.say(json!(["REQ", "s", { "#x": ["topic"] }])).await;
    let answer = client.hear().await;
    assert!(answer[0] == "CLOSED" && answer[2].as_str().unwrap().starts_with("auth-required:"), "{answer}");

    let proof = |keys: &Keys| {
        EventBuilder::new(Kind::from(22_242), "")
            .tags([
                Tag::parse(["relay", &format!("ws://{}/", server.address())]).unwrap(),
                Tag::parse(["challenge", challenge[1].as_str().unwrap()]).unwrap(),
            ])
            .finalize(keys)
            .unwrap()
    };
    client.say(json!(["AUTH", proof(&Keys::generate())])).await;
    let answer = client.hear().await;
    assert!(answer[2] == false && answer[3].as_str().unwrap().starts_with("restricted:"), "{answer}");
    client.say(json!(["AUTH", proof(&keys)])).await;
    assert_eq!(client.hear().await[2], true);
    client.subscribe("s", json!({ "#x": ["topic"] })).await;
    client.say(json!(["EVENT", note])).await;
    // The client's own echo and the answer, in either order.
    let heard = [client.hear().await, client.hear().await];
    assert!(heard.iter().any(|message| message[0] == "EVENT"), "{heard:?}");
    assert!(heard.iter().any(|message| message[0] == "OK" && message[2] == true), "{heard:?}");
    let (_, body) = http(&server, "GET / HTTP/1.1\r\nHost: x\r\nAccept: application/nostr+json\r\n").await;
    let document: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(document["supported_nips"], json!([1, 11, 13, 42]));
    assert_eq!(document["limitation"]["auth_required"], true);
    server.shutdown().await;
}

/// A relay that stores, in a folder that goes away.
async fn start_storing() -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let store = StoreConfig { folder: folder.path().join("events"), max_bytes: 64 << 20 };
    (start_with(Config { store: Some(store), ..config() }).await, folder)
}

fn signed(keys: &Keys, kind: u16, created_at: u64, tags: &[&[&str]], content: &str) -> Value {
    let event = EventBuilder::new(Kind::from(kind), content)
        .tags(tags.iter().map(|tag| Tag::parse(tag.iter().copied()).unwrap()))
        .custom_created_at(Timestamp::from(created_at))
        .finalize(keys)
        .unwrap();
    serde_json::to_value(event).unwrap()
}

#[tokio::test]
async fn stored_events_come_back_newest_first_and_live_ones_behind_them() {
    let (server, _folder) = start_storing().await;
    let keys = Keys::generate();
    let mut author = Client::connect(&server).await;
    let mut publish = async |event: &Value| {
        author.say(json!(["EVENT", event])).await;
        author.hear().await
    };
    for at in [100, 300, 200] {
        assert_eq!(publish(&signed(&keys, 1, at, &[&["t", "x"]], &at.to_string())).await[2], true);
    }
    // Replaceable (0) and addressable (30000): only the newest of each stays.
    for (kind, at, tags) in
        [(0, 100, &[][..]), (0, 200, &[]), (30_000, 100, &[&["d", "a"][..]]), (30_000, 200, &[&["d", "a"]])]
    {
        assert_eq!(publish(&signed(&keys, kind, at, tags, &at.to_string())).await[2], true);
    }
    let older = publish(&signed(&keys, 0, 150, &[], "late")).await;
    assert!(older[2] == false && older[3].as_str().unwrap().starts_with("blocked:"), "{older}");
    assert_eq!(publish(&signed(&keys, 30_000, 100, &[&["d", "b"]], "other")).await[2], true);

    let mut reader = Client::connect(&server).await;
    let mut ask = async |filter: Value| -> Vec<String> {
        reader.say(json!(["REQ", "s", filter])).await;
        let mut heard = Vec::new();
        loop {
            let message = reader.hear().await;
            if message[0] == "EOSE" {
                return heard;
            }
            heard.push(message[2]["content"].as_str().unwrap().to_owned());
        }
    };
    let author_key = keys.public_key().to_hex();
    assert_eq!(ask(json!({ "kinds": [1] })).await, ["300", "200", "100"]);
    assert_eq!(ask(json!({ "kinds": [1], "limit": 2 })).await, ["300", "200"]);
    assert_eq!(ask(json!({ "kinds": [1], "limit": 0 })).await, [""; 0]);
    assert_eq!(ask(json!({ "kinds": [1], "since": 200, "until": 250 })).await, ["200"]);
    assert_eq!(ask(json!({ "#t": ["x"], "authors": [author_key] })).await.len(), 3);
    assert_eq!(ask(json!({ "#t": ["y"] })).await, [""; 0]);
    assert_eq!(ask(json!({ "kinds": [0] })).await, ["200"]);
    assert_eq!(ask(json!({ "kinds": [30_000] })).await, ["200", "other"]);
    assert_eq!(ask(json!({ "kinds": [30_000], "#d": ["b"] })).await, ["other"]);
    // The subscription lives on.
    assert_eq!(ask(json!({ "kinds": [1], "limit": 0 })).await, [""; 0]);
    let live = signed(&keys, 1, 400, &[], "live");
    assert_eq!(publish(&live).await[2], true);
    assert_eq!(reader.hear().await, json!(["EVENT", "s", live]));
    reader.say(json!(["COUNT", "c", { "kinds": [1] }])).await;
    assert_eq!(reader.hear().await, json!(["COUNT", "c", { "count": 4 }]));
    server.shutdown().await;
}

#[tokio::test]
async fn what_its_author_deletes_is_gone_and_what_has_expired_is_not_taken() {
    let (server, _folder) = start_storing().await;
    let (keys, stranger) = (Keys::generate(), Keys::generate());
    let mut client = Client::connect(&server).await;
    let mut publish = async |event: &Value| {
        client.say(json!(["EVENT", event])).await;
        client.hear().await
    };
    let note = signed(&keys, 1, 100, &[], "note");
    let id = note["id"].as_str().unwrap();
    assert_eq!(publish(&note).await[2], true);
    assert_eq!(publish(&signed(&stranger, 5, 150, &[&["e", id]], "")).await[2], false);
    assert_eq!(publish(&signed(&keys, 5, 200, &[&["e", id]], "")).await[2], true);
    let expired = publish(&signed(&keys, 1, 100, &[&["expiration", "200"]], "old")).await;
    assert!(expired[2] == false && expired[3].as_str().unwrap().starts_with("invalid:"), "{expired}");
    assert_eq!(publish(&signed(&keys, 1, 100, &[&["expiration", "99999999999"]], "young")).await[2], true);
    let heard = {
        client.say(json!(["REQ", "s", { "kinds": [1] }])).await;
        (client.hear().await, client.hear().await)
    };
    assert_eq!((&heard.0[2]["content"], &heard.1[0]), (&json!("young"), &json!("EOSE")));
    server.shutdown().await;
}

#[tokio::test]
async fn a_protected_event_is_taken_from_its_author_alone() {
    let (server, _folder) = start_storing().await;
    let keys = Keys::generate();
    let mut client = Client::connect(&server).await;
    let protected = signed(&keys, 1, 100, &[&["-"]], "mine");
    client.say(json!(["EVENT", protected])).await;
    let challenge = client.hear().await;
    assert_eq!(challenge[0], "AUTH");
    let answer = client.hear().await;
    assert!(answer[2] == false && answer[3].as_str().unwrap().starts_with("auth-required:"), "{answer}");
    let now = Timestamp::now().as_secs();
    let url = format!("ws://{}/", server.address());
    let challenge = challenge[1].as_str().unwrap();
    client.say(json!(["AUTH", signed(&keys, 22_242, now, &[&["relay", &url], &["challenge", challenge]], "")])).await;
    assert_eq!(client.hear().await[2], true);
    client.say(json!(["EVENT", protected])).await;
    assert_eq!(client.hear().await[2], true);
    server.shutdown().await;
}

#[tokio::test]
async fn stored_events_outlive_a_restart_and_what_is_listed_works() {
    let (server, folder) = start_storing().await;
    let keys = Keys::generate();
    let mut client = Client::connect(&server).await;
    client.say(json!(["EVENT", signed(&keys, 1, 100, &[], "kept")])).await;
    assert_eq!(client.hear().await[2], true);
    let (_, body) = http(&server, "GET / HTTP/1.1\r\nHost: x\r\nAccept: application/nostr+json\r\n").await;
    let document: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(document["supported_nips"], json!([1, 9, 11, 13, 40, 42, 45, 70]));
    server.shutdown().await;
    let store = StoreConfig { folder: folder.path().join("events"), max_bytes: 64 << 20 };
    let server = start_with(Config { store: Some(store), ..config() }).await;
    let mut client = Client::connect(&server).await;
    client.say(json!(["REQ", "s", { "authors": [keys.public_key().to_hex()] }])).await;
    assert_eq!(client.hear().await[2]["content"], "kept");
    server.shutdown().await;
}

#[tokio::test]
async fn work_is_asked_for_when_set_so() {
    let server = start(Limits { difficulty: 8, ..Limits::default() }).await;
    let keys = Keys::generate();
    let mut client = Client::connect(&server).await;
    let mine = |wanted: &dyn Fn(&str) -> bool| {
        (0..100_000)
            .map(|nonce: u32| signed(&keys, 20_001, 100, &[&["nonce", &nonce.to_string(), "8"]], "x"))
            .find(|event| wanted(event["id"].as_str().unwrap()))
            .unwrap()
    };
    client.say(json!(["EVENT", mine(&|id| !id.starts_with("00"))])).await;
    let answer = client.hear().await;
    assert!(answer[2] == false && answer[3].as_str().unwrap().starts_with("pow:"), "{answer}");
    client.say(json!(["EVENT", mine(&|id| id.starts_with("00"))])).await;
    assert_eq!(client.hear().await[2], true);
    server.shutdown().await;
}

#[tokio::test]
async fn an_address_behind_a_trusted_proxy_has_its_own_share_of_connections() {
    let rates = Rates { address_connections: 2, ..Rates::default() };
    let server = start_with(Config { rates, trusted_proxy_header: Some("X-Forwarded-For".into()), ..config() }).await;
    let connect = async |client: &str| {
        use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
        let mut request = format!("ws://{}/", server.address()).into_client_request().unwrap();
        request.headers_mut().insert("x-forwarded-for", client.parse().unwrap());
        tokio_tungstenite::connect_async(request).await.map(|(socket, _)| socket)
    };
    let _held = [connect("192.0.2.1").await.unwrap(), connect("10.0.0.1, 192.0.2.1").await.unwrap()];
    match connect("192.0.2.1").await {
        Err(Error::Http(answer)) => assert_eq!(answer.status(), 429),
        other => panic!("{other:?}"),
    }
    connect("192.0.2.2").await.unwrap();
    server.shutdown().await;
}

#[tokio::test]
async fn ten_thousand_subscriptions_leave_nothing_behind() {
    let server = start_with(Config { rates: Rates { messages: 0, bytes: 0, ..Rates::default() }, ..config() }).await;
    let open = || -> f64 {
        let families = server.telemetry().registry.gather();
        let gauge = families.iter().find(|family| family.name() == "homeport_relay_subscriptions").unwrap();
        gauge.get_metric()[0].get_gauge().get_value()
    };
    let mut client = Client::connect(&server).await;
    for round in 0..100 {
        for number in 0..100 {
            client.say(json!(["REQ", format!("{number}"), { "#x": [format!("{round}-{number}")] }])).await;
        }
        for _ in 0..100 {
            assert_eq!(client.hear().await[0], "EOSE");
        }
        for number in 0..100 {
            client.say(json!(["CLOSE", format!("{number}")])).await;
        }
    }
    client.hear_all().await;
    assert_eq!(open(), 1.0, "only the marker is left");
    client.0.close(None).await.unwrap();
    while let Some(Ok(_)) = client.frame().await {}
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while open() > 0.0 {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.shutdown().await;
}

#[tokio::test]
async fn text_that_is_not_utf_8_ends_its_connection_alone() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = start(Limits::default()).await;
    let mut calm = Client::connect(&server).await;
    let mut rude = TcpStream::connect(server.address()).await.unwrap();
    let handshake = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
        Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    rude.write_all(handshake.as_bytes()).await.unwrap();
    // A final text frame of two masked bytes that no UTF-8 text holds.
    rude.write_all(&[0x81, 0x82, 0, 0, 0, 0, 0xff, 0xfe]).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, rude.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 101"));
    calm.subscribe("calm", json!({ "#x": ["topic"] })).await;
    server.shutdown().await;
}

#[tokio::test]
async fn the_information_document_says_what_is_enforced() {
    let server = start(Limits { subscriptions: 7, ..Limits::default() }).await;
    let (head, body) = http(&server, "GET / HTTP/1.1\r\nHost: x\r\nAccept: application/nostr+json\r\n").await;
    assert!(head.contains("200") && head.to_lowercase().contains("access-control-allow-origin: *"), "{head}");
    let document: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(document["limitation"]["max_subscriptions"], 7);
    assert_eq!(document["limitation"]["max_message_length"], 131_072);
    assert_eq!(document["supported_nips"], json!([1, 11, 13]));
    let (head, body) = http(&server, "GET / HTTP/1.1\r\nHost: x\r\n").await;
    assert!(head.contains("text/html") && body.contains("Homeport"), "{head}");
    assert_eq!(http(&server, "GET /healthz HTTP/1.1\r\nHost: x\r\n").await.1, "ok\n");
    server.shutdown().await;
}

async fn http(server: &Server, head: &str) -> (String, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn at_shutdown_clients_are_told_to_come_back() {
    let server = start(Limits::default()).await;
    let mut client = Client::connect(&server).await;
    client.subscribe("s", json!({})).await;
    let shutdown = tokio::spawn(server.shutdown());
    match client.frame().await {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(frame.code, CloseCode::Restart),
        other => panic!("{other:?}"),
    }
    shutdown.await.unwrap();
}
