//! The services as clients have them: through the addresses that apps are told of, as far as those can be reached from
//! here.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use seed_peer::CheckRoom;
use tokio::net::{TcpStream, lookup_host};
use turn_server::{Addresses, ProbeTransport};

use super::machine::CLOCK_ADVICE;
use super::names::host_of;
use super::{Finding, Service};
use crate::probe::meeting::{Meeting, MeetingError, MeetingPlace};
use crate::probe::{self, PATIENCE, TurnLogin, TurnTries};
use crate::run::{own_address, own_url};
use crate::settings::Settings;
use crate::status::{metrics_of, sum_in};
use crate::turn_secret;

/// A certificate that ends sooner should have been renewed long ago.
const ENDS_SOON: Duration = Duration::from_secs(14 * 86_400);
/// What apps are told of where the relay is on port 443.
const AT_THE_RELAY: &str = "TURN over TLS, at the relay's port";
/// Fewer clocks of clients say nothing about ours; some are the machine's own, which tries its services out.
const ENOUGH_CLOCKS: f64 = 5.0;

/// Asks those services that are `asked` for.
pub(super) async fn ask(settings: &Settings, asked: impl Fn(Service) -> bool) -> anyhow::Result<Vec<Finding>> {
    let mut settings = settings.clone();
    if settings.turn_credentials().secrets.is_empty()
        && let Some(secret) = turn_secret::load(&settings.seed.data)?
    {
        settings.turn.secret = Some(crate::settings::OneOrMany::One(secret));
    }
    let settings = &settings;
    let mut findings = Vec::new();
    let tls = seed_peer::relay_tls()?;
    let room = CheckRoom::new(&settings.check_room());
    let key = settings.relay_key()?;
    let place = |url: String| MeetingPlace {
        url,
        tls: Arc::clone(&tls),
        key: key.clone(),
        room: room.clone(),
        patience: PATIENCE,
    };
    let local = place(own_url(settings.relay.listen));
    let mut meets = None;
    let mut relay_is_reached = false;
    if asked(Service::Relay) {
        let here = relay("relay, from here", local.clone()).await;
        let is_up = here.advice.is_none();
        findings.push(here);
        if is_up {
            meets = Some(local);
        }
        if let Some(url) = settings.relay_url() {
            let what = format!("relay, as {}", url.escape_debug());
            let through_it = relay(&what, place(url)).await;
            relay_is_reached = through_it.advice.is_none();
            findings.push(through_it);
        }
        findings.extend(certificates(settings, Arc::clone(&tls)).await);
        findings.extend(clocks(settings).await);
    } else {
        meets = settings.seed.relays.first().cloned().or_else(|| settings.relay_url()).map(place);
    }
    if asked(Service::Turn) {
        findings.extend(turn(settings, relay_is_reached).await?);
    }
    if asked(Service::Seed) {
        findings.push(seed(settings, meets).await);
    }
    Ok(findings)
}

async fn relay(what: &str, place: MeetingPlace) -> Finding {
    let is_local = what.ends_with("here");
    match Meeting::join(place).await {
        Ok((meeting, echoed)) => {
            meeting.leave().await;
            Finding::ok(what, format!("a word came back after {} ms", echoed.as_millis()))
        }
        // It lets in who proves a key, and this process has none that it knows.
        Err(MeetingError::Refused(reason))
            if reason.starts_with("auth-required") || reason.starts_with("restricted") =>
        {
            Finding::ok(what, format!("it takes connections, and lets in whom relay.allowed_pubkeys names ({reason})"))
        }
        Err(error @ MeetingError::Unreachable(_)) if is_local => {
            Finding::failure(what, error.to_string(), "start it: homeport up; its log says why it ended")
        }
        Err(error @ MeetingError::Unreachable(_)) => Finding::failure(
            what,
            error.to_string(),
            "open the port in the firewall, here and at your provider; see to the name's record, the certificate, and the proxy if there is one",
        ),
        Err(error) => Finding::failure(what, error.to_string(), "the log of the relay says more"),
    }
}

