//! Pools on real files, whose process is killed by SIGKILL at random moments.
//!
//! A test starts this program again as a child. The child opens a pool on five files, writes self-describing sectors at random
//! places with several requests in flight, and says through a pipe which flushes were acknowledged ([`child`]). The parent kills it
//! after some milliseconds; then either another child goes on at once (so that recovery is killed, too), or the parent opens the
//! pool itself, sometimes without one of the files, and looks at every sector ([`story`]): it must hold what the last acknowledged
//! flush made durable, or something that was written there later. Now and then a relayout or an evacuation is under way. At the
//! end of every story a scrub must find no difference.
//!
//! `kill -9` does not lose the page cache: whatever the kernel was given arrives. So this says nothing about missing flushes, which
//! is what the simulator is for (`tests/sim`). What it adds is what the simulator does not have: the kernel, io_uring, locks of a
//! dying process, requests that end after their process has.
//!
//! A dozen rounds run with the other tests. The long run:
//!
//! ```text
//! SMSVMM_KILL_ROUNDS=200 cargo test --release -p volume-manager --test kill -- --nocapture
//! ```
//! `SMSVMM_KILL_SEED` repeats the choices of a run, though not its timing.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod blocks;
mod child;
mod files;
mod story;

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use volume_manager::model::Layout;

/// Rounds of a normal test run.
const ROUNDS: usize = 12;

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
fn what_was_flushed_survives_kill_9_at_any_moment() {
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
    let layouts = [
        Layout::Mirror { legs: 2 },
        Layout::StripeMirror { columns: 2, legs: 2 },
        Layout::Raid5 { columns: 4 },
        Layout::Raid6 { columns: 4 },
    ];
    let mut total = story::Numbers::default();
    for story in 0.. {
        if total.rounds >= rounds {
            break;
        }
        let layout = layouts[story % layouts.len()];
        total.add(&story::play(blocks::mix(seed, story as u64), layout, 3));
    }
    println!("{total}, in {:.1} s", started.elapsed().as_secs_f64());
    assert!(
        total.flushes > 0,
        "no child came as far as a flush: nothing was tested"
    );
}
