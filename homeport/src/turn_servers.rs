//! The TURN servers that apps are told of: that of this process, those of the settings, and those that say over NATS that
//! they are there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use prometheus::IntGauge;
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use service::{Cluster, Health, State};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinHandle;

use crate::client_config::is_host;
use crate::turn_credentials::TurnPlace;

/// Where TURN servers say that they are there.
const SUBJECT: &str = "homeport.turn";
/// How often they do.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(2);
/// How long it may take to say that the server ends.
const FAREWELL: Duration = Duration::from_millis(500);
/// Who has said nothing for so long is gone.
const GONE_AFTER: Duration = Duration::from_secs(7);
/// Servers that are remembered; nobody has so many.
const MAX_ANNOUNCED: usize = 1_024;
/// Servers that an app is told of: browsers try all of them, and each costs time.
const MAX_TOLD: usize = 2;

/// A TURN server, and what part of the load it is to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TurnServer {
    #[serde(flatten)]
    pub(crate) place: TurnPlace,
    /// Where it is, in the owner's words.
    pub(crate) region: Option<String>,
    /// How much it takes beside the others; at least 1.
    pub(crate) weight: u32,
}

/// Stands for a secret where that must not be seen: a server takes credentials that were made with a secret of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct SecretPrint(String);

impl SecretPrint {
    pub(crate) fn of(secret: &str) -> Self {
        let digest = Sha256::new_with_prefix("homeport turn secret").chain_update(secret).finalize();
        Self(hex::encode(&digest[..8]))
    }
}

/// What a TURN server says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Announcement {
    /// The name of its machine.
    name: String,
    #[serde(flatten)]
    server: TurnServer,
    /// How many are open.
    allocations: u64,
    /// Whether it can take more.
    serves: bool,
    /// Its secrets; versions that do not say are taken to have ours.
    #[serde(default)]
    secrets: Option<Vec<SecretPrint>>,
}

/// A server that has said that it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KnownServer {
    /// The name of its machine.
    pub(crate) machine: String,
    pub(crate) region: Option<String>,
    /// Whether it can take more.
    pub(crate) serves: bool,
    /// Whether it takes the credentials that apps are given here.
    pub(crate) takes_ours: bool,
}

#[derive(Debug)]
struct Announced {
    announcement: Announcement,
    heard: Instant,
}

/// All that is known.
#[derive(Debug, Default)]
pub(crate) struct TurnServers {
    /// Those of which nothing is known but that they are meant to be there.
    fixed: Vec<TurnServer>,
    /// The region of this machine, for apps that name none.
    region: Option<String>,
    /// What the credentials are made with that apps are given.
    secret: Option<SecretPrint>,
    /// By the name of their machine.
    announced: Mutex<HashMap<String, Announced>>,
}

impl TurnServers {
    pub(crate) fn new(fixed: Vec<TurnServer>, region: Option<String>, secret: Option<SecretPrint>) -> Self {
        Self { fixed, region, secret, announced: Mutex::default() }
    }

    /// Whether a server takes the credentials that apps are given.
    fn takes_ours(&self, announcement: &Announcement) -> bool {
        match (&self.secret, &announcement.secrets) {
            (Some(ours), Some(theirs)) => theirs.contains(ours),
            _ => true,
        }
    }

    /// The servers for an app in `region`, the best first: those near it, and of them those with least to do.
    pub(crate) fn best(&self, region: Option<&str>, now: Instant) -> Vec<TurnPlace> {
        let region = region.or(self.region.as_deref());
        let mut random = rand::rng();
        let mut ranked: Vec<((bool, f64), TurnPlace)> = Vec::new();
        let mut rank = |server: &TurnServer, allocations: u64| {
            let is_far = region.is_some() && server.region.as_deref() != region;
            let weight = f64::from(server.weight.max(1));
            // Among equals chance decides, so that each has its share by its weight: the least of exponential variates.
            let chance = -random.random_range(f64::MIN_POSITIVE..1.0).ln();
            ranked.push(((is_far, (allocations as f64 + chance) / weight), server.place.clone()));
        };
        self.fixed.iter().for_each(|server| rank(server, 0));
        for Announced { announcement, heard } in self.lock().values() {
            let is_there = now.saturating_duration_since(*heard) < GONE_AFTER;
            if announcement.serves && is_there && self.takes_ours(announcement) {
                rank(&announcement.server, announcement.allocations);
            }
        }
        ranked.sort_by(|(one, _), (other, _)| one.0.cmp(&other.0).then(one.1.total_cmp(&other.1)));
        let mut best = Vec::new();
        for (_, place) in ranked {
            // One may be named by the settings and speak for itself too.
            if best.len() < MAX_TOLD && !best.contains(&place) {
                best.push(place);
            }
        }
        best
    }

