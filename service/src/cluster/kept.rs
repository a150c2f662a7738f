//! What the machines of a cluster keep at NATS: streams of JetStream, which buckets and object stores are too.

use std::collections::BTreeSet;

use async_nats::jetstream::stream::{self, Stream};
use futures_util::TryStreamExt as _;

use super::Cluster;

/// How the names of streams begin that are Homeport's: of plain ones, of buckets, of object stores.
const OURS: [&str; 3] = ["homeport_", "KV_homeport_", "OBJ_homeport_"];

/// JetStream does not do what is asked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("JetStream: {0}")]
pub struct KeepError(String);

impl KeepError {
    /// What was said.
    pub fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// A stream, and on which servers of NATS it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// What it is, in words.
    pub description: String,
    /// On how many servers it is to be.
    pub replicas: usize,
    /// Bytes that it has on each.
    pub bytes: u64,
    /// Whether there is a server that decides what comes next: without one, nothing can be written.
    pub has_leader: bool,
    /// Those of its servers that have not all of it now.
    pub behind: Vec<Behind>,
}

/// A server that has not all of a stream.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Behind {
    /// The name of the server.
    pub server: String,
    /// Whether it is out of reach, rather than late.
    pub is_offline: bool,
}

impl Cluster {
    /// The stream of `config`, made when there is none, on as many servers of NATS as `cluster.replicas` says.
    ///
    /// # Errors
    /// [`KeepError`]. That one which is there cannot be brought onto more servers is logged, and no error.
    pub async fn keep(&self, config: stream::Config) -> Result<Stream, KeepError> {
        let config = stream::Config { num_replicas: self.replicas, ..config };
        let stream = self.jetstream.get_or_create_stream(config).await.map_err(KeepError::of)?;
        let there = &stream.cached_info().config;
        if there.num_replicas != self.replicas {
            // It may have been made otherwise than we would make it: nothing else is to change.
            let wanted = stream::Config { num_replicas: self.replicas, ..there.clone() };
            let (name, replicas) = (&there.name, self.replicas);
            match self.jetstream.update_stream(wanted).await {
                Ok(_) => tracing::info!(name, replicas, "a stream is brought onto other servers of NATS"),
                Err(error) => {
                    let error = error.to_string();
                    tracing::warn!(
                        ?error,
                        name,
                        replicas,
                        "a stream cannot be on as many servers of NATS as cluster.replicas says"
                    );
                }
            }
        }
        Ok(stream)
    }

    /// Everything of Homeport's that is kept at NATS.
    ///
    /// # Errors
    /// [`KeepError`], when JetStream does not say: it is not switched on, or most of its servers are gone.
    pub async fn kept(&self) -> Result<Vec<Kept>, KeepError> {
        let ours = |name: &str| OURS.iter().any(|prefix| name.starts_with(prefix));
        let names: BTreeSet<String> = self.jetstream.stream_names().try_collect().await.map_err(KeepError::of)?;
        let known: Vec<stream::Info> = self.jetstream.streams().try_collect().await.map_err(KeepError::of)?;
        let mut kept: Vec<Kept> = known.into_iter().filter(|info| ours(&info.config.name)).map(Kept::of).collect();
        // Of a stream without a leader nobody says anything but that it is there.
        for name in names.into_iter().filter(|name| ours(name)) {
            if kept.iter().all(|one| one.name != name) {
                kept.push(Kept {
                    name,
                    description: String::new(),
                    replicas: self.replicas,
                    bytes: 0,
                    has_leader: false,
                    behind: Vec::new(),
                });
            }
        }
        Ok(kept)
    }
}

impl Kept {
    fn of(info: stream::Info) -> Self {
        // A server of NATS alone says nothing of a cluster.
        let has_leader = info.cluster.as_ref().is_none_or(|cluster| cluster.leader.is_some());
        let others = info.cluster.into_iter().flat_map(|cluster| cluster.replicas);
        let behind = others.filter(|other| other.offline || !other.current);
        Self {
            name: info.config.name,
            description: info.config.description.unwrap_or_default(),
            replicas: info.config.num_replicas,
            bytes: info.state.bytes,
            has_leader,
            behind: behind.map(|other| Behind { server: other.name, is_offline: other.offline }).collect(),
        }
    }
}
