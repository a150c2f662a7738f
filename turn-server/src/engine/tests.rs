//! The engine with invented time and sockets.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use proptest::prelude::*;

use super::authentication::PASSWORD_ALGORITHMS;
use super::requests::UDP;
use super::*;
use crate::bucket::Rate;
use crate::credentials::Credentials;
use crate::message::{Algorithm, Builder, HEADER, Key, attribute};
use crate::nonce::Nonces;
use crate::peer_filter::PeerFilter;
use crate::quotas::{Ledger, Quotas};

const REALM: &str = "homeport";
const UNIX: u64 = 1_000_000;

/// Sockets that only take notes.
#[derive(Debug, Default)]
struct Notes {
    next: usize,
    open: BTreeMap<usize, (AllocationId, Family, u16)>,
    reserved: Vec<([u8; 8], Family, u16, Instant)>,
    /// Ports that somebody else has.
    taken: HashSet<u16>,
    to_clients: Vec<(ClientId, Vec<u8>)>,
    to_peers: Vec<(RelayId, SocketAddr, Vec<u8>, bool)>,
}

impl Notes {
    fn is_free(&self, port: u16) -> bool {
        !self.taken.contains(&port)
            && self.open.values().all(|(.., open)| *open != port)
            && self.reserved.iter().all(|(_, _, reserved, _)| *reserved != port)
    }

    fn insert(&mut self, allocation: AllocationId, family: Family, port: u16) -> RelayId {
        self.next += 1;
        self.open.insert(self.next, (allocation, family, port));
        RelayId(self.next)
    }
}

impl Edge for Notes {
    fn bind(&mut self, allocation: AllocationId, family: Family, port: u16) -> Result<RelayId, NoPort> {
        if self.is_free(port) { Ok(self.insert(allocation, family, port)) } else { Err(NoPort::InUse) }
    }

    fn reserve(&mut self, token: [u8; 8], family: Family, port: u16, until: Instant) -> Result<(), NoPort> {
        if !self.is_free(port) {
            return Err(NoPort::InUse);
        }
        self.reserved.push((token, family, port, until));
        Ok(())
    }

    fn claim(&mut self, token: [u8; 8], allocation: AllocationId, now: Instant) -> Option<(RelayId, Family, u16)> {
        let at = self.reserved.iter().position(|(known, _, _, until)| *known == token && *until > now)?;
        let (_, family, port, _) = self.reserved.remove(at);
        Some((self.insert(allocation, family, port), family, port))
    }

    fn close(&mut self, relay: RelayId) {
        assert!(self.open.remove(&relay.0).is_some(), "closed twice");
    }

    fn to_client(&mut self, client: ClientId, parts: [&[u8]; 3]) {
        self.to_clients.push((client, parts.concat()));
    }

    fn to_peer(&mut self, relay: RelayId, peer: SocketAddr, payload: &[u8], dont_fragment: bool) {
        assert!(self.open.contains_key(&relay.0));
        self.to_peers.push((relay, peer, payload.to_vec(), dont_fragment));
    }
}

/// A server and the moment.
struct World {
    engine: Engine,
    edge: Notes,
    start: Instant,
    seconds: u64,
}

fn rules() -> Rules {
    Rules {
        realm: REALM.into(),
        credentials: Credentials {
            users: BTreeMap::from([("alice".into(), "pass".into()), ("bob".into(), "word".into())]),
            secrets: vec!["north".into()],
        },
        nonces: Nonces::new([7; 32], 3_600),
        relay_ports: 50_000..=50_099,
        max_lifetime: 3_600,
        expiry_grace: 60,
        allocation_bandwidth: Rate { per_second: 0, burst_seconds: 1 },
        unauthenticated: Rate { per_second: 0, burst_seconds: 1 },
        ledger: Ledger::new(Quotas::default()),
        bandwidth: TotalBandwidth::new(Rate { per_second: 0, burst_seconds: 1 }, Instant::now()),
    }
}

fn world() -> World {
    with(rules())
}

fn with(rules: Rules) -> World {
    let v4: IpAddr = "9.9.9.9".parse().unwrap();
    let v6: IpAddr = "2606:4700::9".parse().unwrap();
    let place = Place { v4: Some(v4), v6: Some(v6), peers: PeerFilter::new([v4, v6], &[], &[]) };
    let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
    let engine = Engine::new(Arc::new(rules), place, metrics, [3; 32]);
    World { engine, edge: Notes::default(), start: Instant::now(), seconds: 0 }
}

fn client(port: u16) -> ClientId {
    ClientId {
        transport: Transport::Udp,
        address: SocketAddr::new("192.0.2.1".parse().unwrap(), port),
        server: "9.9.9.9:3478".parse().unwrap(),
    }
}

fn peer(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// What a client asks.
#[derive(Clone)]
struct Ask {
    method: Method,
    attributes: Vec<(u16, Vec<u8>)>,
    peers: Vec<SocketAddr>,
    username: String,
    password: String,
    realm: String,
    nonce: Option<Vec<u8>>,
    transaction: Option<TransactionId>,
    sha256: bool,
    fingerprint: bool,
}

fn ask(method: Method) -> Ask {
    Ask {
        method,
        attributes: Vec::new(),
        peers: Vec::new(),
        username: "alice".into(),
        password: "pass".into(),
        realm: REALM.into(),
        nonce: None,
        transaction: None,
        sha256: false,
        fingerprint: false,
    }
}

fn allocate() -> Ask {
    ask(Method::Allocate).with(attribute::REQUESTED_TRANSPORT, &[UDP, 0, 0, 0])
}

impl Ask {
    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.attributes.push((kind, value.to_vec()));
        self
    }

    fn to(mut self, address: &str) -> Self {
        self.peers.push(peer(address));
        self
    }

    fn by(mut self, username: &str, password: &str) -> Self {
        (self.username, self.password) = (username.into(), password.into());
        self
    }
}

