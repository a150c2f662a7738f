//! The TURN server as a running service.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use service::{BindError, State, Telemetry, listen};
use tokio::net::UdpSocket;
use turn::server::config::{ConnConfig, ServerConfig};

use crate::client_socket::ClientSocket;
use crate::credentials::{Authenticator, Credentials};
use crate::external::ExternalIp;
use crate::metrics::Metrics;
use crate::peer_filter::PeerFilter;
use crate::relay_socket::RelaySockets;

/// How long the engine gets to close its allocations at shutdown.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How to run the TURN server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen for clients on UDP.
    pub listen: SocketAddr,
    /// The address of allocations.
    pub external_ip: ExternalIp,
    /// The ports of allocations. Default 49152 to 65535.
    pub relay_ports: RangeInclusive<u16>,
    /// The realm of long-term credentials. Default `homeport`.
    pub realm: String,
    /// Who may use the server. STUN needs no credentials.
    pub credentials: Credentials,
}

/// The TURN server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The socket does not do what sockets do.
    #[error("the TURN socket failed: {0}")]
    Socket(#[from] std::io::Error),
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// The engine did not start.
    #[error("the TURN engine did not start: {0}")]
    Engine(#[from] turn::Error),
}

/// A running TURN server.
pub struct Server {
    address: SocketAddr,
    external_ip: IpAddr,
    telemetry: Telemetry,
    engine: turn::server::Server,
}

impl Server {
    /// Starts the TURN server.
    ///
    /// # Errors
    /// [`StartError`], which names the setting at fault.
    pub async fn bind(config: Config) -> Result<Self, StartError> {
        let telemetry = Telemetry::default();
        let metrics = Metrics::register(&telemetry.registry)?;
        let socket = UdpSocket::from_std(listen::udp("turn.listen", config.listen)?)?;
        let address = socket.local_addr()?;
        let (public, bind) = config.external_ip.resolve(address.ip());
        let peers = PeerFilter::of_server_at(public);
        if peers.opens_own_network() {
            tracing::info!(
                address = %public,
                "the address of TURN allocations is not public: clients of this network can use it, others only if \
                 turn.external_ip is set to the public address"
            );
        }
        let engine = turn::server::Server::new(ServerConfig {
            conn_configs: vec![ConnConfig {
                conn: Arc::new(ClientSocket::new(socket, metrics.clone())?),
                relay_addr_generator: Box::new(RelaySockets {
                    public,
                    bind,
                    ports: config.relay_ports,
                    peers,
                    metrics: metrics.clone(),
                }),
            }],
            realm: config.realm,
            auth_handler: Arc::new(Authenticator { credentials: config.credentials, metrics }),
            // RFC 8656, section 12: a channel lives for 10 minutes.
            channel_bind_timeout: Duration::from_secs(600),
            alloc_close_notify: None,
        })
        .await?;
        telemetry.health.set("turn", State::Ok);
        Ok(Self { address, external_ip: public, telemetry, engine })
    }

    /// The address in use, with the port that the system chose when it was 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of allocations.
    pub fn external_ip(&self) -> IpAddr {
        self.external_ip
    }

    /// The server's metrics and health.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Closes every allocation and stops.
    pub async fn shutdown(self) {
        match tokio::time::timeout(CLOSE_TIMEOUT, self.engine.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "closing the TURN engine"),
            Err(_) => tracing::debug!("the TURN engine did not close in time"),
        }
    }
}
