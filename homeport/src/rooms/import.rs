//! `homeport rooms import`: what an export holds, or nodes that somebody wrote down, one JSON object a line.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use genosdb::json::{self, Json, JsonString, Members};
use genosdb::{Node, Removal};
use seed_peer::{Edit, Imported, Written};

use super::export::{Header, VERSION};
use super::progress;
use crate::admin::{AdminClient, Request, Response};

/// Nodes that are sent at a time, and bytes of them.
const BATCH: usize = 1_000;
const BATCH_BYTES: usize = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// The database's name
    name: String,
    /// An export, also of another room; or lines of {"id": …, "value": …, "edges": […]}
    file: PathBuf,
}

/// A line of the file.
enum Line {
    Header(Header),
    /// With its timestamp: it is taken over as it is.
    Node(String),
    Removal(String),
    /// Without one: it is written anew.
    New(Vec<Edit>),
}

pub(super) fn import(data: &Path, args: &ImportArgs) -> anyhow::Result<()> {
    // All of it is read before any of it is taken.
    let lines = check(&args.file)?;
    let mut client = AdminClient::connect(data)?;
    let bar = progress::bar(lines, "lines");
    let mut batch = Batch::default();
    let mut total = Totals::default();
    // Removals come last, whatever their place: a node that was made again keeps the edges to it.
    for removals in [false, true] {
        each_line(&args.file, |line| {
            match line {
                Line::Header(_) => {}
                Line::Removal(text) if removals => batch.removals.push(text),
                Line::Node(text) if !removals => batch.nodes.push(text),
                Line::New(edits) if !removals => batch.edits.extend(edits),
                Line::Removal(_) | Line::Node(_) | Line::New(_) => return Ok(()),
            }
            bar.inc(1);
            if batch.is_full() { batch.send(&mut client, &args.name, &mut total) } else { Ok(()) }
        })?;
        batch.send(&mut client, &args.name, &mut total)?;
    }
    bar.finish_and_clear();
    if total.imported.applied > 0 {
        client.ask(&Request::Tell { name: args.name.clone() })?;
    }
    let Totals { imported, written } = total;
    println!("{} nodes and removals were taken over, {} operations written", imported.applied, written.applied);
    if imported.left_out > 0 {
        bail!("{} were left out: they are beyond the bounds, or the seed may not write them", imported.left_out);
    }
    Ok(())
}

#[derive(Default)]
struct Totals {
    imported: Imported,
    written: Written,
}

/// What is sent together.
#[derive(Default)]
struct Batch {
    nodes: Vec<String>,
    removals: Vec<String>,
    edits: Vec<Edit>,
}

impl Batch {
    fn is_full(&self) -> bool {
        let bytes: usize = self.nodes.iter().map(String::len).sum();
        self.nodes.len().max(self.removals.len()).max(self.edits.len()) >= BATCH || bytes >= BATCH_BYTES
    }

    fn send(&mut self, client: &mut AdminClient, name: &str, total: &mut Totals) -> anyhow::Result<()> {
        let Self { nodes, removals, edits } = std::mem::take(self);
        if !nodes.is_empty() || !removals.is_empty() {
            match client.ask(&Request::Import { name: name.to_owned(), nodes, removals })? {
                Response::Imported(imported) => {
                    total.imported.applied += imported.applied;
                    total.imported.left_out += imported.left_out;
                }
                other => bail!("an answer to something else: {other:?}"),
            }
        }
        total.written.applied += write(client, name, edits)?.applied;
        Ok(())
    }
}

/// Writes edits, not too many at a time.
pub(super) fn write(client: &mut AdminClient, name: &str, edits: Vec<Edit>) -> anyhow::Result<Written> {
    let mut total = Written::default();
    let mut edits = edits.into_iter().peekable();
    while edits.peek().is_some() {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(edit) = edits.next_if(|_| batch.len() < BATCH && bytes < BATCH_BYTES) {
            bytes += match &edit {
                Edit::Upsert { value, .. } => value.as_str().len(),
                Edit::Remove { .. } | Edit::Link { .. } => 0,
            };
            batch.push(edit);
        }
        match client.ask(&Request::Edit { name: name.to_owned(), edits: batch })? {
            Response::Written(written) => {
                total.applied += written.applied;
                total.without_effect += written.without_effect;
            }
            other => bail!("an answer to something else: {other:?}"),
        }
    }
    Ok(total)
}