/// An answer as its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Answer(Vec<u8>);

impl Answer {
    fn message(&self) -> Message<'_> {
        Message::parse(&self.0).unwrap()
    }

    fn attribute(&self, kind: u16) -> Option<Vec<u8>> {
        let mut at = HEADER;
        while at < self.0.len() {
            let length = usize::from(u16::from_be_bytes([self.0[at + 2], self.0[at + 3]]));
            if u16::from_be_bytes([self.0[at], self.0[at + 1]]) == kind {
                return Some(self.0[at + 4..at + 4 + length].to_vec());
            }
            at += 4 + length.next_multiple_of(4);
        }
        None
    }

    /// 0 for success.
    fn code(&self) -> u16 {
        match self.message().class {
            Class::Success => 0,
            _ => {
                self.attribute(attribute::ERROR_CODE).map(|code| u16::from(code[2]) * 100 + u16::from(code[3])).unwrap()
            }
        }
    }

    fn address(&self, kind: u16) -> SocketAddr {
        self.message().address(&self.attribute(kind).unwrap()).unwrap()
    }

    fn lifetime(&self) -> u32 {
        u32::from_be_bytes(self.attribute(attribute::LIFETIME).unwrap().try_into().unwrap())
    }
}

impl World {
    fn now(&self) -> Now {
        Now { instant: self.start + Duration::from_secs(self.seconds), unix: UNIX + self.seconds }
    }

    fn pass(&mut self, seconds: u64) {
        self.seconds += seconds;
        let now = self.now().instant;
        self.engine.expire(now, &mut self.edge);
    }

    fn raw(&mut self, client: ClientId, bytes: &[u8]) -> Option<Answer> {
        self.edge.to_clients.clear();
        let now = self.now();
        self.engine.client_message(now, client, bytes, &mut self.edge);
        assert!(self.edge.to_clients.len() <= 1);
        self.edge.to_clients.pop().map(|(to, bytes)| {
            assert_eq!(to, client);
            Answer(bytes)
        })
    }

    fn transaction(&mut self) -> TransactionId {
        let bytes = Builder::new(
            Class::Request,
            Method::Binding,
            Message::parse(&unauthenticated(Method::Binding)).unwrap().transaction,
        )
        .finish();
        let mut bytes = bytes;
        self.engine.rng.fill(&mut bytes[8..HEADER]);
        Message::parse(&bytes).unwrap().transaction
    }

    fn bytes_of(&mut self, client: ClientId, ask: &Ask) -> Vec<u8> {
        let transaction = ask.transaction.unwrap_or_else(|| self.transaction());
        let mut builder = Builder::new(Class::Request, ask.method, transaction);
        for (kind, value) in &ask.attributes {
            builder = builder.attribute(*kind, value);
        }
        for peer in &ask.peers {
            builder = builder.address(attribute::XOR_PEER_ADDRESS, *peer);
        }
        let nonce = ask.nonce.clone().unwrap_or_else(|| self.engine.rules.nonces.make(client.address, self.now().unix));
        builder = builder
            .attribute(attribute::USERNAME, ask.username.as_bytes())
            .attribute(attribute::REALM, ask.realm.as_bytes())
            .attribute(attribute::NONCE, &nonce);
        let algorithm = if ask.sha256 { Algorithm::Sha256 } else { Algorithm::Md5 };
        if ask.sha256 {
            builder = builder
                .attribute(attribute::PASSWORD_ALGORITHM, &[0, 2, 0, 0])
                .attribute(attribute::PASSWORD_ALGORITHMS, &PASSWORD_ALGORITHMS);
        }
        builder = builder.integrity(&Key::long_term(algorithm, &ask.username, &ask.realm, &ask.password), ask.sha256);
        if ask.fingerprint { builder.fingerprint() } else { builder }.finish()
    }

    fn answer(&mut self, client: ClientId, ask: &Ask) -> Answer {
        let bytes = self.bytes_of(client, ask);
        self.raw(client, &bytes).expect("silence")
    }

    /// The code of the answer, 0 for success.
    fn code(&mut self, client: ClientId, ask: &Ask) -> u16 {
        self.answer(client, ask).code()
    }

    /// An allocation for a client, and its relayed address.
    fn allocated(&mut self, client: ClientId) -> SocketAddr {
        let answer = self.answer(client, &allocate());
        assert_eq!(answer.code(), 0);
        answer.address(attribute::XOR_RELAYED_ADDRESS)
    }

    fn hear_peer(&mut self, client: ClientId, from: &str, payload: &[u8]) -> Option<Vec<u8>> {
        self.edge.to_clients.clear();
        let id = self.engine.by_client[&client];
        let now = self.now().instant;
        self.engine.peer_datagram(now, id, peer(from), payload, &mut self.edge);
        self.edge.to_clients.pop().map(|(_, bytes)| bytes)
    }

