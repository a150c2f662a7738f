//! Whether the other machines of a cluster can be reached, and what they keep together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use seed_peer::Overview;
use service::cluster::PART;
use service::{Cluster, Kept, State};

use super::Finding;
use crate::probe::PATIENCE;
use crate::settings::Settings;
use crate::turn_secret;
use crate::turn_servers::{KnownServer, SecretPrint, TurnServers};

/// How often it is looked whether NATS is connected.
const LOOK: Duration = Duration::from_millis(20);
const ROOMS: &str = "cluster, rooms";
const SEEDS: &str = "look at the health of the seeds (/readyz of each), part \"rooms of the cluster\"";
/// Things of one kind that are named; of the rest it is said how many there are.
const NAMED: usize = 3;

/// Connects with NATS as the services do, has it answer, and asks what is kept there.
pub(super) async fn look(settings: &Settings) -> anyhow::Result<Vec<Finding>> {
    let Some(config) = settings.cluster()? else { return Ok(Vec::new()) };
    let (name, replicas) = (config.name.clone(), config.replicas);
    let cluster = Cluster::connect(config).await?;
    let connection = connection(&cluster, &name).await?;
    let is_connected = cluster.is_connected();
    let mut findings = vec![connection];
    if is_connected {
        findings.extend(turn(&turn_servers(settings)?.gather(&cluster).await));
    }
    let shares_rooms = settings.has_shared_rooms();
    // Only what is live needs nothing that is kept.
    if is_connected && (shares_rooms || settings.relay.store) {
        match tokio::time::timeout(PATIENCE, cluster.kept()).await {
            Ok(Ok(kept)) => {
                findings.extend(streams(&kept, replicas));
                if shares_rooms {
                    findings.push(match tokio::time::timeout(PATIENCE, Overview::ask(&cluster)).await {
                        Ok(Ok(overview)) => leases(settings, &name, &overview),
                        Ok(Err(error)) => Finding::failure(ROOMS, error.to_string(), SEEDS),
                        Err(_) => Finding::failure(ROOMS, "JetStream does not say who holds them", SEEDS),
                    });
                }
            }
            failed => {
                let reason = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => "JetStream does not answer".to_owned(),
                };
                let advice = "switch it on in every server of NATS (jetstream {} in its settings), and have more than half of \
                              the servers run and reach each other";
                findings.push(Finding::failure("cluster, streams", reason, advice));
            }
        }
    }
    Ok(findings)
}

async fn connection(cluster: &Cluster, name: &str) -> anyhow::Result<Finding> {
    const WHAT: &str = "cluster";
    let state = || cluster.telemetry().health.parts().remove(PART);
    let start = Instant::now();
    while state() != Some(State::Ok) {
        if start.elapsed() > PATIENCE {
            let reason = match state() {
                Some(State::Degraded(reason)) => reason,
                _ => "NATS does not answer".to_owned(),
            };
            let advice = "start it, let its port through the firewall between the machines, and look at cluster.nats and who \
                          we are to it (cluster.user, cluster.token or cluster.credentials)";
            return Ok(Finding::failure(WHAT, reason, advice));
        }
        tokio::time::sleep(LOOK).await;
    }
    // Answered by the server once it has seen to all that was said before.
    let asked = Instant::now();
    cluster.client().flush().await?;
    let (version, took) = (cluster.client().server_info().version, asked.elapsed().as_millis());
    Ok(Finding::ok(WHAT, format!("{name} is connected with NATS {version}, which answers after {took} ms")))
}

/// What a relay of these settings would know of TURN servers, before it has heard of any.
fn turn_servers(settings: &Settings) -> anyhow::Result<Arc<TurnServers>> {
    let secret = match settings.turn_credentials().secrets.into_iter().next() {
        Some(secret) => Some(secret),
        None => turn_secret::load(&settings.seed.data)?,
    };
    Ok(Arc::new(TurnServers::new(Vec::new(), None, secret.map(|secret| SecretPrint::of(&secret)))))
}

