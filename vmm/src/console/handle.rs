//! What devices see of a console, and the state that they share with the main loop.
//!
//! ```text
//!   vCPU: device ──write()──► output lock: history, a queue per receiver ──► descriptor, unless it is full
//!                                                                 │ full: ring
//!   main loop (service.rs) ◄──────────────────────────────────────┘ waits for room, writes, then output_ready()
//!         │ reads at most INPUT_LIMIT ahead
//!         └──► input lock: pending bytes ──push()──► device          input_ready() ◄── device drained
//! ```
//!
//! Locks are taken in the order input, device, output; hence a device must not hold its own lock when it calls
//! [`ConsoleHandle::input_ready`] or [`ConsoleHandle::set_input`], and may hold it when it calls [`ConsoleHandle::write`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::doorbell::Doorbell;
use super::history::History;
use super::peer::{Flushed, Peer};
use super::{ConsoleInput, HOLD_BYTES, HOLD_TIME, INPUT_LIMIT, OUTPUT_HIGH, OUTPUT_LOW, Pressure};

/// A device's way to a console: output, and input with flow control. Clones are the same console.
#[derive(Clone, Debug)]
pub struct ConsoleHandle {
    pub(super) shared: Arc<Shared>,
}

/// State of a console that vCPU threads and the main loop share.
pub(super) struct Shared {
    /// For logs.
    pub(super) name: String,
    /// Absent for a console that leads nowhere.
    pub(super) doorbell: Option<Doorbell>,
    output: Mutex<Output>,
    input: Mutex<Input>,
}

/// The output side.
#[derive(Debug, Default)]
pub(super) struct Output {
    pub(super) peers: Vec<Peer>,
    pub(super) history: Option<History>,
    /// Devices were told to wait.
    congested: bool,
}

/// The input side.
#[derive(Default)]
struct Input {
    sink: Option<Arc<dyn ConsoleInput>>,
    pending: VecDeque<u8>,
    /// The main loop has stopped reading because `pending` is full.
    paused: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Console")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl ConsoleHandle {
    pub(super) fn new(name: &str, doorbell: Option<Doorbell>, history: Option<History>) -> Self {
        Self {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                doorbell,
                output: Mutex::new(Output {
                    history,
                    ..Output::default()
                }),
                input: Mutex::default(),
            }),
        }
    }

    /// A console without anybody at the other end: output is discarded, input never comes.
    pub fn null() -> Self {
        Self::new("null", None, None)
    }

    /// Shows `bytes`. Never waits; what the receivers cannot take is queued, up to 1 MiB for each.
    ///
    /// A few bytes without a line end may be held back for 5 ms to save system calls.
    ///
    /// [`Pressure::Congested`] asks the device to send no more until [`ConsoleInput::output_ready`]. Bytes that come all the
    /// same are taken, and lost only when a queue is full.
    pub fn write(&self, bytes: &[u8]) -> Pressure {
        let Some(doorbell) = &self.shared.doorbell else {
            return Pressure::Free;
        };
        let mut output = self.shared.output();
        if let Some(history) = &mut output.history {
            history.push(bytes);
        }
        let whole_line = bytes.contains(&b'\n');
        let mut held = false;
        let mut needs_loop = false;
        for peer in &mut output.peers {
            peer.enqueue(bytes);
            if whole_line || peer.pending() >= HOLD_BYTES {
                match peer.flush(false) {
                    Flushed::All => {}
                    // The main loop waits for this receiver already, or is about to write.
                    Flushed::NotHere if peer.blocked => {}
                    Flushed::NotHere => held = true,
                    Flushed::Blocked | Flushed::Gone(_) => needs_loop = true,
                }
            } else {
                held |= !peer.blocked;
            }
        }
        if !output.congested && output.exceeds(OUTPUT_HIGH) {
            output.congested = true;
            needs_loop = true;
        }
        let pressure = if output.congested {
            Pressure::Congested
        } else {
            Pressure::Free
        };
        drop(output);
        if needs_loop {
            doorbell.ring_now();
        } else if held {
            doorbell.ring_after(HOLD_TIME);
        }
        pressure
    }

    /// Sets who gets what people type, or takes it away. What was typed before waits until then.
    ///
    /// Not to be called with a lock held that [`ConsoleInput::push`] takes.
    pub fn set_input(&self, sink: Option<Arc<dyn ConsoleInput>>) {
        let mut input = self.shared.input();
        let previous = std::mem::replace(&mut input.sink, sink);
        input.deliver();
        self.shared.resume_reading(input);
        // Outside of the lock: it may be the last reference to the device, which may hold the last one to the console.
        drop(previous);
    }

    /// The device can take more input, after [`ConsoleInput::push`] accepted less than it was offered.
    ///
    /// Not to be called with a lock held that [`ConsoleInput::push`] takes.
    pub fn input_ready(&self) {
        let mut input = self.shared.input();
        input.deliver();
        self.shared.resume_reading(input);
    }

    /// Writes what is pending, waiting at most `timeout` for the receivers. Returns the number of bytes that are left.
    ///
    /// For the end of the VMM: it blocks the calling thread.
    pub fn flush(&self, timeout: Duration) -> usize {
        let deadline = Instant::now() + timeout;
        let mut output = self.shared.output();
        for peer in &mut output.peers {
            while peer.flush(true) == Flushed::Blocked {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || !matches!(peer.is_writable(left), Ok(true)) {
                    break;
                }
            }
        }
        output.peers.iter().map(Peer::pending).sum()
    }
}

impl Shared {
    pub(super) fn output(&self) -> MutexGuard<'_, Output> {
        // A panic while it was held leaves at worst a byte twice or not at all.
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was typed. At most [`Self::input_room`] bytes.
    pub(super) fn typed(&self, bytes: &[u8]) {
        let mut input = self.input();
        input.pending.extend(bytes);
        input.deliver();
    }

    /// How many bytes the main loop may read; with zero it is woken when that changes.
    pub(super) fn input_room(&self) -> usize {
        let mut input = self.input();
        let room = INPUT_LIMIT.saturating_sub(input.pending.len());
        input.paused = room == 0;
        room
    }

    /// The device that gets the input, if there is one.
    pub(super) fn sink(&self) -> Option<Arc<dyn ConsoleInput>> {
        self.input().sink.clone()
    }

    /// Wakes the main loop if it waits for room that there is now.
    fn resume_reading(&self, mut input: MutexGuard<'_, Input>) {
        if input.paused && input.pending.len() <= INPUT_LIMIT / 2 {
            input.paused = false;
            drop(input);
            if let Some(doorbell) = &self.doorbell {
                doorbell.ring_now();
            }
        }
    }
}

impl Input {
    /// Gives the device as much as it takes.
    fn deliver(&mut self) {
        let Some(sink) = &self.sink else { return };
        loop {
            let (bytes, _) = self.pending.as_slices();
            if bytes.is_empty() {
                return;
            }
            let offered = bytes.len();
            let accepted = sink.push(bytes).min(offered);
            self.pending.drain(..accepted);
            if accepted < offered {
                return;
            }
        }
    }
}

impl Output {
    /// Whether a receiver that is waited for has more than `limit` bytes pending.
    fn exceeds(&self, limit: usize) -> bool {
        self.peers
            .iter()
            .any(|peer| !peer.stuck && peer.pending() > limit)
    }

    /// Whether the devices, told to wait before, may go on now.
    pub(super) fn ends_congestion(&mut self) -> bool {
        let ends = self.congested && !self.exceeds(OUTPUT_LOW);
        self.congested &= !ends;
        ends
    }
}
