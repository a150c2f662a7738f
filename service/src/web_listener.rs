//! Listens for people and programs of the web: connections that may begin with TLS or not, on one port, and not more of
//! them than the process can bear. Who speaks STUN there instead, as clients of TURN do, is handed on.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use prometheus::IntCounterVec;
use rustls::server::Acceptor;
use rustls::{ServerConfig, ServerConnection};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::origin::Origin;
use crate::tls::Proofs;

/// How long a client may take until it has said something, and TLS stands.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients of one address that are at that at the same time; who comes then is turned away.
const MAX_BEGINNING: usize = 256;
/// Connections that wait to be served.
const MAX_WAITING: usize = 64;
/// The first byte of a TLS handshake (RFC 8446, section 5.1). No HTTP request begins with it.
const HANDSHAKE: u8 = 0x16;
/// What STUN messages begin with (RFC 7983, section 7). No HTTP request does.
const STUN: RangeInclusive<u8> = 0..=3;
/// How long to wait when the system has no more sockets.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// TLS for those who begin with it.
#[derive(Debug, Clone)]
pub struct WebTls {
    /// The certificate, and what goes with it.
    pub config: Arc<ServerConfig>,
    /// The same for a certificate authority that asks for a proof, see [`Proofs`].
    pub proofs: Option<Arc<ServerConfig>>,
    /// Counts handshakes, by `ok` and `failed`.
    pub handshakes: IntCounterVec,
}

/// A connection on which a client speaks STUN, as one of TURN does.
#[derive(Debug)]
pub struct StunConnection {
    /// Does not block.
    pub socket: std::net::TcpStream,
    /// TLS with its handshake behind it; what the client has said since is in there.
    pub tls: Option<Box<ServerConnection>>,
    /// Where the client comes from.
    pub client: SocketAddr,
}

/// Takes connections on which clients speak STUN.
#[derive(Clone)]
pub struct StunTaker(Arc<dyn Fn(StunConnection) + Send + Sync>);

impl StunTaker {
    /// `take` is called from asynchronous tasks: it must not block.
    pub fn new(take: impl Fn(StunConnection) + Send + Sync + 'static) -> Self {
        Self(Arc::new(take))
    }
}

impl fmt::Debug for StunTaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StunTaker(…)")
    }
}

/// Accepts connections. Each must say something soon, and counts until it ends or is handed on.
#[derive(Debug)]
pub struct WebListener {
    address: SocketAddr,
    accepted: mpsc::Receiver<(WebStream, SocketAddr)>,
    accepting: JoinHandle<()>,
}

impl WebListener {
    /// Accepts what comes to `listener`, up to `max_connections` at a time. Without `stun`, who speaks that is taken for
    /// somebody with a malformed request.
    ///
    /// # Errors
    /// When the socket has no address.
    pub fn new(
        listener: TcpListener,
        tls: Option<WebTls>,
        stun: Option<StunTaker>,
        max_connections: usize,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (sender, accepted) = mpsc::channel(MAX_WAITING);
        let connections = Arc::new(Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS)));
        let speaks = Arc::new(Speaks { tls, stun });
        let accepting = tokio::spawn(accept(listener, speaks, connections, sender));
        Ok(Self { address, accepted, accepting })
    }
}

impl Drop for WebListener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl axum::serve::Listener for WebListener {
    type Io = WebStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (WebStream, SocketAddr) {
        match self.accepted.recv().await {
            Some(accepted) => accepted,
            // The task ends with this listener only.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// How many clients of each address have not said anything yet.
#[derive(Debug, Clone, Default)]
struct Beginning(Arc<Mutex<HashMap<Origin, usize>>>);

impl Beginning {
    fn enter(&self, origin: Origin) -> Option<Begins> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(origin).or_default();
        // Behind a proxy everybody comes from loopback.
        if *count >= MAX_BEGINNING && !origin.is_loopback() {
            return None;
        }
        *count += 1;
        Some(Begins { all: self.clone(), origin })
    }
}

/// One of them.
struct Begins {
    all: Beginning,
    origin: Origin,
}

impl Drop for Begins {
    fn drop(&mut self) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.origin) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.origin);
            }
        }
    }
}

