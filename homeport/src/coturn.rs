//! `homeport turn import`: the settings of coturn as those of Homeport.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use toml::{Table, Value};

/// What became of a `turnserver.conf`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Import {
    /// The settings, as `homeport.toml` has them.
    pub(crate) settings: Table,
    /// What a person must know: lines that have no counterpart here, or another meaning.
    pub(crate) notes: Vec<String>,
}

/// The values of each key, in the order of the file.
type Values = BTreeMap<String, Vec<String>>;

/// Keys that only say what is always so here.
const GIVEN: &[&str] = &[
    "lt-cred-mech",
    "use-auth-secret",
    "fingerprint",
    "no-cli",
    "no-multicast-peers",
    "no-tcp-relay",
    "no-loopback-peers",
    "no-tlsv1",
    "no-tlsv1_1",
    "stale-nonce",
    "secure-stun",
    "log-file",
    "syslog",
    "simple-log",
    "verbose",
    "pidfile",
    "proc-user",
    "proc-group",
    "no-stdout-log",
    "new-log-timestamp",
    "prometheus",
];

/// Reads a `turnserver.conf`.
pub(crate) fn import(text: &str) -> Import {
    let mut values = Values::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (key, value) = line.split_once(['=', ' ', '\t']).unwrap_or((line, ""));
        let value = value.trim().trim_start_matches('=').trim().trim_matches('"');
        values.entry(key.trim().to_owned()).or_default().push(value.to_owned());
    }
    Importer { values, turn: Table::new(), notes: Vec::new() }.run()
}

struct Importer {
    values: Values,
    turn: Table,
    notes: Vec<String>,
}

impl Importer {
    fn run(mut self) -> Import {
        self.listeners();
        self.addresses();
        self.users();
        self.limits();
        for (key, setting) in [("realm", "realm"), ("server-name", "host")] {
            if let Some(value) = self.last(key) {
                self.turn.insert(setting.into(), value.into());
            }
        }
        let mut settings = Table::new();
        let (cert, key) = (self.last("cert"), self.last("pkey"));
        match (cert, key) {
            (Some(cert), Some(key)) => {
                let tls = Table::from_iter([("cert".to_owned(), cert.into()), ("key".to_owned(), key.into())]);
                settings.insert("tls".into(), Value::Table(tls));
            }
            (None, None) => {}
            _ => self.notes.push("cert and pkey: one is not there without the other; TLS is left off".into()),
        }
        for key in GIVEN {
            self.values.remove(*key);
        }
        let left = self.values.iter().map(|(key, values)| {
            // A key may be followed by a secret: values stay out of it.
            let times = if values.len() > 1 { format!(" ({} times)", values.len()) } else { String::new() };
            format!("{key}{times}: has no counterpart here and is left out")
        });
        self.notes.extend(left);
        settings.insert("turn".into(), Value::Table(self.turn));
        Import { settings, notes: self.notes }
    }

    fn all(&mut self, key: &str) -> Vec<String> {
        self.values.remove(key).unwrap_or_default()
    }

    fn last(&mut self, key: &str) -> Option<String> {
        self.all(key).pop()
    }

    /// A number; anything else is named.
    fn number<T: std::str::FromStr>(&mut self, key: &str) -> Option<T> {
        let text = self.last(key)?;
        let number = text.parse().ok();
        if number.is_none() {
            self.notes.push(format!("{key}: {text:?} is no number that can be used, and is left out"));
        }
        number
    }

    fn listeners(&mut self) {
        let ips = self.all("listening-ip");
        let ip = match ips.as_slice() {
            [one] => one.parse::<IpAddr>().ok(),
            _ => None,
        };
        if !ips.is_empty() && ip.is_none() {
            self.notes.push("listening-ip: Homeport listens on one address or on all; it will be all".into());
        }
        let ip = ip.unwrap_or(Ipv6Addr::UNSPECIFIED.into());
        for (key, setting, default) in [("listening-port", "listen", 3478), ("tls-listening-port", "listen_tls", 5349)]
        {
            let port = self.number(key);
            if port.is_some() || !ip.is_unspecified() {
                let address = std::net::SocketAddr::new(ip, port.unwrap_or(default));
                self.turn.insert(setting.into(), address.to_string().into());
            }
        }
        let (min, max) = (self.number::<u16>("min-port"), self.number::<u16>("max-port"));
        if min.is_some() || max.is_some() {
            let ports = format!("{}-{}", min.unwrap_or(49_152), max.unwrap_or(65_535));
            self.turn.insert("relay_ports".into(), ports.into());
        }
    }

    fn addresses(&mut self) {
        let external = self.all("external-ip");
        if !external.is_empty() {
            self.turn.insert("external_ip".into(), list(external));
        }
        for (key, setting) in [("allowed-peer-ip", "allow_peers"), ("denied-peer-ip", "deny_peers")] {
            let mut nets = Vec::new();
            for range in self.all(key) {
                match networks(&range) {
                    Some(found) => nets.extend(found.iter().map(IpNet::to_string)),
                    None => self.notes.push(format!("{key}: {range:?} is no range of addresses, and is left out")),
                }
            }
            if !nets.is_empty() {
                self.turn.insert(setting.into(), list(nets));
            }
        }
    }

