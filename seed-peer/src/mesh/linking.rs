//! How links come to be, from offers and answers through relays, and how they end.

use std::time::Instant;

use genosdb::sealed_sdp::OpenError;
use genosdb::{PeerId, SdpKey, SealedDescription, Signal};
use rand::RngCore as _;

use super::messages::{OperationRate, PASSED_ON_BY_ONE};
use super::room::MeshRoom;
use super::watermarks::Heard;
use super::{Mesh, Owner, RoomId};
use crate::link::{CloseReason, Link, Step};
use crate::links::LinkId;
use crate::room::Why;
use crate::signalling::RelayIndex;

impl Mesh {
    pub(super) fn dial(&mut self, now: Instant, id: RoomId, us: PeerId, peer: PeerId, relay: RelayIndex) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        if self.links.len() >= self.max_links {
            return;
        }
        let candidates = self.addresses.candidates();
        match Link::offer(now, self.certificate.clone(), candidates, room.listening(self.limits)) {
            Ok((link, sdp)) => {
                let link = self.add_link(now, id, us, peer, relay, link);
                let Some(room) = self.state.rooms.get_mut(&id) else { return };
                if let Some(member) = room.member(us) {
                    member.dialled(peer, link, now);
                }
                let signal = Signal::Offer { peer: us, sdp: seal(&room.key, &sdp), superpeer: true };
                self.signalling.publish(Some(relay), &room.room.self_topic(&peer), &signal);
            }
            Err(error) => tracing::warn!(%error, "cannot dial"),
        }
    }

    pub(super) fn accept(
        &mut self,
        now: Instant,
        id: RoomId,
        us: PeerId,
        peer: PeerId,
        relay: RelayIndex,
        offer: &str,
    ) {
        let Some(room) = self.state.rooms.get_mut(&id) else { return };
        if self.links.len() >= self.max_links {
            return;
        }
        let candidates = self.addresses.candidates();
        match Link::answer(now, self.certificate.clone(), candidates, room.listening(self.limits), offer) {
            Ok((link, sdp)) => {
                let link = self.add_link(now, id, us, peer, relay, link);
                let Some(room) = self.state.rooms.get_mut(&id) else { return };
                if let Some(member) = room.member(us) {
                    member.accepted(peer, link, now);
                }
                let signal = Signal::Answer { peer: us, sdp: seal(&room.key, &sdp) };
                self.signalling.publish(Some(relay), &room.room.self_topic(&peer), &signal);
            }
            Err(error) => self.refuse_description(&error),
        }
    }

    pub(super) fn complete(&mut self, now: Instant, link: LinkId, answer: &str) {
        let Some(dialled) = self.links.get_mut(link) else { return };
        if let Err(error) = dialled.accept_answer(answer) {
            self.refuse_description(&error);
            return;
        }
        self.links.touch(now, link);
    }

    /// Opens a sealed description.
    pub(super) fn open(&self, room: &MeshRoom, sealed: &SealedDescription) -> Option<String> {
        match room.key.open(sealed) {
            Ok(sdp) => Some(sdp),
            Err(OpenError::WrongKey) => {
                self.metrics.link_outcomes.with_label_values(&["wrong_password"]).inc();
                tracing::debug!(room = %room.name, "a description was sealed with another password");
                None
            }
            Err(error @ OpenError::Malformed) => {
                self.refuse_description(&error);
                None
            }
        }
    }

    fn refuse_description(&self, error: &dyn std::error::Error) {
        self.metrics.refused.with_label_values(&["description"]).inc();
        tracing::debug!(error = ?error.to_string(), "a description was refused");
    }

    fn add_link(
        &mut self,
        now: Instant,
        room: RoomId,
        us: PeerId,
        peer: PeerId,
        relay: RelayIndex,
        link: Link,
    ) -> LinkId {
        let id = self.links.add(now, link);
        let owner = Owner {
            room,
            us,
            peer,
            relay,
            made: now,
            opened: None,
            asked: false,
            sent: None,
            asked_for_all: None,
            heard: Heard::default(),
            speaks_cells: false,
            in_full_mesh: false,
            rate: OperationRate::new(self.operations_per_second),
            rate_of_others: OperationRate::new(self.operations_per_second.saturating_mul(PASSED_ON_BY_ONE)),
        };
        self.state.owners.insert(id, owner);
        id
    }

    /// Ends a link that the room no longer wants.
    pub(super) fn drop_link(&mut self, link: LinkId, why: Why, now: Instant) {
        let Some(owner) = self.state.owners.remove(&link) else { return };
        if owner.opened.is_some() {
            self.metrics.disconnects.with_label_values(&[why.label()]).inc();
            self.unlinked(&owner, false, now);
        } else {
            let step = self.links.get_mut(link).and_then(|link| link.step());
            self.metrics.link_outcomes.with_label_values(&[Step::outcome_without_next(step)]).inc();
        }
        self.links.close(link, CloseReason::Left, &mut self.state.events);
        self.links.remove(link);
        self.count_links(owner.room);
    }

    /// A link that was open has ended.
    pub(super) fn unlinked(&mut self, owner: &Owner, died: bool, now: Instant) {
        let Some(room) = self.state.rooms.get_mut(&owner.room) else { return };
        if let Some(until) = owner.heard.until() {
            room.watermarks.unlinked(owner.peer, until);
        }
        let is_bridge = room.cells.as_ref().is_some_and(|cells| cells.is_bridge(&owner.peer));
        room.roster.unlinked(owner.peer, died, is_bridge, now);
        if room.link_to(&owner.peer).is_none()
            && let Some(cells) = &mut room.cells
        {
            cells.unlinked(&owner.peer);
        }
    }

    pub(super) fn count_links(&self, id: RoomId) {
        let Some(room) = self.state.rooms.get(&id) else { return };
        let Some(database) = self.state.databases.get(&room.name) else { return };
        let rooms = database.rooms.iter().filter_map(|id| self.state.rooms.get(id));
        let open: usize = rooms.map(MeshRoom::open_links).sum();
        self.metrics.links.with_label_values(&[&room.name]).set(i64::try_from(open).unwrap_or(i64::MAX));
    }
}

fn seal(key: &SdpKey, sdp: &str) -> SealedDescription {
    let mut iv = [0; 12];
    rand::rng().fill_bytes(&mut iv);
    key.seal(iv, sdp)
}
