//! `homeport rooms`: the rooms of a seed, what is and was in them, and how that changes without a restart.

mod backup;
mod cluster;
mod export;
mod history;
mod import;
mod progress;
mod restore;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use seed_peer::{Bridge, Doubtful, History, RoomStatus, Source, Verification};

use crate::admin::{AdminClient, Request, Response};
use crate::settings::{self, CellsSettings};
use backup::{BackupArgs, BackupsArgs, RestoreBackupArgs};
use export::ExportArgs;
use history::{DiffArgs, LogArgs, ShowArgs};
use import::ImportArgs;
use restore::RestoreArgs;

#[derive(Debug, Args)]
pub(crate) struct RoomsArgs {
    #[command(subcommand)]
    command: RoomsCommand,
    /// The settings file; without it, homeport.toml in this folder, or else /etc/homeport/homeport.toml
    #[arg(long, value_name = "FILE", env = "HOMEPORT_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// The data folder of the running homeport (setting seed.data)
    #[arg(long, value_name = "DIR", env = "HOMEPORT_DATA", global = true)]
    data: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum RoomsCommand {
    /// List the rooms
    List {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show one room; with --at or --query, its nodes as JSON lines
    Show(ShowArgs),
    /// Write a room's nodes and removals out as JSON lines, with their timestamps
    Export(ExportArgs),
    /// Say what differs between two moments of a room
    Diff(DiffArgs),
    /// Show a room's log
    Log(LogArgs),
    /// Take over what an export holds, or nodes of your own, one JSON object a line
    Import(ImportArgs),
    /// Bring a room back to what it was: says what that takes, and does it with --yes
    Restore(RestoreArgs),
    /// Join a room, now and after restarts
    Add {
        /// The database's name
        name: String,
        /// Read the room's password from this file; - is standard input
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// The room is in cells, of about so many peers, as the app's rtc.cells says
        #[arg(long, value_name = "PEERS")]
        cell_size: Option<usize>,
        /// What the seed is to the cells: one, every or off
        #[arg(long, value_name = "WHICH", requires = "cell_size", value_parser = parse_bridge)]
        bridge: Option<Bridge>,
        /// Somebody who rules the room: an address of Ethereum; may be given several times
        #[arg(long, value_name = "ADDRESS")]
        super_admin: Vec<String>,
    },
    /// Leave a room for now; what is archived stays
    Pause {
        /// The database's name
        name: String,
    },
    /// Join a paused room again
    Resume {
        /// The database's name
        name: String,
    },
    /// Check the signature of every logged operation, and name those that do not hold; exit code 1 if there are any
    Verify {
        /// The database's name
        name: String,
    },
    /// Have a room held by another machine of the cluster, from now on and as long as that is there
    Move {
        /// The database's name
        name: String,
        /// What the machine is called (cluster.name)
        #[arg(required_unless_present = "anywhere")]
        machine: Option<String>,
        /// By any machine: where it is then follows from their names, and changes when machines come and go
        #[arg(long, conflicts_with = "machine")]
        anywhere: bool,
    },
    /// Give all rooms of this archive to a cluster that has none of them yet, while no seed runs here
    ToCluster,
    /// Bring all rooms of the cluster into this archive, while no seed runs here
    FromCluster,
    /// Back the archive up, all rooms of it, now
    Backup(BackupArgs),
    /// List the backups
    Backups(BackupsArgs),
    /// Make the archive anew from a backup, where there is none
    RestoreBackup(RestoreBackupArgs),
    /// Leave a room that was added; what is archived stays, and is there again when the room is
    Remove {
        /// The database's name
        name: String,
    },
}

fn parse_bridge(text: &str) -> Result<Bridge, String> {
    match text {
        "one" => Ok(Bridge::One),
        "every" => Ok(Bridge::Every),
        "off" => Ok(Bridge::Off),
        _ => Err("it is one, every or off".into()),
    }
}

/// Does what the command line says.
pub(crate) fn run(args: RoomsArgs) -> anyhow::Result<()> {
    let settings = settings::load(args.config.as_deref(), args.data.as_deref(), &[])?;
    let data = &settings.seed.data;
    let list = || match AdminClient::connect(data)?.ask(&Request::List)? {
        Response::Rooms { rooms } => Ok(rooms),
        other => bail!("an answer to something else: {other:?}"),
    };
    let request = match args.command {
        RoomsCommand::List { json: true } => {
            println!("{}", serde_json::to_string_pretty(&list()?)?);
            return Ok(());
        }
        RoomsCommand::List { json: false } => {
            print!("{}", table(&list()?));
            return Ok(());
        }
        RoomsCommand::Show(args) if args.is_of_nodes() => return history::show(data, &args),
        RoomsCommand::Show(args) => {
            let rooms = list()?;
            let room = rooms.iter().find(|room| room.name == args.name).context("there is no such room")?;
            print!("{}", details(room));
            return Ok(());
        }
        RoomsCommand::Export(args) => return export::export(data, &args),
        RoomsCommand::Diff(args) => return history::diff(data, &args),
        RoomsCommand::Log(args) => return history::log(data, &args),
        RoomsCommand::Backup(args) => return backup::backup(&settings.seed, &args),
        RoomsCommand::Backups(args) => return backup::list(&settings.seed, &args),
        RoomsCommand::RestoreBackup(args) => return backup::restore(&settings.seed, &args),
        RoomsCommand::Import(args) => return import::import(data, &args),
        RoomsCommand::Restore(args) => return restore::restore(data, &args),
        RoomsCommand::Verify { name } => return verify(data, &name),
        RoomsCommand::Add { name, password_file, cell_size, bridge, super_admin } => {
            let password = password_file.as_ref().map(read_password).transpose()?.unwrap_or_default();
            let cells = cell_size.map(|cell_size| CellsSettings { cell_size, bridge: bridge.unwrap_or_default() });
            Request::Add { name, password, cells, super_admins: super_admin }
        }
        RoomsCommand::ToCluster => return cluster::transfer(&settings, cluster::Way::To),
        RoomsCommand::FromCluster => return cluster::transfer(&settings, cluster::Way::From),
        RoomsCommand::Move { name, machine, .. } => Request::Move { name, machine },
        RoomsCommand::Pause { name } => Request::Pause { name },
        RoomsCommand::Resume { name } => Request::Resume { name },
        RoomsCommand::Remove { name } => Request::Remove { name },
    };
    AdminClient::connect(data)?.ask(&request).map(drop)
}

/// The time of day, ms since the Unix epoch.
pub(crate) fn wall_ms() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A time of day as people and programs read it (RFC 3339).
fn printed_ms(ms: u64) -> String {
    humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms)).to_string()
}

