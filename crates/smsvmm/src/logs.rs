//! Standard error: the log, and the last word.
//!
//! A console on "stdio" puts the terminal into raw mode, in which a line break moves down only; so on a terminal each line
//! ends with carriage return and line feed, which a terminal in its normal mode shows alike.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::exit::UsageError;

/// Starts logging: `SMSVMM_LOG` if set ("debug", "warn,vmm::pci=trace"), else by the number of -v.
pub(crate) fn start(verbose: u8) -> anyhow::Result<()> {
    let filter =
        match std::env::var("SMSVMM_LOG") {
            Ok(text) if !text.is_empty() => text.parse::<Targets>().map_err(UsageError::new).with_context(
                || {
                    format!(
                        "SMSVMM_LOG={text} is not a filter; use for example \"info\" or \"warn,vmm=debug\""
                    )
                },
            )?,
            _ => Targets::new().with_default(match verbose {
                0 => LevelFilter::WARN,
                1 => LevelFilter::INFO,
                2 => LevelFilter::DEBUG,
                _ => LevelFilter::TRACE,
            }),
        };
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(move || Lines { terminal })
        .with_ansi(terminal)
        .with_target(verbose > 1);
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .init();
    Ok(())
}

/// Prints an error with all its causes.
pub(crate) fn complain(error: &anyhow::Error) {
    say(&format!("smsvmm: {error:#}"));
}

/// Prints a line for people.
pub(crate) fn say(line: &str) {
    let mut lines = Lines {
        terminal: io::stderr().is_terminal(),
    };
    // Nobody is left to be told when standard error is gone.
    let _ = lines.write_all(format!("{line}\n").as_bytes());
}

struct Lines {
    terminal: bool,
}

impl Write for Lines {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if self.terminal {
            for (number, line) in text.split(|byte| *byte == b'\n').enumerate() {
                if number > 0 {
                    stderr.write_all(b"\r\n")?;
                }
                stderr.write_all(line)?;
            }
        } else {
            stderr.write_all(text)?;
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
