//! `homeport check`, beside a running homeport.

use std::net::TcpStream;

use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag, Timestamp};
use tokio_tungstenite::tungstenite::stream::MaybeTlsStream;
use tokio_tungstenite::tungstenite::{Message, WebSocket, connect};

use super::{homeport, signal, started};

/// Somebody whose clock is `ahead` seconds ahead announces itself; the connection stays open.
fn announce(relay: &str, ahead: i64) -> WebSocket<MaybeTlsStream<TcpStream>> {
    let at = Timestamp::now().as_secs().saturating_add_signed(ahead);
    let event = EventBuilder::new(Kind::from(22_000), r#"{"peerId":"AbCdEfGhIjKlMnOpQrSt"}"#)
        .tag(Tag::parse(["x", "topic"]).unwrap())
        .custom_created_at(Timestamp::from(at))
        .finalize(&Keys::generate())
        .unwrap();
    let (mut socket, _) = connect(relay).unwrap();
    socket.send(Message::text(serde_json::json!(["EVENT", event]).to_string())).unwrap();
    let answer = socket.read().unwrap().into_text().unwrap();
    assert!(answer.starts_with(r#"["OK""#) && answer.contains(",true,"), "{answer}");
    socket
}

#[test]
fn a_clock_that_is_not_that_of_most_clients_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, summary) = started(homeport(folder.path(), "up"));
    let address = |word: &str| {
        let line = summary.lines().find(|line| line.trim().starts_with(word)).unwrap();
        let url = line.split_whitespace().nth(1).unwrap();
        url.split_once("//").unwrap().1.split('/').next().unwrap().to_owned()
    };
    let (relay, metrics) = (address("relay"), address("metrics"));
    let clock = || {
        let output = homeport(folder.path(), "check")
            .args(["relay", "--json"])
            .env("HOMEPORT_RELAY__LISTEN", &relay)
            .env("HOMEPORT_METRICS__LISTEN", &metrics)
            .output()
            .unwrap();
        let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        let of_clients = |finding: &&serde_json::Value| finding["found"].as_str().unwrap().contains("were seen");
        findings.iter().find(of_clients).map(|finding| (finding["verdict"].clone(), finding["found"].clone()))
    };
    let url = format!("ws://{relay}/");
    assert!(clock().is_none(), "too few have been seen");

    let mut clients: Vec<_> = [0, 1, -2, 0, 90, -7_200].into_iter().map(|ahead| announce(&url, ahead)).collect();
    let (verdict, found) = clock().unwrap();
    assert_eq!(verdict, "ok");
    assert!(found.as_str().unwrap().ends_with("1 were more than 60 s ahead, 1 behind"), "{found}");

    clients.extend((0..20).map(|_| announce(&url, 10_800)));
    let (verdict, found) = clock().unwrap();
    assert_eq!(verdict, "failure");
    assert!(found.as_str().unwrap().ends_with("say that it is 3h later than here"), "{found}");
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
}
