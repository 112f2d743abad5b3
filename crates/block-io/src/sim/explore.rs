//! The exhaustive level: a short script, crashed at every event, opened again from every state that the crash can leave,
//! crashed while it recovers, and so on.
//!
//! # On several threads
//! The states that crashes of the script can leave are numbered in the order in which they come up; number and state depend on
//! the scenario alone. Every thread runs the script itself (what it runs on cannot leave its thread), counts along, and recovers
//! only from the states that it has claimed. What is nested in a state belongs to it. So all numbers are the same for any number
//! of threads, and as states are claimed in order, the failure that is reported is always that of the lowest state that fails.
//!
//! # Equal states
//! A crash at the next event mostly leaves states that the crash at this one left, too. If the scenario gives
//! [fingerprints](Scenario::fingerprint) of its model, a state is skipped when one with the same content of all disks (by a
//! 64-bit hash), the same fingerprint and the same depth was tried: of the script, all so far; in recoveries, those within the
//! same state of the script. They are counted as [`Numbers::equal_states`], and not as crash states.

use std::cell::RefCell;
use std::collections::HashSet;
use std::future::Future;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::crash::{Choices, CrashStates, Digests};
use super::executor::{Schedule, Sim};
use super::host::Host;
use super::memory;
use super::report::{Counts, Failure, Numbers};
use super::rng::mix;
use super::swarm::number_in;
use super::world::{Ended, RunOptions, World};

/// So many threads instead of one for each processor.
const THREADS_VARIABLE: &str = "SMSVMM_SIM_THREADS";

/// What was promised so far; the script writes it, the check after the crash reads a copy.
pub type Shared<M> = Rc<RefCell<M>>;

/// A system under test, a script for it, and what must hold after a crash.
pub trait Scenario {
    /// The oracle's knowledge: what was begun, acknowledged, flushed.
    type Model: Clone + Default;

    /// The disks, blank. Fault rules stay on them across crashes; random faults hit only the script.
    fn world(&self) -> World;

    /// Makes the state that the script starts from. No crashes here; all of it is durable afterwards.
    fn prepare(&self, sim: Sim, model: Shared<Self::Model>) -> impl Future<Output = Result<(), Failure>>;

    /// The script: one to three operations. Updates the model when it begins something and when something is
    /// acknowledged.
    fn run(&self, sim: Sim, model: Shared<Self::Model>) -> impl Future<Output = Result<(), Failure>>;

    /// Opens what is on the disks, and compares it with the model. What it writes (recovery) is crashed, too.
    fn recover(&self, sim: Sim, model: Shared<Self::Model>) -> impl Future<Output = Result<(), Failure>>;

    /// A hash of all that [`Self::recover`] can find in the model of a crash. Equal states with equal fingerprints are tried
    /// once. Without it, none is skipped.
    fn fingerprint(&self, _model: &Self::Model) -> Option<u64> {
        None
    }

    /// Whether the process is killed as well, at the same moments, while the power stays ([`Sim::is_after_kill`]).
    fn kills(&self) -> bool {
        false
    }

    /// As [`Self::fingerprint`], of all that it can find after a kill.
    fn killed_fingerprint(&self, _model: &Self::Model) -> Option<u64> {
        None
    }

    /// Whether crashes of the script are tried at this moment. A script whose beginning is another one that is explored as
    /// well says no until that is over.
    fn explores(&self, _model: &Self::Model) -> bool {
        true
    }
}

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub struct ExploreOptions {
    /// States tried per crash of the script; all of them, if there are no more.
    pub states: u64,
    /// Crashes within recovery: so many levels.
    pub nesting: u32,
    /// States tried per crash of a recovery.
    pub nested_states: u64,
    /// Of the moments of a recovery at which a crash could notice something new, one in so many is tried: which, is drawn for
    /// each recovery anew. 1 for all.
    pub nested_one_in: u64,
    /// Orders tried: first come, first served, and so many minus one from seeds.
    pub schedules: u64,
}

impl Default for ExploreOptions {
    fn default() -> Self {
        Self {
            states: 4096,
            nesting: 1,
            nested_states: 16,
            nested_one_in: 1,
            schedules: 1,
        }
    }
}

