//! Homeport: the always-on half of browser peer-to-peer apps.

mod client_config;
mod healthcheck;
mod logging;
mod run;
mod settings;
mod summary;
mod turn_credentials;
mod turn_secret;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

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
    /// Run relay, TURN server and seed peer in one process; needs no settings
    Up(RunArgs),
    /// Run the Nostr relay alone
    Relay(RunArgs),
    /// Run the STUN and TURN server alone
    Turn(RunArgs),
    /// Run the seed peer alone, through the relays of seed.relays
    Seed(RunArgs),
    /// Ask a running homeport on this machine how it is; exit code 0 when it answers, for containers
    Healthcheck(HealthcheckArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The settings file; without it, homeport.toml in this folder if it is there
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
struct HealthcheckArgs {
    /// The settings file; without it, homeport.toml in this folder if it is there
    #[arg(long, value_name = "FILE", env = "HOMEPORT_CONFIG")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (services, args) = match cli.command {
        Command::Healthcheck(args) => return healthcheck::run(args.config.as_deref()),
        Command::Up(args) => (run::Services::ALL, args),
        Command::Relay(args) => (run::Services { relay: true, ..run::Services::NONE }, args),
        Command::Turn(args) => (run::Services { turn: true, ..run::Services::NONE }, args),
        Command::Seed(args) => (run::Services { seed: true, ..run::Services::NONE }, args),
    };
    match start(services, &args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("homeport: {error:#}");
            ExitCode::FAILURE
        }
    }
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
