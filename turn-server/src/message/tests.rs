//! Against vectors and another implementation.

use proptest::prelude::*;

use super::*;

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// RFC 5769, section 2.1: a request with short-term credentials.
const REQUEST: &str = "000100582112a442b7e7a701bc34d686fa87dfae80220010535455 4e207465737420636c69656e74
    002400046e0001ff80290008932ff9b151263b36 00060009 6576746a3a68367659202020
    00080014 9aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2 80280004 e57a3bcf";
/// RFC 5769, section 2.2: an answer with an IPv4 address.
const ANSWER_V4: &str = "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220
    002000080001a147e112a643 00080014 2b91f599fd9e90c38c7489f92af9ba53f06be7d7 80280004 c07d4c96";
/// RFC 5769, section 2.3: an answer with an IPv6 address.
const ANSWER_V6: &str = "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220
    002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9 00080014 a382954e4be67bf11784c97c8292c275bfe3ed41
    80280004 c8fb0b4c";
/// RFC 5769, section 2.4: a request with long-term credentials.
const LONG_TERM: &str = "000100602112a44278ad3433c6ad72c029da412e00060012e3839ee38388e383aae38383e382af e382b9 0000
    0015001c662f2f3439396b39353464364f4c33346f4c394653547679363473410014000b6578616d706c652e6f726700
    00080014f67024656dd64a3e02b8e0712e85c9a28ca89666";

#[test]
fn the_vectors_of_rfc_5769_are_read() {
    let key = Key::short_term("VOkJxbRl1RmTxUk/WvJxBt");
    let bytes = unhex(REQUEST);
    let request = Message::parse(&bytes).unwrap();
    assert_eq!((request.method, request.class), (Method::Binding, Class::Request));
    assert_eq!(request.attributes.username, Some("evtj:h6vY"));
    assert!(request.attributes.has_fingerprint && request.is_by(&key));
    // PRIORITY is for ICE, and a server of STUN does not know it; ICE-CONTROLLED need not be known.
    assert_eq!(request.attributes.unknown(), [0x0024]);
    for (bytes, address) in
        [(ANSWER_V4, "192.0.2.1:32853"), (ANSWER_V6, "[2001:db8:1234:5678:11:2233:4455:6677]:32853")]
    {
        let bytes = unhex(bytes);
        let answer = Message::parse(&bytes).unwrap();
        assert_eq!(answer.class, Class::Success);
        assert!(answer.is_by(&key) && !answer.is_by(&Key::short_term("another")));
        let step =
            Walk { bytes: &bytes, at: HEADER }.flatten().find(|(kind, ..)| *kind == attribute::XOR_MAPPED_ADDRESS);
        assert_eq!(answer.address(step.unwrap().1), Some(address.parse().unwrap()));
    }
    let bytes = unhex(LONG_TERM);
    let request = Message::parse(&bytes).unwrap();
    assert_eq!(request.attributes.username, Some("\u{30de}\u{30c8}\u{30ea}\u{30c3}\u{30af}\u{30b9}"));
    assert_eq!(request.attributes.nonce, Some(&b"f//499k954d6OL34oL9FSTvy64sA"[..]));
    let key = Key::long_term(Algorithm::Md5, request.attributes.username.unwrap(), "example.org", "TheMatrIX");
    assert!(request.is_by(&key));
}

#[test]
fn every_changed_bit_of_what_is_protected_is_noticed() {
    let key = Key::short_term("VOkJxbRl1RmTxUk/WvJxBt");
    let bytes = unhex(REQUEST);
    for bit in 0..8 * (bytes.len() - 8) {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(!Message::parse(&changed).is_ok_and(|message| message.is_by(&key)), "bit {bit}");
    }
}

