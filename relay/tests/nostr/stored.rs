//! Stored events: what is kept, what comes back, and what is deleted.

use nostr::prelude::{Keys, Timestamp};
use relay::{Config, Server, StoreConfig};
use serde_json::{Value, json};

use crate::support::Client;
use crate::{config, http, signed, start_with};

/// A relay that stores, in a folder that goes away.
async fn start_storing() -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let store = StoreConfig { folder: folder.path().join("events"), max_bytes: 64 << 20 };
    (start_with(Config { store: Some(store), ..config() }).await, folder)
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
