//! The relays under test.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::process::Process;

/// A relay that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contender {
    pub(crate) name: String,
    /// Program and arguments; `{port}` stands for the port to listen on.
    command: Vec<String>,
    /// Of a Homeport, which can be given settings.
    pub(crate) is_homeport: bool,
}

impl Contender {
    /// The Homeport binary at `path`.
    pub(crate) fn homeport(path: &str) -> Self {
        Self { name: "homeport".to_owned(), command: vec![path.to_owned(), "relay".to_owned()], is_homeport: true }
    }
}

/// `name=command with {port}`
impl std::str::FromStr for Contender {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, command) = text.split_once('=').ok_or("expected name=command")?;
        let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if !command.iter().any(|part| part.contains("{port}")) {
            return Err("the command must say where {port} goes".to_owned());
        }
        Ok(Self { name: name.to_owned(), command, is_homeport: false })
    }
}

/// A running relay of the benchmark's own; ended when dropped.
pub(crate) struct Relay {
    pub(crate) process: Process,
    /// Where it listens.
    pub(crate) url: String,
}

impl Relay {
    /// Starts a contender; settings are for a Homeport, in its environment.
    pub(crate) fn start(contender: &Contender, settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        if contender.is_homeport { Self::start_homeport(contender, settings) } else { Self::start_other(contender) }
    }

    fn start_homeport(contender: &Contender, settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut child = Command::new(&contender.command[0])
            .args(&contender.command[1..])
            .env("HOMEPORT_RELAY__LISTEN", "127.0.0.1:0")
            .env("HOMEPORT_METRICS__LISTEN", "127.0.0.1:0")
            .env("HOMEPORT_RELAY__MAX_CONNECTIONS", "20000")
            .envs(settings.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", contender.command[0]))?;
        let stdout = child.stdout.take().context("no output")?;
        for line in BufReader::new(stdout).lines() {
            if let Some(url) = line?.trim().strip_prefix("relay") {
                return Ok(Self { process: Process(child), url: url.trim().to_owned() });
            }
        }
        anyhow::bail!("the relay did not start")
    }

    fn start_other(contender: &Contender) -> anyhow::Result<Self> {
        const PATIENCE: Duration = Duration::from_secs(20);
        // Free a moment ago, and nobody else here takes ports.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let command: Vec<String> =
            contender.command.iter().map(|part| part.replace("{port}", &port.to_string())).collect();
        let process = Process::start(Command::new(&command[0]).args(&command[1..]))?;
        let relay = Self { process, url: format!("ws://127.0.0.1:{port}/") };
        let deadline = Instant::now() + PATIENCE;
        // A program of somebody else's tells nothing when it listens: it can only be asked.
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            anyhow::ensure!(Instant::now() < deadline, "{} does not listen", contender.name);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(relay)
    }
}
