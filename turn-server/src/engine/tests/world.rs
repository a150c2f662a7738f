//! A server with invented time and sockets, and clients that ask it.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use super::super::authentication::PASSWORD_ALGORITHMS;
use super::super::requests::UDP;
use super::super::*;
use crate::bucket::Rate;
use crate::credentials::Credentials;
use crate::message::{Algorithm, Builder, HEADER, Key, attribute};
use crate::nonce::Nonces;
use crate::peer_filter::PeerFilter;
use crate::quotas::{Ledger, Quotas};

pub(super) const REALM: &str = "homeport";

pub(super) const UNIX: u64 = 1_000_000;

/// Sockets that only take notes.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) next: usize,
    pub(super) open: BTreeMap<usize, (AllocationId, Family, u16)>,
    pub(super) reserved: Vec<([u8; 8], Family, u16, Instant)>,
    /// Ports that somebody else has.
    pub(super) taken: HashSet<u16>,
    pub(super) to_clients: Vec<(ClientId, Vec<u8>)>,
    pub(super) to_peers: Vec<(RelayId, SocketAddr, Vec<u8>, bool)>,
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
pub(super) struct World {
    pub(super) engine: Engine,
    pub(super) edge: Notes,
    pub(super) start: Instant,
    pub(super) seconds: u64,
}

pub(super) fn rules() -> Rules {
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

pub(super) fn world() -> World {
    with(rules())
}

pub(super) fn with(rules: Rules) -> World {
    let v4: IpAddr = "9.9.9.9".parse().unwrap();
    let v6: IpAddr = "2606:4700::9".parse().unwrap();
    let place = Place { v4: Some(v4), v6: Some(v6), peers: PeerFilter::new([v4, v6], &[], &[]) };
    let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
    let engine = Engine::new(Arc::new(rules), place, metrics, [3; 32]);
    World { engine, edge: Notes::default(), start: Instant::now(), seconds: 0 }
}

pub(super) fn client(port: u16) -> ClientId {
    ClientId {
        transport: Transport::Udp,
        address: SocketAddr::new("192.0.2.1".parse().unwrap(), port),
        server: "9.9.9.9:3478".parse().unwrap(),
    }
}

pub(super) fn peer(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// What a client asks.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) attributes: Vec<(u16, Vec<u8>)>,
    pub(super) peers: Vec<SocketAddr>,
    pub(super) username: String,
    pub(super) password: String,
    pub(super) realm: String,
    pub(super) nonce: Option<Vec<u8>>,
    pub(super) transaction: Option<TransactionId>,
    pub(super) sha256: bool,
    pub(super) fingerprint: bool,
}

pub(super) fn ask(method: Method) -> Ask {
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

pub(super) fn allocate() -> Ask {
    ask(Method::Allocate).with(attribute::REQUESTED_TRANSPORT, &[UDP, 0, 0, 0])
}

impl Ask {
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.attributes.push((kind, value.to_vec()));
        self
    }

    pub(super) fn to(mut self, address: &str) -> Self {
        self.peers.push(peer(address));
        self
    }

    pub(super) fn by(mut self, username: &str, password: &str) -> Self {
        (self.username, self.password) = (username.into(), password.into());
        self
    }
}

/// An answer as its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer(pub(super) Vec<u8>);

impl Answer {
    pub(super) fn message(&self) -> Message<'_> {
        Message::parse(&self.0).unwrap()
    }

    pub(super) fn attribute(&self, kind: u16) -> Option<Vec<u8>> {
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
    pub(super) fn code(&self) -> u16 {
        match self.message().class {
            Class::Success => 0,
            _ => {
                self.attribute(attribute::ERROR_CODE).map(|code| u16::from(code[2]) * 100 + u16::from(code[3])).unwrap()
            }
        }
    }

    pub(super) fn address(&self, kind: u16) -> SocketAddr {
        self.message().address(&self.attribute(kind).unwrap()).unwrap()
    }

    pub(super) fn lifetime(&self) -> u32 {
        u32::from_be_bytes(self.attribute(attribute::LIFETIME).unwrap().try_into().unwrap())
    }
}

impl World {
    pub(super) fn now(&self) -> Now {
        Now { instant: self.start + Duration::from_secs(self.seconds), unix: UNIX + self.seconds }
    }

    pub(super) fn pass(&mut self, seconds: u64) {
        self.seconds += seconds;
        let now = self.now().instant;
        self.engine.expire(now, &mut self.edge);
    }

    pub(super) fn raw(&mut self, client: ClientId, bytes: &[u8]) -> Option<Answer> {
        self.edge.to_clients.clear();
        let now = self.now();
        self.engine.client_message(now, client, bytes, &mut self.edge);
        assert!(self.edge.to_clients.len() <= 1);
        self.edge.to_clients.pop().map(|(to, bytes)| {
            assert_eq!(to, client);
            Answer(bytes)
        })
    }

    pub(super) fn transaction(&mut self) -> TransactionId {
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

    pub(super) fn bytes_of(&mut self, client: ClientId, ask: &Ask) -> Vec<u8> {
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

    pub(super) fn answer(&mut self, client: ClientId, ask: &Ask) -> Answer {
        let bytes = self.bytes_of(client, ask);
        self.raw(client, &bytes).expect("silence")
    }

    /// The code of the answer, 0 for success.
    pub(super) fn code(&mut self, client: ClientId, ask: &Ask) -> u16 {
        self.answer(client, ask).code()
    }

    /// An allocation for a client, and its relayed address.
    pub(super) fn allocated(&mut self, client: ClientId) -> SocketAddr {
        let answer = self.answer(client, &allocate());
        assert_eq!(answer.code(), 0);
        answer.address(attribute::XOR_RELAYED_ADDRESS)
    }

    pub(super) fn hear_peer(&mut self, client: ClientId, from: &str, payload: &[u8]) -> Option<Vec<u8>> {
        self.edge.to_clients.clear();
        let id = self.engine.by_client[&client];
        let now = self.now().instant;
        self.engine.peer_datagram(now, id, peer(from), payload, &mut self.edge);
        self.edge.to_clients.pop().map(|(_, bytes)| bytes)
    }

    pub(super) fn send(&mut self, client: ClientId, to: &str, payload: &[u8]) -> bool {
        let bytes = Builder::new(Class::Indication, Method::Send, self.transaction())
            .address(attribute::XOR_PEER_ADDRESS, peer(to))
            .attribute(attribute::DATA, payload)
            .finish();
        self.relayed(client, &bytes) == 1
    }

    pub(super) fn relayed(&mut self, client: ClientId, bytes: &[u8]) -> usize {
        self.edge.to_peers.clear();
        assert_eq!(self.raw(client, bytes), None);
        self.edge.to_peers.len()
    }
}

pub(super) fn unauthenticated(method: Method) -> Vec<u8> {
    let mut bytes = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    bytes.extend_from_slice(b"transaction!");
    let transaction = Message::parse(&bytes).unwrap().transaction;
    Builder::new(Class::Request, method, transaction).finish()
}

pub(super) fn channel_data(number: u16, payload: &[u8]) -> Vec<u8> {
    [&number.to_be_bytes()[..], &u16::try_from(payload.len()).unwrap().to_be_bytes(), payload].concat()
}

pub(super) fn bind(number: u16, to: &str) -> Ask {
    let [high, low] = number.to_be_bytes();
    ask(Method::ChannelBind).with(attribute::CHANNEL_NUMBER, &[high, low, 0, 0]).to(to)
}
