//! How fast something long gets on, over the last seconds.

use std::time::Duration;

/// The rate is that of at least the last so much, and of at most twice that, as long as something is noted.
const SPAN: Duration = Duration::from_secs(2);
/// Of less nothing can be said.
const LEAST: Duration = Duration::from_millis(100);

/// How far something was at a moment.
#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Duration,
    done: u64,
    worked: u64,
}

/// Keeps two moments of the last seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Meter {
    before: Option<Mark>,
    last: Option<Mark>,
}

/// How fast something gets on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Bytes per second that were copied or read; what needed no work is not among them.
    pub rate: u64,
    /// How long the rest takes if it gets on as in the last seconds; none if it stands still, or nothing can be said yet.
    pub left: Option<Duration>,
}

impl Meter {
    /// At `now`, `done` bytes are done, for which `worked` bytes were copied or read: both only grow.
    pub fn note(&mut self, now: Duration, done: u64, worked: u64) {
        let mark = Mark {
            at: now,
            done,
            worked,
        };
        match self.last {
            Some(last) if now.saturating_sub(last.at) < SPAN => {}
            last => {
                self.before = last.or(Some(mark));
                self.last = Some(mark);
            }
        }
    }

    /// How fast it got on up to `now`. `total` is what `done` will be at the end.
    pub fn pace(&self, now: Duration, done: u64, worked: u64, total: u64) -> Pace {
        let Some(before) = self.before else {
            return Pace::default();
        };
        let passed = now.saturating_sub(before.at);
        if passed < LEAST {
            return Pace::default();
        }
        let per_second = |bytes: u64| {
            let rate = u128::from(bytes) * 1_000_000_000 / passed.as_nanos();
            u64::try_from(rate).unwrap_or(u64::MAX)
        };
        let advance = per_second(done.saturating_sub(before.done));
        Pace {
            rate: per_second(worked.saturating_sub(before.worked)),
            left: total
                .saturating_sub(done)
                .checked_div(advance)
                .map(Duration::from_secs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    #[test]
    fn the_pace_is_that_of_the_last_seconds() {
        let mut meter = Meter::default();
        assert_eq!(
            meter.pace(seconds(1), 0, 0, 100),
            Pace::default(),
            "nothing is known"
        );
        for second in 0..100 {
            meter.note(seconds(second), second * 10, second * 5);
        }
        for second in 100..110 {
            meter.note(
                seconds(second),
                1000 + (second - 100) * 100,
                500 + (second - 100) * 50,
            );
        }
        let pace = meter.pace(seconds(109), 1900, 950, 3900);
        assert_eq!((pace.rate, pace.left), (50, Some(seconds(20))));
    }

    #[test]
    fn what_stands_still_has_no_end() {
        let mut meter = Meter::default();
        meter.note(seconds(0), 0, 0);
        meter.note(seconds(3), 3000, 3000);
        assert_eq!(meter.pace(seconds(6), 3000, 3000, 6000).rate, 500);
        meter.note(seconds(7), 3000, 3000);
        meter.note(seconds(60), 3000, 3000);
        assert_eq!(meter.pace(seconds(60), 3000, 3000, 6000), Pace::default());
    }
}
