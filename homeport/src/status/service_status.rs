//! How a service is, as the status page has it.

use serde::{Deserialize, Serialize};
use service::State;

/// From well to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Shown {
    Ok,
    Starting,
    Degraded,
    /// It does not answer, or says nothing any more.
    Down,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ServiceStatus {
    pub(super) name: String,
    /// That of the part that is worst.
    pub(super) state: Shown,
    pub(super) parts: Vec<PartStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartStatus {
    pub(super) name: String,
    pub(super) state: Shown,
    /// Why it is as it is: a detail.
    #[serde(default)]
    pub(super) reason: Option<String>,
}

impl ServiceStatus {
    pub(super) fn new(name: impl Into<String>, parts: Vec<PartStatus>) -> Self {
        let state = parts.iter().map(|part| part.state).max().unwrap_or(Shown::Ok);
        Self { name: name.into(), state, parts }
    }

    /// What everybody may know.
    pub(super) fn without_reasons(mut self) -> Self {
        self.parts.iter_mut().for_each(|part| part.reason = None);
        self
    }
}

impl PartStatus {
    pub(super) fn of((name, state): (impl Into<String>, State)) -> Self {
        let (state, reason) = match state {
            State::Ok => (Shown::Ok, None),
            State::Starting => (Shown::Starting, None),
            State::Degraded(reason) => (Shown::Degraded, Some(reason)),
        };
        Self { name: name.into(), state, reason }
    }
}
