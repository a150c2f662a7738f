//! Starts services, waits for a signal, and ends them in order.

use std::io::{IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::pki_types::ServerName;
use seed_peer::{CheckRoom, RelayKey};
use service::{Cluster, MetricsServer, Proofs, Telemetry};
use tokio::signal::unix::{SignalKind, signal};
use turn_server::ProbeTransport;

use crate::acme::{Acme, AcmeFolder};
use crate::admin::AdminSocket;
use crate::client_config::ClientConfig;
use crate::data_folder;
use crate::link_checks::Checks;
use crate::probe::meeting::MeetingPlace;
use crate::probe::{self, Tries, TurnLogin, TurnTries};
use crate::reports::Reports;
use crate::service_manager;
use crate::settings::{AcmeChallenge, OneOrMany, Settings};
use crate::status::{Others, Reporter, Status};
use crate::summary::{Summary, TurnSummary};
use crate::turn_credentials::TurnCredentials;
use crate::turn_secret;
use crate::turn_servers::{Announcer, TurnServers};

/// Which services run in this process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Services {
    pub(crate) relay: bool,
    pub(crate) turn: bool,
    pub(crate) seed: bool,
}

impl Services {
    /// The relay, the TURN server and the seed peer.
    pub(crate) const ALL: Self = Self { relay: true, turn: true, seed: true };
    /// Nothing, to build on.
    pub(crate) const NONE: Self = Self { relay: false, turn: false, seed: false };
}

