//! The hybrid logical clock (wire §4).

use std::fmt;

/// How far ahead of the wall clock a timestamp may be, in milliseconds: 2 h. Beyond it is capped.
pub const MAX_DRIFT_MS: u64 = 2 * 60 * 60 * 1000;

/// The greatest integer that a JavaScript number holds exactly (`Number.MAX_SAFE_INTEGER`).
pub const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// A timestamp of the hybrid logical clock. Orders by physical, then by logical time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hlc {
    /// Milliseconds since the Unix epoch, at most [`MAX_SAFE_INTEGER`].
    pub physical: u64,
    /// Counts events; at most [`MAX_SAFE_INTEGER`].
    pub logical: u64,
}

impl Hlc {
    /// A timestamp of `physical` milliseconds and the counter `logical`.
    pub fn new(physical: u64, logical: u64) -> Self {
        Self { physical, logical }
    }

    /// A timestamp behind which at least `moments` others fit before this one, by counting `logical` up; `None` at the
    /// beginning of time.
    pub(crate) fn earlier(self, moments: u64) -> Option<Self> {
        match self.logical.checked_sub(moments) {
            Some(logical) => Some(Self { logical, ..self }),
            // What counts up from 0 stays before the next millisecond, and moves nobody's counter.
            None => Some(Self { physical: self.physical.checked_sub(1)?, logical: 0 }),
        }
    }

    /// This timestamp with its physical time at most [`MAX_DRIFT_MS`] ahead of `wall_ms`, so that one peer
    /// with a clock years ahead cannot win every conflict for years.
    #[must_use]
    pub fn capped(self, wall_ms: u64) -> Self {
        Self { physical: self.physical.min(wall_ms.saturating_add(MAX_DRIFT_MS)), ..self }
    }
}

impl fmt::Display for Hlc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.physical, self.logical)
    }
}

/// A peer's clock: never goes back, whatever the wall clock and the other peers do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    latest: Hlc,
}

impl Clock {
    /// A clock that continues behind `latest`.
    pub fn starting_at(latest: Hlc) -> Self {
        Self { latest }
    }

    /// A new timestamp, greater than all that this clock gave or saw. `wall_ms` is the time of day.
    pub fn now(&mut self, wall_ms: u64) -> Hlc {
        self.latest.physical = self.latest.physical.max(wall_ms);
        self.latest.logical = (self.latest.logical + 1).min(MAX_SAFE_INTEGER);
        self.latest
    }

    /// Takes note of a timestamp that came from a peer, and returns it capped as it is to be used.
    pub fn receive(&mut self, timestamp: Hlc, wall_ms: u64) -> Hlc {
        let capped = timestamp.capped(wall_ms);
        self.latest.physical = self.latest.physical.max(capped.physical);
        self.latest.logical = (self.latest.logical.max(capped.logical) + 1).min(MAX_SAFE_INTEGER);
        capped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_order_by_physical_then_logical() {
        assert!(Hlc::new(2, 0) > Hlc::new(1, 9));
        assert!(Hlc::new(1, 10) > Hlc::new(1, 9));
    }

    #[test]
    fn the_clock_never_goes_back() {
        let mut clock = Clock::default();
        let first = clock.now(1_000);
        assert_eq!(first, Hlc::new(1_000, 1));
        assert_eq!(clock.now(500), Hlc::new(1_000, 2));
        assert_eq!(clock.receive(Hlc::new(3_000, 7), 600), Hlc::new(3_000, 7));
        assert_eq!(clock.now(700), Hlc::new(3_000, 9));
    }

    #[test]
    fn a_timestamp_more_than_two_hours_ahead_is_capped() {
        let wall = 1_795_337_670_001;
        let mut clock = Clock::default();
        let far = Hlc::new(wall + MAX_DRIFT_MS + 1, 3);
        assert_eq!(clock.receive(far, wall), Hlc::new(wall + MAX_DRIFT_MS, 3));
        let near = Hlc::new(wall + MAX_DRIFT_MS, 4);
        assert_eq!(clock.receive(near, wall), near);
        assert_eq!(clock.now(wall).physical, wall + MAX_DRIFT_MS);
        assert_eq!(Hlc::new(u64::MAX, 0).capped(u64::MAX), Hlc::new(u64::MAX, 0));
    }
}
