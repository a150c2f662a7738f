//! What a full state carries: nodes, and removals of nodes.

use super::{
    Extra, Link, Operation, OperationError, Timestamp, Upsert, optional_value, print_extra, print_value, push,
    required_string, required_timestamp, separated,
};
use crate::clock::Hlc;
use crate::json::{self, Json, JsonString, Members};

/// A node of the graph, as a full state carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The node's name, unique in its graph.
    pub id: JsonString,
    /// The application's value; absent when it was `undefined`.
    pub value: Option<Json>,
    /// The nodes it links to, in the order in which the links were made.
    pub edges: Vec<JsonString>,
    /// When the node last changed.
    pub timestamp: Hlc,
    /// Members of the node that this version does not know.
    pub extra: Extra,
}

/// That a node was removed: a tombstone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// The node that was removed.
    pub id: JsonString,
    /// When.
    pub timestamp: Hlc,
}

impl Node {
    /// Parses a node as it stands in a full state.
    ///
    /// # Errors
    /// [`OperationError`] when it is not a node.
    pub fn parse(text: &str) -> Result<Self, OperationError> {
        let mut members = Members::parse(text)?;
        let edges = match members.take("edges") {
            Some(raw) => json::elements(raw)?.into_iter().map(json::string).collect::<Result<_, _>>()?,
            None => Vec::new(),
        };
        Ok(Self {
            id: required_string(&mut members, "id")?,
            value: optional_value(&mut members)?,
            edges,
            timestamp: required_timestamp(&mut members)?,
            extra: members.rest()?,
        })
    }

    /// The operations after which a peer that had an older version of the node, or none, holds this one; none for a node
    /// without a value. Members that this version does not know have no place in an operation. There is no operation
    /// that sets value and edges at one moment: so the edges are made just before it, each at a moment of its own, and
    /// the value, set once more, gives the node its timestamp.
    pub fn operations(&self) -> Vec<Operation> {
        let Some(value) = &self.value else { return Vec::new() };
        let set = |timestamp| {
            let (id, value) = (self.id.clone(), Some(value.clone()));
            Operation::Upsert(Upsert { id, value, timestamp, extra: Vec::new() })
        };
        let mut operations = Vec::with_capacity(self.edges.len() + 2);
        let moments = u64::try_from(self.edges.len() + 1).unwrap_or(u64::MAX);
        if !self.edges.is_empty()
            && let Some(start) = self.timestamp.earlier(moments)
        {
            operations.push(set(start));
            operations.extend((start.logical + 1..).zip(&self.edges).map(|(logical, target)| {
                let (source, target) = (self.id.clone(), target.clone());
                let timestamp = Hlc { logical, ..start };
                Operation::Link(Link { source, target, timestamp, extra: Vec::new() })
            }));
        }
        operations.push(set(self.timestamp));
        operations
    }

    /// Prints the node behind `out`, as `JSON.stringify` would.
    pub fn print(&self, out: &mut String) {
        push(out, format_args!(r#"{{"id":{}"#, self.id));
        print_value(out, self.value.as_ref());
        out.push_str(r#","edges":["#);
        separated(out, &self.edges, |out, edge| push(out, format_args!("{edge}")));
        push(out, format_args!(r#"],"timestamp":{}"#, Timestamp(Some(self.timestamp))));
        print_extra(out, &self.extra);
    }
}

impl Removal {
    /// Parses a removal as it stands in a full state.
    ///
    /// # Errors
    /// [`OperationError`] when it is not one.
    pub fn parse(text: &str) -> Result<Self, OperationError> {
        let mut members = Members::parse(text)?;
        Ok(Self { id: required_string(&mut members, "id")?, timestamp: required_timestamp(&mut members)? })
    }

    /// Prints the removal behind `out`, as `JSON.stringify` would.
    pub fn print(&self, out: &mut String) {
        push(out, format_args!(r#"{{"id":{},"timestamp":{}}}"#, self.id, Timestamp(Some(self.timestamp))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{MemoryGraph, Outcome};

    #[test]
    fn a_node_as_operations_is_the_same_node_to_who_had_an_older_one_or_none() {
        for (physical, logical) in [(5_000, 10), (5_000, 0), (5_000, 2), (5_000, 3), (1, 0)] {
            let text = format!(
                r#"{{"id":"a","value":2,"edges":["x","y"],"timestamp":{{"physical":{physical},"logical":{logical}}},"n":1}}"#
            );
            let node = Node::parse(&text).unwrap();
            let operations = node.operations();
            assert_eq!(operations.len(), 4);
            let mut expected = Node { extra: Vec::new(), ..node.clone() };
            let mut graph = MemoryGraph::default();
            operations.iter().for_each(|operation| assert_eq!(graph.apply(operation, 10_000), Outcome::Applied));
            assert_eq!(graph.get("a"), Some(&expected));
            operations.iter().for_each(|operation| assert_eq!(graph.apply(operation, 10_000), Outcome::Superseded));
            // Edges to what a peer has beside them stay.
            let mut graph = MemoryGraph::default();
            for text in [
                r#"{"type":"upsert","id":"a","value":1,"timestamp":{"physical":0,"logical":0}}"#,
                r#"{"type":"link","sourceId":"a","targetId":"z","timestamp":{"physical":0,"logical":0}}"#,
            ] {
                graph.apply(&Operation::parse(text, &mut 0).unwrap(), 10_000);
            }
            operations.iter().for_each(|operation| assert_eq!(graph.apply(operation, 10_000), Outcome::Applied));
            expected.edges.insert(0, JsonString::new("z"));
            assert_eq!(graph.get("a"), Some(&expected));
        }
        // Before the beginning of time there is no moment for edges.
        let first = r#"{"id":"a","value":2,"edges":["x"],"timestamp":{"physical":0,"logical":1}}"#;
        assert_eq!(Node::parse(first).unwrap().operations().len(), 1);
        let empty = r#"{"id":"a","edges":["x"],"timestamp":{"physical":5,"logical":1}}"#;
        assert_eq!(Node::parse(empty).unwrap().operations(), []);
    }
}
