//! Sockets to listen on, with errors that name the setting at fault.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

/// A socket could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {protocol} {address} (setting {setting}): {}", reason(source))]
pub struct BindError {
    /// The setting that holds the address, such as `relay.listen`.
    pub setting: &'static str,
    /// The address in question.
    pub address: SocketAddr,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// What the system said.
    pub source: io::Error,
}

fn reason(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => "the port is taken by another program; stop it or set another port".into(),
        io::ErrorKind::PermissionDenied => "ports below 1024 need a privilege; set another port".into(),
        io::ErrorKind::AddrNotAvailable => "this machine does not have that address".into(),
        _ => source.to_string(),
    }
}

/// Listens for TCP connections. `[::]` takes IPv4 as well, also on machines without IPv6.
///
/// # Errors
/// [`BindError`], naming `setting`.
pub fn tcp(setting: &'static str, address: SocketAddr) -> Result<tokio::net::TcpListener, BindError> {
    let bind = |address| {
        let socket = open(address, Type::STREAM, Protocol::TCP)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::into(address))?;
        socket.listen(1024)?;
        tokio::net::TcpListener::from_std(socket.into())
    };
    dual_stack(address, bind).map_err(|source| BindError { setting, address, protocol: "TCP", source })
}

/// Binds a UDP socket, non-blocking. `[::]` takes IPv4 as well, also on machines without IPv6.
///
/// # Errors
/// [`BindError`], naming `setting`.
pub fn udp(setting: &'static str, address: SocketAddr) -> Result<std::net::UdpSocket, BindError> {
    let bind = |address| {
        let socket = open(address, Type::DGRAM, Protocol::UDP)?;
        socket.bind(&SocketAddr::into(address))?;
        Ok(socket.into())
    };
    dual_stack(address, bind).map_err(|source| BindError { setting, address, protocol: "UDP", source })
}

/// Binds `count` UDP sockets, non-blocking, to one address that nobody else has; the system spreads clients over them.
/// `[::]` takes IPv4 as well, also on machines without IPv6.
///
/// # Errors
/// [`BindError`], naming `setting`.
pub fn udp_shared(
    setting: &'static str,
    address: SocketAddr,
    count: usize,
) -> Result<Vec<std::net::UdpSocket>, BindError> {
    shared(address, count, Type::DGRAM, Protocol::UDP, |_| Ok(()))
        .map(|sockets| sockets.into_iter().map(Into::into).collect())
        .map_err(|source| BindError { setting, address, protocol: "UDP", source })
}

/// Listens for TCP connections on `count` sockets, non-blocking, of one address that nobody else has; the system
/// spreads connections over them. `[::]` takes IPv4 as well, also on machines without IPv6.
///
/// # Errors
/// [`BindError`], naming `setting`.
pub fn tcp_shared(
    setting: &'static str,
    address: SocketAddr,
    count: usize,
) -> Result<Vec<std::net::TcpListener>, BindError> {
    shared(address, count, Type::STREAM, Protocol::TCP, |socket| socket.listen(1024))
        .map(|sockets| sockets.into_iter().map(Into::into).collect())
        .map_err(|source| BindError { setting, address, protocol: "TCP", source })
}

fn shared(
    address: SocketAddr,
    count: usize,
    kind: Type,
    protocol: Protocol,
    then: impl Fn(&Socket) -> io::Result<()>,
) -> io::Result<Vec<Socket>> {
    // A socket that shares its port shares it with other programs of this user as well. So first one that does not:
    // it fails where somebody else is, and finds a port where any will do.
    let address = dual_stack(address, |address| {
        let socket = open(address, kind, protocol)?;
        if protocol == Protocol::TCP {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&address.into())?;
        // Of TCP, only one that listens is in the way of others.
        then(&socket)?;
        socket.local_addr()?.as_socket().ok_or_else(|| io::ErrorKind::Unsupported.into())
    })?;
    let bind = || {
        let socket = open(address, kind, protocol)?;
        if protocol == Protocol::TCP {
            socket.set_reuse_address(true)?;
        }
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        then(&socket)?;
        Ok(socket)
    };
    (0..count).map(|_| bind()).collect()
}

fn open(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    Ok(socket)
}

/// Binds `address`; where that is all of IPv6 and the machine has none, all of IPv4.
fn dual_stack<T>(address: SocketAddr, bind: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    match bind(address) {
        Err(error)
            if address.is_ipv6()
                && address.ip().is_unspecified()
                && !matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) =>
        {
            tracing::debug!(%address, %error, "no IPv6 here, listening on IPv4 alone");
            bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_setting() {
        let first = tcp("relay.listen", "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = first.local_addr().unwrap();
        let message = tcp("relay.listen", address).unwrap_err().to_string();
        assert!(message.contains("relay.listen") && message.contains(&address.port().to_string()), "{message}");
        assert!(message.contains("taken"), "{message}");

        let first = udp("turn.listen", "127.0.0.1:0".parse().unwrap()).unwrap();
        let message = udp("turn.listen", first.local_addr().unwrap()).unwrap_err().to_string();
        assert!(message.contains("UDP") && message.contains("turn.listen"), "{message}");
    }

    #[tokio::test]
    async fn sockets_share_a_port_with_each_other_and_with_nobody_else() {
        let address = "127.0.0.1:0".parse().unwrap();
        let sockets = udp_shared("turn.listen", address, 3).unwrap();
        let port = sockets[0].local_addr().unwrap();
        assert!(sockets.iter().all(|socket| socket.local_addr().unwrap() == port));
        assert!(udp_shared("turn.listen", port, 2).is_err());
        let listeners = tcp_shared("turn.listen", address, 3).unwrap();
        let port = listeners[0].local_addr().unwrap();
        assert!(tcp_shared("turn.listen", port, 2).is_err());
        drop(listeners);
        tcp_shared("turn.listen", port, 2).unwrap();
    }

    #[tokio::test]
    async fn all_of_ipv6_takes_ipv4_as_well() {
        let listener = tcp("relay.listen", "[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    }
}
