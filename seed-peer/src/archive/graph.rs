//! One room's graph in the archive, as the merge rules see it.

use genosdb::json::{self, Json, JsonString};
use genosdb::operation::{Extra, Node};
use genosdb::{Hlc, Store};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

/// What the archive keeps of a room in memory: the row of `room`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoomState {
    pub(crate) id: i64,
    pub(crate) nodes: u64,
    /// Bytes of all nodes: ids, values, edges and unknown members.
    pub(crate) bytes: u64,
    pub(crate) seq: u64,
    pub(crate) latest: Option<Hlc>,
}

impl RoomState {
    /// Some of a node's bytes were exchanged for others.
    fn resize(&mut self, before: u64, after: u64) {
        self.bytes = (self.bytes + after).saturating_sub(before);
    }

    /// Takes note of a timestamp.
    pub(crate) fn see(&mut self, timestamp: Hlc) {
        self.latest = self.latest.max(Some(timestamp));
    }
}

/// A room's tables, inside a transaction.
pub(crate) struct RoomGraph<'a> {
    pub(crate) connection: &'a Connection,
    pub(crate) state: &'a mut RoomState,
}

/// Bytes of one node, as [`RoomState::bytes`] counts them.
const NODE_BYTES: &str = "SELECT octet_length(id) + coalesce(octet_length(value), 0) + octet_length(edges) \
    + octet_length(extra) FROM node WHERE room = ? AND id = ?";

fn length(text: &str) -> u64 {
    u64::try_from(text.len()).unwrap_or(u64::MAX)
}

/// SQLite's integers are signed; timestamps and counters are at most 2^53.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(crate) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

impl RoomGraph<'_> {
    fn timestamp_in(&self, sql: &str, id: &JsonString) -> rusqlite::Result<Option<Hlc>> {
        self.connection
            .prepare_cached(sql)?
            .query_row(params![self.state.id, id.as_printed()], |row| {
                Ok(Hlc::new(unsigned(row.get(0)?), unsigned(row.get(1)?)))
            })
            .optional()
    }

    /// Bytes of a node's edges, as they are stored.
    pub(crate) fn edges_bytes(&self, id: &JsonString) -> rusqlite::Result<usize> {
        let bytes: Option<i64> = self
            .connection
            .prepare_cached("SELECT octet_length(edges) FROM node WHERE room = ? AND id = ?")?
            .query_row(params![self.state.id, id.as_printed()], |row| row.get(0))
            .optional()?;
        Ok(usize::try_from(bytes.unwrap_or(0)).unwrap_or(usize::MAX))
    }

    /// Bytes of a node, if it is there.
    fn node_bytes(&self, id: &str) -> rusqlite::Result<Option<u64>> {
        self.connection
            .prepare_cached(NODE_BYTES)?
            .query_row(params![self.state.id, id], |row| Ok(unsigned(row.get(0)?)))
            .optional()
    }

    fn edges_of(&self, id: &str) -> rusqlite::Result<Vec<JsonString>> {
        let text: Option<String> = self
            .connection
            .prepare_cached("SELECT edges FROM node WHERE room = ? AND id = ?")?
            .query_row(params![self.state.id, id], |row| row.get(0))
            .optional()?;
        Ok(text.as_deref().map(parse_edges).unwrap_or_default())
    }

    fn write_edges(&mut self, id: &str, before: &[JsonString], edges: &[JsonString]) -> rusqlite::Result<()> {
        let text = print_edges(edges);
        self.state.resize(length(&print_edges(before)), length(&text));
        self.connection.prepare_cached("UPDATE node SET edges = ? WHERE room = ? AND id = ?")?.execute(params![
            text,
            self.state.id,
            id
        ])?;
        Ok(())
    }

    /// The nodes with an edge to `target`.
    fn sources_of(&self, target: &str) -> rusqlite::Result<Vec<String>> {
        self.connection
            .prepare_cached("SELECT source FROM edge WHERE room = ? AND target = ?")?
            .query_map(params![self.state.id, target], |row| row.get(0))?
            .collect()
    }

    fn drop_edge(&mut self, source: &str, target: &JsonString) -> rusqlite::Result<()> {
        let before = self.edges_of(source)?;
        let edges: Vec<JsonString> = before.iter().filter(|other| *other != target).cloned().collect();
        self.write_edges(source, &before, &edges)?;
        self.connection
            .prepare_cached("DELETE FROM edge WHERE room = ? AND target = ? AND source = ?")?
            .execute(params![self.state.id, target.as_printed(), source])?;
        Ok(())
    }

    fn forget_edges_from(&self, id: &str) -> rusqlite::Result<()> {
        let mut delete =
            self.connection.prepare_cached("DELETE FROM edge WHERE room = ? AND target = ? AND source = ?")?;
        for target in self.edges_of(id)? {
            delete.execute(params![self.state.id, target.as_printed(), id])?;
        }
        Ok(())
    }
}

