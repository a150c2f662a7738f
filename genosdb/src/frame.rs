//! Frames of the data channel: how a message is cut into chunks (wire §3).

use std::fmt;
use std::io::{Read as _, Write as _};
use std::sync::Arc;

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

/// The largest frame, header included, in bytes.
pub const MAX_FRAME_BYTES: usize = 16 * 1024;

/// The header: channel name, nonce, flags, progress.
pub const HEADER_BYTES: usize = NAME_BYTES + 3;

/// Payloads longer than this are deflated, as clients do from about here.
pub const DEFLATE_FROM_BYTES: usize = 500;

/// So much text is deflated at a time.
const DEFLATE_PIECE_BYTES: usize = 64 * 1024;

const NAME_BYTES: usize = 12;
const MAX_CHUNK_BYTES: usize = MAX_FRAME_BYTES - HEADER_BYTES;

/// What the bits of the flags byte say.
pub(crate) mod flag {
    pub(crate) const LAST: u8 = 1;
    pub(crate) const META: u8 = 2;
    pub(crate) const BINARY: u8 = 4;
    pub(crate) const JSON: u8 = 8;
    pub(crate) const DEFLATED: u8 = 16;
    pub(crate) const ALL: u8 = 31;
}

/// The name of a message channel: up to 12 bytes of UTF-8, multiplexed over one data channel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelName([u8; NAME_BYTES]);

impl ChannelName {
    /// The channel on which a graph is synchronised.
    pub const SYNC_GRAPH: Self = Self::fixed(b"syncGraph");
    /// "Are you there?", with an empty payload.
    pub const PING: Self = Self::fixed(b"@_ping");
    /// "I am", with an empty payload.
    pub const PONG: Self = Self::fixed(b"@_pong");
    /// "I am leaving", with an empty payload.
    pub const LEAVE: Self = Self::fixed(b"@_leave");

    const fn fixed(name: &[u8]) -> Self {
        let mut bytes = [0; NAME_BYTES];
        let mut index = 0;
        while index < name.len() {
            bytes[index] = name[index];
            index += 1;
        }
        Self(bytes)
    }

    /// The channel called `name`; `None` when it is empty, longer than 12 bytes or holds a NUL.
    pub fn new(name: &str) -> Option<Self> {
        let bytes = name.as_bytes();
        (!bytes.is_empty() && bytes.len() <= NAME_BYTES && !bytes.contains(&0)).then(|| Self::fixed(bytes))
    }

    /// Whether the channel is the transport's own (`@_…`) and carries nothing of the application.
    pub fn is_internal(&self) -> bool {
        self.0.starts_with(b"@_")
    }

    /// The name's text.
    pub fn as_str(&self) -> &str {
        let length = self.0.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        std::str::from_utf8(&self.0[..length]).unwrap_or_default()
    }
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// Bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than the header or longer than [`MAX_FRAME_BYTES`].
    #[error("frame of {0} bytes")]
    Length(usize),
    /// The channel name is not NUL-padded UTF-8.
    #[error("channel name is not UTF-8")]
    Name,
    /// Flags that no client sets, or sets together.
    #[error("unknown flags {0:#04x}")]
    Flags(u8),
}

/// One frame, as it arrived: a chunk of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The message's channel.
    pub channel: ChannelName,
    /// Tells the messages of one channel apart; wraps after 255.
    pub nonce: u8,
    pub(crate) flags: u8,
    /// This chunk's bytes.
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Parses one data-channel message.
    ///
    /// # Errors
    /// [`FrameError`] when it is not a frame.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        if bytes.len() > MAX_FRAME_BYTES {
            return Err(FrameError::Length(bytes.len()));
        }
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Length(bytes.len()));
        };
        let [name @ .., nonce, flags, _progress] = header;
        let length = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        if length == 0 || name[length..].iter().any(|byte| *byte != 0) || std::str::from_utf8(&name[..length]).is_err()
        {
            return Err(FrameError::Name);
        }
        let (flags, nonce) = (*flags, *nonce);
        // Meta only travels with binary payloads, as a chunk before them.
        let lone_meta = flags & flag::META != 0 && (flags & flag::BINARY == 0 || flags & flag::LAST != 0);
        if flags & !flag::ALL != 0 || lone_meta {
            return Err(FrameError::Flags(flags));
        }
        Ok(Self { channel: ChannelName(*name), nonce, flags, payload })
    }

    /// Whether the message is complete with this chunk.
    pub fn is_last(&self) -> bool {
        self.flags & flag::LAST != 0
    }
}

