//! A client that tries a TURN server out: two allocations, and a packet from one to the other and back.
//!
//! Both ends are allocations because a relayed address talks to peers in the internet only: a socket of this machine may
//! be none.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::frame::first_frame;
use crate::message::{Algorithm, Builder, Class, Key, Message, Method, TransactionId, attribute};

/// The name in the credentials of a probe: allocations of users called so are left out of the outcomes in metrics.
pub const PROBE_NAME: &str = "homeport-probe";
/// How often a request over UDP is sent again.
const REPEAT: Duration = Duration::from_millis(500);
/// The longest message that a probe has use for.
const MAX_MESSAGE: usize = 1_500;
/// What is sent there, and back.
const THERE: &[u8] = b"homeport probe: there";
const BACK: &[u8] = b"homeport probe: back";

/// How a probe talks to its server.
#[derive(Debug, Clone)]
pub enum ProbeTransport {
    /// In datagrams.
    Udp,
    /// In a stream.
    Tcp,
    /// In a stream, with TLS for a server of this name.
    Tls(Arc<ClientConfig>, ServerName<'static>),
}

/// What to try, as whom, and for how long.
#[derive(Clone)]
pub struct Probe {
    /// The server.
    pub server: SocketAddr,
    /// How to talk to it.
    pub transport: ProbeTransport,
    /// The name in the credentials.
    pub username: String,
    /// The password.
    pub password: String,
    /// How long each step may take.
    pub patience: Duration,
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo {
    /// Until there was an allocation.
    pub allocated: Duration,
    /// Until a packet had been there and back.
    pub echoed: Duration,
    /// The address that peers see.
    pub relayed: SocketAddr,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no way to the server.
    #[error("it cannot be reached: {0}")]
    Unreachable(#[source] io::Error),
    /// TLS failed.
    #[error("TLS does not come to be: {0}")]
    Tls(#[source] io::Error),
    /// There is no answer.
    #[error("there is no answer")]
    Silent,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// What answers is no TURN server.
    #[error("what answers there does not speak TURN")]
    NotTurn,
    /// The server does not take the credentials.
    #[error("the server refuses the credentials (401)")]
    Unauthorized,
    /// The server refuses something else.
    #[error("the server refuses {0} ({1})")]
    Refused(&'static str, u16),
    /// Packets do not come through.
    #[error("packets to the relayed address {0} do not arrive")]
    NoEcho(SocketAddr),
}

impl Probe {
    /// Makes two allocations, sends a packet from one to the other and back, and gives the allocations back.
    ///
    /// # Errors
    /// [`ProbeError`]; allocations that could not be given back end with their lifetime or their connection.
    pub async fn echo(&self) -> Result<Echo, ProbeError> {
        let start = Instant::now();
        let (mut one, relayed) = self.allocate().await?;
        let allocated = start.elapsed();
        let (mut other, others) = self.allocate().await?;
        let echo = async {
            one.permit(others).await?;
            other.permit(relayed).await?;
            let start = Instant::now();
            Self::carry(&mut one, &mut other, others, THERE).await?;
            Self::carry(&mut other, &mut one, relayed, BACK).await?;
            Ok(Echo { allocated, echoed: start.elapsed(), relayed })
        };
        let echo = echo.await;
        for client in [&mut one, &mut other] {
            // What is not given back ends by itself, and says nothing of the server.
            let _ = client.request(Method::Refresh, |request| request.attribute(attribute::LIFETIME, &[0; 4])).await;
        }
        echo
    }

    async fn allocate(&self) -> Result<(Client, SocketAddr), ProbeError> {
        let wire = timeout(self.patience, Wire::connect(self.server, &self.transport));
        let wire = wire.await.unwrap_or_else(|_| match self.transport {
            ProbeTransport::Udp => Err(ProbeError::Silent),
            _ => Err(ProbeError::Unreachable(io::ErrorKind::TimedOut.into())),
        })?;
        let mut client = Client { wire, probe: self.clone(), key: None };
        // UDP, by its number.
        let transport = [17, 0, 0, 0];
        let allocate = |request: Builder| request.attribute(attribute::REQUESTED_TRANSPORT, &transport);
        let answer = client.request(Method::Allocate, allocate).await?;
        let relayed = Message::parse(&answer).ok().and_then(|message| message.relayed_address());
        Ok((client, relayed.ok_or(ProbeError::NotTurn)?))
    }

    /// Sends `payload` from one client to the relayed address of another, until it arrives there.
    async fn carry(from: &mut Client, to: &mut Client, address: SocketAddr, payload: &[u8]) -> Result<(), ProbeError> {
        let carry = async {
            loop {
                let indication = Builder::new(Class::Indication, Method::Send, TransactionId::random())
                    .address(attribute::XOR_PEER_ADDRESS, address)
                    .attribute(attribute::DATA, payload)
                    .finish();
                from.wire.send(&indication).await?;
                // Between the two allocations it is always UDP, where packets may be lost.
                let Ok(received) = timeout(REPEAT, to.wire.receive_data(payload)).await else { continue };
                return received;
            }
        };
        let carried = timeout(from.probe.patience, carry).await;
        carried.unwrap_or(Err(ProbeError::NoEcho(address)))
    }
}

/// One client with its own address, and with an allocation once it has asked for one.
struct Client {
    wire: Wire,
    probe: Probe,
    /// The key, with the realm and nonce that the server wants to see.
    key: Option<(Key, String, Vec<u8>)>,
}

impl Client {
    async fn permit(&mut self, peer: SocketAddr) -> Result<(), ProbeError> {
        let permission = |request: Builder| request.address(attribute::XOR_PEER_ADDRESS, peer);
        self.request(Method::CreatePermission, permission).await.map(drop)
    }

    /// Asks, and asks again with credentials or a new nonce where the server wants that. Returns the answer.
    async fn request(&mut self, method: Method, with: impl Fn(Builder) -> Builder) -> Result<Vec<u8>, ProbeError> {
        // One answer may say which realm, and one that the nonce is stale.
        for _ in 0..3 {
            let transaction = TransactionId::random();
            let mut request = with(Builder::new(Class::Request, method, transaction));
            if let Some((key, realm, nonce)) = &self.key {
                request = request
                    .attribute(attribute::USERNAME, self.probe.username.as_bytes())
                    .attribute(attribute::REALM, realm.as_bytes())
                    .attribute(attribute::NONCE, nonce)
                    .integrity(key, false);
            }
            let bytes = self.exchange(&request.finish(), transaction).await?;
            let answer = Message::parse(&bytes).map_err(|_| ProbeError::NotTurn)?;
            match (answer.class, answer.error_code()) {
                (Class::Success, _) if self.key.as_ref().is_none_or(|(key, ..)| answer.is_by(key)) => return Ok(bytes),
                (Class::Success, _) => return Err(ProbeError::NotTurn),
                (_, Some(401)) if self.key.is_some() => return Err(ProbeError::Unauthorized),
                (_, Some(401 | 438)) => {
                    let (Some(realm), Some(nonce)) = (answer.attributes.realm, answer.attributes.nonce) else {
                        return Err(ProbeError::NotTurn);
                    };
                    let Probe { username, password, .. } = &self.probe;
                    let key = Key::long_term(Algorithm::Md5, username, realm, password);
                    self.key = Some((key, realm.to_owned(), nonce.to_vec()));
                }
                (_, Some(code)) => return Err(ProbeError::Refused(method.label(), code)),
                (_, None) => return Err(ProbeError::NotTurn),
            }
        }
        Err(ProbeError::Unauthorized)
    }

    async fn exchange(&mut self, request: &[u8], transaction: TransactionId) -> Result<Vec<u8>, ProbeError> {
        let repeats = matches!(self.wire, Wire::Datagrams(_));
        let answer = async {
            loop {
                self.wire.send(request).await?;
                let answer = self.wire.receive_answer(transaction);
                if !repeats {
                    return answer.await;
                }
                if let Ok(answer) = timeout(REPEAT, answer).await {
                    return answer;
                }
            }
        };
        timeout(self.probe.patience, answer).await.unwrap_or(Err(ProbeError::Silent))
    }
}

/// A stream of bytes, plain or not.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What carries messages to the server.
enum Wire {
    Datagrams(UdpSocket),
    /// With what has been read and is no whole message yet.
    Stream(Box<dyn Stream>, Vec<u8>),
}

impl Wire {
    async fn connect(server: SocketAddr, transport: &ProbeTransport) -> Result<Self, ProbeError> {
        if let ProbeTransport::Udp = transport {
            let own: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
            let connect = async {
                let socket = UdpSocket::bind(own).await?;
                socket.connect(server).await?;
                Ok(socket)
            };
            return connect.await.map(Self::Datagrams).map_err(ProbeError::Unreachable);
        }
        let stream = TcpStream::connect(server).await.map_err(ProbeError::Unreachable)?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match transport {
            ProbeTransport::Tls(config, name) => {
                let connector = TlsConnector::from(Arc::clone(config));
                Box::new(connector.connect(name.clone(), stream).await.map_err(ProbeError::Tls)?)
            }
            _ => Box::new(stream),
        };
        Ok(Self::Stream(stream, Vec::new()))
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), ProbeError> {
        match self {
            // An ICMP error about the packet before: the answer to this one may come.
            Self::Datagrams(socket) => match socket.send(bytes).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                sent => drop(sent?),
            },
            Self::Stream(stream, _) => {
                stream.write_all(bytes).await?;
                stream.flush().await?;
            }
        }
        Ok(())
    }

    /// The next message, whatever it is. May be given up at any time.
    async fn receive(&mut self) -> Result<Vec<u8>, ProbeError> {
        match self {
            Self::Datagrams(socket) => {
                let mut buffer = vec![0; MAX_MESSAGE];
                match socket.recv(&mut buffer).await {
                    Ok(length) => {
                        buffer.truncate(length);
                        Ok(buffer)
                    }
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                        Err(ProbeError::Unreachable(error))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            Self::Stream(stream, read) => loop {
                match first_frame(read) {
                    Err(_) => return Err(ProbeError::NotTurn),
                    Ok(Some(length)) => return Ok(read.drain(..length).collect()),
                    Ok(None) if read.len() > MAX_MESSAGE => return Err(ProbeError::NotTurn),
                    Ok(None) if stream.read_buf(read).await? == 0 => {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                    }
                    Ok(None) => {}
                }
            },
        }
    }

    async fn receive_answer(&mut self, transaction: TransactionId) -> Result<Vec<u8>, ProbeError> {
        loop {
            let bytes = self.receive().await?;
            if Message::parse(&bytes).is_ok_and(|message| message.transaction == transaction) {
                return Ok(bytes);
            }
        }
    }

    async fn receive_data(&mut self, payload: &[u8]) -> Result<(), ProbeError> {
        loop {
            let bytes = self.receive().await?;
            if Message::parse(&bytes).is_ok_and(|message| message.attributes.data == Some(payload)) {
                return Ok(());
            }
        }
    }
}