    /// Listens for as long as it takes for every server of the cluster to have spoken.
    pub(crate) async fn gather(self: &Arc<Self>, cluster: &Cluster) -> Vec<KnownServer> {
        let listening = self.listen(cluster);
        tokio::time::sleep(ANNOUNCE_EVERY + ANNOUNCE_EVERY / 4).await;
        listening.abort();
        let known = |Announced { announcement, .. }: &Announced| KnownServer {
            machine: announcement.name.clone(),
            region: announcement.server.region.clone(),
            serves: announcement.serves,
            takes_ours: self.takes_ours(announcement),
        };
        let mut all: Vec<KnownServer> = self.lock().values().map(known).collect();
        all.sort_by(|one, other| one.machine.cmp(&other.machine));
        all
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Announced>> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, announcement: Announcement, now: Instant) {
        let mut announced = self.lock();
        announced.retain(|_, other| now.saturating_duration_since(other.heard) < GONE_AFTER);
        if !announced.contains_key(&announcement.name) && !self.takes_ours(&announcement) {
            let name = announcement.name.escape_debug();
            tracing::warn!(%name, "the TURN server of a machine has another turn.secret than this one: apps are not told of it");
        }
        if announced.len() < MAX_ANNOUNCED || announced.contains_key(&announcement.name) {
            announced.insert(announcement.name.clone(), Announced { announcement, heard: now });
        }
    }

    /// Listens to what TURN servers of the cluster say, until it is aborted.
    pub(crate) fn listen(self: &Arc<Self>, cluster: &Cluster) -> JoinHandle<()> {
        let (servers, client) = (Arc::clone(self), cluster.client().clone());
        tokio::spawn(async move {
            let mut subscriber = match client.subscribe(SUBJECT).await {
                Ok(subscriber) => subscriber,
                Err(error) => {
                    return tracing::error!(error = ?error.to_string(), "NATS cannot be asked for TURN servers");
                }
            };
            while let Some(message) = subscriber.next().await {
                match serde_json::from_slice::<Announcement>(&message.payload) {
                    Ok(announcement) if is_host(&announcement.server.place.host) => {
                        servers.hear(announcement, Instant::now());
                    }
                    _ => tracing::debug!("what a TURN server says is not understood"),
                }
            }
        })
    }
}

/// Tells the cluster of the TURN server of this process.
pub(crate) struct Announcer {
    cluster: Cluster,
    server: TurnServer,
    secrets: Vec<SecretPrint>,
    allocations: IntGauge,
    health: Health,
    /// The list of this very process, which does not hear itself.
    own: Option<Arc<TurnServers>>,
}

impl Announcer {
    pub(crate) fn new(
        cluster: Cluster,
        server: TurnServer,
        secrets: &[String],
        turn: &turn_server::Server,
        own: Option<Arc<TurnServers>>,
    ) -> Arc<Self> {
        let (allocations, health) = (turn.allocations().clone(), turn.telemetry().health.clone());
        let secrets = secrets.iter().map(|secret| SecretPrint::of(secret)).collect();
        Arc::new(Self { cluster, server, secrets, allocations, health, own })
    }

