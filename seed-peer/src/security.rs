//! Who rules a room, and how, for rooms with a Security Manager.

use std::collections::BTreeSet;
use std::sync::Arc;

use genosdb::governance::Rules;
use genosdb::roles::Roles;
use genosdb::security::Policy;
use genosdb::signature::Address;

/// How a room with a Security Manager is ruled.
#[derive(Debug, Clone)]
pub struct Security {
    /// Who may do what.
    pub policy: Policy,
    /// Whether nodes in the full state of somebody who does not sign are taken, but for those that are somebody's.
    pub unsigned_states: bool,
    /// The rules by which the seed gives and takes roles, if it signs.
    pub rules: Rules,
}

impl Security {
    /// The usual roles, without rules; `None` when nobody rules.
    pub fn of(super_admins: impl IntoIterator<Item = Address>) -> Option<Arc<Self>> {
        let super_admins: BTreeSet<Address> = super_admins.into_iter().collect();
        let policy = Policy { super_admins, roles: Roles::default(), acls: true };
        (!policy.super_admins.is_empty())
            .then(|| Arc::new(Self { policy, unsigned_states: false, rules: Rules::default() }))
    }
}
