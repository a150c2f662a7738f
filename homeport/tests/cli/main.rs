//! The binary as a person meets it: what it says when something is wrong, and how it ends.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod archive;
mod backup;
mod check;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The binary with ports of its own and its data in `folder`.
fn homeport(folder: &Path, command: &str) -> Command {
    let mut homeport = Command::new(env!("CARGO_BIN_EXE_homeport"));
    homeport
        .arg(command)
        .current_dir(folder)
        .env("HOMEPORT_RELAY__LISTEN", "127.0.0.1:0")
        .env("HOMEPORT_TURN__LISTEN", "127.0.0.1:0")
        .env("HOMEPORT_SEED__LISTEN", "127.0.0.1:0")
        .env("HOMEPORT_METRICS__LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    homeport
}

/// Runs what is expected to fail, and returns what it says.
fn complaint(mut command: Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let text = String::from_utf8(stderr).unwrap();
    assert!(!status.success(), "{text}");
    text
}

/// Starts what is expected to run, and waits for its summary.
#[allow(clippy::zombie_processes, reason = "whoever gets the child waits for it; on the other path it has ended")]
fn started(mut command: Command) -> (Child, String) {
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut summary = String::new();
    for line in lines.by_ref() {
        let line = line.unwrap();
        summary.push_str(&line);
        summary.push('\n');
        if line.contains("metrics") {
            return (child, summary);
        }
    }
    let mut text = String::new();
    child.stderr.unwrap().read_to_string(&mut text).unwrap();
    panic!("it did not start: {text}");
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").arg(name).arg(child.id().to_string()).status().unwrap();
    assert!(status.success());
}

#[test]
fn both_signals_end_it_in_order_and_soon() {
    for name in ["-TERM", "-INT"] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = homeport(folder.path(), "up");
        command.args(["--room", "my-app"]);
        let (mut child, summary) = started(command);
        assert!(summary.contains("Homeport is up") && summary.contains("my-app"), "{summary}");
        let start = Instant::now();
        signal(&child, name);
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
        // Its own time-outs add up to less; beyond, something hangs.
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        let mut log = String::new();
        child.stderr.unwrap().read_to_string(&mut log).unwrap();
        assert_eq!(log, "", "quiet by default");
        // Flushed: the write-ahead log is empty or gone.
        let wal = folder.path().join("homeport-data/archive.sqlite-wal");
        assert_eq!(std::fs::metadata(wal).map_or(0, |file| file.len()), 0);
    }
}

#[test]
fn single_services_run_alone() {
    let folder = tempfile::tempdir().unwrap();
    let relay = homeport(folder.path(), "relay");
    let (mut relay, summary) = started(relay);
    assert!(summary.contains("relay") && !summary.contains("seed  "), "{summary}");
    let url = summary.lines().find_map(|line| line.trim().strip_prefix("relay")).unwrap().trim().to_owned();
    let mut turn = homeport(folder.path(), "turn");
    turn.env("HOMEPORT_TURN__SECRET", "north");
    let (mut turn, summary) = started(turn);
    assert!(summary.contains("turn:") && !summary.contains("north"), "{summary}");
    let mut seed = homeport(folder.path(), "seed");
    seed.args(["--room", "my-app"]).env("HOMEPORT_SEED__RELAYS", format!("[\"{url}\"]"));
    let (mut seed, summary) = started(seed);
    assert!(summary.contains("my-app"), "{summary}");
    for child in [&mut seed, &mut turn, &mut relay] {
        signal(child, "-TERM");
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_taken_port_is_named_with_its_setting() {
    let folder = tempfile::tempdir().unwrap();
    let held_tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let held_udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (tcp, udp) = (held_tcp.local_addr().unwrap(), held_udp.local_addr().unwrap());
    for (variable, setting, address) in [
        ("HOMEPORT_RELAY__LISTEN", "relay.listen", tcp),
        ("HOMEPORT_METRICS__LISTEN", "metrics.listen", tcp),
        ("HOMEPORT_TURN__LISTEN", "turn.listen", udp),
        ("HOMEPORT_SEED__LISTEN", "seed.listen", udp),
    ] {
        let mut command = homeport(folder.path(), "up");
        command.env(variable, address.to_string());
        let text = complaint(command);
        assert!(text.contains(setting) && text.contains(&address.port().to_string()), "{text}");
    }
}

#[test]
fn a_wrong_setting_is_named_with_file_and_nearest_key() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("homeport.toml"), "[relay]\nlistn = \"[::]:1\"\n").unwrap();
    let text = complaint(homeport(folder.path(), "up"));
    for expected in ["homeport.toml", "relay.listn", "relay.listen"] {
        assert!(text.contains(expected), "{text}");
    }
    let mut elsewhere = homeport(folder.path(), "up");
    elsewhere.args(["--config", "missing.toml"]);
    assert!(complaint(elsewhere).contains("missing.toml"));
}

