//! A client's TCP or TLS connection.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use rustls::ServerConnection;

use crate::engine::ClientId;
use crate::frame::MAX_FRAME;
use crate::quotas::Share;

/// Bytes that wait for one client, at most: beyond, datagrams for it are dropped, as a full link drops them.
const MAX_OUTGOING: usize = 256 << 10;
/// What a buffer that has run empty keeps of its memory.
const KEPT_BUFFER: usize = 4 << 10;
/// Bytes that are handed to TLS at a time, so that what waits is counted here and not in there.
const TLS_CHUNK: usize = 16 << 10;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Before it began: there is no room for more.
    Refused,
    Left,
    Malformed,
    Idle,
    Tls,
    Io,
    Shutdown,
}

impl End {
    /// For metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Left => "left",
            Self::Malformed => "malformed",
            Self::Idle => "idle",
            Self::Tls => "tls",
            Self::Io => "io",
            Self::Shutdown => "shutdown",
        }
    }
}

/// A connection and what waits in both directions.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) socket: TcpStream,
    tls: Option<Box<ServerConnection>>,
    pub(crate) client: ClientId,
    /// Counts against the connections of its address.
    _share: Share,
    /// Bytes that are not a whole message yet.
    pub(crate) incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` that have been sent.
    sent: usize,
    /// Since when the client owes its next message.
    pub(crate) waiting_since: Instant,
    /// Whether a message came at all.
    pub(crate) has_spoken: bool,
    /// Whether the edge waits for the socket to take more.
    pub(crate) waits_to_write: bool,
}

impl Stream {
    pub(crate) fn new(
        socket: TcpStream,
        tls: Option<Box<ServerConnection>>,
        client: ClientId,
        share: Share,
        now: Instant,
    ) -> Self {
        Self {
            socket,
            tls,
            client,
            _share: share,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            sent: 0,
            waiting_since: now,
            has_spoken: false,
            waits_to_write: false,
        }
    }

    /// Whether the TLS handshake is still going on.
    pub(crate) fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Reads once, through `scratch`, into `incoming`, and returns whether there may be more.
    pub(crate) fn read(&mut self, scratch: &mut [u8]) -> Result<bool, End> {
        let space = (MAX_FRAME - self.incoming.len().min(MAX_FRAME)).min(scratch.len()).max(1);
        let scratch = &mut scratch[..space];
        let Some(tls) = &mut self.tls else {
            return match self.socket.read(scratch) {
                Ok(0) => Err(End::Left),
                Ok(length) => {
                    self.incoming.extend_from_slice(&scratch[..length]);
                    Ok(length == space)
                }
                Err(error) => nothing_yet(&error).map(|()| false),
            };
        };
        match tls.read_tls(&mut self.socket) {
            Ok(0) => return Err(End::Left),
            Ok(_) => {}
            Err(error) => return nothing_yet(&error).map(|()| false),
        }
        if tls.process_new_packets().is_err() {
            // The alert says why; whether it arrives makes no difference any more.
            let _ = tls.write_tls(&mut self.socket);
            return Err(End::Tls);
        }
        self.read_decrypted(scratch).map(|()| true)
    }

    /// Reads what TLS has decrypted, through `scratch`, into `incoming`.
    pub(crate) fn read_decrypted(&mut self, scratch: &mut [u8]) -> Result<(), End> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        loop {
            match tls.reader().read(scratch) {
                Ok(0) => return Err(End::Left),
                Ok(length) => self.incoming.extend_from_slice(&scratch[..length]),
                Err(error) => return nothing_yet(&error),
            }
        }
    }

    /// Queues a message. Returns whether there was room.
    pub(crate) fn push(&mut self, parts: [&[u8]; 3]) -> bool {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if self.outgoing.len() - self.sent + length > MAX_OUTGOING {
            return false;
        }
        for part in parts {
            self.outgoing.extend_from_slice(part);
        }
        true
    }

    /// Writes what waits, as much as the socket takes; returns whether something is left.
    pub(crate) fn write(&mut self) -> Result<bool, End> {
        loop {
            let rest = &self.outgoing[self.sent..];
            let result = match &mut self.tls {
                None if rest.is_empty() => break,
                None => self.socket.write(rest).map(|length| self.sent += length),
                Some(tls) => {
                    if !tls.wants_write() {
                        if rest.is_empty() || tls.is_handshaking() {
                            break;
                        }
                        let chunk = &rest[..rest.len().min(TLS_CHUNK)];
                        match tls.writer().write(chunk) {
                            Ok(length) => self.sent += length,
                            Err(_) => return Err(End::Tls),
                        }
                    }
                    tls.write_tls(&mut self.socket).map(|_| ())
                }
            };
            match result {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.outgoing.drain(..self.sent);
                    self.sent = 0;
                    return Ok(true);
                }
                Err(_) => return Err(End::Io),
            }
        }
        self.outgoing.drain(..self.sent);
        self.sent = 0;
        if self.outgoing.capacity() > KEPT_BUFFER && self.outgoing.is_empty() {
            self.outgoing = Vec::new();
        }
        Ok(false)
    }

    /// Takes back the memory of a buffer that is empty again.
    pub(crate) fn tidy(&mut self) {
        if self.incoming.is_empty() && self.incoming.capacity() > KEPT_BUFFER {
            self.incoming = Vec::new();
        }
    }
}

/// An error of a socket that only has nothing to give or take at the moment is none.
fn nothing_yet(error: &io::Error) -> Result<(), End> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(()),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => Err(End::Left),
        _ => Err(End::Io),
    }
}
