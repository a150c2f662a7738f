//! A client of TURN for tests and measurements, made of the messages of the `stun` and `turn` crates: it asks for an
//! allocation and a channel, and then only moves packets.
#![allow(dead_code, reason = "each of its users needs another part")]

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustls::{ClientConnection, StreamOwned};
use stun::attributes::{ATTR_NONCE, ATTR_REALM, ATTR_USERNAME, RawAttribute};
use stun::integrity::MessageIntegrity;
use stun::message::{
    CLASS_REQUEST, CLASS_SUCCESS_RESPONSE, METHOD_ALLOCATE, METHOD_CHANNEL_BIND, METHOD_REFRESH, Message, MessageType,
    Method, Setter,
};
use stun::textattrs::TextAttribute;
use turn::proto::channum::ChannelNumber;
use turn::proto::peeraddr::PeerAddress;
use turn::proto::relayaddr::RelayedAddress;
use turn::proto::reqtrans::RequestedTransport;

/// Name, password and realm at the servers under test.
pub(crate) const USER: &str = "alice";
pub(crate) const PASSWORD: &str = "pass";
pub(crate) const REALM: &str = "homeport";
/// The channel of each client.
const CHANNEL: u16 = 0x4000;
/// Before the payload of a channel's data.
pub(crate) const CHANNEL_HEAD: usize = 4;

/// How a client talks to its server.
pub(crate) enum Transport {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Transport {
    pub(crate) fn udp(server: SocketAddr) -> anyhow::Result<Self> {
        let own: SocketAddr = if server.is_ipv4() { "127.0.0.1:0".parse()? } else { "[::1]:0".parse()? };
        let socket = UdpSocket::bind(own)?;
        socket.connect(server)?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self::Udp(socket))
    }

