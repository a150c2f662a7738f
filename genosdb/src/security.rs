//! Who may do what in a room with a Security Manager: signatures, roles, and nodes that belong to somebody.
//!
//! Nothing is taken on an unsigned sender's word. Each operation counts as its author's if it carries a signature of
//! its own that holds; else, inside a delta or a full state, as that of whoever signed the whole. Roles stand in the
//! graph, in nodes `user:<address>`; who is in `super_admins` may do everything.

use std::collections::BTreeSet;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::graph::Store;
use crate::json::{Json, JsonString, Value};
use crate::operation::{Node, Operation};
use crate::roles::{GUEST, Roles, SUPER_ADMIN, permission};
use crate::signature::{self, Address, SignatureError};

/// What the ids of users' nodes start with.
pub const USER_PREFIX: &str = "user:";

/// The id of a user's node.
pub fn user_id(address: Address) -> JsonString {
    JsonString::new(&format!("{USER_PREFIX}{address}"))
}

/// Whose node this is, if it is a user's. An address that is spelled in another way names no user: roles are looked for
/// under one spelling alone.
pub fn user_of(id: &JsonString) -> Option<Address> {
    let address = Address::parse(id.as_printed().strip_prefix(USER_PREFIX)?)?;
    (user_id(address) == *id).then_some(address)
}

fn is_user(id: &JsonString) -> bool {
    id.as_printed().starts_with(USER_PREFIX)
}

/// An operation as it came, and who vouches for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attested {
    /// The operation.
    pub operation: Operation,
    /// Who signed it as a whole.
    pub author: Result<Address, SignatureError>,
    /// Who signed each operation inside, when it is a delta.
    pub inside: Vec<Result<Address, SignatureError>>,
}

impl Attested {
    /// Checks the signatures of an operation; `raw` is the text that it was parsed from.
    pub fn check(operation: Operation, raw: &str) -> Self {
        let author = signature::verify(raw);
        let inside = match &operation {
            Operation::DeltaSync(delta) => {
                delta.operations.iter().map(|operation| signature::verify(&operation.to_string())).collect()
            }
            _ => Vec::new(),
        };
        Self { operation, author, inside }
    }
}

/// Takes what says who signed an operation out of it: for where the signature does not hold any more.
pub fn unsign(operation: &mut Operation) {
    operation
        .extra_mut()
        .retain(|(name, _)| !matches!(name.as_printed(), "originUser" | "originEthAddress" | "signature"));
}

/// What somebody wants to do to a graph.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// Set a node's value.
    Upsert(&'a JsonString, Option<&'a Json>),
    /// Remove a node.
    Remove(&'a JsonString),
    /// Add an edge to a node.
    Link(&'a JsonString),
    /// Have a node be as it is in another's full state.
    Node(&'a Node),
}

impl<'a> Change<'a> {
    /// What an operation does; `None` for one that does nothing by itself.
    pub fn of(operation: &'a Operation) -> Option<Self> {
        match operation {
            Operation::Upsert(upsert) => Some(Self::Upsert(&upsert.id, upsert.value.as_ref())),
            Operation::Remove(remove) => Some(Self::Remove(&remove.id)),
            Operation::Link(link) => Some(Self::Link(&link.source)),
            Operation::Sync(_) | Operation::DeltaSync(_) | Operation::FullStateSync(_) => None,
        }
    }
}

/// The rules of a room with a Security Manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Who may do everything.
    pub super_admins: BTreeSet<Address>,
    /// What roles there are.
    pub roles: Roles,
    /// Whether nodes whose value names an owner are for that owner and its collaborators alone.
    pub acls: bool,
}

/// What an address may do at a moment.
struct Standing<'a> {
    address: Address,
    role: String,
    roles: &'a Roles,
}

impl Standing<'_> {
    fn may(&self, permission: &str) -> bool {
        self.roles.may(&self.role, permission)
    }

    /// Whether it may give or take a role: none that may do more than itself.
    fn disposes_of(&self, role: &str) -> bool {
        self.may(permission::ASSIGN_ROLE) && self.roles.covers(&self.role, role)
    }
}

