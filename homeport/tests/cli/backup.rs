//! Backups from the command line and around the clock, also when the power goes in the middle.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{complaint, homeport, rooms, signal, started};

fn fill(here: &Path, from: usize, count: usize) {
    let lines: Vec<String> = (from..from + count)
        .map(|index| format!(r#"{{"id":"n{index}","value":{{"text":"{index:x>200}"}}}}"#))
        .collect();
    std::fs::write(here.join("nodes"), lines.join("\n")).unwrap();
    rooms(here, &["import", "my-app", "nodes"], true);
}

fn body(here: &Path, data: &str) -> String {
    rooms(here, &["export", "my-app", "--data", data], true).lines().skip(1).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_backup_is_made_listed_and_restored_and_one_that_is_cut_off_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let mut command = homeport(here, "up");
    command.args(["--room", "my-app"]);
    let (mut child, _) = started(command);
    assert!(rooms(here, &["backup"], false).contains("seed.backup.to"));
    fill(here, 0, 3_000);
    assert!(rooms(here, &["backup", "--to", "vault"], true).contains("full: 1 rooms, 3000 operations"));
    fill(here, 3_000, 500);
    assert!(rooms(here, &["backup", "--to", "vault"], true).contains("incremental: 1 rooms, 3500 operations"));

    // The power goes again and again, each time a little later, until a backup is made in spite of it.
    let ids = || {
        let list = rooms(here, &["backups", "--from", "vault"], true);
        list.lines().map(|line| line.split_whitespace().next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let mut killed = 0;
    for round in 0..200 {
        let mut command = homeport(here, "rooms");
        let mut making = command.args(["backup", "--full", "--to", "vault"]).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_millis(round * 3);
        while Instant::now() < deadline && making.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if making.try_wait().unwrap().is_some() {
            break;
        }
        making.kill().unwrap();
        making.wait().unwrap();
        killed += 1;
    }
    assert!(killed > 0);
    let all = ids();
    assert!(all.len() >= 3, "every backup that is listed is whole");
    let oldest = all.first().unwrap();
    for id in [oldest, all.last().unwrap()] {
        let data = format!("restored-{id}");
        let text = rooms(here, &["restore-backup", id, "--from", "vault", "--data", &data], true);
        assert!(text.contains("is restored"), "{text}");
        if id != oldest {
            assert_eq!(body(here, &data), body(here, "homeport-data"));
        }
    }
    let again = rooms(here, &["restore-backup", "--from", "vault"], false);
    assert!(again.contains("there is an archive"), "{again}");
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());

    // What is kept can be checked, also while a seed writes it.
    let check = |words: &[&str]| {
        let output = homeport(here, "check").arg("--offline").args(words).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, text) = check(&[]);
    assert!(code == Some(0) && text.contains("3500 nodes are what its 3500 operations say"), "{text}");
    assert!(text.contains("warning  backups: none are made"), "{text}");
    std::fs::write(here.join("homeport.toml"), "[seed.backup]\nto = \"vault\"\n").unwrap();
    let (code, text) = check(&["--json"]);
    assert!(code == Some(0) && text.contains(r#""verdict":"ok","what":"backups""#), "{text}");
    let manifest = here.join("vault/manifests").join(format!("{}.json", all.last().unwrap()));
    let manifest_text = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, &manifest_text[..100]).unwrap();
    let (code, text) = check(&[]);
    assert!(code == Some(0) && text.contains("damaged"), "{text}");
    std::fs::write(here.join("homeport.toml"), "").unwrap();
    let (code, text) = check(&["--data", "homeport.toml"]);
    assert!(code == Some(0) && text.contains("there is none"), "{text}");

    // On the restored archive a seed goes on.
    let mut command = homeport(here, "up");
    command.args(["--room", "my-app", "--data", &format!("restored-{oldest}")]);
    let (mut child, _) = started(command);
    let list = rooms(here, &["list", "--data", &format!("restored-{oldest}")], true);
    assert!(list.contains("3000") && !list.contains("3500"), "{list}");
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
    let path = here.join(format!("restored-{oldest}/archive.sqlite"));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 8_192].fill(0x5a);
    std::fs::write(&path, bytes).unwrap();
    let (code, text) = check(&["--data", &format!("restored-{oldest}")]);
    assert!(code == Some(1) && text.contains("FAILURE") && text.contains("restore-backup"), "{text}");
}

#[test]
fn backups_are_made_around_the_clock_and_old_ones_go() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    std::fs::write(
        here.join("homeport.toml"),
        "[seed.backup]\nto = \"vault\"\nevery = \"1s\"\nkeep = \"3s\"\n[[seed.room]]\nname = \"my-app\"\n",
    )
    .unwrap();
    let (mut child, _) = started(homeport(here, "up"));
    let ids = || -> Vec<String> {
        let Ok(files) = std::fs::read_dir(here.join("vault/manifests")) else { return Vec::new() };
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 6 {
        assert!(Instant::now() < deadline, "{seen:?}");
        seen.extend(ids());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(ids().len() < seen.len(), "old ones are deleted");
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_place_that_cannot_be_is_named_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for (backup, expected) in [
        ("to = \"ftp://x\"", "seed.backup.to"),
        ("to = \"vault\"\nevery = \"often\"", "seed.backup.every"),
        ("to = \"vault\"\nkeep = \"0s\"", "seed.backup.keep"),
        ("to = \"homeport.toml/vault\"", "seed.backup.to"),
        ("tp = \"vault\"", "seed.backup.to"),
    ] {
        std::fs::write(here.join("homeport.toml"), format!("[seed.backup]\n{backup}\n")).unwrap();
        let text = complaint(homeport(here, "up"));
        assert!(text.contains(expected), "{text}");
    }
}
