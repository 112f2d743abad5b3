//! A guest's console as a test sees it: text that grows, in which it waits for words.

use std::io::{Read, Write as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Text that a thread collects from a stream.
#[derive(Clone, Default)]
pub(crate) struct Console {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Where the next search begins: after what was found last.
    position: usize,
    /// Whether what comes is also shown on standard output.
    echo: bool,
    ended: bool,
}

impl Console {
    /// Collects from a stream until its end.
    pub(crate) fn collect(mut stream: impl Read + Send + 'static) -> Self {
        let console = Self::default();
        let writer = console.clone();
        std::thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            loop {
                let count = stream.read(&mut chunk).unwrap_or(0);
                let new = chunk.get(..count).unwrap_or_default();
                let mut state = writer.lock();
                if state.echo {
                    show(new);
                }
                state.bytes.extend_from_slice(new);
                state.ended = count == 0;
                let ended = state.ended;
                drop(state);
                writer.shared.1.notify_all();
                if ended {
                    return;
                }
            }
        });
        console
    }

    /// From now on, shows what comes on standard output; begins with what has come already.
    pub(crate) fn echo(&self) {
        let mut state = self.lock();
        show(&state.bytes);
        state.echo = true;
    }

    /// All text until now. Carriage returns are left out.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).replace('\r', "")
    }

    /// Waits for text that comes after what was waited for last; returns what came before it.
    pub(crate) fn until(&self, text: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        // What was searched in vain is not searched again.
        let mut from = state.position;
        loop {
            let rest = state.bytes.get(from..).unwrap_or_default();
            if let Some(found) = find(rest, text.as_bytes()) {
                let before = state.bytes.get(state.position..from + found);
                let before = String::from_utf8_lossy(before.unwrap_or_default()).replace('\r', "");
                state.position = from + found + text.len();
                return Ok(before);
            }
            from = from.max((state.bytes.len() + 1).saturating_sub(text.len()));
            let left = end.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let how = if state.ended { "ended" } else { "went on" };
                let all = String::from_utf8_lossy(&state.bytes).replace('\r', "");
                bail!("the console {how} without {text:?} within {limit:?}; it says:\n{all}");
            }
            state = self
                .shared
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until the stream has ended; false if it does not in time.
    pub(crate) fn wait_for_end(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        while !state.ended {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .shared
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn show(bytes: &[u8]) {
    let mut out = std::io::stdout();
    // Nobody reads: nothing to do about it.
    drop(out.write_all(bytes).and_then(|()| out.flush()));
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_search_begins_after_the_last_find() {
        let console = Console::collect(&b"login: root\r\nlogin: again"[..]);
        let limit = Duration::from_secs(5);
        assert_eq!(console.until("login:", limit).unwrap(), "");
        assert_eq!(console.until("login:", limit).unwrap(), " root\n");
        let error = console.until("login:", limit).unwrap_err().to_string();
        assert!(error.contains("ended without"), "{error}");
        assert_eq!(console.text(), "login: root\nlogin: again");
    }
}
