//! The server over real sockets, with the client of the `turn` crate.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::UdpSocket;
use turn::client::{Client, ClientConfig};
use turn_server::{Config, Credentials, ExternalIp, Limits, Server, mint};
use webrtc_util::Conn;

/// Nothing that a test awaits takes nearly so long.
const PATIENCE: Duration = Duration::from_secs(20);

async fn start(listen: &str, ports: std::ops::RangeInclusive<u16>) -> Server {
    start_with(Config { listen: listen.parse().unwrap(), relay_ports: ports, ..config() }).await
}

fn config() -> Config {
    Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        listen_tls: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        external_ips: vec![ExternalIp::Address("127.0.0.1".parse().unwrap())],
        relay_ports: 49_152..=65_535,
        realm: "homeport".into(),
        credentials: Credentials {
            users: BTreeMap::from([("alice".into(), "pass".into())]),
            secrets: vec!["north".into()],
        },
        limits: Limits::default(),
        allow_peers: Vec::new(),
        deny_peers: Vec::new(),
        drain: Duration::ZERO,
        threads: 2,
    }
}

async fn start_with(config: Config) -> Server {
    Server::bind(config).await.unwrap()
}

async fn client(server: &Server, username: &str, password: &str) -> Client {
    client_at(server.address(), username, password).await
}

async fn client_at(server: SocketAddr, username: &str, password: &str) -> Client {
    let address = SocketAddr::from(([127, 0, 0, 1], server.port())).to_string();
    let client = Client::new(ClientConfig {
        stun_serv_addr: address.clone(),
        turn_serv_addr: address,
        username: username.into(),
        password: password.into(),
        realm: String::new(),
        software: String::new(),
        rto_in_ms: 0,
        conn: Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap()),
        vnet: None,
    })
    .await
    .unwrap();
    client.listen().await.unwrap();
    client
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing happens")
}

#[tokio::test]
async fn packets_go_through_an_allocation_both_ways() {
    // Dual stack: clients of IPv4 must still see IPv4 addresses.
    let server = start("[::]:0", 49_152..=65_535).await;
    let minted = mint("north", "app", SystemTime::now(), Duration::from_secs(600));
    for (username, password) in [("alice", "pass"), (&minted.username, &minted.password)] {
        let client = client(&server, username, password).await;
        let seen = within(client.send_binding_request()).await.unwrap();
        assert_eq!(seen.ip().to_string(), "127.0.0.1");
        let allocation = within(client.allocate()).await.unwrap();
        let relayed = allocation.local_addr().unwrap();
        assert!(relayed.ip().is_loopback() && (49_152..=65_535).contains(&relayed.port()));

        let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        within(allocation.send_to(b"out", peer.local_addr().unwrap())).await.unwrap();
        let mut buffer = [0; 100];
        let (length, from) = within(peer.recv_from(&mut buffer)).await.unwrap();
        assert_eq!((&buffer[..length], from), (&b"out"[..], relayed));
        peer.send_to(b"back", relayed).await.unwrap();
        let (length, from) = within(allocation.recv_from(&mut buffer)).await.unwrap();
        assert_eq!((&buffer[..length], from), (&b"back"[..], peer.local_addr().unwrap()));
        client.close().await.unwrap();
    }
    assert_eq!(counted(&server, "homeport_turn_allocations_total", "udp"), 2.0);
    // Packets are counted a moment later, many at a time.
    within(async {
        while counted(&server, "homeport_turn_relayed_bytes_total", "from_peer") < 8.0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(counted(&server, "homeport_turn_relayed_packets_total", "to_peer"), 2.0);
    assert_eq!(counted(&server, "homeport_turn_relayed_bytes_total", "from_peer"), 8.0);
    server.shutdown().await;
}

#[tokio::test]
async fn who_has_no_credentials_gets_no_allocation() {
    let server = start("127.0.0.1:0", 49_152..=65_535).await;
    let expired = mint("north", "app", SystemTime::now() - Duration::from_secs(60), Duration::from_secs(1));
    let forged = mint("south", "app", SystemTime::now(), Duration::from_secs(600));
    for (username, password) in [
        ("alice", "wrong"),
        ("bob", "pass"),
        (expired.username.as_str(), expired.password.as_str()),
        (&forged.username, &forged.password),
    ] {
        let client = client(&server, username, password).await;
        assert!(within(client.allocate()).await.is_err(), "{username}");
        client.close().await.unwrap();
    }
    assert_eq!(counted(&server, "homeport_turn_allocations_total", ""), 0.0);
    assert_eq!(counted(&server, "homeport_turn_auth_failures_total", "unknown_user"), 1.0);
    assert_eq!(counted(&server, "homeport_turn_auth_failures_total", "expired"), 1.0);
    assert_eq!(counted(&server, "homeport_turn_auth_failures_total", "wrong_password"), 2.0);
    server.shutdown().await;
}

#[tokio::test]
async fn allocations_stay_within_the_port_range() {
    // One port only: the second allocation finds none.
    let port = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let server = start("127.0.0.1:0", port..=port).await;
    let first = client(&server, "alice", "pass").await;
    let allocation = within(first.allocate()).await.unwrap();
    assert_eq!(allocation.local_addr().unwrap().port(), port);
    let second = client(&server, "alice", "pass").await;
    assert!(within(second.allocate()).await.is_err());
    assert_eq!(counted(&server, "homeport_turn_no_port_total", ""), 1.0);
    server.shutdown().await;
}

#[tokio::test]
async fn peers_in_other_special_ranges_are_refused() {
    let server = start("127.0.0.1:0", 49_152..=65_535).await;
    let client = client(&server, "alice", "pass").await;
    let allocation = within(client.allocate()).await.unwrap();
    let refused = within(allocation.send_to(b"out", "169.254.169.254:80".parse().unwrap())).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("403")));
    assert_eq!(counted(&server, "homeport_turn_denied_peers_total", ""), 1.0);
    server.shutdown().await;
}

