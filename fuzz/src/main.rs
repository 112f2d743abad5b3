//! libFuzzer around one target of `fuzz_harness`, named by the environment variable `SMSVMM_FUZZ_TARGET`.

#![no_main]

use std::sync::OnceLock;

use fuzz_harness::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<&Target> = OnceLock::new();

fuzz_target!(|data: &[u8]| TARGET.get_or_init(choose).execute(data));

/// The target that the environment names. Ends the process, with status 3, where it cannot run on this machine.
fn choose() -> &'static Target {
    let name = std::env::var("SMSVMM_FUZZ_TARGET").unwrap_or_default();
    let Some(target) = Target::find(&name) else {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("SMSVMM_FUZZ_TARGET is {name:?}; there are {}", names.join(", "));
        std::process::exit(2);
    };
    if !(target.is_possible)() {
        eprintln!("{name} cannot run here: it needs /dev/kvm");
        std::process::exit(3);
    }
    target
}
