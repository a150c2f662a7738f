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
    compare(before, after, |left, right| match (left, right) {
        (None, Some(node)) => each(Difference::Added(node)),
        (Some(node), None) => each(Difference::Removed(node)),
        (Some(before), Some(after)) if !is_same(&before, &after) => each(Difference::Changed { before, after }),
        (Some(_), Some(_)) | (None, None) => {}
    })
}

/// Hands out the nodes that are not the same in every respect, as they are in one room and in the other, ordered by id.
pub(super) fn compare(
    before: &PastRoom,
    after: &PastRoom,
    mut each: impl FnMut(Option<Node>, Option<Node>),
) -> Result<(), HistoryError> {
    let mut left = Portions { room: before, portion: Vec::new().into_iter(), last: None, done: false };
    let mut right = Portions { room: after, portion: Vec::new().into_iter(), last: None, done: false };
    let (mut one, mut other) = (left.next()?, right.next()?);
    loop {
        let order = match (&one, &other) {
            (None, None) => return Ok(()),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(one), Some(other)) => one.id.as_printed().cmp(other.id.as_printed()),
        };
        match order {
            Ordering::Less => each(std::mem::replace(&mut one, left.next()?), None),
            Ordering::Greater => each(None, std::mem::replace(&mut other, right.next()?)),
            Ordering::Equal => {
                let pair = (std::mem::replace(&mut one, left.next()?), std::mem::replace(&mut other, right.next()?));
                if pair.0 != pair.1 {
                    each(pair.0, pair.1);
                }
            }
        }
    }
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
