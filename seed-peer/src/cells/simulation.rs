//! Rooms in cells with invented time and an invented network, on the seed's own roster, topology and forwarding.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use genosdb::envelope::{Envelope, Letter};
use genosdb::operation::{FullStateSync, Operation};
use genosdb::{CellIndex, ChannelName, Clock, Hlc, MemoryGraph, PeerId, Topology};

use super::{Bridge, Cells, CellsConfig};
use crate::roster::Roster;
use crate::signalling::RelayIndex;

const RELAY: RelayIndex = RelayIndex(0);

/// Numbers that follow from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    fn id(&mut self) -> PeerId {
        PeerId::generate(|range| self.below(range.len()))
    }
}

/// A peer with a given id.
fn cells_of(us: PeerId, cell_size: usize, topology: Arc<Topology>) -> Cells {
    Cells {
        config: CellsConfig { cell_size, bridge: Bridge::Off },
        base: None,
        ours: vec![us],
        topology,
        sealed: None,
        settles: None,
        repicked: None,
        unfinished: None,
        claims: super::Claims::default(),
        seen: super::Seen::default(),
        postmark: genosdb::envelope::Postmark::default(),
    }
}

/// Sends one message from `origin` to everybody, and says how it went: whom it reached and after how many links, and
/// how many frames that took.
fn broadcast(peers: &mut [Cells], links: &[Vec<usize>], ids: &[PeerId], origin: usize) -> (Vec<Option<u32>>, usize) {
    let now = Instant::now();
    let envelope = peers[origin].message(1_795_337_371_021, ChannelName::SYNC_GRAPH, "[]");
    let ttl = envelope.ttl;
    let mut hops = vec![None; ids.len()];
    hops[origin] = Some(0);
    let mut frames = 0;
    let mut wave: Vec<(usize, usize, Envelope)> =
        links[origin].iter().map(|to| (origin, *to, envelope.clone())).collect();
    while !wave.is_empty() {
        let mut next = Vec::new();
        for (from, to, envelope) in wave {
            frames += 1;
            let Some(new) = peers[to].receive(ids[from], envelope, now) else { continue };
            assert!(hops[to].is_none(), "heard twice");
            hops[to] = Some(ttl - new.ttl + 1);
            if peers[to].passes_on(&ids[to], false)
                && let Some(passed_on) = new.passed_on()
            {
                let others = links[to].iter().filter(|other| **other != from && **other != origin);
                next.extend(others.map(|other| (to, *other, passed_on.clone())));
            }
        }
        wave = next;
    }
    (hops, frames)
}

/// A settled room: every peer has the same topology, and the links that it asks for.
fn settled(count: usize, cell_size: usize, seed: u64) -> (Vec<Cells>, Vec<Vec<usize>>, Vec<PeerId>) {
    let mut random = Random(seed);
    let ids: Vec<PeerId> = (0..count).map(|_| random.id()).collect();
    let places: HashMap<PeerId, usize> = ids.iter().enumerate().map(|(index, id)| (*id, index)).collect();
    let topology = Arc::new(Topology::new(&ids, cell_size));
    let links = ids.iter().map(|id| topology.links(id).iter().map(|other| places[other]).collect()).collect();
    (ids.iter().map(|id| cells_of(*id, cell_size, Arc::clone(&topology))).collect(), links, ids)
}

#[test]
fn a_message_reaches_each_of_ten_thousand_peers_within_its_ttl() {
    let (mut peers, links, ids) = settled(10_000, 10, 1);
    let counts: Vec<usize> = links.iter().map(Vec::len).collect();
    let ttl = peers[0].topology.ttl();
    for origin in [0, 4_711, 9_999] {
        let (hops, frames) = broadcast(&mut peers, &links, &ids, origin);
        let reached = hops.iter().flatten().count();
        let farthest = hops.iter().flatten().max().copied().unwrap_or(0);
        println!(
            "10,000 peers in {} cells: {reached} reached, farthest after {farthest} links (ttl {ttl}), {:.1} frames a \
             peer; links a peer: {:.1} on average, {} at most",
            peers[0].total_cells(),
            frames as f64 / 10_000.0,
            counts.iter().sum::<usize>() as f64 / 10_000.0,
            counts.iter().max().unwrap()
        );
        assert_eq!(reached, 10_000);
        assert!(farthest <= ttl + 1);
    }
}

