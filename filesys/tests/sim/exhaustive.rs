//! The exhaustive level: every operation alone, every pair, every triple; crashed at every event, into every state, and crashed
//! again while it recovers.
//!
//! A script is explored while its *last* operation runs and until everything is over: what comes before is a shorter script, which
//! is explored as well. So no crash is tried twice. Threads share the scripts, not the states of one script.
//!
//! | what | crash points | states of each | crashes in recovery |
//! |---|---|---|---|
//! | operations | all, also while the file system is opened | all up to 4096 | all |
//! | pairs | all of the second | all up to 256 | one in 4 |
//! | triples | all of the third | all up to 40 | one in 64 |
//!
//! At the same moments the process is killed while the power stays: then everything that was answered must be there, flushed or not, as the
//! file systems here have a tail of the journal. And the power is cut while what a killed process has left is made again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use block_io::sim::{ExploreOptions, Numbers, explore, threads};

use crate::scripts::{ALL, Op, Script};

/// What `SMSVMM_SIM_DEPTH` says: 1 is what every run of the tests does, more goes deeper, 0 is for trying things out.
pub(crate) fn factor() -> u64 {
    let text = std::env::var("SMSVMM_SIM_DEPTH").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// What `SMSVMM_SIM_ONE_IN` says: of all scripts, one in so many, to see what the others would take. A factor of the number of
/// operations would leave out some of them as the last ones.
fn share() -> usize {
    let text = std::env::var("SMSVMM_SIM_ONE_IN").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(1).max(1)
}

/// Processor time that this thread has used.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(
        time.tv_sec.try_into().unwrap_or(0),
        time.tv_nsec.try_into().unwrap_or(0),
    )
}

#[derive(Default)]
struct Total {
    numbers: Numbers,
    processor: Duration,
    failures: Vec<(usize, String)>,
}

/// Explores all scripts on all processors, and demands at least so many states and these marks.
fn explore_all(name: &str, scripts: &[Script], options: &ExploreOptions, least: u64, marks: &[&str]) {
    let share = share();
    let scripts: Vec<&Script> = scripts.iter().step_by(share).collect();
    let start = Instant::now();
    let (next, total) = (AtomicUsize::new(0), Mutex::new(Total::default()));
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(script) = scripts.get(index) else { break };
            let begun = processor_time();
            let explored = explore(*script, options);
            let mut total = total.lock().unwrap();
            total.processor += processor_time().saturating_sub(begun);
            match explored {
                Ok(numbers) => total.numbers.add(&numbers),
                Err(failure) => {
                    let reason = format!("{:?}: {}", script.operations, failure.message);
                    total.failures.push((index, reason));
                }
            }
            if total.failures.len() >= 8 {
                break;
            }
        }
    };
    std::thread::scope(|scope| (0..threads().max(1)).for_each(|_| drop(scope.spawn(work))));
    let Total {
        numbers,
        processor,
        mut failures,
    } = total.into_inner().unwrap();
    println!(
        "{name}: {} scripts, {} states explored, {} distinct images recovered, {:.1} s, {:.1} s of processors, {:.0} us for each recovery",
        scripts.len(),
        numbers.explored(),
        numbers.crash_states,
        start.elapsed().as_secs_f64(),
        processor.as_secs_f64(),
        processor.as_secs_f64() * 1e6 / numbers.crash_states.max(1) as f64,
    );
    println!("{name}: {numbers}");
    failures.sort();
    for (_, failure) in &failures {
        println!("FAILED {failure}");
    }
    assert!(
        failures.is_empty(),
        "{} scripts of {} fail",
        failures.len(),
        scripts.len()
    );
    if factor() > 0 && share == 1 {
        assert!(numbers.crash_states >= least, "{least} states were asked for");
        let missing = numbers.missing(marks);
        assert!(missing.is_empty(), "{missing:?} were not reached");
    }
}

/// What every script of `length` operations from `alphabet` is.
fn scripts(alphabet: &[Op], length: usize, checks_one_in: u64) -> Vec<Script> {
    let mut all = vec![Vec::new()];
    for _ in 0..length {
        let longer = all.iter().flat_map(|script: &Vec<Op>| {
            alphabet.iter().map(move |op| {
                let mut longer = script.clone();
                longer.push(*op);
                longer
            })
        });
        all = longer.collect();
    }
    let from = if length == 1 { 0 } else { length };
    let script = |operations| Script::new(operations, from, checks_one_in);
    all.into_iter().map(script).collect()
}

#[test]
fn every_operation() {
    let options = ExploreOptions {
        states: 4096 * factor().max(1),
        nesting: 1,
        nested_states: 8,
        nested_one_in: 1,
        schedules: factor().max(1),
    };
    let marks = [
        "filesys: a group was replayed",
        "filesys: an absorption that a crash has interrupted goes on",
        "filesys: the last child absorbs a parent without a name",
        "filesys: what the tail of the journal has was made again",
        "journal: the tail had been made again",
        "superblock: a single newer copy is ignored",
    ];
    explore_all(
        "single operations",
        &scripts(&ALL, 1, 1),
        &options,
        400_000,
        &marks,
    );
}

#[test]
fn every_pair_of_operations() {
    let options = ExploreOptions {
        states: 256 * factor().max(1),
        nesting: 1,
        nested_states: 3,
        nested_one_in: (4 / factor().max(1)).max(1),
        schedules: factor().max(1),
    };
    let marks = [
        "filesys: a group was replayed",
        "filesys: a part of a sub-cluster was written",
        "filesys: an absorption that a crash has interrupted goes on",
        "filesys: the last child absorbs a parent without a name",
    ];
    explore_all(
        "pairs of operations",
        &scripts(&ALL, 2, 8),
        &options,
        1_350_000,
        &marks,
    );
}

#[test]
fn every_triple_of_operations() {
    let options = ExploreOptions {
        states: 40 * factor().max(1),
        nesting: 1,
        nested_states: 2,
        nested_one_in: (64 / factor().max(1)).max(1),
        schedules: 1,
    };
    let marks = [
        "filesys: a group was replayed",
        "filesys: an absorption that a crash has interrupted goes on",
        "filesys: the last child absorbs a parent without a name",
    ];
    explore_all(
        "triples of operations",
        &scripts(&ALL, 3, 16),
        &options,
        3_250_000,
        &marks,
    );
}
