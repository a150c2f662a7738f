//! A room's stream: its log, in the batches in which it was accepted.
//!
//! A batch is JSON lines, deflated, in one message or several: the first byte of each says whether it is the batch's first
//! and whether it is its last. A batch whose last message never came is none.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{self, Stream};
use bytes::Bytes;
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use futures_util::StreamExt as _;
use service::Cluster;

use super::bucket::RoomHash;
use crate::archive::LogEntry;

const FIRST: u8 = 1;
const LAST: u8 = 2;
/// Bytes of a message of a batch, at most; servers of NATS take 1 MiB unless set otherwise.
const CHUNK: usize = 512 << 10;
/// How long a message may take to come that is in the stream: its server may have just died.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that a batch may have, inflated: more is not one of ours.
const MAX_BATCH: u64 = 1 << 30;

/// A room's stream does not do what is asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// There is more in it than was known.
    #[error("the room's stream has gone on")]
    Behind,
    #[error("JetStream: {0}")]
    JetStream(String),
    #[error("a batch in the room's stream is damaged: {0}")]
    Damaged(std::io::Error),
}

impl StreamError {
    pub(super) fn of(error: impl std::fmt::Display) -> Self {
        Self::JetStream(error.to_string())
    }
}

/// A batch, as messages.
fn chunks(entries: &[LogEntry], chunk: usize) -> std::io::Result<Vec<Bytes>> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
    for entry in entries {
        serde_json::to_writer(&mut encoder, entry)?;
        encoder.write_all(b"\n")?;
    }
    let content = encoder.finish()?;
    let count = content.chunks(chunk).len();
    let chunks = content.chunks(chunk).enumerate().map(|(index, part)| {
        let first = if index == 0 { FIRST } else { 0 };
        let last = if index + 1 == count { LAST } else { 0 };
        [&[first | last], part].concat().into()
    });
    Ok(chunks.collect())
}

/// Puts batches together again.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    content: Option<Vec<u8>>,
}

impl Assembler {
    /// Takes a message. Returns the batch whose last it is.
    fn push(&mut self, message: &[u8]) -> std::io::Result<Option<Vec<LogEntry>>> {
        let Some((flags, part)) = message.split_first() else { return Ok(None) };
        if flags & FIRST != 0 {
            self.content = Some(Vec::new());
        }
        // The rest of a batch whose beginning was taken in before, or never came.
        let Some(content) = &mut self.content else { return Ok(None) };
        content.extend_from_slice(part);
        if flags & LAST == 0 {
            return Ok(None);
        }
        let content = self.content.take().unwrap_or_default();
        let mut text = String::new();
        DeflateDecoder::new(&content[..]).take(MAX_BATCH).read_to_string(&mut text)?;
        let entries = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Some(entries))
    }
}

/// A room's stream.
#[derive(Debug, Clone)]
pub(crate) struct RoomStream {
    cluster: Cluster,
    name: String,
    subject: String,
    description: String,
}

/// Where a stream stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// When it was made, s since the Unix epoch.
    pub(super) made: i64,
    /// The oldest message that it still has, and the newest it ever had.
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

impl RoomStream {
    /// The stream of the room called `name`.
    pub(crate) fn of(cluster: Cluster, name: &str) -> Self {
        let hash = RoomHash::of(name);
        Self {
            cluster,
            name: format!("homeport_room_{}", hash.as_str()),
            subject: format!("homeport.room.{}", hash.as_str()),
            description: format!("operations of the room {}", name.escape_debug()),
        }
    }

    /// The stream, made when there is none, and where it stands.
    pub(super) async fn open(&self) -> Result<(Stream, Standing), StreamError> {
        let config = stream::Config {
            name: self.name.clone(),
            description: Some(self.description.clone()),
            subjects: vec![self.subject.clone()],
            ..stream::Config::default()
        };
        let stream = self.cluster.keep(config).await.map_err(StreamError::of)?;
        // Of a stream that was there, what it said first may be old by now.
        let info = stream.get_info().await.map_err(StreamError::of)?;
        let standing = Standing {
            made: info.created.unix_timestamp(),
            first: info.state.first_sequence,
            last: info.state.last_sequence,
            messages: info.state.messages,
            bytes: info.state.bytes,
        };
        Ok((stream, standing))
    }