impl Policy {
    /// Whether `author` may make a change to the graph in `store` at `wall_ms`, ms since the Unix epoch.
    ///
    /// # Errors
    /// Those of the store.
    pub fn permits<S: Store>(
        &self,
        store: &mut S,
        author: Address,
        change: Change<'_>,
        wall_ms: u64,
    ) -> Result<bool, S::Error> {
        let standing = self.standing(store, author, wall_ms)?;
        Ok(match change {
            Change::Upsert(id, value) => {
                let before = store.node(id)?;
                self.permits_value(&standing, before.as_ref(), id, value)
            }
            Change::Link(source) => {
                let before = store.node(source)?;
                self.permits_link(&standing, before.as_ref(), source)
            }
            Change::Remove(id) => {
                let before = store.node(id)?;
                self.permits_removal(&standing, before.as_ref(), id)
            }
            Change::Node(node) => {
                let before = store.node(&node.id)?;
                let changes_edges = match &before {
                    Some(before) => before.edges != node.edges,
                    None => !node.edges.is_empty(),
                };
                let changes_more =
                    before.as_ref().is_none_or(|before| before.value != node.value || before.extra != node.extra);
                (!changes_edges || self.permits_link(&standing, before.as_ref(), &node.id))
                    && (changes_edges && !changes_more
                        || self.permits_value(&standing, before.as_ref(), &node.id, node.value.as_ref()))
            }
        })
    }

    /// Whether a node in the full state of somebody who does not sign may be taken, where the one who runs the room lets
    /// that be: nothing of users' nodes, nothing that belongs to somebody, and no removal.
    ///
    /// # Errors
    /// Those of the store.
    pub fn permits_unsigned<S: Store>(&self, store: &mut S, change: Change<'_>) -> Result<bool, S::Error> {
        let (id, value) = match change {
            Change::Upsert(id, value) => (id, value),
            Change::Link(id) => (id, None),
            Change::Node(node) => (&node.id, node.value.as_ref()),
            Change::Remove(_) => return Ok(false),
        };
        let before = store.node(id)?.and_then(|node| node.value);
        let is_owned =
            |value: Option<&Json>| self.acls && value.map(Value::from).as_ref().and_then(Acl::read).is_some();
        Ok(!is_user(id) && !is_owned(before.as_ref()) && !is_owned(value))
    }

    /// What `address` may do at `wall_ms`.
    fn standing<S: Store>(&self, store: &mut S, address: Address, wall_ms: u64) -> Result<Standing<'_>, S::Error> {
        let role = if self.super_admins.contains(&address) {
            SUPER_ADMIN.to_owned()
        } else {
            let node = store.node(&user_id(address))?;
            let value = node.and_then(|node| node.value).as_ref().map(Value::from);
            let role = value.as_ref().filter(|value| !has_expired(value, wall_ms)).and_then(role_in);
            role.unwrap_or(GUEST).to_owned()
        };
        Ok(Standing { address, role, roles: &self.roles })
    }

    fn permits_value(
        &self,
        standing: &Standing<'_>,
        before: Option<&Node>,
        id: &JsonString,
        value: Option<&Json>,
    ) -> bool {
        let after = value.map(Value::from);
        let before = before.map(|node| node.value.as_ref().map_or(Value::Null, Value::from));
        if !is_user(id) {
            return standing.may(permission::WRITE)
                && self.permits_belonging(standing, before.as_ref(), after.as_ref());
        }
        let role_of = |value: Option<&Value>| value.and_then(role_in).unwrap_or(GUEST).to_owned();
        let (role_before, role_after) = (role_of(before.as_ref()), role_of(after.as_ref()));
        if standing.disposes_of(&role_before) && standing.disposes_of(&role_after) {
            return true;
        }
        if user_of(id) != Some(standing.address) {
            return false;
        }
        match &before {
            // Whoever is new may say that it is here.
            None => role_after == GUEST,
            Some(before) => {
                let expiry = |value: &Value| value.get("expiresAt").cloned();
                standing.may(permission::WRITE)
                    && role_before == role_after
                    && expiry(before) == after.as_ref().and_then(expiry)
            }
        }
    }

    /// Whether a node's owner lets somebody change its value.
    fn permits_belonging(&self, standing: &Standing<'_>, before: Option<&Value>, after: Option<&Value>) -> bool {
        let acl = |value: Option<&Value>| value.filter(|_| self.acls).and_then(Acl::read);
        let after = acl(after);
        match acl(before) {
            _ if standing.may(permission::DELETE_ANY) => true,
            Some(before) if before.owner == standing.address => true,
            // Who may write may not say who may.
            Some(before) => before.grants(standing.address, Grant::Write) && after == Some(before),
            None => after.is_none_or(|after| after.owner == standing.address),
        }
    }

    fn permits_link(&self, standing: &Standing<'_>, before: Option<&Node>, source: &JsonString) -> bool {
        if is_user(source) {
            return standing.may(permission::ASSIGN_ROLE)
                || standing.may(permission::LINK) && user_of(source) == Some(standing.address);
        }
        standing.may(permission::LINK) && self.permits_touching(standing, before, Grant::Write)
    }

    fn permits_removal(&self, standing: &Standing<'_>, before: Option<&Node>, id: &JsonString) -> bool {
        let value = before.and_then(|node| node.value.as_ref()).map(Value::from);
        if is_user(id) {
            return standing.disposes_of(value.as_ref().and_then(role_in).unwrap_or(GUEST));
        }
        if standing.may(permission::DELETE_ANY) {
            return true;
        }
        match value.as_ref().filter(|_| self.acls).and_then(Acl::read) {
            Some(_) => standing.may(permission::WRITE) && self.permits_touching(standing, before, Grant::Delete),
            None => standing.may(permission::DELETE),
        }
    }

    fn permits_touching(&self, standing: &Standing<'_>, before: Option<&Node>, grant: Grant) -> bool {
        let value = before.and_then(|node| node.value.as_ref()).map(Value::from);
        value.as_ref().filter(|_| self.acls).and_then(Acl::read).is_none_or(|acl| {
            acl.owner == standing.address || acl.grants(standing.address, grant) || standing.may(permission::DELETE_ANY)
        })
    }
}

