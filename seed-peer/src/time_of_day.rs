//! The time of day by which the seed judges what peers say.
//!
//! A machine's clock may be set back by hours while the seed runs. When an operation was received must not be: a peer that
//! comes back is sent what was received since it was last here, and timestamps too far ahead of now are cut down. So the
//! time of day here never goes back. Where the machine's clock is behind, it goes on at three quarters of its speed until
//! that has caught up: right for long if the machine's clock is the one that is wrong, and right in the end if it is not.
//! A clock that is set back by more than a day is believed: then it had been wrong before.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// By how much the machine's clock may be behind what is shown.
const MAX_BEHIND_MS: u64 = 24 * 60 * 60 * 1000;

static SHOWN: Mutex<Option<TimeOfDay>> = Mutex::new(None);

/// The time of day, in ms since the Unix epoch; not less than an earlier one of this process.
pub(crate) fn wall_ms() -> u64 {
    not_before(0)
}

/// The time of day, which is not before `ms` either, from now on: something was received then, maybe by an earlier
/// process.
pub(crate) fn not_before(ms: u64) -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
    let now = Instant::now();
    let mut shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let shown = shown.get_or_insert(TimeOfDay { ms: wall_ms, at: now });
    shown.ms = shown.ms.max(ms);
    shown.advance(wall_ms, now)
}

/// A moment by both clocks.
#[derive(Debug, Clone, Copy)]
struct TimeOfDay {
    ms: u64,
    at: Instant,
}

impl TimeOfDay {
    /// What to show at `now`, when the machine's clock says `wall_ms`.
    fn advance(&mut self, wall_ms: u64, now: Instant) -> u64 {
        // Four milliseconds at a time; what is left over counts with what follows.
        let quarters = u64::try_from(now.saturating_duration_since(self.at).as_millis() / 4).unwrap_or(u64::MAX);
        self.ms = self.ms.saturating_add(quarters.saturating_mul(3));
        self.at += Duration::from_millis(quarters.saturating_mul(4));
        if wall_ms >= self.ms || self.ms - wall_ms > MAX_BEHIND_MS {
            *self = Self { ms: wall_ms, at: now };
        }
        self.ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    #[test]
    fn a_clock_that_is_set_back_is_waited_for_at_less_speed() {
        let start = Instant::now();
        let mut shown = TimeOfDay { ms: 100 * HOUR, at: start };
        let at = |hours: u64| start + Duration::from_millis(hours * HOUR);
        assert_eq!(shown.advance(101 * HOUR, at(1)), 101 * HOUR);
        // Set back by five hours.
        assert_eq!(shown.advance(97 * HOUR, at(2)), 101 * HOUR + HOUR * 3 / 4);
        let mut last = shown.ms;
        for hours in 3..40 {
            let now = shown.advance((95 + hours) * HOUR, at(hours));
            assert!(now > last);
            last = now;
        }
        assert_eq!(last, (95 + 39) * HOUR, "they have met");
        // Set forward, it is followed at once.
        assert_eq!(shown.advance(200 * HOUR, at(40)), 200 * HOUR);
        // Nobody's clock is set back by days unless it was wrong.
        assert_eq!(shown.advance(141 * HOUR, at(41)), 141 * HOUR);
    }

    #[test]
    fn moments_shorter_than_a_millisecond_are_not_lost() {
        let start = Instant::now();
        let mut shown = TimeOfDay { ms: 1_000, at: start };
        for step in 1..=40_000_u64 {
            shown.advance(500, start + Duration::from_micros(step * 100));
        }
        assert_eq!(shown.ms, 1_000 + 3_000);
    }
}
