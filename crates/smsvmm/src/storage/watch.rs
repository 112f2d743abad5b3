//! What a person sees, and can do, while an operation goes on: a line of progress on a terminal, Ctrl-C.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use api::storage::JobStatus;
use storage_manager::{Flow, Notice};

use crate::exit::Exit;
use crate::logs;
use crate::signals::Signals;

/// Cells of the bar.
const BAR: u64 = 24;

/// Shows progress and takes signals.
pub(crate) struct Watch {
    signals: Signals,
    stopping: bool,
    terminal: bool,
    /// There is a line of progress on the terminal.
    shown: bool,
}

impl Watch {
    /// To be made before any thread is started. Shows nothing on a standard output that is no terminal, or takes JSON.
    pub(crate) fn new(json: bool) -> anyhow::Result<Self> {
        Ok(Self {
            signals: Signals::block().context("cannot block signals")?,
            stopping: false,
            terminal: !json && io::stdout().is_terminal(),
            shown: false,
        })
    }

    /// For the operation to call now and then.
    pub(crate) fn notice(&mut self, notice: &Notice<'_>) -> Flow {
        while let Some(signal) = self.signals.arrived() {
            if self.stopping {
                // Whatever is being written may be cut off at any point: that is what the logs are for.
                self.clear();
                logs::say(&format!("smsvmm: {signal}: exit at once"));
                std::process::exit(Exit::Failed as i32);
            }
            self.clear();
            logs::say(&format!(
                "smsvmm: {signal}: closing the pool; again to exit at once"
            ));
            self.stopping = true;
        }
        if let Notice::Progress(jobs) = notice
            && let Some(job) = jobs.iter().find(|job| job.is_live())
            && self.terminal
            && !self.stopping
        {
            let more = match jobs.iter().filter(|job| job.is_live()).count() {
                0 | 1 => String::new(),
                count => format!(" and {} more", count - 1),
            };
            self.put(&format!("\r{}{more}\x1b[K", line(job)));
            self.shown = true;
        }
        match self.stopping {
            true => Flow::Stop,
            false => Flow::GoOn,
        }
    }

    /// Takes the line of progress away.
    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            self.put("\r\x1b[K");
        }
    }

    fn put(&self, text: &str) {
        let mut output = io::stdout().lock();
        // A terminal that is gone needs no progress.
        let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
    }
}

/// "[######------]  50 %  move volume a".
fn line(job: &JobStatus) -> String {
    let percent = job.percent();
    let full = percent * BAR / 100;
    let bar: String = (0..BAR).map(|cell| if cell < full { '#' } else { '-' }).collect();
    format!("[{bar}] {percent:3} %  job {}: {}", job.id, job.what)
}

#[cfg(test)]
mod tests {
    use api::storage::JobState;

    use super::*;

    #[test]
    fn progress_is_a_bar_with_a_number() {
        let job = JobStatus {
            id: 7,
            kind: "scrub".to_owned(),
            what: "check all volumes".to_owned(),
            state: JobState::Running,
            reason: None,
            done: 50,
            total: 100,
            throttle: 0,
        };
        assert_eq!(
            line(&job),
            "[############------------]  50 %  job 7: check all volumes"
        );
    }
}
