//! What is kept: the archive and its backups.

use std::time::Duration;

use seed_peer::{Backups, HistoryError, ListedBackup, RoomIntegrity, check_archive};

use super::Finding;
use crate::rooms::wall_ms;
use crate::settings::Settings;

pub(super) fn archive(settings: &Settings) -> Vec<Finding> {
    const RESTORE: &str = "move the archive away and restore a backup: homeport rooms restore-backup";
    let data = &settings.seed.data;
    if !data.join("archive.sqlite").exists() {
        let found = format!("there is none in {} yet", data.display());
        return vec![Finding::ok("archive", found)];
    }
    let (complaints, rooms) = match check_archive(data, |_, _| ()) {
        Ok(found) => found,
        Err(error @ HistoryError::Archive { .. }) => {
            return vec![Finding::failure("archive", error.to_string(), RESTORE)];
        }
        Err(error) => return vec![Finding::warning("archive", error.to_string(), "try again in a moment")],
    };
    let mut findings = Vec::new();
    for complaint in &complaints {
        findings.push(Finding::failure("archive", complaint.escape_debug().to_string(), RESTORE));
    }
    if complaints.is_empty() {
        findings.push(Finding::ok("archive", format!("a sound file, {} rooms", rooms.len())));
    }
    for RoomIntegrity { name, entries, nodes, differing } in rooms {
        let what = format!("room {}", name.escape_debug());
        findings.push(if differing == 0 {
            Finding::ok(what, format!("{nodes} nodes are what its {entries} operations say"))
        } else {
            let found = format!("{differing} nodes are not what its {entries} operations say");
            Finding::failure(what, found, RESTORE)
        });
    }
    findings
}

pub(super) async fn backups(settings: &Settings) -> Vec<Finding> {
    let target = match settings.seed.backup_target(None) {
        Ok(target) => target,
        Err(_) => {
            let advice = "set seed.backup.to, or make them in another way";
            return vec![Finding::warning("backups", "none are made", advice)];
        }
    };
    let listed = async || -> anyhow::Result<Vec<ListedBackup>> { Ok(Backups::at(&target)?.list().await?) };
    let list = match listed().await {
        Ok(list) => list,
        Err(error) => {
            let advice = "see to it that the place of seed.backup.to can be reached and read";
            return vec![Finding::failure("backups", error.to_string(), advice)];
        }
    };
    let mut findings: Vec<Finding> = list
        .iter()
        .filter_map(|listed| {
            let error = listed.content.as_ref().err()?;
            let advice = "it goes with its age; make another: homeport rooms backup --full";
            Some(Finding::warning(format!("backup {}", listed.id), error.to_string(), advice))
        })
        .collect();
    let newest = list.iter().rev().find_map(|listed| listed.content.as_ref().ok());
    let every = settings.seed.backup_interval().unwrap_or_default();
    findings.push(match newest {
        None => Finding::failure("backups", "there is none that is whole", "homeport rooms backup --full"),
        Some(newest) => {
            let age = Duration::from_secs(wall_ms().saturating_sub(newest.created_ms) / 1_000);
            let found = format!("the newest was made {} ago", humantime::format_duration(age));
            let is_late = age > every * 2 + Duration::from_secs(600);
            if is_late {
                Finding::warning("backups", found, "the log of homeport says why none was made since")
            } else {
                Finding::ok("backups", found)
            }
        }
    });
    findings
}
