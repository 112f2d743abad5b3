//! File systems on files of the host, used by processes that are killed without warning.
//!
//! A child opens a pool on files with io_uring, and the file system on its mirrored volumes. It writes to virtual disks, flushes, puts
//! layers on them and merges them, makes, renames and deletes files, and says on a pipe what was acknowledged. The parent kills it at
//! a random moment. Then it opens everything, sometimes without one of the devices, and looks: what was promised must be there, and
//! every sector must hold what was written to it as a whole, no older than what was promised, under the names that were acknowledged.
//!
//! `kill -9` does not lose the page cache: whatever the kernel was given arrives. So this says nothing about missing flushes, which
//! is what the simulator is for (`tests/sim`). What it adds is what the simulator does not have: the kernel, io_uring, a real pool
//! below, requests that end after their process has.
//!
//! A dozen rounds run with the other tests. The long run:
//!
//! ```text
//! SMSVMM_KILL_ROUNDS=200 cargo test --release -p filesys --test kill -- --nocapture
//! ```
//! `SMSVMM_KILL_SEED` repeats the choices of a run, though not its timing.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

#[path = "../../../volume-manager/tests/kill/blocks.rs"]
mod blocks;
mod child;
mod names;
mod place;
mod story;

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Rounds of a normal test run.
const ROUNDS: usize = 12;
/// Rounds on one pool.
const ROUNDS_OF_STORY: usize = 6;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
    )
}

/// What runs in the child; without its environment, nothing.
#[test]
fn child() {
    if let Ok(order) = std::env::var(child::ORDER) {
        child::run(&order);
    }
}

#[test]
fn what_was_acknowledged_survives_kill_9_at_any_moment() {
    if std::env::var(child::ORDER).is_ok() {
        return;
    }
    let rounds = number("SMSVMM_KILL_ROUNDS").map_or(ROUNDS, |rounds| rounds as usize);
    let seed = number("SMSVMM_KILL_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::from(now.subsec_nanos())
    });
    println!("SMSVMM_KILL_SEED={seed}");
    let started = Instant::now();
    let mut total = story::Numbers::default();
    for story in 0.. {
        if total.rounds >= rounds {
            break;
        }
        let left = rounds - total.rounds;
        total.add(&story::play(blocks::mix(seed, story), left.min(ROUNDS_OF_STORY)));
    }
    println!("{total}, in {:.1} s", started.elapsed().as_secs_f64());
    assert!(
        total.flushes > 0 && total.names > 0,
        "no child came as far as a flush and a name: nothing was tested"
    );
}
