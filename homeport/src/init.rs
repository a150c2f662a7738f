//! `homeport init`: writes a first homeport.toml, with secrets made up, and says what to do next.

use std::fmt::Write as _;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use rand::Rng as _;
use rand::distr::Alphanumeric;
use toml::Value;

use crate::private_file;
use crate::settings::{self, AcmeChallenge, DEFAULT_FILE, SYSTEM_FILE, Settings};

/// The archive's folder, and that of the installed service (`deploy/systemd`).
const DATA: &str = "homeport-data";
const SERVICE_DATA: &str = "/var/lib/homeport";

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The name under which apps will reach this machine, such as relay.example.com
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    /// A room for the seed to stay in: the name of a database; may be given several times
    #[arg(long = "room", value_name = "NAME")]
    rooms: Vec<String>,
    /// Where the certificate comes from; with a domain, acme unless said otherwise
    #[arg(long, value_enum)]
    tls: Option<Tls>,
    /// Whom the certificate authority may write to, with --tls acme
    #[arg(long, value_name = "ADDRESS")]
    email: Option<String>,
    /// The certificate in PEM, with --tls files
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its private key in PEM, with --tls files
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// The public address of this machine, or "public/private" behind a one-to-one NAT; found by itself where it can be
    #[arg(long, value_name = "ADDRESS")]
    external_ip: Option<String>,
    /// The folder for the archive [default: homeport-data; /var/lib/homeport, with --config /etc/homeport/homeport.toml]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The file to write
    #[arg(long, value_name = "FILE", default_value = DEFAULT_FILE)]
    config: PathBuf,
    /// Write the file anew; secrets that stand in it are kept
    #[arg(long)]
    force: bool,
    /// Also write .env, for docker compose
    #[arg(long)]
    docker: bool,
    /// Ask nothing, take what is given here and defaults
    #[arg(long, short)]
    yes: bool,
}

/// Where the certificate of relay and TURN comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Tls {
    /// Asked for and renewed by itself, at Let's Encrypt
    Acme,
    /// From files that something else renews
    Files,
    /// A proxy on this machine ends TLS, and passes on to port 8080
    Proxy,
    /// There is none: for a try on one machine or network
    None,
}

/// What goes into the file.
#[derive(Debug)]
struct Answers {
    domain: Option<String>,
    rooms: Vec<String>,
    tls: Tls,
    email: Option<String>,
    files: Option<(PathBuf, PathBuf)>,
    external_ip: String,
    data: PathBuf,
    secrets: Secrets,
}

/// What nobody else knows.
#[derive(Debug)]
struct Secrets {
    turn: Value,
    status_token: String,
}

impl InitArgs {
    /// Whether the file is for the installed service.
    fn is_of_service(&self) -> bool {
        self.config == Path::new(SYSTEM_FILE)
    }
}

pub(crate) fn run(args: &InitArgs) -> anyhow::Result<()> {
    let exists = args.config.exists();
    if exists && !args.force {
        println!(
            "{} is there already; nothing was changed. With --force it is written anew, its secrets kept.",
            args.config.display()
        );
        if args.docker && !env_file(&args.config).exists() {
            let settings = settings::load(Some(&args.config), None, &[])?;
            write_env(&args.config, &settings)?;
        }
        return Ok(());
    }
    let answers = ask(args, if exists { kept(&args.config)? } else { Secrets::new() })?;
    let text = file_text(&answers);
    write(&args.config, &text)?;
    // What was written is read as it will be: a mistake shows here, not at the start.
    let settings = settings::load(Some(&args.config), None, &[])?;
    println!("Wrote {}, which only you can read.", args.config.display());
    if args.docker {
        write_env(&args.config, &settings)?;
    }
    print!("{}", next_steps(&answers, &settings, &args.config));
    Ok(())
}

impl Secrets {
    fn new() -> Self {
        Self { turn: Value::String(secret()), status_token: secret() }
    }
}

/// The secrets of a file that is to be written anew.
fn kept(config: &Path) -> anyhow::Result<Secrets> {
    let text = std::fs::read_to_string(config).with_context(|| format!("cannot read {}", config.display()))?;
    let table: toml::Table = text.parse().with_context(|| format!("{} is not TOML", config.display()))?;
    let of = |section: &str, key: &str| table.get(section).and_then(|section| section.get(key)).cloned();
    let new = Secrets::new();
    Ok(Secrets {
        turn: of("turn", "secret").unwrap_or(new.turn),
        status_token: of("relay", "status_token")
            .and_then(|token| token.as_str().map(str::to_owned))
            .unwrap_or(new.status_token),
    })
}

