//! The thread that answers peers from the archive.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use genosdb::Message;
use genosdb::signature::Identity;
use rusqlite::Connection;
use tokio::sync::mpsc::UnboundedSender;

use super::answer::Known;
use super::graph::RoomState;
use super::schema::{ArchiveFile, OpenError};
use super::{Question, Reply, RoomKey, Wanted, answer, room_rows};
use crate::metrics::Metrics;

/// Bytes of whole states that are kept ready to be sent, deflated.
const CACHE_BYTES: usize = 48 << 20;
/// A state that is kept is sent with the operations since, unless those are more than one in so many of its nodes.
const FRESH_SHARE: u64 = 10;
/// So many operations since are always few.
const FEW: u64 = 200;
/// What an operation takes, at most, for a state that is kept to be sent with the operations since.
const OPERATION_BYTES: u64 = 2_000;
/// A state that changes all the time is read anew so often that the thread does other things for so many times as long.
const REST: u32 = 10;

/// A handle on the thread.
pub(super) struct Reader {
    /// `None` once it is closed.
    questions: Option<Sender<Question>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Reader {
    /// Starts the thread, with a connection of its own.
    pub(super) fn start(
        file: &ArchiveFile,
        identity: Option<Arc<Identity>>,
        replies: UnboundedSender<Reply>,
        metrics: Metrics,
    ) -> Result<Self, OpenError> {
        let database = |source| OpenError::Database { path: file.path.clone(), source };
        let connection = file.reader().map_err(database)?;
        let (questions, receiver) = channel();
        let mut answers = Answers { connection, identity, states: Vec::new(), replies, metrics };
        let thread = std::thread::Builder::new()
            .name("archive-reader".into())
            .spawn(move || answers.run(&receiver))
            .map_err(|source| OpenError::Folder { path: file.path.clone(), source })?;
        Ok(Self { questions: Some(questions), thread: Some(thread) })
    }

    /// Answers a question, from what is committed by now or later.
    pub(super) fn ask(&self, question: Question) {
        if let Some(questions) = &self.questions
            && questions.send(question).is_err()
        {
            tracing::error!("nobody reads the archive any more");
        }
    }

    /// Ends the thread.
    pub(super) fn close(&mut self) {
        self.questions = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that reads the archive had panicked");
        }
    }
}

/// A whole state that is ready to be sent.
struct CachedState {
    room: RoomKey,
    seq: u64,
    message: Message,
    read: Instant,
    /// How long reading took.
    took: Duration,
}

impl CachedState {
    /// Whether it may be sent with the operations `since` instead of being read anew.
    ///
    /// Whoever holds more than a state says answers with all it has, and to everybody (wire §4): so who knows something is
    /// to be sent what is true now. Who has nothing need not wait until a large room is read.
    fn is_near(&self, room: &RoomState, known: Known, since: u64) -> bool {
        let will_do = known.timestamp.is_none() && room.nodes > answer::SMALL_ROOM_NODES;
        since <= FEW.max(room.nodes / FRESH_SHARE) && (will_do || self.read.elapsed() < self.took * REST)
    }
}

struct Answers {
    connection: Connection,
    /// Who signs.
    identity: Option<Arc<Identity>>,
    /// The most recently used last.
    states: Vec<CachedState>,
    replies: UnboundedSender<Reply>,
    metrics: Metrics,
}

impl Answers {
    fn run(&mut self, questions: &Receiver<Question>) {
        while let Ok(first) = questions.recv() {
            // Whoever asks again while a question waits gets one answer, to what it said last.
            let mut waiting: Vec<Question> = Vec::new();
            let mut places = HashMap::new();
            for question in std::iter::once(first).chain(questions.try_iter()) {
                match places.get(&question.asker) {
                    Some(place) => waiting[*place] = merged(waiting[*place], question),
                    None => {
                        places.insert(question.asker, waiting.len());
                        waiting.push(question);
                    }
                }
            }
            for question in waiting {
                if let Err(error) = self.answer(question) {
                    tracing::warn!(%error, "the archive cannot read");
                    if let (to, Wanted::Live(_)) = (question.asker, question.wanted) {
                        // Not asked again: what is left out now, peers ask for when they next do.
                        let _ = self.replies.send(Reply::Send { to, messages: Vec::new(), sent: u64::MAX });
                    }
                }
            }
        }
    }

    fn answer(&mut self, question: Question) -> rusqlite::Result<()> {
        // One snapshot: where the room stands must fit what is read of it.
        self.connection.execute_batch("BEGIN")?;
        let answered = self.messages(question);
        let ended = self.connection.execute_batch("COMMIT");
        let (messages, sent) = answered?;
        ended?;
        // The other side is gone at shutdown: then nobody needs the answer.
        let _ = self.replies.send(Reply::Send { to: question.asker, messages, sent });
        Ok(())
    }

    fn messages(&mut self, Question { room: key, wanted, .. }: Question) -> rusqlite::Result<(Vec<Message>, u64)> {
        let room = room_rows::load(&self.connection, key)?;
        let known = match wanted {
            Wanted::Since(known) => known,
            Wanted::Live(first) => {
                let (message, last) = answer::live(&self.connection, &room, first, self.identity.as_deref())?;
                return Ok((message.into_iter().collect(), last));
            }
        };
        if let Some(delta) = answer::delta_for(&self.connection, &room, known, self.identity.as_deref())? {
            self.metrics.answers.with_label_values(&["sync"]).inc();
            return Ok((vec![delta], room.seq));
        }
        self.metrics.answers.with_label_values(&["full_state"]).inc();
        Ok((self.full_state(key, &room, known)?, room.seq))
    }

    /// The whole state: the one that is kept if it is still true, or nearly.
    fn full_state(&mut self, key: RoomKey, room: &RoomState, known: Known) -> rusqlite::Result<Vec<Message>> {
        if let Some(index) = self.states.iter().position(|state| state.room == key) {
            let state = self.states.remove(index);
            let since = room.seq.saturating_sub(state.seq);
            let messages = if since == 0 {
                Some(vec![state.message.clone()])
            } else if state.is_near(room, known, since) {
                let max_bytes = since * OPERATION_BYTES;
                let delta = answer::delta(&self.connection, room, state.seq + 1, max_bytes, self.identity.as_deref())?;
                delta.map(|delta| vec![state.message.clone(), delta])
            } else {
                None
            };
            if let Some(messages) = messages {
                self.metrics.cached_answers.inc();
                self.states.push(state);
                return Ok(messages);
            }
        }
        let read = Instant::now();
        let message = answer::full_state(&self.connection, room, self.identity.as_deref())?;
        let state = CachedState { room: key, seq: room.seq, message: message.clone(), read, took: read.elapsed() };
        self.states.push(state);
        let mut kept = 0;
        let mut from = self.states.len();
        while from > 0 && kept + self.states[from - 1].message.len() <= CACHE_BYTES {
            from -= 1;
            kept += self.states[from].message.len();
        }
        self.states.drain(..from);
        Ok(vec![message])
    }
}

/// Two questions of one asker as one. A whole state is an answer to both, whichever asked for it.
fn merged(first: Question, second: Question) -> Question {
    match first.wanted {
        Wanted::Since(known) if known.timestamp.is_some() => second,
        // Of what is live, the first asks for most.
        Wanted::Since(_) | Wanted::Live(_) => first,
    }
}
