//! Messages in a stream (RFC 8656, section 3.1; RFC 8489, section 6.2.2): each says itself how long it is.

use crate::message::HEADER;

/// The longest message: a Send indication around the largest datagram.
pub(crate) const MAX_FRAME: usize = HEADER + 65_532;

/// Bytes that are neither STUN nor a channel's data: the stream cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotTurn;

/// How many bytes the first message of a stream takes, padding included; `None` while it is not all there.
pub(crate) fn first_frame(bytes: &[u8]) -> Result<Option<usize>, NotTurn> {
    let &[first, _, high, low, ref rest @ ..] = bytes else {
        return match bytes.first() {
            None | Some(0..=0x7f) => Ok(None),
            Some(_) => Err(NotTurn),
        };
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let frame = match first {
        0..=0x3f => {
            let cookie = [0x21, 0x12, 0xa4, 0x42];
            let seen = rest.len().min(4);
            if length % 4 != 0 || rest[..seen] != cookie[..seen] {
                return Err(NotTurn);
            }
            HEADER + length
        }
        0x40..=0x7f => 4 + length.next_multiple_of(4),
        _ => return Err(NotTurn),
    };
    Ok((bytes.len() >= frame).then_some(frame))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stun(length: u16) -> Vec<u8> {
        let mut bytes = vec![0, 1];
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&[0x21, 0x12, 0xa4, 0x42]);
        bytes.resize(20 + usize::from(length), 7);
        bytes
    }

    fn channel(length: u16) -> Vec<u8> {
        let mut bytes = vec![0x40, 0];
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.resize(4 + usize::from(length).next_multiple_of(4), 7);
        bytes
    }

    #[test]
    fn what_is_not_turn_is_seen_as_early_as_can_be() {
        for bytes in [&[0xff, 0xfe][..], &[0x16, 3, 1, 2, 0], &[0x80], &[0, 1, 0, 3], &[0, 1, 0, 0, 0x21, 0x13]] {
            assert_eq!(first_frame(bytes), Err(NotTurn), "{bytes:?}");
        }
        assert_eq!(first_frame(&stun(65_532)).unwrap(), Some(MAX_FRAME));
    }

    proptest! {
        #[test]
        fn messages_are_found_however_the_stream_is_cut(
            kinds in prop::collection::vec((any::<bool>(), 0..50_u16), 0..6),
            cuts in prop::collection::vec(1..40_usize, 1..60),
        ) {
            let messages: Vec<Vec<u8>> = kinds
                .into_iter()
                .map(|(is_stun, length)| if is_stun { stun(length * 4) } else { channel(length) })
                .collect();
            let stream = messages.concat();
            let (mut buffer, mut found) = (Vec::new(), Vec::new());
            let (mut at, mut cuts) = (0, cuts.into_iter().cycle());
            while at < stream.len() {
                let next = (at + cuts.next().unwrap()).min(stream.len());
                buffer.extend_from_slice(&stream[at..next]);
                at = next;
                while let Some(length) = first_frame(&buffer).unwrap() {
                    found.push(buffer.drain(..length).collect::<Vec<u8>>());
                }
            }
            prop_assert_eq!(found, messages);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(Some(length)) = first_frame(&bytes) {
                prop_assert!((4..=bytes.len()).contains(&length));
            }
        }
    }
}
