//! `homeport rooms show|diff|log`: what is and was in a room.

use std::io::{BufWriter, IsTerminal as _, Write};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use genosdb::query::Query;
use seed_peer::{Difference, Entry, EntryKind, History, Moment};

use super::{export, printed_ms, wall_ms};

/// How often a followed archive is looked at. SQLite tells no other process that it has changed.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The database's name
    pub(super) name: String,
    /// As it was then: 2026-11-22T19:30:00Z, "2h ago", now, or a timestamp of the clock (ms.counter)
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// Only nodes that match, as in db.map: {"role": "user"}
    #[arg(long, value_name = "JSON")]
    query: Option<String>,
    /// So many nodes at most
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
}

impl ShowArgs {
    /// Whether nodes are asked for, and not how the room is doing.
    pub(super) fn is_of_nodes(&self) -> bool {
        self.at.is_some() || self.query.is_some() || self.limit.is_some()
    }
}

pub(super) fn show(data: &Path, args: &ShowArgs) -> anyhow::Result<()> {
    let query = Query::parse(args.query.as_deref().unwrap_or("{}"))?;
    let moment = Moment::parse(args.at.as_deref().unwrap_or("now"), wall_ms())?;
    let room = export::past(data, &args.name, moment)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut result = Ok(());
    let (mut shown, limit) = (0, args.limit.unwrap_or(u64::MAX));
    if limit > 0 {
        room.find(&query, |node| {
            let mut line = String::new();
            node.print(&mut line);
            result = writeln!(out, "{line}");
            shown += 1;
            result.is_ok() && shown < limit
        })?;
    }
    result?;
    out.flush()?;
    if std::io::stderr().is_terminal() {
        let latest = room.latest().map_or_else(|| "nothing yet".to_owned(), |latest| latest.to_string());
        eprintln!("{shown} of {} nodes, from {} operations, clock {latest}", room.nodes(), room.entries());
    }
    Ok(())
}

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// The database's name
    name: String,
    /// The first moment: 2026-11-22T19:30:00Z, "2h ago", now, or a timestamp of the clock (ms.counter)
    from: String,
    /// The second
    #[arg(default_value = "now")]
    to: String,
    /// As JSON lines, for programs
    #[arg(long)]
    json: bool,
}

pub(super) fn diff(data: &Path, args: &DiffArgs) -> anyhow::Result<()> {
    let now_ms = wall_ms();
    let (from, to) = (Moment::parse(&args.from, now_ms)?, Moment::parse(&args.to, now_ms)?);
    let (before, after) = (export::past(data, &args.name, from)?, export::past(data, &args.name, to)?);
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut result = Ok(());
    seed_peer::diff(&before, &after, |difference| {
        if result.is_ok() {
            let line = if args.json { json_line(&difference) } else { text_line(&difference) };
            result = writeln!(out, "{line}");
        }
    })?;
    result?;
    out.flush()?;
    Ok(())
}

fn printed(node: &genosdb::Node) -> String {
    let mut text = String::new();
    node.print(&mut text);
    text
}

fn json_line(difference: &Difference) -> String {
    match difference {
        Difference::Added(node) => format!(r#"{{"added":{}}}"#, printed(node)),
        Difference::Removed(node) => format!(r#"{{"removed":{}}}"#, printed(node)),
        Difference::Changed { before, after } => {
            format!(r#"{{"changed":{},"before":{}}}"#, printed(after), printed(before))
        }
    }
}

fn text_line(difference: &Difference) -> String {
    let value = |node: &genosdb::Node| node.value.as_ref().map_or("nothing".to_owned(), ToString::to_string);
    let edges = |node: &genosdb::Node| node.edges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let line = match difference {
        Difference::Added(node) => format!("+ {} {} [{}]", node.id, value(node), edges(node)),
        Difference::Removed(node) => format!("- {} {} [{}]", node.id, value(node), edges(node)),
        Difference::Changed { before, after } if before.value == after.value => {
            format!("~ {} {} [{}] -> [{}]", after.id, value(after), edges(before), edges(after))
        }
        Difference::Changed { before, after } => {
            format!("~ {} {} -> {} [{}]", after.id, value(before), value(after), edges(after))
        }
    };
    shown(&line)
}

/// A text that a terminal does not take for commands.
fn shown(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_debug().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// The database's name
    name: String,
    /// The last so many operations
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    last: u64,
    /// From this operation on, instead of the last few
    #[arg(long, value_name = "NUMBER")]
    from: Option<u64>,
    /// Go on showing what comes, until Ctrl-C
    #[arg(long)]
    follow: bool,
    /// As JSON lines, with the whole operations
    #[arg(long)]
    json: bool,
}

pub(super) fn log(data: &Path, args: &LogArgs) -> anyhow::Result<()> {
    let history = History::open(data, &args.name)?;
    let mut next = match args.from {
        Some(from) => from,
        None => history.last_entry()?.saturating_sub(args.last) + 1,
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    loop {
        let version = history.version()?;
        let mut result = Ok(());
        history.entries(next, u64::MAX, |entry| {
            next = entry.seq + 1;
            result = writeln!(out, "{}", if args.json { json_entry(&entry) } else { text_entry(&entry) });
            result.is_ok()
        })?;
        result?;
        out.flush()?;
        if !args.follow {
            return Ok(());
        }
        while history.version()? == version {
            std::thread::sleep(FOLLOW_INTERVAL);
        }
    }
}

fn text_entry(entry: &Entry) -> String {
    let (what, id) = match entry.summary() {
        Some((what, id, _)) => (what, id.to_string()),
        None => ("unreadable", String::new()),
    };
    let by = entry.author().map(|author| format!("  {author}")).unwrap_or_default();
    shown(&format!("{:>8}  {}  {what:<7} {id}{by}", entry.seq, printed_ms(entry.received_ms)))
}

fn json_entry(entry: &Entry) -> String {
    let kind = match entry.kind {
        EntryKind::Operation => "operation",
        EntryKind::Node => "node",
    };
    let vouched = entry.vouched.as_deref().map(|address| format!(r#","vouched":"{address}""#)).unwrap_or_default();
    format!(
        r#"{{"seq":{},"received":"{}","{kind}":{}{vouched}}}"#,
        entry.seq,
        printed_ms(entry.received_ms),
        entry.text
    )
}
