//! The list of disks in use, for who wants to be in it: entries, and how long one waits for others to go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{DeviceId, EventKind, Problem, ProblemKind, VmName};
use storage_manager::HostedDisk;

use crate::disks::{Key, Phase, Shared, Use};

/// How long one who wants a disk waits for another one that lets it go.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits for a process that shows no sign of ending: one that was just killed may not know yet.
const DOUBT: Duration = Duration::from_secs(2);

impl Shared {
    /// Enters a use into the list, when there is none of the same name any more.
    pub(crate) fn take_place(self: &Arc<Self>, key: Key, new: Use, goes_on: bool) -> Result<Place, Problem> {
        let mut wait = Wait::default();
        let mut state = self.state();
        loop {
            if state.closing {
                return Err(closing());
            }
            let returning = state.returning.is_some_and(|until| Instant::now() < until);
            match state.uses.get(&key) {
                None if returning && !goes_on => wait = Wait::default(),
                None => break,
                Some(old) => wait.is_worth_while(&key, old)?,
            }
            state = self.wait(state);
        }
        state.uses.insert(key.clone(), new);
        Ok(Place {
            shared: Arc::clone(self),
            key,
        })
    }

    /// Opens a disk, when nobody is about to let it go.
    pub(crate) fn open(
        &self,
        key: &Key,
        pool: &str,
        open: impl Fn() -> Result<HostedDisk, Problem>,
    ) -> Result<HostedDisk, Problem> {
        let wait = Wait::default();
        let mut alone = false;
        loop {
            let problem = match open() {
                Err(problem) if problem.kind == ProblemKind::Conflict => problem,
                other => return other,
            };
            let state = self.state();
            if state.closing {
                return Err(closing());
            }
            let file = state.uses.get(key).and_then(|own| own.config.file.as_deref());
            let same = |(other, used): &(&Key, &Use)| {
                *other != key && used.pool == pool && used.config.file.as_deref() == file
            };
            match state.uses.iter().find(same) {
                Some((other, used)) => {
                    alone = false;
                    wait.is_worth_while(other, used)?;
                    drop(self.wait(state));
                }
                // The one who had it may have gone just now.
                None if !alone => alone = true,
                None => return Err(problem),
            }
        }
    }
}

pub(crate) fn closing() -> Problem {
    Problem::new(ProblemKind::Stopping, "the manager is about to end")
        .remedy("ask again when it was started again")
}

/// How long somebody has waited for a disk.
pub(crate) struct Wait(Instant);

impl Default for Wait {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Wait {
    /// Whether to wait any longer for one who is there, or is not any more: `refusal` if not.
    pub(crate) fn patience(&self, alive: bool, refusal: Problem) -> Result<(), Problem> {
        match self.0.elapsed() < if alive { DOUBT } else { PATIENCE } {
            true => Ok(()),
            false => Err(refusal),
        }
    }

    /// Whether to wait for `used` any longer.
    fn is_worth_while(&self, (vm, device): &Key, used: &Use) -> Result<(), Problem> {
        let alive = used.is_alive();
        let file = used.config.file.as_deref().unwrap_or_default();
        let text = if alive {
            format!("{file} is in use by machine `{vm}`, as its disk `{device}`")
        } else {
            format!(
                "{file} is still being closed after machine `{vm}`, whose disk `{device}` it was, has let it go"
            )
        };
        let problem = Problem::new(ProblemKind::Conflict, text).about(file);
        let problem = match alive {
            true => problem.remedy("detach it there, or stop that machine"),
            false => problem.remedy("try again later; `smsvmm pool status` says whether devices are slow"),
        };
        self.patience(alive, problem)
    }
}

/// An entry of the list, which goes when this is dropped.
pub(crate) struct Place {
    shared: Arc<Shared>,
    key: Key,
}

impl Place {
    /// Who uses the disk.
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    /// The service ends.
    pub(crate) fn is_closing(&self) -> bool {
        self.shared.state().closing
    }

    /// The disk is served from now on, unless the service ends.
    pub(crate) fn begin(&self, served: Phase) -> bool {
        let mut state = self.shared.state();
        let goes_on = !state.closing;
        if let Some(used) = state.uses.get_mut(&self.key).filter(|_| goes_on) {
            used.phase = served;
        }
        goes_on
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        if let Some(used) = self.shared.state().uses.get_mut(&self.key) {
            used.phase = phase;
        }
    }

    pub(crate) fn tell(&self, kind: impl FnOnce(VmName, DeviceId, String) -> EventKind) {
        let file = self.shared.state().uses.get(&self.key).map(|used| {
            let file = used.config.file.clone();
            file.unwrap_or_default()
        });
        let (vm, device) = self.key.clone();
        self.shared
            .events()
            .record(kind(vm, device, file.unwrap_or_default()));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.state().uses.remove(&self.key);
        self.shared.changed.notify_all();
    }
}
