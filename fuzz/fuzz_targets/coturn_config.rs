//! A `turnserver.conf`, as `homeport init --from-coturn` reads it.
#![no_main]

// The binary's own file: what it holds is nobody's interface.
#[allow(dead_code)]
#[path = "../../homeport/src/coturn.rs"]
mod coturn;

libfuzzer_sys::fuzz_target!(|text: &str| drop(coturn::import(text)));
