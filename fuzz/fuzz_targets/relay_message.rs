//! What a Nostr client says: messages, events and filters.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| relay::fuzzing::message(text));
