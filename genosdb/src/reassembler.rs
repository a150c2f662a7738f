//! Joins the chunks of one peer's messages again (wire §3), within limits.

use std::collections::HashMap;
use std::io::Read as _;

use flate2::read::ZlibDecoder;

use crate::frame::{ChannelName, Content, Frame, flag};

/// What one peer may make us hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of one message, as it travels and after inflating.
    pub message_bytes: usize,
    /// Bytes of all of a peer's unfinished messages.
    pub unfinished_bytes: usize,
    /// Unfinished messages of one peer.
    pub unfinished_messages: usize,
    /// Bytes of the JSON text that describes a binary message.
    pub meta_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { message_bytes: 64 << 20, unfinished_bytes: 64 << 20, unfinished_messages: 16, meta_bytes: 64 << 10 }
    }
}

/// A peer's message cannot be put together. Everything but [`ReassemblyError::Content`] means that the peer goes
/// beyond what it may hold of our memory, and that its link is better closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReassemblyError {
    /// A message is larger than [`Limits::message_bytes`].
    #[error("message is too large")]
    MessageTooLarge,
    /// More unfinished messages, or more of their bytes, than [`Limits`] allow.
    #[error("too many unfinished messages")]
    TooManyUnfinished,
    /// The finished message does not inflate, or is not UTF-8 where it should be.
    #[error("message does not decode")]
    Content,
}

#[derive(Debug, Default)]
struct Unfinished {
    meta: Option<Vec<u8>>,
    body: Vec<u8>,
}

impl Unfinished {
    fn len(&self) -> usize {
        self.body.len() + self.meta.as_ref().map_or(0, Vec::len)
    }
}

/// The unfinished messages of one peer. Its data channel is ordered: chunks of one message come in order, though
/// other messages may come between them.
#[derive(Debug)]
pub struct Reassembler {
    limits: Limits,
    unfinished: HashMap<(ChannelName, u8), Unfinished>,
    bytes: usize,
}

impl Reassembler {
    /// A reassembler for one link.
    pub fn new(limits: Limits) -> Self {
        Self { limits, unfinished: HashMap::new(), bytes: 0 }
    }

    /// Takes one frame; returns the message when this was its last chunk.
    ///
    /// # Errors
    /// [`ReassemblyError`]; the message in question is forgotten.
    pub fn push(&mut self, frame: &Frame<'_>) -> Result<Option<(ChannelName, Content)>, ReassemblyError> {
        let key = (frame.channel, frame.nonce);
        let mut message = self.unfinished.remove(&key).unwrap_or_default();
        self.bytes -= message.len();

        if frame.flags & flag::META != 0 {
            if frame.payload.len() > self.limits.meta_bytes {
                return Err(ReassemblyError::MessageTooLarge);
            }
            message.meta = Some(frame.payload.to_vec());
        } else {
            if message.body.len() + frame.payload.len() > self.limits.message_bytes {
                return Err(ReassemblyError::MessageTooLarge);
            }
            message.body.extend_from_slice(frame.payload);
        }
        if frame.is_last() {
            return self.finish(frame, message).map(Some);
        }
        self.bytes += message.len();
        self.unfinished.insert(key, message);
        if self.unfinished.len() > self.limits.unfinished_messages || self.bytes > self.limits.unfinished_bytes {
            return Err(ReassemblyError::TooManyUnfinished);
        }
        Ok(None)
    }

    /// How many messages wait for more chunks.
    pub fn unfinished(&self) -> usize {
        self.unfinished.len()
    }

    fn finish(&self, frame: &Frame<'_>, message: Unfinished) -> Result<(ChannelName, Content), ReassemblyError> {
        let body = if frame.flags & flag::DEFLATED == 0 { message.body } else { self.inflate(&message.body)? };
        let text = |bytes| String::from_utf8(bytes).map_err(|_| ReassemblyError::Content);
        let content = if frame.flags & flag::BINARY != 0 {
            Content::Binary { meta: message.meta.map(text).transpose()?, bytes: body }
        } else if frame.flags & flag::JSON != 0 {
            Content::Json(text(body)?)
        } else {
            Content::Text(text(body)?)
        };
        Ok((frame.channel, content))
    }

