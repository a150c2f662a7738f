//! Queries over nodes, as the option `query` of GenosDB's `map` takes them.
//!
//! A query is an object. Each of its members is a condition, and all must hold: a field of the node's value (a path
//! with dots goes into objects) with the value that it must equal or with operators, or a logical operator. Values
//! compare as JavaScript compares them. An operator that is not known is an error and never skipped.

use std::cmp::Ordering;

use regex::Regex;
use unicode_normalization::UnicodeNormalization as _;

use crate::json::{JsonError, Value};

/// A text is not a query.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// It is not JSON.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// It is JSON, but no object.
    #[error("a query is an object, as {{\"name\": \"x\"}}")]
    NotAnObject,
    /// An operator that this version does not know.
    #[error("the operator {0} is not supported")]
    Unknown(String),
    /// An operator's operand is of the wrong kind.
    #[error("the operator {operator} takes {expected}")]
    Operand {
        /// The operator.
        operator: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// A regular expression that cannot be.
    #[error("the regular expression {0:?} is not supported: look-around and back-references are not")]
    Pattern(String),
}

/// What a query is asked about: a node.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The node's id.
    pub id: &'a str,
    /// Its value; [`Value::Null`] when it has none.
    pub value: &'a Value,
    /// Its timestamp: milliseconds since the Unix epoch.
    pub physical: u64,
}

/// A parsed query.
#[derive(Debug, Clone)]
pub struct Query {
    conditions: Vec<Condition>,
    edge: Option<Box<Query>>,
}

#[derive(Debug, Clone)]
enum Condition {
    Field {
        path: String,
        tests: Vec<Test>,
    },
    And(Vec<Query>),
    Or(Vec<Query>),
    Not(Query),
    /// A text in any string of the value.
    Text(String),
}

#[derive(Debug, Clone)]
enum Test {
    Equals(Value),
    Differs(Value),
    Compares(Comparison, Value),
    /// Both bounds included.
    Between(Value, Value),
    In(Vec<Value>),
    NotIn(Vec<Value>),
    Exists(bool),
    /// Without regard to case and diacritics.
    Text(String),
    Matches(Regex),
    StartsWith(String),
    EndsWith(String),
    Contains(Value),
    Not(Vec<Test>),
}

#[derive(Debug, Clone, Copy)]
enum Comparison {
    Less,
    AtMost,
    Greater,
    AtLeast,
}

impl Query {
    /// Parses a query.
    ///
    /// # Errors
    /// [`QueryError`], which says what is not supported.
    pub fn parse(text: &str) -> Result<Self, QueryError> {
        Self::read(&Value::parse(text)?)
    }

    /// Reads a query from a parsed value.
    ///
    /// # Errors
    /// See [`Query::parse`].
    pub fn read(value: &Value) -> Result<Self, QueryError> {
        let Value::Object(members) = value else { return Err(QueryError::NotAnObject) };
        let mut query = Self { conditions: Vec::new(), edge: None };
        for (name, operand) in members {
            let condition = match name.as_str() {
                "$and" => Condition::And(queries(name, operand)?),
                "$or" => Condition::Or(queries(name, operand)?),
                "$not" => Condition::Not(Self::read(operand)?),
                "$text" => Condition::Text(folded(text(name, operand)?)),
                "$edge" => {
                    query.edge = Some(Box::new(Self::read(operand)?));
                    continue;
                }
                _ if name.starts_with('$') => return Err(QueryError::Unknown(name.clone())),
                _ => Condition::Field { path: name.clone(), tests: tests(operand)? },
            };
            query.conditions.push(condition);
        }
        Ok(query)
    }

    /// Whether a node is one of those that are asked for. With [`Query::edge`], whether one may start from it.
    pub fn matches(&self, subject: &Subject<'_>) -> bool {
        self.conditions.iter().all(|condition| condition.holds(subject))
    }

    /// The query of `$edge`: not the nodes that match are asked for, but those that can be reached from them over
    /// edges and match this one.
    pub fn edge(&self) -> Option<&Self> {
        self.edge.as_deref()
    }

    /// Whether `$edge` stands anywhere in it.
    pub fn follows_edges(&self) -> bool {
        let inside = |queries: &[Self]| queries.iter().any(Self::follows_edges);
        self.edge.is_some()
            || self.conditions.iter().any(|condition| match condition {
                Condition::And(queries) | Condition::Or(queries) => inside(queries),
                Condition::Not(query) => query.follows_edges(),
                Condition::Field { .. } | Condition::Text(_) => false,
            })
    }
}

