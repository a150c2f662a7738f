//! The subjects of NATS by which ephemeral events travel, and those by which a filter's are found.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::event::Event;
use crate::filter::Filter;
use crate::presence::PresentKey;

/// Where ephemeral events travel.
const SUBJECTS: &str = "homeport.live";
/// Stands in place of a tag for events that have none to be found by.
const NO_TAG: &str = "-";
/// An event goes by so many of its tags at most: each is a message.
const MAX_EVENT_TAGS: usize = 8;
/// Up to so many pairs of kind and value, a filter asks for the pairs; beyond, for every kind of a value.
const MAX_PAIRS: usize = 64;

/// A subject of NATS, or a pattern of such.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Subject(Arc<str>);

impl Subject {
    pub(super) fn of(tag: &str, kind: &str) -> Self {
        Self(format!("{SUBJECTS}.{tag}.{kind}").into())
    }

    /// The subjects by which an event travels.
    pub(super) fn of_event(event: &Event<'_>) -> Vec<Self> {
        let kind = event.kind.to_string();
        let mut tags: Vec<String> =
            event.letter_tags().take(MAX_EVENT_TAGS).map(|(letter, value)| token(letter, value)).collect();
        tags.sort_unstable();
        tags.dedup();
        if tags.is_empty() {
            tags.push(NO_TAG.into());
        }
        tags.iter().map(|tag| Self::of(tag, &kind)).collect()
    }

    /// The subjects by which every ephemeral event travels that a filter may ask for.
    pub(super) fn of_filter(filter: &Filter) -> Vec<Self> {
        let kinds: Option<Vec<String>> = filter.kinds.as_ref().map(|kinds| {
            kinds.iter().filter(|kind| (20_000..30_000).contains(*kind)).map(ToString::to_string).collect()
        });
        let narrowest = filter.tags.iter().min_by_key(|(_, values)| values.len());
        match (kinds, narrowest) {
            (Some(kinds), _) if kinds.is_empty() => Vec::new(),
            (Some(kinds), Some((letter, values))) if kinds.len() * values.len() <= MAX_PAIRS => values
                .iter()
                .flat_map(|value| {
                    let tag = token(*letter, value);
                    kinds.iter().map(move |kind| Self::of(&tag, kind)).collect::<Vec<_>>()
                })
                .collect(),
            (_, Some((letter, values))) => values.iter().map(|value| Self::of(&token(*letter, value), "*")).collect(),
            (Some(kinds), None) => kinds.iter().map(|kind| Self::of("*", kind)).collect(),
            (None, None) => vec![Self::of("*", "*")],
        }
    }

    /// The subject by which others hear that an author is gone.
    pub(super) fn of_gone(key: &PresentKey) -> Self {
        Self::of(&token(b'x', key.topic()), &key.kind().to_string())
    }

    /// The subject's text.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A tag's letter and value as they stand in a subject, where most characters may not.
fn token(letter: u8, value: &str) -> String {
    format!("{}{}", char::from(letter), hex::encode(&Sha256::digest(value)[..16]))
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;
    use crate::filter::OneOf;

    /// Whether a pattern of NATS takes a subject.
    fn takes(pattern: &Subject, subject: &Subject) -> bool {
        let (mut pattern, mut subject) = (pattern.0.split('.'), subject.0.split('.'));
        loop {
            match (pattern.next(), subject.next()) {
                (None, None) => return true,
                (Some(one), Some(other)) if one == "*" || one == other => {}
                _ => return false,
            }
        }
    }

    fn filters() -> impl Strategy<Value = Filter> {
        let kinds = prop::option::of(
            prop::collection::vec(prop_oneof![Just(1_u16), 20_000..20_070_u16], 0..70).prop_map(OneOf::from_iter),
        );
        let values = || prop::collection::vec((0..3u8).prop_map(|value| value.to_string().into()), 0..3);
        let tags = prop::collection::btree_map(b'a'..=b'c', values().prop_map(OneOf::from_iter), 0..3)
            .prop_map(|tags| tags.into_iter().collect());
        (kinds, tags).prop_map(|(kinds, tags)| Filter { kinds, tags, ..Filter::default() })
    }

    fn events() -> impl Strategy<Value = Event<'static>> {
        let tag = (b'a'..=b'd', 0..4u8)
            .prop_map(|(letter, value)| vec![char::from(letter).to_string().into(), value.to_string().into()]);
        (20_000..20_070_u16, prop::collection::vec(tag, 0..MAX_EVENT_TAGS)).prop_map(|(kind, tags)| Event {
            id: [0; 32],
            pubkey: [0; 32],
            created_at: 0,
            kind,
            tags,
            content: "".into(),
            sig: [0; 64],
        })
    }

