//! What peers need to find each other: ephemeral events, and who is present.

use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag, Timestamp};
use relay::Limits;
use serde_json::{Value, json};

use crate::support::{Client, PATIENCE, event};
use crate::{signed, start};

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

/// A client that announces itself over a new connection under the key that it had before, but asks for nothing there.
async fn come_back(server: &relay::Server, announce: &Value) -> Client {
    let mut client = Client::connect(server).await;
    client.say(json!(["EVENT", announce])).await;
    assert_eq!(client.hear().await[2], true);
    client
}

#[tokio::test]
async fn who_comes_back_without_asking_again_hears_what_it_had_asked_for() {
    let server = start(Limits::default()).await;
    let keys = Keys::generate();
    let now = Timestamp::now().as_secs();
    let announce = |at: u64| signed(&keys, 20_001, at, &[&["x", "topic"]], r#"{"peerId":"old"}"#);
    let mut client = Client::connect(&server).await;
    client.subscribe("room", json!({ "kinds": [20_001], "#x": ["topic"] })).await;
    client.subscribe("self", json!({ "kinds": [20_002], "#x": ["mine"] })).await;
    client.say(json!(["EVENT", announce(now - 3)])).await;
    while client.hear().await[0] != "OK" {}
    // It breaks, and somebody else comes meanwhile.
    drop(client);
    let other = event(20_001, "topic", r#"{"peerId":"new"}"#);
    let mut author = come_back(&server, &other).await;

    let mut back = come_back(&server, &announce(now - 2)).await;
    // Those who are present, and what is meant for it alone.
    assert_eq!(back.hear().await, json!(["EVENT", "room", other]));
    let offer = event(20_002, "mine", "an offer");
    author.say(json!(["EVENT", offer])).await;
    assert_eq!(back.hear().await, json!(["EVENT", "self", offer]));

    // It had not noticed that its connection broke: the relay does not know either.
    let mut again = come_back(&server, &announce(now - 1)).await;
    assert_eq!(again.hear().await, json!(["EVENT", "room", other]));
    // Who asks gets what it asks for.
    let mut asking = Client::connect(&server).await;
    asking.subscribe("own", json!({ "kinds": [20_003] })).await;
    asking.say(json!(["EVENT", announce(now)])).await;
    assert_eq!(asking.hear().await[0], "OK");
    assert!(asking.hear_all().await.is_empty());
    server.shutdown().await;
}

#[tokio::test]
async fn nobody_is_given_what_another_asked_for_or_what_was_given_up() {
    let server = start(Limits::default()).await;
    let keys = Keys::generate();
    let now = Timestamp::now().as_secs();
    let announce = |at: u64| signed(&keys, 20_001, at, &[&["x", "topic"]], r#"{"peerId":"old"}"#);
    let mut client = Client::connect(&server).await;
    client.subscribe("room", json!({ "kinds": [20_001], "#x": ["topic"] })).await;
    client.say(json!(["EVENT", announce(now - 3)])).await;
    while client.hear().await[0] != "OK" {}
    let present = come_back(&server, &event(20_001, "topic", r#"{"peerId":"new"}"#)).await;
    // Another key; an old event of the same, which anybody may have kept.
    for event in [event(20_001, "topic", r#"{"peerId":"another"}"#), announce(now - 3_600)] {
        assert!(come_back(&server, &event).await.hear_all().await.is_empty());
    }
    // It leaves in order.
    client.0.close(None).await.unwrap();
    while client.frame().await.is_some_and(|frame| frame.is_ok()) {}
    assert!(come_back(&server, &announce(now)).await.hear_all().await.is_empty());
    drop(present);
    server.shutdown().await;
}
