//! How many crash states per second the simulator explores: `cargo bench -p block-io --features sim --bench sim`.
//!
//! The sample system's recovery is one small read per slot, a write and a flush, so this measures the simulator.

use std::time::Instant;

use block_io::sim::{ExploreOptions, Failure, Numbers, explore, explore_parallel, threads};

#[path = "../tests/sim/superblock.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "it belongs to the tests, which use more of it"
)]
mod superblock;

use superblock::{Build, Updates};

/// What continuous integration explores at least.
const STATES: u64 = 1_000_000;

fn main() {
    let scenario = Updates {
        build: Build::Right,
        count: 3,
        once: false,
    };
    let options = ExploreOptions {
        nesting: 2,
        nested_states: 64,
        schedules: 20,
        ..ExploreOptions::default()
    };
    measure("one thread", || explore(&scenario, &options));
    let threads = threads();
    let title = format!("{threads} threads");
    measure(&title, || explore_parallel(&scenario, &options, threads));
}

fn measure(title: &str, explore: impl Fn() -> Result<Numbers, Failure>) {
    let start = Instant::now();
    let mut numbers = Numbers::default();
    while numbers.crash_states < STATES {
        match explore() {
            Ok(more) => numbers.add(&more),
            Err(failure) => {
                eprintln!("{failure}");
                std::process::exit(1);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{title}: {numbers}");
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = numbers.crash_states as f64 / seconds;
    println!("{title}: {rate:.0} crash states per second, {seconds:.1} s");
}
