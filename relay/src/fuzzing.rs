//! Entrances for fuzz targets.

use crate::event::KeyCache;
use crate::filter::Filter;
use crate::message::ClientMessage;
use crate::subscriptions::Subscriptions;

/// Does with a client's message what can be done without a connection.
pub fn message(text: &str) {
    match ClientMessage::parse(text) {
        Ok(ClientMessage::Event { event, raw }) => {
            // Without the signature: no input that the fuzzer finds has a right one.
            assert!(text.contains(raw));
            let _ = event.verify(&mut KeyCache::default());
            let _ = (event.is_protected(), event.difficulty(), event.letter_tags().count());
        }
        Ok(ClientMessage::Req { subscription, filters } | ClientMessage::Count { query: subscription, filters }) => {
            let filters: Vec<Filter> =
                filters.iter().filter_map(|filter| Filter::parse(filter, 2_048, 60).ok()).collect();
            let subscriptions = Subscriptions::default();
            let added = subscriptions.add(&subscription, 1, filters, Box::default(), Default::default());
            let message = format!("{}{{}}]", added.prefix);
            assert!(serde_json::from_str::<serde_json::Value>(&message).is_ok(), "{message}");
            subscriptions.remove(&added);
        }
        Ok(ClientMessage::Close { .. } | ClientMessage::Auth { .. }) | Err(_) => {}
    }
}
