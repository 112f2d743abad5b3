//! Keeps a guest from flooding the host's log.

use std::time::{Duration, Instant};

/// Allows a number of lines per period.
#[derive(Debug, Clone)]
pub struct RateLimit {
    limit: u32,
    period: Duration,
    /// Start of the present period and the lines in it.
    window: Option<(Instant, u32)>,
    suppressed: u64,
}

impl RateLimit {
    /// At most `limit` lines per `period`.
    pub const fn new(limit: u32, period: Duration) -> Self {
        Self {
            limit,
            period,
            window: None,
            suppressed: 0,
        }
    }

    /// Whether a line may be logged at `now`: the number of lines suppressed before it, or `None` if it may not.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        let (start, count) = match self.window {
            Some((start, count)) if now.saturating_duration_since(start) < self.period => (start, count),
            _ => (now, 0),
        };
        if count >= self.limit {
            self.suppressed += 1;
            return None;
        }
        self.window = Some((start, count + 1));
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_suppressed_and_counted() {
        let start = Instant::now();
        let mut rate = RateLimit::new(2, Duration::from_secs(1));
        assert_eq!(rate.allow(start), Some(0));
        assert_eq!(rate.allow(start), Some(0));
        assert_eq!(rate.allow(start + Duration::from_millis(999)), None);
        assert_eq!(rate.allow(start + Duration::from_millis(1000)), Some(1));
        assert_eq!(rate.allow(start + Duration::from_millis(1001)), Some(0));
    }
}