#[tokio::test]
async fn the_address_that_a_stun_server_sees_is_given_to_clients() {
    let seer = start("127.0.0.1:0", 49_152..=65_535).await;
    let stun = ExternalIp::Stun(seer.address().to_string());
    let listen = "[::]:0".parse().unwrap();
    let server = start_with(Config { listen, external_ips: vec![stun], ..config() }).await;
    assert_eq!(server.external_ip().to_string(), "127.0.0.1");
    let client = client(&server, "alice", "pass").await;
    let allocation = within(client.allocate()).await.unwrap();
    assert!(allocation.local_addr().unwrap().ip().is_loopback());
    server.shutdown().await;
    seer.shutdown().await;
}

#[tokio::test]
async fn at_shutdown_allocations_live_on_until_they_end_or_their_time_is_up() {
    for (drain, ends_itself) in [(Duration::from_secs(600), true), (Duration::from_millis(200), false)] {
        let server = start_with(Config { drain, ..config() }).await;
        let first = client(&server, "alice", "pass").await;
        let address = server.address();
        let allocation = within(first.allocate()).await.unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to = peer.local_addr().unwrap();
        within(allocation.send_to(b"before", to)).await.unwrap();
        let telemetry = server.telemetry().clone();
        let shutdown = tokio::spawn(server.shutdown());
        if ends_itself {
            // New ones are refused, from when the threads know; what is there goes on.
            loop {
                let late = client_at(address, "alice", "pass").await;
                match within(late.allocate()).await {
                    Ok(allocation) => within(allocation.close()).await.unwrap(),
                    Err(refused) => {
                        assert!(refused.to_string().contains("508"), "{refused}");
                        break;
                    }
                }
            }
            within(allocation.send_to(b"after", to)).await.unwrap();
            let mut buffer = [0; 10];
            within(peer.recv_from(&mut buffer)).await.unwrap();
            let (length, _) = within(peer.recv_from(&mut buffer)).await.unwrap();
            assert_eq!(&buffer[..length], b"after");
            within(allocation.close()).await.unwrap();
        }
        within(shutdown).await.unwrap();
        let open = telemetry
            .registry
            .gather()
            .iter()
            .find(|family| family.name() == "homeport_turn_allocations")
            .map(|family| family.get_metric()[0].get_gauge().get_value());
        assert_eq!(open, Some(0.0));
    }
}

fn counted(server: &Server, name: &str, label: &str) -> f64 {
    server
        .telemetry()
        .registry
        .gather()
        .iter()
        .filter(|family| family.name() == name)
        .flat_map(|family| family.get_metric())
        .filter(|metric| label.is_empty() || metric.get_label().iter().any(|pair| pair.value() == label))
        .map(|metric| metric.get_counter().get_value())
        .sum()
}
