//! When a thread rests before it looks again. Packets that come one by one, but fast, wake it once each, and waking costs
//! the system about as much as handing a packet on; a rest lets a few come together, as network cards do with interrupts.

use std::time::{Duration, Instant};

/// How long a rest is, and by how much a packet may come later; the system's timers add some 50 µs.
const REST: Duration = Duration::from_micros(200);
/// How often it is decided anew.
const PERIOD: Duration = Duration::from_millis(100);
/// Packets a second of one thread from which a rest brings some together at all: calls of a few people never wait.
const FAST: f64 = 10_000.0;
/// Packets at each wake with which there is nothing left to gain.
const TOGETHER: f64 = 4.0;

/// Decides, by what came in the last tenth of a second.
#[derive(Debug)]
pub(crate) struct Coalescing {
    began: Instant,
    packets: u64,
    wakes: u64,
    rests: bool,
}

impl Coalescing {
    pub(crate) fn new(now: Instant) -> Self {
        Self { began: now, packets: 0, wakes: 0, rests: false }
    }

    /// The thread has woken, and found so many packets.
    pub(crate) fn woke(&mut self, packets: u64, now: Instant) {
        self.packets += packets;
        self.wakes += 1;
        let passed = now.saturating_duration_since(self.began);
        if passed < PERIOD {
            return;
        }
        let (packets, wakes) = (self.packets as f64, self.wakes as f64);
        // Who rests finds more at each wake: that is no reason to stop.
        self.rests = packets / passed.as_secs_f64() >= FAST && (self.rests || packets / wakes < TOGETHER);
        *self = Self { rests: self.rests, ..Self::new(now) };
    }

    /// How long to rest before looking for packets again.
    pub(crate) fn rest(&self) -> Option<Duration> {
        self.rests.then_some(REST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is decided after a second of `rate` packets, so many at each wake.
    fn after(coalescing: &mut Coalescing, now: &mut Instant, rate: u32, together: u32) -> bool {
        for _ in 0..rate / together {
            *now += Duration::from_secs(1) * together / rate;
            coalescing.woke(together.into(), *now);
        }
        coalescing.rest().is_some()
    }

    #[test]
    fn it_rests_only_where_packets_come_fast_and_one_by_one() {
        let mut now = Instant::now();
        for (rate, together, rests) in
            [(50, 1, false), (5_000, 1, false), (20_000, 1, true), (20_000, 8, false), (200_000, 32, false)]
        {
            let mut coalescing = Coalescing::new(now);
            assert_eq!(after(&mut coalescing, &mut now, rate, together), rests, "{rate} a second, {together} together");
        }
    }

    #[test]
    fn it_goes_on_resting_while_that_brings_them_together_and_stops_when_they_come_slowly() {
        let mut now = Instant::now();
        let mut coalescing = Coalescing::new(now);
        assert!(after(&mut coalescing, &mut now, 40_000, 1));
        assert!(after(&mut coalescing, &mut now, 40_000, 5));
        assert!(!after(&mut coalescing, &mut now, 2_000, 1));
        // After a silence the first packet is not held up by what was before it.
        assert!(after(&mut coalescing, &mut now, 40_000, 1));
        now += Duration::from_secs(60);
        coalescing.woke(1, now);
        assert!(coalescing.rest().is_none());
    }
}