fn secret() -> String {
    rand::rng().sample_iter(Alphanumeric).take(43).map(char::from).collect()
}

/// Takes what the flags say, and asks a person for the rest.
fn ask(args: &InitArgs, secrets: Secrets) -> anyhow::Result<Answers> {
    let asks = !args.yes && std::io::stdin().is_terminal();
    let question = |text: &str, default: &str| -> anyhow::Result<String> {
        if !asks {
            return Ok(default.to_owned());
        }
        print!("{text} [{}]: ", if default.is_empty() { "none" } else { default });
        std::io::stdout().flush()?;
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line)?;
        let line = line.trim();
        Ok(if line.is_empty() { default.to_owned() } else { line.to_owned() })
    };
    let domain = match &args.domain {
        Some(domain) => domain.clone(),
        None => question("The name under which apps will reach this machine, such as relay.example.com", "")?,
    };
    let domain = Some(domain).filter(|domain| !domain.is_empty());
    let tls = match (args.tls, &domain) {
        (Some(tls), _) => tls,
        _ if args.cert.is_some() => Tls::Files,
        (None, None) => Tls::None,
        (None, Some(_)) => {
            let text = "The certificate: acme (asked for by itself), files, proxy (in front), or none";
            let answer = question(text, "acme")?;
            Tls::from_str(&answer, true)
                .map_err(|_| anyhow::anyhow!("{answer:?} is none of acme, files, proxy, none"))?
        }
    };
    let email = match (&args.email, tls) {
        (Some(email), _) => email.clone(),
        (None, Tls::Acme) => question("Whom the certificate authority may write to", "")?,
        _ => String::new(),
    };
    let files = match (&args.cert, &args.key, tls) {
        (Some(cert), Some(key), _) => Some((cert.clone(), key.clone())),
        (_, _, Tls::Files) => {
            let cert = question("The file of the certificate, in PEM", "/etc/homeport/cert.pem")?;
            let key = question("The file of its private key, in PEM", "/etc/homeport/key.pem")?;
            Some((cert.into(), key.into()))
        }
        _ => None,
    };
    let rooms = if args.rooms.is_empty() {
        let answer = question("Rooms for the seed to stay in: names of databases, separated by commas", "my-app")?;
        answer.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    } else {
        args.rooms.clone()
    };
    let external_ip = match &args.external_ip {
        Some(address) => address.clone(),
        None => question("The public address of this machine (auto: found by itself)", "auto")?,
    };
    if tls == Tls::Acme && domain.is_none() {
        bail!("a certificate needs a name: give --domain, or --tls none");
    }
    Ok(Answers {
        domain,
        rooms,
        tls,
        email: Some(email).filter(|email| !email.is_empty()),
        files,
        external_ip,
        data: args.data.clone().unwrap_or_else(|| if args.is_of_service() { SERVICE_DATA } else { DATA }.into()),
        secrets,
    })
}