    fn users(&mut self) {
        let mut users = Table::new();
        for user in self.all("user") {
            match user.split_once(':') {
                Some((name, password)) if !password.starts_with("0x") => {
                    users.insert(name.to_owned(), password.into());
                }
                Some((name, _)) => {
                    self.notes.push(format!("user {name:?}: has a key instead of a password; set a password anew"));
                }
                None => self.notes.push("user: a line without a colon is left out".into()),
            }
        }
        if !users.is_empty() {
            self.turn.insert("users".into(), Value::Table(users));
        }
        let secrets = self.all("static-auth-secret");
        match secrets.as_slice() {
            [] => {}
            [one] => {
                self.turn.insert("secret".into(), one.clone().into());
            }
            _ => {
                self.turn.insert("secret".into(), list(secrets));
            }
        }
    }

    fn limits(&mut self) {
        for (key, setting) in [("user-quota", "user_quota"), ("total-quota", "total_quota")] {
            if let Some(quota) = self.number::<i64>(key) {
                self.turn.insert(setting.into(), quota.into());
            }
        }
        for (key, setting) in [("max-bps", "max_bytes_per_second"), ("bps-capacity", "total_bytes_per_second")] {
            if let Some(rate) = self.number::<i64>(key).filter(|rate| *rate > 0) {
                self.turn.insert(setting.into(), rate.saturating_mul(2).into());
                self.notes.push(format!(
                    "{key}: coturn counts each direction for itself, Homeport both together, so turn.{setting} is twice as much"
                ));
            }
        }
    }
}

fn list(texts: Vec<String>) -> Value {
    Value::Array(texts.into_iter().map(Value::String).collect())
}

/// The networks that make up `first-last`, or one address.
fn networks(range: &str) -> Option<Vec<IpNet>> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let first: IpAddr = first.trim().parse().ok()?;
    let last: IpAddr = last.trim().parse().ok()?;
    let nets = match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => v4(first, last),
        (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => v6(first, last),
        _ => return None,
    };
    Some(nets)
}

fn v4(first: Ipv4Addr, last: Ipv4Addr) -> Vec<IpNet> {
    Ipv4Subnets::new(first, last, 0).map(IpNet::from).collect()
}

fn v6(first: Ipv6Addr, last: Ipv6Addr) -> Vec<IpNet> {
    Ipv6Subnets::new(first, last, 0).map(IpNet::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r"
# a comment
listening-port=3479
tls-listening-port = 443
listening-ip=203.0.113.7
min-port=50000
max-port=50100
realm=example.org
server-name=turn.example.org
external-ip=203.0.113.7/10.0.0.2
user=alice:pass:word
user=bob:0xbc807ee29df3c9ffa736523fb2c4e8ee
static-auth-secret=north
static-auth-secret=south
lt-cred-mech
use-auth-secret
fingerprint
user-quota=12
total-quota=1200
max-bps=64000
bps-capacity=0
denied-peer-ip=10.0.0.0-10.255.255.255
denied-peer-ip=192.0.2.1
denied-peer-ip=nowhere
allowed-peer-ip=10.1.0.5-10.1.0.6
cert=/etc/cert.pem
pkey=/etc/key.pem
redis-userdb=secret-of-redis
mobility
";

    #[test]
    fn a_file_of_coturn_becomes_settings_that_are_understood() {
        let Import { settings, notes } = import(FILE);
        let text = toml::to_string(&settings).unwrap();
        let expected: Table = toml::from_str(
            r#"
            [turn]
            listen = "203.0.113.7:3479"
            listen_tls = "203.0.113.7:443"
            relay_ports = "50000-50100"
            realm = "example.org"
            host = "turn.example.org"
            external_ip = ["203.0.113.7/10.0.0.2"]
            users = { alice = "pass:word" }
            secret = ["north", "south"]
            user_quota = 12
            total_quota = 1200
            max_bytes_per_second = 128000
            deny_peers = ["10.0.0.0/8", "192.0.2.1/32"]
            allow_peers = ["10.1.0.5/32", "10.1.0.6/32"]
            [tls]
            cert = "/etc/cert.pem"
            key = "/etc/key.pem"
            "#,
        )
        .unwrap();
        assert_eq!(settings, expected, "{text}");
        let notes = notes.join("\n");
        for named in ["\"bob\"", "\"nowhere\"", "redis-userdb", "mobility", "max-bps"] {
            assert!(notes.contains(named), "{named} is not in {notes}");
        }
        assert!(!notes.contains("secret-of-redis") && !notes.contains("0xbc") && !notes.contains("fingerprint"));

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("homeport.toml");
        std::fs::write(&file, text).unwrap();
        let turn = crate::settings::load(Some(&file), None, &[]).unwrap().turn(false).unwrap();
        assert_eq!(turn.listen.to_string(), "203.0.113.7:3479");
        assert_eq!(turn.credentials.secrets, ["north", "south"]);
        assert_eq!(turn.limits.allocations.user, 12);
        assert_eq!(turn.deny_peers.len(), 2);
    }

    #[test]
    fn an_empty_file_sets_nothing_and_says_nothing() {
        let Import { settings, notes } = import("# nothing\n\n");
        assert_eq!(toml::to_string(&settings).unwrap().trim(), "[turn]");
        assert!(notes.is_empty());
    }
}
