//! A process under test, and what it costs.

use std::fs;
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

/// A process of the benchmark's own; ended when dropped.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) Child);

impl Process {
    /// Starts a command, whose output goes nowhere.
    pub(crate) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("cannot start {}", command.get_program().display()))?))
    }

    /// CPU seconds that the process has used.
    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // Behind the name, which may hold anything, utime and stime are the 12th and 13th fields, in hundredths.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| -> anyhow::Result<f64> { Ok(fields.get(index).context("short stat")?.parse()?) };
        Ok((ticks(11)? + ticks(12)?) / 100.0)
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> anyhow::Result<f64> {
        self.status_kib("VmRSS:")
    }

    /// Resident memory in KiB without the pages of the binary and other files, of which the system maps as many as it likes
    /// and takes back what it needs.
    #[allow(dead_code, reason = "not every bench looks at it")]
    pub(crate) fn anonymous_kib(&self) -> anyhow::Result<f64> {
        self.status_kib("RssAnon:")
    }

    fn status_kib(&self, field: &'static str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let value = status.lines().find_map(|line| line.strip_prefix(field)).context(field)?;
        Ok(value.trim().trim_end_matches("kB").trim().parse()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