/// Explores all of it on this thread.
///
/// # Errors
/// The first broken promise, with the order, the crash points and the states that lead to it.
pub fn explore<S: Scenario>(scenario: &S, options: &ExploreOptions) -> Result<Numbers, Failure> {
    let work = Work::default();
    let explored = Explorer::new(scenario, options, &work, true).run();
    explored.map_err(|(_, failure)| failure)
}

/// As [`explore`], with the same result, on so many threads: [`threads`] says how many are good.
///
/// # Errors
/// As [`explore`].
pub fn explore_parallel<S: Scenario + Sync>(
    scenario: &S,
    options: &ExploreOptions,
    threads: usize,
) -> Result<Numbers, Failure> {
    let work = Work::default();
    let results: Vec<_> = std::thread::scope(|scope| {
        let start = |thread| {
            let work = &work;
            scope.spawn(move || Explorer::new(scenario, options, work, thread == 0).run())
        };
        let running: Vec<_> = (0..threads.max(1)).map(start).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Explored>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        running.into_iter().map(join).collect()
    });
    let mut numbers = Numbers::default();
    let mut first: Option<(u64, Failure)> = None;
    for result in results {
        match result {
            Ok(more) => numbers.add(&more),
            Err((at, failure)) => {
                if first.as_ref().is_none_or(|(lowest, _)| at < *lowest) {
                    first = Some((at, failure));
                }
            }
        }
    }
    first.map_or(Ok(numbers), |(_, failure)| Err(failure))
}

/// One thread for each processor, or what `SMSVMM_SIM_THREADS` says.
pub fn threads() -> usize {
    let wanted = number_in(THREADS_VARIABLE).and_then(|threads| usize::try_from(threads).ok());
    wanted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// The numbers, or where it failed.
type Explored = Result<Numbers, (u64, Failure)>;

/// What threads share.
#[derive(Debug)]
struct Work {
    /// The next state of the script that nobody has claimed.
    next: AtomicU64,
    /// The lowest one that failed.
    failed: AtomicU64,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(0),
            failed: AtomicU64::new(u64::MAX),
        }
    }
}

impl Work {
    fn claim(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn fails(&self, at: u64) {
        self.failed.fetch_min(at, Ordering::Relaxed);
    }

    /// Whether nobody needs to know about `at` any more.
    fn is_over(&self, at: u64) -> bool {
        at >= self.failed.load(Ordering::Relaxed)
    }
}

/// States that were tried: contents, model, depth.
type Tried = HashSet<u64>;

struct Explorer<'a, S> {
    scenario: &'a S,
    options: &'a ExploreOptions,
    work: &'a Work,
    /// Counts what all threads do.
    leads: bool,
    numbers: Numbers,
    /// What recoveries have counted; what the script counts is kept apart, since all threads run that.
    counts: Counts,
    /// The next state of the script, and the next that is ours.
    unit: u64,
    claimed: u64,
    tried: Tried,
    /// States of recoveries within this state of the script, and how many crashes of them came up.
    nested_tried: Tried,
    nested: u64,
}

/// Where all of this has to end early.
enum Stop {
    /// Another thread has found a failure further ahead.
    Over,
    Broken(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Broken(failure)
    }
}

impl Stop {
    fn context(self, place: impl FnOnce() -> String) -> Self {
        match self {
            Self::Broken(failure) => Self::Broken(failure.context(&place())),
            Self::Over => Self::Over,
        }
    }
}

impl<'a, S: Scenario> Explorer<'a, S> {
    fn new(scenario: &'a S, options: &'a ExploreOptions, work: &'a Work, leads: bool) -> Self {
        Self {
            scenario,
            options,
            work,
            leads,
            numbers: Numbers::default(),
            counts: Counts::default(),
            unit: 0,
            claimed: 0,
            tried: Tried::default(),
            nested_tried: Tried::default(),
            nested: 0,
        }
    }

    fn run(mut self) -> Explored {
        memory::keep();
        // What was counted before is not ours.
        Numbers::default().collect();
        self.claimed = self.work.claim();
        for seed in 0..self.options.schedules.max(1) {
            match self
                .script(seed)
                .map_err(|stop| stop.context(|| format!("schedule {seed}")))
            {
                Ok(()) => {}
                Err(Stop::Over) => break,
                Err(Stop::Broken(failure)) => {
                    self.work.fails(self.unit);
                    return Err((self.unit, failure));
                }
            }
        }
        if self.leads {
            self.numbers.collect();
        }
        self.counts.swap();
        self.numbers.collect();
        Ok(self.numbers)
    }

