//! The server over TCP, TLS and IPv6, with real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use service::{Certificate, TlsFiles, WebListener, WebTls};
use stun::attributes::{ATTR_EVEN_PORT, ATTR_REQUESTED_ADDRESS_FAMILY, ATTR_RESERVATION_TOKEN, AttrType, RawAttribute};
use support::{CHANNEL_HEAD, Client, PASSWORD, REALM, Transport, USER, channel_data, tls_config};
use turn_server::{Config, Credentials, ExternalIp, Limits, Quotas, Server};

/// Nothing that a test waits for takes nearly so long.
const PATIENCE: Duration = Duration::from_secs(20);

fn config() -> Config {
    Config {
        listen: "[::]:0".parse().unwrap(),
        listen_tls: "[::]:0".parse().unwrap(),
        tls: None,
        external_ips: ["127.0.0.1", "::1"].map(|ip| ExternalIp::Address(ip.parse().unwrap())).into(),
        relay_ports: 49_152..=65_535,
        realm: REALM.into(),
        credentials: Credentials { users: BTreeMap::from([(USER.into(), PASSWORD.into())]), secrets: Vec::new() },
        limits: Limits { unauthenticated_per_second: 0, ..Limits::default() },
        allow_peers: Vec::new(),
        deny_peers: Vec::new(),
        drain: Duration::ZERO,
        threads: 2,
    }
}