/// The ids of an `edges` column, which this module printed.
pub(crate) fn parse_edges(text: &str) -> Vec<JsonString> {
    let elements = json::elements(text).unwrap_or_default();
    elements.into_iter().filter_map(|element| json::string(element).ok()).collect()
}

fn print_edges(edges: &[JsonString]) -> String {
    let printed: Vec<String> = edges.iter().map(JsonString::to_string).collect();
    format!("[{}]", printed.join(","))
}

fn print_extra(node: &Node) -> String {
    let printed: Vec<String> = node.extra.iter().map(|(name, value)| format!("{name}:{value}")).collect();
    printed.join(",")
}

/// Reads a node from a row of its id, value, edges, unknown members and timestamp.
pub(crate) fn read_node(row: &Row<'_>) -> rusqlite::Result<Node> {
    Ok(Node {
        id: JsonString::from_printed(row.get(0)?),
        value: row.get::<_, Option<String>>(1)?.map(Json::from_printed),
        edges: parse_edges(row.get_ref(2)?.as_str()?),
        timestamp: Hlc::new(unsigned(row.get(4)?), unsigned(row.get(5)?)),
        extra: parse_extra(row.get_ref(3)?.as_str()?),
    })
}

/// The members of an `extra` column, which [`print_extra`] printed.
fn parse_extra(text: &str) -> Extra {
    if text.is_empty() {
        return Vec::new();
    }
    json::Members::parse(&format!("{{{text}}}")).and_then(json::Members::rest).unwrap_or_default()
}