#[test]
fn what_stands_behind_the_integrity_does_not_count() {
    let key = Key::short_term("key");
    for sha256 in [false, true] {
        let bytes = Builder::new(Class::Request, Method::Refresh, TransactionId([7; 12]))
            .attribute(attribute::LIFETIME, &[0, 0, 0, 9])
            .integrity(&key, sha256)
            .attribute(attribute::USERNAME, b"forged")
            .address(attribute::XOR_PEER_ADDRESS, "10.0.0.1:1".parse().unwrap())
            .fingerprint()
            .finish();
        let message = Message::parse(&bytes).unwrap();
        assert!(message.is_by(&key) && message.attributes.has_fingerprint);
        assert_eq!(message.attributes.username, None);
        assert_eq!(message.attributes.lifetime, Some(&[0, 0, 0, 9][..]));
        assert_eq!(message.peers().count(), 0);
    }
}

#[test]
fn the_stun_crate_reads_what_is_written_here() {
    use stun::message::Message as Theirs;
    for address in ["203.0.113.9:65535", "[2001:db8::7]:1"] {
        let address: SocketAddr = address.parse().unwrap();
        let key = Key::long_term(Algorithm::Md5, "alice", "homeport", "pass");
        let bytes = Builder::new(Class::Error, Method::ChannelBind, TransactionId([9; 12]))
            .error(attribute::ERROR_CODE, 0, ErrorCode::StaleNonce)
            .attribute(attribute::REALM, b"homeport")
            .address(attribute::XOR_MAPPED_ADDRESS, address)
            .integrity(&key, false)
            .fingerprint()
            .finish();
        let mut theirs = Theirs::default();
        theirs.unmarshal_binary(&bytes).unwrap();
        assert_eq!(theirs.typ.class, stun::message::CLASS_ERROR_RESPONSE);
        assert_eq!(theirs.typ.method, stun::message::METHOD_CHANNEL_BIND);
        let mut mapped = stun::xoraddr::XorMappedAddress::default();
        mapped.get_from_as(&theirs, stun::attributes::ATTR_XORMAPPED_ADDRESS).unwrap();
        assert_eq!((mapped.ip, mapped.port), (address.ip(), address.port()));
        let mut code = stun::error_code::ErrorCodeAttribute::default();
        stun::message::Getter::get_from(&mut code, &theirs).unwrap();
        assert!(code.code == stun::error_code::CODE_STALE_NONCE);
        let integrity = stun::integrity::MessageIntegrity::new_long_term_integrity(
            "alice".into(),
            "homeport".into(),
            "pass".into(),
        );
        integrity.check(&mut theirs).unwrap();
        stun::fingerprint::FINGERPRINT.check(&theirs).unwrap();
        let ours = Message::parse(&bytes).unwrap();
        assert!(ours.is_by(&key));
    }
}

#[test]
fn a_data_indication_is_one_that_others_read() {
    for (peer, payload) in [("192.0.2.7:9", &b"hello"[..]), ("[2001:db8::9]:77", b"")] {
        let peer: SocketAddr = peer.parse().unwrap();
        let (head, length) = data_head([3; 12], peer, payload.len());
        let mut bytes = head[..length].to_vec();
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let message = Message::parse(&bytes).unwrap();
        assert_eq!((message.method, message.class), (Method::Data, Class::Indication));
        assert_eq!(message.attributes.data, Some(payload));
        assert_eq!(message.peers().collect::<Vec<_>>(), [Some(peer)]);
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), key in any::<[u8; 4]>()) {
        let _ = Message::parse(&bytes);
        // Bytes that get past the header.
        let mut stun = Builder::new(Class::Request, Method::Allocate, TransactionId([1; 12])).finish();
        stun.extend_from_slice(&bytes);
        stun.truncate(stun.len() / 4 * 4);
        let length = u16::try_from(stun.len() - HEADER).unwrap();
        stun[2..4].copy_from_slice(&length.to_be_bytes());
        if let Ok(message) = Message::parse(&stun) {
            let _ = message.is_by(&Key(key.to_vec()));
            let _ = message.peers().count();
        }
    }
}
