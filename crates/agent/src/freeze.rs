//! File systems stand still while the host makes a snapshot of all disks under them.
//!
//! # Hazards
//! - *The host does not answer.* A second thread thaws when the time is over, whatever the first one waits for: nothing stays frozen.
//! - *This program ends.* Its signals end it before anything is frozen or after all is thawed: they are blocked meanwhile. Against SIGKILL there
//!   is no help but `fsfreeze --unfreeze`.
//! - *It freezes what it needs itself.* Everything that is read or written is so before and after, not meanwhile; the answer is kept in
//!   memory that is there.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::host::AgentError;
use crate::mounts;

/// `FIFREEZE` and `FITHAW` (linux/fs.h).
const FREEZE: libc::Ioctl = 0xc004_5877;
const THAW: libc::Ioctl = 0xc004_5878;

fn here(what: impl Into<String>) -> impl FnOnce(io::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::Here { what, source }
}

/// A file system that is to be frozen.
#[derive(Debug)]
pub(crate) struct FileSystem {
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
    root: File,
    /// Names of the disks below it: `sda`.
    pub(crate) disks: BTreeSet<String>,
}

/// The disks that a block device is made of: itself, the disk of which it is a partition, those below it.
pub(crate) fn disks_of(folder: &Path, found: &mut BTreeSet<String>, depth: u32) {
    let slaves: Vec<_> = fs::read_dir(folder.join("slaves"))
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    if depth < 8 && !slaves.is_empty() {
        for slave in slaves {
            disks_of(&slave.path(), found, depth + 1);
        }
        return;
    }
    let Ok(real) = fs::canonicalize(folder) else {
        return;
    };
    let disk = match real.join("partition").exists() {
        true => real.parent(),
        false => Some(real.as_path()),
    };
    let name = disk.and_then(Path::file_name);
    found.extend(name.map(|name| name.to_string_lossy().into_owned()));
}

/// The file systems on which `files` are, each once.
pub(crate) fn file_systems(files: &[PathBuf]) -> Result<Vec<FileSystem>, AgentError> {
    let mounts = mounts::all().map_err(here("/proc/self/mountinfo"))?;
    let mut seen = BTreeSet::new();
    let mut found: Vec<FileSystem> = Vec::new();
    for file in files {
        let metadata = fs::metadata(file).map_err(here(file.display().to_string()))?;
        let device = (libc::major(metadata.dev()), libc::minor(metadata.dev()));
        if !seen.insert(device) {
            continue;
        }
        let no_disk = || AgentError::Text(format!("{} is not on a file system of one disk", file.display()));
        let mount = mounts::of_device(&mounts, device)
            .ok_or_else(no_disk)?
            .point
            .clone();
        let root = File::open(&mount).map_err(here(mount.display().to_string()))?;
        let mut disks = BTreeSet::new();
        let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", device.0, device.1));
        disks_of(&folder, &mut disks, 0);
        if disks.is_empty() {
            return Err(no_disk());
        }
        found.push(FileSystem { mount, root, disks });
    }
    Ok(found)
}

/// Signals that end a program wait until this is dropped.
struct Uninterrupted(libc::sigset_t);

