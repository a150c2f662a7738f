//! Relays that do not serve everybody.

use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use relay::{Admission, Config, Limits};
use serde_json::{Value, json};

use crate::support::{Client, event};
use crate::{config, http, signed, start, start_with};

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
