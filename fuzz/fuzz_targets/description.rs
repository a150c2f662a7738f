//! A session description, as it comes out of its seal.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| seed_peer::fuzzing::description(text));
