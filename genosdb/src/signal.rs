//! What peers say to each other through a relay before they have a link (wire §2).

use crate::json::{self, Members};
use crate::sealed_sdp::SealedDescription;
use crate::topic::PeerId;

/// One signalling message: the content of a Nostr event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signal {
    /// "I am here", to the room's root topic, at once and then every 2.5 s.
    Announce {
        /// Who is here.
        peer: PeerId,
    },
    /// "Connect to me", to the target's self topic.
    Offer {
        /// Who dials.
        peer: PeerId,
        /// The dialler's description, ICE candidates included.
        sdp: SealedDescription,
        /// Whether the dialler says that it is a server (`"type":"superpeer"`).
        superpeer: bool,
    },
    /// "Here is how", to the offerer's self topic.
    Answer {
        /// Who answers.
        peer: PeerId,
        /// The answerer's description, ICE candidates included.
        sdp: SealedDescription,
    },
    /// "I am leaving", to the room's root topic.
    Bye {
        /// Who leaves.
        peer: PeerId,
    },
}

impl Signal {
    /// Parses an event's content; `None` when it is none of the four.
    pub fn parse(content: &str) -> Option<Self> {
        let mut members = Members::parse(content).ok()?;
        let peer = PeerId::parse(json::string(members.take("peerId")?).ok()?.as_printed())?;
        if let Some(offer) = members.take("offer") {
            let superpeer = members.take("type") == Some("\"superpeer\"");
            return Some(Self::Offer { peer, sdp: description(offer, "offer")?, superpeer });
        }
        if let Some(answer) = members.take("answer") {
            return Some(Self::Answer { peer, sdp: description(answer, "answer")? });
        }
        Some(if members.take("bye").is_some() { Self::Bye { peer } } else { Self::Announce { peer } })
    }

    /// Who says it.
    pub fn peer(&self) -> PeerId {
        match self {
            Self::Announce { peer } | Self::Offer { peer, .. } | Self::Answer { peer, .. } | Self::Bye { peer } => {
                *peer
            }
        }
    }

    /// The content of the event that says it.
    pub fn to_content(&self) -> String {
        match self {
            Self::Announce { peer } => format!(r#"{{"peerId":"{peer}"}}"#),
            Self::Offer { peer, sdp, superpeer } => {
                let role = if *superpeer { r#","type":"superpeer""# } else { "" };
                format!(r#"{{"peerId":"{peer}","offer":{{"type":"offer","sdp":"{}"}}{role}}}"#, sdp.as_str())
            }
            Self::Answer { peer, sdp } => {
                format!(r#"{{"peerId":"{peer}","answer":{{"type":"answer","sdp":"{}"}}}}"#, sdp.as_str())
            }
            Self::Bye { peer } => format!(r#"{{"peerId":"{peer}","bye":1}}"#),
        }
    }
}

fn description(text: &str, kind: &str) -> Option<SealedDescription> {
    let mut members = Members::parse(text).ok()?;
    let right = json::string(members.take("type")?).ok()?.as_printed() == kind;
    let sdp = json::string(members.take("sdp")?).ok()?;
    SealedDescription::parse(sdp.as_printed()).filter(|_| right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_heard() {
        let peer = PeerId::parse("rP5xrSA37VoHEv5F0C0U").unwrap();
        let sdp = SealedDescription::parse("1,2$AA==").unwrap();
        for signal in [
            Signal::Announce { peer },
            Signal::Offer { peer, sdp: sdp.clone(), superpeer: false },
            Signal::Offer { peer, sdp: sdp.clone(), superpeer: true },
            Signal::Answer { peer, sdp },
            Signal::Bye { peer },
        ] {
            assert_eq!(Signal::parse(&signal.to_content()), Some(signal));
        }
    }

    #[test]
    fn other_content_is_no_signal() {
        for content in [
            "",
            "null",
            "[]",
            "{}",
            r#"{"peerId":1}"#,
            r#"{"peerId":"short"}"#,
            r#"{"peerId":"rP5xrSA37VoHEv5F0C0U","offer":1}"#,
            r#"{"peerId":"rP5xrSA37VoHEv5F0C0U","offer":{"type":"answer","sdp":"x"}}"#,
            r#"{"peerId":"rP5xrSA37VoHEv5F0C0U","answer":{"type":"answer"}}"#,
            r#"{"peerId":"rP5xrSA37VoHEv5F0C0U","answer":{"type":"answer","sdp":"v=0\r\n"}}"#,
        ] {
            assert_eq!(Signal::parse(content), None, "{content}");
        }
    }
}
