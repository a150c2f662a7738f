//! What client and relay say to each other (NIP-01).

use serde_json::value::RawValue;

use crate::event::Event;

/// A message of a client.
#[derive(Debug)]
pub(crate) enum ClientMessage<'a> {
    /// Publish an event; its raw text goes to subscribers as it is.
    Event { event: Box<Event<'a>>, raw: &'a str },
    /// Subscribe; the filters are still raw, so that each can be refused with the subscription's id.
    Req { subscription: String, filters: Vec<&'a str> },
    /// End a subscription.
    Close { subscription: String },
    /// Count stored events (NIP-45).
    Count { query: String, filters: Vec<&'a str> },
    /// Prove who one is (NIP-42).
    Auth { event: Box<Event<'a>> },
}

/// A message cannot be understood; the text goes to the client.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MessageError {
    #[error("invalid: not a JSON array that starts with a verb")]
    Malformed,
    #[error("unsupported: unknown verb")]
    UnknownVerb,
    /// An event whose id could be read, so that the refusal can name it.
    #[error("invalid: {reason}")]
    Event { id: Option<String>, reason: String },
    #[error("invalid: a subscription id is a string of 1 to 64 characters")]
    SubscriptionId,
}

/// The longest subscription id, in characters (NIP-01).
pub(crate) const MAX_SUBSCRIPTION_ID: usize = 64;

impl<'a> ClientMessage<'a> {
    pub(crate) fn parse(text: &'a str) -> Result<Self, MessageError> {
        let parts: Vec<&'a RawValue> = serde_json::from_str(text).map_err(|_| MessageError::Malformed)?;
        let (verb, rest) = parts.split_first().ok_or(MessageError::Malformed)?;
        match (verb.get(), rest) {
            (r#""EVENT""#, [event]) => Ok(Self::Event { event: parse_event(event)?, raw: event.get() }),
            (r#""AUTH""#, [event]) => Ok(Self::Auth { event: parse_event(event)? }),
            (r#""REQ""#, [subscription, filters @ ..]) if !filters.is_empty() => Ok(Self::Req {
                subscription: subscription_id(subscription)?,
                filters: filters.iter().map(|filter| filter.get()).collect(),
            }),
            (r#""COUNT""#, [query, filters @ ..]) if !filters.is_empty() => Ok(Self::Count {
                query: subscription_id(query)?,
                filters: filters.iter().map(|filter| filter.get()).collect(),
            }),
            (r#""CLOSE""#, [subscription]) => Ok(Self::Close { subscription: subscription_id(subscription)? }),
            (r#""EVENT""# | r#""REQ""# | r#""CLOSE""# | r#""AUTH""# | r#""COUNT""#, _) => Err(MessageError::Malformed),
            (verb, _) if verb.starts_with('"') => Err(MessageError::UnknownVerb),
            _ => Err(MessageError::Malformed),
        }
    }

    /// The verb, for metrics.
    pub(crate) fn verb(&self) -> &'static str {
        match self {
            Self::Event { .. } => "EVENT",
            Self::Req { .. } => "REQ",
            Self::Close { .. } => "CLOSE",
            Self::Auth { .. } => "AUTH",
            Self::Count { .. } => "COUNT",
        }
    }
}

fn parse_event(raw: &RawValue) -> Result<Box<Event<'_>>, MessageError> {
    let raw = raw.get();
    serde_json::from_str(raw)
        .map(Box::new)
        .map_err(|error| MessageError::Event { id: event_id(raw), reason: without_position(&error) })
}

fn subscription_id(raw: &RawValue) -> Result<String, MessageError> {
    let id: String = serde_json::from_str(raw.get()).map_err(|_| MessageError::SubscriptionId)?;
    let length = id.chars().count();
    if (1..=MAX_SUBSCRIPTION_ID).contains(&length) { Ok(id) } else { Err(MessageError::SubscriptionId) }
}

/// The id of an event that is otherwise broken, if it is one.
fn event_id(raw: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(raw).ok()?;
    let id = value.get("id")?.as_str()?;
    crate::event::parse_lower_hex::<32>(id).map(|_| id.to_owned())
}

/// Without "at line 1 column 7", which says nothing to anybody here.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}

/// What the relay says, each as the text of a message.
pub(crate) mod relay_message {
    use serde_json::json;

    pub(crate) fn ok(event_id: &str, accepted: bool, reason: &str) -> String {
        json!(["OK", event_id, accepted, reason]).to_string()
    }

    pub(crate) fn eose(subscription: &str) -> String {
        json!(["EOSE", subscription]).to_string()
    }

    pub(crate) fn closed(subscription: &str, reason: &str) -> String {
        json!(["CLOSED", subscription, reason]).to_string()
    }

    pub(crate) fn count(query: &str, count: usize) -> String {
        json!(["COUNT", query, { "count": count }]).to_string()
    }

    pub(crate) fn auth(challenge: &str) -> String {
        json!(["AUTH", challenge]).to_string()
    }

    pub(crate) fn notice(text: &str) -> String {
        json!(["NOTICE", text]).to_string()
    }

    /// The part of an event's message that stands before the event, made once for each subscription.
    pub(crate) fn event_prefix(subscription: &str) -> String {
        format!(r#"["EVENT",{},"#, json!(subscription))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_message_makes_the_parsers_panic(
            text in proptest::prelude::any::<String>(),
            verb in "EVENT|REQ|CLOSE|COUNT|AUTH",
            rest in "[\\[\\]{}\",:a-z0-9#-]{0,60}",
        ) {
            for text in [text.clone(), format!(r#"["{verb}",{rest}]"#), format!(r#"["{verb}","s",{{{rest}}}]"#)] {
                if let Ok(ClientMessage::Req { filters, .. } | ClientMessage::Count { filters, .. }) = ClientMessage::parse(&text) {
                    for filter in filters {
                        let _ = crate::filter::Filter::parse(filter, 100, 60);
                    }
                }
            }
        }
    }

    #[test]
    fn verbs_are_understood() {
        let parsed = ClientMessage::parse(r#"["REQ","a",{"kinds":[1]},{}]"#).unwrap();
        assert!(matches!(parsed, ClientMessage::Req { ref subscription, ref filters }
            if subscription == "a" && filters == &[r#"{"kinds":[1]}"#, "{}"]));
        let long = "é".repeat(64);
        let text = format!(r#"["CLOSE","{long}"]"#);
        assert!(
            matches!(ClientMessage::parse(&text), Ok(ClientMessage::Close { subscription }) if subscription == long)
        );
    }

    #[test]
    fn malformed_messages_are_refused_with_a_reason() {
        let deep = "[".repeat(100_000);
        for (text, error) in [
            ("", MessageError::Malformed),
            ("{}", MessageError::Malformed),
            ("[]", MessageError::Malformed),
            ("[1]", MessageError::Malformed),
            (deep.as_str(), MessageError::Malformed),
            (r#"["REQ"]"#, MessageError::Malformed),
            (r#"["REQ","a"]"#, MessageError::Malformed),
            (r#"["EVENT"]"#, MessageError::Malformed),
            (r#"["HELLO",1]"#, MessageError::UnknownVerb),
            (r#"["REQ","",{}]"#, MessageError::SubscriptionId),
            (r#"["CLOSE",1]"#, MessageError::SubscriptionId),
        ] {
            assert_eq!(ClientMessage::parse(text).unwrap_err(), error, "{text:.60}");
        }
        let long = format!(r#"["CLOSE","{}"]"#, "a".repeat(65));
        assert_eq!(ClientMessage::parse(&long).unwrap_err(), MessageError::SubscriptionId);
    }

    #[test]
    fn a_broken_event_is_named_by_its_id_when_it_has_one() {
        let id = "5".repeat(64);
        let text = format!(r#"["EVENT",{{"id":"{id}","kind":"x"}}]"#);
        assert!(matches!(ClientMessage::parse(&text), Err(MessageError::Event { id: Some(named), .. }) if named == id));
        let unnamed = ClientMessage::parse(r#"["EVENT",{"id":7}]"#);
        assert!(matches!(unnamed, Err(MessageError::Event { id: None, .. })));
    }
}
