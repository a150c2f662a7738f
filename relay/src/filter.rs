//! Filters of a subscription (NIP-01).

use std::borrow::Borrow;

use serde_json::Value;

use crate::event::{Event, parse_lower_hex};

/// A list of which an event must have one. Sorted and of exactly its size: relays hold one for each subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OneOf<T>(Box<[T]>);

impl<T: Ord> OneOf<T> {
    pub(crate) fn contains<Q: Ord + ?Sized>(&self, one: &Q) -> bool
    where
        T: Borrow<Q>,
    {
        self.0.binary_search_by(|known| known.borrow().cmp(one)).is_ok()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

impl<T: Ord> FromIterator<T> for OneOf<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut items: Vec<T> = items.into_iter().collect();
        items.sort_unstable();
        items.dedup();
        Self(items.into())
    }
}

/// Which events a subscription asks for. A list that is absent lets everything pass; an empty one nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) ids: Option<OneOf<[u8; 32]>>,
    pub(crate) authors: Option<OneOf<[u8; 32]>>,
    pub(crate) kinds: Option<OneOf<u16>>,
    /// By tag letter, the values that are asked for.
    pub(crate) tags: Box<[(u8, OneOf<Box<str>>)]>,
    pub(crate) since: Option<u64>,
    pub(crate) until: Option<u64>,
    /// Only for stored events.
    pub(crate) limit: Option<u64>,
    /// How far clients' clocks may be apart before one loses ephemeral events of another, in seconds: `created_at`
    /// comes from one client's clock, `since` from another's, and neither is ours.
    pub(crate) clock_skew: u64,
}

/// A filter that cannot be served; the message goes to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FilterError {
    #[error("invalid: a filter must be an object")]
    NotAnObject,
    #[error("invalid: filter key {0} has the wrong type")]
    Type(&'static str),
    #[error("unsupported: unknown filter key")]
    UnknownKey,
    #[error("invalid: a filter may hold {0} values at most")]
    TooManyValues(usize),
}

impl Filter {
    /// Parses a filter that may hold up to `max_values` values in all its lists together. `clock_skew` is in seconds.
    pub(crate) fn parse(json: &str, max_values: usize, clock_skew: u64) -> Result<Self, FilterError> {
        let Ok(Value::Object(members)) = serde_json::from_str(json) else { return Err(FilterError::NotAnObject) };
        let values = members.values().map(|value| value.as_array().map_or(0, Vec::len)).sum::<usize>();
        if values > max_values {
            return Err(FilterError::TooManyValues(max_values));
        }
        let mut filter = Self { clock_skew, ..Self::default() };
        let mut tags = Vec::new();
        for (key, value) in &members {
            match key.as_str() {
                "ids" => filter.ids = Some(hex_list(value).ok_or(FilterError::Type("ids"))?),
                "authors" => filter.authors = Some(hex_list(value).ok_or(FilterError::Type("authors"))?),
                "kinds" => {
                    let kind = |kind: &Value| kind.as_u64().and_then(|kind| u16::try_from(kind).ok());
                    filter.kinds = Some(list(value, kind).ok_or(FilterError::Type("kinds"))?);
                }
                "since" => filter.since = Some(value.as_u64().ok_or(FilterError::Type("since"))?),
                "until" => filter.until = Some(value.as_u64().ok_or(FilterError::Type("until"))?),
                "limit" => filter.limit = Some(value.as_u64().ok_or(FilterError::Type("limit"))?),
                _ => match key.as_bytes() {
                    [b'#', letter] if letter.is_ascii_alphabetic() => {
                        let values = list(value, |value| value.as_str().map(Into::into));
                        tags.push((*letter, values.ok_or(FilterError::Type("of a tag"))?));
                    }
                    _ => return Err(FilterError::UnknownKey),
                },
            }
        }
        filter.tags = tags.into();
        Ok(filter)
    }

    /// Whether a stored event could pass.
    pub(crate) fn asks_for_stored(&self) -> bool {
        let storable = |kinds: &OneOf<u16>| kinds.iter().any(|kind| !(20_000..30_000).contains(kind));
        self.kinds.as_ref().is_none_or(storable) && self.limit != Some(0)
    }

