//! Which links a room in cells has, once its roster is sealed (wire §5).

use std::time::Instant;

use genosdb::{ChannelName, Message, PeerId, Signal};

use super::{Mesh, RoomId};
use crate::links::LinkId;
use crate::room::{RoomPeer, Why};

impl Mesh {
    /// The roster has come to rest: makes the topology, and the links that it asks for.
    pub(super) fn seal(&mut self, id: RoomId, now: Instant) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        room.roster.sealed();
        let Some(cells) = &mut room.cells else { return };
        let change = cells.seal(&room.roster, now);
        tracing::debug!(
            room = %room.name, peers = room.roster.len(), cells = cells.total_cells(), bridged = cells.bridged(),
            "a roster is sealed"
        );
        let mut joined = Vec::new();
        for us in &change.added {
            room.members.push(RoomPeer::new(*us, self.max_links, now));
            joined.push(room.own_topic(*us));
        }
        if !joined.is_empty() {
            self.signalling.listen(joined);
        }
        for us in &change.dropped {
            self.leave(id, *us, now);
        }
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        let Some(cells) = &room.cells else { return };
        let mut dials = Vec::new();
        for member in &mut room.members {
            let us = member.id();
            let mut actions = Vec::new();
            for peer in room.roster.iter().filter(|peer| cells.wants(&us, peer)) {
                if let Some(relay) = room.roster.relay_of(&peer) {
                    member.meet(peer, relay, &mut actions);
                }
            }
            dials.push((us, actions));
        }
        for (us, actions) in dials {
            self.act(now, id, us, actions);
        }
        self.answer_the_silent(id);
    }

    /// Ends the links that the topology has no place for.
    pub(super) fn prune(&mut self, id: RoomId, now: Instant) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        let Some(cells) = &room.cells else { return };
        let owners = &self.state.owners;
        let surplus: Vec<(PeerId, PeerId)> = room
            .links()
            .filter(|(us, peer, link)| {
                owners.get(link).is_some_and(|owner| {
                    !owner.in_full_mesh && owner.opened.is_some_and(|opened| cells.is_surplus(us, peer, opened, now))
                })
            })
            .map(|(us, peer, _)| (us, peer))
            .collect();
        for (us, peer) in surplus {
            let mut actions = Vec::new();
            if let Some(member) = self.state.rooms.get_mut(&id).and_then(|room| room.member(us)) {
                member.end(peer, Why::Surplus, &mut actions);
            }
            self.act(now, id, us, actions);
        }
    }

    /// Leaves a room under one of the seed's ids.
    pub(super) fn leave(&mut self, id: RoomId, us: PeerId, now: Instant) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        self.signalling.publish(None, &room.root, &Signal::Bye { peer: us });
        let (topic, _) = room.own_topic(us);
        self.signalling.unlisten([&topic]);
        let links: Vec<LinkId> =
            room.members.iter().filter(|member| member.id() == us).flat_map(RoomPeer::all_links).collect();
        room.members.retain(|member| member.id() != us);
        for link in links {
            self.send(link, Message::empty(ChannelName::LEAVE));
            self.drop_link(link, Why::Leaving, now);
        }
    }
}
