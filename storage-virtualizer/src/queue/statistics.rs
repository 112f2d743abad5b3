//! What a queue has done so far.

use std::sync::atomic::{AtomicU64, Ordering};

/// Classes of [`Counters::latencies`].
pub const LATENCY_CLASSES: usize = 24;

/// Counters of one queue. One worker writes them, anybody reads them.
#[derive(Debug, Default)]
pub struct QueueStatistics {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    others: AtomicU64,
    errors: AtomicU64,
    interrupts: AtomicU64,
    latencies: [AtomicU64; LATENCY_CLASSES],
    time_us: AtomicU64,
}

/// The values of [`QueueStatistics`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// What was asked.
    pub counts: RequestCounts,
    /// Interrupts sent.
    pub interrupts: u64,
    /// How long requests took from being taken to being answered: class *i* counts what took less than 2^i microseconds and not
    /// less than 2^(i-1), the last one everything else. Wrong by what the worker does in one turn.
    pub latencies: [u64; LATENCY_CLASSES],
    /// All these durations together, in microseconds.
    pub time_us: u64,
}

/// Requests by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestCounts {
    /// Read requests.
    pub reads: u64,
    /// Bytes asked for by them.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes in them.
    pub written_bytes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// All that is none of these: discards, write zeroes, identifiers.
    pub others: u64,
    /// Requests that were not answered with success.
    pub errors: u64,
}

impl RequestCounts {
    /// The sums of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            reads: self.reads + other.reads,
            read_bytes: self.read_bytes + other.read_bytes,
            writes: self.writes + other.writes,
            written_bytes: self.written_bytes + other.written_bytes,
            flushes: self.flushes + other.flushes,
            others: self.others + other.others,
            errors: self.errors + other.errors,
        }
    }
}

impl Counters {
    /// The sums of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            counts: self.counts.plus(other.counts),
            interrupts: self.interrupts + other.interrupts,
            latencies: std::array::from_fn(|class| self.latencies[class] + other.latencies[class]),
            time_us: self.time_us.wrapping_add(other.time_us),
        }
    }
}

/// There is one writer: no locked instruction is needed.
fn add(counter: &AtomicU64, value: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(value),
        Ordering::Relaxed,
    );
}

impl QueueStatistics {
    pub(crate) fn count_read(&self, bytes: u64) {
        add(&self.reads, 1);
        add(&self.read_bytes, bytes);
    }

    pub(crate) fn count_write(&self, bytes: u64) {
        add(&self.writes, 1);
        add(&self.written_bytes, bytes);
    }

    pub(crate) fn count_flush(&self) {
        add(&self.flushes, 1);
    }

    pub(crate) fn count_other(&self) {
        add(&self.others, 1);
    }

    pub(crate) fn count_error(&self) {
        add(&self.errors, 1);
    }

    pub(crate) fn count_interrupt(&self) {
        add(&self.interrupts, 1);
    }

    /// A request was answered after so many nanoseconds.
    pub(crate) fn count_time(&self, nanos: u64) {
        let micros = nanos / 1000;
        let class = (u64::BITS - micros.leading_zeros()) as usize;
        add(&self.latencies[class.min(LATENCY_CLASSES - 1)], 1);
        add(&self.time_us, micros);
    }

    /// The values now.
    pub fn counters(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            counts: RequestCounts {
                reads: get(&self.reads),
                read_bytes: get(&self.read_bytes),
                writes: get(&self.writes),
                written_bytes: get(&self.written_bytes),
                flushes: get(&self.flushes),
                others: get(&self.others),
                errors: get(&self.errors),
            },
            interrupts: get(&self.interrupts),
            latencies: self.latencies.each_ref().map(get),
            time_us: get(&self.time_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_by_powers_of_two() {
        let statistics = QueueStatistics::default();
        for micros in [0, 1, 2, 3, 900, 20_000_000] {
            statistics.count_time(micros * 1000 + 999);
        }
        let counters = statistics.counters();
        let mut expected = [0; LATENCY_CLASSES];
        (expected[0], expected[1], expected[2], expected[10], expected[23]) = (1, 1, 2, 1, 1);
        assert_eq!(counters.latencies, expected);
        assert_eq!(counters.time_us, 20_000_906);
        assert_eq!(counters.plus(counters).latencies[2], 4);
    }
}
