//! What survives a power cut: the media. A run is one power-on.

use std::any::Any;
use std::future::Future;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

use super::crash::CrashStates;
use super::executor::{Schedule, Sim};
use super::fault::FaultPlan;
use super::host::Host;
use super::medium::{DiskOptions, Medium};
use super::report::{Failure, count_crash, count_events};
use super::rng::Rng;

/// The disks of a computer that is switched off.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// They may be copied, kept, swapped, poked and rotted while the computer is off.
    pub media: Vec<Medium>,
    /// What may happen to them at random while it is on.
    pub faults: FaultPlan,
    /// What a killed process has left, if the power has stayed since.
    pub host: Host,
}

/// How to run.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Of all decisions.
    pub seed: u64,
    /// Who decides about order and durations.
    pub schedule: Schedule,
    /// The power is cut after so many events.
    pub crash_after: Option<u64>,
    /// More events than this mean that the system goes round in circles.
    pub max_events: u64,
}

impl RunOptions {
    /// Random order from `seed`, no crash.
    pub fn random(seed: u64) -> Self {
        Self {
            seed,
            schedule: Schedule::Random,
            crash_after: None,
            max_events: 10_000_000,
        }
    }

    /// First come, first served; no crash.
    pub fn in_order() -> Self {
        Self {
            schedule: Schedule::InOrder,
            ..Self::random(0)
        }
    }

    /// Cuts the power after `events` events, if the run lasts so long.
    #[must_use]
    pub fn crash_after(mut self, events: u64) -> Self {
        self.crash_after = Some(events);
        self
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended<T> {
    /// Its future did; requests of other tasks that were in flight have ended.
    Done(T),
    /// The power was cut: [`World::crash`] is next.
    Crashed,
}

impl<T> Ended<T> {
    /// The result of a run that had no crash.
    pub fn done(self) -> Option<T> {
        match self {
            Self::Done(value) => Some(value),
            Self::Crashed => None,
        }
    }
}

/// A run that broke no rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunSummary<T> {
    /// How it ended.
    pub ended: Ended<T>,
    /// Events.
    pub events: u64,
    /// Of all events with their data: equal for equal seeds.
    pub hash: u64,
}

impl World {
    /// New disks, all zeroes.
    pub fn new(disks: impl IntoIterator<Item = DiskOptions>) -> Self {
        Self {
            media: disks.into_iter().map(Medium::new).collect(),
            faults: FaultPlan::default(),
            host: Host::default(),
        }
    }

    /// Runs what `make` makes until it ends, with its spawned tasks.
    ///
    /// # Errors
    /// All tasks wait and nothing is in flight; too many events; a panic.
    pub fn run<T, F>(
        &mut self,
        options: &RunOptions,
        make: impl FnOnce(Sim) -> F,
    ) -> Result<RunSummary<T>, Failure>
    where
        F: Future<Output = T>,
    {
        self.run_observed(options, make, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Self::run`]; calls `observe` after every event. `Break` ends the run as a crash does.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_observed<T, F>(
        &mut self,
        options: &RunOptions,
        make: impl FnOnce(Sim) -> F,
        observe: &mut dyn FnMut(&Sim) -> ControlFlow<()>,
    ) -> Result<RunSummary<T>, Failure>
    where
        F: Future<Output = T>,
    {
        for medium in &mut self.media {
            if !medium.in_flight.is_empty() {
                return Err("the world has crashed: call `World::crash` before it runs again".into());
            }
        }
        let media = std::mem::take(&mut self.media);
        let host = std::mem::take(&mut self.host);
        let sim = Sim::new(options.seed, options.schedule, media, host, self.faults.clone());
        let _entered = sim.enter();
        let ended = catch_unwind(AssertUnwindSafe(|| {
            drive(&sim, options, make(sim.clone()), observe)
        }));
        let ended = ended.unwrap_or_else(|panic| Err(panic_message(&*panic).into()));
        let trace = if ended.is_err() { sim.trace() } else { Vec::new() };
        count_events(sim.events());
        (self.media, self.host) = sim.end(!matches!(ended, Ok(Ended::Done(_))));
        self.host.killed = false;
        let ended = ended.map_err(|failure| Failure { trace, ..failure })?;
        Ok(RunSummary {
            ended,
            events: sim.events(),
            hash: sim.hash(),
        })
    }

    /// The states that a crash now can lead to.
    pub fn crash_states(&self) -> CrashStates {
        CrashStates::new(&self.media)
    }

    /// Goes on with one of these states.
    pub fn crash(&mut self, rng: &mut Rng) {
        count_crash();
        self.media = self.crash_states().random_state(rng);
        self.host = Host::default();
    }

    /// Goes on with one of the states that are possible if the process was killed, and the power stayed.
    pub fn kill(&mut self, rng: &mut Rng) {
        count_crash();
        self.media = CrashStates::of_kill(&self.media).random_state(rng);
        self.host = self.host.killed();
    }

    /// Goes on with everything durable, as after an orderly power-off.
    pub fn settle(&mut self) {
        self.media.iter_mut().for_each(Medium::settle);
        self.host = Host::default();
    }
}

fn drive<T>(
    sim: &Sim,
    options: &RunOptions,
    future: impl Future<Output = T>,
    observe: &mut dyn FnMut(&Sim) -> ControlFlow<()>,
) -> Result<Ended<T>, Failure> {
    let mut future = pin!(future);
    // Declared later, so dropped earlier than the future, whose requests must not end then.
    let cut = CutUnlessDone(sim);
    let mut result = None;
    loop {
        if options.crash_after.is_some_and(|events| sim.events() >= events) {
            return Ok(Ended::Crashed);
        }
        if sim.events() >= options.max_events {
            let tasks = sim.waiting_tasks().join(", ");
            return Err(format!("no end after {} events; tasks: {tasks}", options.max_events).into());
        }
        let more = sim.step(&mut |context| {
            if let Poll::Ready(value) = future.as_mut().poll(context) {
                result = Some(value);
            }
        });
        if observe(sim).is_break() {
            return Ok(Ended::Crashed);
        }
        if let Some(value) = result.take() {
            std::mem::forget(cut);
            return Ok(Ended::Done(value));
        }
        if !more {
            let tasks = sim.waiting_tasks().join(", ");
            return Err(format!("deadlock: nothing is in flight, and these tasks wait: {tasks}").into());
        }
    }
}

struct CutUnlessDone<'a>(&'a Sim);

impl Drop for CutUnlessDone<'_> {
    fn drop(&mut self) {
        self.0.cut_power();
    }
}

pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without a message"))
}
