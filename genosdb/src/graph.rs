//! The rules by which operations and states merge into a graph (wire §4), over any store of nodes.
//!
//! - A node is one register: of two versions the newer wins, value and edges together.
//! - A removal is a tombstone that wins over every version that is not newer, and takes the edges to the node with it.
//!   It is remembered even when the node is made again, so that nothing from before comes back.
//! - Nothing on this wire takes an edge away but the removal of one of its ends. So a link that comes late, when its
//!   source has changed since, still adds its edge; and of two versions of one moment the edges of both count.
//! - Two versions of one moment may also differ in their value: when two peers stamped alike, or when a link marked
//!   the node before an older value had come. Clients then keep what they have. Here the greater text wins, so that
//!   those who follow these rules end with the same graph whatever came first, be it operations or states.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashSet};

use crate::clock::Hlc;
use crate::json::{Json, JsonString};
use crate::operation::{FullStateSync, Link, Node, Operation, Removal, Remove, Upsert};

/// Where nodes and tombstones are kept. [`apply`] and [`merge`] hold the rules; a store only stores.
pub trait Store {
    /// What can go wrong in keeping.
    type Error;

    /// The timestamp of the node `id`, if there is one.
    ///
    /// # Errors
    /// When the store fails, here and below.
    fn timestamp(&mut self, id: &JsonString) -> Result<Option<Hlc>, Self::Error>;
    /// When the node `id` was last removed, if it ever was, also when it has been made again since.
    fn removed(&mut self, id: &JsonString) -> Result<Option<Hlc>, Self::Error>;
    /// Whether the node `source` has an edge to `target`.
    fn has_edge(&mut self, source: &JsonString, target: &JsonString) -> Result<bool, Self::Error>;
    /// The node `id`, if there is one.
    fn node(&mut self, id: &JsonString) -> Result<Option<Node>, Self::Error>;
    /// How many nodes there are.
    fn nodes(&mut self) -> Result<u64, Self::Error>;
    /// Sets value and timestamp of a node; edges stay as they were, none for a new one.
    fn set_value(&mut self, id: &JsonString, value: &Json, timestamp: Hlc) -> Result<(), Self::Error>;
    /// Sets a whole node, edges included.
    fn set_node(&mut self, node: &Node) -> Result<(), Self::Error>;
    /// Adds an edge behind the others unless it is there, and sets the source's timestamp.
    fn add_edge(&mut self, source: &JsonString, target: &JsonString, timestamp: Hlc) -> Result<(), Self::Error>;
    /// Sets a node's timestamp alone.
    fn touch(&mut self, id: &JsonString, timestamp: Hlc) -> Result<(), Self::Error>;
    /// Drops a node, if it is there, and every edge to it.
    fn drop_node(&mut self, id: &JsonString) -> Result<(), Self::Error>;
    /// Drops the edges to a node from nodes that were last changed before `before`.
    fn drop_edges_to(&mut self, id: &JsonString, before: Hlc) -> Result<(), Self::Error>;
    /// Sets the tombstone of a node.
    fn set_removed(&mut self, id: &JsonString, timestamp: Hlc) -> Result<(), Self::Error>;
}

/// What became of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It changed the graph, and belongs into the log.
    Applied,
    /// The graph holds something as new or newer.
    Superseded,
    /// A link whose source is not here, or an upsert whose node was gone when it was sent.
    Incomplete,
}

/// Applies one upsert, remove or link. `wall_ms` is the time of day: timestamps too far ahead of it are capped.
///
/// Other operations are [`Outcome::Incomplete`]: they do not change a graph by themselves.
///
/// # Errors
/// Those of the store.
pub fn apply<S: Store>(store: &mut S, operation: &Operation, wall_ms: u64) -> Result<Outcome, S::Error> {
    match operation {
        Operation::Upsert(upsert) => apply_upsert(store, upsert, upsert.timestamp.capped(wall_ms)),
        Operation::Remove(Remove { id, timestamp, .. }) => apply_removal(store, id, timestamp.capped(wall_ms)),
        Operation::Link(link) => apply_link(store, link, link.timestamp.capped(wall_ms)),
        Operation::Sync(_) | Operation::DeltaSync(_) | Operation::FullStateSync(_) => Ok(Outcome::Incomplete),
    }
}

