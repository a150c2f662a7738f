//! What is heard through relays.

use std::time::Instant;

use genosdb::Signal;

use super::{ANNOUNCE_SPACING, Mesh, MeshRoom, RoomId};
use crate::room::Said;
use crate::signalling::{Heard, Listener, RelayIndex};

impl Mesh {
    pub(super) fn handle_heard(&mut self, heard: Heard) {
        let now = Instant::now();
        match heard {
            Heard::Reached => {
                let mut at = now;
                let mut ids: Vec<RoomId> = self.state.rooms.keys().copied().collect();
                ids.sort_unstable();
                for id in ids {
                    if let Some(room) = self.state.rooms.get_mut(&id) {
                        room.roster.relay_reached(now);
                        room.members.iter_mut().for_each(|member| member.relay_reached(at));
                        at += ANNOUNCE_SPACING;
                    }
                    self.schedule(id, now);
                }
            }
            Heard::Said { relay, event_id, listener, signal } => {
                if self.state.heard.insert(event_id) {
                    self.handle_signal(relay, listener, signal, now);
                    self.schedule(listener.room, now);
                }
            }
            Heard::Check { relay, event_id, content } => {
                if self.state.heard.insert(event_id) {
                    self.handle_check(now, relay, &content);
                }
            }
        }
    }

    fn handle_signal(&mut self, relay: RelayIndex, listener: Listener, signal: Signal, now: Instant) {
        let Listener { room: id, us } = listener;
        let peer = signal.peer();
        let Some(room) = self.state.rooms.get(&id) else { return };
        if room.members.iter().any(|member| member.id() == peer) {
            return;
        }
        let Some(said) = self.said(room, signal, us.is_some()) else { return };
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        match &said {
            Said::Announce => {
                if room.roster.heard(peer, relay, now) {
                    room.members.iter_mut().for_each(|member| member.newcomer(now));
                }
            }
            Said::Bye => room.roster.bye(peer, now),
            Said::Offer { .. } | Said::Answer { .. } => {}
        }
        let mut actions = Vec::new();
        for member in &mut room.members {
            let its = member.id();
            let concerned = match (&said, &room.cells) {
                (Said::Announce, Some(cells)) => cells.wants(&its, &peer),
                (Said::Announce, None) | (Said::Bye, _) => true,
                (Said::Offer { .. } | Said::Answer { .. }, _) => us == Some(its),
            };
            if concerned {
                let mut its_actions = Vec::new();
                member.handle(peer, said.clone(), relay, now, &mut its_actions);
                actions.push((its, its_actions));
            }
        }
        for (us, actions) in actions {
            self.act(now, id, us, actions);
        }
        self.count_presence(id);
    }

    /// What a signal says, its description opened; `None` where it says nothing to us.
    fn said(&self, room: &MeshRoom, signal: Signal, to_self: bool) -> Option<Said> {
        match (signal, to_self) {
            (Signal::Announce { .. }, false) => Some(Said::Announce),
            (Signal::Bye { .. }, false) => Some(Said::Bye),
            (Signal::Offer { sdp, .. }, true) => Some(Said::Offer { sdp: self.open(room, &sdp)? }),
            (Signal::Answer { sdp, .. }, true) => Some(Said::Answer { sdp: self.open(room, &sdp)? }),
            // Said on a topic where it means nothing.
            _ => None,
        }
    }
}
