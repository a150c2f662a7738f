//! What differs between two moments of a room.

use std::cmp::Ordering;

use genosdb::operation::Node;

use super::{HistoryError, PastRoom};

/// A node that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// It is only in the second.
    Added(Node),
    /// It is only in the first.
    Removed(Node),
    /// It is in both, with another value or other edges.
    Changed {
        /// As it is in the first.
        before: Node,
        /// As it is in the second.
        after: Node,
    },
}

/// Hands out what differs from `before` to `after`, ordered by id. A node that only has another timestamp is the same.
///
/// # Errors
/// [`HistoryError`].
pub fn diff(before: &PastRoom, after: &PastRoom, mut each: impl FnMut(Difference)) -> Result<(), HistoryError> {
    // Both sides come ordered by id. The first is read as a whole in portions, the second row by row.
    let mut left = Portions { room: before, portion: Vec::new().into_iter(), last: None, done: false };
    let mut waiting = left.next()?;
    let mut failed = None;
    after.each_node(|node| {
        loop {
            let order = waiting.as_ref().map(|left| left.id.as_printed().cmp(node.id.as_printed()));
            match order {
                Some(Ordering::Less) => {
                    if let Some(gone) = waiting.take() {
                        each(Difference::Removed(gone));
                    }
                }
                Some(Ordering::Equal) => {
                    if let Some(before) = waiting.take()
                        && !is_same(&before, &node)
                    {
                        each(Difference::Changed { before, after: node.clone() });
                    }
                }
                Some(Ordering::Greater) | None => {
                    each(Difference::Added(node));
                    return true;
                }
            }
            match left.next() {
                Ok(next) => waiting = next,
                Err(error) => {
                    failed = Some(error);
                    return false;
                }
            }
            if order == Some(Ordering::Equal) {
                return true;
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    while let Some(gone) = waiting {
        each(Difference::Removed(gone));
        waiting = left.next()?;
    }
    Ok(())
}

/// Whether two versions of a node say the same, whatever the order of edges.
fn is_same(one: &Node, other: &Node) -> bool {
    let sorted = |node: &Node| {
        let mut edges = node.edges.clone();
        edges.sort_unstable();
        edges
    };
    one.value == other.value && one.extra == other.extra && sorted(one) == sorted(other)
}

/// Nodes of a room, ordered by id, a portion at a time.
struct Portions<'a> {
    room: &'a PastRoom,
    portion: std::vec::IntoIter<Node>,
    last: Option<genosdb::JsonString>,
    done: bool,
}

impl Portions<'_> {
    fn next(&mut self) -> Result<Option<Node>, HistoryError> {
        if self.portion.len() == 0 && !self.done {
            let portion = self.room.nodes_after(self.last.as_ref())?;
            self.done = portion.is_empty();
            self.last = portion.last().map(|node| node.id.clone());
            self.portion = portion.into_iter();
        }
        Ok(self.portion.next())
    }
}