impl Condition {
    fn holds(&self, subject: &Subject<'_>) -> bool {
        match self {
            Self::Field { path, tests } => {
                let field = field(subject, path);
                tests.iter().all(|test| test.holds(field.as_deref()))
            }
            Self::And(queries) => queries.iter().all(|query| query.matches(subject)),
            Self::Or(queries) => queries.iter().any(|query| query.matches(subject)),
            Self::Not(query) => !query.matches(subject),
            Self::Text(wanted) => has_text(subject.value, wanted),
        }
    }
}

/// A field of a node's value; what the value lacks may be of the node itself: `id` and `timestamp`.
fn field<'a>(subject: &Subject<'a>, path: &str) -> Option<std::borrow::Cow<'a, Value>> {
    use std::borrow::Cow;
    // A member whose name has dots in it comes before the path that it looks like.
    let found = subject.value.get(path).or_else(|| {
        path.split('.').try_fold(subject.value, |value, name| match value {
            Value::Array(elements) => elements.get(name.parse::<usize>().ok()?),
            other => other.get(name),
        })
    });
    match (found, path) {
        (Some(value), _) => Some(Cow::Borrowed(value)),
        (None, "id") => Some(Cow::Owned(Value::String(subject.id.to_owned()))),
        #[allow(clippy::cast_precision_loss, reason = "timestamps are at most 2^53")]
        (None, "timestamp") => Some(Cow::Owned(Value::Number(subject.physical as f64))),
        (None, _) => None,
    }
}

impl Test {
    fn holds(&self, field: Option<&Value>) -> bool {
        let string = || field.and_then(Value::as_str);
        match self {
            Self::Equals(wanted) => field == Some(wanted),
            Self::Differs(wanted) => field != Some(wanted),
            Self::Compares(comparison, bound) => field.is_some_and(|field| comparison.holds(field, bound)),
            Self::Between(low, high) => field
                .is_some_and(|field| Comparison::AtLeast.holds(field, low) && Comparison::AtMost.holds(field, high)),
            Self::In(values) => field.is_some_and(|field| values.contains(field)),
            Self::NotIn(values) => field.is_none_or(|field| !values.contains(field)),
            Self::Exists(exists) => field.is_some() == *exists,
            Self::Text(wanted) => field.is_some_and(|field| has_text(field, wanted)),
            Self::Matches(pattern) => string().is_some_and(|string| pattern.is_match(string)),
            Self::StartsWith(start) => string().is_some_and(|string| string.starts_with(start.as_str())),
            Self::EndsWith(end) => string().is_some_and(|string| string.ends_with(end.as_str())),
            Self::Contains(part) => match (field, part) {
                (Some(Value::String(string)), Value::String(part)) => string.contains(part.as_str()),
                (Some(Value::Array(elements)), part) => elements.contains(part),
                _ => false,
            },
            Self::Not(tests) => !tests.iter().all(|test| test.holds(field)),
        }
    }
}

impl Comparison {
    fn holds(self, left: &Value, right: &Value) -> bool {
        let order = match (left, right) {
            (Value::String(left), Value::String(right)) => Some(left.encode_utf16().cmp(right.encode_utf16())),
            _ => number_of(left).partial_cmp(&number_of(right)),
        };
        match self {
            Self::Less => order == Some(Ordering::Less),
            Self::AtMost => matches!(order, Some(Ordering::Less | Ordering::Equal)),
            Self::Greater => order == Some(Ordering::Greater),
            Self::AtLeast => matches!(order, Some(Ordering::Greater | Ordering::Equal)),
        }
    }
}

/// What JavaScript makes of a value where it needs a number.
fn number_of(value: &Value) -> f64 {
    match value {
        Value::Null => 0.0,
        Value::Bool(flag) => f64::from(u8::from(*flag)),
        Value::Number(number) => *number,
        Value::String(text) if text.trim().is_empty() => 0.0,
        Value::String(text) => text.trim().parse().unwrap_or(f64::NAN),
        Value::Array(_) | Value::Object(_) => f64::NAN,
    }
}

/// A text without regard to case and diacritics.
fn folded(text: &str) -> String {
    text.nfd()
        .filter(|character| !unicode_normalization::char::is_combining_mark(*character))
        .collect::<String>()
        .to_lowercase()
}

