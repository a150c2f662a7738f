//! Backups of random archives, restored, interrupted and damaged.

use std::path::PathBuf;

use genosdb::{Clock, Hlc};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;
use crate::history::tests::{Written, all, at, random_history, random_operation};
use crate::{Entry, History, Moment};

const NOW_MS: u64 = 1_795_900_000_000;

fn backups(folder: &Path) -> Backups {
    Backups::at(&BackupTarget::Folder(folder.to_owned())).unwrap()
}

fn log(folder: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    History::open(folder, "my-app")
        .unwrap()
        .entries(1, u64::MAX, |entry| {
            entries.push(entry);
            true
        })
        .unwrap();
    entries
}

/// Some more operations, behind what is there.
fn go_on(written: &mut Written, random: &mut StdRng, count: usize) {
    let latest = written.state.latest.unwrap_or(Hlc::new(NOW_MS - 1_000_000, 0));
    let (mut clock, mut wall_ms) = (Clock::starting_at(latest), latest.physical);
    written.file.connection.execute_batch("BEGIN").unwrap();
    for _ in 0..count {
        wall_ms += 10;
        let operation = random_operation(random, &mut clock, wall_ms);
        written.apply(&operation, wall_ms);
    }
    written.save();
    written.file.connection.execute_batch("COMMIT").unwrap();
}

fn files(folder: &Path, part: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder.join(part)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort_unstable();
    files
}

