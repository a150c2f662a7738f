//! What travels between cells: a message with its origin, and how often it may still be passed on (wire §5).

use crate::cells::{CellIndex, Topology};
use crate::frame::ChannelName;
use crate::json::{self, Json, JsonError, JsonString, Members};
use crate::operation::Extra;
use crate::topic::PeerId;

/// The longest id of an envelope, in bytes as JSON. Clients' take 20 for the origin and about 15 more.
const MAX_ID_BYTES: usize = 128;
/// No envelope may be passed on more often, whatever it says: clients start no higher.
const MAX_TTL: u64 = 150;

/// A message on the channel of a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// What sort of message it is: `msg`, `ping`, `pong`, or one that only later clients know.
    pub kind: JsonString,
    /// Tells it from all others: whoever has seen it drops it.
    pub id: JsonString,
    /// How many times it may still be passed on.
    pub ttl: u32,
    /// What it carries.
    pub data: Json,
    /// Who sent it first.
    pub origin: PeerId,
    /// The cell that the origin takes itself to be in.
    pub origin_cell: Option<CellIndex>,
    /// Members that this version does not know.
    pub extra: Extra,
}

/// A text is not an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Not the JSON that belongs there.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// A member that must be there is not, or is not what it must be.
    #[error("member {0} is missing or malformed")]
    Member(&'static str),
}

/// What an envelope is to a peer that takes part in the room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Letter {
    /// A message on one of the channels that are there without cells as well, such as `syncGraph`.
    Channel {
        /// The channel.
        name: ChannelName,
        /// The message, as JSON.
        payload: Json,
    },
    /// A message of the application to everybody (`mesh.send`).
    Bare,
    /// "Are you there?", to one peer.
    Ping {
        /// What the answer must repeat.
        id: Json,
        /// Who is asked.
        target: PeerId,
    },
    /// An answer to that, or what only later clients understand.
    Other,
}

impl Envelope {
    /// Parses the payload of a frame on the channel of a cell.
    ///
    /// # Errors
    /// [`EnvelopeError`] when it is not an envelope.
    pub fn parse(text: &str) -> Result<Self, EnvelopeError> {
        let mut members = Members::parse(text)?;
        let mut required = |name: &'static str| members.take(name).ok_or(EnvelopeError::Member(name));
        let kind = json::string(required("t")?)?;
        let id = json::string(required("id")?)?;
        if id.as_printed().len() > MAX_ID_BYTES {
            return Err(EnvelopeError::Member("id"));
        }
        let ttl = json::integer(required("ttl")?, MAX_TTL)?;
        let data = Json::parse(required("data")?)?;
        let origin = json::string(required("origin")?)?;
        let origin = PeerId::parse(origin.as_printed()).ok_or(EnvelopeError::Member("origin"))?;
        let origin_cell = match members.take("originCell") {
            Some(cell) => json::string(cell).ok().and_then(|cell| CellIndex::parse(cell.as_printed())),
            None => None,
        };
        let ttl = u32::try_from(ttl).map_err(|_| EnvelopeError::Member("ttl"))?;
        Ok(Self { kind, id, ttl, data, origin, origin_cell, extra: members.rest()? })
    }