    /// Goes on saying that the server is there, until it is aborted.
    pub(crate) fn start(self: &Arc<Self>) -> JoinHandle<()> {
        let announcer = Arc::clone(self);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(ANNOUNCE_EVERY);
            loop {
                ticks.tick().await;
                let serves = announcer.health.parts().values().all(|state| *state == State::Ok);
                announcer.say(serves).await;
            }
        })
    }

    /// Says that the server takes nobody on any more.
    pub(crate) async fn retire(&self) {
        let told = async {
            self.say(false).await;
            self.cluster.client().flush().await
        };
        // Who does not hear of it sees it by the silence.
        if !matches!(tokio::time::timeout(FAREWELL, told).await, Ok(Ok(()))) {
            tracing::debug!("NATS was not told that this TURN server ends");
        }
    }

    async fn say(&self, serves: bool) {
        let announcement = Announcement {
            name: self.cluster.name().to_owned(),
            server: self.server.clone(),
            allocations: u64::try_from(self.allocations.get()).unwrap_or(0),
            serves,
            secrets: Some(self.secrets.clone()),
        };
        if let Some(own) = &self.own {
            own.hear(announcement.clone(), Instant::now());
        }
        // What is said while NATS is away is of no use when it is back.
        if self.cluster.is_connected()
            && let Err(error) =
                self.cluster.client().publish(SUBJECT, serde_json::json!(announcement).to_string().into()).await
        {
            tracing::debug!(error = ?error.to_string(), "NATS does not take what this TURN server says");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(host: &str, region: Option<&str>, weight: u32) -> TurnServer {
        let place = TurnPlace { host: host.into(), port: 3478, tls_port: Some(5349) };
        TurnServer { place, region: region.map(str::to_owned), weight }
    }

    fn hosts(servers: &TurnServers, region: Option<&str>, now: Instant) -> Vec<String> {
        servers.best(region, now).into_iter().map(|place| place.host).collect()
    }

    #[test]
    fn the_nearest_comes_first_and_another_region_behind_it() {
        let fixed = vec![server("eu", Some("eu"), 1), server("us", Some("us"), 1), server("as", Some("as"), 1)];
        let servers = TurnServers::new(fixed, Some("us".into()), None);
        let now = Instant::now();
        assert_eq!(hosts(&servers, Some("eu"), now)[0], "eu");
        assert_eq!(hosts(&servers, None, now)[0], "us", "this machine's own region");
        assert_eq!(hosts(&servers, Some("elsewhere"), now).len(), MAX_TOLD);
    }

    #[test]
    fn of_equals_each_has_its_share() {
        let servers = TurnServers::new(vec![server("large", None, 9), server("small", None, 1)], None, None);
        let now = Instant::now();
        let small = (0..2_000).filter(|_| hosts(&servers, None, now)[0] == "small").count();
        assert!((100..320).contains(&small), "{small} of 2000, where a tenth was meant");
    }

    #[test]
    fn who_is_busy_comes_later_and_who_drains_or_is_silent_not_at_all() {
        let servers = TurnServers::new(Vec::new(), None, None);
        let start = Instant::now();
        let say = |name: &str, allocations, serves, at| {
            let server = server(name, None, 1);
            let announcement = Announcement { name: name.into(), server, allocations, serves, secrets: None };
            // As it travels.
            let text = serde_json::to_string(&announcement).unwrap();
            servers.hear(serde_json::from_str(&text).unwrap(), at);
        };
        say("busy", 50, true, start);
        say("idle", 3, true, start);
        assert_eq!(hosts(&servers, None, start), ["idle", "busy"]);
        say("idle", 3, false, start);
        assert_eq!(hosts(&servers, None, start), ["busy"]);
        let later = start + GONE_AFTER;
        say("new", 0, true, later);
        assert_eq!(hosts(&servers, None, later), ["new"]);
        assert_eq!(servers.lock().len(), 1, "who is gone is forgotten");
    }

    #[test]
    fn of_servers_with_another_secret_nobody_is_told() {
        let servers = TurnServers::new(Vec::new(), None, Some(SecretPrint::of("new")));
        let now = Instant::now();
        for (name, secrets) in [("ours", &["old", "new"][..]), ("another's", &["theirs"]), ("nobody's", &[])] {
            let secrets = Some(secrets.iter().map(|secret| SecretPrint::of(secret)).collect());
            let server = server(name, None, 1);
            servers.hear(Announcement { name: name.into(), server, allocations: 0, serves: true, secrets }, now);
        }
        assert_eq!(hosts(&servers, None, now), ["ours"]);
    }
}