/// How the TURN servers are that apps of this machine can be told of.
fn turn(servers: &[KnownServer]) -> Vec<Finding> {
    const WHAT: &str = "cluster, TURN";
    let mut findings = Vec::new();
    let strangers: Vec<&str> =
        servers.iter().filter(|server| !server.takes_ours).map(|server| &*server.machine).collect();
    if !strangers.is_empty() {
        let found = format!("another turn.secret than this machine: {}; apps are not told of it", named(strangers));
        let advice = "give all machines the same; turn.secret takes a list, of which the first makes credentials, so that they can \
                      be changed one by one";
        findings.push(Finding::warning(WHAT, found, advice));
    }
    let idle: Vec<&str> = servers.iter().filter(|server| !server.serves).map(|server| &*server.machine).collect();
    if !idle.is_empty() {
        let found = format!("not ready: {}; apps are told of others", named(idle));
        findings.push(Finding::warning(WHAT, found, "look at its health (/readyz)"));
    }
    let ready: Vec<String> = servers
        .iter()
        .filter(|server| server.takes_ours && server.serves)
        .map(|server| format!("{} ({})", server.machine, server.region.as_deref().unwrap_or("no region")))
        .collect();
    if !ready.is_empty() {
        findings.push(Finding::ok(WHAT, format!("apps are told of {}", ready.join(", "))));
    }
    findings
}

/// The first few of some names, and how many there are beside them.
fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    let shown: Vec<String> = names.iter().take(NAMED).map(|name| name.escape_debug().to_string()).collect();
    let more = names.len().saturating_sub(NAMED);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

/// What a stream is, in words.
fn words(kept: &Kept) -> &str {
    if kept.description.is_empty() { &kept.name } else { &kept.description }
}

/// How the streams are of what is kept at NATS.
fn streams(kept: &[Kept], replicas: usize) -> Vec<Finding> {
    const WHAT: &str = "cluster, streams";
    let mut findings = Vec::new();
    let stuck: Vec<&str> = kept.iter().filter(|one| !one.has_leader).map(words).collect();
    if !stuck.is_empty() {
        let found = format!("nothing can be written to {} of {}: {}", stuck.len(), kept.len(), named(stuck));
        let advice =
            "start the servers of NATS that are missing: more than half of those that a stream is on must be there";
        findings.push(Finding::failure(WHAT, found, advice));
    }
    let mut behind: BTreeMap<(&str, bool), Vec<&str>> = BTreeMap::new();
    for one in kept {
        for other in &one.behind {
            behind.entry((&other.server, other.is_offline)).or_default().push(words(one));
        }
    }
    for ((server, is_offline), of) in behind {
        let how = if is_offline { "is out of reach, and should have" } else { "has not all yet of" };
        let found = format!("server {} {how} {} of {}: {}", server.escape_debug(), of.len(), kept.len(), named(of));
        let advice = if is_offline {
            "start it, or look at the network between the machines; until then nothing else may fail"
        } else {
            "it catches up by itself; look again in a minute"
        };
        findings.push(Finding::warning(WHAT, found, advice));
    }
    let fewer: Vec<&str> = kept.iter().filter(|one| one.replicas != replicas).map(words).collect();
    if !fewer.is_empty() {
        let found =
            format!("{} of {} are not on {replicas} servers of NATS: {}", fewer.len(), kept.len(), named(fewer));
        let advice = "restart the services of this machine, which brings them there if there are so many servers, or mend \
                      cluster.replicas";
        findings.push(Finding::warning(WHAT, found, advice));
    }
    if findings.is_empty() {
        let mib = kept.iter().map(|one| one.bytes).sum::<u64>() as f64 / f64::from(1 << 20);
        let found = match kept.len() {
            0 => "there are none yet".to_owned(),
            count => format!("{count}, each whole on {replicas} of the servers of NATS, {mib:.1} MiB on each"),
        };
        findings.push(Finding::ok(WHAT, found));
    }
    findings
}