#[test]
fn a_relay_for_known_keys_knows_the_seed_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = homeport(folder.path(), "up");
    command.args(["--room", "my-app"]).env("HOMEPORT_RELAY__ADMISSION", "auth");
    let (mut child, summary) = started(command);
    let address = summary.split("http://").last().unwrap().split('/').next().unwrap().to_owned();
    let delivered = || {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("homeport_relay_deliveries_total ")).unwrap();
        line.parse::<f64>().unwrap()
    };
    // The seed hears its own announces in both rooms: it was let in, and subscribed.
    let deadline = Instant::now() + Duration::from_secs(20);
    while delivered() < 2.0 {
        assert!(Instant::now() < deadline, "the seed was not let in");
        std::thread::sleep(Duration::from_millis(20));
    }
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_archive_that_is_not_ours_stops_the_start_and_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("homeport-data");
    std::fs::create_dir(&data).unwrap();
    let path = data.join("archive.sqlite");
    let content = b"this is somebody's file, not an archive\n".repeat(200);
    std::fs::write(&path, &content).unwrap();
    let text = complaint(homeport(folder.path(), "up"));
    assert!(text.contains("archive.sqlite") && text.contains("untouched"), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), content);
}

#[test]
fn two_processes_do_not_share_an_archive() {
    let folder = tempfile::tempdir().unwrap();
    let (mut first, _) = started(homeport(folder.path(), "up"));
    let text = complaint(homeport(folder.path(), "up"));
    assert!(text.contains("in use") && text.contains("seed.data"), "{text}");
    signal(&first, "-TERM");
    assert!(first.wait().unwrap().success());
}

#[test]
fn the_settings_of_coturn_are_printed_as_ours_and_what_is_left_out_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("turnserver.conf");
    std::fs::write(&file, "listening-port=3479\nuser=alice:pass\nmobility\n").unwrap();
    let mut command = homeport(folder.path(), "turn");
    let Output { status, stdout, stderr } = command.arg("import").arg(&file).output().unwrap();
    assert!(status.success());
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(stdout.contains("listen = \"[::]:3479\"") && stdout.contains("alice = \"pass\""), "{stdout}");
    assert!(stderr.contains("mobility"), "{stderr}");
}

#[test]
fn shells_and_the_manual_learn_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let Output { status, stdout, .. } = homeport(folder.path(), "completions").arg("bash").output().unwrap();
    let completions = String::from_utf8(stdout).unwrap();
    assert!(status.success() && completions.contains("restore-backup"), "{completions}");
    assert!(homeport(folder.path(), "manual").arg(folder.path()).status().unwrap().success());
    for page in ["homeport.1", "homeport-turn-import.1", "homeport-rooms-restore-backup.1"] {
        assert!(folder.path().join(page).exists(), "{page}");
    }
}

#[test]
fn a_turn_server_alone_makes_up_a_secret_once() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("homeport-data/turn-secret");
    let run = || {
        let (mut child, _) = started(homeport(folder.path(), "turn"));
        signal(&child, "-TERM");
        assert!(child.wait().unwrap().success());
        std::fs::read_to_string(&secret).unwrap()
    };
    assert_eq!(run(), run());
}

/// What `homeport rooms` prints; its exit code must be `success`.
fn rooms(folder: &Path, arguments: &[&str], success: bool) -> String {
    let Output { status, stdout, stderr } = homeport(folder, "rooms").args(arguments).output().unwrap();
    let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    assert_eq!(status.success(), success, "{arguments:?}: {text}");
    text
}

#[test]
fn rooms_come_and_go_without_a_restart_and_are_remembered() {
    let folder = tempfile::tempdir().unwrap();
    assert!(rooms(folder.path(), &["list"], false).contains("no homeport with a seed runs"));
    let up = || {
        let mut command = homeport(folder.path(), "up");
        command.args(["--room", "fixed"]).env("HOMEPORT_RELAY__ADMISSION", "rooms");
        started(command)
    };
    let (mut child, _) = up();
    std::fs::write(folder.path().join("password"), "pw1\n").unwrap();
    rooms(folder.path(), &["add", "guarded", "--password-file", "password"], true);
    rooms(folder.path(), &["add", "crowd", "--cell-size", "5", "--bridge", "every"], true);
    rooms(folder.path(), &["pause", "crowd"], true);
    assert!(rooms(folder.path(), &["add", "crowd"], false).contains("there already"));
    assert!(rooms(folder.path(), &["add", "x", "--cell-size", "0"], false).contains("at least one member"));
    assert!(rooms(folder.path(), &["remove", "fixed"], false).contains("take it out there"));
    assert!(rooms(folder.path(), &["resume", "nobody"], false).contains("no such room"));
    let list = rooms(folder.path(), &["list"], true);
    assert!(list.contains("guarded  full mesh") && list.contains("crowd    paused"), "{list}");
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());

    let (mut child, summary) = up();
    assert!(summary.contains("guarded") && !summary.contains("crowd"), "{summary}");
    rooms(folder.path(), &["resume", "crowd"], true);
    assert!(rooms(folder.path(), &["show", "crowd"], true).contains("1 cells, 0 bridged"));
    assert!(rooms(folder.path(), &["verify", "crowd"], true).contains("0 operations hold"));
    assert!(rooms(folder.path(), &["verify", "nobody"], false).contains("no room of that name"));
    rooms(folder.path(), &["remove", "guarded"], true);
    let json: serde_json::Value = serde_json::from_str(&rooms(folder.path(), &["list", "--json"], true)).unwrap();
    let names: Vec<&str> = json.as_array().unwrap().iter().map(|room| room["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["crowd", "fixed"]);
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
}
