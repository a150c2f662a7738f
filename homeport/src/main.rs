//! Homeport: the always-on half of browser peer-to-peer apps.

mod acme;
mod admin;
mod check;
mod client_config;
mod coturn;
mod data_folder;
mod healthcheck;
mod init;
mod link_checks;
mod logging;
mod private_file;
mod probe;
mod reports;
mod rooms;
mod run;
mod service_manager;
mod settings;
mod status;
mod summary;
mod turn_credentials;
mod turn_secret;
mod turn_servers;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand};

/// The always-on half of browser peer-to-peer apps: a relay to meet at, a TURN server to get through, a seed peer
/// that remembers.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a first homeport.toml, with secrets made up, and say what to do next
    Init(init::InitArgs),
    /// Run relay, TURN server and seed peer in one process; needs no settings
    Up(RunArgs),
    /// Run the Nostr relay alone
    Relay(RunArgs),
    /// Run the STUN and TURN server alone, or take over the settings of another
    Turn(TurnArgs),
    /// Run the seed peer alone, through the relays of seed.relays
    Seed(RunArgs),
    /// See and change the rooms of the homeport that runs on this machine, without a restart
    Rooms(rooms::RoomsArgs),
    /// Look whether the archive and its backups are what they should be, beside a running homeport
    Check(check::CheckArgs),
    /// Print the completions of a shell, to be put where it looks for them
    Completions { shell: clap_complete::Shell },
    /// Write the manual's pages into a folder
    #[command(hide = true)]
    Manual { folder: PathBuf },
    /// Ask a running homeport on this machine how it is; exit code 0 when it answers, for containers
    Healthcheck(HealthcheckArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The settings file; without it, homeport.toml in this folder, or else /etc/homeport/homeport.toml
    #[arg(long, value_name = "FILE", env = "HOMEPORT_CONFIG")]
    config: Option<PathBuf>,
    /// The folder for the archive (setting seed.data)
    #[arg(long, value_name = "DIR", env = "HOMEPORT_DATA")]
    data: Option<PathBuf>,
    /// A room to stay in: the name of a database; may be given several times, and adds to the settings
    #[arg(long = "room", value_name = "NAME")]
    rooms: Vec<String>,
    /// Log more: -v what happens, -vv everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
struct TurnArgs {
    #[command(subcommand)]
    command: Option<TurnCommand>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum TurnCommand {
    /// Print the settings of coturn's turnserver.conf as those of homeport.toml; what has no counterpart is named
    Import {
        /// The turnserver.conf
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct HealthcheckArgs {
    /// The settings file; without it, homeport.toml in this folder, or else /etc/homeport/homeport.toml
    #[arg(long, value_name = "FILE", env = "HOMEPORT_CONFIG")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (services, args) = match cli.command {
        Command::Healthcheck(args) => return healthcheck::run(args.config.as_deref()),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "homeport", &mut std::io::stdout());
            return ExitCode::SUCCESS;
        }
        Command::Manual { folder } => {
            let written = clap_mangen::generate_to(Cli::command(), &folder);
            return exit_code(written.with_context(|| format!("cannot write into {}", folder.display())));
        }
        Command::Init(args) => return exit_code(init::run(&args)),
        Command::Check(args) => return check::run(&args),
        Command::Rooms(args) => return exit_code(rooms::run(args)),
        Command::Up(args) => (run::Services::ALL, args),
        Command::Relay(args) => (run::Services { relay: true, ..run::Services::NONE }, args),
        Command::Turn(TurnArgs { command: Some(TurnCommand::Import { file }), .. }) => {
            return exit_code(import(&file));
        }
        Command::Turn(TurnArgs { run: args, .. }) => (run::Services { turn: true, ..run::Services::NONE }, args),
        Command::Seed(args) => (run::Services { seed: true, ..run::Services::NONE }, args),
    };
    exit_code(start(services, &args))
}

fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has had enough of it, as `head` has.
        Err(error)
            if error.downcast_ref().is_some_and(|error: &std::io::Error| error.kind() == ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("homeport: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what the settings of coturn are here, and on standard error what a person must know of it.
fn import(file: &std::path::Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let imported = coturn::import(&text);
    println!("# From {}\n\n{}", file.display(), toml::to_string(&imported.settings)?);
    for note in imported.notes {
        eprintln!("note: {note}");
    }
    Ok(())
}

fn start(services: run::Services, args: &RunArgs) -> anyhow::Result<()> {
    logging::init(args.verbose)?;
    let settings = settings::load(args.config.as_deref(), args.data.as_deref(), &args.rooms)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(run::run(services, settings));
    // What still runs has been told to end; it is not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    result
}
