//! What is refused, and who is too fast, too slow or too many.

use std::time::Duration;

use futures_util::SinkExt as _;
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use relay::{Config, Limits, Rates};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::{Client, PATIENCE, event};
use crate::{config, start, start_with};

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