/// Checks a room's log in the archive itself, whether a homeport runs on it or not.
fn verify(data: &Path, name: &str) -> anyhow::Result<()> {
    let mut doubtful = 0u64;
    let Verification { signed, vouched, unsigned, nodes, authors } =
        History::open(data, name)?.verify(|Doubtful { seq, received_ms, reason }| {
            doubtful += 1;
            println!("operation {seq}, accepted at {}: {reason}", printed_ms(received_ms));
        })?;
    println!(
        "{signed} operations hold, {vouched} stand on the word of who sent them, {unsigned} are not signed, \
         {nodes} nodes came with the state of a peer"
    );
    for (author, count) in authors {
        println!("  {author}  {count}");
    }
    if doubtful > 0 {
        bail!("{doubtful} operations do not hold");
    }
    Ok(())
}

/// The first line of a file: on a command line, everybody could read it.
fn read_password(file: &PathBuf) -> anyhow::Result<String> {
    let mut text = String::new();
    if file.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text)?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    let password = text.lines().next().unwrap_or_default();
    if password.is_empty() {
        bail!("{} holds no password", file.display());
    }
    Ok(password.to_owned())
}

fn state(room: &RoomStatus) -> String {
    match (room.paused, room.cells, room.bridged_cells) {
        (true, ..) => "paused".into(),
        (false, ..) if room.elsewhere => format!("held by {}", room.held_by.as_deref().unwrap_or("nobody")),
        (false, Some(cells), Some(bridged)) => format!("{cells} cells, {bridged} bridged"),
        (false, ..) => "full mesh".into(),
    }
}

/// The rooms as a person reads them.
fn table(rooms: &[RoomStatus]) -> String {
    let mut rows = vec![["ROOM", "STATE", "PRESENT", "LINKS", "NODES", "OPERATIONS"].map(str::to_owned)];
    rows.extend(rooms.iter().map(|room| {
        [
            room.name.escape_debug().to_string(),
            state(room),
            room.peers.to_string(),
            room.links.to_string(),
            room.nodes.to_string(),
            room.logged_operations.to_string(),
        ]
    }));
    let widths: Vec<usize> =
        (0..6).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// One room as a person reads it.
fn details(room: &RoomStatus) -> String {
    let source = match room.source {
        Source::Settings => "the settings",
        Source::Added => "homeport rooms add",
    };
    format!(
        "{}\n  from        {source}\n  state       {}\n  present     {}\n  links       {}\n  nodes       {}\n  operations  {}\n",
        room.name.escape_debug(),
        state(room),
        room.peers,
        room.links,
        room.nodes,
        room.logged_operations
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_are_listed_in_columns() {
        let room = |name: &str, cells, paused| RoomStatus {
            name: name.into(),
            source: Source::Settings,
            paused,
            peers: 12,
            links: 24,
            cells,
            bridged_cells: cells.map(|_| 1),
            members_by_cell: Vec::new(),
            held_by: None,
            elsewhere: false,
            nodes: 1_000,
            logged_operations: 20_000,
        };
        let rooms = [room("a", Some(4), false), room("longer\u{1b}[31m", None, false), room("c", None, true)];
        assert_eq!(
            table(&rooms),
            "ROOM              STATE               PRESENT  LINKS  NODES  OPERATIONS\n\
             a                 4 cells, 1 bridged  12       24     1000   20000\n\
             longer\\u{1b}[31m  full mesh           12       24     1000   20000\n\
             c                 paused              12       24     1000   20000\n"
        );
    }
}
