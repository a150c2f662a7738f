//! Moments of a room's history, as people write them.

use std::time::Duration;

use genosdb::Hlc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A moment in the history of a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// As it is.
    Now,
    /// As the archive held it at a time of day, ms since the Unix epoch.
    Received(u64),
    /// As the archive held it when so many entries were in the log.
    Entry(u64),
    /// What was written up to a timestamp, by its authors' clocks.
    Clock(Hlc),
}

/// A text is no moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no moment: write it as 2026-11-22T19:30:00Z, as \"2h ago\", as now, or as a timestamp of the clock (ms.counter)"
)]
pub struct MomentError(String);

impl Moment {
    /// Parses `now`, RFC 3339, a duration with `ago`, or a timestamp of the hybrid logical clock. `wall_ms` is the
    /// time of day.
    ///
    /// # Errors
    /// [`MomentError`].
    pub fn parse(text: &str, wall_ms: u64) -> Result<Self, MomentError> {
        let text = text.trim();
        let error = || MomentError(text.to_owned());
        if text == "now" {
            return Ok(Self::Now);
        }
        if let Some(duration) = text.strip_suffix("ago") {
            let duration: Duration = humantime::parse_duration(duration.trim()).map_err(|_| error())?;
            let ms = u64::try_from(duration.as_millis()).map_err(|_| error())?;
            return Ok(Self::Received(wall_ms.saturating_sub(ms)));
        }
        if let Some((physical, logical)) = text.split_once('.')
            && let (Ok(physical), Ok(logical)) = (physical.parse(), logical.parse())
        {
            return Ok(Self::Clock(Hlc::new(physical, logical)));
        }
        let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| error())?;
        let ms = u64::try_from(time.unix_timestamp_nanos() / 1_000_000).map_err(|_| error())?;
        Ok(Self::Received(ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_in_several_ways() {
        let now = 1_795_375_800_000;
        for (text, expected) in [
            ("now", Moment::Now),
            ("2h ago", Moment::Received(now - 7_200_000)),
            ("1day 30min ago", Moment::Received(now - 88_200_000)),
            ("2026-11-22T19:30:00Z", Moment::Received(1_795_375_800_000)),
            ("2026-11-22T21:30:00.5+02:00", Moment::Received(1_795_375_800_500)),
            ("1795375800000.7", Moment::Clock(Hlc::new(now, 7))),
        ] {
            assert_eq!(Moment::parse(text, now), Ok(expected), "{text}");
        }
        for text in ["", "yesterday", "ago", "2h", "2026-11-22", "1.", ".1", "-5.1", "1969-01-01T00:00:00Z"] {
            assert!(Moment::parse(text, now).is_err(), "{text}");
        }
    }
}
