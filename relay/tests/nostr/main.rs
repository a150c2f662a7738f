//! The relay over real sockets, with events made by an independent implementation of Nostr.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod admission;
mod limits;
mod signalling;
mod stored;
#[path = "../support/mod.rs"]
mod support;

use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag, Timestamp};
use relay::{Config, Limits, Server};
use serde_json::{Value, json};
use support::Client;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

async fn start(limits: Limits) -> Server {
    start_with(Config { limits, ..config() }).await
}

fn config() -> Config {
    Config::at("127.0.0.1:0".parse().unwrap())
}

async fn start_with(config: Config) -> Server {
    Server::bind(config).await.unwrap()
}

fn signed(keys: &Keys, kind: u16, created_at: u64, tags: &[&[&str]], content: &str) -> Value {
    let event = EventBuilder::new(Kind::from(kind), content)
        .tags(tags.iter().map(|tag| Tag::parse(tag.iter().copied()).unwrap()))
        .custom_created_at(Timestamp::from(created_at))
        .finalize(keys)
        .unwrap();
    serde_json::to_value(event).unwrap()
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
