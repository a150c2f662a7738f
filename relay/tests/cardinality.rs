//! The number of the relay's series: who comes, and what they call themselves, makes none.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use futures_util::{SinkExt as _, StreamExt as _};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use relay::{Config, Rates, Server};
use tokio_tungstenite::tungstenite::Message;

/// Peers, each with a key, a topic and a kind of its own.
const PEERS: u16 = 10_000;

fn series(server: &Server) -> usize {
    server.telemetry().registry.gather().iter().map(|family| family.get_metric().len()).sum()
}

#[tokio::test]
async fn ten_thousand_peers_and_topics_make_no_series() {
    let server = Server::bind(Config {
        rates: Rates { messages: 0, bytes: 0, verifications: 0, ..Rates::default() },
        ..Config::at("127.0.0.1:0".parse().unwrap())
    })
    .await
    .unwrap();
    let (socket, _) = tokio_tungstenite::connect_async(format!("ws://{}/", server.address())).await.unwrap();
    let (mut writer, mut reader) = socket.split();
    // One of everything first: what a series is for is there from then on.
    let contents = [
        |peer: u16| format!(r#"{{"peerId":"peer{peer}"}}"#),
        |peer: u16| format!(r#"{{"peerId":"peer{peer}","offer":{{"type":"offer","sdp":"x"}}}}"#),
        |peer: u16| format!(r#"{{"peerId":"peer{peer}","answer":{{"type":"answer","sdp":"x"}}}}"#),
        |peer: u16| format!(r#"{{"peerId":"peer{peer}","bye":1}}"#),
    ];
    let event = |peer: u16, content: String| {
        let event = EventBuilder::new(Kind::from(20_000 + peer % 10_000), content)
            .tag(Tag::parse(["x", &format!("topic{peer}")]).unwrap())
            .finalize(&Keys::generate())
            .unwrap();
        Message::text(serde_json::json!(["EVENT", event]).to_string())
    };
    let mut before = 0;
    for round in 0..=1 {
        let peers = if round == 0 { 0..1 } else { 1..PEERS };
        let expected = usize::from(peers.end - peers.start) * if round == 0 { contents.len() } else { 1 };
        let sending = async {
            for peer in peers {
                for (index, content) in contents.iter().enumerate() {
                    if round == 0 || index == usize::from(peer) % contents.len() {
                        writer.send(event(peer, content(peer))).await.unwrap();
                    }
                }
            }
        };
        let answers = reader.by_ref().take(expected).for_each(|answer| async move {
            assert!(answer.unwrap().to_text().unwrap().contains(",true,"));
        });
        tokio::join!(sending, answers);
        if round == 0 {
            before = series(&server);
        }
    }
    assert_eq!(series(&server), before);
    server.shutdown().await;
}
