//! `homeport check`, the doctor: what works, what does not, and what to do about it.

mod cluster;
mod kept;
mod machine;
mod names;
mod services;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::settings;

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Which services to ask; all of them, if none is named
    #[arg(value_enum)]
    services: Vec<Service>,
    /// Ask no service, nor anybody else: look at the settings, this machine and what is kept
    #[arg(long, conflicts_with = "services")]
    offline: bool,
    /// The settings file; without it, homeport.toml in this folder, or else /etc/homeport/homeport.toml
    #[arg(long, value_name = "FILE", env = "HOMEPORT_CONFIG")]
    config: Option<PathBuf>,
    /// The folder of the archive (setting seed.data)
    #[arg(long, value_name = "DIR", env = "HOMEPORT_DATA")]
    data: Option<PathBuf>,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Service {
    Relay,
    Turn,
    Seed,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warning,
    Failure,
}

/// What was looked at, how it is, and what to do about it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    verdict: Verdict,
    what: String,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, what: what.into(), found: found.into(), advice: None }
    }

    fn warning(what: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let advice = Some(advice.into());
        Self { verdict: Verdict::Warning, what: what.into(), found: found.into(), advice }
    }

    fn failure(what: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let advice = Some(advice.into());
        Self { verdict: Verdict::Failure, what: what.into(), found: found.into(), advice }
    }
}

/// Looks at everything. Exit code 0 when all is well or only warned of, 1 when something has failed, 2 when nothing could
/// be looked at.
pub(crate) fn run(args: &CheckArgs) -> ExitCode {
    let findings = match look(args) {
        Ok(findings) => findings,
        Err(error) => {
            eprintln!("homeport: {error:#}");
            return ExitCode::from(2);
        }
    };
    if args.json {
        println!("{}", serde_json::json!(findings));
    } else {
        for Finding { verdict, what, found, advice } in &findings {
            let verdict = match verdict {
                Verdict::Ok => "ok      ",
                Verdict::Warning => "warning ",
                Verdict::Failure => "FAILURE ",
            };
            println!("{verdict} {what}: {found}");
            if let Some(advice) = advice {
                println!("         {advice}");
            }
        }
    }
    match findings.iter().map(|finding| finding.verdict).max() {
        Some(Verdict::Failure) => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

fn look(args: &CheckArgs) -> anyhow::Result<Vec<Finding>> {
    let settings = settings::load(args.config.as_deref(), args.data.as_deref(), &[])?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut findings = machine::settings(&settings, args.config.as_deref());
        findings.extend(machine::limits(&settings));
        findings.extend(machine::disk(&settings));
        findings.extend(machine::clock(&settings));
        findings.extend(kept::archive(&settings));
        findings.extend(kept::backups(&settings).await);
        if !args.offline {
            let asked = |service| args.services.is_empty() || args.services.contains(&service);
            findings.extend(names::look_up(&settings).await);
            findings.extend(cluster::look(&settings).await?);
            findings.extend(services::ask(&settings, asked).await?);
        }
        Ok(findings)
    })
}
