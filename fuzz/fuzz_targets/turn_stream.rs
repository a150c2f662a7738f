//! A stream of TURN, as it comes over TCP.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| turn_server::fuzzing::stream(bytes));
