//! What is and was in a room, from the command line, beside a running seed.

use std::io::{BufRead as _, BufReader};
use std::path::Path;

use super::{complaint, homeport, rooms, signal, started};

/// The key behind the vectors of the wire notes.
const MNEMONIC: &str = "test test test test test test test test test test test junk";
const ADDRESS: &str = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266";

fn write(folder: &Path, name: &str, lines: &[&str]) {
    std::fs::write(folder.join(name), lines.join("\n")).unwrap();
}

/// A moment between what was done and what is done next.
fn moment() -> String {
    std::thread::sleep(std::time::Duration::from_millis(5));
    let now = humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string();
    std::thread::sleep(std::time::Duration::from_millis(5));
    now
}

#[test]
fn a_room_is_filled_looked_at_taken_away_and_brought_back() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let mut command = homeport(here, "up");
    command.args(["--room", "my-app", "--room", "other"]);
    let (mut child, _) = started(command);
    write(here, "first", &[r#"{"id":"a","value":{"n":1}}"#, r#"{"id":"b","value":{"n":2},"edges":["a"]}"#]);
    assert!(rooms(here, &["import", "my-app", "first"], true).contains("3 operations written"));
    let filled = moment();
    write(here, "second", &[r#"{"id":"a","value":{"n":5}}"#, r#"{"id":"c","value":"\u001b[31m"}"#]);
    rooms(here, &["import", "my-app", "second"], true);

    assert_eq!(rooms(here, &["show", "my-app", "--query", r#"{"n":{"$gt":1}}"#], true).lines().count(), 2);
    let then = rooms(here, &["show", "my-app", "--at", &filled], true);
    assert!(then.contains(r#"{"id":"a","value":{"n":1},"edges":[]"#) && !then.contains(r#""c""#), "{then}");
    assert_eq!(rooms(here, &["show", "my-app", "--at", "1h ago"], true), "");
    assert!(rooms(here, &["show", "my-app", "--at", "yesterday"], false).contains("is no moment"));
    assert!(
        rooms(here, &["show", "my-app", "--query", r#"{"n":{"$near":1}}"#], false).contains("$near is not supported")
    );
    let diff = rooms(here, &["diff", "my-app", &filled], true);
    assert_eq!(diff, "~ \"a\" {\"n\":1} -> {\"n\":5} []\n+ \"c\" \"\\u001b[31m\" []\n");
    let log = rooms(here, &["log", "my-app"], true);
    assert_eq!(log.lines().count(), 5);
    assert!(log.lines().next().unwrap().contains(r#"upsert  "a""#), "{log}");
    assert_eq!(rooms(here, &["log", "my-app", "--last", "2", "--json"], true).lines().count(), 2);

    // An export is whole, and makes another room the same.
    rooms(here, &["export", "my-app", "--output", "room.jsonl"], true);
    assert!(rooms(here, &["import", "other", "room.jsonl"], true).contains("3 nodes and removals were taken over"));
    let body = |room: &str| rooms(here, &["export", room], true).lines().skip(1).collect::<Vec<_>>().join("\n");
    assert_eq!(body("other"), body("my-app"));
    let export = std::fs::read_to_string(here.join("room.jsonl")).unwrap();
    write(here, "torn", &[export.lines().next().unwrap(), export.lines().nth(1).unwrap()]);
    assert!(rooms(here, &["import", "other", "torn"], false).contains("is not whole"));

    // A restoration says what it would do, does it, and can be undone.
    let before = body("my-app");
    let plan = rooms(here, &["restore", "my-app", "--at", &filled], true);
    assert!(plan.contains("1 get their value and edges back, 1 are removed") && plan.contains("add --yes"), "{plan}");
    assert_eq!(body("my-app"), before, "a dry run");
    let done = rooms(here, &["restore", "my-app", "--at", &filled, "--yes"], true);
    assert_eq!(rooms(here, &["diff", "my-app", &filled], true), "");
    let undo = done.lines().last().unwrap().split("--at ").nth(1).unwrap();
    rooms(here, &["restore", "my-app", "--at", undo, "--yes"], true);
    assert_eq!(rooms(here, &["diff", "my-app", undo], true), "");
    assert!(rooms(here, &["restore", "my-app", "--at", undo], true).contains("nothing is to be done"));

    // Somebody watches.
    let mut watcher = homeport(here, "rooms");
    let mut watcher = watcher.args(["log", "my-app", "--last", "0", "--follow"]).spawn().unwrap();
    write(here, "third", &[r#"{"id":"seen","value":1}"#]);
    let lines = BufReader::new(watcher.stdout.take().unwrap()).lines();
    let importer = std::thread::spawn({
        let here = here.to_owned();
        move || {
            // Again and again: nothing says when the watcher has begun.
            for round in 0.. {
                write(&here, "third", &[&format!(r#"{{"id":"seen","value":{round}}}"#)]);
                let text = homeport(&here, "rooms").args(["import", "my-app", "third"]).output().unwrap();
                if !text.status.success() {
                    return;
                }
            }
        }
    });
    assert!(lines.map(Result::unwrap).any(|line| line.contains(r#"upsert  "seen""#)));
    watcher.kill().unwrap();
    watcher.wait().unwrap();
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
    importer.join().unwrap();
}

#[test]
fn what_is_older_than_is_kept_leaves_the_log_and_the_room_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let up = |keep: &str| {
        let mut command = homeport(here, "up");
        command.args(["--room", "my-app"]).env("HOMEPORT_SEED__KEEP", keep);
        started(command).0
    };
    let mut child = up("90d");
    for value in 0..3 {
        let nodes: Vec<String> = (0..50).map(|id| format!(r#"{{"id":"n{id}","value":{value}}}"#)).collect();
        write(here, "nodes", &nodes.iter().map(String::as_str).collect::<Vec<_>>());
        rooms(here, &["import", "my-app", "nodes"], true);
    }
    let filled = moment();
    let body = || rooms(here, &["export", "my-app"], true).lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    let logged = || rooms(here, &["log", "my-app", "--last", "1000"], true).lines().count();
    let before = body();
    assert_eq!((before.len(), logged()), (50, 150));
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());

    // What was written grows older than a second.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let mut child = up("1s");
    while logged() > 0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(body(), before);
    let past = rooms(here, &["show", "my-app", "--at", &filled], false);
    assert!(past.contains("log"), "that moment is gone, and said to be: {past}");
    write(here, "nodes", &[r#"{"id":"n0","value":"new"}"#]);
    rooms(here, &["import", "my-app", "nodes"], true);
    signal(&child, "-KILL");
    child.wait().unwrap();

    let mut child = up("90d");
    assert_eq!((body().len(), logged()), (50, 1));
    let output = homeport(here, "check").arg("--offline").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ok       room my-app: 50 nodes are what its 1 operations say"), "{text}");
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_seed_with_an_identity_signs_and_rules_and_one_without_writes_nothing_there() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let settings = |more: &str| {
        let text = format!("[seed]\n{more}\n[[seed.room]]\nname = \"my-app\"\nsuper_admins = [\"{ADDRESS}\"]\n");
        std::fs::write(here.join("homeport.toml"), text).unwrap();
    };
    write(here, "nodes", &[r#"{"id":"a","value":1}"#]);
    settings("");
    let (mut child, _) = started(homeport(here, "up"));
    assert!(rooms(here, &["import", "my-app", "nodes"], false).contains("seed.identity"));
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());

    write(here, "identity", &[MNEMONIC]);
    settings("identity_file = \"identity\"");
    let (mut child, summary) = started(homeport(here, "up"));
    assert!(summary.contains(ADDRESS) && !summary.contains("junk"), "{summary}");
    rooms(here, &["import", "my-app", "nodes"], true);
    let verified = rooms(here, &["verify", "my-app"], true);
    assert!(verified.contains("1 operations hold") && verified.contains(ADDRESS), "{verified}");
    assert!(rooms(here, &["log", "my-app"], true).contains(ADDRESS));
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());

    let mut command = homeport(here, "up");
    command.env("HOMEPORT_SEED__IDENTITY", "test test test junk");
    let text = complaint(command);
    assert!(text.contains("stands in seed.identity as well"), "{text}");
    settings("");
    let mut command = homeport(here, "up");
    command.env("HOMEPORT_SEED__IDENTITY", "test test test junk");
    let text = complaint(command);
    assert!(text.contains("seed.identity") && text.contains("mnemonic is not one") && !text.contains("junk"), "{text}");
    let mut command = homeport(here, "up");
    command.env("HOMEPORT_SEED__IDENTITY", MNEMONIC);
    let (mut child, summary) = started(command);
    assert!(summary.contains(ADDRESS), "{summary}");
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
}

#[test]
fn rules_that_cannot_be_are_named_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for (more, expected) in [
        ("super_admins = [\"0x12\"]", "is no address"),
        ("roles = { editor = { can = [\"write\"] } }", "only in a room with super_admins"),
        ("super_admins = [\"A\"]\nroles = { editor = { inherits = [\"nobody\"] } }", "inherits from \"nobody\""),
        ("super_admins = [\"A\"]\nroles = { editor = { cna = [] } }", "cna"),
        (
            "super_admins = [\"A\"]\n[[seed.room.governance]]\nif = { karma = { \"$near\" = 1 } }\nthen = { assignRole = \"user\" }",
            "rule 1: if: the operator $near is not supported",
        ),
        (
            "super_admins = [\"A\"]\n[[seed.room.governance]]\nif = { karma = 1 }\nthen = { assignRole = \"user\" }",
            "set seed.identity",
        ),
        ("super_admins = [\"A\"]\ngovernance_file = \"missing.json\"", "missing.json"),
    ] {
        let more = more.replace("\"A\"", &format!("\"{ADDRESS}\""));
        std::fs::write(here.join("homeport.toml"), format!("[[seed.room]]\nname = \"my-app\"\n{more}\n")).unwrap();
        let text = complaint(homeport(here, "up"));
        assert!(text.contains(expected) && text.contains("seed.room"), "{text}");
    }
}
