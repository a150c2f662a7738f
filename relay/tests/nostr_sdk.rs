//! The relay with an independent client: `nostr-sdk`.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use ::relay::{Admission, Config, Server, StoreConfig};
use nostr_sdk::prelude::{Client, EventBuilder, Filter, Keys, Kind, RelayMessage, RelayPoolNotification, Tag};

/// Nothing that a test awaits takes nearly so long.
const PATIENCE: Duration = Duration::from_secs(20);

async fn start(admission: Admission, directory: &tempfile::TempDir) -> (Server, String) {
    let server = Server::bind(Config {
        store: Some(StoreConfig { folder: directory.path().to_owned(), max_bytes: 64 << 20 }),
        admission,
        ..Config::at("127.0.0.1:0".parse().unwrap())
    })
    .await
    .unwrap();
    let url = format!("ws://{}", server.address());
    (server, url)
}

async fn connected(keys: &Keys, url: &str) -> Client {
    let client = Client::new(keys.clone());
    client.add_relay(url).await.unwrap();
    assert_eq!(client.try_connect(PATIENCE).await.success.len(), 1);
    client
}

#[tokio::test]
async fn nostr_sdk_publishes_subscribes_fetches_and_counts() {
    let directory = tempfile::tempdir().unwrap();
    let (server, url) = start(Admission::Open, &directory).await;
    let (alice, bob) = (Keys::generate(), Keys::generate());
    let reader = connected(&bob, &url).await;
    let writer = connected(&alice, &url).await;

    let mut notifications = reader.notifications();
    let live = Filter::new().kind(Kind::from(20_001)).hashtag("homeport");
    reader.subscribe(live, None).await.unwrap();
    let said =
        EventBuilder::new(Kind::from(20_001), "live").tag(Tag::hashtag("homeport")).sign_with_keys(&alice).unwrap();
    let heard = tokio::time::timeout(PATIENCE, async {
        // The relay takes an ephemeral event only to who has subscribed already, and says when that is so.
        loop {
            if let RelayPoolNotification::Message { message: RelayMessage::EndOfStoredEvents(_), .. } =
                notifications.recv().await.unwrap()
            {
                break;
            }
        }
        let output = writer.send_event(&said).await.unwrap();
        assert_eq!(output.success.len(), 1, "{:?}", output.failed);
        loop {
            if let RelayPoolNotification::Event { event, .. } = notifications.recv().await.unwrap() {
                return event;
            }
        }
    });
    assert_eq!(*heard.await.unwrap(), said);

    for number in 0..3 {
        let note = EventBuilder::new(Kind::TextNote, format!("note {number}")).sign_with_keys(&alice).unwrap();
        let output = writer.send_event(&note).await.unwrap();
        assert_eq!(output.success.len(), 1, "{:?}", output.failed);
    }
    let notes = Filter::new().author(alice.public_key()).kind(Kind::TextNote);
    let fetched = reader.fetch_events(notes.clone(), PATIENCE).await.unwrap();
    let mut contents: Vec<String> = fetched.into_iter().map(|event| event.content).collect();
    contents.sort_unstable();
    assert_eq!(contents, ["note 0", "note 1", "note 2"]);
    let relay = reader.relay(&url).await.unwrap();
    assert_eq!(relay.count_events(notes, PATIENCE).await.unwrap(), 3);

    reader.shutdown().await;
    writer.shutdown().await;
    server.shutdown().await;
}

#[tokio::test]
async fn nostr_sdk_proves_its_key_where_only_known_keys_are_served() {
    let directory = tempfile::tempdir().unwrap();
    let (known, stranger) = (Keys::generate(), Keys::generate());
    let (server, url) = start(Admission::Auth([known.public_key().to_bytes()].into()), &directory).await;
    let client = connected(&known, &url).await;
    let note = EventBuilder::new(Kind::TextNote, "from a friend").sign_with_keys(&known).unwrap();
    let output = client.send_event(&note).await.unwrap();
    assert_eq!(output.success.len(), 1, "{:?}", output.failed);
    let other = connected(&stranger, &url).await;
    let note = EventBuilder::new(Kind::TextNote, "from a stranger").sign_with_keys(&stranger).unwrap();
    // Refused, whether it is told so as an error or as a failure of the only relay.
    let refused = other.send_event(&note).await.map_or(true, |output| output.success.is_empty());
    assert!(refused);
    client.shutdown().await;
    other.shutdown().await;
    server.shutdown().await;
}