/// What a message carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A JSON text, not yet parsed.
    Json(String),
    /// A string.
    Text(String),
    /// Bytes, and the JSON text that describes them, if any.
    Binary {
        /// The description, a JSON text.
        meta: Option<String>,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// A message made ready to be sent: deflated once, and cut into frames for as many links as it takes.
#[derive(Debug, Clone)]
pub struct Message {
    channel: ChannelName,
    flags: u8,
    meta: Option<Arc<[u8]>>,
    body: Arc<[u8]>,
}

impl Message {
    /// A message of `content` on `channel`.
    pub fn new(channel: ChannelName, content: Content) -> Self {
        let (kind, meta, body) = match content {
            Content::Json(text) => (flag::JSON, None, text.into_bytes()),
            Content::Text(text) => (0, None, text.into_bytes()),
            // Clients set the JSON bit with the binary one: to JavaScript an array buffer is an object.
            Content::Binary { meta, bytes } => (flag::BINARY | flag::JSON, meta.map(String::into_bytes), bytes),
        };
        let (deflated, body) = if kind & flag::BINARY == 0 && body.len() > DEFLATE_FROM_BYTES {
            (flag::DEFLATED, deflate(&body))
        } else {
            (0, body)
        };
        Self { channel, flags: kind | deflated, meta: meta.map(Arc::from), body: body.into() }
    }

    /// A message without payload, as the transport's own channels use them.
    pub fn empty(channel: ChannelName) -> Self {
        Self::new(channel, Content::Text(String::new()))
    }

    /// The same message on another channel, deflated once for both.
    #[must_use]
    pub fn on(&self, channel: ChannelName) -> Self {
        Self { channel, ..self.clone() }
    }

    /// The message's channel.
    pub fn channel(&self) -> ChannelName {
        self.channel
    }

    /// The JSON text of the message; `None` when it is of another kind.
    pub fn json(&self) -> Option<String> {
        if self.flags & flag::JSON == 0 || self.flags & flag::BINARY != 0 {
            return None;
        }
        let mut text = String::new();
        if self.flags & flag::DEFLATED == 0 {
            text.push_str(std::str::from_utf8(&self.body).ok()?);
        } else {
            ZlibDecoder::new(&self.body[..]).read_to_string(&mut text).ok()?;
        }
        Some(text)
    }

    /// Payload bytes, as they travel.
    pub fn len(&self) -> usize {
        self.body.len() + self.meta.as_ref().map_or(0, |meta| meta.len())
    }

    /// Whether there is no payload.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many frames the message takes.
    pub fn frames(&self) -> usize {
        self.body.len().div_ceil(MAX_CHUNK_BYTES).max(1) + usize::from(self.meta.is_some())
    }

    /// The frame number `index`, from 0 up to [`Message::frames`].
    pub fn frame(&self, nonce: u8, index: usize) -> Vec<u8> {
        let frames = self.frames();
        let (extra, chunk): (u8, &[u8]) = match &self.meta {
            Some(meta) if index == 0 => (flag::META, meta),
            meta => {
                let start = (index - usize::from(meta.is_some())) * MAX_CHUNK_BYTES;
                (0, &self.body[start.min(self.body.len())..(start + MAX_CHUNK_BYTES).min(self.body.len())])
            }
        };
        let last = if index + 1 >= frames { flag::LAST } else { 0 };
        let mut frame = Vec::with_capacity(HEADER_BYTES + chunk.len());
        frame.extend_from_slice(&self.channel.0);
        frame.extend_from_slice(&[nonce, self.flags | extra | last, progress(index, frames)]);
        frame.extend_from_slice(chunk);
        frame
    }
}

/// A JSON message that is written piece by piece, and deflated as it grows: a graph need not stand in memory as text to
/// be sent.
pub struct JsonWriter {
    channel: ChannelName,
    /// What is not deflated yet.
    text: String,
    deflated: Option<ZlibEncoder<Vec<u8>>>,
    written: usize,
}

impl JsonWriter {
    /// An empty message on `channel`.
    pub fn new(channel: ChannelName) -> Self {
        Self { channel, text: String::new(), deflated: None, written: 0 }
    }

    /// Bytes written so far, before deflating.
    pub fn written(&self) -> usize {
        self.written
    }

    /// Appends text.
    pub fn push_str(&mut self, text: &str) {
        self.written += text.len();
        self.text.push_str(text);
        if self.text.len() >= DEFLATE_PIECE_BYTES {
            let encoder = self.deflated.get_or_insert_with(|| ZlibEncoder::new(Vec::new(), Compression::default()));
            // Writing to memory does not fail.
            let _ = encoder.write_all(self.text.as_bytes());
            self.text.clear();
        }
    }

    /// The message.
    pub fn finish(self) -> Message {
        let Some(mut encoder) = self.deflated else { return Message::new(self.channel, Content::Json(self.text)) };
        let _ = encoder.write_all(self.text.as_bytes());
        let mut body = encoder.finish().unwrap_or_default();
        body.shrink_to_fit();
        Message { channel: self.channel, flags: flag::JSON | flag::DEFLATED, meta: None, body: body.into() }
    }
}

impl fmt::Write for JsonWriter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push_str(text);
        Ok(())
    }
}