fn apply_upsert<S: Store>(store: &mut S, upsert: &Upsert, timestamp: Hlc) -> Result<Outcome, S::Error> {
    let Some(value) = &upsert.value else { return Ok(Outcome::Incomplete) };
    let current = store.timestamp(&upsert.id)?;
    if current > Some(timestamp) || store.removed(&upsert.id)? >= Some(timestamp) {
        return Ok(Outcome::Superseded);
    }
    if current == Some(timestamp) && store.node(&upsert.id)?.is_some_and(|node| node.value.as_ref() >= Some(value)) {
        return Ok(Outcome::Superseded);
    }
    store.set_value(&upsert.id, value, timestamp)?;
    Ok(Outcome::Applied)
}

fn apply_removal<S: Store>(store: &mut S, id: &JsonString, timestamp: Hlc) -> Result<Outcome, S::Error> {
    if store.removed(id)? >= Some(timestamp) {
        return Ok(Outcome::Superseded);
    }
    if store.timestamp(id)? > Some(timestamp) {
        // Made again since, as was heard before. What linked to it until then linked to what is gone.
        store.drop_edges_to(id, timestamp)?;
    } else {
        store.drop_node(id)?;
    }
    store.set_removed(id, timestamp)?;
    Ok(Outcome::Applied)
}

fn apply_link<S: Store>(store: &mut S, link: &Link, timestamp: Hlc) -> Result<Outcome, S::Error> {
    let Some(current) = store.timestamp(&link.source)? else { return Ok(Outcome::Incomplete) };
    let end_of_target = store.removed(&link.target)?;
    if current >= timestamp {
        // It comes late. If its target has an end, nothing tells which came first.
        let from_before = store.removed(&link.source)? >= Some(timestamp) || end_of_target.is_some();
        if from_before || store.has_edge(&link.source, &link.target)? {
            return Ok(Outcome::Superseded);
        }
    } else if end_of_target >= Some(timestamp) || (end_of_target.is_some() && store.timestamp(&link.target)?.is_none())
    {
        // The target is gone, or was when a peer that did not know linked to it: no edge, but its mark on the source.
        store.touch(&link.source, timestamp)?;
        return Ok(Outcome::Applied);
    }
    store.add_edge(&link.source, &link.target, current.max(timestamp))?;
    Ok(Outcome::Applied)
}

/// What merging a full state did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Merged {
    /// The nodes that were taken over, or completed, as they are now.
    pub nodes: Vec<Node>,
    /// The removals that were taken over.
    pub removals: Vec<Removal>,
    /// Whether this side holds something that the sender's state lacks, and should answer with its own.
    pub sender_lacks: bool,
}

