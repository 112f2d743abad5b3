//! How far jobs are: a line that is renewed on a terminal; elsewhere a line whenever one has got on by a tenth.

use std::io::{self, IsTerminal, Write};

use api::storage::JobStatus;

use crate::show;

/// Between two lines where there is no terminal, in percent.
const STEP: u64 = 10;

/// Where it is told how far jobs are. Standard output is for what they come to.
pub(crate) struct Progress {
    /// Nobody wants to read it.
    quiet: bool,
    terminal: bool,
    /// There is a line on the terminal.
    shown: bool,
    /// What was told of each job.
    told: Vec<(u32, u64)>,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            terminal: io::stderr().is_terminal(),
            shown: false,
            told: Vec::new(),
        }
    }

    /// So far they are.
    pub(crate) fn show(&mut self, jobs: &[JobStatus]) {
        if self.quiet {
            return;
        }
        if self.terminal {
            put(&format!("\r{}\x1b[K", show::progress(jobs)));
            self.shown = true;
            return;
        }
        for job in jobs.iter().filter(|job| self.is_news(job)).collect::<Vec<_>>() {
            put(&format!("{}\n", show::progress(std::slice::from_ref(job))));
            self.told.retain(|(id, _)| *id != job.id);
            self.told.push((job.id, job.percent()));
        }
    }

    fn is_news(&self, job: &JobStatus) -> bool {
        let told = self.told.iter().find(|(id, _)| *id == job.id);
        job.is_live() && told.is_none_or(|(_, percent)| job.percent() >= percent + STEP)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            put("\r\x1b[K");
        }
    }
}

fn put(text: &str) {
    // Who does not want to read it any more is no error.
    let mut output = io::stderr().lock();
    let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

#[cfg(test)]
mod tests {
    use api::storage::{JobPriority, JobState};

    use super::*;

    #[test]
    fn where_there_is_no_terminal_each_tenth_is_told_once() {
        let mut job = JobStatus {
            id: 3,
            kind: "move-disk".into(),
            what: "move /a.dsk to volume fast".into(),
            state: JobState::Running,
            reason: None,
            done: 0,
            total: 1 << 30,
            throttle: 0,
            priority: JobPriority::Normal,
            rate: Some(2 << 20),
            seconds_left: Some(200),
            volatile: true,
            moved: None,
        };
        let mut progress = Progress::new(false);
        progress.terminal = false;
        let mut told = Vec::new();
        for percent in 0..100 {
            job.done = (job.total / 100) * percent + 1;
            if progress.is_news(&job) {
                told.push(percent);
                progress.show(std::slice::from_ref(&job));
            }
        }
        assert_eq!(told.len(), 10, "{told:?}");
        job.done = 512 << 20;
        assert_eq!(
            show::progress(&[job.clone()]),
            "job 3: 50 %, 512M of 1G, 2M/s, 4 min left: move /a.dsk to volume fast"
        );
        job.state = JobState::Done;
        assert!(!progress.is_news(&job) && show::progress(&[job]).is_empty());
    }
}