    proptest! {
        #[test]
        fn what_a_filter_asks_for_travels_by_its_subjects(filter in filters(), event in events()) {
            if filter.matches(&event) {
                let subjects = Subject::of_event(&event);
                let patterns = Subject::of_filter(&filter);
                prop_assert!(
                    patterns.iter().any(|pattern| subjects.iter().any(|subject| takes(pattern, subject))),
                    "{patterns:?} {subjects:?}"
                );
            }
        }
    }

    /// A million clients in rooms, over up to a hundred relays: messages between relays when somebody in each room says
    /// something once. The servers of NATS are taken to carry a message once to each relay that asked for its subject, as
    /// they do.
    #[test]
    fn messages_grow_with_the_relays_of_a_rooms_members_and_not_with_others() {
        const CLIENTS: usize = 1_000_000;
        // Any numbers that are spread well (SplitMix64).
        let mixed = |number: usize| {
            let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        for members in [2, 10, 100, 1_000] {
            let rooms = CLIENTS / members;
            let mut asked: HashMap<Subject, usize> = HashMap::new();
            let mut said = Vec::new();
            for room in 0..rooms {
                let topic = format!("topic of room {room}");
                let kind = 20_000 + u16::try_from(room % 10_000).unwrap();
                let tags = Box::new([(b'x', OneOf::from_iter([topic.clone().into()]))]);
                let filter = Filter { kinds: Some(OneOf::from_iter([kind])), tags, ..Filter::default() };
                asked.extend(Subject::of_filter(&filter).into_iter().map(|subject| (subject, room)));
                let tags = vec![vec!["x".into(), topic.into()]];
                let (id, pubkey, sig) = ([0; 32], [0; 32], [0; 64]);
                said.push(Subject::of_event(&Event { id, pubkey, created_at: 0, kind, tags, content: "".into(), sig }));
            }
            assert_eq!(asked.len(), rooms, "no two rooms share a subject");
            for relays in [1, 3, 10, 100] {
                let relay_of = |room: usize, member: usize| mixed(room * members + member) % relays;
                let mut messages = 0;
                for (room, subjects) in said.iter().enumerate() {
                    for subject in subjects {
                        let listening = (0..members).map(|member| relay_of(asked[subject], member));
                        let elsewhere: HashSet<usize> = listening.filter(|relay| *relay != relay_of(room, 0)).collect();
                        messages += elsewhere.len();
                    }
                }
                let per_delivery = messages as f64 / (rooms * (members - 1)) as f64;
                println!("rooms of {members} over {relays} relays: {per_delivery:.3} messages for each delivery");
                // At most one to each relay that has a member, however many others there are.
                assert!(messages <= rooms * (members.min(relays) - 1));
            }
        }
    }

    #[test]
    fn a_room_is_one_subject_and_a_crowd_of_rooms_one_for_each() {
        let filter = |text: &str| Filter::parse(text, 2_048, 60).unwrap();
        let room = Subject::of_filter(&filter(r##"{"kinds":[20001],"since":1,"#x":["a.b *>"]}"##));
        assert_eq!(room.len(), 1);
        assert!(room[0].0.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.'), "{room:?}");
        let kinds: Vec<u16> = (20_000..20_250).collect();
        let values: Vec<String> = kinds.iter().map(ToString::to_string).collect();
        let many = serde_json::json!({ "kinds": kinds, "#x": values }).to_string();
        assert_eq!(Subject::of_filter(&filter(&many)).len(), 250);
        assert_eq!(Subject::of_filter(&filter(r#"{"kinds":[0,1]}"#)), [], "what is stored travels otherwise");
        assert_eq!(Subject::of_filter(&filter("{}")).len(), 1);
    }
}
