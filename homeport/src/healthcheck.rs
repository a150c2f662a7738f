//! `homeport healthcheck`: asks `/healthz` of the process that `metrics.listen` names.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use crate::run::own_address;
use crate::settings;

/// How long the process may take to answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Prints how the process is. Exit code 0: it answers, degraded or not, since a restart would not help; 1: it does
/// not answer.
pub(crate) fn run(config: Option<&Path>) -> ExitCode {
    match ask(config) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("homeport: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ask(config: Option<&Path>) -> anyhow::Result<String> {
    let address = own_address(settings::load(config, None, &[])?.metrics.listen);
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(64 << 10).read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(body.to_owned()),
        _ => anyhow::bail!("{address} does not answer as homeport does"),
    }
}
