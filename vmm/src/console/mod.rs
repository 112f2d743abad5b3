//! Consoles: where the text of a serial port or a virtio-console goes, and where keystrokes come from.
//!
//! A device knows a [`ConsoleHandle`] and nothing of terminals or sockets. Writing never makes a vCPU wait: the bytes go to
//! the descriptor at once if it takes them, else into a bounded queue that the main loop empties. Input is read only as
//! far as the guest takes it, so whoever pastes a file waits, and nothing is lost. Output has the same, softer: a device
//! is told when receivers fall behind ([`Pressure`]) and may wait, but not for ever for one that is stuck.
//!
//! An idle console costs nothing: no timer runs and nothing is polled.

mod doorbell;
mod escape;
mod handle;
mod history;
mod listener;
mod open;
mod peer;
mod pty;
mod service;
mod source;
mod stdio;
#[cfg(test)]
mod stdio_tests;
pub mod terminal;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use escape::{ConsoleCommand, EscapeAction, EscapeFilter};
pub use handle::ConsoleHandle;
pub use open::{Console, ConsoleOptions};

/// A receiver's queue holds at most this much; what comes then is lost, and reported.
const OUTPUT_LIMIT: usize = 1 << 20;
/// With more than this in a queue devices are asked to wait ...
const OUTPUT_HIGH: usize = 256 << 10;
/// ... until there is no more than this.
const OUTPUT_LOW: usize = 64 << 10;
/// A receiver that takes nothing for this long is not waited for any more.
const STUCK_AFTER: Duration = if cfg!(test) {
    Duration::from_secs(1)
} else {
    Duration::from_secs(5)
};
/// Output is held back for at most this long ...
const HOLD_TIME: Duration = Duration::from_millis(5);
/// ... and up to this many bytes, in the hope for the rest of the line.
const HOLD_BYTES: usize = 512;
/// So much is read ahead of the guest.
const INPUT_LIMIT: usize = 64 << 10;
/// Late clients are shown so much of what was written before.
const HISTORY_LIMIT: usize = 64 << 10;
/// Clients of a socket at one time; one more replaces the oldest.
const CLIENTS_MAX: usize = 8;
/// What is pending when a console is dropped gets so much time.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Who carries out what a person asks for with the escape key. Called on the main loop, must not wait.
pub type CommandHandler = Arc<dyn Fn(ConsoleCommand) + Send + Sync>;

/// Why a console cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// A file, socket or link.
    #[error("cannot {action} {} of a console", path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// There is something that is not to be overwritten.
    #[error("{} exists and is not a {kind}; remove it, or choose another path for the console", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
        /// What might have been replaced.
        kind: &'static str,
    },
    /// Somebody else listens on the socket.
    #[error("another process listens on {}; choose another path for the console", .0.display())]
    InUse(PathBuf),
    /// The path does not fit into a socket's address.
    #[error("the path {} is too long for a socket (107 bytes at most); choose another for the console", .0.display())]
    PathTooLong(PathBuf),
    /// The operating system refused something else.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

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