/// Whether a text stands in any string of a value.
fn has_text(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(text) => folded(text).contains(wanted),
        Value::Array(elements) => elements.iter().any(|element| has_text(element, wanted)),
        Value::Object(members) => members.iter().any(|(_, value)| has_text(value, wanted)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// What a field must be: a value, or operators.
fn tests(operand: &Value) -> Result<Vec<Test>, QueryError> {
    match operand {
        Value::Object(members) if members.iter().any(|(name, _)| name.starts_with('$')) => {
            members.iter().map(|(name, operand)| test(name, operand)).collect()
        }
        value => Ok(vec![Test::Equals(value.clone())]),
    }
}

fn test(name: &str, operand: &Value) -> Result<Test, QueryError> {
    let wrong = |expected| QueryError::Operand { operator: name.to_owned(), expected };
    let comparison = match name {
        "$lt" => Some(Comparison::Less),
        "$lte" => Some(Comparison::AtMost),
        "$gt" => Some(Comparison::Greater),
        "$gte" => Some(Comparison::AtLeast),
        _ => None,
    };
    if let Some(comparison) = comparison {
        let (Value::Number(_) | Value::String(_)) = operand else { return Err(wrong("a number or a string")) };
        return Ok(Test::Compares(comparison, operand.clone()));
    }
    let list = || match operand {
        Value::Array(elements) => Ok(elements.clone()),
        _ => Err(wrong("an array")),
    };
    Ok(match name {
        "$eq" => Test::Equals(operand.clone()),
        "$ne" => Test::Differs(operand.clone()),
        "$in" => Test::In(list()?),
        "$nin" => Test::NotIn(list()?),
        "$between" => match list()?.as_slice() {
            [low, high] => Test::Between(low.clone(), high.clone()),
            _ => return Err(wrong("an array of two bounds")),
        },
        "$exists" => match operand {
            Value::Bool(exists) => Test::Exists(*exists),
            _ => return Err(wrong("true or false")),
        },
        "$text" => Test::Text(folded(text(name, operand)?)),
        "$like" => Test::Matches(like(text(name, operand)?)?),
        "$regex" => Test::Matches(pattern(text(name, operand)?)?),
        "$startsWith" => Test::StartsWith(text(name, operand)?.to_owned()),
        "$endsWith" => Test::EndsWith(text(name, operand)?.to_owned()),
        "$contains" => Test::Contains(operand.clone()),
        "$not" => Test::Not(self::tests(operand)?),
        _ => return Err(QueryError::Unknown(name.to_owned())),
    })
}

fn queries(operator: &str, operand: &Value) -> Result<Vec<Query>, QueryError> {
    match operand {
        Value::Array(elements) => elements.iter().map(Query::read).collect(),
        _ => Err(QueryError::Operand { operator: operator.to_owned(), expected: "an array of queries" }),
    }
}

fn text<'a>(operator: &str, operand: &'a Value) -> Result<&'a str, QueryError> {
    operand.as_str().ok_or_else(|| QueryError::Operand { operator: operator.to_owned(), expected: "a string" })
}

fn pattern(text: &str) -> Result<Regex, QueryError> {
    Regex::new(text).map_err(|_| QueryError::Pattern(text.to_owned()))
}

