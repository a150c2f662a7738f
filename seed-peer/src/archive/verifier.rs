//! The threads that check signatures, between the mesh and the writer.
//!
//! A room's messages keep their order: they all go through one thread, and so do the questions behind them. A thread
//! that is behind makes its queue fill, and what does not fit is asked for again later, as with the writer.

use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use genosdb::Operation;
use genosdb::security::Attested;
use genosdb::signature::SignatureError;

use super::{Asker, Checked, Question, Request, RoomKey};
use crate::metrics::Metrics;

/// Tasks that wait for one thread.
const QUEUE_TASKS: usize = 2_048;
/// Threads, at most: the machine has other work.
const MAX_THREADS: usize = 4;

/// What goes to the writer once it is checked.
pub(super) enum Task {
    /// Operations, each with the text that it came as.
    Check { room: RoomKey, asker: Asker, operations: Vec<(Operation, String)>, wall_ms: u64, bytes: usize },
    /// A question, behind the operations that came before it.
    Pass(Question),
}

/// A handle on the threads.
pub(super) struct Verifier {
    lanes: Vec<SyncSender<Task>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Verifier {
    pub(super) fn start(requests: &SyncSender<Request>, metrics: &Metrics) -> std::io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_THREADS);
        let mut verifier = Self { lanes: Vec::new(), threads: Vec::new() };
        for _ in 0..count {
            let (lane, tasks) = sync_channel(QUEUE_TASKS);
            let (requests, metrics) = (requests.clone(), metrics.clone());
            let thread = std::thread::Builder::new()
                .name("signatures".into())
                .spawn(move || check_all(&tasks, &requests, &metrics))?;
            verifier.lanes.push(lane);
            verifier.threads.push(thread);
        }
        Ok(verifier)
    }

    /// Hands over a task of `room`. Returns whether there was room for it.
    pub(super) fn hand_over(&self, room: RoomKey, task: Task) -> bool {
        let lane = usize::try_from(room.0).unwrap_or(0) % self.lanes.len().max(1);
        self.lanes.get(lane).is_some_and(|lane| lane.try_send(task).is_ok())
    }

    /// Checks what was handed over, and ends the threads. Blocks.
    pub(super) fn close(self) {
        drop(self.lanes);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread that checks signatures had panicked");
            }
        }
    }
}

fn check_all(tasks: &Receiver<Task>, requests: &SyncSender<Request>, metrics: &Metrics) {
    while let Ok(task) = tasks.recv() {
        let request = match task {
            Task::Pass(question) => Request::Answer(question),
            Task::Check { room, asker, operations, wall_ms, bytes } => {
                let check = |(operation, text): (Operation, String)| {
                    let attested = Attested::check(operation, &text);
                    for found in std::iter::once(&attested.author).chain(&attested.inside) {
                        metrics.signatures.with_label_values(&[name_of(found)]).inc();
                    }
                    attested
                };
                let operations = Checked::Attested(operations.into_iter().map(check).collect());
                Request::Merge { room, asker, operations, wall_ms, bytes }
            }
        };
        // The writer is behind: so are we, until it is through.
        if requests.send(request).is_err() {
            return;
        }
    }
}

fn name_of<T>(found: &Result<T, SignatureError>) -> &'static str {
    match found {
        Ok(_) => "valid",
        Err(SignatureError::Unsigned) => "unsigned",
        Err(_) => "forged",
    }
}
