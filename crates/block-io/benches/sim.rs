//! How many crash states per second the simulator explores: `cargo bench -p block-io --features sim --bench sim`.
//!
//! The sample system's recovery is one small read per slot, a write and a flush, so this measures the simulator.

use std::time::Instant;

use block_io::sim::{ExploreOptions, Numbers, explore};

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
    };
    let options = ExploreOptions {
        nesting: 2,
        nested_states: 64,
        schedules: 20,
        ..ExploreOptions::default()
    };
    let start = Instant::now();
    let mut numbers = Numbers::default();
    while numbers.crash_states < STATES {
        match explore(&scenario, &options) {
            Ok(more) => numbers.add(&more),
            Err(failure) => {
                eprintln!("{failure}");
                std::process::exit(1);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{numbers}");
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = numbers.crash_states as f64 / seconds;
    println!("{rate:.0} crash states per second, {seconds:.1} s");
}
