//! The debug port 0xE9 (as in Bochs), by which a guest leaves marks with the time since the VM started, and the POST code
//! port 0x80, to which guests write to pass the time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::rate_limit::RateLimit;
use crate::bus::BusDevice;

/// Port of the debug port.
pub const PORT_DEBUG: u16 = 0xe9;
/// Port of POST codes.
pub const PORT_POST: u16 = 0x80;

/// Longer lines are cut into pieces.
const LINE_MAX: usize = 256;
/// Lines that are logged at once, and per second then.
const LOG_BURST: u32 = 100;

/// Who is told of each line, and the time since the VM started.
pub type MarkHandler = Arc<dyn Fn(&str, Duration) + Send + Sync>;

/// The debug port: bytes make lines.
pub struct DebugPort {
    state: Mutex<State>,
    handler: MarkHandler,
}

struct State {
    line: Vec<u8>,
    started: Instant,
    rate: RateLimit,
}

impl DebugPort {
    /// A port whose lines go to the log and to `handler`; times count from `started`.
    pub fn new(started: Instant, handler: MarkHandler) -> Arc<Self> {
        let state = State {
            line: Vec::new(),
            started,
            rate: RateLimit::new(LOG_BURST, Duration::from_secs(1)),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            handler,
        })
    }

    /// The VM starts (again) now.
    pub fn restart(&self, started: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.line.clear();
        state.started = started;
    }

    fn put(&self, byte: u8) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if byte != b'\n' {
            state.line.push(byte);
            if state.line.len() < LINE_MAX {
                return;
            }
        }
        let now = Instant::now();
        let since = now.saturating_duration_since(state.started);
        let bytes = std::mem::take(&mut state.line);
        let allowed = state.rate.allow(now);
        drop(state);
        // Control characters of a guest do not belong on the host's terminal.
        let text: String = String::from_utf8_lossy(&bytes)
            .chars()
            .filter(|character| !character.is_control())
            .collect();
        if text.is_empty() {
            return;
        }
        if let Some(suppressed) = allowed {
            let after = format!("{} ms after start", since.as_millis());
            tracing::info!(suppressed, "guest wrote '{text}' {after}");
        }
        (self.handler)(&text, since);
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // This value says that the port is there.
        data.fill(0xe9);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        data.iter().for_each(|byte| self.put(*byte));
    }
}

/// Port 0x80: takes everything, for nothing.
#[derive(Debug)]
pub struct PostPort;

impl BusDevice for PostPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::read_byte;

    fn port() -> (Arc<DebugPort>, Arc<Mutex<Vec<String>>>) {
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let seen = lines.clone();
        let handler: MarkHandler = Arc::new(move |line, _| seen.lock().unwrap().push(line.to_owned()));
        (DebugPort::new(Instant::now(), handler), lines)
    }

    #[test]
    fn bytes_become_lines_without_control_characters() {
        let (port, lines) = port();
        assert_eq!(read_byte(&*port, 0), 0xe9);
        for byte in b"in\x1bit\r\n\nno end" {
            port.write(0, &[*byte]);
        }
        assert_eq!(*lines.lock().unwrap(), ["init"]);
    }

    #[test]
    fn an_endless_line_is_cut() {
        let (port, lines) = port();
        (0..LINE_MAX * 2 + 5).for_each(|_| port.write(0, b"x"));
        let lengths: Vec<usize> = lines.lock().unwrap().iter().map(String::len).collect();
        assert_eq!(lengths, [LINE_MAX, LINE_MAX]);
    }

    #[test]
    fn a_mark_carries_the_time_since_the_start() {
        let started = Instant::now().checked_sub(Duration::from_millis(1500)).unwrap();
        let times = Arc::<Mutex<Vec<Duration>>>::default();
        let seen = times.clone();
        let port = DebugPort::new(started, Arc::new(move |_, at| seen.lock().unwrap().push(at)));
        port.write(0, b"mark\n");
        assert!(times.lock().unwrap()[0] >= Duration::from_millis(1500));
    }
}
