//! Anything at all, in any order, beside a model that says what must come of it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::*;
use super::world::*;
use crate::message::attribute;

#[derive(Debug, Clone)]
enum Step {
    Allocate(u16),
    Refresh(u16, u32),
    Permit(u16, u8),
    Bind(u16, u16, u8),
    Send(u16, u8),
    Channel(u16, u16),
    Peer(u16, u8),
    Disconnect(u16),
    Wait(u64),
    Noise(u16, Vec<u8>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let client = 0..4_u16;
    let peer = 0..4_u8;
    let number = 0x3fff..0x4003_u16;
    let step = prop_oneof![
        4 => client.clone().prop_map(Step::Allocate),
        2 => (client.clone(), prop_oneof![Just(0), 0..5_000_u32]).prop_map(|(client, lifetime)| Step::Refresh(client, lifetime)),
        3 => (client.clone(), peer.clone()).prop_map(|(client, peer)| Step::Permit(client, peer)),
        3 => (client.clone(), number.clone(), peer.clone()).prop_map(|(client, number, peer)| Step::Bind(client, number, peer)),
        3 => (client.clone(), peer.clone()).prop_map(|(client, peer)| Step::Send(client, peer)),
        3 => (client.clone(), number).prop_map(|(client, number)| Step::Channel(client, number)),
        3 => (client.clone(), peer).prop_map(|(client, peer)| Step::Peer(client, peer)),
        1 => client.clone().prop_map(Step::Disconnect),
        3 => (0..700_u64).prop_map(Step::Wait),
        1 => (client, prop::collection::vec(any::<u8>(), 0..60)).prop_map(|(client, noise)| Step::Noise(client, noise)),
    ];
    prop::collection::vec(step, 1..120)
}

/// What the RFC says of one allocation, told as simply as can be: times until which things hold.
#[derive(Default)]
struct Model {
    until: u64,
    permissions: BTreeMap<u8, u64>,
    channels: BTreeMap<u16, (u8, u64)>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_data_flows_exactly_where_the_rfc_says(steps in steps()) {
        let mut world = world();
        let mut models: BTreeMap<u16, Model> = BTreeMap::new();
        let address = |peer: u8| format!("8.8.8.{peer}:7");
        for step in steps {
            let seconds = world.seconds;
            models.retain(|_, model| model.until > seconds);
            match step {
                Step::Allocate(number) => {
                    let code = world.code(client(number), &allocate());
                    prop_assert_eq!(code, if models.contains_key(&number) { 437 } else { 0 });
                    models.entry(number).or_insert(Model { until: seconds + 600, ..Model::default() });
                }
                Step::Refresh(number, lifetime) => {
                    let ask = ask(Method::Refresh).with(attribute::LIFETIME, &lifetime.to_be_bytes());
                    let code = world.code(client(number), &ask);
                    prop_assert_eq!(code, if models.contains_key(&number) { 0 } else { 437 });
                    match models.get_mut(&number) {
                        Some(_) if lifetime == 0 => drop(models.remove(&number)),
                        Some(model) => model.until = seconds + u64::from(lifetime.clamp(600, 3_600)),
                        None => {}
                    }
                }
                Step::Permit(number, peer) => {
                    let code = world.code(client(number), &ask(Method::CreatePermission).to(&address(peer)));
                    prop_assert_eq!(code, if models.contains_key(&number) { 0 } else { 437 });
                    if let Some(model) = models.get_mut(&number) {
                        model.permissions.insert(peer, seconds + 300);
                    }
                }
                Step::Bind(number, channel, peer) => {
                    let code = world.code(client(number), &bind(channel, &address(peer)));
                    let Some(model) = models.get_mut(&number) else {
                        prop_assert_eq!(code, 437);
                        continue;
                    };
                    model.channels.retain(|_, (_, until)| *until > seconds);
                    let conflict = model.channels.iter().any(|(known, (bound, _))| (*known == channel) != (*bound == peer));
                    let expected = if channel < 0x4000 || conflict { 400 } else { 0 };
                    prop_assert_eq!(code, expected);
                    if code == 0 {
                        model.channels.insert(channel, (peer, seconds + 600));
                        model.permissions.insert(peer, seconds + 300);
                    }
                }
                Step::Send(number, peer) => {
                    let permitted = models.get(&number).is_some_and(|model| model.permissions.get(&peer).is_some_and(|until| *until > seconds));
                    prop_assert_eq!(world.send(client(number), &address(peer), b"x"), permitted);
                }
                Step::Channel(number, channel) => {
                    let bound = models.get(&number).is_some_and(|model| model.channels.get(&channel).is_some_and(|(_, until)| *until > seconds));
                    prop_assert_eq!(world.relayed(client(number), &channel_data(channel, b"x")) == 1, bound);
                }
                Step::Peer(number, peer) => {
                    let Some(model) = models.get(&number) else { continue };
                    let heard = world.hear_peer(client(number), &address(peer), b"x");
                    let permitted = model.permissions.get(&peer).is_some_and(|until| *until > seconds);
                    let channel = model.channels.iter().find(|(_, (bound, until))| *bound == peer && *until > seconds);
                    prop_assert_eq!(heard.is_some(), permitted);
                    if let Some(heard) = heard {
                        prop_assert_eq!(heard[0] >= 0x40, channel.is_some());
                    }
                }
                Step::Disconnect(number) => {
                    let now = world.now().instant;
                    world.engine.disconnect(&client(number), now, &mut world.edge);
                    models.remove(&number);
                }
                Step::Wait(seconds) => world.pass(seconds),
                Step::Noise(number, noise) => drop(world.raw(client(number), &noise)),
            }
            let seconds = world.seconds;
            models.retain(|_, model| model.until > seconds);
            prop_assert_eq!(world.engine.len(), models.len());
            prop_assert_eq!(world.edge.open.len(), models.len());
            prop_assert_eq!(world.engine.deadlines.len(), models.len());
        }
    }
}
