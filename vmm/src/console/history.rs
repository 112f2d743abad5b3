//! The last output of a console, for those who connect late.

use std::collections::VecDeque;

/// Keeps the newest bytes, up to a limit.
#[derive(Debug)]
pub(super) struct History {
    bytes: VecDeque<u8>,
    limit: usize,
    /// Whether something has been forgotten, so that the first line is probably not whole.
    truncated: bool,
}

impl History {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            limit,
            truncated: false,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let newest = &bytes[bytes.len().saturating_sub(self.limit)..];
        let excess = (self.bytes.len() + newest.len()).saturating_sub(self.limit);
        self.truncated |= excess > 0 || newest.len() < bytes.len();
        self.bytes.drain(..excess);
        self.bytes.extend(newest);
    }

    /// What to show somebody new: everything kept, from the first whole line on.
    pub(super) fn replay(&self) -> Vec<u8> {
        let line_start = match self.bytes.iter().position(|byte| *byte == b'\n') {
            Some(newline) if self.truncated => newline + 1,
            _ => 0,
        };
        self.bytes.range(line_start..).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replay_gives_everything_while_it_fits() {
        let mut history = History::new(16);
        history.push(b"one\n");
        history.push(b"two");
        assert_eq!(history.replay(), b"one\ntwo");
    }

    #[test]
    fn replay_of_a_truncated_history_starts_at_a_line() {
        let mut history = History::new(8);
        history.push(b"first\n");
        history.push(b"ab\ncd");
        assert_eq!(history.replay(), b"ab\ncd");
        history.push(b"0123456789abcdef");
        assert_eq!(history.replay(), b"89abcdef", "without any line end all is shown");
    }
}