/// Runs `services` until SIGINT or SIGTERM.
pub(crate) async fn run(services: Services, mut settings: Settings) -> anyhow::Result<()> {
    // Before anything is bound: a signal that comes early must not be lost.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    // Each client is a file descriptor, and the usual limit is 1,024.
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) => tracing::info!(limit, "file descriptors"),
        Err(error) => tracing::warn!(%error, "the limit on file descriptors stays as it is"),
    }

    let credentials = settings.turn_credentials();
    // Apps are to get credentials without anybody's doing, also beside static users. A TURN server alone has its users,
    // or shares the folder with the process that hands credentials out.
    let shares = services.seed || credentials.users.is_empty();
    if services.turn && credentials.secrets.is_empty() && shares {
        let secret = turn_secret::load_or_create(&settings.seed.data)?;
        settings.turn.secret = Some(OneOrMany::One(secret));
    } else if credentials.secrets.is_empty()
        && let Some(secret) = turn_secret::load(&settings.seed.data)?
    {
        settings.turn.secret = Some(OneOrMany::One(secret));
    }
    let mut summary = Summary::default();
    let mut telemetry: Vec<Telemetry> = Vec::new();

    let status = Status::new(settings.relay.status_token.clone(), settings.relay.listen.ip().is_loopback());
    if !settings.metrics.others.is_empty() {
        status.set_others(Others::new(&settings.metrics.others), settings.seed.data.clone());
    }
    let watching = status.watch();
    let proofs = Proofs::default();
    let answers = |challenge| services.relay || (services.turn && challenge == AcmeChallenge::Http01);
    let asking = match settings.acme().filter(|acme| answers(acme.challenge)) {
        Some(acme) => {
            let folder = AcmeFolder::in_data(&settings.seed.data);
            let (asked, task) = Acme::start(acme.clone(), folder, proofs.clone())?;
            status.add(Some("certificate"), asked.clone());
            telemetry.push(asked);
            Some(task)
        }
        None => None,
    };
    let cluster = match settings.cluster()? {
        Some(config) => {
            let cluster = Cluster::connect(config).await?;
            status.add(Some("cluster"), cluster.telemetry().clone());
            telemetry.push(cluster.telemetry().clone());
            Some(cluster)
        }
        None => None,
    };
    let turn = if services.turn {
        let server = turn_server::Server::bind(settings.turn(services.relay)?).await?;
        let tls_port = server.tls_address().map(|address| address.port());
        summary.turn = Some(TurnSummary {
            external_ip: server.external_ip(),
            port: server.address().port(),
            tls_port: if services.relay { settings.turn_tls_port(tls_port) } else { tls_port },
        });
        status.add(Some("turn"), server.telemetry().clone());
        telemetry.push(server.telemetry().clone());
        Some(server)
    } else {
        None
    };
    let relay_key = settings.relay_key()?;
    let probe_key = RelayKey::generate();
    let own_keys: Vec<&RelayKey> = services.seed.then_some(&relay_key).into_iter().chain([&probe_key]).collect();
    let turn_servers = if services.relay {
        Some(Arc::new(settings.turn_servers(summary.turn, cluster.is_some()).await?))
    } else {
        None
    };
    let mut of_cluster = Vec::new();
    let announcer = match (&cluster, &turn, summary.turn) {
        (Some(cluster), Some(turn), Some(own)) => {
            let announcer = Announcer::new(
                cluster.clone(),
                settings.turn_server(own),
                &settings.turn_credentials().secrets,
                turn,
                turn_servers.clone(),
            );
            of_cluster.push(announcer.start());
            Some(announcer)
        }
        _ => None,
    };
    let relay = if let Some(turn_servers) = turn_servers {
        of_cluster.extend(cluster.as_ref().map(|cluster| turn_servers.listen(cluster)));
        let mut routes = client_config(&settings, turn_servers)?.routes();
        if settings.relay.reports {
            let reported = Telemetry::default();
            routes = routes.merge(Reports::new(&reported, settings.proxy_header()?)?.routes());
            status.add(None, reported.clone());
            telemetry.push(reported);
        }
        let routes = routes.merge(Arc::clone(&status).routes());
        let stun = turn.as_ref().map(turn_server::Server::stun_taker);
        let proofs = settings.acme().map(|_| proofs);
        let config = settings.relay(routes, &own_keys, cluster.clone(), stun, proofs)?;
        let server = relay::Server::bind(config).await?;
        summary.relay = Some((server.address(), settings.relay_url()));
        server.served_rooms().set(&settings.check_room(), true);
        status.add(Some("relay"), server.telemetry().clone());
        telemetry.push(server.telemetry().clone());
        Some(server)
    } else {
        None
    };
    let mut seed = if services.seed {
        let own_relay = relay.as_ref().map(|relay| own_url(relay.address()));
        let config = settings.seed(own_relay, relay_key, cluster.clone()).await?;
        summary.identity = config.identity.as_ref().map(|identity| identity.address().to_string());
        let server = seed_peer::Server::bind(config)?;
        summary.seed = Some((server.address(), settings.seed.data.clone()));
        let rooms = server.rooms().list().await?;
        if let Some(relay) = &relay {
            // Those that were added while an earlier process ran.
            rooms.iter().for_each(|room| relay.served_rooms().set(&room.name, true));
        }
        status.add(Some("seed"), server.telemetry().clone());
        status.set_rooms(server.rooms().clone());
        summary.rooms = rooms.into_iter().filter(|room| !room.paused).map(|room| room.name).collect();
        telemetry.push(server.telemetry().clone());
        Some(server)
    } else {
        None
    };
    let admin = seed.as_ref().and_then(|seed| {
        let served = relay.as_ref().map(relay::Server::served_rooms);
        AdminSocket::bind(&settings.seed.data, seed.rooms().clone(), served)
            .inspect_err(|error| tracing::warn!(%error, "no admin socket in seed.data: homeport rooms cannot be used"))
            .ok()
    });
    let first_relay = settings.seed.relays.first().cloned();
    let place = |url| -> anyhow::Result<MeetingPlace> {
        Ok(MeetingPlace {
            url,
            tls: seed_peer::relay_tls()?,
            key: probe_key.clone(),
            room: CheckRoom::new(&settings.check_room()),
            patience: probe::PATIENCE,
        })
    };
    let own_relay = relay.as_ref().map(|relay| place(own_url(relay.address()))).transpose()?;
    if let Some(place) = &own_relay {
        // The seed of another process may be there as well.
        status.set_checks(Checks::new(place.clone(), services.seed, settings.proxy_header()?));
    }
    let reporter = cluster.as_ref().map(|cluster| {
        if services.relay {
            of_cluster.push(status.hear_of_machines(cluster));
        }
        let reporter = Reporter::new(cluster.clone(), Arc::clone(&status));
        of_cluster.push(reporter.start());
        reporter
    });
    let probing = if settings.metrics.probe {
        let met = own_relay.clone().map_or_else(|| first_relay.map(place).transpose(), |place| Ok(Some(place)))?;
        let tries = Tries {
            relay: own_relay,
            seed: seed.as_ref().and_then(|seed| Some((met?, seed.address()))),
            turn: turn
                .as_ref()
                .and_then(|turn| turn_tries(&settings, turn, relay.as_ref().map(relay::Server::address))),
        };
        let (tried, task) = probe::start(tries)?;
        status.add(Some("tries from inside"), tried.clone());
        // What is tried does not decide whether the services are ready.
        telemetry.push(Telemetry { registry: tried.registry, ..Telemetry::default() });
        Some(task)
    } else {
        None
    };
    let metrics = MetricsServer::bind(settings.metrics.listen, telemetry)?;
    summary.metrics = Some(metrics.address());
    let mut out = std::io::stdout();
    let text = summary.print(out.is_terminal());
    // Nobody may be reading: that is no reason not to run.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    data_folder::give_to_its_owner(&settings.seed.data).unwrap_or_else(
        |error| tracing::warn!(%error, "files in seed.data stay root's, and others cannot run on them"),
    );
    service_manager::ready();

    let ended = async {
        match seed.as_mut() {
            Some(seed) => seed.ended().await,
            None => std::future::pending().await,
        }
    };
    let result = tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        () = ended => Err(anyhow::anyhow!("the seed peer has ended early")),
    };
    service_manager::stopping(Duration::from_secs(settings.turn.drain.into()));
    watching.abort();
    probing.iter().chain(&asking).chain(&of_cluster).for_each(tokio::task::JoinHandle::abort);
    if let Some(announcer) = announcer {
        announcer.retire().await;
    }
    if let Some(reporter) = reporter {
        reporter.retire().await;
    }
    let stopping = async {
        if let Some(admin) = admin {
            admin.close();
        }
        // The seed says goodbye through the relay: it goes first.
        if let Some(seed) = seed {
            seed.shutdown().await;
        }
        let relay = async {
            if let Some(relay) = relay {
                relay.shutdown().await;
            }
        };
        let turn = async {
            if let Some(turn) = turn {
                turn.shutdown().await;
            }
        };
        tokio::join!(relay, turn, metrics.shutdown());
    };
    tokio::select! {
        () = stopping => {}
        // A second signal means now.
        _ = interrupt.recv() => bail!("stopped at once"),
    }
    result.context("homeport ended")
}

