//! What a person sees, and can do, while an operation goes on: a line of progress on a terminal, Ctrl-C.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use api::storage::JobStatus;
use storage_manager::{Flow, Notice, Work};

use super::show;
use crate::exit::Exit;
use crate::logs;
use crate::signals::Signals;

/// Cells of the bar.
const BAR: u64 = 24;

/// Shows progress and takes signals.
pub(crate) struct Watch {
    signals: Signals,
    stopping: bool,
    /// What a signal makes it do.
    end: &'static str,
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
            end: "closing the pool",
            terminal: !json && io::stdout().is_terminal(),
            shown: false,
        })
    }

    /// The pool is not open here: a signal breaks off what is done with it.
    pub(crate) fn breaks_off(&mut self) {
        self.end = "breaking it off";
    }

    /// Another process does it, and goes on.
    pub(crate) fn leaves_it(&mut self) {
        self.end = "not waiting for it";
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
            logs::say(&format!("smsvmm: {signal}: {}; again to exit at once", self.end));
            self.stopping = true;
        }
        if self.terminal && !self.stopping {
            let line = match notice {
                Notice::Progress(jobs) => line_of_jobs(jobs),
                Notice::Work(work) => Some(line_of_work(work)),
                Notice::Tick => None,
            };
            if let Some(line) = line {
                self.put(&format!("\r{line}\x1b[K"));
                self.shown = true;
            }
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

fn line_of_jobs(jobs: &[JobStatus]) -> Option<String> {
    let job = jobs.iter().find(|job| job.is_live())?;
    let more = match jobs.iter().filter(|job| job.is_live()).count() {
        0 | 1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    Some(format!(
        "{}{more}",
        line(
            job.percent(),
            &format!("job {}: {}{}", job.id, job.what, pace(job))
        )
    ))
}

/// ", 3M/s, 1:15 left", as far as it is known.
fn pace(job: &JobStatus) -> String {
    let rate = job.rate.map(|rate| format!(", {}/s", show::size(rate)));
    let left = job
        .seconds_left
        .map(|left| format!(", {} left", show::time_left(left)));
    rate.unwrap_or_default() + &left.unwrap_or_default()
}

/// As a job; or only how much, if nobody knows of how much.
fn line_of_work(work: &Work) -> String {
    match (u128::from(work.done) * 100).checked_div(u128::from(work.total)) {
        Some(percent) => line(u64::try_from(percent).unwrap_or(100).min(100), &work.what),
        None => format!("{}: {}", work.what, show::size(work.done)),
    }
}

/// "[######------]  50 %  move volume a".
fn line(percent: u64, what: &str) -> String {
    let full = percent * BAR / 100;
    let bar: String = (0..BAR).map(|cell| if cell < full { '#' } else { '-' }).collect();
    format!("[{bar}] {percent:3} %  {what}")
}

#[cfg(test)]
mod tests {
    use api::storage::{JobPriority, JobState};

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
            priority: JobPriority::Normal,
            rate: Some(3 << 20),
            seconds_left: Some(75),
            volatile: false,
            moved: None,
        };
        assert_eq!(
            line_of_jobs(&[job]).unwrap(),
            "[############------------]  50 %  job 7: check all volumes, 3M/s, 1:15 left"
        );
    }

    #[test]
    fn work_of_unknown_length_is_a_size() {
        let mut work = Work {
            what: "write /a".to_owned(),
            done: 3 << 20,
            total: 0,
        };
        assert_eq!(line_of_work(&work), "write /a: 3M");
        work.total = 12 << 20;
        assert_eq!(line_of_work(&work), "[######------------------]  25 %  write /a");
    }
}
