//! The machines of a cluster: each process says over NATS how it is, and whoever has a status page listens.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use seed_peer::RoomStatus;
use serde::{Deserialize, Serialize};
use service::Cluster;
use tokio::task::JoinHandle;

use super::service_status::{PartStatus, ServiceStatus, Shown};
use super::{Sample, Status};

/// Where it is said.
const SUBJECT: &str = "homeport.machines";
/// How often.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// Whoever has said nothing for so long is down.
const SILENT: Duration = Duration::from_secs(16);
/// How long something that is down is shown.
const FORGET: Duration = Duration::from_secs(24 * 3_600);
/// How long it may take to say that a process ends.
const FAREWELL: Duration = Duration::from_millis(500);
/// Processes that are remembered; nobody has so many.
const MAX_HEARD: usize = 1_024;
/// Rooms that one process speaks of, and bytes of what it says: servers of NATS take 1 MiB unless set otherwise.
const MAX_ROOMS: usize = 256;
const MAX_MESSAGE: usize = 512 << 10;

/// What a process says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Announcement {
    /// The name of its machine.
    machine: String,
    version: String,
    services: Vec<ServiceStatus>,
    numbers: Sample,
    /// Those that it holds; none when there are too many.
    rooms: Vec<RoomStatus>,
    /// It ends, in order.
    ends: bool,
}

/// A process, over its restarts: its machine, and what it runs there.
type Process = (String, Vec<String>);

impl Announcement {
    fn process(&self) -> Process {
        (self.machine.clone(), self.services.iter().map(|service| service.name.clone()).collect())
    }
}

/// What a process last said, and when.
type Heard = (Announcement, Instant);

/// What this process hears of others.
#[derive(Debug, Default)]
pub(super) struct Machines {
    /// The machine of which the numbers are known otherwise.
    known: Option<String>,
    heard: Mutex<Everybody>,
}

#[derive(Debug, Default)]
struct Everybody {
    processes: BTreeMap<Process, Heard>,
    /// What they have counted since each was first heard. What a process counts begins anew with it, and ends with it;
    /// this does not.
    counted: Sample,
}

/// A machine as it is shown.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) services: Vec<ServiceStatus>,
}

impl Machines {
    /// Those of a cluster; the numbers of the machine `known` are known otherwise.
    pub(super) fn new(known: Option<String>) -> Self {
        Self { known, ..Self::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Everybody> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, announcement: Announcement, now: Instant) {
        let mut heard = self.lock();
        let Everybody { processes, counted } = &mut *heard;
        processes.retain(|_, (_, at)| now.saturating_duration_since(*at) < FORGET);
        let process = announcement.process();
        if let Some((before, _)) = processes.get(&process)
            && self.known.as_ref() != Some(&announcement.machine)
        {
            *counted = counted.with(announcement.numbers.counted_since(before.numbers));
        }
        if announcement.ends {
            processes.remove(&process);
        } else if processes.len() < MAX_HEARD || processes.contains_key(&process) {
            processes.insert(process, (announcement, now));
        }
    }

    /// What others say, without those that are down.
    fn live(&self, now: Instant) -> Vec<Announcement> {
        let heard = self.lock();
        let live = heard.processes.values().filter(|(_, at)| now.saturating_duration_since(*at) < SILENT);
        live.map(|(announcement, _)| announcement.clone()).collect()
    }

    /// The machines, by name, with all that runs on each.
    pub(super) fn all(&self, now: Instant) -> Vec<Machine> {
        let mut all: BTreeMap<String, Machine> = BTreeMap::new();
        let heard = self.lock();
        let silence = |at: &Instant| now.saturating_duration_since(*at);
        let (live, silent): (Vec<&Heard>, Vec<&Heard>) =
            heard.processes.values().partition(|(_, at)| silence(at) < SILENT);
        for (announcement, at) in live.into_iter().chain(silent) {
            let Announcement { machine: name, version, services, .. } = announcement.clone();
            let new = Machine { name: name.clone(), version, services: Vec::new() };
            let machine = all.entry(name).or_insert(new);
            if silence(at) < SILENT {
                machine.services.extend(services);
                continue;
            }
            for ServiceStatus { name, .. } in services {
                // Of a process that is gone, another may have taken over the work.
                if machine.services.iter().all(|known| known.name != name) {
                    let reason = Some(format!("nothing was heard of it for {} s", silence(at).as_secs()));
                    let part = PartStatus { name: "the process".into(), state: Shown::Down, reason };
                    machine.services.push(ServiceStatus::new(name, vec![part]));
                }
            }
        }
        all.into_values().collect()
    }

    /// The numbers of all other processes together: what is there now, and what was counted since this one listens.
    pub(super) fn numbers(&self, now: Instant) -> Sample {
        let others = self.live(now).into_iter().filter(|one| self.known.as_ref() != Some(&one.machine));
        others.fold(self.lock().counted, |sum, one| sum.with(one.numbers.of_now()))
    }

    /// Rooms that others hold.
    pub(super) fn rooms(&self, now: Instant) -> Vec<RoomStatus> {
        self.live(now).into_iter().flat_map(|one| one.rooms).collect()
    }

    /// Listens to what is said, until it is aborted.
    pub(super) fn listen(self: &Arc<Self>, cluster: &Cluster) -> JoinHandle<()> {
        let (machines, client) = (Arc::clone(self), cluster.client().clone());
        tokio::spawn(async move {
            let mut subscriber = match client.subscribe(SUBJECT).await {
                Ok(subscriber) => subscriber,
                Err(error) => return tracing::error!(error = ?error.to_string(), "NATS cannot be asked for machines"),
            };
            while let Some(message) = subscriber.next().await {
                match serde_json::from_slice::<Announcement>(&message.payload) {
                    Ok(announcement) => machines.hear(announcement, Instant::now()),
                    Err(error) => tracing::debug!(%error, "what a machine says is not understood"),
                }
            }
        })
    }
}

/// Tells the cluster how this process is.
pub(crate) struct Reporter {
    cluster: Cluster,
    status: Arc<Status>,
}

impl Reporter {
    pub(crate) fn new(cluster: Cluster, status: Arc<Status>) -> Arc<Self> {
        Arc::new(Self { cluster, status })
    }

