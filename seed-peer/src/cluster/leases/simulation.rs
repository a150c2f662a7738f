//! Instances whose machines stall, die and are cut off, whose clocks differ, and a bucket whose answers come late or never:
//! in invented time.

use std::collections::VecDeque;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

const STEP: Duration = Duration::from_millis(20);
const ROOMS: usize = 6;
/// How long things go wrong.
const TROUBLE: Duration = Duration::from_secs(120);

/// The bucket: one order of all that is written.
#[derive(Default)]
struct Bucket {
    revision: u64,
    entries: BTreeMap<Key, (String, u64)>,
    /// Everything that was ever written.
    log: Vec<(Key, String, u64)>,
}

impl Bucket {
    fn write(&mut self, key: &Key, value: &str, expected: u64) -> Wrote {
        if self.entries.get(key).map_or(0, |(_, revision)| *revision) != expected {
            return Wrote::Conflict;
        }
        self.revision += 1;
        self.entries.insert(key.clone(), (value.to_owned(), self.revision));
        self.log.push((key.clone(), value.to_owned(), self.revision));
        Wrote::Done(self.revision)
    }
}

/// A write on its way.
struct Sent {
    key: Key,
    value: String,
    expected: u64,
    /// When it arrives, and when its answer does; by the time of the simulation.
    arrives: Duration,
    answered: Duration,
    is_lost: bool,
    answer_is_lost: bool,
    sent: Instant,
    wrote: Option<Wrote>,
}

struct Machine {
    leases: Leases,
    /// How fast its clock goes.
    rate: f64,
    start: Instant,
    /// How much of the log it has seen, and when it sees more.
    seen: usize,
    sent: VecDeque<Sent>,
    /// Rooms that it is in.
    entered: BTreeSet<RoomHash>,
    leaving: Vec<(Duration, RoomHash)>,
    stalled_until: Duration,
    cut_off_until: Duration,
    is_up: bool,
    life: u32,
    name: String,
}

impl Machine {
    fn new(name: &str, life: u32, rate: f64, start: Instant) -> Self {
        let mut leases = Leases::new(name.to_owned(), format!("{name}{life}"));
        (0..ROOMS).for_each(|room| leases.offer(&format!("room {room}"), 0));
        Self {
            leases,
            rate,
            start,
            seen: 0,
            sent: VecDeque::new(),
            entered: BTreeSet::new(),
            leaving: Vec::new(),
            stalled_until: Duration::ZERO,
            cut_off_until: Duration::ZERO,
            is_up: true,
            life,
            name: name.to_owned(),
        }
    }

    fn clock(&self, time: Duration) -> Instant {
        self.start + time.mul_f64(self.rate)
    }

    /// Whether it acts in a room: it is there, and looks at the end of its tenure before it does anything.
    fn acts_in(&self, room: &RoomHash, time: Duration) -> bool {
        self.is_up && self.entered.contains(room) && self.leases.tenure().is_some_and(|end| self.clock(time) < end)
    }

    fn step(&mut self, bucket: &mut Bucket, time: Duration, random: &mut StdRng) {
        if !self.is_up || time < self.stalled_until {
            return;
        }
        let now = self.clock(time);
        if time >= self.cut_off_until {
            // Sometimes late.
            while self.seen < bucket.log.len() && random.random_ratio(9, 10) {
                let (key, value, revision) = bucket.log[self.seen].clone();
                self.leases.entry(&key, value.as_bytes(), revision, now);
                self.seen += 1;
            }
            if self.seen == bucket.log.len() {
                self.leases.complete();
            }
        }
        for (_, room) in self.leaving.extract_if(.., |(at, _)| *at <= time) {
            self.entered.remove(&room);
            self.leases.exited(&room);
        }
        let mut still = VecDeque::new();
        for sent in std::mem::take(&mut self.sent) {
            if time < sent.answered {
                still.push_back(sent);
                continue;
            }
            let wrote = sent.wrote.filter(|_| !sent.answer_is_lost && time >= self.cut_off_until);
            self.leases.wrote(&sent.key, &sent.value, wrote.unwrap_or(Wrote::Unknown), sent.sent, now);
        }
        self.sent = still;
        let mut actions = Vec::new();
        self.leases.tick(now, &mut actions);
        for action in actions {
            match action {
                Action::Enter(room) => {
                    self.leaving.retain(|(_, other)| *other != room);
                    self.entered.insert(room);
                }
                Action::Exit(room) => {
                    let takes = Duration::from_millis(random.random_range(0..300));
                    self.leaving.push((time + takes, room));
                }
                Action::Write { key, value, expected } => {
                    let arrives = time + Duration::from_millis(random.random_range(0..400));
                    let is_lost = time < self.cut_off_until || time < TROUBLE && random.random_ratio(1, 50);
                    let answer_is_lost = time < TROUBLE && random.random_ratio(1, 50);
                    let answered = if is_lost || answer_is_lost {
                        time + WRITE_PATIENCE
                    } else {
                        arrives + Duration::from_millis(random.random_range(0..400))
                    };
                    let (sent, wrote) = (now, None);
                    self.sent.push_back(Sent {
                        key,
                        value,
                        expected,
                        arrives,
                        answered,
                        is_lost,
                        answer_is_lost,
                        sent,
                        wrote,
                    });
                }
            }
        }
    }

    /// What was sent arrives, whatever has become of who sent it.
    fn arrive(&mut self, bucket: &mut Bucket, time: Duration) {
        for sent in &mut self.sent {
            if sent.wrote.is_none() && !sent.is_lost && time >= sent.arrives {
                sent.wrote = Some(bucket.write(&sent.key, &sent.value, sent.expected));
            }
        }
    }
}

