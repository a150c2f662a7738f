//! Which answer each request gets, and which gets none.

use super::super::*;
use super::world::*;
use crate::bucket::Rate;
use crate::message::{Algorithm, Builder, Key, attribute};

#[test]
fn a_binding_request_is_answered_with_the_address_it_came_from() {
    let mut world = world();
    for address in ["192.0.2.1:1000", "[2001:db8::1]:1000"] {
        let client = ClientId { address: peer(address), ..client(1) };
        let answer = world.raw(client, &unauthenticated(Method::Binding)).unwrap();
        assert_eq!(answer.address(attribute::XOR_MAPPED_ADDRESS), peer(address));
        assert!(!answer.message().attributes.has_fingerprint, "not asked for");
    }
}

#[test]
fn each_error_code_is_given_where_the_rfcs_say_so() {
    let family = |number| [number, 0, 0, 0];
    let mut nonce_of_another = rules().nonces.make(peer("192.0.2.1:9"), UNIX);
    let old = rules().nonces.make(client(1).address, UNIX - 3_601);
    let stale = |nonce: &[u8]| Ask { nonce: Some(nonce.to_vec()), ..allocate() };
    let no_algorithms = Ask { sha256: false, ..allocate() }.with(attribute::PASSWORD_ALGORITHM, &[0, 2, 0, 0]);
    let bid_down = allocate()
        .with(attribute::PASSWORD_ALGORITHM, &[0, 1, 0, 0])
        .with(attribute::PASSWORD_ALGORITHMS, &[0, 1, 0, 0]);
    let transport = attribute::REQUESTED_TRANSPORT;
    let before: [(u16, &str, Ask); 24] = [
        (0, "an allocation", allocate()),
        (0, "one by SHA-256", Ask { sha256: true, ..allocate() }),
        (400, "no transport", ask(Method::Allocate)),
        (442, "TCP to peers", ask(Method::Allocate).with(transport, &[6, 0, 0, 0])),
        (400, "a short transport", ask(Method::Allocate).with(transport, &[17])),
        (401, "a wrong password", allocate().by("alice", "word")),
        (401, "an unknown user", allocate().by("carol", "pass")),
        (401, "a wrong realm", Ask { realm: "elsewhere".into(), ..allocate() }),
        (438, "a nonce of another client", stale(&nonce_of_another)),
        (438, "an old nonce", stale(&old)),
        (438, "no nonce of ours", stale(b"nonce")),
        (400, "an algorithm without the list", no_algorithms),
        (400, "a list that was cut on the way", bid_down),
        (420, "an unknown attribute", allocate().with(0x7f01, b"?")),
        (440, "an unknown family", allocate().with(attribute::REQUESTED_ADDRESS_FAMILY, &family(3))),
        (400, "a short family", allocate().with(attribute::REQUESTED_ADDRESS_FAMILY, &[1])),
        (400, "IPv4 as well", allocate().with(attribute::ADDITIONAL_ADDRESS_FAMILY, &family(1))),
        (
            400,
            "two families twice",
            allocate()
                .with(attribute::REQUESTED_ADDRESS_FAMILY, &family(1))
                .with(attribute::ADDITIONAL_ADDRESS_FAMILY, &family(2)),
        ),
        (
            400,
            "a pair of ports in two families",
            allocate().with(attribute::EVEN_PORT, &[0x80]).with(attribute::ADDITIONAL_ADDRESS_FAMILY, &family(2)),
        ),
        (
            400,
            "a token and an even port",
            allocate().with(attribute::RESERVATION_TOKEN, &[0; 8]).with(attribute::EVEN_PORT, &[0]),
        ),
        (400, "a short token", allocate().with(attribute::RESERVATION_TOKEN, &[0; 7])),
        (508, "an unknown token", allocate().with(attribute::RESERVATION_TOKEN, &[0; 8])),
        (437, "a refresh of nothing", ask(Method::Refresh)),
        (437, "a permission for nothing", ask(Method::CreatePermission).to("8.8.8.8:1")),
    ];
    for (code, what, ask) in before {
        assert_eq!(world().code(client(1), &ask), code, "{what}");
    }
    nonce_of_another.clear();

    let channel = |value: &[u8]| ask(Method::ChannelBind).with(attribute::CHANNEL_NUMBER, value);
    let permission = || ask(Method::CreatePermission);
    let after: [(u16, &str, Ask); 25] = [
        (437, "a second allocation", allocate()),
        (0, "a refresh", ask(Method::Refresh)),
        (400, "a short lifetime", ask(Method::Refresh).with(attribute::LIFETIME, &[0, 0])),
        (443, "another family", ask(Method::Refresh).with(attribute::REQUESTED_ADDRESS_FAMILY, &family(2))),
        (441, "somebody else's refresh", ask(Method::Refresh).by("bob", "word")),
        (441, "somebody else's permission", permission().to("8.8.8.8:1").by("bob", "word")),
        (441, "somebody else's channel", bind(0x4000, "8.8.8.8:1").by("bob", "word")),
        (0, "permissions", permission().to("8.8.8.8:1").to("8.8.4.4:2")),
        (400, "a permission for nobody", permission()),
        (400, "a peer that is none", permission().with(attribute::XOR_PEER_ADDRESS, &[0, 1])),
        (443, "a peer of another family", permission().to("[2606:4700::1]:1")),
        (403, "a private peer", permission().to("10.0.0.1:1")),
        (403, "metadata of a cloud", permission().to("169.254.169.254:80")),
        (403, "loopback in IPv6 spelling", permission().to("[::ffff:127.0.0.1]:1")),
        (403, "one good and one private peer", permission().to("8.8.8.8:1").to("10.0.0.1:1")),
        (403, "a channel to a private peer", bind(0x4000, "192.168.0.1:1")),
        (0, "a channel", bind(0x4000, "8.8.8.8:1")),
        (400, "no number", ask(Method::ChannelBind).to("8.8.8.8:1")),
        (400, "no peer", channel(&[0x40, 0, 0, 0])),
        (400, "a number below", bind(0x3fff, "8.8.8.8:1")),
        (400, "a number above", bind(0x8000, "8.8.8.8:1")),
        (443, "a channel of another family", bind(0x4000, "[2606:4700::1]:1")),
        (420, "an unknown attribute", permission().to("8.8.8.8:1").with(0x7f01, b"?")),
        (401, "no such user", ask(Method::Refresh).by("carol", "pass")),
        (438, "an old nonce", Ask { nonce: Some(old), ..ask(Method::Refresh) }),
    ];
    for (code, what, ask) in after {
        let mut world = world();
        world.allocated(client(1));
        let answer = world.answer(client(1), &ask);
        assert_eq!(answer.code(), code, "{what}");
        if code == 420 {
            assert_eq!(answer.attribute(attribute::UNKNOWN_ATTRIBUTES), Some(vec![0x7f, 0x01]));
        }
    }
}

