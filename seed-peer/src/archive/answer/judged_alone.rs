//! Whether each operation of a delta can be judged without those before it.
//!
//! A peer with a Security Manager may ask of every operation in a delta whether its author is permitted before it applies
//! the first of them. An author whose role is given in the same delta, or who is named there as a collaborator, then has
//! no permission yet, and what it wrote is left out for good. A whole state is judged by its signer alone.

use std::collections::HashSet;

use genosdb::Operation;
use genosdb::json::{JsonString, Value};
use genosdb::operation::Node;
use genosdb::security::USER_PREFIX;

/// The operations of one delta, so far.
#[derive(Default)]
pub(super) struct JudgedAlone {
    /// Whether a role was given: whatever follows may be its bearer's.
    has_role: bool,
    /// The nodes that say who may write to them.
    owned: HashSet<JsonString>,
}

impl JudgedAlone {
    /// Takes the next log entry, of `kind`. Returns whether it depends on none before it.
    pub(super) fn takes(&mut self, kind: i64, entry: &str) -> bool {
        if self.has_role {
            return false;
        }
        let (id, value) = if kind == 0 {
            match Operation::parse(entry, &mut 0) {
                Ok(Operation::Upsert(upsert)) => (upsert.id, upsert.value),
                Ok(Operation::Remove(remove)) => (remove.id, None),
                Ok(Operation::Link(link)) => (link.source, None),
                _ => return true,
            }
        } else {
            match Node::parse(entry) {
                Ok(node) => (node.id, node.value),
                Err(_) => return true,
            }
        };
        if self.owned.contains(&id) {
            return false;
        }
        self.has_role = id.to_text().starts_with(USER_PREFIX);
        if value.is_some_and(|value| Value::from(&value).get("owner").is_some()) {
            self.owned.insert(id);
        }
        true
    }
}