    /// Goes on saying it, until it is aborted.
    pub(crate) fn start(self: &Arc<Self>) -> JoinHandle<()> {
        let reporter = Arc::clone(self);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(SAY_EVERY);
            loop {
                ticks.tick().await;
                reporter.say(false).await;
            }
        })
    }

    /// Says that this process ends.
    pub(crate) async fn retire(&self) {
        let told = async {
            self.say(true).await;
            self.cluster.client().flush().await
        };
        // Who does not hear of it sees it by the silence.
        if !matches!(tokio::time::timeout(FAREWELL, told).await, Ok(Ok(()))) {
            tracing::debug!("NATS was not told that this process ends");
        }
    }

    async fn say(&self, ends: bool) {
        // What is said while NATS is away is of no use when it is back.
        if !self.cluster.is_connected() {
            return;
        }
        let mut rooms = if ends { Vec::new() } else { self.status.own_rooms().await };
        rooms.retain(|room| !room.elsewhere);
        rooms.truncate(MAX_ROOMS);
        let mut announcement = Announcement {
            machine: self.cluster.name().to_owned(),
            version: env!("CARGO_PKG_VERSION").into(),
            services: self.status.own_services(),
            numbers: self.status.own_numbers(),
            rooms,
            ends,
        };
        let mut text = serde_json::json!(announcement).to_string();
        if text.len() > MAX_MESSAGE {
            announcement.rooms.clear();
            text = serde_json::json!(announcement).to_string();
        }
        if let Err(error) = self.cluster.client().publish(SUBJECT, text.into()).await {
            tracing::debug!(error = ?error.to_string(), "NATS does not take how this process is");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(machine: &str, services: &[&str], connections: f64) -> Announcement {
        let service = |name: &&str| {
            let part = PartStatus { name: "all of it".into(), state: Shown::Ok, reason: None };
            ServiceStatus::new(*name, vec![part])
        };
        let announcement = Announcement {
            machine: machine.into(),
            version: "1.2.3".into(),
            services: services.iter().map(service).collect(),
            numbers: Sample { connections, ..Sample::default() },
            rooms: Vec::new(),
            ends: false,
        };
        // As it travels.
        serde_json::from_str(&serde_json::json!(announcement).to_string()).unwrap()
    }

    fn shown(machines: &Machines, now: Instant) -> Vec<(String, Vec<(String, Shown)>)> {
        let services =
            |machine: Machine| machine.services.into_iter().map(|service| (service.name, service.state)).collect();
        machines.all(now).into_iter().map(|machine| (machine.name.clone(), services(machine))).collect()
    }

    #[test]
    fn what_runs_on_a_machine_is_shown_together_and_what_falls_silent_is_down() {
        let machines = Machines::default();
        let start = Instant::now();
        machines.hear(announcement("two", &["turn", "relay", "seed"], 7.0), start);
        machines.hear(announcement("one", &["relay"], 3.0), start);
        machines.hear(announcement("one", &["seed"], 0.0), start);
        let later = start + SILENT;
        machines.hear(announcement("one", &["relay"], 4.0), later);
        let (ok, down) = (Shown::Ok, Shown::Down);
        let expected = [
            ("one".into(), vec![("relay".into(), ok), ("seed".into(), down)]),
            ("two".into(), vec![("turn".into(), down), ("relay".into(), down), ("seed".into(), down)]),
        ];
        assert_eq!(shown(&machines, later), expected);
        assert_eq!(machines.numbers(later).connections, 4.0);
        assert!(shown(&machines, later + FORGET).len() == 2, "until something is heard, nothing is forgotten");
        machines.hear(announcement("one", &["relay", "seed"], 0.0), later);
        assert_eq!(
            shown(&machines, later)[0].1.iter().filter(|(_, state)| *state == down).count(),
            0,
            "another does it now"
        );
        machines.hear(announcement("three", &["seed"], 0.0), start + FORGET);
        assert_eq!(shown(&machines, start + FORGET).len(), 2, "one's relay, and three");
    }

    #[test]
    fn what_is_counted_outlives_who_counts_it() {
        let machines = Machines::new(Some("ours".into()));
        let now = Instant::now();
        let count = |machine: &str, ok: f64, tried: f64| {
            let mut announcement = announcement(machine, &["relay"], 0.0);
            announcement.numbers.relay = (ok, tried);
            machines.hear(announcement, now);
        };
        count("one", 1_000.0, 2_000.0);
        assert_eq!(machines.numbers(now).relay, (0.0, 0.0), "when that was, nobody knows");
        count("one", 1_003.0, 2_004.0);
        // It has begun anew.
        count("one", 2.0, 2.0);
        count("ours", 50.0, 60.0);
        count("ours", 70.0, 80.0);
        machines.hear(Announcement { ends: true, ..announcement("one", &["relay"], 0.0) }, now);
        assert_eq!(machines.numbers(now).relay, (5.0, 6.0));
    }

    #[test]
    fn who_ends_in_order_is_not_down_but_gone() {
        let machines = Machines::default();
        let now = Instant::now();
        machines.hear(announcement("one", &["relay"], 1.0), now);
        machines.hear(Announcement { ends: true, ..announcement("one", &["relay"], 1.0) }, now);
        assert_eq!(shown(&machines, now), []);
    }
}
