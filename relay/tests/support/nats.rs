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
}

impl Nats {
    /// Starts a server, which joins those on `routes`.
    pub(crate) fn start(routes: &[&Nats]) -> Self {
        let free = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let (port, route) = (free(), free());
        let url = |port: u16| format!("nats://127.0.0.1:{port}");
        let mut arguments = vec!["--addr".to_owned(), "127.0.0.1".into(), "--port".into(), port.to_string()];
        arguments.extend(["--name".into(), format!("nats-{port}"), "--cluster_name".into(), "test".into()]);
        arguments.extend(["--cluster".into(), url(route)]);
        if !routes.is_empty() {
            let routes: Vec<String> = routes.iter().map(|other| url(other.route)).collect();
            arguments.extend(["--routes".into(), routes.join(",")]);
        }
        let mut nats = Self { port, route, arguments, child: None };
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

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}
