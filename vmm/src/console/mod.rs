//! Consoles: where the text of a serial port or a virtio-console goes, and where keystrokes come from.
//!
//! A device knows a [`ConsoleHandle`] and nothing of terminals or sockets. Writing never makes a vCPU wait: the bytes go to
//! the descriptor at once if it takes them, else into a bounded queue that the main loop empties. Input is read only as
//! far as the guest takes it, so whoever pastes a file waits, and nothing is lost. Output has the same, softer: a device
//! is told when receivers fall behind ([`Pressure`]) and may wait, but not for ever for one that is stuck.
//!
//! An idle console costs nothing: no timer runs and nothing is polled.

#![allow(dead_code)] // The back ends follow at once.

mod doorbell;
mod handle;
mod history;
mod peer;

use std::time::Duration;

pub use handle::ConsoleHandle;

/// A receiver's queue holds at most this much; what comes then is lost, and reported.
const OUTPUT_LIMIT: usize = 1 << 20;
/// With more than this in a queue devices are asked to wait ...
const OUTPUT_HIGH: usize = 256 << 10;
/// ... until there is no more than this.
const OUTPUT_LOW: usize = 64 << 10;
/// A receiver that takes nothing for this long is not waited for any more.
const STUCK_AFTER: Duration = Duration::from_secs(5);
/// Output is held back for at most this long ...
const HOLD_TIME: Duration = Duration::from_millis(2);
/// ... and up to this many bytes, in the hope for the rest of the line.
const HOLD_BYTES: usize = 512;
/// So much is read ahead of the guest.
const INPUT_LIMIT: usize = 64 << 10;

/// A device that takes input from a console.
pub trait ConsoleInput: Send + Sync {
    /// Takes bytes and returns how many. If not all, the device calls [`ConsoleHandle::input_ready`] once it can take
    /// more. Called from any thread, must not wait, and must not call the console's `input_ready` or `set_input`.
    fn push(&self, bytes: &[u8]) -> usize;

    /// Output may go on after [`Pressure::Congested`].
    fn output_ready(&self) {}
}

/// Whether a console's receivers keep up with its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressure {
    /// They do.
    Free,
    /// They do not: better wait for [`ConsoleInput::output_ready`].
    Congested,
}
