//! Many messages in one transaction: all of them, or none but for what could not be taken.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use genosdb::Operation;

use super::super::graph::RoomState;
use super::super::replication::CommitError;
use super::super::{Asker, Checked, Reply, Request, RoomKey, room_rows};
use super::{Writer, is_of_the_disk};
use crate::links::LinkId;

impl Writer {
    /// Commits what is held back and `batch` behind it, and answers.
    pub(super) fn commit(&mut self, batch: Vec<Request>) {
        if batch.is_empty() && self.held.is_empty() {
            return;
        }
        let mut all = std::mem::take(&mut self.held);
        all.extend(batch);
        let start = Instant::now();
        let result = if all.iter().all(|request| matches!(request, Request::Answer(_))) {
            Ok(Committed::default())
        } else {
            self.commit_in_turn(&all)
        };
        match result {
            Ok(Committed { rooms, replies, .. }) => {
                if !rooms.is_empty() {
                    self.metrics.archive_commit_seconds.observe(start.elapsed().as_secs_f64());
                }
                // What writes nothing does not show that anything can be written.
                let shows_that_it_writes = !rooms.is_empty();
                for state in rooms.into_values() {
                    let room = RoomKey(state.id);
                    let (first, last) = (self.rooms.get(&room).map_or(0, |before| before.seq) + 1, state.seq);
                    self.committed(state);
                    if first <= last {
                        self.reply(Reply::Logged { room, first, last, over: only_link(&all, room) });
                    }
                }
                self.release(&all);
                for request in all {
                    if let Request::Answer(question) = request {
                        self.reader.ask(question);
                    }
                }
                for reply in replies {
                    self.reply(reply);
                }
                if shows_that_it_writes || self.next_try.is_none() {
                    self.writes();
                }
            }
            Err(error) => self.refused(all, &error),
        }
    }

    /// Commits, and where another instance was faster, once more behind that.
    fn commit_in_turn(&mut self, batch: &[Request]) -> Result<Committed, CommitError> {
        let mut caught_up = HashSet::new();
        loop {
            match self.try_commit(batch) {
                Err(CommitError::Behind(room)) if caught_up.insert(room) => self.catch_up(room)?,
                result => return result,
            }
        }
    }

    /// Merges inside one transaction; the replies are for after it.
    fn try_commit(&mut self, batch: &[Request]) -> Result<Committed, CommitError> {
        self.file.connection.execute_batch("BEGIN IMMEDIATE")?;
        let mut committed = Committed::default();
        let result = self.merge_all(batch, &mut committed).map_err(CommitError::from).and_then(|()| {
            for state in committed.rooms.values() {
                room_rows::save(&self.file.connection, state)?;
            }
            let logged = |room: &RoomKey| (*room, self.rooms.get(room).map_or(0, |before| before.seq));
            let shipped = self.ship(&committed.rooms.keys().map(logged).collect::<Vec<_>>())?;
            self.file.connection.execute_batch("COMMIT")?;
            Ok(shipped)
        });
        match result {
            Ok(shipped) => {
                self.shipped(shipped);
                Ok(committed)
            }
            Err(error) => {
                self.roll_back();
                Err(error)
            }
        }
    }

    fn merge_all(&mut self, batch: &[Request], committed: &mut Committed) -> rusqlite::Result<()> {
        for (request, is_outdated) in batch.iter().zip(outdated_states(batch)) {
            let Request::Merge { room, asker, operations, wall_ms, .. } = request else { continue };
            if is_outdated || !self.may_write(*room) {
                continue;
            }
            let before = match committed.rooms.get(room).or_else(|| self.rooms.get(room)) {
                Some(state) => state.clone(),
                None => room_rows::load(&self.file.connection, *room)?,
            };
            let mut state = before.clone();
            self.file.connection.execute_batch("SAVEPOINT message")?;
            match self.merge(&mut state, operations, *wall_ms) {
                Ok(gaps) => {
                    if gaps.ours
                        && let Asker::Link(link) = *asker
                    {
                        committed.replies.push(Reply::MayLack { link });
                    }
                    if gaps.theirs {
                        committed.replies.push(lacking(*asker));
                    }
                    if let Some(latest) = state.latest.filter(|_| state.latest != before.latest) {
                        committed.replies.push(Reply::Latest { room: *room, latest });
                    }
                    if state != before {
                        committed.rooms.insert(*room, state);
                    }
                }
                Err(error) if is_of_the_disk(&error) => return Err(error),
                Err(error) => {
                    // Ours to mend, but not to stop the room for: the message is left out.
                    tracing::error!(%error, "the archive could not take a message");
                    self.metrics.operations.with_label_values(&["failed"]).inc();
                    self.file.connection.execute_batch("ROLLBACK TO message")?;
                }
            }
            self.file.connection.execute_batch("RELEASE message")?;
        }
        Ok(())
    }
}

/// What a transaction has come to.
#[derive(Default)]
struct Committed {
    /// The rooms that have changed.
    rooms: HashMap<RoomKey, RoomState>,
    replies: Vec<Reply>,
}

/// The link over which everything came that was merged into a room, if it was one.
fn only_link(merged: &[Request], room: RoomKey) -> Option<LinkId> {
    let mut askers = merged.iter().filter_map(|request| match request {
        Request::Merge { room: other, asker, .. } if *other == room => Some(*asker),
        _ => None,
    });
    let Some(Asker::Link(link)) = askers.next() else { return None };
    askers.all(|asker| asker == Asker::Link(link)).then_some(link)
}

/// A peer lacks something.
fn lacking(asker: Asker) -> Reply {
    match asker {
        Asker::Link(link) => Reply::Lacks { link },
        Asker::Room(room) | Asker::Linked(room) => Reply::RoomLacks { room },
    }
}

/// Which of the requests are states of peers that have sent another since: it holds all that they did. Peers answer each
/// other's states with their own while they write, and there may be many.
fn outdated_states(batch: &[Request]) -> Vec<bool> {
    let mut later = HashSet::new();
    let mut outdated = vec![false; batch.len()];
    for (request, is_outdated) in batch.iter().zip(&mut outdated).rev() {
        if let Request::Merge { room, asker: Asker::Link(link), operations: Checked::Plain(operations), .. } = request
            && matches!(operations[..], [Operation::FullStateSync(_)])
        {
            *is_outdated = !later.insert((*room, *link));
        }
    }
    outdated
}

#[cfg(test)]
mod tests {
    use genosdb::MemoryGraph;

    use super::*;

    #[test]
    fn of_several_states_of_a_peer_the_last_one_counts() {
        let state = || Operation::FullStateSync(MemoryGraph::default().full_state());
        let merge = |room, link, operations| Request::Merge {
            room: RoomKey(room),
            asker: Asker::Link(link),
            operations: Checked::Plain(operations),
            wall_ms: 0,
            bytes: 0,
        };
        let batch = [
            merge(1, 1, vec![state()]),
            merge(1, 2, vec![state()]),
            // Who speaks of more than its state is heard.
            merge(1, 1, vec![state(), state()]),
            merge(2, 1, vec![state()]),
            merge(1, 1, vec![state()]),
        ];
        assert_eq!(outdated_states(&batch), [true, false, false, false, false]);
    }
}
