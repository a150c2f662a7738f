//! The check room: where somebody tries whether a link with the seed comes to be, and nothing else.
//!
//! Not a room of GenosDB: nobody announces itself there, and there is no database. Whoever tries publishes a description
//! on the room's root topic, and the seed answers on the topic of that peer. As in any room, descriptions are sealed, here
//! with a key that follows from the room's name: who does not know that learns no addresses.

use genosdb::json::{self, Members};
use genosdb::{APP_ID, PeerId, Room, SdpKey, SealedDescription, Topic};
use rand::{Rng as _, RngCore as _};

/// A check room, as both sides know it.
#[derive(Debug, Clone)]
pub struct CheckRoom {
    room: Room,
    key: SdpKey,
}

impl CheckRoom {
    /// The check room that is called so.
    pub fn new(name: &str) -> Self {
        let room = Room::app_sync(name);
        let key = SdpKey::derive("", APP_ID, &room);
        Self { room, key }
    }

    /// An id for somebody who tries.
    pub fn new_peer() -> PeerId {
        let mut random = rand::rng();
        PeerId::generate(|range| random.random_range(range))
    }

    /// Where to say [`CheckRoom::offer`].
    pub fn root_topic(&self) -> Topic {
        self.room.root_topic()
    }

    /// Where `peer` hears the answer.
    pub fn self_topic(&self, peer: &PeerId) -> Topic {
        self.room.self_topic(peer)
    }

    /// The content of an event: "answer this description".
    pub fn offer(&self, peer: PeerId, sdp: &str) -> String {
        self.content(peer, "check", sdp)
    }

    /// The content of the event that answers.
    pub(crate) fn answer(&self, peer: PeerId, sdp: &str) -> String {
        self.content(peer, "checked", sdp)
    }

    /// What an event of the root topic says: who asks, and the description.
    pub(crate) fn parse_offer(&self, content: &str) -> Option<(PeerId, String)> {
        self.parse(content, "check")
    }

    /// What an event of a peer's own topic says: who answers, and the description.
    pub fn parse_answer(&self, content: &str) -> Option<(PeerId, String)> {
        self.parse(content, "checked")
    }

    fn content(&self, peer: PeerId, member: &str, sdp: &str) -> String {
        let mut iv = [0; 12];
        rand::rng().fill_bytes(&mut iv);
        format!(r#"{{"peerId":"{peer}","{member}":"{}"}}"#, self.key.seal(iv, sdp).as_str())
    }

    fn parse(&self, content: &str, member: &str) -> Option<(PeerId, String)> {
        let mut members = Members::parse(content).ok()?;
        let peer = PeerId::parse(json::string(members.take("peerId")?).ok()?.as_printed())?;
        let sealed = json::string(members.take(member)?).ok()?;
        Some((peer, self.key.open(&SealedDescription::parse(sealed.as_printed())?).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_in_a_check_room_is_for_who_knows_its_name() {
        let room = CheckRoom::new("homeport-check-1");
        let peer = CheckRoom::new_peer();
        assert_eq!(room.parse_offer(&room.offer(peer, "v=0\r\n")), Some((peer, "v=0\r\n".to_owned())));
        assert_eq!(room.parse_answer(&room.answer(peer, "v=0")), Some((peer, "v=0".to_owned())));
        assert_eq!(room.parse_answer(&room.offer(peer, "v=0")), None);
        let other = CheckRoom::new("homeport-check-2");
        assert_eq!(other.parse_offer(&room.offer(peer, "v=0")), None);
        for rubbish in ["", "{}", r#"{"peerId":"x","check":"y"}"#, r#"{"check":"1,2$AA=="}"#] {
            assert_eq!(room.parse_offer(rubbish), None);
        }
    }
}
