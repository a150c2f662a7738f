//! `homeport rooms backup|backups|restore-backup`.

use anyhow::bail;
use clap::Args;
use seed_peer::{BackupContent, Backups, Kind, ListedBackup};

use super::{printed_ms, progress, wall_ms};
use crate::data_folder;
use crate::settings::SeedSettings;

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// Where to: a folder, or s3://bucket/prefix (default: setting seed.backup.to)
    #[arg(long, value_name = "PLACE")]
    to: Option<String>,
    /// Write everything anew, also what an earlier backup has written
    #[arg(long)]
    full: bool,
}

#[derive(Debug, Args)]
pub(super) struct BackupsArgs {
    /// Where they are (default: setting seed.backup.to)
    #[arg(long, value_name = "PLACE")]
    from: Option<String>,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct RestoreBackupArgs {
    /// Which one; without it, the newest that is whole
    id: Option<String>,
    /// Where it is (default: setting seed.backup.to)
    #[arg(long, value_name = "PLACE")]
    from: Option<String>,
}

fn wait<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work))
}

pub(super) fn backup(settings: &SeedSettings, args: &BackupArgs) -> anyhow::Result<()> {
    let backups = Backups::at(&settings.backup_target(args.to.as_deref())?)?;
    let kind = if args.full { Kind::Full } else { Kind::Incremental };
    let report = wait(backups.make(&settings.data, kind, wall_ms()))??;
    println!(
        "{}  {}: {} rooms, {} operations, {} bytes written",
        report.id,
        name_of(report.kind),
        report.rooms,
        report.operations,
        report.written_bytes
    );
    Ok(())
}

pub(super) fn list(settings: &SeedSettings, args: &BackupsArgs) -> anyhow::Result<()> {
    let backups = Backups::at(&settings.backup_target(args.from.as_deref())?)?;
    let list = wait(backups.list())??;
    let mut damaged = 0;
    let mut json = Vec::new();
    for ListedBackup { id, content } in &list {
        match content {
            Ok(BackupContent { kind, created_ms, rooms, bytes }) => {
                let operations: u64 = rooms.iter().map(|(_, operations)| operations).sum();
                if args.json {
                    json.push(serde_json::json!({
                        "id": id, "kind": kind, "created": printed_ms(*created_ms), "bytes": bytes,
                        "rooms": rooms.iter().map(|(name, operations)| {
                            serde_json::json!({ "name": name, "operations": operations })
                        }).collect::<Vec<_>>(),
                    }));
                } else {
                    println!("{id}  {}: {} rooms, {operations} operations, {bytes} bytes", name_of(*kind), rooms.len());
                }
            }
            Err(error) => {
                damaged += 1;
                if args.json {
                    json.push(serde_json::json!({ "id": id, "damaged": error.to_string() }));
                } else {
                    println!("{id}  damaged: {error}");
                }
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json)?);
    }
    if damaged > 0 {
        bail!("{damaged} of {} backups are damaged", list.len());
    }
    Ok(())
}

pub(super) fn restore(settings: &SeedSettings, args: &RestoreBackupArgs) -> anyhow::Result<()> {
    let backups = Backups::at(&settings.backup_target(args.from.as_deref())?)?;
    std::fs::create_dir_all(&settings.data)?;
    let bar = progress::bar(0, "operations");
    let restored = wait(backups.restore(args.id.as_deref(), &settings.data, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    }))?;
    bar.finish_and_clear();
    data_folder::give_to_its_owner(&settings.data)?;
    let restored = restored?;
    println!("{} is restored: {} operations", restored.id, restored.operations);
    for (name, nodes) in &restored.rooms {
        println!("  {}  {nodes} nodes", name.escape_debug());
    }
    Ok(())
}

fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Full => "full",
        Kind::Incremental => "incremental",
    }
}
