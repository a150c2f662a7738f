//! What the seed itself writes: for the one who runs it, and by a room's rules.

use genosdb::graph::Outcome;
use genosdb::json::{self, Json, JsonString};
use genosdb::operation::{FullStateSync, Link, Node, Operation, OperationError, Removal, Remove, Upsert};
use genosdb::security::USER_PREFIX;
use genosdb::{ChannelName, Clock, Content, Hlc, Message, Store as _};
use rusqlite::params;
use serde::{Deserialize, Serialize};

use super::graph::{RoomGraph, RoomState};
use super::merging::Word;
use super::replication::CommitError;
use super::writer::Writer;
use super::{Reply, RoomKey, room_rows};
use crate::rooms::RoomError;

/// A change that the seed makes to a room under its own name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "EditText", into = "EditText")]
pub enum Edit {
    /// Set a node's value.
    Upsert {
        /// The node.
        id: JsonString,
        /// Its value.
        value: Json,
    },
    /// Remove a node and the edges to it.
    Remove {
        /// The node.
        id: JsonString,
    },
    /// Add an edge.
    Link {
        /// Where it starts.
        source: JsonString,
        /// Where it ends.
        target: JsonString,
    },
}

/// An edit as it travels: strings as JSON prints them between the quotes, values as JSON text.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EditText {
    Upsert { id: String, value: String },
    Remove { id: String },
    Link { source: String, target: String },
}

/// A text is no edit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an edit: {0}")]
pub struct EditError(#[from] json::JsonError);

impl TryFrom<EditText> for Edit {
    type Error = EditError;

    fn try_from(text: EditText) -> Result<Self, EditError> {
        let string = |text: String| json::string(&format!("\"{text}\""));
        Ok(match text {
            EditText::Upsert { id, value } => Self::Upsert { id: string(id)?, value: Json::parse(&value)? },
            EditText::Remove { id } => Self::Remove { id: string(id)? },
            EditText::Link { source, target } => Self::Link { source: string(source)?, target: string(target)? },
        })
    }
}

impl From<Edit> for EditText {
    fn from(edit: Edit) -> Self {
        let text = |string: JsonString| string.as_printed().to_owned();
        match edit {
            Edit::Upsert { id, value } => Self::Upsert { id: text(id), value: value.as_str().to_owned() },
            Edit::Remove { id } => Self::Remove { id: text(id) },
            Edit::Link { source, target } => Self::Link { source: text(source), target: text(target) },
        }
    }
}

impl Edit {
    /// The edit as an operation.
    pub(crate) fn at(&self, timestamp: Hlc) -> Operation {
        let extra = Vec::new();
        match self.clone() {
            Self::Upsert { id, value } => Operation::Upsert(Upsert { id, value: Some(value), timestamp, extra }),
            Self::Remove { id } => Operation::Remove(Remove { id, value: None, timestamp, extra }),
            Self::Link { source, target } => Operation::Link(Link { source, target, timestamp, extra }),
        }
    }
}

/// What became of edits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Written {
    /// Operations that changed the room.
    pub applied: u64,
    /// Edits that changed nothing: their node was not there.
    pub without_effect: u64,
}

/// What became of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Imported {
    /// Nodes and removals that were taken over.
    pub applied: u64,
    /// Those that were not, although they were news: beyond the bounds, or not permitted to the seed.
    pub left_out: u64,
}

/// The seed cannot write.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error("the room has super admins, and the seed no identity to sign with (setting seed.identity)")]
    Unsigned,
    #[error("the room's rules do not let the seed's identity do that: give it a role, or name it in super_admins")]
    NotPermitted,
    #[error("beyond the bounds of a room ({0})")]
    TooMuch(&'static str),
    #[error("it cannot be signed: {0}")]
    Sign(#[from] OperationError),
    #[error(transparent)]
    Archive(#[from] rusqlite::Error),
    #[error(transparent)]
    Cluster(#[from] CommitError),
}

impl From<WriteError> for RoomError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Archive(error) => Self::Archive(error.to_string()),
            WriteError::Cluster(error) => Self::Archive(error.to_string()),
            other => Self::NotWritten(other.to_string()),
        }
    }
}

impl Writer {
    /// Writes to a room under the seed's own name, all or nothing, and tells its peers.
    pub(super) fn edit(&mut self, room: RoomKey, edits: &[Edit], wall_ms: u64) -> Result<Written, WriteError> {
        let (written, message) = self.in_transaction(room, |writer, state| {
            let mut clock = Clock::starting_at(state.latest.unwrap_or_default());
            let (mut written, mut text) = (Written::default(), String::from("["));
            for edit in edits {
                let operation = writer.own_operation(state, edit, &mut clock, wall_ms)?;
                if writer.apply(state, &operation, None, wall_ms)? != Outcome::Applied {
                    written.without_effect += 1;
                    continue;
                }
                if written.applied > 0 {
                    text.push(',');
                }
                operation.print(&mut text);
                written.applied += 1;
            }
            text.push(']');
            Ok((written, Message::new(ChannelName::SYNC_GRAPH, Content::Json(text))))
        })?;
        self.metrics.operations.with_label_values(&["applied"]).inc_by(written.applied);
        if written.applied > 0 {
            self.reply(Reply::Wrote { room, message });
        }
        Ok(written)
    }

