//! Memory of the relay, in a process of its own since it is read from the system.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use futures_util::{SinkExt as _, StreamExt as _};
use relay::{Config, Rates, Server};
use tokio_tungstenite::tungstenite::Message;

/// Resident memory of this process in KiB.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Opens 10,000 subscriptions with ten values each over 20 connections, and closes all of them.
async fn open_and_close(server: &Server, round: usize) {
    let mut sockets = Vec::new();
    for client in 0..20 {
        let (mut socket, _) = tokio_tungstenite::connect_async(format!("ws://{}/", server.address())).await.unwrap();
        for number in 0..500 {
            let values: Vec<String> =
                (0..10).map(|value| format!("{round:020}-{client:020}-{number:020}-{value:020}")).collect();
            let request = serde_json::json!(["REQ", number.to_string(), { "kinds": [20_001], "#x": values }]);
            socket.feed(Message::text(request.to_string())).await.unwrap();
        }
        socket.flush().await.unwrap();
        for _ in 0..500 {
            assert!(socket.next().await.unwrap().unwrap().to_text().unwrap().starts_with(r#"["EOSE""#));
        }
        sockets.push(socket);
    }
    for mut socket in sockets {
        socket.close(None).await.unwrap();
        while let Some(Ok(_)) = socket.next().await {}
    }
}

#[tokio::test]
async fn subscriptions_that_are_closed_give_their_memory_back() {
    let server = Server::bind(Config {
        rates: Rates { messages: 0, bytes: 0, ..Rates::default() },
        ..Config::at("127.0.0.1:0".parse().unwrap())
    })
    .await
    .unwrap();
    // What the allocator keeps for the next time is there after the first rounds.
    for round in 0..3 {
        open_and_close(&server, round).await;
    }
    let before = resident_kib();
    for round in 3..=7 {
        open_and_close(&server, round).await;
    }
    let grown = resident_kib().saturating_sub(before);
    // 50,000 subscriptions with ten values of 83 bytes are over 40 MB.
    assert!(grown < 4 << 10, "{grown} KiB stayed");
    server.shutdown().await;
}