/// Who holds the rooms of this machine's settings.
fn leases(settings: &Settings, us: &str, overview: &Overview) -> Finding {
    let Overview { machines, silent, rooms } = overview;
    if let Some((name, silence)) = silent.first() {
        let found = format!(
            "{name} has not said for {} s that it is there, and nobody says that it is gone",
            silence.as_secs()
        );
        return Finding::failure(ROOMS, found, "start the seeds of the cluster: none of them seems to run");
    }
    if machines.is_empty() {
        return Finding::failure(ROOMS, "no seed is there", "start them");
    }
    let held: BTreeSet<&str> = rooms.iter().filter(|(_, holder)| holder.is_some()).map(|(room, _)| &**room).collect();
    let missing: Vec<&str> =
        settings.seed.room.iter().map(|room| &*room.name).filter(|room| !held.contains(room)).collect();
    if !missing.is_empty() {
        return Finding::failure(ROOMS, format!("nobody holds {}", named(missing)), SEEDS);
    }
    let share = |machine: &String| {
        let count = rooms.iter().filter(|(_, holder)| holder.as_ref() == Some(machine)).count();
        format!("{machine} holds {count}")
    };
    let shares = machines.iter().map(share).collect::<Vec<_>>().join(", ");
    if machines.iter().any(|machine| machine == us) {
        Finding::ok(ROOMS, shares)
    } else {
        let advice = "start the seed, or have it reach NATS: without it this machine cannot stand in for others";
        Finding::warning(ROOMS, format!("the seed of this machine ({us}) is not there; {shares}"), advice)
    }
}

#[cfg(test)]
mod tests {
    use service::Behind;

    use super::super::Verdict;
    use super::*;

    fn kept(name: &str) -> Kept {
        Kept {
            name: name.into(),
            description: String::new(),
            replicas: 3,
            bytes: 1 << 20,
            has_leader: true,
            behind: Vec::new(),
        }
    }

    fn of(found: &[Finding]) -> Vec<(Verdict, &str)> {
        found.iter().map(|finding| (finding.verdict, &*finding.found)).collect()
    }

    #[test]
    fn streams_that_are_whole_are_one_line_and_troubles_are_gathered() {
        let all: Vec<Kept> = ["a", "b", "c", "d", "e"].map(kept).into();
        assert_eq!(
            of(&streams(&all, 3)),
            [(Verdict::Ok, "5, each whole on 3 of the servers of NATS, 5.0 MiB on each")]
        );
        let mut troubled = all.clone();
        troubled[0].has_leader = false;
        for one in &mut troubled[1..] {
            one.behind = vec![Behind { server: "two".into(), is_offline: true }];
        }
        assert_eq!(
            of(&streams(&troubled, 3)),
            [
                (Verdict::Failure, "nothing can be written to 1 of 5: a"),
                (Verdict::Warning, "server two is out of reach, and should have 4 of 5: b, c, d and 1 more"),
            ]
        );
        assert_eq!(of(&streams(&all, 5))[0].0, Verdict::Warning);
        assert_eq!(of(&streams(&[], 1)), [(Verdict::Ok, "there are none yet")]);
    }

    #[test]
    fn turn_servers_that_apps_cannot_use_are_named() {
        let server = |machine: &str, region: Option<&str>, serves, takes_ours| KnownServer {
            machine: machine.into(),
            region: region.map(str::to_owned),
            serves,
            takes_ours,
        };
        let servers = [
            server("one", Some("eu"), true, true),
            server("two", None, true, true),
            server("three", None, true, false),
            server("four", None, false, true),
        ];
        assert_eq!(
            of(&turn(&servers)),
            [
                (Verdict::Warning, "another turn.secret than this machine: three; apps are not told of it"),
                (Verdict::Warning, "not ready: four; apps are told of others"),
                (Verdict::Ok, "apps are told of one (eu), two (no region)"),
            ]
        );
    }

    #[test]
    fn rooms_without_a_holder_and_machines_without_a_sign_of_life_are_named() {
        let mut settings = Settings::default();
        settings.seed.room = vec![serde_json::from_str(r#"{"name":"notes"}"#).unwrap()];
        let say = |overview: &Overview, us: &str| {
            let finding = leases(&settings, us, overview);
            (finding.verdict, finding.found)
        };
        let mut overview = Overview::default();
        assert_eq!(say(&overview, "one"), (Verdict::Failure, "no seed is there".into()));
        overview.machines = vec!["one".into(), "two".into()];
        assert_eq!(say(&overview, "one"), (Verdict::Failure, "nobody holds notes".into()));
        overview.rooms = vec![("notes".into(), Some("two".into())), ("old".into(), None)];
        assert_eq!(say(&overview, "one"), (Verdict::Ok, "one holds 0, two holds 1".into()));
        assert_eq!(say(&overview, "three").0, Verdict::Warning);
        overview.silent = vec![("two".into(), Duration::from_secs(3_600))];
        assert_eq!(say(&overview, "one").0, Verdict::Failure);
    }
}