    fn send(&mut self, client: ClientId, to: &str, payload: &[u8]) -> bool {
        let bytes = Builder::new(Class::Indication, Method::Send, self.transaction())
            .address(attribute::XOR_PEER_ADDRESS, peer(to))
            .attribute(attribute::DATA, payload)
            .finish();
        self.relayed(client, &bytes) == 1
    }

    fn relayed(&mut self, client: ClientId, bytes: &[u8]) -> usize {
        self.edge.to_peers.clear();
        assert_eq!(self.raw(client, bytes), None);
        self.edge.to_peers.len()
    }
}

fn unauthenticated(method: Method) -> Vec<u8> {
    let mut bytes = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    bytes.extend_from_slice(b"transaction!");
    let transaction = Message::parse(&bytes).unwrap().transaction;
    Builder::new(Class::Request, method, transaction).finish()
}

fn channel_data(number: u16, payload: &[u8]) -> Vec<u8> {
    [&number.to_be_bytes()[..], &u16::try_from(payload.len()).unwrap().to_be_bytes(), payload].concat()
}

fn bind(number: u16, to: &str) -> Ask {
    let [high, low] = number.to_be_bytes();
    ask(Method::ChannelBind).with(attribute::CHANNEL_NUMBER, &[high, low, 0, 0]).to(to)
}

#[test]
fn a_binding_request_is_answered_with_the_address_it_came_from() {
    let mut world = world();
    for address in ["192.0.2.1:1000", "[2001:db8::1]:1000"] {
        let client = ClientId { address: peer(address), ..client(1) };
        let answer = world.raw(client, &unauthenticated(Method::Binding)).unwrap();
        assert_eq!(answer.address(attribute::XOR_MAPPED_ADDRESS), peer(address));
        assert!(!answer.message().attributes.has_fingerprint, "not asked for");
    }
}

#[test]
fn each_error_code_is_given_where_the_rfcs_say_so() {
    let family = |number| [number, 0, 0, 0];
    let mut nonce_of_another = rules().nonces.make(peer("192.0.2.1:9"), UNIX);
    let old = rules().nonces.make(client(1).address, UNIX - 3_601);
    let stale = |nonce: &[u8]| Ask { nonce: Some(nonce.to_vec()), ..allocate() };
    let no_algorithms = Ask { sha256: false, ..allocate() }.with(attribute::PASSWORD_ALGORITHM, &[0, 2, 0, 0]);
    let bid_down = allocate()
        .with(attribute::PASSWORD_ALGORITHM, &[0, 1, 0, 0])
        .with(attribute::PASSWORD_ALGORITHMS, &[0, 1, 0, 0]);
    let transport = attribute::REQUESTED_TRANSPORT;
    let before: [(u16, &str, Ask); 24] = [
        (0, "an allocation", allocate()),
        (0, "one by SHA-256", Ask { sha256: true, ..allocate() }),
        (400, "no transport", ask(Method::Allocate)),
        (442, "TCP to peers", ask(Method::Allocate).with(transport, &[6, 0, 0, 0])),
        (400, "a short transport", ask(Method::Allocate).with(transport, &[17])),
        (401, "a wrong password", allocate().by("alice", "word")),
        (401, "an unknown user", allocate().by("carol", "pass")),
        (401, "a wrong realm", Ask { realm: "elsewhere".into(), ..allocate() }),
        (438, "a nonce of another client", stale(&nonce_of_another)),
        (438, "an old nonce", stale(&old)),
        (438, "no nonce of ours", stale(b"nonce")),
        (400, "an algorithm without the list", no_algorithms),
        (400, "a list that was cut on the way", bid_down),
        (420, "an unknown attribute", allocate().with(0x7f01, b"?")),
        (440, "an unknown family", allocate().with(attribute::REQUESTED_ADDRESS_FAMILY, &family(3))),
        (400, "a short family", allocate().with(attribute::REQUESTED_ADDRESS_FAMILY, &[1])),
        (400, "IPv4 as well", allocate().with(attribute::ADDITIONAL_ADDRESS_FAMILY, &family(1))),
        (
            400,
            "two families twice",
            allocate()
                .with(attribute::REQUESTED_ADDRESS_FAMILY, &family(1))
                .with(attribute::ADDITIONAL_ADDRESS_FAMILY, &family(2)),
        ),
        (
            400,
            "a pair of ports in two families",
            allocate().with(attribute::EVEN_PORT, &[0x80]).with(attribute::ADDITIONAL_ADDRESS_FAMILY, &family(2)),
        ),
        (
            400,
            "a token and an even port",
            allocate().with(attribute::RESERVATION_TOKEN, &[0; 8]).with(attribute::EVEN_PORT, &[0]),
        ),
        (400, "a short token", allocate().with(attribute::RESERVATION_TOKEN, &[0; 7])),
        (508, "an unknown token", allocate().with(attribute::RESERVATION_TOKEN, &[0; 8])),
        (437, "a refresh of nothing", ask(Method::Refresh)),
        (437, "a permission for nothing", ask(Method::CreatePermission).to("8.8.8.8:1")),
    ];
    for (code, what, ask) in before {
        assert_eq!(world().code(client(1), &ask), code, "{what}");
    }
    nonce_of_another.clear();

    let channel = |value: &[u8]| ask(Method::ChannelBind).with(attribute::CHANNEL_NUMBER, value);
    let permission = || ask(Method::CreatePermission);
    let after: [(u16, &str, Ask); 25] = [
        (437, "a second allocation", allocate()),
        (0, "a refresh", ask(Method::Refresh)),
        (400, "a short lifetime", ask(Method::Refresh).with(attribute::LIFETIME, &[0, 0])),
        (443, "another family", ask(Method::Refresh).with(attribute::REQUESTED_ADDRESS_FAMILY, &family(2))),
        (441, "somebody else's refresh", ask(Method::Refresh).by("bob", "word")),
        (441, "somebody else's permission", permission().to("8.8.8.8:1").by("bob", "word")),
        (441, "somebody else's channel", bind(0x4000, "8.8.8.8:1").by("bob", "word")),
        (0, "permissions", permission().to("8.8.8.8:1").to("8.8.4.4:2")),
        (400, "a permission for nobody", permission()),
        (400, "a peer that is none", permission().with(attribute::XOR_PEER_ADDRESS, &[0, 1])),
        (443, "a peer of another family", permission().to("[2606:4700::1]:1")),
        (403, "a private peer", permission().to("10.0.0.1:1")),
        (403, "metadata of a cloud", permission().to("169.254.169.254:80")),
        (403, "loopback in IPv6 spelling", permission().to("[::ffff:127.0.0.1]:1")),
        (403, "one good and one private peer", permission().to("8.8.8.8:1").to("10.0.0.1:1")),
        (403, "a channel to a private peer", bind(0x4000, "192.168.0.1:1")),
        (0, "a channel", bind(0x4000, "8.8.8.8:1")),
        (400, "no number", ask(Method::ChannelBind).to("8.8.8.8:1")),
        (400, "no peer", channel(&[0x40, 0, 0, 0])),
        (400, "a number below", bind(0x3fff, "8.8.8.8:1")),
        (400, "a number above", bind(0x8000, "8.8.8.8:1")),
        (443, "a channel of another family", bind(0x4000, "[2606:4700::1]:1")),
        (420, "an unknown attribute", permission().to("8.8.8.8:1").with(0x7f01, b"?")),
        (401, "no such user", ask(Method::Refresh).by("carol", "pass")),
        (438, "an old nonce", Ask { nonce: Some(old), ..ask(Method::Refresh) }),
    ];
    for (code, what, ask) in after {
        let mut world = world();
        world.allocated(client(1));
        let answer = world.answer(client(1), &ask);
        assert_eq!(answer.code(), code, "{what}");
        if code == 420 {
            assert_eq!(answer.attribute(attribute::UNKNOWN_ATTRIBUTES), Some(vec![0x7f, 0x01]));
        }
    }
}

