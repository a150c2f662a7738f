//! Who holds which room, for somebody who only looks.

use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt as _;
use service::{Cluster, KeepError};

use super::LEASES;
use super::bucket::Key;
use super::leases::Leases;

/// Whoever has written nothing for so long is not there, whatever the last thing was that was written.
const SILENT: Duration = Duration::from_secs(15);

/// What the bucket of leases says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overview {
    /// Machines that are there, by their names (`cluster.name`).
    pub machines: Vec<String>,
    /// Machines that seem to be there, but have written nothing for so long. Nobody was left to say that they are gone.
    pub silent: Vec<(String, Duration)>,
    /// Rooms, and who holds each.
    pub rooms: Vec<(String, Option<String>)>,
}

impl Overview {
    /// Asks the cluster. Without a bucket, nothing was ever held.
    ///
    /// # Errors
    /// [`KeepError`], when JetStream does not say.
    pub async fn ask(cluster: &Cluster) -> Result<Self, KeepError> {
        let names: Vec<String> = cluster.kept().await?.into_iter().map(|kept| kept.name).collect();
        if !names.contains(&format!("KV_{LEASES}")) {
            return Ok(Self::default());
        }
        let bucket = cluster.jetstream().get_key_value(LEASES).await.map_err(KeepError::of)?;
        // Nobody's eyes: an instance of no name.
        let mut leases = Leases::new(String::new(), String::new());
        let mut written = Vec::new();
        if bucket.status().await.map_err(KeepError::of)?.values() > 0 {
            let mut entries = bucket.watch_with_history(">").await.map_err(KeepError::of)?;
            while let Some(entry) = entries.next().await {
                let entry = entry.map_err(KeepError::of)?;
                if let Some(key) = Key::parse(&entry.key) {
                    leases.entry(&key, &entry.value, entry.revision, Instant::now());
                    if let Key::Instance(name) = key {
                        written.push((name, SystemTime::from(entry.created)));
                    }
                }
                if entry.delta == 0 {
                    break;
                }
            }
        }
        let (now, alive) = (SystemTime::now(), leases.alive());
        let silence = |name: &String| {
            let at = written.iter().rev().find(|(other, _)| other == name).map(|(_, at)| *at);
            // A clock that is ahead of ours says nothing of silence.
            at.and_then(|at| now.duration_since(at).ok()).unwrap_or_default()
        };
        let (silent, machines): (Vec<_>, Vec<_>) =
            alive.into_iter().map(|name| (silence(&name), name)).partition(|(silence, _)| *silence > SILENT);
        let silent: Vec<(String, Duration)> = silent.into_iter().map(|(silence, name)| (name, silence)).collect();
        let is_there = |holder: &String| silent.iter().all(|(name, _)| name != holder);
        let rooms = leases.overview().into_iter().map(|(room, holder)| (room, holder.filter(is_there)));
        Ok(Self { rooms: rooms.collect(), machines: machines.into_iter().map(|(_, name)| name).collect(), silent })
    }
}
