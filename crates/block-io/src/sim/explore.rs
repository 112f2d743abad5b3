//! The exhaustive level: a short script, crashed at every event, opened again from every state that the crash can leave,
//! crashed while it recovers, and so on.

use std::cell::RefCell;
use std::future::Future;
use std::ops::ControlFlow;
use std::rc::Rc;

use super::crash::CrashStates;
use super::executor::{Schedule, Sim};
use super::report::{Failure, Numbers};
use super::rng::mix;
use super::world::{Ended, RunOptions, World};

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
    /// Orders tried: first come, first served, and so many minus one from seeds.
    pub schedules: u64,
}

impl Default for ExploreOptions {
    fn default() -> Self {
        Self {
            states: 4096,
            nesting: 1,
            nested_states: 16,
            schedules: 1,
        }
    }
}

/// Explores all of it.
///
/// # Errors
/// The first broken promise, with the order, the crash points and the states that lead to it.
pub fn explore<S: Scenario>(scenario: &S, options: &ExploreOptions) -> Result<Numbers, Failure> {
    let mut explorer = Explorer {
        scenario,
        options,
        numbers: Numbers::default(),
    };
    // What was counted before is not ours.
    Numbers::default().collect();
    for seed in 0..options.schedules.max(1) {
        explorer
            .script(seed)
            .map_err(|failure| failure.context(&format!("schedule {seed}")))?;
    }
    explorer.numbers.collect();
    Ok(explorer.numbers)
}

struct Explorer<'a, S> {
    scenario: &'a S,
    options: &'a ExploreOptions,
    numbers: Numbers,
}

impl<S: Scenario> Explorer<'_, S> {
    fn script(&mut self, seed: u64) -> Result<(), Failure> {
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
        let mut world = scenario.world();
        let model = Shared::<S::Model>::default();
        let prepared = world.run(&RunOptions::in_order(), |sim| {
            scenario.prepare(sim, Rc::clone(&model))
        })?;
        prepared.ended.done().unwrap_or(Ok(()))?;
        world.settle();
        let mut broken = None;
        let ran = world.run_observed(&run, |sim| scenario.run(sim, Rc::clone(&model)), &mut |sim| {
            self.crash_here(sim, &model.borrow(), 0, &mut broken)
        });
        if let Some(failure) = broken {
            return Err(failure);
        }
        let ran = ran?;
        self.numbers.histories += 1;
        if let Ended::Done(result) = ran.ended {
            result.map_err(|failure| failure.context("the script itself"))?;
        }
        // And without a crash.
        world.settle();
        self.recover(world, &model.borrow(), u32::MAX)
            .map_err(|failure| failure.context("after an orderly end"))
    }

    /// Tries all crashes at this moment.
    fn crash_here(
        &mut self,
        sim: &Sim,
        model: &S::Model,
        depth: u32,
        broken: &mut Option<Failure>,
    ) -> ControlFlow<()> {
        let states = sim.look(CrashStates::new);
        match self.crash_into(&states, model, depth) {
            Ok(()) => ControlFlow::Continue(()),
            Err((index, failure)) => {
                let place = format!("crash after event {} into state {index}", sim.events());
                let mut failure = failure.context(&place);
                let mut trace = sim.trace();
                trace.push(format!("--- {place}"));
                trace.append(&mut failure.trace);
                *broken = Some(Failure { trace, ..failure });
                ControlFlow::Break(())
            }
        }
    }

    fn crash_into(
        &mut self,
        states: &CrashStates,
        model: &S::Model,
        depth: u32,
    ) -> Result<(), (u64, Failure)> {
        let limit = if depth == 0 {
            self.options.states
        } else {
            self.options.nested_states
        };
        self.numbers.crash_points += 1;
        if states.total().is_none_or(|total| total > limit) {
            self.numbers.sampled_points += 1;
        }
        for index in 0..states.count(limit) {
            self.numbers.crash_states += 1;
            if depth > 0 {
                self.numbers.nested_states += 1;
            }
            let seed = mix(self.numbers.crash_states);
            let world = World {
                media: states.nth(index, limit, seed),
                ..World::default()
            };
            self.recover(world, model, depth)
                .map_err(|failure| (index, failure))?;
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
                let new = sim.version();
                if depth >= self.options.nesting || version.replace(new).is_none_or(|old| old == new) {
                    return ControlFlow::Continue(());
                }
                self.crash_here(sim, &model.borrow(), depth + 1, &mut broken)
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
