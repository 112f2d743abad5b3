//! What a device, a volume or a leg has done: numbers of requests, bytes, errors, and how long they took.

use std::cell::RefCell;
use std::time::Duration;

use block_io::Operation;

/// Classes of [`Histogram`]: class *i* counts what took less than 2^i microseconds, the last one everything else.
pub const CLASSES: usize = 24;

/// How long requests took, by powers of two of a microsecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Histogram(pub [u64; CLASSES]);

impl Default for Histogram {
    fn default() -> Self {
        Self([0; CLASSES])
    }
}

impl Histogram {
    /// Upper limit of the class in which `percent` % of all requests have ended; zero if there were none.
    pub fn percentile(&self, percent: u64) -> Duration {
        let all: u64 = self.0.iter().sum();
        let wanted = (all * percent).div_ceil(100);
        let mut seen = 0;
        for (class, count) in self.0.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return Duration::from_micros(1 << class);
            }
        }
        Duration::ZERO
    }

    fn since(&self, earlier: &Self) -> Self {
        let mut difference = *self;
        for (class, before) in difference.0.iter_mut().zip(&earlier.0) {
            *class = class.saturating_sub(*before);
        }
        difference
    }

    fn class(took: Duration) -> usize {
        let micros = took.as_micros();
        let bits = 128 - micros.leading_zeros();
        usize::try_from(bits).unwrap_or(CLASSES).min(CLASSES - 1)
    }
}

/// Of one kind of request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Ended requests.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that failed.
    pub errors: u64,
    /// How long they took.
    pub latency: Histogram,
    /// How long they took together.
    pub time: Duration,
}

impl Count {
    fn add(&mut self, bytes: u64, took: Duration, good: bool) {
        self.requests += 1;
        self.bytes += bytes;
        self.errors += u64::from(!good);
        self.latency.0[Histogram::class(took)] += 1;
        self.time = self.time.saturating_add(took);
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(earlier.requests),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            errors: self.errors.saturating_sub(earlier.errors),
            latency: self.latency.since(&earlier.latency),
            time: self.time.saturating_sub(earlier.time),
        }
    }
}

/// What a device, a volume or a leg has done since the pool was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Reads.
    pub reads: Count,
    /// Writes, and ranges made zero or discarded.
    pub writes: Count,
    /// Flushes.
    pub flushes: Count,
}

impl Statistics {
    /// What was done after `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            reads: self.reads.since(&earlier.reads),
            writes: self.writes.since(&earlier.writes),
            flushes: self.flushes.since(&earlier.flushes),
        }
    }

    /// How long all requests took together: over a window, that divided by its length is how many were in flight on average.
    pub fn time(&self) -> Duration {
        self.reads.time + self.writes.time + self.flushes.time
    }
}

/// Counts as long as the pool is open.
#[derive(Debug, Default)]
pub(crate) struct Counters(RefCell<Statistics>);

impl Counters {
    pub(crate) fn count(&self, operation: Operation, bytes: u64, took: Duration, good: bool) {
        let mut all = self.0.borrow_mut();
        let kind = match operation {
            Operation::Read => &mut all.reads,
            Operation::Flush => &mut all.flushes,
            _ => &mut all.writes,
        };
        kind.add(bytes, took, good);
    }

    pub(crate) fn get(&self) -> Statistics {
        *self.0.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind_and_by_duration() {
        let counters = Counters::default();
        for micros in [0, 1, 3, 900, 1_000_000_000] {
            counters.count(Operation::Read, 4096, Duration::from_micros(micros), true);
        }
        counters.count(Operation::Discard, 512, Duration::ZERO, false);
        let all = counters.get();
        assert_eq!((all.reads.requests, all.reads.bytes), (5, 5 * 4096));
        assert_eq!((all.writes.requests, all.writes.errors), (1, 1));
        assert_eq!(all.reads.latency.0[0], 1, "less than a microsecond");
        assert_eq!(all.reads.latency.0[1], 1);
        assert_eq!(all.reads.latency.percentile(50), Duration::from_micros(4));
        assert_eq!(all.reads.latency.0[CLASSES - 1], 1);
        assert_eq!(Histogram::default().percentile(99), Duration::ZERO);
    }
}
