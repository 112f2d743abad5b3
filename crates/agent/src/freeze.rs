//! File systems stand still while the host makes a snapshot of all disks under them.
//!
//! ```text
//!   flush    all at once, twice: while the largest was flushed, the others were written on           nothing stands still yet
//!   freeze   all at once, each on a thread of its own: what is still to be flushed does not add up   ◄── the limit counts from here
//!   act      one snapshot of all disks
//!   thaw     all at once, each by its thread
//! ```
//!
//! # Hazards
//! - *The host does not answer, or a file system takes long to freeze.* A watchdog has all thaw when the time is over, whatever else is waited
//!   for: nothing stays frozen. One whose freezing comes to an end later is thawed at once.
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
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ScopedJoinHandle};
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

/// What can be made to stand still.
pub(crate) trait Freezable: Sync {
    /// What people call it.
    fn name(&self) -> String;

    /// Writes what is not written yet, while everything goes on. Nothing depends on it.
    fn flush(&self);

    /// Makes it stand still: nothing is written to it any more when this returns.
    fn freeze(&self) -> io::Result<()>;

    /// Lets it go on.
    fn thaw(&self) -> io::Result<()>;
}

impl Freezable for FileSystem {
    fn name(&self) -> String {
        self.mount.display().to_string()
    }

    fn flush(&self) {
        // SAFETY: it takes no memory.
        unsafe { libc::syncfs(self.root.as_raw_fd()) };
    }

    fn freeze(&self) -> io::Result<()> {
        control(&self.root, FREEZE)
    }

    fn thaw(&self) -> io::Result<()> {
        control(&self.root, THAW)
    }
}

/// For how long file systems stood still, in its parts, which follow one another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Still {
    /// Freezing, from the first file system on until the last: waits for who writes right now, and flushes what was written since the last time.
    pub(crate) flush: Duration,
    /// What was done meanwhile: until the host has answered that the image is there.
    pub(crate) act: Duration,
    /// Thawing, until the last one goes on.
    pub(crate) thaw: Duration,
    /// Of each file system by itself.
    pub(crate) each: Vec<One>,
}

/// For how long one file system stood still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct One {
    /// Where it is mounted.
    pub(crate) name: String,
    /// Freezing it.
    pub(crate) flush: Duration,
    /// From the moment in which freezing it began until it went on.
    pub(crate) whole: Duration,
}

fn milliseconds(time: Duration) -> f64 {
    let microseconds = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
    f64::from(microseconds) / 1000.0
}

impl Still {
    /// All of it.
    pub(crate) fn whole(&self) -> Duration {
        self.flush + self.act + self.thaw
    }

    /// The same for people and programs.
    pub(crate) fn parts(&self) -> Parts {
        let each = self.each.iter().map(|one| OnePart {
            mount: one.name.clone(),
            flush_ms: milliseconds(one.flush),
            frozen_ms: milliseconds(one.whole),
        });
        Parts {
            frozen_ms: milliseconds(self.whole()),
            flush_ms: milliseconds(self.flush),
            image_ms: milliseconds(self.act),
            thaw_ms: milliseconds(self.thaw),
            file_systems: each.collect(),
        }
    }
}

/// For how long file systems stood still, in milliseconds with three decimals; 71 minutes and more are 4294967.295.
#[derive(Debug, Clone, PartialEq, Serialize)]
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
    /// Each by itself: none stood still for longer than all together.
    file_systems: Vec<OnePart>,
}

/// One file system of [`Parts`].
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct OnePart {
    mount: String,
    flush_ms: f64,
    frozen_ms: f64,
}

impl fmt::Display for Parts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            frozen_ms,
            flush_ms,
            image_ms,
            thaw_ms,
            file_systems,
        } = self;
        write!(
            formatter,
            "{frozen_ms:.1} ms: {flush_ms:.1} ms to be flushed, {image_ms:.1} ms for the image, {thaw_ms:.1} ms to be thawed"
        )?;
        if file_systems.len() < 2 {
            return Ok(());
        }
        for (number, one) in file_systems.iter().enumerate() {
            let before = if number == 0 { "; " } else { ", " };
            write!(formatter, "{before}{} {:.1} ms", one.mount, one.frozen_ms)?;
        }
        Ok(())
    }
}

