//! The swarm level: long random histories of several users at once, of crashes, full volumes, failing requests.
//!
//! Each history has a few files and chains. Steps between two crashes run in *rounds*: the steps of a round run at the same time, each in
//! a task of its own, on whatever handles are open. At the end of a round all is compared with the model, and some rounds are cut by a crash.
//!
//! ```text
//!   disks     on disks: what is damaged is damaged           volumes   on mirrors and RAID-5: what one device does is not noticed
//!       └──────── session, changes: the steps ────────────────┘
//! ```

mod changes;
mod disks;
mod session;
mod volumes;

use block_io::BlockDevice;
use block_io::sim::{Failure, Rng, Sim, World};
use filesys::FsError;

use crate::harness::SimFs;
use crate::machine::Promise;
use session::Session;

const SUB: u64 = 4096;
const CLUSTER: u64 = 64 << 10;
/// Files that histories speak of.
const NAMES: u64 = 6;

/// The process is killed, or the power cut, which the model is told at once: it may happen again before anything is looked at.
fn end(world: &mut World, rng: &mut Rng, promise: &Promise, killed: bool) {
    match killed {
        true => world.kill(rng),
        false => world.crash(rng),
    }
    promise.borrow_mut().ends(killed);
}

/// One step. Numbers choose among what is there when it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Write {
        file: u64,
        sector: u64,
        count: u64,
        fua: bool,
    },
    Discard {
        file: u64,
        sub: u64,
        count: u64,
    },
    Zero {
        file: u64,
        sub: u64,
        count: u64,
        keep: bool,
    },
    Flush {
        file: u64,
    },
    Read {
        file: u64,
    },
    Create {
        name: u64,
        size: u64,
        thick: bool,
        checked: bool,
    },
    Delete {
        file: u64,
    },
    Rename {
        file: u64,
        name: u64,
    },
    Resize {
        file: u64,
        size: u64,
    },
    Snapshot {
        file: u64,
        other: Option<u64>,
    },
    Clone {
        file: u64,
        name: u64,
    },
    Absorb {
        file: u64,
        named: bool,
    },
    Thaw {
        file: u64,
    },
    Checksums {
        file: u64,
        on: bool,
    },
    Relocate {
        file: u64,
    },
    Checkpoint,
    /// The round ends: all steps since the last one ran at the same time.
    Join,
    /// The power is cut after so many events of what follows.
    Crash {
        after: u64,
    },
    /// The next write of a data volume fails.
    WriteFails,
    /// Closed in order and opened again.
    Reopen,
    /// A device begins to misbehave.
    DeviceFails {
        disk: u64,
        way: u64,
    },
    /// Data of a device rot, all of them on one.
    Rot {
        disk: u64,
        place: u64,
    },
    /// What was away comes back, and all is made whole.
    Heal,
}

impl Step {
    /// Whether it stands alone, when all before it have ended.
    fn ends_round(&self) -> bool {
        matches!(
            self,
            Self::Join
                | Self::Reopen
                | Self::WriteFails
                | Self::DeviceFails { .. }
                | Self::Rot { .. }
                | Self::Heal
        )
    }
}

/// What a history runs on.
trait Bed {
    type Device: BlockDevice + 'static;

    async fn open(&self, sim: &Sim) -> Result<SimFs<Self::Device>, FsError>;

    /// Does a step that stands alone.
    async fn between(&self, sim: &Sim, session: &Session<Self::Device>, step: &Step) -> Result<(), Failure>;
}

/// Draws a history.
fn draw(rng: &mut Rng) -> Vec<Step> {
    let sectors = 3 * CLUSTER / 512;
    let mut steps = Vec::new();
    for name in 0..3 {
        steps.push(Step::Create {
            name,
            size: 48,
            thick: rng.chance(1, 6),
            checked: rng.chance(1, 4),
        });
    }
    steps.push(Step::Join);
    while steps.len() < 120 {
        let file = rng.below(16);
        let name = rng.below(NAMES);
        let step = match rng.below(100) {
            0..3 => Step::Crash {
                after: rng.below(900),
            },
            3..16 => Step::Join,
            16..22 => Step::Flush { file },
            22..28 => Step::Read { file },
            28..31 => Step::Discard {
                file,
                sub: rng.below(48),
                count: 1 + rng.below(20),
            },
            31..34 => Step::Zero {
                file,
                sub: rng.below(48),
                count: 1 + rng.below(20),
                keep: rng.chance(1, 2),
            },
            34..37 => Step::Create {
                name,
                size: 1 + rng.below(60),
                thick: rng.chance(1, 3),
                checked: rng.chance(1, 4),
            },
            37..40 => Step::Delete { file },
            40..42 => Step::Rename { file, name },
            42..45 => Step::Resize {
                file,
                size: 1 + rng.below(60),
            },
            45..51 => Step::Snapshot {
                file,
                other: rng.chance(1, 3).then(|| rng.below(16)),
            },
            51..53 => Step::Clone { file, name },
            53..58 => Step::Absorb {
                file,
                named: rng.chance(1, 2),
            },
            58 => Step::Thaw { file },
            59 => Step::Checksums {
                file,
                on: rng.chance(1, 2),
            },
            60..62 => Step::Relocate { file },
            62..64 => Step::Checkpoint,
            64 => Step::WriteFails,
            65 => Step::Reopen,
            _ => Step::Write {
                file,
                sector: if rng.chance(1, 2) {
                    rng.below(sectors)
                } else {
                    rng.below(sectors / 8) * 8
                },
                count: if rng.chance(1, 2) {
                    1 + rng.below(40)
                } else {
                    8 * (1 + rng.below(20))
                },
                fua: rng.chance(1, 6),
            },
        };
        steps.push(step);
    }
    steps
}
