//! Governance: rules that give and take roles by what stands in users' nodes.
//!
//! A rule is `{"if": query, "then": {"assignRole": role}, "offsetTimestamp": ms}`. Its query is asked about the value of
//! each node `user:<address>`; with `offsetTimestamp`, only once the node has been as it is for so long. Of the rules
//! that hold, the last counts. Super admins are immune.

use crate::json::{Json, JsonError, JsonString, Value};
use crate::operation::Node;
use crate::query::{Query, QueryError, Subject};
use crate::roles::GUEST;
use crate::security::{Policy, role_in, user_of};

/// Rules that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GovernanceError {
    /// The text is not JSON.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// The rules are no array.
    #[error("the rules are an array, as [{{\"if\": …, \"then\": {{\"assignRole\": …}}}}]")]
    NotAnArray,
    /// A rule is not built as rules are.
    #[error("rule {number}: {reason}")]
    Rule {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// One rule.
#[derive(Debug, Clone)]
struct Rule {
    condition: Query,
    /// Milliseconds that a node must have been as it is.
    age_ms: u64,
    role: String,
}

/// The rules of a room, in their order.
#[derive(Debug, Clone, Default)]
pub struct Rules(Vec<Rule>);

impl Rules {
    /// Parses rules for a room with the roles of `policy`.
    ///
    /// # Errors
    /// [`GovernanceError`]: whatever is not understood.
    pub fn parse(text: &str, policy: &Policy) -> Result<Self, GovernanceError> {
        let Value::Array(rules) = Value::parse(text)? else { return Err(GovernanceError::NotAnArray) };
        let parse = |(index, value)| {
            Rule::read(value, policy).map_err(|reason| GovernanceError::Rule { number: index + 1, reason })
        };
        rules.iter().enumerate().map(parse).collect::<Result<_, _>>().map(Self)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a ruling may come with time alone.
    pub fn wait(&self) -> bool {
        self.0.iter().any(|rule| rule.age_ms > 0)
    }

    /// The value that a user's node is to have, if another than it has. `wall_ms` is the time of day.
    pub fn ruling(&self, node: &Node, policy: &Policy, wall_ms: u64) -> Option<Json> {
        user_of(&node.id).filter(|address| !policy.super_admins.contains(address))?;
        let value = Value::from(node.value.as_ref()?);
        let current = role_in(&value).unwrap_or(GUEST);
        let Value::Object(mut members) = value.clone() else { return None };
        if value.get("role").is_none() {
            // Who has no role is a guest, to rules as well.
            members.push(("role".into(), Value::String(GUEST.into())));
        }
        let (id, value) = (node.id.to_text(), Value::Object(members));
        let subject = Subject { id: &id, value: &value, physical: node.timestamp.physical };
        let age_ms = wall_ms.saturating_sub(node.timestamp.physical);
        let rule = self.0.iter().rfind(|rule| age_ms >= rule.age_ms && rule.condition.matches(&subject))?;
        (rule.role != current).then(|| with_role(node.value.as_ref(), &rule.role))
    }
}

impl Rule {
    fn read(value: &Value, policy: &Policy) -> Result<Self, String> {
        let Value::Object(members) = value else { return Err("a rule is an object".into()) };
        if let Some((name, _)) =
            members.iter().find(|(name, _)| !matches!(name.as_str(), "if" | "then" | "offsetTimestamp"))
        {
            return Err(format!("{name:?} is not supported: a rule has if, then and offsetTimestamp"));
        }
        let condition = value.get("if").ok_or("it has no if")?;
        let condition = Query::read(condition).map_err(|error: QueryError| format!("if: {error}"))?;
        if condition.follows_edges() {
            return Err("if: the operator $edge is not supported in rules".into());
        }
        let age_ms = match value.get("offsetTimestamp") {
            None => 0,
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be whole and small")]
            Some(Value::Number(ms)) if *ms >= 0.0 && ms.fract() == 0.0 && *ms < 9e15 => *ms as u64,
            Some(_) => return Err("offsetTimestamp is a number of milliseconds".into()),
        };
        let Some(Value::Object(then)) = value.get("then") else { return Err("it has no then".into()) };
        let role = match then.as_slice() {
            [(name, Value::String(role))] if name == "assignRole" => role.clone(),
            _ => return Err("then is {\"assignRole\": \"a role\"}, nothing else is supported".into()),
        };
        if !policy.roles.contains(&role) {
            return Err(format!("there is no role {role:?}"));
        }
        Ok(Self { condition, age_ms, role })
    }
}

/// A user's value with another role. An end that an earlier role had is not the end of this one.
fn with_role(value: Option<&Json>, role: &str) -> Json {
    let mut text = String::from("{");
    let members = value.and_then(|value| crate::json::Members::parse(value.as_str()).ok());
    for (name, raw) in members.into_iter().flatten() {
        if !matches!(name.as_printed(), "role" | "expiresAt") {
            text.push_str(&format!("{name}:{raw},"));
        }
    }
    text.push_str(&format!("\"role\":{}}}", JsonString::new(role)));
    Json::from_printed(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roles::Roles;

    const ADDRESS: &str = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266";
    const NOW: u64 = 1_000_000;

    fn policy() -> Policy {
        Policy { super_admins: [].into(), roles: Roles::default(), acls: true }
    }

    fn node(id: &str, value: &str, physical: u64) -> Node {
        let text =
            format!(r#"{{"id":"{id}","value":{value},"edges":[],"timestamp":{{"physical":{physical},"logical":1}}}}"#);
        Node::parse(&text).unwrap()
    }

    #[test]
    fn the_last_rule_that_holds_counts() {
        let rules = r#"[
            {"if": {"role": "guest", "name": {"$exists": true}}, "then": {"assignRole": "user"}, "offsetTimestamp": 5000},
            {"if": {"role": {"$in": ["user", "manager"]}, "karma": {"$gte": 10}}, "then": {"assignRole": "manager"}},
            {"if": {"karma": {"$lt": 0}}, "then": {"assignRole": "guest"}}
        ]"#;
        let mut policy = policy();
        let rules = Rules::parse(rules, &policy).unwrap();
        let id = format!("user:{ADDRESS}");
        for (value, age, expected) in [
            (r#"{"role":"guest","name":"x"}"#, 5_000, Some(r#"{"name":"x","role":"user"}"#)),
            (r#"{"role":"guest","name":"x"}"#, 4_999, None),
            (r#"{"name":"x"}"#, 5_000, Some(r#"{"name":"x","role":"user"}"#)),
            (r#"{"role":"guest"}"#, 5_000, None),
            (r#"{"role":"user","karma":10,"expiresAt":5,"z":1}"#, 0, Some(r#"{"karma":10,"z":1,"role":"manager"}"#)),
            (r#"{"role":"manager","karma":10}"#, 0, None),
            (r#"{"role":"manager","karma":-1}"#, 0, Some(r#"{"karma":-1,"role":"guest"}"#)),
            (r#"{"role":"guest","name":"x","karma":-1}"#, 9_000, None),
            ("5", 9_000, None),
        ] {
            let ruling = rules.ruling(&node(&id, value, NOW - age), &policy, NOW);
            assert_eq!(ruling.as_ref().map(Json::as_str), expected, "{value} {age}");
        }
        let user = node(&id, r#"{"karma":-1,"role":"admin"}"#, 0);
        assert!(rules.ruling(&user, &policy, NOW).is_some());
        assert!(rules.ruling(&node("user:nobody", r#"{"karma":-1,"role":"user"}"#, 0), &policy, NOW).is_none());
        policy.super_admins.insert(crate::signature::Address::parse(ADDRESS).unwrap());
        assert!(rules.ruling(&user, &policy, NOW).is_none(), "super admins are immune");
    }

    #[test]
    fn what_is_not_supported_is_an_error_and_says_where() {
        let then = r#""then":{"assignRole":"user"}"#;
        for (rules, message) in [
            ("{}".to_owned(), "the rules are an array, as [{\"if\": …, \"then\": {\"assignRole\": …}}]"),
            ("[1]".into(), "rule 1: a rule is an object"),
            (format!(r#"[{{"if":{{}},{then}}},{{{then}}}]"#), "rule 2: it has no if"),
            (r#"[{"if":{}}]"#.into(), "rule 1: it has no then"),
            (format!(r#"[{{"if":{{"a":{{"$near":1}}}},{then}}}]"#), "rule 1: if: the operator $near is not supported"),
            (
                format!(r#"[{{"if":{{"$edge":{{}}}},{then}}}]"#),
                "rule 1: if: the operator $edge is not supported in rules",
            ),
            (r#"[{"if":{},"then":{"assignRole":"king"}}]"#.into(), "rule 1: there is no role \"king\""),
            (
                r#"[{"if":{},"then":{"remove":true}}]"#.into(),
                "rule 1: then is {\"assignRole\": \"a role\"}, nothing else is supported",
            ),
            (
                format!(r#"[{{"if":{{}},{then},"offsetTimestamp":"1h"}}]"#),
                "rule 1: offsetTimestamp is a number of milliseconds",
            ),
            (
                format!(r#"[{{"if":{{}},{then},"unless":{{}}}}]"#),
                "rule 1: \"unless\" is not supported: a rule has if, then and offsetTimestamp",
            ),
        ] {
            assert_eq!(Rules::parse(&rules, &policy()).unwrap_err().to_string(), message);
        }
    }
}
