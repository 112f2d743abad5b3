//! The swarm level: long random histories from seeds; a failing one is made shorter and printed with its seed.

use std::fmt::{self, Debug};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::report::{Failure, Numbers};
use super::rng::{Rng, mix};
use super::world::panic_message;

/// Runs only this seed, as printed by a failure.
const SEED_VARIABLE: &str = "SMSVMM_SIM_SEED";
/// Runs so many histories instead of what the test says.
const HISTORIES_VARIABLE: &str = "SMSVMM_SIM_HISTORIES";
/// Runs spent on making a failure shorter.
const SHRINK_RUNS: u32 = 2000;

/// A system under test and its random histories.
pub trait Workload {
    /// One step of a history: an operation, a crash, a fault. Printed with `Debug` when it is part of a failure.
    type Step: Clone + Debug;

    /// Draws a history.
    fn generate(&self, rng: &mut Rng) -> Vec<Self::Step>;

    /// Runs a history and checks it. All randomness comes from `seed`; any part of a history must make sense.
    ///
    /// # Errors
    /// A broken promise.
    fn run(&self, seed: u64, history: &[Self::Step]) -> Result<(), Failure>;

    /// Simpler steps to try in a step's place, the simplest first.
    fn simpler(&self, _step: &Self::Step) -> Vec<Self::Step> {
        Vec::new()
    }
}

/// How much.
#[derive(Debug, Clone, Copy)]
pub struct SwarmOptions {
    /// Of the first history; the others follow from it.
    pub seed: u64,
    /// How many; the environment's `SMSVMM_SIM_HISTORIES` wins.
    pub histories: u64,
}

/// A failing history, as short as it could be made.
#[derive(Debug, Clone)]
pub struct Shrunk<S> {
    /// Replays it: `SMSVMM_SIM_SEED`.
    pub seed: u64,
    /// Steps before it was made shorter.
    pub original: usize,
    /// What is left.
    pub history: Vec<S>,
    /// What happens.
    pub failure: Failure,
}

impl<S: Debug> fmt::Display for Shrunk<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            formatter,
            "history of seed {:#x} fails; again: {SEED_VARIABLE}={:#x}",
            self.seed, self.seed
        )?;
        writeln!(
            formatter,
            "{} steps are left of {}:",
            self.history.len(),
            self.original
        )?;
        for step in &self.history {
            writeln!(formatter, "  {step:?}")?;
        }
        write!(formatter, "{}", self.failure)
    }
}

/// Runs histories until one fails.
///
/// # Errors
/// The first failing history, made shorter.
pub fn swarm<W: Workload>(workload: &W, options: &SwarmOptions) -> Result<Numbers, Shrunk<W::Step>> {
    let mut numbers = Numbers::default();
    numbers.collect();
    numbers = Numbers::default();
    let only = number_in(SEED_VARIABLE);
    let histories = number_in(HISTORIES_VARIABLE).unwrap_or(options.histories);
    for index in 0..only.map_or(histories, |_| 1) {
        let seed = only.unwrap_or_else(|| mix(options.seed.wrapping_add(index)));
        let history = workload.generate(&mut Rng::new(seed));
        if let Err(failure) = run(workload, seed, &history) {
            // Making it shorter may take many times as long as it took.
            eprintln!("history of seed {seed:#x} fails, and is made shorter: {failure}");
            return Err(shrink(workload, seed, history, failure));
        }
        numbers.histories += 1;
    }
    numbers.collect();
    Ok(numbers)
}

pub(super) fn number_in(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn run<W: Workload>(workload: &W, seed: u64, history: &[W::Step]) -> Result<(), Failure> {
    catch_unwind(AssertUnwindSafe(|| workload.run(seed, history)))
        .unwrap_or_else(|panic| Err(panic_message(&*panic).into()))
}

/// Makes a failing history shorter: leaves out ever smaller parts, then tries simpler steps, as long as it fails.
pub fn shrink<W: Workload>(
    workload: &W,
    seed: u64,
    history: Vec<W::Step>,
    failure: Failure,
) -> Shrunk<W::Step> {
    let mut best = Shrunk {
        seed,
        original: history.len(),
        history,
        failure,
    };
    let mut runs = 0;
    let mut try_it = |candidate: Vec<W::Step>, best: &mut Shrunk<W::Step>| {
        runs += 1;
        if runs > SHRINK_RUNS {
            return false;
        }
        match run(workload, seed, &candidate) {
            Ok(()) => false,
            Err(failure) => {
                best.history = candidate;
                best.failure = failure;
                true
            }
        }
    };
    let mut size = best.history.len() / 2;
    while size > 0 {
        let mut start = 0;
        let mut any = false;
        while start < best.history.len() {
            let end = (start + size).min(best.history.len());
            let mut candidate = best.history.clone();
            candidate.drain(start..end);
            if try_it(candidate, &mut best) {
                any = true;
            } else {
                start = end;
            }
        }
        if !any || size > 1 {
            size /= 2;
        }
    }
    for index in 0..best.history.len() {
        for simpler in workload.simpler(&best.history[index]) {
            let mut candidate = best.history.clone();
            candidate[index] = simpler;
            if try_it(candidate, &mut best) {
                break;
            }
        }
    }
    best
}
