//! Operations on the graph, as they travel on the channel `syncGraph` (wire §4).

mod node;

use std::fmt;

use crate::clock::{Hlc, MAX_SAFE_INTEGER};
use crate::json::{self, Json, JsonError, JsonString, Members};

pub use node::{Node, Removal};

/// Members that this version does not know, kept so that they can be passed on (and signatures verified).
pub type Extra = Vec<(JsonString, Json)>;

/// Sets a node's value; its edges stay as they were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upsert {
    /// The node.
    pub id: JsonString,
    /// Its new value; absent in a delta when the node is gone meanwhile.
    pub value: Option<Json>,
    /// When.
    pub timestamp: Hlc,
    /// Unknown members.
    pub extra: Extra,
}

/// Drops a node and every edge to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remove {
    /// The node.
    pub id: JsonString,
    /// The value it had, as live operations carry it.
    pub value: Option<Json>,
    /// When.
    pub timestamp: Hlc,
    /// Unknown members.
    pub extra: Extra,
}

/// Adds an edge, and sets the source's timestamp.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Where the edge starts.
    pub source: JsonString,
    /// Where it ends.
    pub target: JsonString,
    /// When.
    pub timestamp: Hlc,
    /// Unknown members.
    pub extra: Extra,
}

/// "This is the newest I know; tell me what I lack."
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sync {
    /// The highest timestamp that the sender has seen, if any.
    pub timestamp: Option<Hlc>,
    /// Unknown members.
    pub extra: Extra,
}

/// Recent operations: an answer to [`Sync`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaSync {
    /// Upserts, removes and links, oldest first.
    pub operations: Vec<Operation>,
    /// The highest timestamp that the sender has seen, if any.
    pub timestamp: Option<Hlc>,
    /// Unknown members.
    pub extra: Extra,
}

/// A whole graph: an answer to [`Sync`], or to a full state that lacked something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullStateSync {
    /// Every node.
    pub nodes: Vec<Node>,
    /// Every removal that is remembered.
    pub removals: Vec<Removal>,
    /// The highest timestamp that the sender has seen, if any.
    pub timestamp: Option<Hlc>,
    /// Unknown members.
    pub extra: Extra,
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Sets a node's value.
    Upsert(Upsert),
    /// Drops a node.
    Remove(Remove),
    /// Adds an edge.
    Link(Link),
    /// Asks for what the sender lacks.
    Sync(Sync),
    /// Answers with recent operations.
    DeltaSync(DeltaSync),
    /// Answers with everything.
    FullStateSync(FullStateSync),
}

/// Something in a message is not an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OperationError {
    /// Not the JSON that belongs there.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// A member that must be there is not.
    #[error("member {0} is missing")]
    Missing(&'static str),
    /// A `type` that this version does not know.
    #[error("unknown type of operation")]
    UnknownType,
}

/// The operations of one message on `syncGraph`, and how much of it was not to be understood.
///
/// What is malformed is left out; what stands beside it counts: one broken node of a peer does not take a
/// thousand good ones with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// What was understood, in order.
    pub operations: Vec<Operation>,
    /// How many operations, nodes and removals were malformed.
    pub malformed: usize,
}

impl Batch {
    /// Parses a message: an array of operations.
    ///
    /// # Errors
    /// [`JsonError`] when it is not an array.
    pub fn parse(text: &str) -> Result<Self, JsonError> {
        let mut malformed = 0;
        let operations = lenient(&json::elements(text)?, &mut malformed, Operation::parse);
        Ok(Self { operations, malformed })
    }

    /// Parses a message; each operation comes with its text, which signatures are checked against. Also returns how
    /// many operations, nodes and removals were malformed.
    ///
    /// # Errors
    /// See [`Batch::parse`].
    #[allow(clippy::type_complexity, reason = "taken apart where it is called")]
    pub fn parse_with_text(text: &str) -> Result<(Vec<(Operation, &str)>, usize), JsonError> {
        let mut malformed = 0;
        let operations = lenient(&json::elements(text)?, &mut malformed, |text, malformed| {
            Ok((Operation::parse(text, malformed)?, text))
        });
        Ok((operations, malformed))
    }

    /// The text of a message that carries `operations`.
    pub fn print(operations: &[Operation]) -> String {
        let mut text = String::from("[");
        separated(&mut text, operations, |text, operation| operation.print(text));
        text.push(']');
        text
    }
}

impl Operation {
    /// The members that this version does not know, those of a signature among them.
    pub fn extra_mut(&mut self) -> &mut Extra {
        match self {
            Self::Upsert(Upsert { extra, .. })
            | Self::Remove(Remove { extra, .. })
            | Self::Link(Link { extra, .. })
            | Self::Sync(Sync { extra, .. })
            | Self::DeltaSync(DeltaSync { extra, .. })
            | Self::FullStateSync(FullStateSync { extra, .. }) => extra,
        }
    }