#[test]
fn a_stranger_learns_realm_and_nonce_and_little_more() {
    let mut world = world();
    for method in [Method::Allocate, Method::Refresh, Method::CreatePermission, Method::ChannelBind] {
        let request = unauthenticated(method);
        let answer = world.raw(client(1), &request).unwrap();
        assert_eq!(answer.code(), 401);
        assert_eq!(answer.attribute(attribute::REALM).unwrap(), REALM.as_bytes());
        let nonce = answer.attribute(attribute::NONCE).unwrap();
        assert!(world.engine.rules.nonces.is_fresh(&nonce, client(1).address, UNIX));
        assert!(answer.attribute(attribute::PASSWORD_ALGORITHMS).is_some());
        // What an attacker gets for a forged source address: 112 bytes for the smallest request, and with IP and UDP
        // headers less than three times what it sent. coturn 4.6 answers with as many.
        assert!(answer.0.len() <= 6 * request.len(), "{} for {}", answer.0.len(), request.len());
        assert!(answer.0.len() + 28 < 3 * (request.len() + 28), "{} for {}", answer.0.len(), request.len());
    }
    // Integrity without all that belongs to it.
    let incomplete = Builder::new(Class::Request, Method::Allocate, world.transaction())
        .attribute(attribute::USERNAME, b"alice")
        .integrity(&Key::short_term("x"), false)
        .finish();
    assert_eq!(world.raw(client(1), &incomplete).unwrap().code(), 400);
}

#[test]
fn answers_are_protected_as_the_request_was() {
    for (sha256, algorithm) in [(false, Algorithm::Md5), (true, Algorithm::Sha256)] {
        let mut world = world();
        let answer = world.answer(client(1), &Ask { sha256, fingerprint: true, ..allocate() });
        let message = answer.message();
        assert!(message.is_by(&Key::long_term(algorithm, "alice", REALM, "pass")));
        assert_eq!(message.attributes.has_integrity_sha256(), sha256);
        assert!(message.attributes.has_fingerprint);
    }
}

#[test]
fn an_allocation_lives_as_long_as_it_is_refreshed() {
    let mut world = world();
    let relayed = world.allocated(client(1));
    assert_eq!(relayed.ip(), "9.9.9.9".parse::<IpAddr>().unwrap());
    assert!((50_000..=50_099).contains(&relayed.port()));
    world.pass(599);
    let refreshed = world.answer(client(1), &ask(Method::Refresh).with(attribute::LIFETIME, &3_000_u32.to_be_bytes()));
    assert_eq!(refreshed.lifetime(), 3_000);
    world.pass(2_999);
    assert_eq!((world.engine.len(), world.edge.open.len()), (1, 1));
    world.pass(1);
    assert_eq!((world.engine.len(), world.edge.open.len()), (0, 0));
    assert!(world.engine.deadline().is_none());
    for (asked, granted) in [(0, 600), (1, 600), (700, 700), (9_999_999, 3_600)] {
        let mut world = super::tests::world();
        let answer = world.answer(client(1), &allocate().with(attribute::LIFETIME, &u32::to_be_bytes(asked)));
        assert_eq!(answer.lifetime(), granted, "{asked}");
    }
}

