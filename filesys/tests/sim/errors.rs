//! Requests that fail, one at a time, at every place: each operation runs with the first, the second, ... read, write or flush of the
//! metadata volume or of the data volume failing, once or from then on.
//!
//! What must hold: either the operation says so, or it was not needed; what was acknowledged before, and what is acknowledged
//! afterwards by a file system that goes on, survives a power cut; with good devices, the file system can be opened again.

use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{Ended, Failure, Fault, FaultRule, Medium, Numbers, RunOptions, Scenario, World};
use block_io::{Clock, Operation};

use crate::exhaustive::factor;
use crate::harness;
use crate::machine::Promise;
use crate::scripts::{ALL, Machine, Op, Script, prepared};

/// Which request fails.
#[derive(Debug, Clone, Copy)]
struct Broken {
    disk: usize,
    operation: Operation,
    after: u64,
    for_ever: bool,
}

impl Broken {
    fn rule(&self) -> FaultRule {
        let rule = match self.for_ever {
            true => FaultRule::always(Fault::Error, self.operation),
            false => FaultRule::once(Fault::Error, self.operation),
        };
        rule.after(self.after)
    }
}

/// When the request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// While the operations run.
    Running,
    /// While the file system is opened after a crash at their end.
    Opening,
}

/// Cuts the power, and opens what is left with good devices: all of some states that there may be.
fn promises_hold(world: &World, promise: &Promise) -> Result<(), Failure> {
    let states = world.crash_states();
    let limit = 6;
    for index in 0..states.count(limit) {
        let mut media = states.nth(index, limit, 7);
        media.iter_mut().for_each(Medium::repair);
        let mut world = World {
            media,
            ..World::default()
        };
        let script = Script::new(Vec::new(), 0, 1);
        let model = Promise::default();
        model.replace(promise.borrow().clone());
        let ran = world.run(&RunOptions::in_order(), |sim| {
            script.recover(sim, Rc::clone(&model))
        });
        let ended = ran.map(|ran| ran.ended.done().unwrap_or(Ok(())));
        ended
            .and_then(|result| result)
            .map_err(|failure| failure.context(&format!("after a power cut into state {index}")))?;
    }
    Ok(())
}

/// Runs operations with a failing request. Says what happened.
fn live(operations: &[Op], when: When, broken: Broken) -> Result<Numbers, Failure> {
    let (mut world, model) = prepared(|world, model| (world.clone(), model.clone()));
    let promise = Promise::default();
    promise.replace(model);
    Numbers::default().collect();
    let ran = world.run(&RunOptions::in_order(), async |sim| {
        let mut machine = Machine::open(&sim, &promise).await?;
        if when == When::Running {
            sim.inject(broken.disk, broken.rule());
        }
        for op in operations {
            // What is acknowledged is in the model; after an error the user tries to save what there is.
            match machine.step(*op).await {
                Ok(()) => {}
                Err(error) if when == When::Opening => return Err(error),
                Err(_) => {
                    block_io::cover!("errors: an operation has failed");
                    break;
                }
            }
        }
        machine.save_what_can_be_saved().await;
        Ok::<(), Failure>(())
    })?;
    if let Ended::Done(result) = ran.ended {
        result.map_err(|failure| failure.context("before any fault"))?;
    }
    if when == When::Opening {
        // Without what is volatile, so that there is something to recover.
        world.media = world.crash_states().nth(0, 1, 0);
        let ran = world.run(&RunOptions::in_order(), async |sim| {
            sim.inject(broken.disk, broken.rule());
            match Machine::open(&sim, &promise).await {
                Ok(machine) => machine.save_what_can_be_saved().await,
                Err(_) => block_io::cover!("errors: opening has failed"),
            }
        });
        ran?;
    }
    let mut numbers = Numbers::default();
    numbers.collect();
    promises_hold(&world, &promise)?;
    Ok(numbers)
}