    /// The disks and the model before the script.
    fn prepared(&self) -> Result<(World, S::Model), Failure> {
        let mut world = self.scenario.world();
        let model = Shared::<S::Model>::default();
        let prepared = world.run(&RunOptions::in_order(), |sim| {
            self.scenario.prepare(sim, Rc::clone(&model))
        })?;
        prepared.ended.done().unwrap_or(Ok(()))?;
        world.settle();
        let model = model.borrow().clone();
        Ok((world, model))
    }

    fn script(&mut self, seed: u64) -> Result<(), Stop> {
        let run = RunOptions {
            seed,
            schedule: if seed == 0 {
                Schedule::InOrder
            } else {
                Schedule::Random
            },
            ..RunOptions::in_order()
        };
        let scenario = self.scenario;
        let (mut world, model) = self.prepared()?;
        let model = Rc::new(RefCell::new(model));
        let mut stopped = None;
        let ran = world.run_observed(&run, |sim| scenario.run(sim, Rc::clone(&model)), &mut |sim| {
            self.crash_script(sim, &model.borrow(), &mut stopped)
        });
        if let Some(stop) = stopped {
            return Err(stop);
        }
        let ran = ran?;
        if self.leads {
            self.numbers.histories += 1;
        }
        if let Ended::Done(result) = ran.ended {
            result.map_err(|failure| failure.context("the script itself"))?;
        }
        // And without a crash.
        world.settle();
        let ended = self.unit(|explorer| explorer.recover(world, &model.borrow(), u32::MAX));
        ended.map_err(|stop| stop.context(|| "after an orderly end".to_owned()))
    }

    /// Does `work` if the next state of the script is ours.
    fn unit(&mut self, work: impl FnOnce(&mut Self) -> Result<(), Failure>) -> Result<(), Stop> {
        if self.work.is_over(self.unit) {
            return Err(Stop::Over);
        }
        if self.unit == self.claimed {
            self.counts.swap();
            let worked = work(self);
            self.counts.swap();
            worked?;
            self.claimed = self.work.claim();
        }
        self.unit += 1;
        Ok(())
    }