#[test]
fn a_request_that_comes_again_gets_the_same_answer() {
    let mut world = world();
    let bytes = world.bytes_of(client(1), &allocate().with(attribute::EVEN_PORT, &[0x80]));
    let first = world.raw(client(1), &bytes).unwrap();
    assert_eq!(world.raw(client(1), &bytes).unwrap(), first);
    assert_eq!(world.engine.len(), 1);
    for again in [
        bind(0x4001, "8.8.8.8:1"),
        ask(Method::CreatePermission).to("8.8.8.8:1"),
        ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4]),
    ] {
        let bytes = world.bytes_of(client(1), &again);
        let first = world.raw(client(1), &bytes).unwrap();
        assert_eq!(first.code(), 0);
        assert_eq!(world.raw(client(1), &bytes).unwrap(), first);
    }
    assert_eq!(world.engine.len(), 0);
    // Another request to end what is no more is another thing, and so is the same one long after.
    let end = ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4]);
    assert_eq!(world.code(client(1), &end), 437);
}

#[test]
fn another_user_gets_no_answer_of_this_one() {
    let mut world = world();
    let transaction = Some(world.transaction());
    for _ in 0..2 {
        assert_eq!(world.code(client(1), &Ask { transaction, ..allocate() }), 0);
    }
    assert_eq!(world.code(client(1), &Ask { transaction, ..allocate().by("bob", "word") }), 437);
}

#[test]
fn clients_are_told_apart_by_all_of_their_five_tuple() {
    let mut world = world();
    let one = client(1);
    let others = [
        client(2),
        ClientId { address: peer("192.0.2.2:1"), ..one },
        ClientId { server: peer("9.9.9.9:443"), ..one },
        ClientId { transport: Transport::Tcp, ..one },
    ];
    let mut seen = HashSet::from([world.allocated(one)]);
    for other in others {
        assert!(seen.insert(world.allocated(other)));
    }
    assert_eq!(world.engine.len(), 5);
    assert_eq!(world.code(one, &ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4])), 0);
    assert_eq!(world.engine.len(), 4);
}

#[test]
fn data_goes_both_ways_where_there_is_a_permission_and_as_long() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert!(!world.send(one, "8.8.8.8:53", b"too early"));
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"too early"), None);
    assert_eq!(world.code(one, &ask(Method::CreatePermission).to("8.8.8.8:1").to("8.8.4.4:1")), 0);
    for other in ["8.8.8.8:53", "8.8.4.4:99"] {
        // Permissions are for addresses, whatever the port.
        assert!(world.send(one, other, b"out"), "{other}");
        let bytes = world.hear_peer(one, other, b"hello").unwrap();
        let message = Message::parse(&bytes).unwrap();
        assert_eq!((message.method, message.class), (Method::Data, Class::Indication));
        assert_eq!(message.attributes.data, Some(&b"hello"[..]));
        assert_eq!(message.peers().collect::<Vec<_>>(), [Some(peer(other))]);
    }
    assert!(!world.send(one, "1.1.1.1:53", b"out"));
    world.pass(299);
    assert!(world.send(one, "8.8.8.8:53", b"still"));
    world.pass(1);
    assert!(!world.send(one, "8.8.8.8:53", b"expired"));
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"expired"), None);
}

#[test]
fn refused_peers_leave_no_permission_behind() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.code(one, &ask(Method::CreatePermission).to("8.8.8.8:1").to("10.0.0.1:1")), 403);
    assert!(!world.send(one, "8.8.8.8:53", b"all or nothing"));
    assert!(!world.send(one, "10.0.0.1:53", b"never"));
}

#[test]
fn dont_fragment_is_passed_on() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.code(one, &ask(Method::CreatePermission).to("8.8.8.8:1")), 0);
    let bytes = Builder::new(Class::Indication, Method::Send, world.transaction())
        .address(attribute::XOR_PEER_ADDRESS, peer("8.8.8.8:1"))
        .attribute(attribute::DONT_FRAGMENT, &[])
        .attribute(attribute::DATA, b"whole")
        .finish();
    assert_eq!(world.relayed(one, &bytes), 1);
    assert!(world.edge.to_peers[0].3);
}

