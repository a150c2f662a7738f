//! The log, on standard error: quiet unless something needs a person.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Starts the log. `HOMEPORT_LOG` overrides the level, in the notation of `tracing`: `info`, `seed_peer=debug,warn`.
pub(crate) fn init(verbose: u8) -> anyhow::Result<()> {
    let default = match verbose {
        0 => "warn",
        1 => "info,str0m=warn,is=warn,dimpl=warn,sctp_proto=warn",
        _ => "debug,str0m=info,is=info,dimpl=info,sctp_proto=info,hyper=info",
    };
    let filter = match std::env::var("HOMEPORT_LOG") {
        Ok(directives) => EnvFilter::builder().parse(&directives)?,
        Err(_) => EnvFilter::new(default),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}
