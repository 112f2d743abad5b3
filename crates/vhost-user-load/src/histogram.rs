//! Latencies in buckets of 3 % width.

use std::time::Duration;

use serde::Serialize;

/// Buckets per doubling, as bits.
const FINE: u32 = 5;
const BUCKETS: usize = 64 << FINE;

/// How often which latency was seen.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    sum: u128,
    largest: u64,
}

/// What a histogram says, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// The average.
    pub mean: f64,
    /// Half are below.
    pub p50: f64,
    /// 90 % are below.
    pub p90: f64,
    /// 99 % are below.
    pub p99: f64,
    /// 99.9 % are below.
    pub p999: f64,
    /// The largest.
    pub max: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            sum: 0,
            largest: 0,
        }
    }
}

fn bucket(nanos: u64) -> usize {
    let nanos = nanos.max(1 << FINE);
    let exponent = nanos.ilog2() - FINE;
    ((exponent as usize) << FINE) + usize::try_from(nanos >> exponent).unwrap_or(0)
}

fn upper_end(bucket: usize) -> u64 {
    let exponent = (bucket >> FINE).saturating_sub(1);
    let fraction = bucket - (exponent << FINE) + 1;
    (fraction as u64) << exponent
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get_mut(bucket(nanos)) {
            *count += 1;
        }
        self.sum += u128::from(nanos);
        self.largest = self.largest.max(nanos);
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum += other.sum;
        self.largest = self.largest.max(other.largest);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    #[expect(clippy::cast_precision_loss, reason = "for display")]
    fn percentile(&self, per_mille: u64) -> f64 {
        let wanted = (self.count() * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper_end(bucket).min(self.largest) as f64 / 1e3;
            }
        }
        self.largest as f64 / 1e3
    }

    /// What it says.
    #[expect(clippy::cast_precision_loss, reason = "for display")]
    pub fn latency(&self) -> Latency {
        Latency {
            mean: self.sum as f64 / self.count().max(1) as f64 / 1e3,
            p50: self.percentile(500),
            p90: self.percentile(900),
            p99: self.percentile(990),
            p999: self.percentile(999),
            max: self.largest as f64 / 1e3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_within_a_bucket() {
        let mut histogram = Histogram::default();
        for micros in 1..=1000 {
            histogram.add(Duration::from_micros(micros));
        }
        let latency = histogram.latency();
        for (found, expected) in [(latency.p50, 500.0), (latency.p90, 900.0), (latency.p99, 990.0)] {
            assert!(
                (expected..expected * 1.04).contains(&found),
                "{found} for {expected}"
            );
        }
        assert!((latency.mean - 500.5).abs() < 0.01);
        assert!((latency.max - 1000.0).abs() < 0.01);
        assert_eq!(histogram.count(), 1000);
    }
}
