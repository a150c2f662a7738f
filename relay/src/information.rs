//! The relay information document (NIP-11).

use serde_json::{Value, json};

use crate::admission::Gate;
use crate::message::MAX_SUBSCRIPTION_ID;
use crate::server::Limits;

/// What the relay says about itself; only what it really enforces.
pub(crate) fn document(limits: &Limits, gate: &Gate) -> Value {
    let mut nips = vec![1, 11];
    if gate.asks_for_proof() {
        nips.push(42);
    }
    json!({
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
            "max_subid_length": MAX_SUBSCRIPTION_ID,
            "max_event_tags": limits.event_tags,
            "auth_required": gate.asks_for_proof(),
            "payment_required": false,
            "restricted_writes": true,
        },
        // No stored kind is kept: everything but ephemeral events is refused.
        "retention": [{ "kinds": [[0, 19_999], [30_000, 65_535]], "time": 0 }],
    })
}