/// The role that a user's node names.
pub fn role_in(value: &Value) -> Option<&str> {
    value.get("role")?.as_str()
}

/// Whether the role of a user's node has expired. An end that cannot be read has come: a role must not last because
/// its end is misspelled.
fn has_expired(value: &Value, wall_ms: u64) -> bool {
    let end = match value.get("expiresAt") {
        None | Some(Value::Null) => return false,
        Some(Value::Number(ms)) => Some(*ms),
        Some(Value::String(text)) => OffsetDateTime::parse(text, &Rfc3339).ok().map(|end| {
            #[allow(clippy::cast_precision_loss, reason = "a day in 200,000 years is told exactly")]
            let ms = (end.unix_timestamp_nanos() / 1_000_000) as f64;
            ms
        }),
        Some(_) => None,
    };
    #[allow(clippy::cast_precision_loss, reason = "as above")]
    end.is_none_or(|end| end <= wall_ms as f64)
}

/// What an owner lets a collaborator do; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Grant {
    Read,
    Write,
    Delete,
}

/// Whom a node belongs to: `owner` and `collaborators` in its value.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Acl {
    owner: Address,
    collaborators: Vec<(Address, Grant)>,
}

impl Acl {
    /// `None` where no owner stands in it: then it is everybody's. A text that is no address owns nothing.
    fn read(value: &Value) -> Option<Self> {
        let owner = Address::parse(value.get("owner")?.as_str()?)?;
        let mut collaborators = Vec::new();
        if let Some(Value::Object(members)) = value.get("collaborators") {
            for (address, grant) in members {
                let grant = match grant.as_str() {
                    Some("read") => Grant::Read,
                    Some("write") => Grant::Write,
                    Some("delete") => Grant::Delete,
                    _ => continue,
                };
                collaborators.extend(Address::parse(address).map(|address| (address, grant)));
            }
        }
        collaborators.sort_unstable();
        Some(Self { owner, collaborators })
    }

