//! Entrances for fuzz targets.

use std::sync::OnceLock;
use std::time::Instant;

use genosdb::Limits;
use str0m::Candidate;
use str0m::config::DtlsCert;

use crate::link::{Link, Listening};

/// Hands a description to links as a peer's offer, and as its answer.
pub fn description(sdp: &str) {
    static CERTIFICATE: OnceLock<DtlsCert> = OnceLock::new();
    let certificate = CERTIFICATE.get_or_init(|| {
        let provider = str0m::crypto::from_feature_flags();
        let certificate = provider.dtls_provider.generate_certificate().expect("a certificate can be made");
        provider.install_process_default();
        certificate
    });
    let now = Instant::now();
    let address = "127.0.0.1:1".parse().expect("an address");
    let candidates = || vec![Candidate::host(address, "udp").expect("a candidate")];
    let listening = || Listening { graph: true, cells: true, limits: Limits::default() };
    if let Ok((mut link, _)) = Link::answer(now, certificate.clone(), candidates(), listening(), sdp) {
        link.handle_timeout(now);
    }
    if let Ok((mut link, _)) = Link::offer(now, certificate.clone(), candidates(), listening()) {
        // Either is fine; a panic is not.
        let _ = link.accept_answer(sdp);
        link.handle_timeout(now);
    }
}
