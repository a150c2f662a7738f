//! How long allocations live, whose they are, and how many there may be.

use std::collections::HashSet;
use std::net::IpAddr;

use super::super::*;
use super::world::*;
use crate::message::attribute;
use crate::quotas::{Ledger, Quotas};

#[test]
fn an_allocation_lives_as_long_as_it_is_refreshed() {
    let mut world = world();
    let relayed = world.allocated(client(1));
    assert_eq!(relayed.ip(), "9.9.9.9".parse::<IpAddr>().unwrap());
    assert!((50_000..=50_099).contains(&relayed.port()));
    world.pass(599);
    let refreshed = world.answer(client(1), &ask(Method::Refresh).with(attribute::LIFETIME, &3_000_u32.to_be_bytes()));
    assert_eq!(refreshed.lifetime(), 3_000);
    world.pass(2_999);
    assert_eq!((world.engine.len(), world.edge.open.len()), (1, 1));
    world.pass(1);
    assert_eq!((world.engine.len(), world.edge.open.len()), (0, 0));
    assert!(world.engine.deadline().is_none());
    for (asked, granted) in [(0, 600), (1, 600), (700, 700), (9_999_999, 3_600)] {
        let mut world = super::world::world();
        let answer = world.answer(client(1), &allocate().with(attribute::LIFETIME, &u32::to_be_bytes(asked)));
        assert_eq!(answer.lifetime(), granted, "{asked}");
    }
}

#[test]
fn another_user_gets_no_answer_of_this_one() {
    let mut world = world();
    let transaction = Some(world.transaction());
    for _ in 0..2 {
        assert_eq!(world.code(client(1), &Ask { transaction, ..allocate() }), 0);
    }
    assert_eq!(world.code(client(1), &Ask { transaction, ..allocate().by("bob", "word") }), 437);
}

#[test]
fn clients_are_told_apart_by_all_of_their_five_tuple() {
    let mut world = world();
    let one = client(1);
    let others = [
        client(2),
        ClientId { address: peer("192.0.2.2:1"), ..one },
        ClientId { server: peer("9.9.9.9:443"), ..one },
        ClientId { transport: Transport::Tcp, ..one },
    ];
    let mut seen = HashSet::from([world.allocated(one)]);
    for other in others {
        assert!(seen.insert(world.allocated(other)));
    }
    assert_eq!(world.engine.len(), 5);
    assert_eq!(world.code(one, &ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4])), 0);
    assert_eq!(world.engine.len(), 4);
}

#[test]
fn a_pair_of_ports_goes_to_who_has_the_token() {
    let mut world = world();
    let answer = world.answer(client(1), &allocate().with(attribute::EVEN_PORT, &[0x80]));
    let even = answer.address(attribute::XOR_RELAYED_ADDRESS).port();
    let token = answer.attribute(attribute::RESERVATION_TOKEN).unwrap();
    assert_eq!(even % 2, 0);
    let answer = world.answer(client(2), &allocate().with(attribute::RESERVATION_TOKEN, &token));
    assert_eq!(answer.address(attribute::XOR_RELAYED_ADDRESS).port(), even + 1);
    assert_eq!(world.code(client(3), &allocate().with(attribute::RESERVATION_TOKEN, &token)), 508, "only once");
    let answer = world.answer(client(3), &allocate().with(attribute::EVEN_PORT, &[0x80]));
    let token = answer.attribute(attribute::RESERVATION_TOKEN).unwrap();
    world.pass(31);
    assert_eq!(world.code(client(4), &allocate().with(attribute::RESERVATION_TOKEN, &token)), 508, "too late");
    let answer = world.answer(client(5), &allocate().with(attribute::EVEN_PORT, &[0]));
    assert!(answer.attribute(attribute::RESERVATION_TOKEN).is_none());
    assert_eq!(answer.address(attribute::XOR_RELAYED_ADDRESS).port() % 2, 0);
}