/// What apps are told of this process's services, and of those that the settings name.
fn client_config(settings: &Settings, servers: Arc<TurnServers>) -> anyhow::Result<ClientConfig> {
    let secret = settings.turn_credentials().secrets.first().cloned();
    let rules = settings.credential_rules()?;
    let turn = secret.map(|secret| Arc::new(TurnCredentials::new(servers, secret, rules)));
    let tls = settings.tls_files()?.is_some();
    Ok(ClientConfig { relay_url: settings.relay_url(), relay_listen: settings.relay.listen, tls, turn })
}

/// How to try the TURN server of this process, and of its relay's port if there is one, as apps are told of them.
fn turn_tries(settings: &Settings, server: &turn_server::Server, relay: Option<SocketAddr>) -> Option<TurnTries> {
    let credentials = settings.turn_credentials();
    let login = match credentials.secrets.into_iter().next() {
        Some(secret) => TurnLogin::Secret(secret),
        None => {
            let (name, password) = credentials.users.into_iter().next()?;
            TurnLogin::User(name, password)
        }
    };
    let plain = own_address(server.address());
    let mut transports =
        vec![("turn over udp", plain, ProbeTransport::Udp), ("turn over tcp", plain, ProbeTransport::Tcp)];
    let name = ServerName::try_from(settings.host().unwrap_or("localhost").to_owned()).ok()?;
    let (own, shared) = (server.tls_address(), relay.filter(|_| settings.has_tls()));
    for (what, address) in
        [("turn over tls", own.or(shared)), ("turn over tls on relay port", shared.filter(|_| own.is_some()))]
    {
        let transport = ProbeTransport::Tls(probe::any_certificate(), name.clone());
        transports.extend(address.map(|address| (what, own_address(address), transport)));
    }
    Some(TurnTries { credentials: login, transports })
}

/// The address under which this process reaches its own relay.
pub(crate) fn own_url(listen: SocketAddr) -> String {
    format!("ws://{}/", own_address(listen))
}

/// An address of this machine that a socket listening on `listen` takes connections on.
pub(crate) fn own_address(listen: SocketAddr) -> SocketAddr {
    // A socket for all of IPv6 takes IPv4 as well, and IPv4 is everywhere.
    let ip = if listen.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { listen.ip() };
    SocketAddr::new(ip, listen.port())
}
