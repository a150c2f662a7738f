//! What every Homeport service needs: settings, sockets, metrics and health.

pub mod health;
pub mod listen;
pub mod metrics;
pub mod settings;

pub use health::{Health, State};
pub use listen::BindError;
pub use metrics::{MetricsServer, Telemetry};