#[tokio::test]
async fn what_is_restored_is_what_was_backed_up_its_history_included() {
    for seed in 0..30 {
        let random = &mut StdRng::seed_from_u64(seed);
        let (data, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut written = random_history(data.path(), random, 60);
        let backups = backups(place.path());
        let full = backups.make(data.path(), Kind::Incremental, NOW_MS).await.unwrap();
        assert_eq!(full.kind, Kind::Full, "there was nothing to build on");
        for round in 1..4 {
            let count = random.random_range(0..60);
            go_on(&mut written, random, count);
            if random.random_bool(0.5) {
                let horizon = written.moments[written.moments.len() / 2].0;
                crate::archive::compact(&mut written.file.connection, horizon);
            }
            let report = backups.make(data.path(), Kind::Incremental, NOW_MS + round).await.unwrap();
            assert_eq!(report.kind, Kind::Incremental);
            let empty = tempfile::tempdir().unwrap();
            let restored = backups.restore(None, empty.path(), |_, _| ()).await.unwrap();
            assert_eq!((restored.id, restored.operations), (report.id, report.operations));
            assert_eq!(all(&at(empty.path(), Moment::Now)), all(&at(data.path(), Moment::Now)), "seed {seed}");
            assert_eq!(log(empty.path()), log(data.path()));
            let middle = Moment::Received(written.moments[written.moments.len() * 3 / 4].0);
            assert_eq!(all(&at(empty.path(), middle)), all(&at(data.path(), middle)), "seed {seed}");
        }
        // Every one of them is still what it was.
        assert_eq!(backups.list().await.unwrap().iter().filter(|listed| listed.content.is_ok()).count(), 4);
        let empty = tempfile::tempdir().unwrap();
        let restored = backups.restore(Some(&full.id), empty.path(), |_, _| ()).await.unwrap();
        assert_eq!(restored.operations, full.operations);
    }
}

#[tokio::test]
async fn an_incremental_backup_writes_only_what_is_new_and_stands_alone() {
    let (data, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let random = &mut StdRng::seed_from_u64(1);
    let mut written = Written::new(data.path());
    go_on(&mut written, random, 60_000);
    let backups = backups(place.path());
    let full = backups.make(data.path(), Kind::Full, NOW_MS).await.unwrap();
    assert!(full.operations > 40_000 && full.reused_segments == 0);
    go_on(&mut written, random, 10);
    let next = backups.make(data.path(), Kind::Incremental, NOW_MS + 1).await.unwrap();
    assert!(next.reused_segments >= 2 && next.written_bytes < full.written_bytes / 2, "{full:?} {next:?}");
    let whole = backups.make(data.path(), Kind::Full, NOW_MS + 2).await.unwrap();
    assert!(whole.reused_segments == 0 && whole.written_bytes >= full.written_bytes);
    // Without the first two, the last is as good as before; without the last but one, what it wrote is still named.
    let day = 24 * 60 * 60 * 1_000;
    assert_eq!(backups.prune(Duration::from_millis(0), NOW_MS + 400 * day).await.unwrap(), 2);
    let list = backups.list().await.unwrap();
    assert_eq!(list.len(), 1);
    let empty = tempfile::tempdir().unwrap();
    let restored = backups.restore(None, empty.path(), |_, _| ()).await.unwrap();
    assert_eq!(restored.operations, whole.operations);
    assert_eq!(all(&at(empty.path(), Moment::Now)), all(&at(data.path(), Moment::Now)));
    assert_eq!(backups.prune(Duration::from_millis(0), NOW_MS + 800 * day).await.unwrap(), 0, "never the newest");
    assert_eq!(files(place.path(), "segments").len(), list[0].content.as_ref().unwrap().rooms.len() * 3);
}

#[tokio::test]
async fn a_log_that_has_gone_another_way_is_not_taken_for_the_earlier_one() {
    let place = tempfile::tempdir().unwrap();
    let backups = backups(place.path());
    let first = tempfile::tempdir().unwrap();
    let random = &mut StdRng::seed_from_u64(2);
    let mut written = Written::new(first.path());
    go_on(&mut written, random, 30_000);
    backups.make(first.path(), Kind::Full, NOW_MS).await.unwrap();
    // Another archive of the same room: as long, but not the same.
    let second = tempfile::tempdir().unwrap();
    let mut other = Written::new(second.path());
    go_on(&mut other, &mut StdRng::seed_from_u64(3), 40_000);
    let report = backups.make(second.path(), Kind::Incremental, NOW_MS + 1).await.unwrap();
    assert_eq!(report.reused_segments, 0);
    let empty = tempfile::tempdir().unwrap();
    backups.restore(None, empty.path(), |_, _| ()).await.unwrap();
    assert_eq!(log(empty.path()), log(second.path()));
}

#[tokio::test]
async fn what_is_half_written_or_damaged_is_not_taken_for_whole() {
    let (data, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let random = &mut StdRng::seed_from_u64(4);
    let mut written = random_history(data.path(), random, 100);
    let backups = backups(place.path());
    let first = backups.make(data.path(), Kind::Full, NOW_MS).await.unwrap();
    let before: Vec<PathBuf> = files(place.path(), "segments");
    go_on(&mut written, random, 50);
    let second = backups.make(data.path(), Kind::Full, NOW_MS + 1).await.unwrap();
    let newest = async || {
        let empty = tempfile::tempdir().unwrap();
        backups.restore(None, empty.path(), |_, _| ()).await.map(|restored| restored.id)
    };
    assert_eq!(newest().await.unwrap(), second.id);

    // The power goes before the manifest is there, or while it is written.
    let manifest = place.path().join("manifests").join(format!("{}.json", second.id));
    let text = std::fs::read(&manifest).unwrap();
    for length in [text.len() - 1, text.len() / 2, 0] {
        std::fs::write(&manifest, &text[..length]).unwrap();
        assert_eq!(newest().await.unwrap(), first.id, "{length}");
        assert!(backups.list().await.unwrap()[1].content.is_err());
    }
    let changed = String::from_utf8(text.clone()).unwrap().replacen("my-app", "my-apq", 1);
    std::fs::write(&manifest, changed).unwrap();
    assert_eq!(newest().await.unwrap(), first.id);
    std::fs::write(&manifest, &text).unwrap();

    // A segment that is not what its name says, and one that is gone.
    let segment = files(place.path(), "segments").into_iter().find(|path| !before.contains(path)).unwrap();
    let mut content = std::fs::read(&segment).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(&segment, &content).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let error = backups.restore(None, empty.path(), |_, _| ()).await.unwrap_err();
    assert!(matches!(error, BackupError::Damaged(_)), "{error}");
    assert!(!empty.path().join(crate::archive::FILE_NAME).exists(), "nothing was put in place");
    std::fs::remove_file(&segment).unwrap();
    assert!(matches!(backups.list().await.unwrap()[1].content, Err(BackupError::Damaged(_))));
    assert_eq!(backups.restore(Some(&first.id), empty.path(), |_, _| ()).await.unwrap().id, first.id);
    assert!(matches!(backups.restore(None, empty.path(), |_, _| ()).await, Err(BackupError::Exists(_))));
    assert!(matches!(backups.restore(Some("x"), data.path(), |_, _| ()).await, Err(BackupError::Exists(_))));
}

#[tokio::test]
async fn where_there_is_nothing_that_is_said() {
    let (data, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let backups = backups(place.path());
    assert!(backups.list().await.unwrap().is_empty());
    assert!(matches!(backups.restore(None, data.path(), |_, _| ()).await, Err(BackupError::None)));
    assert!(matches!(backups.restore(Some("x"), data.path(), |_, _| ()).await, Err(BackupError::Unknown(_))));
    assert!(backups.make(data.path(), Kind::Full, NOW_MS).await.is_err(), "there is no archive");
    assert!(matches!(BackupTarget::parse("ftp://x", &S3Settings::default()), Err(TargetError::Unknown(_))));
    assert!(matches!(BackupTarget::parse("s3:///x", &S3Settings::default()), Err(TargetError::Unknown(_))));
    let s3 = BackupTarget::parse("s3://bucket/a/b", &S3Settings::default()).unwrap();
    assert!(matches!(&s3, BackupTarget::S3 { bucket, prefix, .. } if bucket == "bucket" && prefix == "a/b"));
}