impl Uninterrupted {
    fn begin() -> Self {
        // SAFETY: the sets are memory of this function, and initialised by the calls before they are read.
        unsafe {
            let mut blocked = std::mem::zeroed::<libc::sigset_t>();
            let mut before = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut blocked);
            for signal in [
                libc::SIGINT,
                libc::SIGTERM,
                libc::SIGHUP,
                libc::SIGPIPE,
                libc::SIGQUIT,
            ] {
                libc::sigaddset(&raw mut blocked, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Uninterrupted {
    fn drop(&mut self) {
        // SAFETY: the set is as the kernel gave it.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

fn control(file: &File, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: these requests take no memory.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, 0) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// For how long file systems stood still, in its parts, which follow one another.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Still {
    /// Freezing, from the first file system on: waits for who writes right now, and flushes what was written since the last time.
    pub(crate) flush: Duration,
    /// What was done meanwhile: until the host has answered that the image is there.
    pub(crate) act: Duration,
    /// Thawing, until the last one goes on.
    pub(crate) thaw: Duration,
}

impl Still {
    /// All of it.
    pub(crate) fn whole(&self) -> Duration {
        self.flush + self.act + self.thaw
    }

    /// The same for people and programs.
    pub(crate) fn parts(&self) -> Parts {
        let milliseconds = |time: Duration| {
            let microseconds = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
            f64::from(microseconds) / 1000.0
        };
        Parts {
            frozen_ms: milliseconds(self.whole()),
            flush_ms: milliseconds(self.flush),
            image_ms: milliseconds(self.act),
            thaw_ms: milliseconds(self.thaw),
        }
    }
}

/// For how long file systems stood still, in milliseconds with three decimals; 71 minutes and more are 4294967.295.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Parts {
    /// All of it, the sum of the following.
    frozen_ms: f64,
    /// The file systems' own flush.
    flush_ms: f64,
    /// The command to the host.
    image_ms: f64,
    /// Thawing.
    thaw_ms: f64,
}

impl fmt::Display for Parts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            frozen_ms,
            flush_ms,
            image_ms,
            thaw_ms,
        } = self;
        write!(
            formatter,
            "{frozen_ms:.1} ms: {flush_ms:.1} ms to be flushed, {image_ms:.1} ms for the image, {thaw_ms:.1} ms to be thawed"
        )
    }
}

/// Runs `act` while all file systems are frozen; what it made, and how long that was. They are thawed after `limit` in any case, and that is
/// an error.
pub(crate) fn while_frozen<T>(
    systems: &[FileSystem],
    limit: Duration,
    act: impl FnOnce() -> Result<T, AgentError>,
) -> Result<(T, Still), AgentError> {
    // Most is flushed before, while everything goes on.
    for system in systems {
        // SAFETY: it takes no memory.
        unsafe { libc::syncfs(system.root.as_raw_fd()) };
    }
    let _signals = Uninterrupted::begin();
    // Those that are frozen now; whoever takes one out thaws it.
    let frozen: Mutex<Vec<&FileSystem>> = Mutex::new(Vec::new());
    let thaw = || {
        let mut all = frozen.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.len();
        for system in all.drain(..).rev() {
            // There is nothing else that could be tried.
            let _ = control(&system.root, THAW);
        }
        count
    };
    let thaw = &thaw;
    let (done, watched) = channel::<()>();
    std::thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            matches!(watched.recv_timeout(limit), Err(RecvTimeoutError::Timeout)) && thaw() > 0
        });
        let begin = Instant::now();
        let mut result = Ok(());
        for system in systems {
            let mut all = frozen.lock().unwrap_or_else(PoisonError::into_inner);
            match control(&system.root, FREEZE) {
                Ok(()) => all.push(system),
                Err(source) => {
                    let what = format!("{} cannot be frozen", system.mount.display());
                    result = Err(AgentError::Here { what, source });
                    break;
                }
            }
        }
        let flushed = begin.elapsed();
        let result = result.and_then(|()| act());
        let acted = begin.elapsed();
        thaw();
        let duration = begin.elapsed();
        drop(done);
        let late = watchdog.join().unwrap_or(false) || duration > limit;
        match result {
            Ok(_) if late => Err(AgentError::Text(format!(
                "the host took longer than {} s, and the file systems were thawed meanwhile: the image is not one of a frozen state",
                limit.as_secs()
            ))),
            result => result.map(|made| {
                let still = Still {
                    flush: flushed,
                    act: acted.saturating_sub(flushed),
                    thaw: duration.saturating_sub(acted),
                };
                (made, still)
            }),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_frozen_is_an_error_and_nothing_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let system = FileSystem {
            mount: folder.path().to_owned(),
            // Neither a folder nor allowed.
            root: File::open("/dev/null").unwrap(),
            disks: BTreeSet::new(),
        };
        let acted = while_frozen(&[system], Duration::from_secs(1), || Ok(()));
        assert!(matches!(acted, Err(AgentError::Here { .. })), "{acted:?}");
    }
    #[test]
    fn the_parts_of_the_time_are_what_took_it() {
        let act = || {
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        };
        let ((), still) = while_frozen(&[], Duration::from_secs(60), act).unwrap();
        assert!(still.act >= Duration::from_millis(20), "{still:?}");
        assert_eq!(still.whole(), still.flush + still.act + still.thaw);
    }

    #[test]
    fn parts_are_told_in_milliseconds() {
        let still = Still {
            flush: Duration::from_micros(40_250),
            act: Duration::from_micros(7_500),
            thaw: Duration::from_micros(250),
        };
        assert_eq!(
            still.parts().to_string(),
            "48.0 ms: 40.2 ms to be flushed, 7.5 ms for the image, 0.2 ms to be thawed"
        );
        assert_eq!(
            serde_json::to_string(&still.parts()).unwrap(),
            r#"{"frozen-ms":48.0,"flush-ms":40.25,"image-ms":7.5,"thaw-ms":0.25}"#
        );
    }
}