#[test]
fn a_message_reaches_everybody_in_rooms_of_all_sizes() {
    for count in [2, 9, 10, 11, 12, 25, 60, 150, 400, 1_500] {
        for seed in 0..5 {
            let (mut peers, links, ids) = settled(count, 10, seed);
            for origin in [0, count / 2, count - 1] {
                let (hops, _) = broadcast(&mut peers, &links, &ids, origin);
                assert_eq!(hops.iter().flatten().count(), count, "{count} peers, seed {seed}, origin {origin}");
            }
        }
    }
}

/// A peer of a random schedule.
struct Peer {
    id: PeerId,
    /// How far its wall clock is off.
    skew_ms: i64,
    roster: Roster,
    cells: Cells,
    graph: MemoryGraph,
    clock: Clock,
    /// The last operations, as clients keep them.
    log: Vec<Operation>,
    announce_at: u64,
    /// The seed answers with whole states; clients with what they logged, if they think that it is enough.
    is_seed: bool,
    group: usize,
    is_up: bool,
}

/// How many operations the clients of a schedule log: few, so that it matters.
const CLIENT_LOG: usize = 12;

#[derive(Clone)]
enum Payload {
    Live(Operation),
    Sync(Option<Hlc>),
    Delta(Vec<Operation>),
    State(FullStateSync),
}

#[derive(Clone)]
enum Event {
    Announce {
        from: PeerId,
        to: usize,
    },
    /// The next frame that is under way from one to the other.
    Frame {
        from: usize,
        to: usize,
    },
    LinkUp {
        one: usize,
        other: usize,
    },
    LinkDied {
        one: usize,
        other: usize,
    },
}

/// A room of peers, and the network between them.
struct World {
    random: Random,
    start: Instant,
    now: u64,
    peers: Vec<Peer>,
    /// What is under way on each link, in order: a link that stalls delivers later, or dies with all that is on it.
    under_way: HashMap<(usize, usize), VecDeque<Envelope>>,
    /// Links that are up, and since when.
    links: BTreeMap<(usize, usize), u64>,
    dialling: BTreeMap<(usize, usize), u64>,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: HashMap<u64, Event>,
    sequence: u64,
    payloads: Vec<Payload>,
    frames: usize,
}