    pub(crate) fn tcp(server: SocketAddr) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(server)?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        socket.set_nodelay(true)?;
        Ok(Self::Tcp(socket))
    }

    pub(crate) fn tls(server: SocketAddr, config: &Arc<rustls::ClientConfig>) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(server)?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        socket.set_nodelay(true)?;
        let connection = ClientConnection::new(Arc::clone(config), "localhost".try_into()?)?;
        Ok(Self::Tls(Box::new(StreamOwned::new(connection, socket))))
    }

    /// The server's certificate in DER, over TLS.
    pub(crate) fn certificate(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tls(stream) => Some(stream.conn.peer_certificates()?.first()?.to_vec()),
            Self::Udp(_) | Self::Tcp(_) => None,
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Udp(socket) => socket.send(bytes).map(drop)?,
            Self::Tcp(socket) => socket.write_all(bytes)?,
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush())?,
        }
        Ok(())
    }

    /// One message: a datagram, or as much of a stream as its head says.
    pub(crate) fn read(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let mut exactly = |stream: &mut dyn std::io::Read| {
            stream.read_exact(&mut bytes[..4])?;
            let length = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
            let length = if bytes[0] < 0x40 { 20 + length } else { CHANNEL_HEAD + length.next_multiple_of(4) };
            stream.read_exact(&mut bytes[4..length])?;
            Ok::<usize, std::io::Error>(length)
        };
        let length = match self {
            Self::Udp(socket) => socket.recv(&mut bytes)?,
            Self::Tcp(socket) => exactly(socket)?,
            Self::Tls(stream) => exactly(stream)?,
        };
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// A client with an allocation.
pub(crate) struct Client {
    pub(crate) transport: Transport,
    pub(crate) relayed: SocketAddr,
    nonce: String,
}

impl Client {
    /// Asks for an allocation.
    pub(crate) fn allocate(transport: Transport) -> anyhow::Result<Self> {
        Ok(Self::allocate_with(transport, &[])?.0)
    }

    /// Asks for an allocation with more attributes, and returns the answer with it.
    pub(crate) fn allocate_with(
        mut transport: Transport,
        attributes: &[RawAttribute],
    ) -> anyhow::Result<(Self, Message)> {
        let setters = || {
            let protocol: Box<dyn Setter> = Box::new(RequestedTransport { protocol: turn::proto::PROTO_UDP });
            let more = attributes.iter().map(|attribute| Box::new(attribute.clone()) as Box<dyn Setter>);
            std::iter::once(protocol).chain(more).collect::<Vec<_>>()
        };
        let first = exchange(&mut transport, METHOD_ALLOCATE, setters(), None)?;
        let nonce = TextAttribute::get_from_as(&first, ATTR_NONCE)?.text;
        let answer = exchange(&mut transport, METHOD_ALLOCATE, setters(), Some(&nonce))?;
        anyhow::ensure!(answer.typ.class == CLASS_SUCCESS_RESPONSE, "no allocation: {answer}");
        let mut relayed = RelayedAddress::default();
        stun::message::Getter::get_from(&mut relayed, &answer)?;
        Ok((Self { transport, relayed: SocketAddr::new(relayed.ip, relayed.port), nonce }, answer))
    }

    /// Binds the channel to a peer.
    pub(crate) fn bind(&mut self, peer: SocketAddr) -> anyhow::Result<()> {
        let peer = PeerAddress { ip: peer.ip(), port: peer.port() };
        let setters: Vec<Box<dyn Setter>> = vec![Box::new(peer), Box::new(ChannelNumber(CHANNEL))];
        let answer = exchange(&mut self.transport, METHOD_CHANNEL_BIND, setters, Some(&self.nonce))?;
        anyhow::ensure!(answer.typ.class == CLASS_SUCCESS_RESPONSE, "no channel: {answer}");
        Ok(())
    }

    /// Keeps the allocation for another while.
    pub(crate) fn refresh(&mut self) -> anyhow::Result<()> {
        let answer = exchange(&mut self.transport, METHOD_REFRESH, Vec::new(), Some(&self.nonce))?;
        anyhow::ensure!(answer.typ.class == CLASS_SUCCESS_RESPONSE, "no refresh: {answer}");
        Ok(())
    }
}

fn exchange(
    transport: &mut Transport,
    method: Method,
    attributes: Vec<Box<dyn Setter>>,
    nonce: Option<&str>,
) -> anyhow::Result<Message> {
    let mut request = Message::new();
    let mut setters: Vec<Box<dyn Setter>> =
        vec![Box::new(MessageType { method, class: CLASS_REQUEST }), Box::new(stun::agent::TransactionId::new())];
    setters.extend(attributes);
    if let Some(nonce) = nonce {
        setters.push(Box::new(TextAttribute::new(ATTR_USERNAME, USER.into())));
        setters.push(Box::new(TextAttribute::new(ATTR_REALM, REALM.into())));
        setters.push(Box::new(TextAttribute::new(ATTR_NONCE, nonce.into())));
        setters.push(Box::new(MessageIntegrity::new_long_term_integrity(USER.into(), REALM.into(), PASSWORD.into())));
    }
    request.build(&setters)?;
    transport.write(&request.raw)?;
    let bytes = transport.read().context("no answer")?;
    let mut answer = Message::new();
    answer.unmarshal_binary(&bytes)?;
    Ok(answer)
}

/// A channel's data with `payload` bytes of payload.
pub(crate) fn channel_data(payload: usize) -> Vec<u8> {
    let mut bytes = CHANNEL.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::try_from(payload).unwrap_or(u16::MAX).to_be_bytes());
    bytes.resize(CHANNEL_HEAD + payload.next_multiple_of(4), 7);
    bytes
}

/// Takes any certificate: that of the servers here was made a moment ago.
pub(crate) fn tls_config() -> anyhow::Result<Arc<rustls::ClientConfig>> {
    #[derive(Debug)]
    struct Anyone(rustls::crypto::CryptoProvider);

    impl rustls::client::danger::ServerCertVerifier for Anyone {
        fn verify_server_cert(
            &self,
            _end_entity: &rustls::pki_types::CertificateDer<'_>,
            _intermediates: &[rustls::pki_types::CertificateDer<'_>],
            _name: &rustls::pki_types::ServerName<'_>,
            _ocsp: &[u8],
            _now: rustls::pki_types::UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &rustls::pki_types::CertificateDer<'_>,
            dss: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &rustls::pki_types::CertificateDer<'_>,
            dss: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }

    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_safe_default_protocol_versions()
        .context("no TLS")?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}
