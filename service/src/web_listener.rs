//! Listens for people and programs of the web: connections that may begin with TLS or not, on one port, and not more of
//! them than the process can bear.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use prometheus::IntCounterVec;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::origin::Origin;

/// How long a client may take until it has said something, and TLS stands.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients of one address that are at that at the same time; who comes then is turned away.
const MAX_BEGINNING: usize = 256;
/// Connections that wait to be served.
const MAX_WAITING: usize = 64;
/// The first byte of a TLS handshake (RFC 8446, section 5.1). No HTTP request begins with it.
const HANDSHAKE: u8 = 0x16;
/// How long to wait when the system has no more sockets.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// TLS for those who begin with it.
#[derive(Debug, Clone)]
pub struct WebTls {
    /// The certificate, and what goes with it.
    pub config: Arc<ServerConfig>,
    /// Counts handshakes, by `ok` and `failed`.
    pub handshakes: IntCounterVec,
}

/// Accepts connections. Each must say something soon, and counts until it ends.
#[derive(Debug)]
pub struct WebListener {
    address: SocketAddr,
    accepted: mpsc::Receiver<(WebStream, SocketAddr)>,
    accepting: JoinHandle<()>,
}

impl WebListener {
    /// Accepts what comes to `listener`, up to `max_connections` at a time.
    ///
    /// # Errors
    /// When the socket has no address.
    pub fn new(listener: TcpListener, tls: Option<WebTls>, max_connections: usize) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (sender, accepted) = mpsc::channel(MAX_WAITING);
        let connections = Arc::new(Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS)));
        let accepting = tokio::spawn(accept(listener, tls.map(Arc::new), connections, sender));
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

async fn accept(
    listener: TcpListener,
    tls: Option<Arc<WebTls>>,
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
        let (tls, sender) = (tls.clone(), sender.clone());
        tokio::spawn(async move {
            let begun = tokio::time::timeout(PATIENCE, begin(stream, tls.as_deref())).await;
            drop(begins);
            match begun {
                // The listener may have gone.
                Ok(Ok(io)) => drop(sender.send((WebStream { io, _place: place }, address)).await),
                Ok(Err(error)) => tracing::debug!(%error, "a connection did not begin"),
                Err(_) => tracing::debug!("a connection did not begin in time"),
            }
        });
    }
}

async fn begin(stream: TcpStream, tls: Option<&WebTls>) -> io::Result<Io> {
    // A small message must not wait for the acknowledgement of the one before it.
    stream.set_nodelay(true)?;
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let Some(tls) = tls.filter(|_| first == [HANDSHAKE]) else { return Ok(Io::Plain(stream)) };
    let accepted = TlsAcceptor::from(Arc::clone(&tls.config)).accept(stream).await;
    tls.handshakes.with_label_values(&[if accepted.is_ok() { "ok" } else { "failed" }]).inc();
    Ok(Io::Tls(Box::new(accepted?)))
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn serve(max_connections: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = WebListener::new(listener, None, max_connections).unwrap().tap_io(|_| ());
        let routes = Router::new().route("/", axum::routing::get(|| async { "here" }));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        address
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
