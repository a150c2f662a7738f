//! `homeport rooms restore`: a room as it was, by new operations that its peers follow.

use std::path::Path;

use clap::Args;
use seed_peer::{Moment, Restoration, restoration};

use super::{export, import, printed_ms, wall_ms};
use crate::admin::AdminClient;

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The database's name
    name: String,
    /// The moment: 2026-11-22T19:30:00Z, "2h ago", or a timestamp of the clock (ms.counter)
    #[arg(long, value_name = "TIME")]
    at: String,
    /// Do it; without this, only what would be done is said
    #[arg(long)]
    yes: bool,
}

pub(super) fn restore(data: &Path, args: &RestoreArgs) -> anyhow::Result<()> {
    let now_ms = wall_ms();
    let then = export::past(data, &args.name, Moment::parse(&args.at, now_ms)?)?;
    let now = export::past(data, &args.name, Moment::Now)?;
    let Restoration { edits, removed, brought_back, changed, without_value, lost_edges } = restoration(&now, &then)?;
    println!("then {} nodes, now {}", then.nodes(), now.nodes());
    println!(
        "  {brought_back} nodes are brought back, {changed} get their value and edges back, {removed} are removed"
    );
    if without_value > 0 {
        println!("  {without_value} had no value at all: they come back with null");
    }
    if lost_edges > 0 {
        println!("  {lost_edges} edges led to nodes that are gone for good: those stay away");
    }
    if edits.is_empty() {
        println!("nothing is to be done");
        return Ok(());
    }
    if !args.yes {
        println!("{} operations would be written; add --yes to write them", edits.len());
        return Ok(());
    }
    // A long reading transaction would keep the archive's write-ahead log from getting shorter.
    drop((then, now));
    let written = import::write(&mut AdminClient::connect(data)?, &args.name, edits)?;
    println!("{} operations were written, and peers follow", written.applied);
    println!("to undo it: homeport rooms restore {} --at {}", shell_word(&args.name), printed_ms(now_ms));
    Ok(())
}

/// A word as a shell takes it.
fn shell_word(text: &str) -> String {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "-_./".contains(character);
    if text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}
