//! What a person sees when Homeport has started.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use crate::client_config::printed;

/// What runs, and where.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    /// Where the relay listens, and its public address if set.
    pub(crate) relay: Option<(SocketAddr, Option<String>)>,
    /// Where TURN is.
    pub(crate) turn: Option<TurnSummary>,
    /// Where links arrive, and the archive's folder.
    pub(crate) seed: Option<(SocketAddr, PathBuf)>,
    /// The address of the identity that signs.
    pub(crate) identity: Option<String>,
    /// The rooms that the seed stays in.
    pub(crate) rooms: Vec<String>,
    /// Where metrics are.
    pub(crate) metrics: Option<SocketAddr>,
}

/// Where a TURN server is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TurnSummary {
    /// The address of its allocations.
    pub(crate) external_ip: IpAddr,
    /// The port of UDP and TCP.
    pub(crate) port: u16,
    /// The port of TLS.
    pub(crate) tls_port: Option<u16>,
}

impl Summary {
    /// The text; `color` for a terminal.
    pub(crate) fn print(&self, color: bool) -> String {
        let (bold, dim, plain) = if color { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
        let mut text = format!("\n{bold}Homeport is up.{plain}\n\n");
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {dim}{name:<9}{plain}{value}");
        };
        if let Some((listen, public)) = &self.relay {
            row("relay", public.clone().unwrap_or_else(|| format!("ws://{}", reachable(*listen))));
        }
        if let Some(TurnSummary { external_ip, port, tls_port }) = self.turn {
            let host = printed(external_ip);
            let tls = tls_port.map(|port| format!(", turns:{host}:{port}")).unwrap_or_default();
            row("turn", format!("turn:{host}:{port} (UDP and TCP){tls}"));
        }
        if let Some((listen, data)) = &self.seed {
            row("seed", format!("UDP port {}, archive in {}", listen.port(), data.display()));
            let rooms = if self.rooms.is_empty() {
                "none; name one with --room my-app".to_owned()
            } else {
                self.rooms.join(", ")
            };
            row("rooms", rooms);
            if let Some(identity) = &self.identity {
                row("signs as", identity.clone());
            }
        }
        if let Some(metrics) = self.metrics {
            row("metrics", format!("http://{metrics}/metrics"));
        }
        if let Some((listen, public)) = &self.relay {
            let page = match public {
                Some(url) => url.replacen("ws", "http", 1).trim_end_matches('/').to_owned(),
                None => format!("http://{}", reachable(*listen)),
            };
            let room = self.rooms.first().map_or("my-app", String::as_str);
            let room = serde_json::Value::from(room);
            let _ = write!(
                text,
                "\nPaste this into your app:\n\n  \
                 {bold}import {{ gdb }} from \"genosdb\"\n  \
                 const rtc = await (await fetch(\"{page}/client-config.json\")).json()\n  \
                 const db = await gdb({room}, {{ rtc }}){plain}\n"
            );
        }
        text
    }
}

/// An address that a browser on this machine can open.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = if listen.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { listen.ip() };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_says_where_everything_is_and_what_to_paste() {
        let summary = Summary {
            relay: Some(("[::]:8080".parse().unwrap(), None)),
            turn: Some(TurnSummary { external_ip: "203.0.113.7".parse().unwrap(), port: 3478, tls_port: Some(5349) }),
            seed: Some(("[::]:3479".parse().unwrap(), "homeport-data".into())),
            identity: Some("0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266".into()),
            rooms: vec!["it's \"mine\"".into()],
            metrics: Some("127.0.0.1:9464".parse().unwrap()),
        };
        let text = summary.print(false);
        for expected in [
            "ws://127.0.0.1:8080",
            "turn:203.0.113.7:3478",
            "turns:203.0.113.7:5349",
            "3479",
            "homeport-data",
            "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
            "http://127.0.0.1:9464/metrics",
            "fetch(\"http://127.0.0.1:8080/client-config.json\")",
            r#"gdb("it's \"mine\"", { rtc })"#,
        ] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
        assert!(!text.contains('\x1b') && summary.print(true).contains('\x1b'));
    }
}