/// What may be spoken besides plain HTTP.
struct Speaks {
    tls: Option<WebTls>,
    stun: Option<StunTaker>,
}

async fn accept(
    listener: TcpListener,
    speaks: Arc<Speaks>,
    connections: Arc<Semaphore>,
    sender: mpsc::Sender<(WebStream, SocketAddr)>,
) {
    let beginning = Beginning::default();
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "accepting connections");
                tokio::time::sleep(EXHAUSTED).await;
                continue;
            }
        };
        // Who finds no place is cut off at once, so that it need not wait to learn that.
        let Ok(place) = Arc::clone(&connections).try_acquire_owned() else { continue };
        let Some(begins) = beginning.enter(Origin::of(address.ip())) else { continue };
        let (speaks, sender) = (Arc::clone(&speaks), sender.clone());
        tokio::spawn(async move {
            let begun = tokio::time::timeout(PATIENCE, begin(stream, address, &speaks)).await;
            drop(begins);
            match begun {
                // The listener may have gone.
                Ok(Ok(Some(io))) => drop(sender.send((WebStream { io, _place: place }, address)).await),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a connection did not begin"),
                Err(_) => tracing::debug!("a connection did not begin in time"),
            }
        });
    }
}

/// The connection once its client has said something; `None` when it was handed on, or wanted no more.
async fn begin(stream: TcpStream, client: SocketAddr, speaks: &Speaks) -> io::Result<Option<Io>> {
    // A small message must not wait for the acknowledgement of the one before it.
    stream.set_nodelay(true)?;
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let taker = |first: Option<&u8>| speaks.stun.as_ref().filter(|_| first.is_some_and(|first| STUN.contains(first)));
    let Some(tls) = speaks.tls.as_ref().filter(|_| first == [HANDSHAKE]) else {
        let Some(StunTaker(take)) = taker(first.first()) else { return Ok(Some(Io::Plain(stream))) };
        take(StunConnection { socket: stream.into_std()?, tls: None, client });
        return Ok(None);
    };
    let secured = secure(stream, tls).await;
    tls.handshakes.with_label_values(&[if secured.is_ok() { "ok" } else { "failed" }]).inc();
    let Some(mut stream) = secured? else { return Ok(None) };
    // Only where it makes a difference: a browser may connect ahead of what it has to say.
    if speaks.stun.is_some()
        && let Some(StunTaker(take)) = taker(stream.fill_buf().await?.first())
    {
        let (socket, tls) = stream.into_inner();
        take(StunConnection { socket: socket.into_std()?, tls: Some(Box::new(tls)), client });
        return Ok(None);
    }
    Ok(Some(Io::Tls(Box::new(stream))))
}

/// The connection behind its TLS handshake; `None` when that was all that an authority wanted.
async fn secure(stream: TcpStream, tls: &WebTls) -> io::Result<Option<TlsStream<TcpStream>>> {
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    match tls.proofs.as_ref().filter(|_| Proofs::are_asked_for(&start.client_hello())) {
        None => start.into_stream(Arc::clone(&tls.config)).await.map(Some),
        Some(proofs) => {
            start.into_stream(Arc::clone(proofs)).await?.shutdown().await?;
            Ok(None)
        }
    }
}

/// A connection that has begun.
#[derive(Debug)]
pub struct WebStream {
    io: Io,
    /// Its place among all connections.
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for WebStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for WebStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::serve::ListenerExt as _;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    async fn serve(max_connections: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = WebListener::new(listener, None, None, max_connections).unwrap().tap_io(|_| ());
        let routes = Router::new().route("/", axum::routing::get(|| async { "here" }));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        address
    }

    /// A server with a certificate that takes who speaks STUN, and a client's side of TLS that believes it.
    async fn serve_with_tls(stun: Option<StunTaker>) -> (SocketAddr, tokio_rustls::TlsConnector) {
        let folder = tempfile::tempdir().unwrap();
        let files = crate::TlsFiles {
            cert: folder.path().join("cert.pem"),
            key: folder.path().join("key.pem"),
            may_come_later: false,
            check_every: Duration::from_secs(30),
        };
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&files.cert, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        let config = crate::Certificate::load(files).unwrap().server_config().unwrap();
        let handshakes = IntCounterVec::new(prometheus::Opts::new("handshakes", "Handshakes."), &["result"]).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = WebListener::new(listener, Some(WebTls { config, proofs: None, handshakes }), stun, 10)
            .unwrap()
            .tap_io(|_| ());
        let routes = Router::new().route("/", axum::routing::get(|| async { "here" }));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (address, Arc::new(client).into())
    }

