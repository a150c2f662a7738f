//! What is relayed, and what is not.

use super::super::*;
use super::world::*;
use crate::bucket::Rate;
use crate::message::{Builder, attribute};

#[test]
fn data_goes_both_ways_where_there_is_a_permission_and_as_long() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert!(!world.send(one, "8.8.8.8:53", b"too early"));
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"too early"), None);
    assert_eq!(world.code(one, &ask(Method::CreatePermission).to("8.8.8.8:1").to("8.8.4.4:1")), 0);
    for other in ["8.8.8.8:53", "8.8.4.4:99"] {
        // Permissions are for addresses, whatever the port.
        assert!(world.send(one, other, b"out"), "{other}");
        let bytes = world.hear_peer(one, other, b"hello").unwrap();
        let message = Message::parse(&bytes).unwrap();
        assert_eq!((message.method, message.class), (Method::Data, Class::Indication));
        assert_eq!(message.attributes.data, Some(&b"hello"[..]));
        assert_eq!(message.peers().collect::<Vec<_>>(), [Some(peer(other))]);
    }
    assert!(!world.send(one, "1.1.1.1:53", b"out"));
    world.pass(299);
    assert!(world.send(one, "8.8.8.8:53", b"still"));
    world.pass(1);
    assert!(!world.send(one, "8.8.8.8:53", b"expired"));
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"expired"), None);
}

#[test]
fn refused_peers_leave_no_permission_behind() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.code(one, &ask(Method::CreatePermission).to("8.8.8.8:1").to("10.0.0.1:1")), 403);
    assert!(!world.send(one, "8.8.8.8:53", b"all or nothing"));
    assert!(!world.send(one, "10.0.0.1:53", b"never"));
}

#[test]
fn dont_fragment_is_passed_on() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.code(one, &ask(Method::CreatePermission).to("8.8.8.8:1")), 0);
    let bytes = Builder::new(Class::Indication, Method::Send, world.transaction())
        .address(attribute::XOR_PEER_ADDRESS, peer("8.8.8.8:1"))
        .attribute(attribute::DONT_FRAGMENT, &[])
        .attribute(attribute::DATA, b"whole")
        .finish();
    assert_eq!(world.relayed(one, &bytes), 1);
    assert!(world.edge.to_peers[0].3);
}

#[test]
fn a_channel_carries_data_until_it_expires() {
    let mut world = world();
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.relayed(one, &channel_data(0x4000, b"early")), 0);
    assert_eq!(world.code(one, &bind(0x4000, "8.8.8.8:53")), 0);
    let mut padded = channel_data(0x4000, b"hello");
    padded.extend_from_slice(&[0; 3]);
    for bytes in [channel_data(0x4000, b"hello"), padded] {
        assert_eq!(world.relayed(one, &bytes), 1);
        let (_, to, payload, _) = &world.edge.to_peers[0];
        assert_eq!((*to, &payload[..]), (peer("8.8.8.8:53"), &b"hello"[..]));
    }
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"back"), Some(channel_data(0x4000, b"back")));
    // Another port has no channel, though the permission that came with it.
    assert!(world.hear_peer(one, "8.8.8.8:54", b"back").unwrap()[0] < 0x40);
    for bytes in [&channel_data(0x4001, b"x")[..], &[0x40, 0, 0, 9, 1], &[0x40, 0], &[0x40]] {
        assert_eq!(world.relayed(one, bytes), 0);
    }
    // Number and peer belong together until they have expired.
    assert_eq!(world.code(one, &bind(0x4000, "8.8.4.4:53")), 400);
    assert_eq!(world.code(one, &bind(0x4001, "8.8.8.8:53")), 400);
    world.pass(300);
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"back"), None, "its permission is shorter");
    assert_eq!(world.code(one, &ask(Method::Refresh).with(attribute::LIFETIME, &3_000_u32.to_be_bytes())), 0);
    world.pass(299);
    assert_eq!(world.relayed(one, &channel_data(0x4000, b"last")), 1);
    world.pass(1);
    assert_eq!(world.relayed(one, &channel_data(0x4000, b"late")), 0);
    assert_eq!(world.code(one, &bind(0x4001, "8.8.8.8:53")), 0);
    assert_eq!(world.code(one, &bind(0x4000, "8.8.4.4:53")), 0);
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", b"back"), Some(channel_data(0x4001, b"back")));
}

#[test]
fn streams_get_padding_and_datagrams_do_not() {
    let mut world = world();
    let stream = ClientId { transport: Transport::Tls, ..client(1) };
    world.allocated(stream);
    assert_eq!(world.code(stream, &bind(0x4000, "8.8.8.8:53")), 0);
    let bytes = world.hear_peer(stream, "8.8.8.8:53", b"hello").unwrap();
    assert_eq!(bytes, [&channel_data(0x4000, b"hello")[..], &[0; 3]].concat());
    let now = world.now().instant;
    world.engine.disconnect(&stream, now, &mut world.edge);
    assert_eq!((world.engine.len(), world.edge.open.len()), (0, 0));
}

#[test]
fn bandwidth_is_kept_and_what_is_over_it_dropped() {
    let rate = Rate { per_second: 1_000, burst_seconds: 1 };
    let mut world = with(Rules { allocation_bandwidth: rate, ..rules() });
    let one = client(1);
    world.allocated(one);
    assert_eq!(world.code(one, &bind(0x4000, "8.8.8.8:53")), 0);
    let sent = (0..20).filter(|_| world.relayed(one, &channel_data(0x4000, &[0; 100])) == 1).count();
    assert_eq!(sent, 10);
    assert_eq!(world.hear_peer(one, "8.8.8.8:53", &[0; 100]), None, "both ways together");
    world.pass(1);
    assert!(world.hear_peer(one, "8.8.8.8:53", &[0; 100]).is_some());
    let mut world = with(Rules { bandwidth: TotalBandwidth::new(rate, Instant::now()), ..rules() });
    for number in 1..=2 {
        world.allocated(client(number));
        assert_eq!(world.code(client(number), &bind(0x4000, "8.8.8.8:53")), 0);
    }
    let sent: usize =
        (0..20).map(|number| world.relayed(client(1 + number % 2), &channel_data(0x4000, &[0; 100]))).sum();
    assert_eq!(sent, 10);
}