/// The pattern of `$like`: `%` is any text, `_` any character, and case does not matter.
fn like(text: &str) -> Result<Regex, QueryError> {
    let mut expression = String::from("(?is)^");
    for character in text.chars() {
        match character {
            '%' => expression.push_str(".*"),
            '_' => expression.push('.'),
            other => expression.push_str(&regex::escape(other.encode_utf8(&mut [0; 4]))),
        }
    }
    expression.push('$');
    pattern(&expression)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operator_does_what_its_name_says() {
        let value = Value::parse(
            r#"{"name":"Zoë Ångström","age":41,"score":7.5,"tags":["new","vip"],"address":{"city":"Lund","zip":"22100"},
                "active":true,"nothing":null,"a.b":1}"#,
        )
        .unwrap();
        let subject = Subject { id: "user:1", value: &value, physical: 1_000 };
        for (query, expected) in [
            ("{}", true),
            (r#"{"age":41}"#, true),
            (r#"{"age":"41"}"#, false),
            (r#"{"age":41,"active":false}"#, false),
            (r#"{"address":{"city":"Lund","zip":"22100"}}"#, true),
            (r#"{"address.city":"Lund"}"#, true),
            (r#"{"tags.1":"vip"}"#, true),
            (r#"{"a.b":1}"#, true),
            (r#"{"id":"user:1"}"#, true),
            (r#"{"id":{"$startsWith":"user:"}}"#, true),
            (r#"{"timestamp":{"$lte":1000}}"#, true),
            (r#"{"age":{"$eq":41}}"#, true),
            (r#"{"age":{"$ne":41}}"#, false),
            (r#"{"missing":{"$ne":41}}"#, true),
            (r#"{"age":{"$gt":40,"$lt":42}}"#, true),
            (r#"{"age":{"$gte":41,"$lte":41}}"#, true),
            (r#"{"age":{"$gt":41}}"#, false),
            (r#"{"address.zip":{"$gt":22000}}"#, true),
            (r#"{"name":{"$gt":"Z"}}"#, true),
            (r#"{"name":{"$gt":5}}"#, false),
            (r#"{"missing":{"$lt":5}}"#, false),
            (r#"{"nothing":{"$lt":5}}"#, true),
            (r#"{"age":{"$in":[1,41]}}"#, true),
            (r#"{"missing":{"$in":[null]}}"#, false),
            (r#"{"age":{"$nin":[1,41]}}"#, false),
            (r#"{"missing":{"$nin":[1]}}"#, true),
            (r#"{"score":{"$between":[7.5,8]}}"#, true),
            (r#"{"score":{"$between":[8,9]}}"#, false),
            (r#"{"nothing":{"$exists":true}}"#, true),
            (r#"{"missing":{"$exists":false}}"#, true),
            (r#"{"missing":{"$exists":true}}"#, false),
            (r#"{"name":{"$text":"ANGSTROM"}}"#, true),
            (r#"{"$text":"lund"}"#, true),
            (r#"{"$text":"nowhere"}"#, false),
            (r#"{"name":{"$like":"zoë%m"}}"#, true),
            (r#"{"name":{"$like":"zo_ %"}}"#, true),
            (r#"{"name":{"$like":"zoë"}}"#, false),
            (r#"{"address.city":{"$like":"L.nd"}}"#, false),
            (r#"{"name":{"$regex":"^Z.*m$"}}"#, true),
            (r#"{"name":{"$regex":"^z"}}"#, false),
            (r#"{"age":{"$regex":"4"}}"#, false),
            (r#"{"name":{"$endsWith":"om"}}"#, false),
            (r#"{"name":{"$endsWith":"m"}}"#, true),
            (r#"{"name":{"$contains":"oë"}}"#, true),
            (r#"{"tags":{"$contains":"vip"}}"#, true),
            (r#"{"tags":{"$contains":"vi"}}"#, false),
            (r#"{"age":{"$not":{"$gt":50}}}"#, true),
            (r#"{"$not":{"age":41}}"#, false),
            (r#"{"$and":[{"age":41},{"active":true}]}"#, true),
            (r#"{"$or":[{"age":1},{"active":true}]}"#, true),
            (r#"{"$or":[]}"#, false),
            (r#"{"age":41,"$or":[{"age":1},{"$not":{"active":false}}]}"#, true),
        ] {
            assert_eq!(Query::parse(query).unwrap().matches(&subject), expected, "{query}");
        }
    }

    #[test]
    fn what_is_not_supported_is_an_error() {
        for (query, message) in [
            (r#"{"age":{"$near":1}}"#, "the operator $near is not supported"),
            (r#"{"age":{"$gt":1,"$sort":1}}"#, "the operator $sort is not supported"),
            (r#"{"$where":"1"}"#, "the operator $where is not supported"),
            (r#"{"$or":[{"age":{"$mod":2}}]}"#, "the operator $mod is not supported"),
            (r#"{"age":{"$not":{"$mod":2}}}"#, "the operator $mod is not supported"),
            (r#"{"age":{"$in":1}}"#, "the operator $in takes an array"),
            (r#"{"age":{"$between":[1]}}"#, "the operator $between takes an array of two bounds"),
            (r#"{"age":{"$exists":1}}"#, "the operator $exists takes true or false"),
            (r#"{"age":{"$gt":null}}"#, "the operator $gt takes a number or a string"),
            (r#"{"$and":{}}"#, "the operator $and takes an array of queries"),
            ("[]", "a query is an object, as {\"name\": \"x\"}"),
        ] {
            assert_eq!(Query::parse(query).unwrap_err().to_string(), message);
        }
        assert!(matches!(Query::parse(r#"{"a":{"$regex":"(?=x)"}}"#), Err(QueryError::Pattern(_))));
        assert!(matches!(Query::parse("{"), Err(QueryError::Json(_))));
    }

    #[test]
    fn a_query_over_edges_knows_that_it_is_one() {
        let query = Query::parse(r#"{"type":"folder","$edge":{"type":"file"}}"#).unwrap();
        let (folder, file) =
            (Value::parse(r#"{"type":"folder"}"#).unwrap(), Value::parse(r#"{"type":"file"}"#).unwrap());
        let of = |value| Subject { id: "a", value, physical: 0 };
        assert!(query.matches(&of(&folder)) && !query.matches(&of(&file)));
        assert!(query.edge().unwrap().matches(&of(&file)));
        assert!(query.follows_edges() && !query.edge().unwrap().follows_edges());
        assert!(Query::parse(r#"{"$or":[{"$edge":{}}]}"#).unwrap().follows_edges());
    }
}