#[test]
fn a_stranger_learns_realm_and_nonce_and_little_more() {
    let mut world = world();
    for method in [Method::Allocate, Method::Refresh, Method::CreatePermission, Method::ChannelBind] {
        let request = unauthenticated(method);
        let answer = world.raw(client(1), &request).unwrap();
        assert_eq!(answer.code(), 401);
        assert_eq!(answer.attribute(attribute::REALM).unwrap(), REALM.as_bytes());
        let nonce = answer.attribute(attribute::NONCE).unwrap();
        assert!(world.engine.rules.nonces.is_fresh(&nonce, client(1).address, UNIX));
        assert!(answer.attribute(attribute::PASSWORD_ALGORITHMS).is_some());
        // What an attacker gets for a forged source address: 112 bytes for the smallest request, and with IP and UDP
        // headers less than three times what it sent. coturn 4.6 answers with as many.
        assert!(answer.0.len() <= 6 * request.len(), "{} for {}", answer.0.len(), request.len());
        assert!(answer.0.len() + 28 < 3 * (request.len() + 28), "{} for {}", answer.0.len(), request.len());
    }
    // Integrity without all that belongs to it.
    let incomplete = Builder::new(Class::Request, Method::Allocate, world.transaction())
        .attribute(attribute::USERNAME, b"alice")
        .integrity(&Key::short_term("x"), false)
        .finish();
    assert_eq!(world.raw(client(1), &incomplete).unwrap().code(), 400);
}

#[test]
fn answers_are_protected_as_the_request_was() {
    for (sha256, algorithm) in [(false, Algorithm::Md5), (true, Algorithm::Sha256)] {
        let mut world = world();
        let answer = world.answer(client(1), &Ask { sha256, fingerprint: true, ..allocate() });
        let message = answer.message();
        assert!(message.is_by(&Key::long_term(algorithm, "alice", REALM, "pass")));
        assert_eq!(message.attributes.has_integrity_sha256(), sha256);
        assert!(message.attributes.has_fingerprint);
    }
}

#[test]
fn a_request_that_comes_again_gets_the_same_answer() {
    let mut world = world();
    let bytes = world.bytes_of(client(1), &allocate().with(attribute::EVEN_PORT, &[0x80]));
    let first = world.raw(client(1), &bytes).unwrap();
    assert_eq!(world.raw(client(1), &bytes).unwrap(), first);
    assert_eq!(world.engine.len(), 1);
    for again in [
        bind(0x4001, "8.8.8.8:1"),
        ask(Method::CreatePermission).to("8.8.8.8:1"),
        ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4]),
    ] {
        let bytes = world.bytes_of(client(1), &again);
        let first = world.raw(client(1), &bytes).unwrap();
        assert_eq!(first.code(), 0);
        assert_eq!(world.raw(client(1), &bytes).unwrap(), first);
    }
    assert_eq!(world.engine.len(), 0);
    // Another request to end what is no more is another thing, and so is the same one long after.
    let end = ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4]);
    assert_eq!(world.code(client(1), &end), 437);
}

#[test]
fn strangers_are_answered_only_so_often() {
    let mut world = with(Rules { unauthenticated: Rate { per_second: 10, burst_seconds: 1 }, ..rules() });
    for method in [Method::Allocate, Method::Binding] {
        let answered = (0..100).filter(|_| world.raw(client(1), &unauthenticated(method)).is_some()).count();
        assert_eq!(answered, 10);
        world.pass(1);
    }
    // Guessing passwords is as slow.
    let answered = (0..100)
        .filter(|_| {
            let bytes = world.bytes_of(client(1), &allocate().by("alice", "guess"));
            world.raw(client(1), &bytes).is_some()
        })
        .count();
    assert_eq!(answered, 10);
    world.allocated(client(1));
}

#[test]
fn what_is_no_request_gets_no_answer() {
    let mut world = world();
    let transaction = world.transaction();
    for bytes in [
        Builder::new(Class::Indication, Method::Binding, transaction).finish(),
        Builder::new(Class::Success, Method::Binding, transaction).finish(),
        Builder::new(Class::Error, Method::Allocate, transaction).finish(),
        Builder::new(Class::Request, Method::Send, transaction).finish(),
        Builder::new(Class::Indication, Method::Allocate, transaction).finish(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 20],
        Vec::new(),
    ] {
        assert_eq!(world.raw(client(1), &bytes), None);
    }
}
