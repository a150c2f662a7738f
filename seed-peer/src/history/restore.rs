//! Bringing a room back to a moment, by new operations: what was written since stays in the log, and a restoration can
//! be undone by another.

use std::collections::BTreeSet;

use genosdb::json::{Json, JsonString};
use genosdb::operation::Node;

use super::{Difference, HistoryError, PastRoom, diff};
use crate::archive::Edit;

/// What brings a room back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Restoration {
    /// The edits, in the order in which they are to be written.
    pub edits: Vec<Edit>,
    /// Nodes that are there now and were not then.
    pub removed: u64,
    /// Nodes that were there then and are not now.
    pub brought_back: u64,
    /// Nodes that were otherwise.
    pub changed: u64,
    /// Nodes that had no value at all, which no operation can say: they come back with `null`.
    pub without_value: u64,
    /// Edges that led nowhere, to nodes that have been made and removed since: those cannot be had back.
    pub lost_edges: u64,
}

/// What brings the room `now` back to what it was `then`.
///
/// Nothing takes an edge away but the removal of one of its ends. So a node that has an edge too many is removed and
/// made again, and its other edges with it.
///
/// # Errors
/// [`HistoryError`].
pub fn restoration(now: &PastRoom, then: &PastRoom) -> Result<Restoration, HistoryError> {
    let mut restoration = Restoration::default();
    let mut removals: BTreeSet<JsonString> = BTreeSet::new();
    let mut upserts = Vec::new();
    // Nodes all of whose edges are to be linked, and single links.
    let mut remade: Vec<Node> = Vec::new();
    let mut links: BTreeSet<(JsonString, JsonString)> = BTreeSet::new();
    let mut failed: Option<HistoryError> = None;
    diff(now, then, |difference| match difference {
        Difference::Removed(node) => {
            restoration.removed += 1;
            removals.insert(node.id);
        }
        Difference::Added(node) => {
            restoration.brought_back += 1;
            remade.push(node);
        }
        Difference::Changed { before, after } => {
            restoration.changed += 1;
            let surplus = || -> Result<bool, HistoryError> {
                for edge in before.edges.iter().filter(|edge| !after.edges.contains(edge)) {
                    // A target that goes takes the edge along.
                    if now.node(edge)?.is_none() || then.node(edge)?.is_some() {
                        return Ok(true);
                    }
                }
                Ok(false)
            };
            if surplus().unwrap_or_else(|error| failed.replace(error).is_none()) {
                remade.push(after);
                removals.insert(before.id);
            } else {
                if before.value != after.value {
                    upserts.push(after.clone());
                }
                let missing = after.edges.iter().filter(|edge| !before.edges.contains(edge));
                links.extend(missing.map(|edge| (after.id.clone(), edge.clone())));
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    for node in &remade {
        links.extend(node.edges.iter().map(|edge| (node.id.clone(), edge.clone())));
        upserts.push(node.clone());
    }
    // Whatever is removed, for good or to be made again, takes the edges to it along.
    for id in &removals {
        for source in then.sources(id)? {
            links.insert((source, id.clone()));
        }
    }
    let mut possible = Vec::with_capacity(links.len());
    for (source, target) in links {
        // Nobody links to what is known to be gone.
        if then.node(&target)?.is_some() || !(removals.contains(&target) || now.was_removed(&target)?) {
            possible.push(Edit::Link { source, target });
        } else {
            restoration.lost_edges += 1;
        }
    }
    let edits = &mut restoration.edits;
    edits.extend(removals.into_iter().map(|id| Edit::Remove { id }));
    for node in upserts {
        restoration.without_value += u64::from(node.value.is_none());
        let value = node.value.unwrap_or_else(|| Json::from_printed("null".into()));
        edits.push(Edit::Upsert { id: node.id, value });
    }
    edits.append(&mut possible);
    Ok(restoration)
}