/// How far a message is with its chunk `index` of `frames`, from 0 to 255.
fn progress(index: usize, frames: usize) -> u8 {
    let rounded = (2 * 255 * (index + 1) + frames) / (2 * frames);
    u8::try_from(rounded).unwrap_or(u8::MAX)
}

fn deflate(body: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::with_capacity(body.len() / 4), Compression::default());
    // Writing to memory does not fail.
    let _ = encoder.write_all(body);
    encoder.finish().unwrap_or_default()
}

/// Gives the messages of each channel of one link their nonces.
#[derive(Debug, Default)]
pub struct Nonces(std::collections::HashMap<ChannelName, u8>);

impl Nonces {
    /// The nonce of the next message on `channel`.
    pub fn next(&mut self, channel: ChannelName) -> u8 {
        let nonce = self.0.entry(channel).or_default();
        let next = *nonce;
        *nonce = nonce.wrapping_add(1);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_not_a_frame_are_refused() {
        let good = Message::empty(ChannelName::PING).frame(0, 0);
        assert!(Frame::parse(&good).is_ok());
        assert_eq!(Frame::parse(&good[..14]), Err(FrameError::Length(14)));
        assert_eq!(Frame::parse(&[b'a'; MAX_FRAME_BYTES + 1]), Err(FrameError::Length(MAX_FRAME_BYTES + 1)));
        let with = |index: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[index] = byte;
            bytes
        };
        assert_eq!(Frame::parse(&with(0, 0)), Err(FrameError::Name));
        assert_eq!(Frame::parse(&with(1, 0xff)), Err(FrameError::Name));
        assert_eq!(Frame::parse(&with(13, 0x20)), Err(FrameError::Flags(0x20)));
        assert_eq!(Frame::parse(&with(13, flag::META)), Err(FrameError::Flags(flag::META)));
    }

    #[test]
    fn every_frame_of_a_message_fits() {
        for length in [0, 1, MAX_CHUNK_BYTES - 1, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, 5 * MAX_CHUNK_BYTES] {
            let message = Message::new(
                ChannelName::SYNC_GRAPH,
                Content::Binary { meta: Some("{}".into()), bytes: vec![7; length] },
            );
            let frames: Vec<_> = (0..message.frames()).map(|index| message.frame(3, index)).collect();
            assert!(frames.iter().all(|frame| frame.len() <= MAX_FRAME_BYTES && Frame::parse(frame).is_ok()));
            assert_eq!(frames.iter().filter(|frame| Frame::parse(frame).unwrap().is_last()).count(), 1);
            assert_eq!(frames.last().map(|frame| frame[14]), Some(255));
            let carried: usize = frames.iter().map(|frame| frame.len() - HEADER_BYTES).sum();
            assert_eq!(carried, length + 2);
        }
    }

    #[test]
    fn a_message_written_in_pieces_is_the_same_as_one_at_once() {
        for pieces in [0, 1, 50, 20_000] {
            let mut writer = JsonWriter::new(ChannelName::SYNC_GRAPH);
            let mut text = String::from("[");
            writer.push_str("[");
            for piece in 0..pieces {
                let piece = format!("{piece},");
                writer.push_str(&piece);
                text.push_str(&piece);
            }
            writer.push_str("0]");
            text.push_str("0]");
            assert_eq!(writer.written(), text.len());
            assert_eq!(writer.finish().json(), Some(text));
        }
    }

    #[test]
    fn nonces_count_per_channel_and_wrap() {
        let mut nonces = Nonces::default();
        assert_eq!(nonces.next(ChannelName::PING), 0);
        for expected in (0..=255).chain(0..3) {
            assert_eq!(nonces.next(ChannelName::SYNC_GRAPH), expected);
        }
        assert_eq!(nonces.next(ChannelName::PING), 1);
    }
}