fn rooms() -> Vec<RoomHash> {
    (0..ROOMS).map(|room| RoomHash::of(&format!("room {room}"))).collect()
}

/// Runs a schedule: two minutes of trouble, and 45 s to come to rest.
fn run(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut bucket = Bucket::default();
    let start = Instant::now();
    let names = ["one", "two", "three"];
    let mut machines: Vec<Machine> =
        names.iter().map(|name| Machine::new(name, 0, random.random_range(0.98..1.02), start)).collect();
    let end = TROUBLE + Duration::from_secs(45);
    let mut time = Duration::ZERO;
    while time < end {
        time += STEP;
        if time < TROUBLE && random.random_ratio(1, 250) {
            let index = random.random_range(0..machines.len());
            let machine = &mut machines[index];
            let takes = Duration::from_millis(random.random_range(500..20_000));
            match random.random_range(0..4) {
                0 => machine.stalled_until = time + takes,
                1 => machine.cut_off_until = time + takes,
                2 => machine.leases.set_fit(random.random_ratio(1, 2)),
                _ if machine.is_up => machine.is_up = false,
                _ => {
                    // Started again; the clock of a machine goes on.
                    let (life, rate) = (machine.life + 1, machine.rate);
                    let mut sent = std::mem::take(&mut machine.sent);
                    *machine = Machine::new(&machine.name.clone(), life, rate, start);
                    // What the old life has sent is still on its way.
                    sent.iter_mut().for_each(|sent| sent.answer_is_lost = true);
                    machine.sent = sent;
                    machine.sent.retain(|sent| sent.wrote.is_none());
                }
            }
        }
        if time == TROUBLE {
            for machine in &mut machines {
                machine.leases.set_fit(true);
                if !machine.is_up {
                    *machine = Machine::new(&machine.name.clone(), machine.life + 1, machine.rate, start);
                }
            }
        }
        for machine in &mut machines {
            machine.arrive(&mut bucket, time);
        }
        for machine in &mut machines {
            machine.step(&mut bucket, time, &mut random);
        }
        for room in rooms() {
            let actors: Vec<&str> = machines
                .iter()
                .filter(|machine| machine.acts_in(&room, time))
                .map(|machine| machine.name.as_str())
                .collect();
            assert!(actors.len() <= 1, "seed {seed}, at {time:?}: {actors:?} both act in a room");
        }
    }
    for room in rooms() {
        let holders = machines.iter().filter(|machine| machine.leases.held().contains(&room)).count();
        let actors = machines.iter().filter(|machine| machine.acts_in(&room, time)).count();
        assert_eq!((holders, actors), (1, 1), "seed {seed}: of a room, in the end");
    }
    let chosen =
        |machine: &Machine| rooms().iter().map(|room| machine.leases.chosen(room).map(str::to_owned)).collect();
    let each: Vec<Vec<Option<String>>> = machines.iter().map(chosen).collect();
    assert!(each.windows(2).all(|pair| pair[0] == pair[1]), "seed {seed}: all choose the same");
    for (room, chosen) in rooms().iter().zip(&each[0]) {
        let holder = machines.iter().find(|machine| machine.acts_in(room, time)).map(|machine| machine.name.clone());
        assert_eq!(holder, *chosen, "seed {seed}: rooms are where they belong");
    }
}

#[test]
fn no_two_instances_ever_act_in_a_room_and_in_the_end_one_does() {
    let schedules = std::env::var("HOMEPORT_LEASE_SCHEDULES").ok().and_then(|count| count.parse().ok());
    (0..schedules.unwrap_or(40)).for_each(run);
}

/// Three machines that are well; what befalls one, and how long its rooms are without anybody.
fn gap(seed: u64, befalls: impl Fn(&mut Machine)) -> Duration {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut bucket, start) = (Bucket::default(), Instant::now());
    let mut machines: Vec<Machine> =
        ["one", "two", "three"].iter().map(|name| Machine::new(name, 0, 1.0, start)).collect();
    let (mut time, mut longest, mut since) = (Duration::ZERO, Duration::ZERO, BTreeMap::new());
    while time < Duration::from_secs(60) {
        time += STEP;
        if time == Duration::from_secs(30) {
            let held: Vec<usize> = machines.iter().map(|machine| machine.entered.len()).collect();
            assert!(held.iter().all(|count| *count > 0), "all have some: {held:?}");
            befalls(&mut machines[0]);
        }
        for machine in &mut machines {
            machine.arrive(&mut bucket, time);
        }
        for machine in &mut machines {
            machine.step(&mut bucket, time, &mut random);
        }
        for room in rooms().into_iter().filter(|_| time >= Duration::from_secs(30)) {
            if machines.iter().any(|machine| machine.acts_in(&room, time)) {
                since.remove(&room);
            } else {
                let began = *since.entry(room).or_insert(time);
                longest = longest.max(time - began);
            }
        }
    }
    assert!(since.is_empty(), "every room has somebody");
    longest
}

#[test]
fn rooms_of_who_dies_are_taken_within_ten_seconds_and_of_who_leaves_at_once() {
    let longest = |befalls: fn(&mut Machine)| (0..10).map(|seed| gap(seed, befalls)).max().unwrap_or_default();
    let died = longest(|machine| machine.is_up = false);
    assert!(died < Duration::from_secs(10), "{died:?}");
    let left = longest(|machine| machine.leases.retire());
    // A write of which nobody hears again is waited for.
    assert!(left < Duration::from_secs(5), "{left:?}");
    println!("without anybody, at most: {died:?} after a death, {left:?} after a goodbye");
}