/// Whether this machine's clock is that of most clients, as the relay has seen them; nothing while it has seen too few.
async fn clocks(settings: &Settings) -> Option<Finding> {
    // Who runs no relay here, or keeps its metrics elsewhere, is told of that above, or has chosen so.
    let metrics = metrics_of(own_address(settings.metrics.listen)).await.ok()?;
    let of = |clock: &str| sum_in(&metrics, "homeport_relay_client_clocks_total", &[clock]);
    let (near, ahead, behind) = (of("near"), of("ahead"), of("behind"));
    let seen = near + ahead + behind;
    if seen < ENOUGH_CLOCKS {
        return None;
    }
    let median = sum_in(&metrics, "homeport_relay_client_clock_ahead_seconds", &[]);
    let limit = settings.relay.clock_skew_seconds;
    let off = Duration::try_from_secs_f64(median.abs().round()).unwrap_or(Duration::MAX);
    if off.as_secs() > limit {
        let off = humantime::format_duration(off);
        let than_here = if median > 0.0 { "later" } else { "earlier" };
        let found = format!("most of the clients that were seen last say that it is {off} {than_here} than here");
        return Some(Finding::failure("clock", found, CLOCK_ADVICE));
    }
    let found = format!(
        "that of most clients; of {seen} that were seen, {ahead} were more than {limit} s ahead, {behind} behind"
    );
    Some(Finding::ok("clock, beside those of clients", found))
}

/// Whether the certificates that clients see are for the names that they use, are trusted, and last.
async fn certificates(settings: &Settings, tls: Arc<rustls::ClientConfig>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let url = settings.relay_url().filter(|url| url.starts_with("wss://"));
    let relay = url.as_deref().and_then(host_of).filter(|_| settings.has_tls());
    let turn = settings.turn.host.as_deref().or(settings.host()).filter(|_| settings.has_tls());
    let places = [
        ("certificate of the relay", relay, settings.relay.listen, "tls.cert"),
        ("certificate of TURN", turn, settings.turn.listen_tls, "turn.host"),
    ];
    for (what, host, listen, setting) in places {
        let Some(host) = host else { continue };
        let shown = shown_certificate(own_address(listen), host).await;
        let Ok(certificate) = shown else {
            let found = format!("none is shown: {}", shown.err().unwrap_or_default());
            findings.push(Finding::failure(
                what,
                found,
                "the log says why; with tls.acme, what the certificate authority says",
            ));
            continue;
        };
        if !service::tls::is_for(&certificate, host) {
            let names = service::tls::names(&certificate).join(", ");
            let found = format!("it is for {}, and apps use {host}", names.escape_debug());
            findings.push(Finding::failure(what, found, format!("get one for {host}, or correct {setting}")));
            continue;
        }
        let now = i64::try_from(crate::rooms::wall_ms() / 1_000).unwrap_or_default();
        let left = service::tls::validity(&certificate).map_or(0, |(_, until)| until - now);
        let left = Duration::from_secs(u64::try_from(left).unwrap_or_default());
        let days = left.as_secs() / 86_400;
        if left.is_zero() {
            findings.push(Finding::failure(what, "it has expired", "renew it; new files are taken without a restart"));
        } else if let Err(error) = trusted(own_address(listen), host, &tls).await {
            let advice = "browsers take only what leads to a root that they know: the file must hold the whole chain";
            findings.push(Finding::failure(what, format!("this machine does not trust it: {error}"), advice));
        } else if left < ENDS_SOON {
            findings.push(Finding::warning(what, format!("it ends in {days} days"), "see why it is not renewed"));
        } else {
            findings.push(Finding::ok(what, format!("it is for {host}, and good for {days} days")));
        }
    }
    findings
}

/// The certificate that a client of `host` is shown, whatever it is.
async fn shown_certificate(address: SocketAddr, host: &str) -> Result<Vec<u8>, String> {
    let stream = handshake(address, host, &probe::any_certificate()).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).map(|leaf| leaf.to_vec());
    shown.ok_or_else(|| "there is none".to_owned())
}

async fn trusted(address: SocketAddr, host: &str, tls: &Arc<rustls::ClientConfig>) -> Result<(), String> {
    handshake(address, host, tls).await.map(drop)
}

async fn handshake(
    address: SocketAddr,
    host: &str,
    tls: &Arc<rustls::ClientConfig>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, String> {
    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        tokio_rustls::TlsConnector::from(Arc::clone(tls)).connect(name, stream).await
    };
    match tokio::time::timeout(PATIENCE, connect).await {
        Ok(connected) => connected.map_err(|error| error.to_string()),
        Err(_) => Err("there is no answer".to_owned()),
    }
}