/// How far those who freeze are.
#[derive(Debug, Default)]
struct State {
    /// So many stand still.
    frozen: usize,
    /// What could not be frozen first, and why.
    failed: Option<(String, io::Error)>,
    /// All are to go on.
    over: bool,
    /// That is so because the time was over.
    late: bool,
}

/// What the threads that freeze, the one that acts and the watchdog know of each other.
#[derive(Debug, Default)]
struct Stand {
    state: Mutex<State>,
    changed: Condvar,
}

impl Stand {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(state, condition);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes, and thaws when it is over.
    fn hold(&self, system: &impl Freezable, name: String) -> One {
        let begin = Instant::now();
        let frozen = system.freeze();
        let flush = begin.elapsed();
        let stands = frozen.is_ok();
        self.change(|state| match frozen {
            Ok(()) => state.frozen += 1,
            Err(error) => drop(state.failed.get_or_insert((name.clone(), error))),
        });
        if stands {
            drop(self.wait_while(|state| !state.over));
            // There is nothing else that could be tried.
            let _ = system.thaw();
        }
        One {
            name,
            flush,
            whole: begin.elapsed(),
        }
    }

    /// Waits until all stand still.
    fn all_stand(&self, count: usize, limit: Duration) -> Result<(), AgentError> {
        let mut state =
            self.wait_while(|state| state.frozen < count && state.failed.is_none() && !state.over);
        if let Some((name, source)) = state.failed.take() {
            let what = format!("{name} cannot be frozen");
            return Err(AgentError::Here { what, source });
        }
        match state.over {
            true => Err(AgentError::Text(format!(
                "not all file systems could be frozen within {} s, and they go on: there is no image; try again when less is written, or \
                 allow more time with --limit",
                limit.as_secs()
            ))),
            false => Ok(()),
        }
    }

    /// Has all go on when the time is over.
    fn watch(&self, begin: Instant, limit: Duration) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left = limit.saturating_sub(begin.elapsed());
        let waited = self.changed.wait_timeout_while(state, left, |state| !state.over);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !state.over {
            (state.over, state.late) = (true, true);
            drop(state);
            self.changed.notify_all();
        }
    }
}

/// All go on when this is dropped, whatever happens.
struct Over<'a>(&'a Stand);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.over = true);
    }
}

/// Writes what is not written yet, of all at once.
fn flush(systems: &[impl Freezable]) {
    thread::scope(|scope| {
        for system in systems {
            scope.spawn(|| system.flush());
        }
    });
}

/// Runs `act` while all file systems are frozen; what it made, and how long that was. They are thawed `limit` after the first one began to be
/// frozen in any case, and that is an error.
pub(crate) fn while_frozen<T>(
    systems: &[impl Freezable],
    limit: Duration,
    act: impl FnOnce() -> Result<T, AgentError>,
) -> Result<(T, Still), AgentError> {
    // Most is flushed before, while everything goes on; and again, as others were written on while one was flushed for long.
    flush(systems);
    flush(systems);
    let _signals = Uninterrupted::begin();
    let stand = &Stand::default();
    thread::scope(|scope| {
        let over = Over(stand);
        let begin = Instant::now();
        scope.spawn(move || stand.watch(begin, limit));
        let holding: Vec<ScopedJoinHandle<'_, One>> = systems
            .iter()
            .map(|system| {
                let name = system.name();
                scope.spawn(move || stand.hold(system, name))
            })
            .collect();
        let stands = stand.all_stand(systems.len(), limit);
        let flushed = begin.elapsed();
        let result = stands.and_then(|()| act());
        let acted = begin.elapsed();
        drop(over);
        let each = holding
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .collect();
        let duration = begin.elapsed();
        let late = stand.state.lock().unwrap_or_else(PoisonError::into_inner).late || duration > limit;
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
                    each,
                };
                (made, still)
            }),
        }
    })
}

#[cfg(test)]
mod tests;
