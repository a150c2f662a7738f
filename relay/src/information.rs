//! The relay information document (NIP-11).

use serde_json::{Value, json};

use crate::message::MAX_SUBSCRIPTION_ID;
use crate::relay::Relay;

/// What the relay says about itself; only what it really enforces.
pub(crate) fn document(relay: &Relay) -> Value {
    let limits = &relay.limits;
    let stores = relay.store.is_some();
    let mut nips = vec![1, 11, 13];
    if stores {
        nips.extend([9, 40, 42, 45, 70]);
    } else if relay.gate.asks_for_proof() {
        nips.push(42);
    }
    nips.sort_unstable();
    let mut document = json!({
        "name": "Homeport",
        "description": "A relay for signalling: ephemeral events are delivered at once and never stored.",
        "supported_nips": nips,
        "software": "homeport",
        "version": env!("CARGO_PKG_VERSION"),
        "limitation": {
            "max_message_length": limits.message_bytes,
            "max_subscriptions": limits.subscriptions,
            "max_filters": limits.filters,
            "max_filter_values": limits.filter_values,
            "max_limit": limits.stored_events,
            "default_limit": limits.stored_events,
            "max_subid_length": MAX_SUBSCRIPTION_ID,
            "max_event_tags": limits.event_tags,
            "min_pow_difficulty": limits.difficulty,
            "auth_required": relay.gate.asks_for_proof(),
            "payment_required": false,
            "restricted_writes": !stores || !relay.gate.is_open(),
        },
    });
    if !stores {
        // No stored kind is kept: everything but ephemeral events is refused.
        document["retention"] = json!([{ "kinds": [[0, 19_999], [30_000, 65_535]], "time": 0 }]);
    }
    document
}