    /// Appends a batch behind the message `after`, which must be the last there is. Returns its own last message.
    pub(crate) async fn append(&self, entries: &[LogEntry], after: u64) -> Result<u64, StreamError> {
        if !self.cluster.is_connected() {
            return Err(StreamError::JetStream("NATS is out of reach".into()));
        }
        let max = self.cluster.client().server_info().max_payload / 2;
        let chunks = chunks(entries, CHUNK.min(max.max(1_024))).map_err(StreamError::of)?;
        let mut sent = Vec::with_capacity(chunks.len());
        for (expected, chunk) in (after..).zip(chunks) {
            let message = PublishMessage::build().expected_last_sequence(expected).payload(chunk);
            sent.push(self.cluster.jetstream().send_publish(self.subject.clone(), message).await);
        }
        let mut last = after;
        for acknowledgement in sent {
            let waited = match acknowledgement {
                Ok(acknowledgement) => acknowledgement.await,
                Err(error) => Err(error),
            };
            last = match waited {
                Ok(acknowledged) => acknowledged.sequence,
                Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => return Err(StreamError::Behind),
                Err(error) => return Err(StreamError::of(error)),
            };
        }
        Ok(last)
    }

    /// All batches behind the message `after`, each with its last message; and the last message of all, which may be of a
    /// batch that was never ended.
    pub(crate) async fn read_rest(&self, after: u64) -> Result<(Vec<(Vec<LogEntry>, u64)>, u64), StreamError> {
        let (stream, standing) = self.open().await?;
        let mut batches = Vec::new();
        if standing.last > after {
            let mut tail = Tail::new(&stream, after).await?;
            while let Some(Taken { message, batch }) = tail.next_there_is().await? {
                batches.extend(batch.map(|entries| (entries, message)));
                if message >= standing.last {
                    break;
                }
            }
        }
        Ok((batches, standing.last))
    }

    /// Has the stream forget everything up to a message, and that one.
    pub(super) async fn forget(&self, message: u64) -> Result<(), StreamError> {
        let stream = self.cluster.jetstream().get_stream(&self.name).await.map_err(StreamError::of)?;
        stream.purge().sequence(message + 1).await.map_err(StreamError::of)?;
        Ok(())
    }
}

/// What a stream has behind a message, and what comes.
pub(super) struct Tail {
    messages: pull::Ordered,
    assembler: Assembler,
}

/// A message, and the batch that it ends.
pub(super) struct Taken {
    pub(super) message: u64,
    pub(super) batch: Option<Vec<LogEntry>>,
}

impl Tail {
    pub(super) async fn new(stream: &Stream, after: u64) -> Result<Self, StreamError> {
        let consumer = pull::OrderedConfig {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: after + 1 },
            ..pull::OrderedConfig::default()
        };
        let consumer = stream.create_consumer(consumer).await.map_err(StreamError::of)?;
        let messages = consumer.messages().await.map_err(StreamError::of)?;
        Ok(Self { messages, assembler: Assembler::default() })
    }

    /// The next message, of which it is known that there is one.
    pub(super) async fn next_there_is(&mut self) -> Result<Option<Taken>, StreamError> {
        let waited = tokio::time::timeout(PATIENCE, self.next()).await;
        waited.unwrap_or_else(|_| Err(StreamError::JetStream("a message that is there does not come".into())))
    }

    /// The next message, once there is one.
    pub(super) async fn next(&mut self) -> Result<Option<Taken>, StreamError> {
        let Some(message) = self.messages.next().await else { return Ok(None) };
        let message = message.map_err(StreamError::of)?;
        let sequence = message.info().map(|info| info.stream_sequence).map_err(StreamError::of)?;
        let batch = self.assembler.push(&message.payload).map_err(StreamError::Damaged)?;
        Ok(Some(Taken { message: sequence, batch }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(count: u64) -> Vec<LogEntry> {
        (1..=count).map(|seq| LogEntry(seq, seq * 7, 0, None, format!("{{\"ü\":\"{seq}\\n\"}}"))).collect()
    }

    #[test]
    fn batches_come_back_as_they_were_and_unfinished_ones_do_not() {
        let (small, large) = (entries(1), entries(5_000));
        let messages = chunks(&large, 100).unwrap();
        assert!(messages.len() > 10);
        let mut assembler = Assembler::default();
        let mut batches = Vec::new();
        // The end of one whose beginning nobody saw, one that was broken off, and two whole ones.
        let broken = [&messages[5..], &messages[..7], &chunks(&small, 100).unwrap(), &messages[..]].concat();
        for message in broken {
            batches.extend(assembler.push(&message).unwrap());
        }
        assert_eq!(batches, [small, large]);
    }
}
