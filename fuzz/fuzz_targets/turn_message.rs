//! One STUN message, as it comes in a datagram.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| turn_server::fuzzing::message(bytes));
