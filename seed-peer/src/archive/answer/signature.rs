//! Signing answers that are too large to be held: their text is read from disk as it is signed (wire §6).

use std::ops::Range;

use genosdb::Hlc;
use genosdb::json::{Json, JsonString, Order, sorted_place};
use genosdb::signature::Identity;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::graph::{RoomState, signed};
use super::{for_each_operation, print_node};

/// The members that sign the delta of some log entries, each behind a comma; nothing without an identity.
pub(super) fn of_delta(
    connection: &Connection,
    room: &RoomState,
    entries: Range<u64>,
    identity: Option<&Identity>,
) -> rusqlite::Result<String> {
    sign(identity, |origin, write| {
        write(r#"{"operations":["#);
        let mut select = connection
            .prepare_cached("SELECT kind, operation FROM log WHERE room = ? AND seq >= ? AND seq < ? ORDER BY seq")?;
        let mut rows = select.query(params![room.id, signed(entries.start), signed(entries.end)])?;
        let mut first = true;
        while let Some(row) = rows.next()? {
            for_each_operation(row.get(0)?, row.get_ref(1)?.as_str()?, |operation| {
                if !std::mem::take(&mut first) {
                    write(",");
                }
                write(sorted(operation).as_str());
            });
        }
        write(&format!(r#"],{origin},"timestamp":{},"type":"deltaSync"}}"#, timestamp(room.latest)));
        Ok(())
    })
}

/// The members that sign the full state of a room, each behind a comma; nothing without an identity.
pub(super) fn of_full_state(
    connection: &Connection,
    room: &RoomState,
    identity: Option<&Identity>,
) -> rusqlite::Result<String> {
    if identity.is_none() {
        return Ok(String::new());
    }
    let ids = ids_out_of_order(connection, room.id)?;
    sign(identity, |origin, write| {
        write(r#"{"graphData":{"#);
        let mut first = true;
        let mut print = |id: &JsonString, row: &rusqlite::Row<'_>| {
            if !std::mem::take(&mut first) {
                write(",");
            }
            let mut text = String::new();
            print_node(id, row, |part| text.push_str(part))?;
            write(&format!("{id}:"));
            write(sorted(&text).as_str());
            Ok::<_, rusqlite::Error>(())
        };
        match &ids {
            None => {
                let mut select = connection.prepare_cached(
                    "SELECT id, value, edges, extra, physical, logical FROM node WHERE room = ? ORDER BY id",
                )?;
                let mut rows = select.query([room.id])?;
                while let Some(row) = rows.next()? {
                    print(&JsonString::from_printed(row.get(0)?), row)?;
                }
            }
            Some(ids) => {
                let mut select = connection.prepare_cached(
                    "SELECT id, value, edges, extra, physical, logical FROM node WHERE room = ? AND id = ?",
                )?;
                for id in ids {
                    select.query_row(params![room.id, id.as_printed()], |row| print(id, row)).optional()?;
                }
            }
        }
        write(&format!(r#"}},{origin},"removals":["#));
        let mut select =
            connection.prepare_cached("SELECT id, physical, logical FROM tombstone WHERE room = ? ORDER BY id")?;
        let mut rows = select.query([room.id])?;
        let mut first = true;
        while let Some(row) = rows.next()? {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            let id = JsonString::from_printed(row.get(0)?);
            let (physical, logical): (i64, i64) = (row.get(1)?, row.get(2)?);
            write(&format!(r#"{comma}{{"id":{id},"timestamp":{{"logical":{logical},"physical":{physical}}}}}"#));
        }
        write(&format!(r#"],"timestamp":{},"type":"fullStateSync"}}"#, timestamp(room.latest)));
        Ok(())
    })
}

type Write<'a> = &'a mut dyn FnMut(&str);

fn sign(
    identity: Option<&Identity>,
    text: impl Fn(&str, Write<'_>) -> rusqlite::Result<()>,
) -> rusqlite::Result<String> {
    let Some(identity) = identity else { return Ok(String::new()) };
    let origin = format!(r#""originUser":"{}""#, identity.address());
    let members = identity.sign_text(|write| text(&origin, write))?;
    Ok(format!(",{origin},{members}"))
}

/// The ids of a room's nodes as JavaScript sorts keys, when the archive's own order is another: index-like ones, and
/// those with characters that UTF-16 or an escape puts elsewhere than UTF-8.
fn ids_out_of_order(connection: &Connection, room: i64) -> rusqlite::Result<Option<Vec<JsonString>>> {
    let differs: bool = connection
        .prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM node WHERE room = ?1 AND (id GLOB ?2 OR id NOT GLOB '*[^0-9]*'))",
        )?
        .query_row(params![room, "*[\\\u{e000}-\u{10ffff}]*"], |row| row.get(0))?;
    if !differs {
        return Ok(None);
    }
    let mut select = connection.prepare_cached("SELECT id FROM node WHERE room = ?")?;
    let rows = select.query_map([room], |row| Ok(JsonString::from_printed(row.get(0)?)))?;
    let mut ids: Vec<JsonString> = rows.collect::<Result<_, _>>()?;
    ids.sort_by_cached_key(sorted_place);
    Ok(Some(ids))
}

/// JSON with the members of every object sorted. What is in the archive was parsed before.
fn sorted(text: &str) -> Json {
    Json::parse_in(text, Order::Sorted).unwrap_or_else(|_| Json::from_printed(text.to_owned()))
}

fn timestamp(latest: Option<Hlc>) -> String {
    match latest {
        Some(Hlc { physical, logical }) => format!(r#"{{"logical":{logical},"physical":{physical}}}"#),
        None => "null".into(),
    }
}
