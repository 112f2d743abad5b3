//! Keeps a guest from flooding the host's log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines at once that guests may cause at one place in the code, and the time until there may be as many again.
const GUEST_LINES: u32 = 10;
const GUEST_PERIOD: Duration = Duration::from_secs(10);

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

/// The limit of a place in the code where a guest causes lines, for all devices together: a `static` beside it.
#[derive(Debug)]
pub struct GuestLines(Mutex<RateLimit>);

impl GuestLines {
    /// A limit of ten lines in ten seconds.
    pub const fn new() -> Self {
        Self(Mutex::new(RateLimit::new(GUEST_LINES, GUEST_PERIOD)))
    }

    /// Whether a line may be logged now: the number of lines suppressed before it, or `None` if it may not.
    pub fn allow(&self) -> Option<u64> {
        let mut limit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        limit.allow(Instant::now())
    }
}

impl Default for GuestLines {
    fn default() -> Self {
        Self::new()
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
