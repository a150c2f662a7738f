//! The relay under test: a process, and what it costs.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

/// A `homeport relay` of the benchmark's own; ended when dropped.
pub(crate) struct Relay {
    child: Child,
    /// Where it listens.
    pub(crate) url: String,
}

impl Relay {
    /// Starts the binary with the given settings in the environment.
    pub(crate) fn start(binary: &Path, settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut child = Command::new(binary)
            .arg("relay")
            .env("HOMEPORT_RELAY__LISTEN", "127.0.0.1:0")
            .env("HOMEPORT_METRICS__LISTEN", "127.0.0.1:0")
            .env("HOMEPORT_RELAY__MAX_CONNECTIONS", "20000")
            .envs(settings.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let stdout = child.stdout.take().context("no output")?;
        for line in BufReader::new(stdout).lines() {
            if let Some(url) = line?.trim().strip_prefix("relay") {
                return Ok(Self { child, url: url.trim().to_owned() });
            }
        }
        anyhow::bail!("the relay did not start")
    }

    /// CPU seconds that the process has used.
    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // Behind the name, which may hold anything, utime and stime are the 12th and 13th fields, in hundredths.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| -> anyhow::Result<f64> { Ok(fields.get(index).context("short stat")?.parse()?) };
        Ok((ticks(11)? + ticks(12)?) / 100.0)
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse()?)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
