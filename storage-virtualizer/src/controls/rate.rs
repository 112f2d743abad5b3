//! Limits of rates: so many requests, so many bytes per second, with a burst.
//!
//! A limit is a line of people with numbers. A request takes the number that follows from what all before it cost; time calls
//! numbers at the limit's rate, at most a burst ahead of what was taken. A request goes when its number was called. So requests
//! go in the order in which they came, one that is larger than the burst only waits longer, and a limit that is changed or
//! taken away counts at once for those that wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const NANOS: u128 = 1_000_000_000;

/// So much per second, and so much at once after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units per second; 0 is taken as 1.
    pub per_second: u64,
    /// Units that may be used at once after a pause; at least what one request needs comes through in any case.
    pub burst: u64,
}

/// The limits of a disk or of a group of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateLimit {
    /// Requests that read, write, discard or zero.
    pub operations: Option<Rate>,
    /// Bytes read or written.
    pub bytes: Option<Rate>,
}

/// A limit that can be changed at any time, for one disk or for several together.
#[derive(Debug, Default)]
pub struct RateLimiter {
    active: AtomicBool,
    meters: Mutex<Meters>,
}

#[derive(Debug, Default)]
struct Meters {
    operations: Option<Meter>,
    bytes: Option<Meter>,
}

/// The numbers that a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ticket {
    operations: u128,
    bytes: u128,
}

#[derive(Debug)]
struct Meter {
    rate: Rate,
    since: Instant,
    /// Units taken so far.
    taken: u128,
    /// Billionths of units called so far.
    called: u128,
}

impl Meter {
    fn new(rate: Rate, old: Option<&Self>, now: Instant) -> Self {
        // Numbers that were given out keep their meaning.
        let (taken, called) = old.map_or((0, u128::from(rate.burst) * NANOS), |old| (old.taken, old.called));
        Self {
            rate,
            since: now,
            taken,
            called,
        }
    }

    fn advance(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since).as_nanos();
        self.since = now;
        let most = (self.taken + u128::from(self.rate.burst)) * NANOS;
        self.called = (self.called + passed * u128::from(self.rate.per_second.max(1))).min(most);
    }

    fn take(&mut self, units: u64, now: Instant) -> u128 {
        self.advance(now);
        self.taken += u128::from(units);
        self.taken
    }

    fn wait(&mut self, number: u128, now: Instant) -> Duration {
        self.advance(now);
        let missing = (number * NANOS).saturating_sub(self.called);
        let nanos = missing.div_ceil(u128::from(self.rate.per_second.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

impl RateLimiter {
    /// A limiter with these limits.
    pub fn new(limit: RateLimit) -> Self {
        let limiter = Self::default();
        limiter.set(limit);
        limiter
    }

    /// Changes the limits, also for requests that wait already.
    pub fn set(&self, limit: RateLimit) {
        let now = Instant::now();
        let mut meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        let meters = &mut *meters;
        for (meter, rate) in [
            (&mut meters.operations, limit.operations),
            (&mut meters.bytes, limit.bytes),
        ] {
            if let Some(old) = meter {
                old.advance(now);
            }
            *meter = rate.map(|rate| Meter::new(rate, meter.as_ref(), now));
        }
        self.active
            .store(limit != RateLimit::default(), Ordering::Relaxed);
    }

    /// Whether there is any limit.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    pub(super) fn take(&self, bytes: u64, now: Instant) -> Ticket {
        let mut meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        Ticket {
            operations: meters.operations.as_mut().map_or(0, |meter| meter.take(1, now)),
            bytes: meters.bytes.as_mut().map_or(0, |meter| meter.take(bytes, now)),
        }
    }

    /// How long until the ticket's numbers are called; zero if they were.
    pub(super) fn wait(&self, ticket: Ticket, now: Instant) -> Duration {
        let mut meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        let operations = meters
            .operations
            .as_mut()
            .map_or(Duration::ZERO, |meter| meter.wait(ticket.operations, now));
        let bytes = meters
            .bytes
            .as_mut()
            .map_or(Duration::ZERO, |meter| meter.wait(ticket.bytes, now));
        operations.max(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(per_second: u64, burst: u64) -> RateLimiter {
        let rate = Some(Rate { per_second, burst });
        RateLimiter::new(RateLimit {
            operations: rate,
            bytes: None,
        })
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let limiter = limiter(100, 5);
        let now = Instant::now();
        let waits: Vec<_> = (0..8)
            .map(|_| limiter.take(0, now))
            .map(|ticket| limiter.wait(ticket, now).as_millis())
            .collect();
        assert_eq!(waits[..5], [0; 5]);
        assert!((9..=10).contains(&waits[5]), "{waits:?}");
        assert!((29..=30).contains(&waits[7]), "{waits:?}");
        let later = now + Duration::from_secs(100);
        // A pause does not save up more than the burst.
        let tickets: Vec<_> = (0..6).map(|_| limiter.take(0, later)).collect();
        assert!(limiter.wait(tickets[4], later).is_zero());
        assert!(!limiter.wait(tickets[5], later).is_zero());
    }

    #[test]
    fn a_request_larger_than_the_burst_waits_and_comes_through() {
        let limiter = RateLimiter::new(RateLimit {
            operations: None,
            bytes: Some(Rate {
                per_second: 1000,
                burst: 100,
            }),
        });
        let now = Instant::now();
        let ticket = limiter.take(600, now);
        let wait = limiter.wait(ticket, now).as_millis();
        assert!((490..=500).contains(&wait), "{wait}");
        assert!(limiter.wait(ticket, now + Duration::from_millis(501)).is_zero());
    }

    #[test]
    fn a_changed_limit_counts_for_those_that_wait() {
        let limiter = limiter(1, 0);
        let ticket = (0..100).map(|_| limiter.take(0, Instant::now())).last().unwrap();
        assert!(limiter.wait(ticket, Instant::now()) > Duration::from_secs(90));
        limiter.set(RateLimit {
            operations: Some(Rate {
                per_second: 1000,
                burst: 0,
            }),
            bytes: None,
        });
        assert!(limiter.wait(ticket, Instant::now()) < Duration::from_millis(101));
        limiter.set(RateLimit::default());
        assert!(limiter.wait(ticket, Instant::now()).is_zero());
        assert!(!limiter.is_active());
    }
}
