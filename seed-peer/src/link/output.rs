//! What a link yields, and the words for it in metrics.

use std::net::SocketAddr;
use std::time::Instant;

use genosdb::{ChannelName, Content};

/// What a link yields.
#[derive(Debug)]
pub(crate) enum LinkOutput {
    /// Send a packet.
    Transmit { source: SocketAddr, destination: SocketAddr, bytes: Vec<u8> },
    /// A step on the way to an open channel has been taken.
    Step(Step),
    /// The data channel is open.
    Opened,
    /// A message of the peer, and its size as it travelled.
    Message { channel: ChannelName, content: Content, bytes: usize },
    /// The peer takes the room for one in cells, which it is not to us. Said once.
    SpeaksCells,
    /// Something of the peer was malformed or too much, and was left out.
    Refused(Refused),
    /// The link is over.
    Closed(CloseReason),
    /// Nothing more until then, or until there is input.
    Timeout(Instant),
}

/// A step of a link on its way to an open channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The peer has described itself.
    Described,
    /// Packets get through (ICE).
    Reached,
    /// The link is sealed (DTLS).
    Sealed,
}

impl Step {
    /// For metrics: what took so long.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Described => "described",
            Self::Reached => "ice",
            Self::Sealed => "dtls",
        }
    }

    /// For metrics: what a link lacked that got no further.
    pub(crate) fn outcome_without_next(step: Option<Self>) -> &'static str {
        match step {
            None => "unanswered",
            Some(Self::Described) => "no_path",
            Some(Self::Reached) => "no_dtls",
            Some(Self::Sealed) => "no_channel",
        }
    }
}

/// What was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Frame,
    Message,
}

/// Why a link ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CloseReason {
    /// The peer said so.
    Left,
    /// Nothing was heard for too long.
    Silent,
    /// The peer sent too much, or too much rubbish.
    Misbehaved,
    /// The peer reads too slowly.
    Slow,
    /// WebRTC failed.
    Failed,
}

impl CloseReason {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Left => "bye",
            Self::Silent => "silent",
            Self::Misbehaved => "misbehaved",
            Self::Slow => "slow",
            Self::Failed => "failed",
        }
    }
}