/// Reads a file through: whether it is whole, and every line of it what it should be. Returns how many there are.
fn check(path: &Path) -> anyhow::Result<u64> {
    let (mut lines, mut nodes, mut removals) = (0, 0, 0);
    let mut expected = None;
    each_line(path, |line| {
        lines += 1;
        match line {
            Line::Header(header) if lines == 1 => {
                if header.homeport != "export" || header.version > VERSION {
                    bail!("an export of a newer homeport, of version {}", header.version);
                }
                expected = Some(header);
            }
            Line::Header(_) => bail!("a second header"),
            Line::Node(_) => nodes += 1,
            Line::Removal(_) => removals += 1,
            Line::New(_) => {}
        }
        Ok(())
    })?;
    if let Some(header) = expected
        && (header.nodes, header.removals) != (nodes, removals)
    {
        bail!(
            "{} is not whole: it should hold {} nodes and {} removals, and holds {nodes} and {removals}",
            path.display(),
            header.nodes,
            header.removals
        );
    }
    Ok(lines)
}

fn each_line(path: &Path, mut each: impl FnMut(Line) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        if !line.trim().is_empty() {
            let place = || format!("{}, line {}", path.display(), index + 1);
            each(parse(&line).with_context(place)?).with_context(place)?;
        }
    }
    Ok(())
}

fn parse(line: &str) -> anyhow::Result<Line> {
    let mut members = Members::parse(line)?;
    if members.take("homeport").is_some() {
        return Ok(Line::Header(serde_json::from_str(line)?));
    }
    let timestamp = members.take("timestamp");
    if let Some(id) = members.take("removed") {
        let text = format!(r#"{{"id":{id},"timestamp":{}}}"#, timestamp.context("a removal without a timestamp")?);
        Removal::parse(&text)?;
        return Ok(Line::Removal(text));
    }
    if timestamp.is_some() {
        Node::parse(line)?;
        return Ok(Line::Node(line.to_owned()));
    }
    let id: JsonString = json::string(members.take("id").context("a node without an id")?)?;
    let value = Json::parse(members.take("value").context("a node without a value")?)?;
    let mut edits = vec![Edit::Upsert { id: id.clone(), value }];
    for target in members.take("edges").map(json::elements).transpose()?.unwrap_or_default() {
        edits.push(Edit::Link { source: id.clone(), target: json::string(target)? });
    }
    Ok(Line::New(edits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_and_understood_or_nothing_of_it_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("room.jsonl");
        let header = r#"{"homeport":"export","version":1,"room":"a","made":"","nodes":1,"removals":1}"#;
        let node = r#"{"id":"a","value":1,"edges":[],"timestamp":{"physical":5,"logical":1}}"#;
        let removal = r#"{"removed":"b","timestamp":{"physical":5,"logical":1}}"#;
        for (lines, expected) in [
            (vec![header, node, removal], Ok(3)),
            (vec![node, removal, ""], Ok(2)),
            (vec![r#"{"id":"a","value":1}"#, r#"{"id":"b","value":{},"edges":["a"]}"#], Ok(2)),
            (vec![header, node], Err("is not whole: it should hold 1 nodes and 1 removals, and holds 1 and 0")),
            (vec![header, node, removal, header], Err("a second header")),
            (vec![&header.replace(":1,", ":2,").as_str()], Err("of a newer homeport")),
            (vec![node, "{"], Err("line 2")),
            (vec![r#"{"value":1}"#], Err("a node without an id")),
            (vec![r#"{"id":"a"}"#], Err("a node without a value")),
            (vec![r#"{"removed":"a"}"#], Err("a removal without a timestamp")),
        ] {
            std::fs::write(&path, lines.join("\n")).unwrap();
            match (check(&path), expected) {
                (Ok(lines), Ok(expected)) => assert_eq!(lines, expected),
                (Err(error), Err(expected)) => {
                    let error = format!("{error:#}");
                    assert!(error.contains(expected), "{error}");
                }
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        }
    }
}
