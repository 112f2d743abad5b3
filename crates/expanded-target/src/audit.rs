//! What a guest had done, and what it was refused, in the machine's log of events: but never so much that it drives out everything else.

use std::time::Instant;

use api::EventKind;

/// A bucket of tokens: `rate` per second, twice as many at once.
#[derive(Debug)]
pub(crate) struct Bucket {
    rate: u32,
    /// Thousandths of tokens.
    tokens: u64,
    filled: Instant,
}

impl Bucket {
    pub(crate) fn new(rate: u32, now: Instant) -> Self {
        Self {
            rate,
            tokens: u64::from(rate) * 2000,
            filled: now,
        }
    }

    /// Whether there is a token, which is taken.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let passed =
            u64::try_from(now.saturating_duration_since(self.filled).as_millis()).unwrap_or(u64::MAX);
        if passed > 0 {
            let more = passed.saturating_mul(u64::from(self.rate));
            self.tokens = self.tokens.saturating_add(more).min(u64::from(self.rate) * 2000);
            self.filled = now;
        }
        let has = self.tokens >= 1000;
        if has {
            self.tokens -= 1000;
        }
        has
    }
}

/// Decides which refusals get an event.
#[derive(Debug)]
pub(crate) struct Audit {
    bucket: Bucket,
    unlisted: u64,
}

impl Audit {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            bucket: Bucket::new(2, now),
            unlisted: 0,
        }
    }

    /// The event of a refusal, if it gets one.
    pub(crate) fn refused(&mut self, now: Instant, command: &str, reason: String) -> Option<EventKind> {
        if !self.bucket.take(now) {
            self.unlisted += 1;
            return None;
        }
        Some(EventKind::GuestCommandRefused {
            vm: None,
            command: command.to_owned(),
            reason,
            unlisted: std::mem::take(&mut self.unlisted),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_of_refusals_is_counted_and_not_listed() {
        let start = Instant::now();
        let mut audit = Audit::new(start);
        let listed = (0..100).filter_map(|_| audit.refused(start, "SEND", "no".into()));
        assert_eq!(listed.count(), 4);
        let event = audit.refused(start + Duration::from_secs(1), "SEND", "no".into());
        assert!(
            matches!(event, Some(EventKind::GuestCommandRefused { unlisted: 96, .. })),
            "{event:?}"
        );
    }

    #[test]
    fn tokens_come_back_with_time_and_never_more_than_twice_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, start);
        let taken = |bucket: &mut Bucket, now| (0..1000).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 20);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(300)), 3);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(1 << 40)), 20);
    }
}
