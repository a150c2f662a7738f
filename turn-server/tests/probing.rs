//! The probe, against our server and against another.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use service::TlsFiles;
use support::{PASSWORD, REALM, USER, tls_config};
use turn::auth::{AuthHandler, generate_auth_key};
use turn::relay::relay_static::RelayAddressGeneratorStatic;
use turn::server::config::{ConnConfig, ServerConfig};
use turn_server::{Config, Credentials, Limits, PROBE_NAME, Probe, ProbeError, ProbeTransport, Server, mint};
use webrtc_util::vnet::net::Net;

fn config() -> Config {
    Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        listen_tls: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        external_ips: vec!["127.0.0.1".parse().unwrap()],
        relay_ports: 49_152..=65_535,
        realm: REALM.into(),
        credentials: Credentials {
            users: BTreeMap::from([(USER.into(), PASSWORD.into())]),
            secrets: vec!["north".into()],
        },
        limits: Limits::default(),
        allow_peers: Vec::new(),
        deny_peers: Vec::new(),
        drain: Duration::ZERO,
        threads: 2,
    }
}

fn probe(server: SocketAddr, transport: ProbeTransport) -> Probe {
    let patience = Duration::from_secs(5);
    Probe { server, transport, username: USER.into(), password: PASSWORD.into(), patience }
}

/// How allocations ended, all together.
fn outcomes(server: &Server) -> f64 {
    let families = server.telemetry().registry.gather();
    let outcomes = families.iter().filter(|family| family.name() == "homeport_turn_allocation_outcomes_total");
    outcomes.flat_map(|family| family.get_metric()).map(|metric| metric.get_counter().get_value()).sum()
}

#[tokio::test]
async fn a_packet_goes_there_and_back_over_every_transport_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        cert: folder.path().join("cert.pem"),
        key: folder.path().join("key.pem"),
        may_come_later: false,
        check_every: Duration::from_secs(30),
    };
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(&files.cert, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let server = Server::bind(Config { tls: Some(files), ..config() }).await.unwrap();
    let tls = ProbeTransport::Tls(tls_config().unwrap(), "localhost".try_into().unwrap());
    let (plain, tls_address) = (server.address(), server.tls_address().unwrap());
    for (address, transport) in [(plain, ProbeTransport::Udp), (plain, ProbeTransport::Tcp), (tls_address, tls)] {
        let minted = mint("north", PROBE_NAME, SystemTime::now(), Duration::from_secs(60));
        let probe = Probe { username: minted.username, password: minted.password, ..probe(address, transport.clone()) };
        let echo = probe.echo().await.unwrap();
        assert_eq!(echo.relayed.ip(), plain.ip(), "{transport:?}");
    }
    assert_eq!(outcomes(&server), 0.0, "a probe is nobody's success");
    probe(plain, ProbeTransport::Udp).echo().await.unwrap();
    assert_eq!(outcomes(&server), 2.0, "any other user's is, and has been given back");
    server.shutdown().await;
}

#[tokio::test]
async fn what_is_wrong_is_said() {
    // A relayed address where nobody is.
    let elsewhere = vec!["203.0.113.9/127.0.0.1".parse().unwrap()];
    let server = Server::bind(Config { external_ips: elsewhere, ..config() }).await.unwrap();
    let hasty = |transport| Probe { patience: Duration::from_millis(900), ..probe(server.address(), transport) };
    let wrong = Probe { password: "wrong".into(), ..hasty(ProbeTransport::Tcp) };
    assert!(matches!(wrong.echo().await, Err(ProbeError::Unauthorized)));
    let tls = ProbeTransport::Tls(tls_config().unwrap(), "localhost".try_into().unwrap());
    assert!(matches!(hasty(tls).echo().await, Err(ProbeError::Tls(_))));
    let error = hasty(ProbeTransport::Udp).echo().await.unwrap_err();
    assert!(matches!(error, ProbeError::NoEcho(address) if address.ip().to_string() == "203.0.113.9"), "{error}");

    let nobody = server.address();
    server.shutdown().await;
    for transport in [ProbeTransport::Udp, ProbeTransport::Tcp] {
        let gone = Probe { patience: Duration::from_millis(900), ..probe(nobody, transport) };
        let error = gone.echo().await.unwrap_err();
        assert!(matches!(error, ProbeError::Unreachable(_) | ProbeError::Silent), "{error}");
    }
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let unheard = Probe { server: silent.local_addr().unwrap(), ..hasty_udp() };
    assert!(matches!(unheard.echo().await, Err(ProbeError::Silent)));
}

fn hasty_udp() -> Probe {
    Probe { patience: Duration::from_millis(900), ..probe(([127, 0, 0, 1], 9).into(), ProbeTransport::Udp) }
}

struct OneUser;

impl AuthHandler for OneUser {
    fn auth_handle(&self, username: &str, realm: &str, _: SocketAddr) -> Result<Vec<u8>, turn::Error> {
        Ok(generate_auth_key(username, realm, PASSWORD))
    }
}

#[tokio::test]
async fn the_server_of_another_house_is_understood() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let relay_addr_generator = Box::new(RelayAddressGeneratorStatic {
        relay_address: [127, 0, 0, 1].into(),
        address: "127.0.0.1".into(),
        net: Arc::new(Net::new(None)),
    });
    let server = turn::server::Server::new(ServerConfig {
        conn_configs: vec![ConnConfig { conn: Arc::new(socket), relay_addr_generator }],
        realm: "elsewhere".into(),
        auth_handler: Arc::new(OneUser),
        channel_bind_timeout: Duration::ZERO,
        alloc_close_notify: None,
    })
    .await
    .unwrap();
    let echo = probe(address, ProbeTransport::Udp).echo().await.unwrap();
    assert_eq!(echo.relayed.ip(), address.ip());
    server.close().await.unwrap();
}
