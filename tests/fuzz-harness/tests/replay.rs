//! Every target with its corpus and with many pseudo-random inputs, without a fuzzer: part of `cargo test`.
//!
//! An input that fails is written to `target/`; `Target::execute` with its bytes fails again.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use fuzz_harness::Target;
use fuzz_harness::random::Random;

fn replay(name: &str, inputs: u64) {
    let target = Target::find(name).unwrap();
    if !(target.is_possible)() {
        eprintln!("skipped: {name} needs /dev/kvm");
        return;
    }
    for path in corpus(name) {
        attempt(
            target,
            &std::fs::read(&path).unwrap(),
            &path.display().to_string(),
        );
    }
    let seed = name
        .bytes()
        .fold(0_u64, |seed, byte| seed.wrapping_mul(257) + u64::from(byte));
    let mut random = Random::new(seed);
    for number in 0..inputs {
        attempt(
            target,
            &random.input(target.max_length),
            &format!("pseudo-random input {number}"),
        );
    }
}

/// Files of the target's corpus, which is not empty.
fn corpus(name: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(name);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    assert!(!files.is_empty());
    files.sort();
    files
}

fn attempt(target: &Target, input: &[u8], what: &str) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target.execute(input))) {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-failure", target.name));
        std::fs::write(&file, input).unwrap();
        eprintln!("{} fails with {what}, kept in {}", target.name, file.display());
        resume_unwind(panic);
    }
}

/// One test per target, so that each shows with its name and its time.
macro_rules! replays {
    ($($test:ident: $name:literal, $inputs:literal;)*) => {
        $(#[test]
        fn $test() {
            replay($name, $inputs);
        })*

        #[test]
        fn every_target_is_replayed() {
            let names: Vec<&str> = fuzz_harness::TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$($name),*]);
        }
    };
}

replays! {
    pci: "pci", 10_000;
    transport: "transport", 200;
    platform: "platform", 10_000;
    serial: "serial", 10_000;
    rtc: "rtc", 10_000;
    block_request: "block-request", 5_000;
    block_queue: "block-queue", 5_000;
    scsi_queue: "scsi-queue", 3_000;
    rng: "rng", 10_000;
    console: "console", 5_000;
    net: "net", 2_000;
    nbd: "nbd", 1_000;
    iscsi: "iscsi", 1_000;
    config: "config", 10_000;
    escape: "escape", 10_000;
    pool_device: "pool-device", 20_000;
    filesys_media: "filesys-media", 20_000;
    filesys_image: "filesys-image", 2_000;
    disk_descriptor: "disk-descriptor", 20_000;
    disk_image: "disk-image", 2_000;
    vhost_user: "vhost-user", 3_000;
    scsi: "scsi", 5_000;
    expanded_api: "expanded-api", 1_000;
    backup_archive: "backup-archive", 3_000;
    backup_plan: "backup-plan", 10_000;
}