    /// Parses one operation. `malformed` counts what is left out inside a delta or a full state.
    ///
    /// # Errors
    /// [`OperationError`] when the operation itself is not one.
    pub fn parse(text: &str, malformed: &mut usize) -> Result<Self, OperationError> {
        let mut members = Members::parse(text)?;
        let kind = json::string(members.take("type").ok_or(OperationError::Missing("type"))?)?;
        Ok(match kind.as_printed() {
            "upsert" => Self::Upsert(Upsert {
                id: required_string(&mut members, "id")?,
                value: optional_value(&mut members)?,
                timestamp: required_timestamp(&mut members)?,
                extra: members.rest()?,
            }),
            "remove" => Self::Remove(Remove {
                id: required_string(&mut members, "id")?,
                value: optional_value(&mut members)?,
                timestamp: required_timestamp(&mut members)?,
                extra: members.rest()?,
            }),
            "link" => Self::Link(Link {
                source: required_string(&mut members, "sourceId")?,
                target: required_string(&mut members, "targetId")?,
                timestamp: required_timestamp(&mut members)?,
                extra: members.rest()?,
            }),
            "sync" => Self::Sync(Sync { timestamp: optional_timestamp(&mut members)?, extra: members.rest()? }),
            "deltaSync" => {
                let raw = json::elements(members.take("operations").ok_or(OperationError::Missing("operations"))?)?;
                let operations = lenient(&raw, malformed, |text, malformed| match Self::parse(text, malformed)? {
                    one @ (Self::Upsert(_) | Self::Remove(_) | Self::Link(_)) => Ok(one),
                    // A delta inside a delta is nobody's: it would only nest.
                    _ => Err(OperationError::UnknownType),
                });
                Self::DeltaSync(DeltaSync {
                    operations,
                    timestamp: optional_timestamp(&mut members)?,
                    extra: members.rest()?,
                })
            }
            "fullStateSync" => {
                let graph = Members::parse(members.take("graphData").ok_or(OperationError::Missing("graphData"))?)?;
                let mut nodes = Vec::new();
                for (id, raw) in graph {
                    match Node::parse(raw) {
                        Ok(node) if node.id == id => nodes.push(node),
                        _ => *malformed += 1,
                    }
                }
                let removals = match members.take("removals") {
                    Some(raw) => lenient(&json::elements(raw)?, malformed, |text, _| Removal::parse(text)),
                    None => Vec::new(),
                };
                Self::FullStateSync(FullStateSync {
                    nodes,
                    removals,
                    timestamp: optional_timestamp(&mut members)?,
                    extra: members.rest()?,
                })
            }
            _ => return Err(OperationError::UnknownType),
        })
    }