/// `relay_is_reached`: by the address that apps are told of, so that TURN at its port ought to be, too.
async fn turn(settings: &Settings, relay_is_reached: bool) -> anyhow::Result<Vec<Finding>> {
    let place = settings.turn_place().await?;
    let host = settings.turn.host.clone().or_else(|| settings.host().map(str::to_owned));
    let login = match settings.turn_credentials() {
        credentials if !credentials.secrets.is_empty() => TurnLogin::Secret(credentials.secrets[0].clone()),
        credentials => match credentials.users.into_iter().next() {
            Some((name, password)) => TurnLogin::User(name, password),
            None => {
                let advice = "set turn.secret, the same for relay and TURN server, or let them share one seed.data";
                return Ok(vec![Finding::failure("TURN", "there are no credentials to use it with", advice)]);
            }
        },
    };
    let tries = TurnTries { credentials: login, transports: Vec::new() };
    // As apps reach it: by name if there is one, else at the address of allocations.
    let ip = match &host {
        Some(host) => {
            lookup_host((host.as_str(), 0)).await.ok().and_then(|mut found| found.next()).map(|found| found.ip())
        }
        None => None,
    };
    let ip: IpAddr = ip.unwrap_or(place.external_ip);
    let mut transports = vec![
        ("TURN over UDP", SocketAddr::new(ip, place.port), ProbeTransport::Udp),
        ("TURN over TCP", SocketAddr::new(ip, place.port), ProbeTransport::Tcp),
    ];
    if let Some(port) = place.tls_port {
        // Certificates have findings of their own.
        let name = ServerName::try_from(host.clone().unwrap_or_else(|| "localhost".into()))?;
        let tls = ProbeTransport::Tls(probe::any_certificate(), name);
        transports.push(("TURN over TLS", SocketAddr::new(ip, port), tls.clone()));
        // Where relay and TURN are processes of their own, the relay's port takes no clients of TURN, nor are apps told so.
        if let Some(told) = settings.turn_tls_port(Some(port)).filter(|told| *told != port)
            && relay_is_reached
            && tries.echo(own_address(settings.relay.listen), tls.clone()).await.is_ok()
        {
            transports.push((AT_THE_RELAY, SocketAddr::new(ip, told), tls));
        }
    }
    let mut findings = Vec::new();
    for (what, server, transport) in transports {
        findings.push(match tries.echo(server, transport).await {
            Ok(took) => {
                Finding::ok(what, format!("a packet went through {server} and back in {} ms", took.as_millis()))
            }
            Err(error) => {
                let advice = advice_for_turn(&error, what, server);
                Finding::failure(what, format!("{server}: {error}"), advice)
            }
        });
    }
    Ok(findings)
}

fn advice_for_turn(error: &str, what: &str, server: SocketAddr) -> String {
    // Where the port itself is open, and TURN answers behind it, what stands between does not let it through.
    if what == AT_THE_RELAY && !error.contains("cannot be reached") {
        "what stands before the relay speaks HTTP alone: have it pass connections on as they are, or set turn.host to a name that leads here past it".to_owned()
    } else if error.contains("(401)") {
        "relay and TURN server have different secrets: give them one turn.secret, or one seed.data".to_owned()
    } else if error.contains("relayed address") {
        "turn.external_ip is not the public address of this machine, the ports of turn.relay_ports are closed in the firewall, or the NAT in front does not let a machine reach its own public address (then only an outsider can tell: open /check from another network)".to_owned()
    } else if error.contains("no answer") || error.contains("cannot be reached") {
        let protocol = if what.ends_with("UDP") { "UDP" } else { "TCP" };
        format!(
            "see whether it runs, and open {protocol} port {} in the firewall, here and at your provider",
            server.port()
        )
    } else {
        "the log of the TURN server says more".to_owned()
    }
}

async fn seed(settings: &Settings, meets: Option<MeetingPlace>) -> Finding {
    const WHAT: &str = "link with the seed";
    let Some(place) = meets else {
        return Finding::failure(
            WHAT,
            "it was not tried, since there is no relay to ask through",
            "see to the relay first",
        );
    };
    let external = settings.turn_external_ips().unwrap_or_default();
    let towards = match settings.seed.listen.ip() {
        ip if !ip.is_unspecified() => ip,
        _ => Addresses::find(&external, settings.seed.listen.ip()).await.main(),
    };
    match probe::link(place, SocketAddr::new(towards, settings.seed.listen.port())).await {
        Ok(took) => Finding::ok(WHAT, format!("open after {} ms", took.as_millis())),
        Err(error) if error.contains("no seed") => Finding::failure(
            WHAT,
            error,
            "see whether it runs, and that it reaches this relay (seed.relays); as separate processes, both must have the same rooms and the same turn.secret in their settings",
        ),
        Err(error) => Finding::failure(
            WHAT,
            error,
            format!("open UDP port {} in the firewall, and see to seed.external_ip", settings.seed.listen.port()),
        ),
    }
}
