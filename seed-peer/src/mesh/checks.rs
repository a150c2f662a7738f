//! Links that somebody makes to see whether they come to be. They carry nothing, belong to no room, and end soon.

use std::time::{Duration, Instant};

use super::Mesh;
use crate::check::CheckRoom;
use crate::link::{CloseReason, Link, LinkOutput, Listening};
use crate::links::LinkId;
use crate::signalling::RelayIndex;

/// How long a check may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);
/// Checks at a time.
const MAX_CHECKS: usize = 16;

impl Mesh {
    /// Answers who asks for a link.
    pub(super) fn handle_check(&mut self, now: Instant, relay: RelayIndex, content: &str) {
        let Some(room) = &self.check_room else { return };
        let Some((peer, offer)) = room.parse_offer(content) else { return };
        if self.state.checks.len() >= MAX_CHECKS || self.links.len() >= self.max_links {
            tracing::debug!("too many checks at a time");
            return;
        }
        let listening = Listening { graph: false, cells: false, limits: self.limits };
        let candidates = self.addresses.candidates();
        match Link::answer(now, self.certificate.clone(), candidates, listening, &offer) {
            Ok((link, sdp)) => {
                self.state.checks.push((self.links.add(now, link), now + CHECK_TIMEOUT));
                let answer = room.answer(CheckRoom::new_peer(), &sdp);
                self.signalling.publish_content(Some(relay), &room.self_topic(&peer), &answer);
            }
            Err(error) => tracing::debug!(error = ?error.to_string(), "a check's description was refused"),
        }
    }

    /// Whether an output is that of a check; then it needs no more.
    pub(super) fn is_of_check(&mut self, link: LinkId, output: &LinkOutput) -> bool {
        let Some(index) = self.state.checks.iter().position(|(check, _)| *check == link) else { return false };
        if let LinkOutput::Closed(_) = output {
            self.state.checks.swap_remove(index);
            self.links.remove(link);
        }
        true
    }

    /// Ends checks that have had their time.
    pub(super) fn end_checks(&mut self, now: Instant) {
        let (over, left): (Vec<_>, Vec<_>) = self.state.checks.drain(..).partition(|(_, end)| now >= *end);
        self.state.checks = left;
        for (link, _) in over {
            self.links.close(link, CloseReason::Left, &mut self.state.events);
            self.links.remove(link);
        }
    }

    /// When there is a check to end.
    pub(super) fn next_check_end(&self) -> Option<Instant> {
        self.state.checks.iter().map(|(_, end)| *end).min()
    }
}