    /// Prints the operation behind `out`, as `JSON.stringify` would.
    pub fn print(&self, out: &mut String) {
        match self {
            Self::Upsert(upsert) => {
                push(out, format_args!(r#"{{"type":"upsert","id":{}"#, upsert.id));
                print_value(out, upsert.value.as_ref());
                push(out, format_args!(r#","timestamp":{}"#, Timestamp(Some(upsert.timestamp))));
                print_extra(out, &upsert.extra);
            }
            Self::Remove(remove) => {
                push(out, format_args!(r#"{{"type":"remove","id":{}"#, remove.id));
                print_value(out, remove.value.as_ref());
                push(out, format_args!(r#","timestamp":{}"#, Timestamp(Some(remove.timestamp))));
                print_extra(out, &remove.extra);
            }
            Self::Link(link) => {
                push(out, format_args!(r#"{{"type":"link","sourceId":{},"targetId":{}"#, link.source, link.target));
                push(out, format_args!(r#","timestamp":{}"#, Timestamp(Some(link.timestamp))));
                print_extra(out, &link.extra);
            }
            Self::Sync(sync) => {
                push(out, format_args!(r#"{{"type":"sync","timestamp":{}"#, Timestamp(sync.timestamp)));
                print_extra(out, &sync.extra);
            }
            Self::DeltaSync(delta) => {
                out.push_str(r#"{"type":"deltaSync","operations":["#);
                separated(out, &delta.operations, |out, operation| operation.print(out));
                push(out, format_args!(r#"],"timestamp":{}"#, Timestamp(delta.timestamp)));
                print_extra(out, &delta.extra);
            }
            Self::FullStateSync(state) => {
                out.push_str(r#"{"type":"fullStateSync","graphData":{"#);
                separated(out, &state.nodes, |out, node| {
                    push(out, format_args!("{}:", node.id));
                    node.print(out);
                });
                out.push_str(r#"},"removals":["#);
                separated(out, &state.removals, |out, removal| removal.print(out));
                push(out, format_args!(r#"],"timestamp":{}"#, Timestamp(state.timestamp)));
                print_extra(out, &state.extra);
            }
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.print(&mut text);
        f.write_str(&text)
    }
}

/// Parses what can be parsed, and counts the rest.
fn lenient<'a, T>(
    raw: &[&'a str],
    malformed: &mut usize,
    mut parse: impl FnMut(&'a str, &mut usize) -> Result<T, OperationError>,
) -> Vec<T> {
    let mut parsed = Vec::with_capacity(raw.len());
    for text in raw {
        match parse(text, malformed) {
            Ok(one) => parsed.push(one),
            Err(_) => *malformed += 1,
        }
    }
    parsed
}

fn required_string(members: &mut Members<'_>, name: &'static str) -> Result<JsonString, OperationError> {
    Ok(json::string(members.take(name).ok_or(OperationError::Missing(name))?)?)
}

fn optional_value(members: &mut Members<'_>) -> Result<Option<Json>, OperationError> {
    Ok(members.take("value").map(Json::parse).transpose()?)
}

fn required_timestamp(members: &mut Members<'_>) -> Result<Hlc, OperationError> {
    optional_timestamp(members)?.ok_or(OperationError::Missing("timestamp"))
}

fn optional_timestamp(members: &mut Members<'_>) -> Result<Option<Hlc>, OperationError> {
    match members.take("timestamp") {
        None | Some("null") => Ok(None),
        Some(raw) => {
            let mut parts = Members::parse(raw)?;
            let mut part = |name| {
                let raw = parts.take(name).ok_or(OperationError::Missing(name))?;
                Ok::<_, OperationError>(json::integer(raw, MAX_SAFE_INTEGER)?)
            };
            Ok(Some(Hlc::new(part("physical")?, part("logical")?)))
        }
    }
}

/// Prints a timestamp, or `null`.
struct Timestamp(Option<Hlc>);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(Hlc { physical, logical }) => write!(f, r#"{{"physical":{physical},"logical":{logical}}}"#),
            None => f.write_str("null"),
        }
    }
}

fn push(out: &mut String, arguments: fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = fmt::Write::write_fmt(out, arguments);
}

fn print_value(out: &mut String, value: Option<&Json>) {
    if let Some(value) = value {
        push(out, format_args!(r#","value":{value}"#));
    }
}

/// Prints the unknown members, and closes the object.
fn print_extra(out: &mut String, extra: &Extra) {
    for (name, value) in extra {
        push(out, format_args!(",{name}:{value}"));
    }
    out.push('}');
}

fn separated<T>(out: &mut String, items: &[T], mut print: impl FnMut(&mut String, &T)) {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        print(out, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_members_are_kept() {
        let text = r#"{"type":"upsert","id":"a","value":{"x":1},"timestamp":{"physical":5,"logical":1},"originUser":"0xAB","n":[1,2.5]}"#;
        let operation = Operation::parse(text, &mut 0).unwrap();
        assert_eq!(operation.to_string(), text);
    }

    #[test]
    fn one_malformed_operation_does_not_take_the_others_with_it() {
        let batch = Batch::parse(
            r#"[{"type":"upsert","id":"a","value":1,"timestamp":{"physical":5,"logical":1}},
                {"type":"upsert","id":7,"value":1,"timestamp":{"physical":5,"logical":1}},
                {"type":"upsert","id":"b","value":1,"timestamp":{"physical":-5,"logical":1}},
                {"type":"remove","id":"b"},
                {"type":"drop","id":"b"}, 3, null, {},
                {"type":"deltaSync","operations":[{"type":"sync","timestamp":null},{"type":"link","sourceId":"a","targetId":"b","timestamp":{"physical":6,"logical":2}}],"timestamp":null},
                {"type":"fullStateSync","graphData":{"x":{"id":"y","edges":[],"timestamp":{"physical":1,"logical":1}},"z":{"id":"z","edges":[1],"timestamp":{"physical":1,"logical":1}}},"removals":[{}],"timestamp":null}]"#,
        )
        .unwrap();
        assert_eq!(batch.malformed, 7 + 1 + 3);
        assert_eq!(batch.operations.len(), 3);
    }

    #[test]
    fn a_message_that_is_no_array_is_an_error() {
        for text in ["", "{}", "null", "[", "[1"] {
            assert!(Batch::parse(text).is_err(), "{text}");
        }
    }
}