/// What a full state would change.
#[derive(Debug, Clone, Copy)]
pub enum News<'a> {
    /// A node that is new here, or newer.
    Node(&'a Node),
    /// A removal of a node that is here, or was never heard of.
    Removal(&'a Removal),
}

/// Merges a peer's full state node by node. `accept` may refuse what is news (too large, too many, not permitted): it
/// is then left out, and the peer does not count as lacking what we have in its place.
///
/// # Errors
/// Those of the store.
pub fn merge<S: Store>(
    store: &mut S,
    state: &FullStateSync,
    wall_ms: u64,
    mut accept: impl FnMut(&mut S, News<'_>) -> Result<bool, S::Error>,
) -> Result<Merged, S::Error> {
    let mut merged = Merged::default();
    let mut held = 0;
    let told: HashSet<&JsonString> = state.nodes.iter().map(|node| &node.id).collect();
    for removal in &state.removals {
        let timestamp = removal.timestamp.capped(wall_ms);
        if store.removed(&removal.id)? >= Some(timestamp) {
            continue;
        }
        if !accept(store, News::Removal(removal))? {
            held += u64::from(!told.contains(&removal.id) && store.timestamp(&removal.id)?.is_some());
            continue;
        }
        if apply_removal(store, &removal.id, timestamp)? == Outcome::Applied {
            merged.removals.push(Removal { id: removal.id.clone(), timestamp });
        }
    }
    let mut taken = HashSet::new();
    let mut completed = Vec::new();
    for node in &state.nodes {
        let timestamp = node.timestamp.capped(wall_ms);
        if store.removed(&node.id)? >= Some(timestamp) {
            merged.sender_lacks = true;
            continue;
        }
        match store.timestamp(&node.id)? {
            Some(current) if current > timestamp => {
                merged.sender_lacks = true;
                held += 1;
            }
            Some(current) if current == timestamp => {
                held += 1;
                if let Some(ours) = store.node(&node.id)? {
                    completed.push((ours, node));
                }
            }
            current => {
                if !accept(store, News::Node(node))? {
                    held += u64::from(current.is_some());
                    continue;
                }
                taken.insert(node.id.clone());
                merged.nodes.push(Node { timestamp, ..node.clone() });
                held += 1;
            }
        }
    }
    // Only now is it known which targets are gone: an edge to a removed node goes with it, as it does where the
    // removal is applied, whichever of the two comes first.
    for node in &mut merged.nodes {
        let mut edges = Vec::with_capacity(node.edges.len());
        let mut seen = HashSet::new();
        for target in std::mem::take(&mut node.edges) {
            if !is_gone(store, &taken, &target, node.timestamp)? && seen.insert(target.clone()) {
                edges.push(target);
            }
        }
        node.edges = edges;
        store.set_node(node)?;
    }
    for (mut ours, theirs) in completed {
        if ours.edges == theirs.edges && ours.value == theirs.value && ours.extra == theirs.extra {
            continue;
        }
        let known: HashSet<&JsonString> = ours.edges.iter().collect();
        let mut missed = Vec::new();
        for target in theirs.edges.iter().filter(|target| !known.contains(target)) {
            if !is_gone(store, &taken, target, ours.timestamp)? && !missed.contains(target) {
                missed.push(target.clone());
            }
        }
        let order = (&theirs.value, &theirs.extra).cmp(&(&ours.value, &ours.extra));
        let theirs_is_greater = order == Ordering::Greater;
        let told: HashSet<&JsonString> = theirs.edges.iter().collect();
        let theirs_has_all = ours.edges.iter().all(|target| told.contains(target));
        merged.sender_lacks |= order == Ordering::Less || !theirs_has_all;
        if (theirs_is_greater || !missed.is_empty()) && accept(store, News::Node(theirs))? {
            ours.edges.append(&mut missed);
            if theirs_is_greater {
                (ours.value, ours.extra) = (theirs.value.clone(), theirs.extra.clone());
            }
            store.set_node(&ours)?;
            merged.nodes.push(ours);
        }
    }
    merged.sender_lacks |= store.nodes()? > held;
    Ok(merged)
}

/// Whether an edge of a node as it was at `timestamp` must not be there: its target is gone, or was since. `taken` are
/// nodes that are about to be stored.
fn is_gone<S: Store>(
    store: &mut S,
    taken: &HashSet<JsonString>,
    target: &JsonString,
    timestamp: Hlc,
) -> Result<bool, S::Error> {
    let Some(end) = store.removed(target)? else { return Ok(false) };
    Ok(end > timestamp || !(taken.contains(target) || store.timestamp(target)?.is_some()))
}

/// A graph in memory: a client's side in tests, and the measure that other stores are compared with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryGraph {
    nodes: BTreeMap<JsonString, Node>,
    removals: BTreeMap<JsonString, Hlc>,
}

impl MemoryGraph {
    /// Applies one operation, see [`apply`].
    pub fn apply(&mut self, operation: &Operation, wall_ms: u64) -> Outcome {
        let Ok(outcome) = apply(self, operation, wall_ms);
        outcome
    }

    /// Merges a full state, see [`merge`].
    pub fn merge(&mut self, state: &FullStateSync, wall_ms: u64) -> Merged {
        let Ok(merged) = merge(self, state, wall_ms, |_, _| Ok(true));
        merged
    }

    /// The node `id`.
    pub fn get(&self, id: &str) -> Option<&Node> {
        self.nodes.get(&JsonString::new(id))
    }

    /// Every node, ordered by id.
    pub fn iter(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The whole graph as a full state.
    pub fn full_state(&self) -> FullStateSync {
        let removals = self.removals.iter().map(|(id, at)| Removal { id: id.clone(), timestamp: *at }).collect();
        FullStateSync {
            nodes: self.nodes.values().cloned().collect(),
            removals,
            timestamp: self.latest(),
            extra: Vec::new(),
        }
    }

    /// The highest timestamp in the graph.
    pub fn latest(&self) -> Option<Hlc> {
        let nodes = self.nodes.values().map(|node| node.timestamp).max();
        nodes.max(self.removals.values().copied().max())
    }
}

impl Store for MemoryGraph {
    type Error = std::convert::Infallible;

    fn timestamp(&mut self, id: &JsonString) -> Result<Option<Hlc>, Self::Error> {
        Ok(self.nodes.get(id).map(|node| node.timestamp))
    }

    fn removed(&mut self, id: &JsonString) -> Result<Option<Hlc>, Self::Error> {
        Ok(self.removals.get(id).copied())
    }

    fn has_edge(&mut self, source: &JsonString, target: &JsonString) -> Result<bool, Self::Error> {
        Ok(self.nodes.get(source).is_some_and(|node| node.edges.contains(target)))
    }

    fn node(&mut self, id: &JsonString) -> Result<Option<Node>, Self::Error> {
        Ok(self.nodes.get(id).cloned())
    }

    fn nodes(&mut self) -> Result<u64, Self::Error> {
        Ok(u64::try_from(self.nodes.len()).unwrap_or(u64::MAX))
    }

    fn set_value(&mut self, id: &JsonString, value: &Json, timestamp: Hlc) -> Result<(), Self::Error> {
        let node = self.nodes.entry(id.clone()).or_insert_with(|| Node {
            id: id.clone(),
            value: None,
            edges: Vec::new(),
            timestamp,
            extra: Vec::new(),
        });
        node.value = Some(value.clone());
        node.timestamp = timestamp;
        Ok(())
    }

    fn set_node(&mut self, node: &Node) -> Result<(), Self::Error> {
        self.nodes.insert(node.id.clone(), node.clone());
        Ok(())
    }

    fn add_edge(&mut self, source: &JsonString, target: &JsonString, timestamp: Hlc) -> Result<(), Self::Error> {
        if let Some(node) = self.nodes.get_mut(source) {
            if !node.edges.contains(target) {
                node.edges.push(target.clone());
            }
            node.timestamp = timestamp;
        }
        Ok(())
    }

    fn touch(&mut self, id: &JsonString, timestamp: Hlc) -> Result<(), Self::Error> {
        if let Some(node) = self.nodes.get_mut(id) {
            node.timestamp = timestamp;
        }
        Ok(())
    }

    fn drop_node(&mut self, id: &JsonString) -> Result<(), Self::Error> {
        self.nodes.remove(id);
        for node in self.nodes.values_mut() {
            node.edges.retain(|target| target != id);
        }
        Ok(())
    }

    fn drop_edges_to(&mut self, id: &JsonString, before: Hlc) -> Result<(), Self::Error> {
        for node in self.nodes.values_mut().filter(|node| node.timestamp < before) {
            node.edges.retain(|target| target != id);
        }
        Ok(())
    }

    fn set_removed(&mut self, id: &JsonString, timestamp: Hlc) -> Result<(), Self::Error> {
        self.removals.insert(id.clone(), timestamp);
        Ok(())
    }
}