    fn grants(&self, address: Address, wanted: Grant) -> bool {
        self.collaborators.iter().any(|(other, grant)| *other == address && *grant >= wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryGraph;
    use crate::signature::Identity;

    const NOW: u64 = 1_795_337_700_000;

    fn address(number: u8) -> Address {
        Identity::parse(&hex::encode([number; 32])).unwrap().address()
    }

    /// A room ruled by address 1.
    struct Town {
        policy: Policy,
        graph: MemoryGraph,
        logical: u64,
    }

    impl Town {
        fn new() -> Self {
            let policy = Policy { super_admins: [address(1)].into(), roles: Roles::default(), acls: true };
            Self { policy, graph: MemoryGraph::default(), logical: 0 }
        }

        fn operation(&mut self, text: &str) -> Operation {
            self.logical += 1;
            let text = text.replacen('{', &format!(r#"{{"timestamp":{{"physical":5,"logical":{}}},"#, self.logical), 1);
            Operation::parse(&text, &mut 0).unwrap()
        }

        /// Does something if it is permitted, and says whether it was.
        fn does(&mut self, who: u8, text: &str) -> bool {
            let operation = self.operation(text);
            let change = Change::of(&operation).unwrap();
            let Ok(permitted) = self.policy.permits(&mut self.graph, address(who), change, NOW);
            if permitted {
                self.graph.apply(&operation, NOW);
            }
            permitted
        }

        fn says_of(&mut self, who: u8, user: u8, value: &str) -> bool {
            self.does(who, &format!(r#"{{"type":"upsert","id":"user:{}","value":{value}}}"#, address(user)))
        }

        fn writes(&mut self, who: u8, id: &str, value: &str) -> bool {
            self.does(who, &format!(r#"{{"type":"upsert","id":"{id}","value":{value}}}"#))
        }

        fn removes(&mut self, who: u8, id: &str) -> bool {
            self.does(who, &format!(r#"{{"type":"remove","id":"{id}"}}"#))
        }

        fn links(&mut self, who: u8, id: &str) -> bool {
            self.does(who, &format!(r#"{{"type":"link","sourceId":"{id}","targetId":"x"}}"#))
        }
    }

    #[test]
    fn a_role_is_given_used_and_lost() {
        let mut town = Town::new();
        assert!(!town.writes(2, "a", "1"), "a guest writes nothing");
        assert!(!town.says_of(2, 2, r#"{"role":"user"}"#), "nobody gives itself a role");
        assert!(town.says_of(2, 2, r#"{"role":"guest","name":"Two"}"#), "a newcomer says that it is here");
        assert!(!town.says_of(2, 2, r#"{"role":"guest","name":"2"}"#), "but only once, as long as it may not write");
        assert!(!town.says_of(2, 3, r#"{"role":"guest"}"#), "and nothing about others");
        let elsewhere = format!("user:{}", address(2).to_string().to_lowercase());
        assert!(!town.writes(2, &elsewhere, r#"{"role":"guest"}"#), "nor under another spelling of itself");
        assert!(town.says_of(1, 2, r#"{"role":"user"}"#));
        assert!(town.writes(2, "a", "1") && town.links(2, "a") && !town.removes(2, "a"));
        assert!(town.says_of(2, 2, r#"{"role":"user","name":"Two"}"#), "the role stays, the rest is its own");
        assert!(!town.says_of(2, 2, r#"{"role":"admin"}"#) && !town.says_of(2, 2, r#"{"name":"Two"}"#));
        assert!(!town.removes(2, &format!("user:{}", address(2))) && !town.links(3, &format!("user:{}", address(2))));
        assert!(town.says_of(1, 2, r#"{"role":"admin"}"#));
        assert!(town.removes(2, "a"));
        assert!(town.says_of(1, 2, r#"{"role":"guest"}"#));
        assert!(!town.writes(2, "a", "1"));
        assert!(town.says_of(1, 2, r#"{"role":"no such role"}"#) && !town.writes(2, "a", "1"));
    }

    #[test]
    fn a_role_ends_when_it_says_so() {
        for (end, holds) in [
            (r#""2026-11-22T20:00:00.000Z""#, true),
            (r#""2026-11-22T19:30:00+00:00""#, true),
            (r#""2020-01-01T00:00:00.000Z""#, false),
            (&(NOW + 1).to_string(), true),
            (&NOW.to_string(), false),
            ("null", true),
            (r#""tomorrow""#, false),
            ("{}", false),
        ] {
            let now = 1_795_375_000_000;
            let mut town = Town::new();
            assert!(town.says_of(1, 2, &format!(r#"{{"role":"user","expiresAt":{end}}}"#)));
            let change = JsonString::new("a");
            let wall_ms = if end.starts_with('"') { now } else { NOW };
            let Ok(permitted) =
                town.policy.permits(&mut town.graph, address(2), Change::Upsert(&change, None), wall_ms);
            assert_eq!(permitted, holds, "{end}");
        }
        let mut town = Town::new();
        assert!(town.says_of(1, 2, &format!(r#"{{"role":"user","expiresAt":{}}}"#, NOW + 1)));
        assert!(!town.says_of(2, 2, r#"{"role":"user"}"#), "nobody makes its own role last");
    }

    #[test]
    fn who_gives_roles_gives_none_above_its_own() {
        let mut town = Town::new();
        let role = |can: &[&str]| crate::roles::Role {
            can: can.iter().map(|text| (*text).to_owned()).collect(),
            inherits: vec!["user".into()],
        };
        let custom = [("moderator".to_owned(), role(&["assignRole"]))].into();
        town.policy.roles = Roles::with(&custom).unwrap();
        assert!(town.says_of(1, 2, r#"{"role":"moderator"}"#) && town.says_of(1, 4, r#"{"role":"admin"}"#));
        assert!(town.says_of(2, 3, r#"{"role":"user"}"#) && town.says_of(2, 3, r#"{"role":"moderator"}"#));
        assert!(!town.says_of(2, 3, r#"{"role":"superadmin"}"#) && !town.says_of(2, 2, r#"{"role":"admin"}"#));
        assert!(!town.says_of(2, 4, r#"{"role":"guest"}"#) && !town.removes(2, &format!("user:{}", address(4))));
    }

    #[test]
    fn what_belongs_to_somebody_is_for_its_owner_and_collaborators() {
        let mut town = Town::new();
        for user in 2..7 {
            assert!(town.says_of(1, user, r#"{"role":"user"}"#));
        }
        assert!(town.says_of(1, 7, r#"{"role":"admin"}"#));
        let owned = |by: u8, text: &str| {
            format!(
                r#"{{"text":"{text}","owner":"{}","collaborators":{{"{}":"write","{}":"delete","{}":"read"}}}}"#,
                address(by),
                address(3).to_string().to_lowercase(),
                address(4),
                address(5)
            )
        };
        assert!(!town.writes(3, "a", &owned(2, "forged")), "nobody writes in another's name");
        assert!(town.writes(2, "a", &owned(2, "mine")));
        assert!(town.writes(3, "a", &owned(2, "by 3")) && town.writes(4, "a", &owned(2, "by 4")) && town.links(3, "a"));
        assert!(!town.writes(3, "a", &owned(3, "stolen")) && !town.writes(3, "a", "1"), "the owner stays");
        for who in [5, 6, 7, 8] {
            assert!(
                !town.writes(who, "a", &owned(2, "x")) && !town.links(who, "a") && !town.removes(who, "a"),
                "{who}"
            );
        }
        assert!(!town.removes(3, "a") && town.removes(4, "a"));
        assert!(town.writes(6, "a", "1"), "what was removed belongs to nobody");
        assert!(town.writes(2, "b", &owned(2, "mine")) && town.writes(1, "b", "1"), "but for who rules the room");
        assert!(town.writes(2, "c", &owned(2, "mine")) && town.removes(2, "c"), "an owner removes what is its own");
        assert!(town.writes(2, "d", r#"{"owner":"somebody"}"#) && town.writes(6, "d", "1"), "a text owns nothing");
        town.policy.acls = false;
        assert!(town.writes(2, "e", &owned(2, "mine")) && town.writes(6, "e", "1"));
    }

    #[test]
    fn a_node_of_a_full_state_needs_what_its_changes_need() {
        let mut town = Town::new();
        assert!(town.says_of(1, 2, r#"{"role":"user"}"#) && town.writes(2, "a", "1"));
        let node = |id: &str, value: &str, edges: &str| {
            let text =
                format!(r#"{{"id":"{id}","value":{value},"edges":{edges},"timestamp":{{"physical":9,"logical":1}}}}"#);
            Node::parse(&text).unwrap()
        };
        let mut permits = |who, node: &Node| {
            let Ok(permitted) = town.policy.permits(&mut town.graph, address(who), Change::Node(node), NOW);
            permitted
        };
        assert!(permits(2, &node("a", "2", "[]")) && permits(2, &node("a", "1", r#"["b"]"#)));
        assert!(!permits(3, &node("a", "2", "[]")) && !permits(3, &node("a", "1", r#"["b"]"#)));
        assert!(!permits(3, &node("a", "1", "[]")), "not even its moment");
        assert!(!permits(2, &node(&format!("user:{}", address(2)), r#"{"role":"admin"}"#, "[]")));
        assert!(permits(3, &node(&format!("user:{}", address(3)), r#"{"role":"guest"}"#, "[]")));
    }

    #[test]
    fn a_delta_has_the_authors_of_its_operations_and_its_own() {
        let (one, two) = (Identity::parse(&"01".repeat(32)).unwrap(), Identity::parse(&"02".repeat(32)).unwrap());
        let upsert =
            |id: &str| format!(r#"{{"type":"upsert","id":"{id}","value":1,"timestamp":{{"physical":5,"logical":1}}}}"#);
        let mine = one.sign(&upsert("a")).unwrap();
        let forged = mine.replace(r#""value":1"#, r#""value":2"#);
        let delta =
            format!(r#"{{"type":"deltaSync","operations":[{mine},{forged},{}],"timestamp":null}}"#, upsert("b"));
        let raw = two.sign(&delta).unwrap();
        let attested = Attested::check(Operation::parse(&raw, &mut 0).unwrap(), &raw);
        assert_eq!(attested.author, Ok(address(2)));
        assert_eq!(attested.inside, [Ok(address(1)), Err(SignatureError::Forged), Err(SignatureError::Unsigned)]);
    }
}