    /// Tries all crashes of the script at this moment.
    fn crash_script(&mut self, sim: &Sim, model: &S::Model, stopped: &mut Option<Stop>) -> ControlFlow<()> {
        if !self.scenario.explores(model) {
            return ControlFlow::Continue(());
        }
        for end in self.ends() {
            if let Err(stop) = self.end_script(sim, model, end) {
                *stopped = Some(stop);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    /// What ends runs.
    fn ends(&self) -> impl Iterator<Item = End> + use<S> {
        let kill = self.scenario.kills().then_some(End::Kill);
        std::iter::once(End::PowerCut).chain(kill)
    }

    /// Tries all states that an end of the script at this moment can leave.
    fn end_script(&mut self, sim: &Sim, model: &S::Model, end: End) -> Result<(), Stop> {
        let left = Left::of(self.scenario, sim, model, end);
        let limit = end.limit(self.options.states);
        if self.leads {
            self.numbers.crash_point(&left.states, limit);
        }
        for index in 0..left.states.count(limit) {
            let seed = mix(self.unit);
            let choices = left.states.choose(index, limit, seed);
            if let Some(known) = left.known(&choices)
                && !self.tried.insert(known)
            {
                self.numbers.equal_states += u64::from(self.leads);
                continue;
            }
            self.unit(|explorer| {
                explorer.nested_tried.clear();
                explorer.nested = 0;
                explorer.numbers.crash_states += 1;
                explorer
                    .recover(left.world(&choices), model, 0)
                    .map_err(|failure| happened(sim, end, index, failure))
            })?;
        }
        Ok(())
    }

    /// Tries all crashes of a recovery at this moment, unless they are left out.
    fn crash_recovery(&mut self, sim: &Sim, model: &S::Model, depth: u32) -> Result<(), Failure> {
        self.nested += 1;
        let draw = mix(mix(self.unit) ^ self.nested);
        if !draw.is_multiple_of(self.options.nested_one_in.max(1)) {
            self.numbers.left_out_points += 1;
            return Ok(());
        }
        let killed = sim.is_after_kill();
        for end in self.ends() {
            if (killed || end == End::Kill) && !mix(draw ^ 1).is_multiple_of(KILLS_ONE_IN) {
                continue;
            }
            let left = Left::of(self.scenario, sim, model, end);
            let limit = end.limit(self.options.nested_states);
            self.numbers.crash_point(&left.states, limit);
            for index in 0..left.states.count(limit) {
                let choices = left.states.choose(index, limit, draw);
                if let Some(known) = left.known(&choices)
                    && !self.nested_tried.insert(mix(known ^ u64::from(depth)))
                {
                    self.numbers.equal_states += 1;
                    continue;
                }
                self.numbers.crash_states += 1;
                self.numbers.nested_states += 1;
                self.recover(left.world(&choices), model, depth)
                    .map_err(|failure| happened(sim, end, index, failure))?;
            }
        }
        Ok(())
    }

    fn recover(&mut self, mut world: World, model: &S::Model, depth: u32) -> Result<(), Failure> {
        let model = Rc::new(RefCell::new(model.clone()));
        let scenario = self.scenario;
        let mut broken = None;
        let mut version = None;
        let ran = world.run_observed(
            &RunOptions::in_order(),
            |sim| scenario.recover(sim, Rc::clone(&model)),
            &mut |sim| {
                // Recovery reads most of the time, and a crash then is the crash from which it came.
                if depth >= self.options.nesting {
                    return ControlFlow::Continue(());
                }
                let new = sim.version();
                if version.replace(new).is_none_or(|old| old == new) {
                    return ControlFlow::Continue(());
                }
                match self.crash_recovery(sim, &model.borrow(), depth + 1) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(failure) => {
                        broken = Some(failure);
                        ControlFlow::Break(())
                    }
                }
            },
        );
        if let Some(failure) = broken {
            return Err(failure);
        }
        let ran = ran.map_err(|failure| failure.context("recovery"))?;
        match ran.ended {
            Ended::Done(result) => result.map_err(|failure| failure.context("recovery")),
            Ended::Crashed => Ok(()),
        }
    }
}

/// Of the ends of recoveries that have to do with a kill, one in so many is tried.
const KILLS_ONE_IN: u64 = 16;

/// What ends a run early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    PowerCut,
    Kill,
}

impl End {
    /// How many states are tried of those for which there are `states` after a power cut: what a kill leaves open is only what was in flight, and
    /// that is in the states of a power cut as well.
    fn limit(self, states: u64) -> u64 {
        match self {
            Self::PowerCut => states,
            Self::Kill => (states / 64).max(3),
        }
    }
}

/// What an end can leave.
struct Left {
    states: CrashStates,
    host: Host,
    /// What tells states apart, if the scenario says what of its model does; with all that is equal in these.
    known: Option<(u64, Digests)>,
}

impl Left {
    fn of<S: Scenario>(scenario: &S, sim: &Sim, model: &S::Model, end: End) -> Self {
        let (states, host, fingerprint) = match end {
            End::PowerCut => (
                sim.look(CrashStates::new),
                Host::default(),
                scenario.fingerprint(model),
            ),
            End::Kill => (
                sim.look(CrashStates::of_kill),
                sim.with_host(|host| host.killed()),
                scenario.killed_fingerprint(model),
            ),
        };
        let rest = host.digest() ^ u64::from(end == End::Kill);
        let known = fingerprint.map(|fingerprint| (fingerprint ^ mix(rest), states.digests()));
        Self { states, host, known }
    }

    fn known(&self, choices: &Choices) -> Option<u64> {
        let (rest, digests) = self.known.as_ref()?;
        Some(digests.of(choices) ^ rest)
    }

    fn world(&self, choices: &Choices) -> World {
        World {
            media: self.states.build(choices),
            host: self.host.clone(),
            ..World::default()
        }
    }
}

/// Where in the history a failure after a crash belongs.
fn happened(sim: &Sim, end: End, state: u64, failure: Failure) -> Failure {
    let what = match end {
        End::PowerCut => "crash",
        End::Kill => "kill",
    };
    let place = format!("{what} after event {} into state {state}", sim.events());
    let mut failure = failure.context(&place);
    let mut trace = sim.trace();
    trace.push(format!("--- {place}"));
    trace.append(&mut failure.trace);
    Failure { trace, ..failure }
}
