//! Virtual disks in the simulator, on the whole stack: disks, file system, volumes on mirrors, simulated devices.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod disks;
mod harness;
mod history;
mod model;
#[path = "../../../filesys/tests/sim/pools.rs"]
mod pools;
#[path = "../../../filesys/tests/sim/rig.rs"]
mod rig;