#[test]
fn families_are_had_one_by_one_or_both() {
    let mut world = world();
    let v6 = allocate().with(attribute::REQUESTED_ADDRESS_FAMILY, &[2, 0, 0, 0]);
    assert!(world.answer(client(1), &v6).address(attribute::XOR_RELAYED_ADDRESS).is_ipv6());
    assert_eq!(world.code(client(1), &ask(Method::CreatePermission).to("8.8.8.8:1")), 443);
    let both = allocate().with(attribute::ADDITIONAL_ADDRESS_FAMILY, &[2, 0, 0, 0]);
    assert_eq!(world.code(client(2), &both), 0);
    assert_eq!(world.edge.open.len(), 3);
    assert_eq!(world.code(client(2), &ask(Method::CreatePermission).to("8.8.8.8:1").to("[2606:4700::1]:1")), 0);
    assert!(world.send(client(2), "[2606:4700::1]:9", b"six") && world.send(client(2), "8.8.8.8:9", b"four"));
    // One family goes, the other stays.
    let end = |family| {
        ask(Method::Refresh)
            .with(attribute::LIFETIME, &[0; 4])
            .with(attribute::REQUESTED_ADDRESS_FAMILY, &[family, 0, 0, 0])
    };
    assert_eq!(world.code(client(2), &end(1)), 0);
    assert_eq!((world.engine.len(), world.edge.open.len()), (2, 2));
    assert!(!world.send(client(2), "8.8.8.8:9", b"four") && world.send(client(2), "[2606:4700::1]:9", b"six"));
    assert_eq!(world.code(client(2), &end(2)), 0);
    assert_eq!((world.engine.len(), world.edge.open.len()), (1, 1));

    world.engine.set_place(Place { v6: None, ..world.engine.place.clone() });
    assert_eq!(world.code(client(3), &v6), 440);
    let answer = world.answer(client(4), &both);
    assert_eq!(answer.code(), 0);
    assert_eq!(answer.attribute(attribute::ADDRESS_ERROR_CODE).unwrap()[..4], [2, 0, 4, 40]);
}

#[test]
fn every_port_of_the_range_is_found_and_no_other() {
    let mut world = with(Rules { relay_ports: 50_000..=50_007, ..rules() });
    world.edge.taken = HashSet::from([50_003]);
    let mut ports = HashSet::new();
    for number in 0..7 {
        assert!(ports.insert(world.allocated(client(number)).port()));
    }
    assert_eq!(world.code(client(100), &allocate()), 508);
    assert!(ports.iter().all(|port| (50_000..=50_007).contains(port) && *port != 50_003));
    assert_eq!(world.code(client(3), &ask(Method::Refresh).with(attribute::LIFETIME, &[0; 4])), 0);
    world.allocated(client(101));
}

#[test]
fn quotas_end_with_486_and_draining_with_508() {
    let quotas = Quotas { user: 2, address: 3, total: 0 };
    let mut world = with(Rules { ledger: Ledger::new(quotas), ..rules() });
    world.allocated(client(1));
    world.allocated(client(2));
    assert_eq!(world.code(client(3), &allocate()), 486);
    assert_eq!(world.code(client(3), &allocate().by("bob", "word")), 0);
    assert_eq!(world.code(client(4), &allocate().by("bob", "word")), 486, "its address has three");
    world.pass(600);
    world.allocated(client(4));
    world.engine.drain();
    assert_eq!(world.code(client(5), &allocate()), 508);
    assert_eq!(world.code(client(4), &ask(Method::Refresh)), 0, "what is there goes on");
}

#[test]
fn time_limited_credentials_end_their_allocations() {
    let mut world = world();
    let minted =
        crate::mint("north", "app", std::time::UNIX_EPOCH + Duration::from_secs(UNIX), Duration::from_secs(1_000));
    let ours = |ask: Ask| ask.by(&minted.username, &minted.password);
    assert_eq!(world.answer(client(1), &ours(allocate())).code(), 0);
    world.pass(500);
    assert_eq!(world.answer(client(1), &ours(ask(Method::Refresh))).lifetime(), 560, "with 60 seconds of grace");
    world.pass(501);
    assert_eq!(world.code(client(2), &ours(allocate())), 401, "it has expired");
    assert_eq!(world.answer(client(1), &ours(ask(Method::Refresh))).lifetime(), 59);
    world.pass(58);
    assert_eq!(world.engine.len(), 1);
    world.pass(1);
    assert_eq!(world.engine.len(), 0);
}