#[test]
fn a_channel_carries_data_until_it_expires() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.relayed(one, &channel_data(0x4000, b"early")), 0);
    assert_eq!(world.code(one, &bind(0x4000, "8.8.8.8:53")), 0);
    let mut padded = channel_data(0x4000, b"hello");
    padded.extend_from_slice(&[0; 3]);
    for bytes in [channel_data(0x4000, b"hello"), padded] {
        assert_eq!(world.relayed(one, &bytes), 1);
        let (_, to, payload, _) = &world.edge.to_peers[0];
        assert_eq!((*to, &payload[..]), (peer("8.8.8.8:53"), &b"hello"[..]));
    }
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"back"), Some(channel_data(0x4000, b"back")));
    // Another port has no channel, though the permission that came with it.
    assert!(world.hear_peer(one, "8.8.8.8:54", b"back").unwrap()[0] < 0x40);
    for bytes in [&channel_data(0x4001, b"x")[..], &[0x40, 0, 0, 9, 1], &[0x40, 0], &[0x40]] {
        assert_eq!(world.relayed(one, bytes), 0);
    }
    // Number and peer belong together until they have expired.
    assert_eq!(world.code(one, &bind(0x4000, "8.8.4.4:53")), 400);
    assert_eq!(world.code(one, &bind(0x4001, "8.8.8.8:53")), 400);
    world.pass(300);
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"back"), None, "its permission is shorter");
    assert_eq!(world.code(one, &ask(Method::Refresh).with(attribute::LIFETIME, &3_000_u32.to_be_bytes())), 0);
    world.pass(299);
    assert_eq!(world.relayed(one, &channel_data(0x4000, b"last")), 1);
    world.pass(1);
    assert_eq!(world.relayed(one, &channel_data(0x4000, b"late")), 0);
    assert_eq!(world.code(one, &bind(0x4001, "8.8.8.8:53")), 0);
    assert_eq!(world.code(one, &bind(0x4000, "8.8.4.4:53")), 0);
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"back"), Some(channel_data(0x4001, b"back")));
}

#[test]
fn streams_get_padding_and_datagrams_do_not() {
    let mut world = world();
    let stream = ClientId { transport: Transport::Tls, ..client(1) };
    world.allocated(stream);
    assert_eq!(world.code(stream, &bind(0x4000, "8.8.8.8:53")), 0);
    let bytes = world.hear_peer(stream, "8.8.8.8:53", b"hello").unwrap();
    assert_eq!(bytes, [&channel_data(0x4000, b"hello")[..], &[0; 3]].concat());
    let now = world.now().instant;
    world.engine.disconnect(&stream, now, &mut world.edge);
    assert_eq!((world.engine.len(), world.edge.open.len()), (0, 0));
}

#[test]
fn a_pair_of_ports_goes_to_who_has_the_token() {
    let mut world = world();
    let answer = world.answer(client(1), &allocate().with(attribute::EVEN_PORT, &[0x80]));
    let even = answer.address(attribute::XOR_RELAYED_ADDRESS).port();
    let token = answer.attribute(attribute::RESERVATION_TOKEN).unwrap();
    assert_eq!(even % 2, 0);
    let answer = world.answer(client(2), &allocate().with(attribute::RESERVATION_TOKEN, &token));
    assert_eq!(answer.address(attribute::XOR_RELAYED_ADDRESS).port(), even + 1);
    assert_eq!(world.code(client(3), &allocate().with(attribute::RESERVATION_TOKEN, &token)), 508, "only once");
    let answer = world.answer(client(3), &allocate().with(attribute::EVEN_PORT, &[0x80]));
    let token = answer.attribute(attribute::RESERVATION_TOKEN).unwrap();
    world.pass(31);
    assert_eq!(world.code(client(4), &allocate().with(attribute::RESERVATION_TOKEN, &token)), 508, "too late");
    let answer = world.answer(client(5), &allocate().with(attribute::EVEN_PORT, &[0]));
    assert!(answer.attribute(attribute::RESERVATION_TOKEN).is_none());
    assert_eq!(answer.address(attribute::XOR_RELAYED_ADDRESS).port() % 2, 0);
}

#[test]
fn families_are_had_one_by_one_or_both() {
    let mut world = world();
    let v6 = allocate().with(attribute::REQUESTED_ADDRESS_FAMILY, &[2, 0, 0, 0]);
    assert!(world.answer(client(1), &v6).address(attribute::XOR_RELAYED_ADDRESS).is_ipv6());
    assert_eq!(world.code(client(1), &ask(Method::CreatePermission).to("8.8.8.8:1")), 443);
    let both = allocate().with(attribute::ADDITIONAL_ADDRESS_FAMILY, &[2, 0, 0, 0]);
    assert_eq!(world.code(client(2), &both), 0);
    assert_eq!(world.edge.open.len(), 3);
    assert_eq!(world.code(client(2), &ask(Method::CreatePermission).to("8.8.8.8:1").to("[2606:4700::1]:1")), 0);
    assert!(world.send(client(2), "[2606:4700::1]:9", b"six") && world.send(client(2), "8.8.8.8:9", b"four"));
    // One family goes, the other stays.
    let end = |family| {
        ask(Method::Refresh)
            .with(attribute::LIFETIME, &[0; 4])
            .with(attribute::REQUESTED_ADDRESS_FAMILY, &[family, 0, 0, 0])
    };
    assert_eq!(world.code(client(2), &end(1)), 0);
    assert_eq!((world.engine.len(), world.edge.open.len()), (2, 2));
    assert!(!world.send(client(2), "8.8.8.8:9", b"four") && world.send(client(2), "[2606:4700::1]:9", b"six"));
    assert_eq!(world.code(client(2), &end(2)), 0);
    assert_eq!((world.engine.len(), world.edge.open.len()), (1, 1));

    world.engine.set_place(Place { v6: None, ..world.engine.place.clone() });
    assert_eq!(world.code(client(3), &v6), 440);
    let answer = world.answer(client(4), &both);
    assert_eq!(answer.code(), 0);
    assert_eq!(answer.attribute(attribute::ADDRESS_ERROR_CODE).unwrap()[..4], [2, 0, 4, 40]);
}

