//! Listens for connections that may begin with TLS, or not: both come through the same port.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use prometheus::IntCounterVec;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// How long a client may take until it has said how it begins, and TLS stands.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients that are at that at the same time; who comes then is turned away.
const MAX_BEGINNING: usize = 1_024;
/// Connections that wait to be served.
const MAX_WAITING: usize = 64;
/// The first byte of a TLS handshake (RFC 8446, section 5.1). No HTTP request begins with it.
const HANDSHAKE: u8 = 0x16;
/// How long to wait when the system has no more sockets.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// Accepts connections with and without TLS.
#[derive(Debug)]
pub struct TlsListener {
    address: SocketAddr,
    accepted: mpsc::Receiver<(Accepted, SocketAddr)>,
    accepting: JoinHandle<()>,
}

impl TlsListener {
    /// Accepts what comes to `listener`. `handshakes` counts how TLS went, by `ok` and `failed`.
    ///
    /// # Errors
    /// When the socket has no address.
    pub fn new(listener: TcpListener, tls: Arc<ServerConfig>, handshakes: IntCounterVec) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (sender, accepted) = mpsc::channel(MAX_WAITING);
        let accepting = tokio::spawn(accept(listener, TlsAcceptor::from(tls), handshakes, sender));
        Ok(Self { address, accepted, accepting })
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl axum::serve::Listener for TlsListener {
    type Io = Accepted;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Accepted, SocketAddr) {
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

async fn accept(
    listener: TcpListener,
    tls: TlsAcceptor,
    handshakes: IntCounterVec,
    sender: mpsc::Sender<(Accepted, SocketAddr)>,
) {
    let beginning = Arc::new(Semaphore::new(MAX_BEGINNING));
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "accepting connections");
                tokio::time::sleep(EXHAUSTED).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&beginning).try_acquire_owned() else { continue };
        let (tls, handshakes, sender) = (tls.clone(), handshakes.clone(), sender.clone());
        tokio::spawn(async move {
            let begun = tokio::time::timeout(PATIENCE, begin(stream, &tls, &handshakes)).await;
            drop(permit);
            match begun {
                // The listener may have gone.
                Ok(Ok(accepted)) => drop(sender.send((accepted, address)).await),
                Ok(Err(error)) => tracing::debug!(%error, "a connection did not begin"),
                Err(_) => tracing::debug!("a connection did not begin in time"),
            }
        });
    }
}

async fn begin(stream: TcpStream, tls: &TlsAcceptor, handshakes: &IntCounterVec) -> io::Result<Accepted> {
    // A small message must not wait for the acknowledgement of the one before it.
    stream.set_nodelay(true)?;
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if first != [HANDSHAKE] {
        return Ok(Accepted::Plain(stream));
    }
    let accepted = tls.accept(stream).await;
    handshakes.with_label_values(&[if accepted.is_ok() { "ok" } else { "failed" }]).inc();
    Ok(Accepted::Tls(Box::new(accepted?)))
}

/// A connection that has begun.
#[derive(Debug)]
pub enum Accepted {
    /// Without TLS.
    Plain(TcpStream),
    /// With it.
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Accepted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
