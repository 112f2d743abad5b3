//! Keeps a guest from filling the host's log.

use std::time::{Duration, Instant};

/// At most this many log lines per queue …
const LINES: u32 = 10;
/// … in this time.
const PERIOD: Duration = Duration::from_secs(5);

/// Counts lines of one source.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    since: Option<Instant>,
    lines: u32,
}

impl LogLimit {
    /// Whether one more line may be written now.
    pub(crate) fn admits(&mut self) -> bool {
        let now = Instant::now();
        if self.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            *self = Self {
                since: Some(now),
                lines: 0,
            };
        }
        self.lines += 1;
        self.lines <= LINES
    }
}
