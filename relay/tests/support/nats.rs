//! A server of NATS (Debian's `nats-server`), alone or as one of several that know each other.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server that runs until it is dropped.
pub(crate) struct Nats {
    port: u16,
    route: u16,
    arguments: Vec<String>,
    child: Option<Child>,
    /// Where it keeps streams, if it does.
    _streams: Option<tempfile::TempDir>,
}

impl Nats {
    /// Starts a server, which joins those on `routes`.
    pub(crate) fn start(routes: &[&Nats]) -> Self {
        let (port, route) = (free_port(), free_port());
        let url = |port: u16| format!("nats://127.0.0.1:{port}");
        let mut arguments = vec!["--addr".to_owned(), "127.0.0.1".into(), "--port".into(), port.to_string()];
        arguments.extend(["--name".into(), format!("nats-{port}"), "--cluster_name".into(), "test".into()]);
        arguments.extend(["--cluster".into(), url(route)]);
        if !routes.is_empty() {
            let routes: Vec<String> = routes.iter().map(|other| url(other.route)).collect();
            arguments.extend(["--routes".into(), routes.join(",")]);
        }
        let mut nats = Self { port, route, arguments, child: None, _streams: None };
        nats.resume();
        nats
    }

    /// Starts a server that is alone and keeps streams.
    pub(crate) fn with_streams() -> Self {
        let (port, streams) = (free_port(), tempfile::tempdir().unwrap());
        let folder = streams.path().to_str().unwrap().to_owned();
        let arguments = ["--addr", "127.0.0.1", "--port", &port.to_string(), "--jetstream", "--store_dir", &folder];
        let arguments = arguments.map(str::to_owned).to_vec();
        let mut nats = Self { port, route: 0, arguments, child: None, _streams: Some(streams) };
        nats.resume();
        nats
    }

    /// Starts it again under the address that it had.
    pub(crate) fn resume(&mut self) {
        let child = Command::new("nats-server")
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nats-server is there (apt-get install nats-server)");
        self.child = Some(child);
        let start = Instant::now();
        while TcpStream::connect(self.address()).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it, as a power failure would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}