impl Store for RoomGraph<'_> {
    type Error = rusqlite::Error;

    fn timestamp(&mut self, id: &JsonString) -> rusqlite::Result<Option<Hlc>> {
        self.timestamp_in("SELECT physical, logical FROM node WHERE room = ? AND id = ?", id)
    }

    fn removed(&mut self, id: &JsonString) -> rusqlite::Result<Option<Hlc>> {
        self.timestamp_in("SELECT physical, logical FROM tombstone WHERE room = ? AND id = ?", id)
    }

    fn has_edge(&mut self, source: &JsonString, target: &JsonString) -> rusqlite::Result<bool> {
        self.connection
            .prepare_cached("SELECT 1 FROM edge WHERE room = ? AND target = ? AND source = ?")?
            .exists(params![self.state.id, target.as_printed(), source.as_printed()])
    }

    fn node(&mut self, id: &JsonString) -> rusqlite::Result<Option<Node>> {
        self.connection
            .prepare_cached("SELECT id, value, edges, extra, physical, logical FROM node WHERE room = ? AND id = ?")?
            .query_row(params![self.state.id, id.as_printed()], read_node)
            .optional()
    }

    fn nodes(&mut self) -> rusqlite::Result<u64> {
        Ok(self.state.nodes)
    }

    fn set_value(&mut self, id: &JsonString, value: &Json, timestamp: Hlc) -> rusqlite::Result<()> {
        let id = id.as_printed();
        let before: Option<Option<i64>> = self
            .connection
            .prepare_cached("SELECT octet_length(value) FROM node WHERE room = ? AND id = ?")?
            .query_row(params![self.state.id, id], |row| row.get(0))
            .optional()?;
        let after = length(value.as_str());
        if let Some(before) = before {
            self.connection
                .prepare_cached("UPDATE node SET value = ?, physical = ?, logical = ? WHERE room = ? AND id = ?")?
                .execute(params![
                    value.as_str(),
                    signed(timestamp.physical),
                    signed(timestamp.logical),
                    self.state.id,
                    id
                ])?;
            self.state.resize(before.map_or(0, unsigned), after);
        } else {
            self.connection.prepare_cached("INSERT INTO node VALUES (?, ?, ?, '[]', '', ?, ?)")?.execute(params![
                self.state.id,
                id,
                value.as_str(),
                signed(timestamp.physical),
                signed(timestamp.logical)
            ])?;
            self.state.nodes += 1;
            self.state.resize(0, length(id) + after + length("[]"));
        }
        Ok(())
    }

    fn set_node(&mut self, node: &Node) -> rusqlite::Result<()> {
        let id = node.id.as_printed();
        let before = self.node_bytes(id)?;
        if before.is_some() {
            self.forget_edges_from(id)?;
            self.connection
                .prepare_cached("DELETE FROM node WHERE room = ? AND id = ?")?
                .execute(params![self.state.id, id])?;
        } else {
            self.state.nodes += 1;
        }
        let (value, edges, extra) =
            (node.value.as_ref().map(Json::as_str), print_edges(&node.edges), print_extra(node));
        let after = length(id) + value.map_or(0, length) + length(&edges) + length(&extra);
        self.connection.prepare_cached("INSERT INTO node VALUES (?, ?, ?, ?, ?, ?, ?)")?.execute(params![
            self.state.id,
            id,
            value,
            edges,
            extra,
            signed(node.timestamp.physical),
            signed(node.timestamp.logical)
        ])?;
        self.state.resize(before.unwrap_or(0), after);
        let mut insert = self.connection.prepare_cached("INSERT OR IGNORE INTO edge VALUES (?, ?, ?)")?;
        for target in &node.edges {
            insert.execute(params![self.state.id, target.as_printed(), id])?;
        }
        Ok(())
    }

    fn add_edge(&mut self, source: &JsonString, target: &JsonString, timestamp: Hlc) -> rusqlite::Result<()> {
        let inserted = self
            .connection
            .prepare_cached("INSERT OR IGNORE INTO edge VALUES (?, ?, ?)")?
            .execute(params![self.state.id, target.as_printed(), source.as_printed()])?;
        if inserted > 0 {
            let before = self.edges_of(source.as_printed())?;
            let mut edges = before.clone();
            edges.push(target.clone());
            self.write_edges(source.as_printed(), &before, &edges)?;
        }
        self.touch(source, timestamp)
    }

    fn touch(&mut self, id: &JsonString, timestamp: Hlc) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("UPDATE node SET physical = ?, logical = ? WHERE room = ? AND id = ?")?
            .execute(params![signed(timestamp.physical), signed(timestamp.logical), self.state.id, id.as_printed()])?;
        Ok(())
    }

    fn drop_node(&mut self, id: &JsonString) -> rusqlite::Result<()> {
        let id_text = id.as_printed();
        if let Some(before) = self.node_bytes(id_text)? {
            self.forget_edges_from(id_text)?;
            self.connection
                .prepare_cached("DELETE FROM node WHERE room = ? AND id = ?")?
                .execute(params![self.state.id, id_text])?;
            self.state.nodes -= 1;
            self.state.resize(before, 0);
        }
        for source in self.sources_of(id_text)? {
            self.drop_edge(&source, id)?;
        }
        Ok(())
    }

    fn drop_edges_to(&mut self, id: &JsonString, before: Hlc) -> rusqlite::Result<()> {
        for source in self.sources_of(id.as_printed())? {
            if self.timestamp(&JsonString::from_printed(source.clone()))? < Some(before) {
                self.drop_edge(&source, id)?;
            }
        }
        Ok(())
    }

    fn set_removed(&mut self, id: &JsonString, timestamp: Hlc) -> rusqlite::Result<()> {
        self.connection.prepare_cached("INSERT OR REPLACE INTO tombstone VALUES (?, ?, ?, ?)")?.execute(params![
            self.state.id,
            id.as_printed(),
            signed(timestamp.physical),
            signed(timestamp.logical)
        ])?;
        Ok(())
    }
}
