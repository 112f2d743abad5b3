//! The file system in the simulator.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod allocator;
mod chains;
mod check;
mod check_beside;
mod content;
mod errors;
mod exhaustive;
mod failed_volume;
mod features;
mod harness;
mod heal;
mod machine;
mod merges;
mod model;
mod names;
mod points;
mod pools;
mod rig;
mod scripts;
mod smoke;
mod swarm;