    /// Whether an event passes. Clocks that differ a little do not hinder ephemeral ones.
    pub(crate) fn matches(&self, event: &Event<'_>) -> bool {
        let skew = if event.is_ephemeral() { self.clock_skew } else { 0 };
        let listed = |list: &Option<OneOf<[u8; 32]>>, one| list.as_ref().is_none_or(|list| list.contains(one));
        listed(&self.ids, &event.id)
            && listed(&self.authors, &event.pubkey)
            && self.kinds.as_ref().is_none_or(|kinds| kinds.contains(&event.kind))
            && self.since.is_none_or(|since| event.created_at.saturating_add(skew) >= since)
            && self.until.is_none_or(|until| event.created_at <= until.saturating_add(skew))
            && self.tags.iter().all(|(letter, values)| {
                event.letter_tags().any(|(name, value)| name == *letter && values.contains(value))
            })
    }
}

fn list<T: Ord>(value: &Value, parse: impl Fn(&Value) -> Option<T>) -> Option<OneOf<T>> {
    value.as_array()?.iter().map(parse).collect()
}

fn hex_list(value: &Value) -> Option<OneOf<[u8; 32]>> {
    list(value, |value| parse_lower_hex(value.as_str()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(created_at: u64) -> Event<'static> {
        Event {
            id: [1; 32],
            pubkey: [2; 32],
            created_at,
            kind: 22_718,
            tags: vec![vec!["x".into(), "topic".into()], vec!["e".into()], vec!["long".into(), "topic".into()]],
            content: "".into(),
            sig: [0; 64],
        }
    }

    fn matches(json: &str) -> bool {
        Filter::parse(json, 100, 60).unwrap().matches(&event(1_000_000))
    }

    #[test]
    fn every_condition_must_hold() {
        for (filter, expected) in [
            ("{}", true),
            (r##"{"kinds":[22718],"#x":["topic"]}"##, true),
            (r##"{"kinds":[1,22718],"#x":["other","topic"],"since":1000000,"limit":0}"##, true),
            (r##"{"kinds":[1],"#x":["topic"]}"##, false),
            (r##"{"kinds":[22718],"#x":["other"]}"##, false),
            (r#"{"kinds":[]}"#, false),
            (r##"{"#x":[]}"##, false),
            (r##"{"#e":["topic"]}"##, false),
            (r##"{"#y":["topic"]}"##, false),
            (r#"{"ids":["0101010101010101010101010101010101010101010101010101010101010101"]}"#, true),
            (r#"{"authors":["0101010101010101010101010101010101010101010101010101010101010101"]}"#, false),
            (r#"{"since":1000060}"#, true),
            (r#"{"since":1000061}"#, false),
            (r#"{"until":999940}"#, true),
            (r#"{"until":999939}"#, false),
        ] {
            assert_eq!(matches(filter), expected, "{filter}");
        }
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for (filter, error) in [
            ("[]", FilterError::NotAnObject),
            ("{", FilterError::NotAnObject),
            (r#"{"kinds":22718}"#, FilterError::Type("kinds")),
            (r#"{"kinds":[65536]}"#, FilterError::Type("kinds")),
            (r#"{"ids":["ABCD"]}"#, FilterError::Type("ids")),
            (r#"{"authors":[1]}"#, FilterError::Type("authors")),
            (r#"{"since":-1}"#, FilterError::Type("since")),
            (r##"{"#x":[1]}"##, FilterError::Type("of a tag")),
            (r##"{"#xy":["a"]}"##, FilterError::UnknownKey),
            (r#"{"search":"a"}"#, FilterError::UnknownKey),
        ] {
            assert_eq!(Filter::parse(filter, 100, 60), Err(error), "{filter}");
        }
        let many: Vec<u32> = (0..101).collect();
        let filter = serde_json::json!({ "kinds": many }).to_string();
        assert_eq!(Filter::parse(&filter, 100, 60), Err(FilterError::TooManyValues(100)));
    }
}