/// A text as TOML spells it.
fn quoted(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn file_text(answers: &Answers) -> String {
    let Answers { domain, rooms, tls, email, files, external_ip, data, secrets } = answers;
    let mut text =
        "# Homeport's settings, written by `homeport init`. All keys, with their defaults: docs/configuration.md\n\n"
            .to_owned();
    let mut line = |line: &str| {
        let _ = writeln!(text, "{line}");
    };
    line("[relay]");
    match tls {
        Tls::Acme | Tls::Files => {
            line("# WebSocket, status page and settings for apps, with TLS.");
            line("listen = \"[::]:443\"");
        }
        Tls::Proxy => {
            line("# For the proxy on this machine alone. It must pass WebSockets on, and say who the client is.");
            line("listen = \"127.0.0.1:8080\"");
            line("trusted_proxy_header = \"x-forwarded-for\"");
        }
        Tls::None => {
            line(
                "# WebSocket, status page and settings for apps. Pages that come with https:// cannot use it without TLS.",
            );
            line("listen = \"[::]:8080\"");
        }
    }
    if let Some(domain) = domain {
        let url = if *tls == Tls::None { format!("ws://{domain}:8080") } else { format!("wss://{domain}") };
        line("# What apps are told.");
        line(&format!("public_url = {}", quoted(&url)));
    }
    line("# \"rooms\" serves the rooms below and nobody else's.");
    line("admission = \"open\"");
    line("# Shows rooms on the status page to who knows it: open …/#token=…");
    line(&format!("status_token = {}", quoted(&secrets.status_token)));
    line("");
    line("[turn]");
    line("# The public address of this machine; \"public/private\" behind a one-to-one NAT, as on most clouds.");
    line(&format!("external_ip = {}", quoted(external_ip)));
    if let Some(domain) = domain {
        line(&format!("host = {}", quoted(domain)));
    }
    line("# Mints credentials for apps. Whoever knows it can use your TURN server.");
    line(&format!("secret = {}", secrets.turn));
    line("");
    line("[seed]");
    line("# The archive: this folder is what to back up.");
    line(&format!("data = {}", quoted(&data.display().to_string())));
    for room in rooms {
        line("");
        line("[[seed.room]]");
        line(&format!("name = {}", quoted(room)));
        line("# password = \"…\"              # as the app's");
        line("# cells = { cell_size = 10 }  # as the app's rtc.cells");
    }
    match (tls, domain, files) {
        (Tls::Acme, Some(domain), _) => {
            line("");
            line("[tls]");
            line("# Asked for at Let's Encrypt, which must reach port 80 of this machine.");
            let email = email.as_ref().map(|email| format!(", email = {}", quoted(email))).unwrap_or_default();
            line(&format!("acme = {{ domains = [{}]{email} }}", quoted(domain)));
        }
        (Tls::Files, _, Some((cert, key))) => {
            line("");
            line("[tls]");
            line("# Read again when they change.");
            line(&format!("cert = {}", quoted(&cert.display().to_string())));
            line(&format!("key = {}", quoted(&key.display().to_string())));
        }
        _ => {}
    }
    line("");
    line("[metrics]");
    line("# For Prometheus on this machine.");
    line("listen = \"127.0.0.1:9464\"");
    text
}

fn env_file(config: &Path) -> PathBuf {
    config.with_file_name(".env")
}

/// Writes what docker compose wants to know, unless it is there.
fn write_env(config: &Path, settings: &Settings) -> anyhow::Result<()> {
    let path = env_file(config);
    if path.exists() {
        println!("{} is there already; it was not changed.", path.display());
        return Ok(());
    }
    let mut text = "# For docker compose, written by `homeport init --docker`.\n".to_owned();
    for (name, value) in settings.compose_variables() {
        // In single quotes docker compose takes everything as it stands, but for the quote itself.
        let _ = writeln!(text, "{name}='{}'", value.replace('\'', "\\'"));
    }
    let _ = writeln!(text, "# Of the user admin at http://127.0.0.1:3000.\nGRAFANA_PASSWORD='{}'", secret());
    write(&path, &text)?;
    println!("Wrote {}, which only you can read.", path.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    private_file::write(path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

/// What a person has to do besides.
fn next_steps(answers: &Answers, settings: &Settings, config: &Path) -> String {
    let mut text = "\nOpen these in the firewall, here and at your provider:\n\n".to_owned();
    for Opening { port, protocol, what } in openings(settings) {
        let _ = writeln!(text, "  {protocol:<4} {port:<13} {what}");
    }
    let is_found = [DEFAULT_FILE, SYSTEM_FILE].iter().any(|found| config == Path::new(found));
    let flag = if is_found { String::new() } else { format!(" --config {}", config.display()) };
    let _ = write!(text, "\nNext:\n\n");
    if let Some(domain) = &answers.domain {
        let address = match answers.external_ip.split('/').next() {
            Some(ip) if ip.parse::<IpAddr>().is_ok() => ip.to_owned(),
            _ => "this machine's public address".to_owned(),
        };
        let _ = writeln!(text, "  point the name {domain} at {address}");
    }
    if answers.tls == Tls::Proxy {
        let _ = writeln!(
            text,
            "  let the proxy pass https://{} on to http://127.0.0.1:8080",
            answers.domain.as_deref().unwrap_or("…")
        );
    }
    if config == Path::new(SYSTEM_FILE) {
        let _ = writeln!(text, "  systemctl enable --now homeport");
    } else {
        let _ = writeln!(text, "  homeport up{flag}");
    }
    let _ = writeln!(text, "  homeport check{flag}   # says what works, and what to do about the rest");
    text
}

/// A port that clients must reach.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    pub(crate) port: String,
    pub(crate) protocol: &'static str,
    pub(crate) what: &'static str,
}

/// What clients must reach, by the settings.
pub(crate) fn openings(settings: &Settings) -> Vec<Opening> {
    let of = |port: u16, protocol, what| Opening { port: port.to_string(), protocol, what };
    let mut list = Vec::new();
    if !settings.relay.listen.ip().is_loopback() {
        list.push(of(settings.relay.listen.port(), "TCP", "relay and status page"));
    }
    if let Some(acme) = settings.acme().filter(|acme| acme.challenge == AcmeChallenge::Http01) {
        list.push(of(acme.listen.port(), "TCP", "the certificate authority"));
    }
    list.push(of(settings.turn.listen.port(), "UDP", "STUN and TURN"));
    list.push(of(settings.turn.listen.port(), "TCP", "TURN where UDP is blocked"));
    if settings.has_tls() && settings.turn.listen_tls != settings.relay.listen {
        list.push(of(settings.turn.listen_tls.port(), "TCP", "TURN over TLS"));
    }
    list.push(Opening { port: settings.turn.relay_ports.clone(), protocol: "UDP", what: "relayed traffic" });
    list.push(of(settings.seed.listen.port(), "UDP", "links with the seed"));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(domain: Option<&str>, tls: Tls) -> Answers {
        Answers {
            domain: domain.map(str::to_owned),
            rooms: vec!["it's \"mine\"".into(), "other".into()],
            tls,
            email: Some("you@example.com".into()),
            files: (tls == Tls::Files).then(|| ("/etc/a.pem".into(), "/etc/b.pem".into())),
            external_ip: "203.0.113.7".into(),
            data: "somewhere".into(),
            secrets: Secrets { turn: quoted("north"), status_token: "south".into() },
        }
    }

    fn written(answers: &Answers) -> Settings {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("homeport.toml");
        write(&path, &file_text(answers)).unwrap();
        settings::load(Some(&path), None, &[]).unwrap()
    }

    #[test]
    fn every_way_to_have_tls_makes_settings_that_say_so() {
        let names = |settings: &Settings| settings.seed.room.iter().map(|room| room.name.clone()).collect::<Vec<_>>();
        let acme = written(&answers(Some("relay.example.com"), Tls::Acme));
        assert_eq!(acme.relay_url().as_deref(), Some("wss://relay.example.com"));
        assert_eq!(acme.acme().unwrap().domains, ["relay.example.com"]);
        assert_eq!(names(&acme), ["it's \"mine\"", "other"]);
        assert_eq!(acme.turn_credentials().secrets, ["north"]);
        let files = written(&answers(Some("relay.example.com"), Tls::Files));
        assert!(files.has_tls() && files.acme().is_none());
        let proxy = written(&answers(Some("relay.example.com"), Tls::Proxy));
        assert!(proxy.relay.listen.ip().is_loopback() && !proxy.has_tls());
        assert_eq!(proxy.relay_url().as_deref(), Some("wss://relay.example.com"));
        let none = written(&answers(None, Tls::None));
        assert_eq!((none.relay_url(), none.has_tls()), (None, false));
    }

    #[test]
    fn who_writes_the_file_of_the_installed_service_is_told_to_start_that() {
        let answers = answers(None, Tls::None);
        let steps = |file: &str| next_steps(&answers, &written(&answers), Path::new(file));
        let service = steps(SYSTEM_FILE);
        assert!(service.contains("systemctl enable --now homeport\n  homeport check   #"), "{service}");
        assert!(steps(DEFAULT_FILE).contains("homeport up\n"));
        assert!(steps("other.toml").contains("homeport up --config other.toml\n"));
    }

    #[test]
    fn the_firewall_is_told_of_all_ports_that_clients_use() {
        let ports = |tls| {
            let settings = written(&answers(Some("relay.example.com"), tls));
            openings(&settings)
                .into_iter()
                .map(|opening| format!("{} {}", opening.protocol, opening.port))
                .collect::<Vec<_>>()
        };
        let always = ["UDP 3478", "TCP 3478", "UDP 49152-65535", "UDP 3479"];
        let acme = ports(Tls::Acme);
        assert!(always.iter().all(|port| acme.contains(&(*port).to_owned())));
        assert!(["TCP 443", "TCP 80", "TCP 5349"].iter().all(|port| acme.contains(&(*port).to_owned())), "{acme:?}");
        assert_eq!(ports(Tls::Proxy), always, "the proxy has its own");
    }
}