#[test]
fn every_port_of_the_range_is_found_and_no_other() {
    let mut world = with(Rules { relay_ports: 50_000..=50_007, ..rules() });
    world.edge.taken = HashSet::from([50_003]);
    let mut ports = HashSet::new();
    for number in 0..7 {
        assert!(ports.insert(world.allocated(client(number)).port()));
    }
    assert_eq!(world.code(client(100), &allocate()), 508);
    assert!(ports.iter().all(|port| (50_000..=50_007).contains(port) && *port != 50_003));
    assert_eq!(world.code(client(3), &ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4])), 0);
    world.allocated(client(101));
}

#[test]
fn quotas_end_with_486_and_draining_with_508() {
    let quotas = Quotas { user: 2, address: 3, total: 0 };
    let mut world = with(Rules { ledger: Ledger::new(quotas), ..rules() });
    world.allocated(client(1));
    world.allocated(client(2));
    assert_eq!(world.code(client(3), &allocate()), 486);
    assert_eq!(world.code(client(3), &allocate().by("bob", "word")), 0);
    assert_eq!(world.code(client(4), &allocate().by("bob", "word")), 486, "its address has three");
    world.pass(600);
    world.allocated(client(4));
    world.engine.drain();
    assert_eq!(world.code(client(5), &allocate()), 508);
    assert_eq!(world.code(client(4), &ask(Method::Refresh)), 0, "what is there goes on");
}

#[test]
fn time_limited_credentials_end_their_allocations() {
    let mut world = world();
    let minted =
        crate::mint("north", "app", std::time::UNIX_EPOCH + Duration::from_secs(UNIX), Duration::from_secs(1_000));
    let ours = |ask: Ask| ask.by(&minted.username, &minted.password);
    assert_eq!(world.answer(client(1), &ours(allocate())).code(), 0);
    world.pass(500);
    assert_eq!(world.answer(client(1), &ours(ask(Method::Refresh))).lifetime(), 560, "with 60 seconds of grace");
    world.pass(501);
    assert_eq!(world.code(client(2), &ours(allocate())), 401, "it has expired");
    assert_eq!(world.answer(client(1), &ours(ask(Method::Refresh))).lifetime(), 59);
    world.pass(58);
    assert_eq!(world.engine.len(), 1);
    world.pass(1);
    assert_eq!(world.engine.len(), 0);
}

#[test]
fn bandwidth_is_kept_and_what_is_over_it_dropped() {
    let rate = Rate { per_second: 1_000, burst_seconds: 1 };
    let mut world = with(Rules { allocation_bandwidth: rate, ..rules() });
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.code(one, &bind(0x4000, "8.8.8.8:53")), 0);
    let sent = (0..20).filter(|_| world.relayed(one, &channel_data(0x4000, &[0; 100])) == 1).count();
    assert_eq!(sent, 10);
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", &[0; 100]), None, "both ways together");
    world.pass(1);
    assert!(world.hear_peer(one, "8.8.8.8:53", &[0; 100]).is_some());
    let mut world = with(Rules { bandwidth: TotalBandwidth::new(rate, Instant::now()), ..rules() });
    for number in 1..=2 {
        world.allocated(client(number));
        assert_eq!(world.code(client(number), &bind(0x4000, "8.8.8.8:53")), 0);
    }
    let sent: usize =
        (0..20).map(|number| world.relayed(client(1 + number % 2), &channel_data(0x4000, &[0; 100]))).sum();
    assert_eq!(sent, 10);
}

#[test]
fn strangers_are_answered_only_so_often() {
    let mut world = with(Rules { unauthenticated: Rate { per_second: 10, burst_seconds: 1 }, ..rules() });
    for method in [Method::Allocate, Method::Binding] {
        let answered = (0..100).filter(|_| world.raw(client(1), &unauthenticated(method)).is_some()).count();
        assert_eq!(answered, 10);
        world.pass(1);
    }
    // Guessing passwords is as slow.
    let answered = (0..100)
        .filter(|_| {
            let bytes = world.bytes_of(client(1), &allocate().by("alice", "guess"));
            world.raw(client(1), &bytes).is_some()
        })
        .count();
    assert_eq!(answered, 10);
    world.allocated(client(1));
}