    fn inflate(&self, deflated: &[u8]) -> Result<Vec<u8>, ReassemblyError> {
        let limit = self.limits.message_bytes;
        let mut inflated = Vec::new();
        let read = ZlibDecoder::new(deflated)
            .take(u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1))
            .read_to_end(&mut inflated);
        match read {
            Ok(_) if inflated.len() > limit => Err(ReassemblyError::MessageTooLarge),
            Ok(_) => Ok(inflated),
            Err(_) => Err(ReassemblyError::Content),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Message;

    const SMALL: Limits =
        Limits { message_bytes: 100_000, unfinished_bytes: 120_000, unfinished_messages: 3, meta_bytes: 100 };

    fn binary(length: usize) -> Message {
        let channel = ChannelName::new("files").unwrap();
        Message::new(channel, Content::Binary { meta: None, bytes: vec![1; length] })
    }

    fn push(reassembler: &mut Reassembler, bytes: &[u8]) -> Result<Option<(ChannelName, Content)>, ReassemblyError> {
        reassembler.push(&Frame::parse(bytes).unwrap())
    }

    #[test]
    fn interleaved_messages_come_out_whole() {
        let mut reassembler = Reassembler::new(SMALL);
        let (one, two) = (binary(40_000), binary(35_000));
        for index in 0..2 {
            assert_eq!(push(&mut reassembler, &one.frame(1, index)), Ok(None));
            assert_eq!(push(&mut reassembler, &two.frame(2, index)), Ok(None));
        }
        let length = |got: Result<Option<(ChannelName, Content)>, _>| match got {
            Ok(Some((_, Content::Binary { bytes, .. }))) => bytes.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(length(push(&mut reassembler, &two.frame(2, 2))), 35_000);
        assert_eq!(length(push(&mut reassembler, &one.frame(1, 2))), 40_000);
        assert_eq!((reassembler.unfinished(), reassembler.bytes), (0, 0));
    }

    #[test]
    fn a_message_beyond_the_limit_is_refused_while_it_arrives() {
        let mut reassembler = Reassembler::new(SMALL);
        let large = binary(101_000);
        let refused = (0..large.frames()).find_map(|index| push(&mut reassembler, &large.frame(0, index)).err());
        assert_eq!(refused, Some(ReassemblyError::MessageTooLarge));
        assert_eq!(reassembler.bytes, 0);
    }

    #[test]
    fn a_decompression_bomb_is_refused() {
        let mut reassembler = Reassembler::new(SMALL);
        let bomb = Message::new(ChannelName::SYNC_GRAPH, Content::Json(" ".repeat(10_000_000)));
        assert!(bomb.len() < SMALL.message_bytes);
        let refused = (0..bomb.frames()).find_map(|index| push(&mut reassembler, &bomb.frame(0, index)).err());
        assert_eq!(refused, Some(ReassemblyError::MessageTooLarge));
    }

    #[test]
    fn unfinished_messages_are_bounded_in_count_and_bytes() {
        let mut reassembler = Reassembler::new(SMALL);
        let two = binary(20_000);
        for nonce in 0..3 {
            assert_eq!(push(&mut reassembler, &two.frame(nonce, 0)), Ok(None));
        }
        assert_eq!(push(&mut reassembler, &two.frame(3, 0)), Err(ReassemblyError::TooManyUnfinished));

        let mut reassembler = Reassembler::new(SMALL);
        let large = binary(90_000);
        let refused = (0..4)
            .flat_map(|index| [(0, index), (1, index)])
            .find_map(|(nonce, index)| push(&mut reassembler, &large.frame(nonce, index)).err());
        assert_eq!(refused, Some(ReassemblyError::TooManyUnfinished));
    }

    #[test]
    fn content_that_does_not_decode_is_an_error_of_that_message_alone() {
        let mut reassembler = Reassembler::new(SMALL);
        let mut broken = Message::empty(ChannelName::SYNC_GRAPH).frame(0, 0);
        broken[13] |= flag::DEFLATED;
        assert_eq!(push(&mut reassembler, &broken), Err(ReassemblyError::Content));
        let mut broken = Message::empty(ChannelName::SYNC_GRAPH).frame(0, 0);
        broken.push(0xff);
        assert_eq!(push(&mut reassembler, &broken), Err(ReassemblyError::Content));
        assert!(push(&mut reassembler, &Message::empty(ChannelName::PING).frame(0, 0)).unwrap().is_some());
    }
}