    /// An edit as an operation of the seed, signed if it has an identity.
    fn own_operation(
        &self,
        state: &mut RoomState,
        edit: &Edit,
        clock: &mut Clock,
        wall_ms: u64,
    ) -> Result<Operation, WriteError> {
        let mut operation = edit.at(clock.now(wall_ms));
        if let Some(reason) = self.too_much(&operation, state)? {
            return Err(WriteError::TooMuch(reason));
        }
        if let Some(security) = self.ruled.get(&RoomKey(state.id)) {
            let identity = self.config.identity.as_ref().ok_or(WriteError::Unsigned)?;
            self.judge(security, state, &operation, Ok(identity.address()), wall_ms)?
                .map_err(|_| WriteError::NotPermitted)?;
        }
        if let Some(identity) = &self.config.identity {
            let signed = identity.sign(&operation.to_string()).map_err(OperationError::from)?;
            operation = Operation::parse(&signed, &mut 0)?;
        }
        Ok(operation)
    }

    /// Takes nodes and removals over as they are, with their timestamps.
    pub(super) fn import(
        &mut self,
        room: RoomKey,
        nodes: Vec<Node>,
        removals: Vec<Removal>,
        wall_ms: u64,
    ) -> Result<Imported, WriteError> {
        let full = FullStateSync { nodes, removals, timestamp: None, extra: Vec::new() };
        self.in_transaction(room, |writer, state| {
            let security = writer.ruled.get(&room).cloned();
            let word = match &security {
                None => Word::Anybodys,
                Some(security) => {
                    let identity = writer.config.identity.as_ref().ok_or(WriteError::Unsigned)?;
                    Word::Of(security, identity.address())
                }
            };
            let merged = writer.merge_state(state, &full, word, wall_ms)?;
            Ok(Imported { applied: merged.applied, left_out: merged.left_out })
        })
    }

    /// Gives and takes roles by a room's rules.
    pub(super) fn govern(&mut self, room: RoomKey, wall_ms: u64) {
        let Some(security) = self.ruled.get(&room).cloned().filter(|security| !security.rules.is_empty()) else {
            return;
        };
        if !self.may_write(room) {
            return;
        }
        let seen = self.rooms.get(&room).map(|state| state.seq);
        if !security.rules.wait() && seen.is_some() && self.governed.get(&room).copied() == seen {
            return;
        }
        let ruled = self
            .rulings(room, &security, wall_ms)
            .map_err(WriteError::from)
            .and_then(|edits| if edits.is_empty() { Ok(Written::default()) } else { self.edit(room, &edits, wall_ms) });
        match ruled {
            Ok(Written { applied, .. }) => {
                self.metrics.rulings.inc_by(applied);
                if applied > 0 {
                    tracing::info!(room = %self.name_of(room), applied, "roles were given or taken by the room's rules");
                }
                if let Some(seen) = seen.filter(|_| applied == 0) {
                    self.governed.insert(room, seen);
                }
            }
            Err(error) => tracing::warn!(room = %self.name_of(room), %error, "a room's rules cannot be applied"),
        }
    }

    fn rulings(
        &self,
        room: RoomKey,
        security: &crate::security::Security,
        wall_ms: u64,
    ) -> rusqlite::Result<Vec<Edit>> {
        let mut state = room_rows::load(&self.file.connection, room)?;
        let mut graph = RoomGraph { connection: &self.file.connection, state: &mut state };
        let mut select = self.file.connection.prepare_cached(
            "SELECT id FROM node WHERE room = ? AND id >= ?2 AND substr(id, 1, length(?2)) = ?2 ORDER BY id",
        )?;
        let mut rows = select.query(params![room.0, USER_PREFIX])?;
        let mut edits = Vec::new();
        while let Some(row) = rows.next()? {
            let id = JsonString::from_printed(row.get(0)?);
            if let Some(node) = graph.node(&id)?
                && let Some(value) = security.rules.ruling(&node, &security.policy, wall_ms)
            {
                edits.push(Edit::Upsert { id, value });
            }
        }
        Ok(edits)
    }

    /// Does something to a room, all of it or nothing.
    fn in_transaction<T>(
        &mut self,
        room: RoomKey,
        work: impl FnOnce(&mut Self, &mut RoomState) -> Result<T, WriteError>,
    ) -> Result<T, WriteError> {
        if !self.may_write(room) {
            return Err(CommitError::NotHeld.into());
        }
        self.file.connection.execute_batch("BEGIN IMMEDIATE")?;
        let done = room_rows::load(&self.file.connection, room).map_err(WriteError::from).and_then(|before| {
            let mut state = before.clone();
            let result = work(self, &mut state)?;
            room_rows::save(&self.file.connection, &state)?;
            let shipped = self.ship(&[(room, before.seq)])?;
            self.file.connection.execute_batch("COMMIT")?;
            self.shipped(shipped);
            Ok((result, before, state))
        });
        match done {
            Ok((result, before, state)) => {
                if let Some(latest) = state.latest.filter(|_| state.latest != before.latest) {
                    self.reply(Reply::Latest { room, latest });
                }
                self.committed(state);
                Ok(result)
            }
            Err(error) => {
                self.roll_back();
                if let WriteError::Cluster(CommitError::Behind(_)) = error
                    && let Err(error) = self.catch_up(room)
                {
                    tracing::debug!(%error, "the room's stream cannot be read");
                }
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_travel_as_text() {
        let edits = [
            Edit::Upsert { id: JsonString::new("a\"b"), value: Json::parse(r#"{"x":"\ud800","n":1.50}"#).unwrap() },
            Edit::Remove { id: json::string(r#""\ud800""#).unwrap() },
            Edit::Link { source: JsonString::new("ä"), target: JsonString::new("") },
        ];
        let text = serde_json::to_string(&edits).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Edit>>(&text).unwrap(), edits);
        assert!(serde_json::from_str::<Edit>(r#"{"upsert":{"id":"a","value":"{"}}"#).is_err());
        assert!(serde_json::from_str::<Edit>(r#"{"remove":{"id":"a\"b"}}"#).is_err());
    }
}
