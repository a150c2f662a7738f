//! Roles: what those who sign may do.

use std::collections::{BTreeMap, BTreeSet};

/// The role of whoever has none, or whose role has expired.
pub const GUEST: &str = "guest";

/// The role of those whom the settings name.
pub const SUPER_ADMIN: &str = "superadmin";

/// Permissions that this crate asks for. Apps may have others, which mean nothing here.
pub mod permission {
    /// To set a node's value.
    pub const WRITE: &str = "write";
    /// To add an edge.
    pub const LINK: &str = "link";
    /// To remove a node.
    pub const DELETE: &str = "delete";
    /// To remove and change nodes that belong to others.
    pub const DELETE_ANY: &str = "deleteAny";
    /// To give roles.
    pub const ASSIGN_ROLE: &str = "assignRole";
}

/// One role, as apps define it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Role {
    /// What it may do.
    pub can: Vec<String>,
    /// The roles whose permissions it has as well.
    pub inherits: Vec<String>,
}

/// Roles that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RolesError {
    /// One inherits from a role that is not there.
    #[error("the role {role:?} inherits from {missing:?}, which is none")]
    Missing {
        /// The role.
        role: String,
        /// What it names.
        missing: String,
    },
}

/// The roles of a room, each with all that it may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roles(BTreeMap<String, BTreeSet<String>>);

impl Default for Roles {
    /// The Security Manager's own.
    fn default() -> Self {
        Self(resolved(&defaults()))
    }
}

impl Roles {
    /// The Security Manager's roles, with `custom` ones besides, or in their place.
    ///
    /// # Errors
    /// [`RolesError`] when one inherits from nothing.
    pub fn with(custom: &BTreeMap<String, Role>) -> Result<Self, RolesError> {
        let mut roles = defaults();
        roles.extend(custom.iter().map(|(name, role)| (name.clone(), role.clone())));
        for (name, role) in &roles {
            if let Some(missing) = role.inherits.iter().find(|inherited| !roles.contains_key(*inherited)) {
                return Err(RolesError::Missing { role: name.clone(), missing: missing.clone() });
            }
        }
        Ok(Self(resolved(&roles)))
    }

    /// Whether there is such a role.
    pub fn contains(&self, role: &str) -> bool {
        self.0.contains_key(role)
    }

    /// Whether a role has a permission. A role that is not there has those of a guest.
    pub fn may(&self, role: &str, permission: &str) -> bool {
        self.permissions(role).is_some_and(|permissions| permissions.contains(permission))
    }

    /// Whether a role may do all that `other` may.
    pub fn covers(&self, role: &str, other: &str) -> bool {
        match (self.permissions(role), self.permissions(other)) {
            (Some(ours), Some(theirs)) => theirs.is_subset(ours),
            (None, Some(theirs)) => theirs.is_empty(),
            (_, None) => true,
        }
    }

    fn permissions(&self, role: &str) -> Option<&BTreeSet<String>> {
        self.0.get(role).or_else(|| self.0.get(GUEST))
    }
}

/// The roles of the Security Manager where an app defines no others.
fn defaults() -> BTreeMap<String, Role> {
    let role = |name: &str, can: &[&str], inherits: &[&str]| {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        (name.to_owned(), Role { can: owned(can), inherits: owned(inherits) })
    };
    BTreeMap::from([
        role(GUEST, &["read", "sync"], &[]),
        role("user", &[permission::WRITE, permission::LINK], &[GUEST]),
        role("manager", &["publish"], &["user"]),
        role("admin", &[permission::DELETE], &["manager"]),
        role(SUPER_ADMIN, &[permission::ASSIGN_ROLE, permission::DELETE_ANY], &["admin"]),
    ])
}

/// Every role with what it has and inherits; a circle of roles is one role under several names.
fn resolved(roles: &BTreeMap<String, Role>) -> BTreeMap<String, BTreeSet<String>> {
    let all = |name: &String| {
        let (mut seen, mut waiting) = (BTreeSet::new(), vec![name]);
        let mut permissions = BTreeSet::new();
        while let Some(name) = waiting.pop() {
            if let Some(role) = roles.get(name).filter(|_| seen.insert(name)) {
                permissions.extend(role.can.iter().cloned());
                waiting.extend(&role.inherits);
            }
        }
        permissions
    };
    roles.keys().map(|name| (name.clone(), all(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_may_what_those_below_it_may() {
        let roles = Roles::default();
        for (role, expected) in [
            ("guest", [false, false, false, false, false]),
            ("user", [true, true, false, false, false]),
            ("manager", [true, true, false, false, false]),
            ("admin", [true, true, true, false, false]),
            ("superadmin", [true, true, true, true, true]),
            ("unheard of", [false, false, false, false, false]),
        ] {
            use permission::{ASSIGN_ROLE, DELETE, DELETE_ANY, LINK, WRITE};
            let may = [WRITE, LINK, DELETE, DELETE_ANY, ASSIGN_ROLE].map(|permission| roles.may(role, permission));
            assert_eq!(may, expected, "{role}");
        }
        assert!(roles.covers("admin", "user") && !roles.covers("user", "admin") && roles.covers("none", "guest"));
    }

    #[test]
    fn roles_of_an_app_stand_beside_the_others_or_in_their_place() {
        let custom = |roles: &[(&str, &[&str], &[&str])]| {
            let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
            let role = |&(name, can, inherits): &(&str, &[&str], &[&str])| {
                (name.to_owned(), Role { can: owned(can), inherits: owned(inherits) })
            };
            Roles::with(&roles.iter().map(role).collect())
        };
        let roles = custom(&[("editor", &["delete"], &["user"]), ("user", &["write"], &[])]).unwrap();
        assert!(roles.may("editor", "delete") && roles.may("editor", "write") && !roles.may("editor", "link"));
        assert!(roles.may("admin", "write") && !roles.may("admin", "link"));
        // A circle ends.
        let roles = custom(&[("a", &["write"], &["b"]), ("b", &["link"], &["a"])]).unwrap();
        assert!(roles.may("a", "link") && roles.may("b", "write"));
        let error = custom(&[("a", &[], &["nobody"])]).unwrap_err();
        assert_eq!(error.to_string(), r#"the role "a" inherits from "nobody", which is none"#);
    }
}
