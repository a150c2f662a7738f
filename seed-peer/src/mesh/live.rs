//! What one peer of a full mesh writes, for those who have no link with it.
//!
//! In a full mesh everybody tells everybody, and nobody passes anything on: two peers whose networks keep them apart, or
//! who are on different relays, would hear of each other only when the next one joins. The seed is linked with both. It
//! cannot see who is linked with whom, so it sends what came to all, a moment later and together: who has it already
//! knows by the timestamps that it is nothing new. Only what the archive has accepted is sent.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use genosdb::Message;

use super::room::Part;
use super::{Mesh, RoomId};
use crate::archive::{Asker, Known, RoomKey};
use crate::links::LinkId;

/// How long operations are gathered before they are sent.
const GATHER: Duration = Duration::from_millis(250);

/// Which of a room's log entries are to be sent to everybody who is linked.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// The first entry that was not sent, and the last there is.
    unsent: Option<(u64, u64)>,
    due: Option<Instant>,
    /// Whether the archive was asked for them.
    asked: bool,
    /// Links that were too busy for some of it, and when to look at them again.
    behind: BTreeSet<LinkId>,
    look: Option<Instant>,
}

impl Live {
    /// The entries from `first` to `last` are new, and there is somebody to send them to.
    fn logged(&mut self, first: u64, last: u64, now: Instant) {
        let (first, _) = self.unsent.unwrap_or((first, last));
        self.unsent = Some((first, last));
        if !self.asked {
            self.due.get_or_insert(now + GATHER);
        }
    }

    /// Nobody is there who could lack anything.
    fn forget(&mut self) {
        (self.unsent, self.due) = (None, None);
    }

    /// The entry to ask for by now, if any.
    pub(crate) fn due(&mut self, now: Instant) -> Option<u64> {
        self.due.filter(|due| *due <= now)?;
        self.due = None;
        let (first, _) = self.unsent?;
        self.asked = true;
        Some(first)
    }

    /// What was asked for is sent, up to an entry.
    pub(crate) fn sent(&mut self, last: u64, now: Instant) {
        self.asked = false;
        self.unsent = self.unsent.filter(|unsent| last < unsent.1).map(|(first, end)| (first.max(last + 1), end));
        self.due = self.unsent.map(|_| now + GATHER);
    }

    /// Links that may have time now for what they were not sent.
    pub(crate) fn behind(&mut self, now: Instant) -> BTreeSet<LinkId> {
        if self.look.is_none_or(|look| look > now) {
            return BTreeSet::new();
        }
        self.look = None;
        std::mem::take(&mut self.behind)
    }

    fn is_behind(&mut self, link: LinkId, now: Instant) {
        self.behind.insert(link);
        self.look.get_or_insert(now + GATHER);
    }

    pub(crate) fn next_tick(&self) -> Option<Instant> {
        self.due.into_iter().chain(self.look).min()
    }
}

impl Mesh {
    /// What peers have sent is in the log of a database.
    pub(super) fn logged(&mut self, now: Instant, key: RoomKey, first: u64, last: u64, over: Option<LinkId>) {
        let mut ids = Vec::new();
        for room in self.state.rooms.values_mut() {
            if room.archive != key || room.part != Part::Graph {
                continue;
            }
            room.logged = last;
            if !self.pass_on || room.cells.is_some() {
                continue;
            }
            let (one, another) = {
                let mut links = room.links().map(|(_, _, link)| link);
                (links.next(), links.next())
            };
            match (one, another) {
                // Who comes asks for what it lacks.
                (None, _) => room.live.forget(),
                // Who is there alone has it. What another sent just before it left is another matter.
                (one, None) if one == over => {}
                _ => {
                    room.live.logged(first, last, now);
                    ids.push(room.id);
                }
            }
        }
        for id in ids {
            self.schedule(id, now);
        }
    }

    /// Sends operations to everybody who is linked, up to the log entry `last`.
    pub(super) fn send_live(&mut self, now: Instant, id: RoomId, messages: Vec<Message>, last: u64) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        room.live.sent(last, now);
        let links: Vec<LinkId> = room.links().map(|(_, _, link)| link).collect();
        for message in messages {
            for link in &links {
                // Who is slow to take what it was sent already is sent the rest once it has time.
                if self.is_busy(*link) {
                    if let Some(room) = self.state.rooms.get_mut(&id) {
                        room.live.is_behind(*link, now);
                    }
                } else {
                    self.metrics.passed_on.inc();
                    self.send(*link, message.clone());
                }
            }
        }
        self.schedule(id, now);
    }

    /// Sends what links were too busy for.
    pub(super) fn catch_up(&mut self, now: Instant, id: RoomId, behind: BTreeSet<LinkId>) {
        for link in behind {
            let Some(owner) = self.state.owners.get(&link) else { continue };
            // Who has not been answered yet is sent everything by that answer, to what it asks.
            let Some(sent) = owner.sent else { continue };
            let is_busy = self.is_busy(link);
            let Some(room) = self.state.rooms.get_mut(&id) else { return };
            let known = Known { timestamp: room.latest, sent: Some(sent) };
            if is_busy || !self.archive.answer(room.archive, Asker::Link(link), known) {
                room.live.is_behind(link, now);
            }
        }
    }

    fn is_busy(&mut self, link: LinkId) -> bool {
        self.links.get_mut(link).is_some_and(|link| link.is_busy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_gathered_and_each_is_asked_for_once() {
        let start = Instant::now();
        let mut live = Live::default();
        assert_eq!((live.due(start), live.next_tick()), (None, None));
        live.logged(5, 5, start);
        live.logged(6, 9, start + GATHER / 2);
        assert_eq!((live.due(start), live.next_tick()), (None, Some(start + GATHER)));
        let first = start + GATHER;
        assert_eq!(live.due(first), Some(5));
        live.logged(10, 12, first);
        assert_eq!(live.next_tick(), None, "the archive is asked for one thing at a time");
        live.sent(8, first);
        let second = first + GATHER;
        assert_eq!(live.due(second), Some(9));
        live.sent(12, second);
        assert_eq!(live.next_tick(), None);
        live.logged(13, 13, second);
        live.forget();
        assert_eq!(live.next_tick(), None);
    }

    #[test]
    fn who_was_too_busy_is_looked_at_again() {
        let start = Instant::now();
        let mut live = Live::default();
        live.is_behind(7, start);
        live.is_behind(9, start + GATHER / 2);
        assert_eq!((live.behind(start), live.next_tick()), (BTreeSet::new(), Some(start + GATHER)));
        assert_eq!(live.behind(start + GATHER), [7, 9].into());
        assert_eq!((live.behind(start + 2 * GATHER), live.next_tick()), (BTreeSet::new(), None));
    }

    #[test]
    fn an_archive_that_has_no_time_is_asked_again() {
        let start = Instant::now();
        let mut live = Live::default();
        live.logged(5, 7, start);
        assert_eq!(live.due(start + GATHER), Some(5));
        live.sent(4, start + GATHER);
        assert_eq!(live.due(start + 2 * GATHER), Some(5));
    }
}
