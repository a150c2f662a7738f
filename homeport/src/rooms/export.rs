//! Rooms as files: JSON lines that any program reads, complete and with their timestamps.
//!
//! The first line says what the file is and how much is in it; so a file that was cut off is not taken for whole. Then
//! comes a node a line, as peers send it, and last the removals that are remembered, as `{"removed": id, "timestamp": …}`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use seed_peer::{History, Moment, PastRoom};
use serde::{Deserialize, Serialize};

use super::{printed_ms, progress, wall_ms};

/// The version of the format.
pub(super) const VERSION: u32 = 1;

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// The database's name
    name: String,
    /// As it was then: 2026-11-22T19:30:00Z, "2h ago", now, or a timestamp of the clock (ms.counter)
    #[arg(long, value_name = "TIME", default_value = "now")]
    at: String,
    /// Write to this file, which is there only once it is whole; without it, to standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// The first line of an export.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Header {
    /// Marks the file: `export`.
    pub(super) homeport: String,
    pub(super) version: u32,
    /// The database's name.
    pub(super) room: String,
    /// When the export was made.
    pub(super) made: String,
    pub(super) nodes: u64,
    pub(super) removals: u64,
}

pub(super) fn export(data: &Path, args: &ExportArgs) -> anyhow::Result<()> {
    let moment = Moment::parse(&args.at, wall_ms())?;
    let room = past(data, &args.name, moment)?;
    let Some(path) = &args.output else {
        let mut out = BufWriter::new(std::io::stdout().lock());
        return write(&room, &args.name, &mut out);
    };
    let mut partial = path.clone().into_os_string();
    partial.push(".part");
    let partial = PathBuf::from(partial);
    let file = File::create(&partial).with_context(|| format!("cannot write {}", partial.display()))?;
    let mut out = BufWriter::new(file);
    write(&room, &args.name, &mut out)?;
    out.into_inner()?.sync_all()?;
    std::fs::rename(&partial, path).with_context(|| format!("cannot write {}", path.display()))
}

/// A room as it was, with a bar while that is worked out.
pub(super) fn past(data: &Path, name: &str, moment: Moment) -> anyhow::Result<PastRoom> {
    let history = History::open(data, name)?;
    let bar = progress::bar(history.last_entry()?, "operations");
    let room = history.at(moment, |replayed| bar.set_position(replayed));
    bar.finish_and_clear();
    Ok(room?)
}

fn write(room: &PastRoom, name: &str, out: &mut impl Write) -> anyhow::Result<()> {
    let header = Header {
        homeport: "export".into(),
        version: VERSION,
        room: name.to_owned(),
        made: printed_ms(wall_ms()),
        nodes: room.nodes(),
        removals: room.removals()?,
    };
    writeln!(out, "{}", serde_json::to_string(&header)?)?;
    let bar = progress::bar(header.nodes, "nodes");
    let mut result = Ok(());
    let mut line = String::new();
    room.each_node(|node| {
        line.clear();
        node.print(&mut line);
        line.push('\n');
        result = out.write_all(line.as_bytes());
        bar.inc(1);
        result.is_ok()
    })?;
    result?;
    let mut result = Ok(());
    room.each_removal(|removal| {
        if result.is_ok() {
            let (id, at) = (&removal.id, removal.timestamp);
            result = writeln!(
                out,
                r#"{{"removed":{id},"timestamp":{{"physical":{},"logical":{}}}}}"#,
                at.physical, at.logical
            );
        }
    })?;
    bar.finish_and_clear();
    result?;
    out.flush()?;
    Ok(())
}