    /// What comes back on a connection of its own, for what is said in pieces.
    async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, pieces: &[&[u8]]) -> Vec<u8> {
        for piece in pieces {
            stream.write_all(piece).await.unwrap();
            stream.flush().await.unwrap();
        }
        let mut answer = Vec::new();
        // Whoever is cut off has heard what there was.
        let _ = stream.read_to_end(&mut answer).await;
        answer
    }

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    /// How a Binding request begins (RFC 8489, section 5).
    const BINDING: &[u8] = b"\x00\x01\x00\x00\x21\x12\xa4\x42";

    #[tokio::test]
    async fn who_speaks_stun_is_handed_on_and_who_speaks_http_is_served() {
        let (sender, mut taken) = mpsc::unbounded_channel();
        let (address, tls) = serve_with_tls(Some(StunTaker::new(move |one| sender.send(one).unwrap()))).await;
        let connect = async || TcpStream::connect(address).await.unwrap();
        let name = || "localhost".try_into().unwrap();
        let (first, rest) = REQUEST.split_at(1);
        for pieces in [&[REQUEST][..], &[first, rest]] {
            let secured = tls.connect(name(), connect().await).await.unwrap();
            assert!(exchange(secured, pieces).await.ends_with(b"here"));
            assert!(exchange(connect().await, pieces).await.ends_with(b"here"));
        }
        assert!(taken.try_recv().is_err());

        let mut plain = connect().await;
        plain.write_all(BINDING).await.unwrap();
        let mut one = taken.recv().await.unwrap();
        assert_eq!((one.client, one.tls.is_some()), (plain.local_addr().unwrap(), false));
        let mut heard = [0; 8];
        io::Read::read_exact(&mut one.socket, &mut heard).unwrap();
        assert_eq!(heard, BINDING);

        let mut secured = tls.connect(name(), connect().await).await.unwrap();
        secured.write_all(BINDING).await.unwrap();
        let one = taken.recv().await.unwrap();
        let mut session = one.tls.unwrap();
        io::Read::read_exact(&mut session.reader(), &mut heard).unwrap();
        assert_eq!((heard.as_slice(), session.is_handshaking()), (BINDING, false));
    }

    #[tokio::test]
    async fn who_speaks_stun_where_nobody_takes_that_is_told_that_it_is_no_http() {
        let (address, tls) = serve_with_tls(None).await;
        let stream = TcpStream::connect(address).await.unwrap();
        let secured = tls.connect("localhost".try_into().unwrap(), stream).await.unwrap();
        let answer = exchange(secured, &[BINDING]).await;
        assert!(answer.starts_with(b"HTTP/1.1 400"), "{}", answer.escape_ascii());
    }

    async fn ask(address: SocketAddr) -> io::Result<(TcpStream, String)> {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await?;
        let mut answer = vec![0; 1_000];
        let length = stream.read(&mut answer).await?;
        Ok((stream, String::from_utf8_lossy(&answer[..length]).into_owned()))
    }

    #[tokio::test]
    async fn who_comes_when_all_places_are_taken_is_cut_off_and_served_when_one_is_free() {
        let address = serve(2).await;
        let (first, answer) = ask(address).await.unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        // One that says nothing has a place as well, for a while.
        let silent = TcpStream::connect(address).await.unwrap();
        loop {
            // Cut off before or after it has asked.
            match ask(address).await {
                Ok((_, answer)) if answer.is_empty() => break,
                Err(_) => break,
                // The silent one may not have been accepted yet.
                Ok(_) => {}
            }
        }
        drop((first, silent));
        let served = async {
            while !ask(address).await.is_ok_and(|(_, answer)| answer.ends_with("here")) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), served).await.unwrap();
    }
}