/// Fails the first request, the second, and so on, until none is left to fail.
fn all_places(operations: &[Op], when: When, total: &mut Numbers, failures: &mut Vec<String>) {
    for disk in [0, 1] {
        for operation in [
            Operation::Read,
            Operation::Write,
            Operation::Flush,
            Operation::Discard,
        ] {
            for for_ever in [false, true] {
                for after in 0.. {
                    let broken = Broken {
                        disk,
                        operation,
                        after,
                        for_ever,
                    };
                    match live(operations, when, broken) {
                        Ok(numbers) if numbers.faults.is_empty() => break,
                        Ok(numbers) => {
                            total.histories += 1;
                            total.add(&numbers);
                        }
                        Err(failure) => {
                            failures.push(format!("{operations:?} with {broken:?}: {}", failure.message));
                            break;
                        }
                    }
                }
            }
        }
    }
}

fn explore(scripts: &[Vec<Op>], when: When, least: u64, marks: &[&str]) {
    let mut total = Numbers::default();
    let mut failures = Vec::new();
    for script in scripts {
        all_places(script, when, &mut total, &mut failures);
    }
    let places = total.histories;
    println!(
        "{} scripts, {places} places at which a request failed: {total}",
        scripts.len()
    );
    failures.iter().for_each(|failure| println!("FAILED {failure}"));
    assert!(failures.is_empty(), "{} failures", failures.len());
    assert!(places >= least, "{places} places");
    let missing = total.missing(marks);
    assert!(missing.is_empty(), "{missing:?} were not reached");
}

#[test]
fn a_request_of_any_operation_fails() {
    let mut scripts: Vec<Vec<Op>> = ALL.iter().map(|op| vec![*op]).collect();
    // What is written needs a flush to be promised.
    scripts.extend(ALL.iter().map(|op| vec![Op::WriteNew, *op, Op::Flush]));
    scripts.extend(
        ALL.iter()
            .map(|op| vec![*op, Op::Checkpoint, Op::WriteLayer, Op::FlushLayer]),
    );
    if factor() > 1 {
        for first in ALL {
            scripts.extend(
                ALL.iter()
                    .map(|second| vec![first, *second, Op::Flush, Op::Checkpoint]),
            );
        }
    }
    let marks = [
        "errors: an operation has failed",
        "filesys: a volume failed",
        "filesys: writes to a volume that failed are taken back",
        "filesys: a checkpoint is cut again",
        "filesys: checksums of a volume that failed are not trusted",
        "journal: it has failed",
        "machine: an absorption failed half-way",
        "metadata space: a bitmap cannot be written",
    ];
    explore(&scripts, When::Running, 1500, &marks);
}

#[test]
fn a_request_fails_while_the_file_system_is_opened_after_a_crash() {
    let scripts: Vec<Vec<Op>> = ALL.iter().map(|op| vec![*op, Op::WriteNew, Op::Flush]).collect();
    let marks = [
        "errors: opening has failed",
        "filesys: a group was replayed",
        "superblock: a copy cannot be read",
        "superblock: fewer than two copies agree",
        "superblock: one copy cannot be written",
        "superblock: too few copies are written",
    ];
    explore(&scripts, When::Opening, 1000, &marks);
}

/// Found by the fuzz target `filesys-image`: the task that watches the journal asked for checkpoints again and again, and never waited.
#[test]
fn a_checkpoint_that_fails_while_the_journal_is_full_leaves_the_worker_to_others() {
    let mut refused = 0;
    for after in 0..60 {
        let mut world = harness::world(1, 1 << 20);
        let ran = world.run(&RunOptions::in_order(), async |sim| {
            let fs = harness::format(&sim, 1).await.map_err(harness::failed)?;
            let rule = FaultRule::once(Fault::Error, Operation::Write).after(after);
            sim.inject(0, rule);
            for number in 0..60 {
                let made = fs.make_directory(&format!("/{number}"), None, 1).await;
                if made.is_err() || fs.sync().await.is_err() {
                    break;
                }
            }
            sim.clock().sleep(Duration::from_secs(1)).await;
            let is_refused = fs.make_directory("/last", None, 1).await.is_err();
            let _ = fs.close().await;
            Ok::<bool, Failure>(is_refused)
        });
        match ran
            .unwrap_or_else(|failure| panic!("write {after} fails: {failure}"))
            .ended
        {
            Ended::Done(Ok(is_refused)) => refused += u32::from(is_refused),
            Ended::Done(Err(failure)) => panic!("write {after} fails: {failure}"),
            Ended::Crashed => unreachable!("nothing crashes it"),
        }
    }
    assert!(refused >= 20, "only {refused} failures were noticed");
}
