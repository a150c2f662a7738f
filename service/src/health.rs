//! How a service is, in its own words.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// The state of one part of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "lowercase")]
pub enum State {
    /// Not yet ready to serve.
    Starting,
    /// All is well.
    Ok,
    /// It serves, but not all that it should; the reason is for a person to read.
    Degraded(String),
}

/// The health of one service, by part. Cheap to clone; every clone is the same health.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<&'static str, State>>>);

impl Health {
    /// Says how `part` is. Returns whether that is news.
    pub fn set(&self, part: &'static str, state: State) -> bool {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = parts.get(part) != Some(&state);
        parts.insert(part, state);
        changed
    }

    /// How each part is.
    pub fn parts(&self) -> BTreeMap<&'static str, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What `/healthz` and `/readyz` answer.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// `ok`, `starting` or `degraded`.
    status: &'static str,
    parts: BTreeMap<&'static str, State>,
}

impl Report {
    pub(crate) fn of<'a>(healths: impl IntoIterator<Item = &'a Health>) -> Self {
        let parts: BTreeMap<_, _> = healths.into_iter().flat_map(Health::parts).collect();
        let status = if parts.values().any(|state| *state == State::Starting) {
            "starting"
        } else if parts.values().any(|state| matches!(state, State::Degraded(_))) {
            "degraded"
        } else {
            "ok"
        };
        Self { status, parts }
    }

    pub(crate) fn is_ok(&self) -> bool {
        self.status == "ok"
    }
}