    /// Prints the envelope as clients do.
    pub fn print(&self) -> String {
        let Self { kind, id, ttl, data, origin, origin_cell, extra } = self;
        let mut text = format!(r#"{{"t":{kind},"id":{id},"ttl":{ttl},"data":{data},"origin":"{origin}""#);
        if let Some(cell) = origin_cell {
            text.push_str(&format!(r#","originCell":"{cell}""#));
        }
        for (name, value) in extra {
            text.push_str(&format!(",{name}:{value}"));
        }
        text.push('}');
        text
    }

    /// The envelope as it is passed on; `None` when it may not be any more.
    pub fn passed_on(&self) -> Option<Self> {
        Some(Self { ttl: self.ttl.checked_sub(1)?, ..self.clone() })
    }

    /// What the envelope carries.
    pub fn letter(&self) -> Letter {
        match self.kind.as_printed() {
            "msg" => channel_message(&self.data).unwrap_or(Letter::Bare),
            "ping" => ping(&self.data).unwrap_or(Letter::Other),
            _ => Letter::Other,
        }
    }
}

/// Makes the envelopes of one peer.
#[derive(Debug, Clone, Default)]
pub struct Postmark {
    sequence: u64,
}

impl Postmark {
    /// A message of `origin` on the channel `name`, to everybody. `wall_ms` is the time of day.
    pub fn channel(
        &mut self,
        origin: PeerId,
        topology: &Topology,
        wall_ms: u64,
        name: ChannelName,
        payload: &str,
    ) -> Envelope {
        let name = JsonString::new(name.as_str());
        let data = Json::from_printed(format!(r#"{{"_ch":{name},"_d":{payload}}}"#));
        self.stamp("msg", origin, topology, wall_ms, data)
    }

    /// The answer of `origin` to a [`Letter::Ping`].
    pub fn pong(&mut self, origin: PeerId, topology: &Topology, wall_ms: u64, ping_id: &Json) -> Envelope {
        let data = Json::from_printed(format!(r#"{{"pingId":{ping_id},"receivedAt":{wall_ms}}}"#));
        self.stamp("pong", origin, topology, wall_ms, data)
    }

    fn stamp(&mut self, kind: &str, origin: PeerId, topology: &Topology, wall_ms: u64, data: Json) -> Envelope {
        self.sequence += 1;
        Envelope {
            kind: JsonString::new(kind),
            id: JsonString::new(&format!("{origin}:{}:{}", base36(wall_ms), self.sequence)),
            ttl: topology.ttl(),
            data,
            origin,
            origin_cell: topology.cell_of(&origin),
            extra: Vec::new(),
        }
    }
}

fn channel_message(data: &Json) -> Option<Letter> {
    let mut members = Members::parse(data.as_str()).ok()?;
    let name = json::string(members.take("_ch")?).ok()?;
    let payload = Json::parse(members.take("_d")?).ok()?;
    Some(Letter::Channel { name: ChannelName::new(&name.to_text())?, payload })
}

fn ping(data: &Json) -> Option<Letter> {
    let mut members = Members::parse(data.as_str()).ok()?;
    let id = Json::parse(members.take("pingId")?).ok()?;
    let target = json::string(members.take("target")?).ok()?;
    Some(Letter::Ping { id, target: PeerId::parse(target.as_printed())? })
}

fn base36(mut number: u64) -> String {
    let mut digits = Vec::new();
    loop {
        digits.push(char::from_digit(u32::try_from(number % 36).unwrap_or(0), 36).unwrap_or('0'));
        number /= 36;
        if number == 0 {
            return digits.iter().rev().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: &str = "rP5xrSA37VoHEv5F0C0U";

    fn envelope(kind: &str, data: &str) -> String {
        format!(
            r#"{{"t":"{kind}","id":"{ORIGIN}:m0x:1","ttl":7,"data":{data},"origin":"{ORIGIN}","originCell":"cell-2"}}"#
        )
    }

    #[test]
    fn an_envelope_prints_as_it_came() {
        for data in [r#"{"_ch":"syncGraph","_d":[{"type":"sync","timestamp":null}]}"#, "null", r#""text""#, "[1,2]"] {
            let text = envelope("msg", data);
            assert_eq!(Envelope::parse(&text).unwrap().print(), text);
        }
        let plain = envelope("msg", "1");
        let with_more = plain.replace('}', r#","later":{"x":[1]}}"#);
        let parsed = Envelope::parse(&with_more).unwrap();
        assert_eq!(parsed.print(), with_more);
        assert_eq!(parsed.passed_on().unwrap().print(), with_more.replace(r#""ttl":7"#, r#""ttl":6"#));
    }

    #[test]
    fn what_is_no_envelope_is_refused() {
        for (what, text) in [
            ("not JSON", "{".to_owned()),
            ("no object", "[]".to_owned()),
            ("no members", "{}".to_owned()),
            ("a ttl beyond all rooms", envelope("msg", "1").replace(":7,", ":151,")),
            ("a negative ttl", envelope("msg", "1").replace(":7,", ":-1,")),
            (
                "an origin that is no peer",
                envelope("msg", "1").replace("rP5xrSA37VoHEv5F0C0U\",\"originCell", "me\",\"originCell"),
            ),
            ("a long id", envelope("msg", "1").replace(":m0x:", &"x".repeat(200))),
        ] {
            assert!(Envelope::parse(&text).is_err(), "{what}");
        }
    }

    #[test]
    fn an_envelope_says_what_it_carries() {
        let letter = |kind: &str, data: &str| Envelope::parse(&envelope(kind, data)).unwrap().letter();
        let sync = letter("msg", r#"{"_ch":"syncGraph","_d":[1]}"#);
        assert_eq!(sync, Letter::Channel { name: ChannelName::SYNC_GRAPH, payload: Json::from_printed("[1]".into()) });
        assert_eq!(letter("msg", r#"{"text":"hi"}"#), Letter::Bare);
        let target = PeerId::parse(ORIGIN).unwrap();
        let ping = letter("ping", &format!(r#"{{"pingId":"p1","target":"{ORIGIN}"}}"#));
        assert_eq!(ping, Letter::Ping { id: Json::from_printed(r#""p1""#.into()), target });
        assert_eq!(letter("ping", "{}"), Letter::Other);
        assert_eq!(letter("pong", "{}"), Letter::Other);
    }

    #[test]
    fn a_made_envelope_is_like_those_of_clients() {
        let origin = PeerId::parse(ORIGIN).unwrap();
        let topology = Topology::new(&[origin], 3);
        let mut postmark = Postmark::default();
        let made = postmark.channel(origin, &topology, 1_795_337_371_021, ChannelName::SYNC_GRAPH, "[]");
        assert_eq!(
            made.print(),
            format!(
                r#"{{"t":"msg","id":"{ORIGIN}:mwrlilcd:1","ttl":5,"data":{{"_ch":"syncGraph","_d":[]}},"origin":"{ORIGIN}","originCell":"cell-0"}}"#
            )
        );
        assert_eq!(Envelope::parse(&made.print()).unwrap(), made);
    }

    proptest::proptest! {
        #[test]
        fn no_change_to_an_envelope_makes_its_reader_panic(
            at in proptest::prelude::any::<proptest::sample::Index>(),
            text in "[ -~]{0,6}",
            cut in 0..40usize,
        ) {
            let whole = envelope("ping", &format!(r#"{{"pingId":1,"target":"{ORIGIN}","_ch":"x","_d":[]}}"#));
            let start = at.index(whole.len());
            let changed = format!("{}{text}{}", &whole[..start], &whole[(start + cut).min(whole.len())..]);
            if let Ok(envelope) = Envelope::parse(&changed) {
                let _ = envelope.letter();
                // What was understood is passed on as something that others understand the same way.
                let passed_on = Envelope::parse(&envelope.print()).unwrap();
                proptest::prop_assert_eq!(passed_on, envelope);
            }
        }
    }
}