/// The time of day when a schedule starts.
const WALL_MS: u64 = 1_795_337_371_021;
const CELL_SIZE: usize = 3;

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let start = Instant::now();
        let count = 4 + random.below(8);
        let peers = (0..count).map(|index| Self::peer(&mut random, start, index == 0)).collect();
        Self {
            random,
            start,
            now: 0,
            peers,
            under_way: HashMap::new(),
            links: BTreeMap::new(),
            dialling: BTreeMap::new(),
            queue: BinaryHeap::new(),
            events: HashMap::new(),
            sequence: 0,
            payloads: Vec::new(),
            frames: 0,
        }
    }

    fn peer(random: &mut Random, start: Instant, is_seed: bool) -> Peer {
        let id = random.id();
        // Within an hour: what is further ahead is capped by each receiver's own clock.
        let skew_ms = i64::try_from(random.below(7_200_000)).unwrap() - 3_600_000;
        Peer {
            id,
            skew_ms,
            roster: Roster::new(start),
            cells: cells_of(id, CELL_SIZE, Arc::new(Topology::new(&[id], CELL_SIZE))),
            graph: MemoryGraph::default(),
            clock: Clock::default(),
            log: Vec::new(),
            announce_at: 0,
            is_seed,
            group: 0,
            is_up: true,
        }
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    fn wall_ms(&self, peer: usize) -> u64 {
        (WALL_MS + self.now).saturating_add_signed(self.peers[peer].skew_ms)
    }

    fn at(&mut self, delay_ms: usize, event: Event) {
        self.sequence += 1;
        self.events.insert(self.sequence, event);
        self.queue.push(Reverse((self.now + u64::try_from(delay_ms).unwrap(), self.sequence)));
    }

    fn connected(&self, one: usize, other: usize) -> bool {
        let (one, other) = (&self.peers[one], &self.peers[other]);
        one.is_up && other.is_up && one.group == other.group
    }

    /// Lets time pass until `end`.
    fn run_until(&mut self, end: u64) {
        while self.now < end {
            let step = self.now + 250;
            while let Some(&Reverse((at, number))) = self.queue.peek()
                && at <= step
            {
                self.queue.pop();
                self.now = self.now.max(at);
                if let Some(event) = self.events.remove(&number) {
                    self.handle(event);
                }
            }
            self.now = step;
            self.tick();
        }
    }

    fn tick(&mut self) {
        let now = self.instant();
        for index in 0..self.peers.len() {
            if !self.peers[index].is_up {
                continue;
            }
            if self.now >= self.peers[index].announce_at {
                self.peers[index].announce_at = self.now + 2_500;
                let from = self.peers[index].id;
                // Relays are not on the cut network's side: announces pass, or else are lost with the rest.
                for to in 0..self.peers.len() {
                    if to != index && self.connected(index, to) {
                        let delay = 20 + self.random.below(200);
                        self.at(delay, Event::Announce { from, to });
                    }
                }
            }
            let peer = &mut self.peers[index];
            peer.roster.look_through(now);
            if peer.roster.is_due(now) {
                peer.roster.sealed();
                peer.cells.seal(&peer.roster, now);
            }
        }
        for one in 0..self.peers.len() {
            for other in one + 1..self.peers.len() {
                self.tend_link(one, other);
            }
        }
    }

    /// Dials, or ends, the link between two peers as their topologies ask for.
    fn tend_link(&mut self, one: usize, other: usize) {
        let (first, second) = (&self.peers[one], &self.peers[other]);
        let knows = |peer: &Peer, other: &Peer| peer.roster.relay_of(&other.id).is_some();
        let wants = |peer: &Peer, other: &Peer| knows(peer, other) && peer.cells.wants(&peer.id, &other.id);
        if let Some(opened) = self.links.get(&(one, other)) {
            let opened = self.start + Duration::from_millis(*opened);
            let now = self.instant();
            let surplus = |peer: &Peer, other: &Peer| peer.cells.is_surplus(&peer.id, &other.id, opened, now);
            if surplus(first, second) && surplus(second, first) {
                self.links.remove(&(one, other));
                self.unlink(one, other, false);
            }
        } else if (wants(first, second) || wants(second, first))
            && self.connected(one, other)
            && self.dialling.get(&(one, other)).is_none_or(|until| self.now > *until)
        {
            self.dialling.insert((one, other), self.now + 5_000);
            let delay = 100 + self.random.below(400);
            self.at(delay, Event::LinkUp { one, other });
        }
    }

    fn unlink(&mut self, one: usize, other: usize, died: bool) {
        let now = self.instant();
        for (us, them) in [(one, other), (other, one)] {
            self.under_way.remove(&(us, them));
            let id = self.peers[them].id;
            let peer = &mut self.peers[us];
            let is_bridge = peer.cells.is_bridge(&id);
            peer.roster.unlinked(id, died, is_bridge, now);
            peer.cells.unlinked(&id);
        }
    }

    fn handle(&mut self, event: Event) {
        let now = self.instant();
        match event {
            Event::Announce { from, to } => {
                self.peers[to].roster.heard(from, RELAY, now);
            }
            Event::LinkUp { one, other } => {
                if self.connected(one, other) && !self.links.contains_key(&(one, other)) {
                    self.links.insert((one, other), self.now);
                    for (us, them) in [(one, other), (other, one)] {
                        let id = self.peers[them].id;
                        self.peers[us].roster.linked(id, RELAY, now);
                        let latest = self.peers[us].graph.latest();
                        self.say(us, Payload::Sync(latest));
                    }
                }
            }
            Event::LinkDied { one, other } => {
                if !self.connected(one, other) && self.links.remove(&(one, other)).is_some() {
                    self.unlink(one, other, true);
                }
            }
            Event::Frame { from, to } => {
                let key = (from.min(to), from.max(to));
                if !self.links.contains_key(&key) {
                    return;
                }
                if !self.connected(from, to) {
                    return self.at(500, Event::Frame { from, to });
                }
                if let Some(envelope) = self.under_way.get_mut(&(from, to)).and_then(VecDeque::pop_front) {
                    self.receive(from, to, envelope);
                }
            }
        }
    }

    /// Sends to all linked peers.
    fn send(&mut self, us: usize, envelope: &Envelope, except: &[PeerId]) {
        let linked: Vec<usize> = self
            .links
            .keys()
            .filter_map(|(one, other)| match us {
                us if us == *one => Some(*other),
                us if us == *other => Some(*one),
                _ => None,
            })
            .filter(|other| !except.contains(&self.peers[*other].id))
            .collect();
        for to in linked {
            for _ in 0..1 + usize::from(self.random.below(20) == 0) {
                self.frames += 1;
                self.under_way.entry((us, to)).or_default().push_back(envelope.clone());
                let delay = 10 + self.random.below(100);
                self.at(delay, Event::Frame { from: us, to });
            }
        }
    }

    fn say(&mut self, us: usize, payload: Payload) {
        let number = self.payloads.len().to_string();
        self.payloads.push(payload);
        let wall_ms = self.wall_ms(us);
        let envelope = self.peers[us].cells.message(wall_ms, ChannelName::SYNC_GRAPH, &number);
        self.send(us, &envelope, &[]);
    }

    fn receive(&mut self, from: usize, to: usize, envelope: Envelope) {
        let now = self.instant();
        let from_id = self.peers[from].id;
        let us = self.peers[to].id;
        let Some(envelope) = self.peers[to].cells.receive(from_id, envelope, now) else { return };
        if self.peers[to].cells.passes_on(&us, false)
            && let Some(passed_on) = envelope.passed_on()
        {
            self.send(to, &passed_on, &[from_id, envelope.origin]);
        }
        let Letter::Channel { payload, .. } = envelope.letter() else { panic!("a letter") };
        let payload = self.payloads[payload.as_str().parse::<usize>().unwrap()].clone();
        self.take_in(to, payload);
    }

    fn take_in(&mut self, us: usize, payload: Payload) {
        let wall_ms = self.wall_ms(us);
        let peer = &mut self.peers[us];
        match payload {
            Payload::Live(operation) => {
                peer.clock.receive(timestamp_of(&operation), wall_ms);
                peer.graph.apply(&operation, wall_ms);
            }
            Payload::Delta(operations) => {
                for operation in &operations {
                    peer.graph.apply(operation, wall_ms);
                }
            }
            Payload::State(state) => {
                if peer.graph.merge(&state, wall_ms).sender_lacks {
                    let answer = peer.graph.full_state();
                    self.say(us, Payload::State(answer));
                }
            }
            Payload::Sync(known) => {
                let oldest = peer.log.first().map(timestamp_of);
                let recent = known.is_some() && oldest.is_some() && known >= oldest;
                let answer = if recent && !peer.is_seed {
                    Payload::Delta(peer.log.clone())
                } else {
                    Payload::State(peer.graph.full_state())
                };
                self.say(us, answer);
            }
        }
    }

    /// Somebody writes something.
    fn write(&mut self, us: usize) {
        let wall_ms = self.wall_ms(us);
        let node = format!("n{}", self.random.below(8));
        let other = format!("n{}", self.random.below(8));
        let at = self.peers[us].clock.now(wall_ms);
        let timestamp = format!(r#"{{"physical":{},"logical":{}}}"#, at.physical, at.logical);
        let number = self.random.below(1_000);
        let text = match self.random.below(6) {
            0..3 => format!(r#"{{"type":"upsert","id":"{node}","value":{number},"timestamp":{timestamp}}}"#),
            3 => format!(r#"{{"type":"remove","id":"{node}","timestamp":{timestamp}}}"#),
            _ => format!(r#"{{"type":"link","sourceId":"{node}","targetId":"{other}","timestamp":{timestamp}}}"#),
        };
        let operation = Operation::parse(&text, &mut 0).unwrap();
        let peer = &mut self.peers[us];
        // A client links and removes what it has.
        let is_there = peer.graph.get(&node).is_some() && peer.graph.get(&other).is_some();
        if !matches!(operation, Operation::Upsert(_)) && !is_there {
            return;
        }
        peer.graph.apply(&operation, wall_ms);
        peer.log.push(operation.clone());
        let surplus = peer.log.len().saturating_sub(CLIENT_LOG);
        peer.log.drain(..surplus);
        self.say(us, Payload::Live(operation));
    }

    /// Cuts the network in two, or heals it.
    fn partition(&mut self) {
        let groups = 1 + self.random.below(2);
        for peer in &mut self.peers {
            peer.group = self.random.below(groups);
        }
        self.cut();
    }

    /// Peers notice some time later that links are dead.
    fn cut(&mut self) {
        let dead: Vec<(usize, usize)> =
            self.links.keys().filter(|(one, other)| !self.connected(*one, *other)).copied().collect();
        for (one, other) in dead {
            self.at(12_000, Event::LinkDied { one, other });
        }
    }

    /// A peer is gone, and comes back: as the same one with what it kept, or as another that knows nothing.
    fn restart(&mut self, us: usize) {
        let gone: Vec<(usize, usize)> =
            self.links.keys().filter(|(one, other)| *one == us || *other == us).copied().collect();
        for (one, other) in gone {
            self.links.remove(&(one, other));
            self.unlink(one, other, true);
        }
        let now = self.instant();
        let fresh = !self.peers[us].is_seed && self.random.below(3) == 0;
        let mut next = Self::peer(&mut self.random, now, self.peers[us].is_seed);
        next.group = self.peers[us].group;
        next.announce_at = self.now;
        if !fresh {
            let before = &self.peers[us];
            next.id = before.id;
            next.cells = cells_of(next.id, CELL_SIZE, Arc::new(Topology::new(&[next.id], CELL_SIZE)));
            next.skew_ms = before.skew_ms;
            next.graph = before.graph.clone();
            next.clock = Clock::starting_at(next.graph.latest().unwrap_or_default());
        }
        self.peers[us] = next;
    }

    fn differences(&self) -> Vec<String> {
        let expected = contents(&self.peers[0].graph);
        let differs = |peer: &&Peer| contents(&peer.graph) != expected;
        self.peers
            .iter()
            .filter(differs)
            .map(|peer| format!("{}: {:?}\nnot {expected:?}", peer.id, contents(&peer.graph)))
            .collect()
    }
}

/// What an application sees of a graph: edges have no order among peers.
fn contents(graph: &MemoryGraph) -> Vec<(String, String, Hlc, Vec<String>)> {
    let of = |node: &genosdb::Node| {
        let mut edges: Vec<String> = node.edges.iter().map(ToString::to_string).collect();
        edges.sort();
        let value = node.value.as_ref().map(ToString::to_string).unwrap_or_default();
        (node.id.to_string(), value, node.timestamp, edges)
    };
    graph.iter().map(of).collect()
}

fn timestamp_of(operation: &Operation) -> Hlc {
    match operation {
        Operation::Upsert(upsert) => upsert.timestamp,
        Operation::Remove(remove) => remove.timestamp,
        Operation::Link(link) => link.timestamp,
        _ => Hlc::default(),
    }
}

/// Plays the schedule of a seed; says how peers differ in the end.
fn play(seed: u64) -> (Vec<String>, World) {
    let mut world = World::new(seed);
    world.run_until(6_000);
    for _ in 0..10 + world.random.below(30) {
        let us = world.random.below(world.peers.len());
        match world.random.below(12) {
            0 => world.partition(),
            1 => world.restart(us),
            _ => world.write(us),
        }
        let pause = world.random.below(3_000) as u64;
        world.run_until(world.now + pause);
    }
    for peer in &mut world.peers {
        peer.group = 0;
    }
    world.run_until(world.now + 60_000);
    // Versions of one moment that differ are settled when states are exchanged: somebody reloads a page.
    world.restart(world.peers.len() - 1);
    world.run_until(world.now + 30_000);
    (world.differences(), world)
}

#[test]
fn a_thousand_random_schedules_leave_every_peer_with_the_same_graph() {
    let mut failed = Vec::new();
    let mut frames = 0;
    for seed in 0..1_000 {
        let (differences, world) = play(seed);
        frames += world.frames;
        if !differences.is_empty() {
            failed.push(seed);
            println!("schedule {seed}: {} peers, {}", world.peers.len(), differences.join("\n"));
        }
    }
    println!("1,000 schedules, {frames} frames");
    assert!(failed.is_empty(), "schedules {failed:?} do not converge");
}

#[test]
fn cells_of_a_simulation_are_those_of_a_room() {
    // The invented network must not be kinder than the rules: a settled world has exactly the topology's links.
    let mut world = World::new(77);
    world.run_until(60_000);
    let topology = Arc::clone(&world.peers[0].cells.topology);
    assert!(topology.total_cells() > 1);
    for (one, other) in world.links.keys() {
        assert!(topology.are_linked(&world.peers[*one].id, &world.peers[*other].id));
    }
    let expected: usize = world.peers.iter().map(|peer| topology.links(&peer.id).len()).sum();
    assert_eq!(world.links.len() * 2, expected);
    assert!(topology.members(CellIndex(0)).len() <= world.peers.len());
}
