//! What every Homeport service needs: settings, sockets, TLS, metrics, health, the other machines of a cluster, who a client
//! is to limits, and what came lately.

pub mod cluster;
pub mod health;
pub mod listen;
pub mod metrics;
pub mod origin;
pub mod recent;
pub mod settings;
pub mod tls;
pub mod web_listener;

pub use cluster::kept::{Behind, KeepError, Kept};
pub use cluster::{Cluster, ClusterConfig, ClusterError, ClusterLogin};
pub use health::{Health, State};
pub use listen::BindError;
pub use metrics::{MetricsServer, Telemetry};
pub use origin::Origin;
pub use recent::RecentSet;
pub use tls::{Certificate, Proofs, TlsError, TlsFiles};
pub use web_listener::{StunConnection, StunTaker, WebListener, WebTls};
