//! The file system in the simulator.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod check;
mod check_beside;
mod features;
mod harness;
mod heal;
mod machine;
mod model;
mod points;
mod scripts;
mod smoke;
mod swarm;
