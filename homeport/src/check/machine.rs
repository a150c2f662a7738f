//! The settings, and the machine that they are for.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Finding;
use crate::settings::{self, Settings};

/// Below so many bytes a disk is nearly full, and full.
const LITTLE_SPACE: u64 = 1 << 30;
const NO_SPACE: u64 = 64 << 20;
/// What Linux gives sockets as it comes.
const USUAL_BUFFER: u64 = 212_992;
/// GenosDB takes what is further ahead for a mistake (wire §4).
const DRIFT_CAP: Duration = Duration::from_secs(2 * 3_600);

/// What is allowed but probably not meant.
pub(super) fn settings(settings: &Settings, file: Option<&Path>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut warn = |found: &str, advice: &str| findings.push(Finding::warning("settings", found, advice));
    if let Some(file) = settings::file(file)
        && let Ok(metadata) = file.metadata()
        && metadata.permissions().mode() & 0o077 != 0
        && settings.holds_secrets()
    {
        warn(
            &format!("others on this machine can read the secrets in {}", file.display()),
            &format!("chmod 600 {}", file.display()),
        );
    }
    if settings.seed.room.is_empty() {
        warn(
            "the seed stays in no room, so it keeps nothing",
            "name one: [[seed.room]] name = \"my-app\", or homeport rooms add",
        );
    }
    if !settings.metrics.listen.ip().is_loopback() {
        warn(
            "everybody who reaches metrics.listen can read the metrics",
            "let it listen on loopback, or close its port in the firewall",
        );
    }
    if let Some(url) = settings.relay_url().filter(|url| url.starts_with("ws://") && !is_local(url)) {
        warn(
            &format!("pages that come with https:// cannot use {url}"),
            "set [tls], or put a proxy in front and set relay.public_url to wss://…",
        );
    }
    if settings.has_tls() && settings.turn.host.is_none() && settings.host().is_none() {
        warn(
            "apps are told of TURN over TLS at an address, which no certificate is for",
            "set turn.host to a name of the certificate",
        );
    }
    if settings.has_tls() && settings.relay_url().is_none() {
        warn(
            "apps are told of the relay under the name that they have asked for",
            "set relay.public_url to wss:// and a name of the certificate",
        );
    }
    if findings.is_empty() {
        findings.push(Finding::ok("settings", "nothing in them is odd"));
    }
    findings
}

fn is_local(url: &str) -> bool {
    let host = url.trim_start_matches("ws://");
    host.starts_with("127.") || host.starts_with("localhost") || host.starts_with("[::1]")
}

/// Whether the system gives what the settings promise.
pub(super) fn limits(settings: &Settings) -> Vec<Finding> {
    // Connections of the relay and of TURN, relayed ports, and what a process has besides.
    let needed = settings.relay.max_connections + settings.turn.max_connections + 1_024;
    let needed = u64::try_from(needed).unwrap_or(u64::MAX);
    let files = match rlimit::Resource::NOFILE.get() {
        // A process raises its own limit up to the hard one.
        Ok((_, hard)) if hard >= needed => Finding::ok("file descriptors", format!("up to {hard}")),
        Ok((_, hard)) if hard >= 4_096 => Finding::ok(
            "file descriptors",
            format!("up to {hard}, which is fewer than relay.max_connections and turn.max_connections together"),
        ),
        Ok((_, hard)) => Finding::failure(
            "file descriptors",
            format!("only {hard}, and each client is one"),
            "raise the limit: LimitNOFILE= in the unit, ulimits in compose, or ulimit -Hn",
        ),
        Err(error) => Finding::warning("file descriptors", error.to_string(), "see what ulimit -Hn says"),
    };
    let mut findings = vec![files];
    for (name, file) in [("receive", "/proc/sys/net/core/rmem_max"), ("send", "/proc/sys/net/core/wmem_max")] {
        let Some(bytes) = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<u64>().ok()) else {
            // Namespaces and containers may hide it; then it is not theirs to change either.
            continue;
        };
        let found = format!("sockets may {name} {bytes} bytes ahead");
        findings.push(if bytes < USUAL_BUFFER {
            Finding::warning(
                "socket buffers",
                found,
                format!("bursts of packets may be lost: sysctl -w net.core.{}mem_max=4194304", &name[..1]),
            )
        } else {
            Finding::ok("socket buffers", found)
        });
    }
    findings
}

/// Whether there is room for the archive.
pub(super) fn disk(settings: &Settings) -> Vec<Finding> {
    let data = &settings.seed.data;
    let existing = data.ancestors().find(|folder| folder.exists() || folder.as_os_str().is_empty());
    let folder = existing.filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let space = match rustix::fs::statvfs(folder) {
        Ok(found) => found.f_bavail * found.f_frsize,
        Err(error) => {
            return vec![Finding::failure("disk", format!("{}: {error}", folder.display()), "see to seed.data")];
        }
    };
    let found = format!("{} MiB are free for {}", space >> 20, data.display());
    let advice = "make room: seed.keep shortens the log, and backups need space too";
    let mut findings = vec![match space {
        0..NO_SPACE => Finding::failure("disk", found, advice),
        NO_SPACE..LITTLE_SPACE => Finding::warning("disk", found, advice),
        _ => Finding::ok("disk", found),
    }];
    if data.exists() && rustix::fs::access(data, rustix::fs::Access::WRITE_OK).is_err() {
        findings.push(Finding::failure(
            "disk",
            format!("{} cannot be written", data.display()),
            "give it to the user that runs homeport",
        ));
    }
    findings
}

/// What to do about a clock that is wrong.
pub(super) const CLOCK_ADVICE: &str = "set the clock, and keep it by NTP (timedatectl set-ntp true): operations with wrong times win or lose against others";

/// Whether the clock can be right: it is not before this program was made, nor far behind what the archive has seen.
pub(super) fn clock(settings: &Settings) -> Vec<Finding> {
    let now = SystemTime::now();
    let shown = |at: SystemTime| {
        let at = UNIX_EPOCH + Duration::from_secs(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
        humantime::format_rfc3339(at).to_string()
    };
    let made = std::env::current_exe().and_then(|file| file.metadata()?.modified());
    if let Ok(made) = made
        && now + DRIFT_CAP < made
    {
        return vec![Finding::failure(
            "clock",
            format!("{} is before this program was made", shown(now)),
            CLOCK_ADVICE,
        )];
    }
    let archive = settings.seed.data.join("archive.sqlite");
    let written = [archive.clone(), archive.with_extension("sqlite-wal")]
        .iter()
        .filter_map(|file| file.metadata().ok()?.modified().ok())
        .max();
    if let Some(written) = written
        && now + DRIFT_CAP < written
    {
        return vec![Finding::failure(
            "clock",
            format!("{} is long before the archive was last written, {}", shown(now), shown(written)),
            CLOCK_ADVICE,
        )];
    }
    vec![Finding::ok("clock", format!("{}; browsers must be within two hours of that", shown(now)))]
}
