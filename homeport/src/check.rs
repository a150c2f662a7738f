//! `homeport check`: whether what is kept is what it should be, and what to do if not.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use seed_peer::{Backups, HistoryError, ListedBackup, RoomIntegrity, check_archive};
use serde::Serialize;

use crate::rooms::wall_ms;
use crate::settings::{self, Settings};

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The settings file; without it, homeport.toml in this folder if it is there
    #[arg(long, value_name = "FILE", env = "HOMEPORT_CONFIG")]
    config: Option<PathBuf>,
    /// The folder of the archive (setting seed.data)
    #[arg(long, value_name = "DIR", env = "HOMEPORT_DATA")]
    data: Option<PathBuf>,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
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
    advice: Option<&'static str>,
}

impl Finding {
    fn new(verdict: Verdict, what: impl Into<String>, found: impl Into<String>, advice: Option<&'static str>) -> Self {
        Self { verdict, what: what.into(), found: found.into(), advice }
    }
}

/// Looks at everything. Exit code 0 when all is well or only warned of, 1 when something has failed, 2 when nothing could
/// be looked at.
pub(crate) fn run(args: &CheckArgs) -> ExitCode {
    let findings = settings::load(args.config.as_deref(), args.data.as_deref(), &[]).map(|settings| {
        let mut findings = archive(&settings);
        findings.extend(backups(&settings));
        findings
    });
    let findings = match findings {
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

fn archive(settings: &Settings) -> Vec<Finding> {
    const RESTORE: &str = "move the archive away and restore a backup: homeport rooms restore-backup";
    let data = &settings.seed.data;
    if !data.join("archive.sqlite").exists() {
        let found = format!("there is none in {} yet", data.display());
        return vec![Finding::new(Verdict::Ok, "archive", found, None)];
    }
    let (complaints, rooms) = match check_archive(data, |_, _| ()) {
        Ok(found) => found,
        Err(error @ HistoryError::Archive { .. }) => {
            return vec![Finding::new(Verdict::Failure, "archive", error.to_string(), Some(RESTORE))];
        }
        Err(error) => return vec![Finding::new(Verdict::Warning, "archive", error.to_string(), None)],
    };
    let mut findings = Vec::new();
    for complaint in &complaints {
        findings.push(Finding::new(Verdict::Failure, "archive", complaint.escape_debug().to_string(), Some(RESTORE)));
    }
    if complaints.is_empty() {
        findings.push(Finding::new(Verdict::Ok, "archive", format!("a sound file, {} rooms", rooms.len()), None));
    }
    for RoomIntegrity { name, entries, nodes, differing } in rooms {
        let what = format!("room {}", name.escape_debug());
        findings.push(if differing == 0 {
            Finding::new(Verdict::Ok, what, format!("{nodes} nodes are what its {entries} operations say"), None)
        } else {
            let found = format!("{differing} nodes are not what its {entries} operations say");
            Finding::new(Verdict::Failure, what, found, Some(RESTORE))
        });
    }
    findings
}

fn backups(settings: &Settings) -> Vec<Finding> {
    let target = match settings.seed.backup_target(None) {
        Ok(target) => target,
        Err(_) => {
            let advice = Some("set seed.backup.to, or make them in another way");
            return vec![Finding::new(Verdict::Warning, "backups", "none are made", advice)];
        }
    };
    let listed = || -> anyhow::Result<Vec<ListedBackup>> {
        let backups = Backups::at(&target)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(backups.list())?)
    };
    let list = match listed() {
        Ok(list) => list,
        Err(error) => {
            let advice = Some("see to it that the place of seed.backup.to can be reached and read");
            return vec![Finding::new(Verdict::Failure, "backups", error.to_string(), advice)];
        }
    };
    let mut findings: Vec<Finding> = list
        .iter()
        .filter_map(|listed| {
            let error = listed.content.as_ref().err()?;
            let advice = Some("it goes with its age; make another: homeport rooms backup --full");
            Some(Finding::new(Verdict::Warning, format!("backup {}", listed.id), error.to_string(), advice))
        })
        .collect();
    let newest = list.iter().rev().find_map(|listed| listed.content.as_ref().ok());
    let every = settings.seed.backup_interval().unwrap_or_default();
    findings.push(match newest {
        None => Finding::new(
            Verdict::Failure,
            "backups",
            "there is none that is whole",
            Some("homeport rooms backup --full"),
        ),
        Some(newest) => {
            let age = Duration::from_secs(wall_ms().saturating_sub(newest.created_ms) / 1_000);
            let found = format!("the newest was made {} ago", humantime::format_duration(age));
            let is_late = age > every * 2 + Duration::from_secs(600);
            let advice = is_late.then_some("the log of homeport says why none was made since");
            Finding::new(if is_late { Verdict::Warning } else { Verdict::Ok }, "backups", found, advice)
        }
    });
    findings
}