async fn start(config: Config) -> Server {
    Server::bind(config).await.unwrap()
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Writes a new certificate, and returns it in DER.
fn certificate(folder: &Path) -> (TlsFiles, Vec<u8>) {
    let check_every = Duration::from_millis(20);
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    let files = TlsFiles { cert, key, may_come_later: false, check_every };
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(&files.cert, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    (files, made.cert.der().to_vec())
}

/// The value of a metric whose labels contain `label`, all series together.
fn counted(server: &Server, name: &str, label: &str) -> f64 {
    let families = server.telemetry().registry.gather();
    let metrics = families.iter().filter(|family| family.name() == name).flat_map(|family| family.get_metric());
    metrics
        .filter(|metric| label.is_empty() || metric.get_label().iter().any(|pair| pair.value() == label))
        .map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value())
        .sum()
}

/// Waits until a metric has a value.
fn until(server: &Server, name: &str, label: &str, value: f64) {
    let deadline = Instant::now() + PATIENCE;
    while counted(server, name, label) != value {
        assert!(Instant::now() < deadline, "{name} {label} is {}", counted(server, name, label));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A peer that is heard for a while.
fn peer(address: &str) -> UdpSocket {
    let peer = UdpSocket::bind(address).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    peer
}

/// Sends payloads of many sizes both ways.
fn echo(client: &mut Client, peer: &UdpSocket) {
    client.bind(peer.local_addr().unwrap()).unwrap();
    let mut buffer = vec![0; 1 << 16];
    for size in [1, 2, 3, 4, 100, 1_199, 1_400, 9_000] {
        client.transport.write(&channel_data(size)).unwrap();
        let (length, from) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!((length, from), (size, client.relayed));
        peer.send_to(&buffer[..length], client.relayed).unwrap();
        let back = client.transport.read().unwrap();
        assert_eq!(back[CHANNEL_HEAD..CHANNEL_HEAD + size], channel_data(size)[CHANNEL_HEAD..CHANNEL_HEAD + size]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_came_to_the_port_of_another_service_are_served_as_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = certificate(folder.path());
    let limits = Limits { address_connections: 3, ..config().limits };
    let server = start(Config { limits, ..config() }).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = WebTls {
        config: Certificate::load(files).unwrap().server_config().unwrap(),
        proofs: None,
        handshakes: prometheus::IntCounterVec::new(prometheus::Opts::new("handshakes", "Of the web."), &["result"])
            .unwrap(),
    };
    let web = WebListener::new(listener, Some(tls), Some(server.stun_taker()), 100).unwrap();
    tokio::task::block_in_place(|| {
        let tls = tls_config().unwrap();
        // As many as there are threads, so that each has one, and one more.
        let mut clients: Vec<Client> = (0..3)
            .map(|number| {
                let transport = match number {
                    0 => Transport::tcp(address),
                    _ => Transport::tls(address, &tls),
                };
                Client::allocate(transport.unwrap()).unwrap()
            })
            .collect();
        for client in &mut clients {
            echo(client, &peer("127.0.0.1:0"));
        }
        assert_eq!(counted(&server, "homeport_turn_streams", "tls"), 2.0);
        assert_eq!(counted(&server, "homeport_turn_streams", "tcp"), 1.0);
        // The quota of their address counts them too.
        assert!(Client::allocate(Transport::tls(address, &tls).unwrap()).is_err());
        until(&server, "homeport_turn_streams_ended_total", "refused", 1.0);
        drop(clients);
        until(&server, "homeport_turn_streams", "", 0.0);
        Client::allocate(Transport::tls(address, &tls).unwrap()).unwrap();
    });
    server.shutdown().await;
    drop(web);
}

#[tokio::test(flavor = "multi_thread")]
async fn udp_tcp_and_tls_carry_the_same_of_both_families() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = certificate(folder.path());
    let server = start(Config { tls: Some(files), ..config() }).await;
    let port = server.address().port();
    let tls_port = server.tls_address().unwrap().port();
    tokio::task::block_in_place(|| {
        let tls = tls_config().unwrap();
        for (ip, peer_address) in [("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0")] {
            let address = |port| SocketAddr::new(ip.parse().unwrap(), port);
            let transports = [
                Transport::udp(address(port)).unwrap(),
                Transport::tcp(address(port)).unwrap(),
                Transport::tls(address(tls_port), &tls).unwrap(),
            ];
            for transport in transports {
                let mut four = Client::allocate(transport).unwrap();
                assert!(four.relayed.is_ipv4());
                echo(&mut four, &peer("127.0.0.1:0"));
            }
            let family = [if peer_address.starts_with('[') { 2 } else { 1 }, 0, 0, 0];
            let family = RawAttribute { typ: ATTR_REQUESTED_ADDRESS_FAMILY, length: 4, value: family.to_vec() };
            let (mut client, _) = Client::allocate_with(Transport::tcp(address(port)).unwrap(), &[family]).unwrap();
            echo(&mut client, &peer(peer_address));
        }
        assert_eq!(counted(&server, "homeport_turn_tls_handshakes_total", "ok"), 2.0);
        assert_eq!(counted(&server, "homeport_turn_allocations_total", "tls"), 2.0);
        // Streams that are gone take their allocations with them.
        until(&server, "homeport_turn_streams", "", 0.0);
        until(&server, "homeport_turn_allocations_ended_total", "disconnected", 6.0);
    });
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_of_ports_is_had_by_another_client_on_any_thread() {
    let server = start(config()).await;
    let port = server.address().port();
    tokio::task::block_in_place(|| {
        // Kept, for a client on a port whose former owner has an allocation would be taken for that one.
        let mut kept = Vec::new();
        // Which thread a client reaches is the system's choice: of so many, some reach the other.
        for _ in 0..8 {
            let pair = RawAttribute { typ: ATTR_EVEN_PORT, length: 1, value: vec![0x80] };
            let (even, answer) = Client::allocate_with(Transport::udp(local(port)).unwrap(), &[pair]).unwrap();
            let token = answer.get(ATTR_RESERVATION_TOKEN).unwrap();
            let token = RawAttribute { typ: ATTR_RESERVATION_TOKEN, length: 8, value: token };
            let (mut odd, _) = Client::allocate_with(Transport::tcp(local(port)).unwrap(), &[token]).unwrap();
            assert_eq!(odd.relayed.port(), even.relayed.port() + 1);
            echo(&mut odd, &peer("127.0.0.1:0"));
            kept.push(even);
        }
    });
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_speak_turn_is_cut_off_and_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = certificate(folder.path());
    let limits = Limits { address_connections: 8, ..config().limits };
    let server = start(Config { tls: Some(files), limits, ..config() }).await;
    let (port, tls_port) = (server.address().port(), server.tls_address().unwrap().port());
    tokio::task::block_in_place(|| {
        let mut calm = Client::allocate(Transport::tcp(local(port)).unwrap()).unwrap();
        for (port, bytes) in [
            (port, &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..]),
            (port, &[0x16, 3, 1, 2, 0, 1, 0]),
            (port, &[0, 1, 0, 3, 0x21, 0x12, 0xa4, 0x42]),
            (port, &[0xff; 100]),
            (tls_port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        ] {
            let mut rude = TcpStream::connect(local(port)).unwrap();
            rude.set_read_timeout(Some(PATIENCE)).unwrap();
            rude.write_all(bytes).unwrap();
            let mut answer = Vec::new();
            // Reset or closed, and in the case of TLS told why.
            let _ = rude.read_to_end(&mut answer);
            assert!(answer.len() < 20, "{answer:?}");
        }
        until(&server, "homeport_turn_streams_ended_total", "malformed", 4.0);
        until(&server, "homeport_turn_streams_ended_total", "tls", 1.0);
        // One address has so many connections and no more.
        let held: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(local(port)).unwrap()).collect();
        until(&server, "homeport_turn_streams_ended_total", "refused", 13.0);
        until(&server, "homeport_turn_streams", "tcp", 8.0);
        drop(held);
        until(&server, "homeport_turn_streams", "tcp", 1.0);
        echo(&mut calm, &peer("127.0.0.1:0"));
    });
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_loses_packets_and_holds_nobody_up() {
    // One thread: who stalls it stalls all.
    let server = start(Config { threads: 1, ..config() }).await;
    let port = server.address().port();
    tokio::task::block_in_place(|| {
        let mut stalled = Client::allocate(Transport::tcp(local(port)).unwrap()).unwrap();
        let flooding = peer("127.0.0.1:0");
        stalled.bind(flooding.local_addr().unwrap()).unwrap();
        let mut calm = Client::allocate(Transport::tcp(local(port)).unwrap()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while counted(&server, "homeport_turn_drops_total", "slow_client") == 0.0 {
            assert!(Instant::now() < deadline, "nothing is dropped");
            for _ in 0..100 {
                flooding.send_to(&[7; 8_000], stalled.relayed).unwrap();
            }
        }
        echo(&mut calm, &peer("127.0.0.1:0"));
        // What it gets when it reads again is whole messages.
        for _ in 0..20 {
            assert_eq!(stalled.transport.read().unwrap().len(), CHANNEL_HEAD + 8_000);
        }
    });
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_for_new_clients_and_old_ones_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let (files, first) = certificate(folder.path());
    let server = start(Config { tls: Some(files), ..config() }).await;
    let address = local(server.tls_address().unwrap().port());
    tokio::task::block_in_place(|| {
        let mut old = Client::allocate(Transport::tls(address, &tls_config().unwrap()).unwrap()).unwrap();
        assert_eq!(old.transport.certificate(), Some(first));
        let (_, second) = certificate(folder.path());
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A client that was here before resumes its session, and sees no certificate: each is a new one.
            let client = Client::allocate(Transport::tls(address, &tls_config().unwrap()).unwrap()).unwrap();
            if client.transport.certificate().as_ref() == Some(&second) {
                break;
            }
            assert!(Instant::now() < deadline, "the old certificate is still in use");
        }
        echo(&mut old, &peer("127.0.0.1:0"));
    });
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_hold_over_all_threads_and_transports() {
    let allocations = Quotas { user: 0, address: 5, total: 0 };
    let server = start(Config { limits: Limits { allocations, ..config().limits }, ..config() }).await;
    let port = server.address().port();
    tokio::task::block_in_place(|| {
        let transport = |number: i32| {
            if number % 2 == 0 { Transport::udp(local(port)).unwrap() } else { Transport::tcp(local(port)).unwrap() }
        };
        let held: Vec<_> = (0..12).filter_map(|number| Client::allocate(transport(number)).ok()).collect();
        assert_eq!(held.len(), 5);
        assert_eq!(counted(&server, "homeport_turn_quota_hits_total", "address"), 7.0);
        drop(held);
        until(&server, "homeport_turn_allocations_ended_total", "disconnected", 2.0);
        assert!(Client::allocate(transport(1)).is_ok());
    });
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_comes_from_the_address_that_was_asked() {
    // Two addresses of one machine behind one socket for all: a client takes no answer from the other.
    let server = start(config()).await;
    let port = server.address().port();
    tokio::task::block_in_place(|| {
        for ip in [[127, 0, 0, 1], [127, 0, 0, 2], [127, 9, 9, 9]] {
            let mut client = Client::allocate(Transport::udp(SocketAddr::from((ip, port))).unwrap()).unwrap();
            echo(&mut client, &peer("127.0.0.1:0"));
        }
    });
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_datagram_is_relayed_whole() {
    let server = start(config()).await;
    let port = server.address().port();
    tokio::task::block_in_place(|| {
        let mut client = Client::allocate(Transport::tcp(local(port)).unwrap()).unwrap();
        let peer = peer("127.0.0.1:0");
        client.bind(peer.local_addr().unwrap()).unwrap();
        let mut buffer = vec![0; 1 << 16];
        for size in [0, 65_000, 0, 1] {
            client.transport.write(&channel_data(size)).unwrap();
            assert_eq!(peer.recv(&mut buffer).unwrap(), size);
            peer.send_to(&buffer[..size], client.relayed).unwrap();
            assert_eq!(client.transport.read().unwrap().len(), CHANNEL_HEAD + size.next_multiple_of(4));
        }
        let unknown = RawAttribute { typ: AttrType(0x7fff), length: 0, value: Vec::new() };
        assert!(Client::allocate_with(Transport::tcp(local(port)).unwrap(), &[unknown]).is_err());
    });
    server.shutdown().await;
}