#[test]
fn what_is_no_request_gets_no_answer() {
    let mut world = world();
    let transaction = world.transaction();
    for bytes in [
        Builder::new(Class::Indication, Method::Binding, transaction).finish(),
        Builder::new(Class::Success, Method::Binding, transaction).finish(),
        Builder::new(Class::Error, Method::Allocate, transaction).finish(),
        Builder::new(Class::Request, Method::Send, transaction).finish(),
        Builder::new(Class::Indication, Method::Allocate, transaction).finish(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 20],
        Vec::new(),
    ] {
        assert_eq!(world.raw(client(1), &bytes), None);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Allocate(u16),
    Refresh(u16, u32),
    Permit(u16, u8),
    Bind(u16, u16, u8),
    Send(u16, u8),
    Channel(u16, u16),
    Peer(u16, u8),
    Disconnect(u16),
    Wait(u64),
    Noise(u16, Vec<u8>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let client = 0..4_u16;
    let peer = 0..4_u8;
    let number = 0x3fff..0x4003_u16;
    let step = prop_oneof![
        4 => client.clone().prop_map(Step::Allocate),
        2 => (client.clone(), prop_oneof![Just(0), 0..5_000_u32]).prop_map(|(client, lifetime)| Step::Refresh(client, lifetime)),
        3 => (client.clone(), peer.clone()).prop_map(|(client, peer)| Step::Permit(client, peer)),
        3 => (client.clone(), number.clone(), peer.clone()).prop_map(|(client, number, peer)| Step::Bind(client, number, peer)),
        3 => (client.clone(), peer.clone()).prop_map(|(client, peer)| Step::Send(client, peer)),
        3 => (client.clone(), number).prop_map(|(client, number)| Step::Channel(client, number)),
        3 => (client.clone(), peer).prop_map(|(client, peer)| Step::Peer(client, peer)),
        1 => client.clone().prop_map(Step::Disconnect),
        3 => (0..700_u64).prop_map(Step::Wait),
        1 => (client, prop::collection::vec(any::<u8>(), 0..60)).prop_map(|(client, noise)| Step::Noise(client, noise)),
    ];
    prop::collection::vec(step, 1..120)
}

/// What the RFC says of one allocation, told as simply as can be: times until which things hold.
#[derive(Default)]
struct Model {
    until: u64,
    permissions: BTreeMap<u8, u64>,
    channels: BTreeMap<u16, (u8, u64)>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_data_flows_exactly_where_the_rfc_says(steps in steps()) {
        let mut world = world();
        let mut models: BTreeMap<u16, Model> = BTreeMap::new();
        let address = |peer: u8| format!("8.8.8.{peer}:7");
        for step in steps {
            let seconds = world.seconds;
            models.retain(|_, model| model.until > seconds);
            match step {
                Step::Allocate(number) => {
                    let code = world.code(client(number), &allocate());
                    prop_assert_eq!(code, if models.contains_key(&number) { 437 } else { 0 });
                    models.entry(number).or_insert(Model { until: seconds + 600, ..Model::default() });
                }
                Step::Refresh(number, lifetime) => {
                    let ask = ask(Method::Refresh).with(attribute::LIFETIME, &lifetime.to_be_bytes());
                    let code = world.code(client(number), &ask);
                    prop_assert_eq!(code, if models.contains_key(&number) { 0 } else { 437 });
                    match models.get_mut(&number) {
                        Some(_) if lifetime == 0 => drop(models.remove(&number)),
                        Some(model) => model.until = seconds + u64::from(lifetime.clamp(600, 3_600)),
                        None => {}
                    }
                }
                Step::Permit(number, peer) => {
                    let code = world.code(client(number), &ask(Method::CreatePermission).to(&address(peer)));
                    prop_assert_eq!(code, if models.contains_key(&number) { 0 } else { 437 });
                    if let Some(model) = models.get_mut(&number) {
                        model.permissions.insert(peer, seconds + 300);
                    }
                }
                Step::Bind(number, channel, peer) => {
                    let code = world.code(client(number), &bind(channel, &address(peer)));
                    let Some(model) = models.get_mut(&number) else {
                        prop_assert_eq!(code, 437);
                        continue;
                    };
                    model.channels.retain(|_, (_, until)| *until > seconds);
                    let conflict = model.channels.iter().any(|(known, (bound, _))| (*known == channel) != (*bound == peer));
                    let expected = if channel < 0x4000 || conflict { 400 } else { 0 };
                    prop_assert_eq!(code, expected);
                    if code == 0 {
                        model.channels.insert(channel, (peer, seconds + 600));
                        model.permissions.insert(peer, seconds + 300);
                    }
                }
                Step::Send(number, peer) => {
                    let permitted = models.get(&number).is_some_and(|model| model.permissions.get(&peer).is_some_and(|until| *until > seconds));
                    prop_assert_eq!(world.send(client(number), &address(peer), b"x"), permitted);
                }
                Step::Channel(number, channel) => {
                    let bound = models.get(&number).is_some_and(|model| model.channels.get(&channel).is_some_and(|(_, until)| *until > seconds));
                    prop_assert_eq!(world.relayed(client(number), &channel_data(channel, b"x")) == 1, bound);
                }
                Step::Peer(number, peer) => {
                    let Some(model) = models.get(&number) else { continue };
                    let heard = world.hear_peer(client(number), &address(peer), b"x");
                    let permitted = model.permissions.get(&peer).is_some_and(|until| *until > seconds);
                    let channel = model.channels.iter().find(|(_, (bound, until))| *bound == peer && *until > seconds);
                    prop_assert_eq!(heard.is_some(), permitted);
                    if let Some(heard) = heard {
                        prop_assert_eq!(heard[0] >= 0x40, channel.is_some());
                    }
                }
                Step::Disconnect(number) => {
                    let now = world.now().instant;
                    world.engine.disconnect(&client(number), now, &mut world.edge);
                    models.remove(&number);
                }
                Step::Wait(seconds) => world.pass(seconds),
                Step::Noise(number, noise) => drop(world.raw(client(number), &noise)),
            }
            let seconds = world.seconds;
            models.retain(|_, model| model.until > seconds);
            prop_assert_eq!(world.engine.len(), models.len());
            prop_assert_eq!(world.edge.open.len(), models.len());
            prop_assert_eq!(world.engine.deadlines.len(), models.len());
        }
    }
}
