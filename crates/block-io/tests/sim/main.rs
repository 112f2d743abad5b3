//! The simulator is proven with small systems: the right one survives everything, and each wrong one is caught.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disk;
mod executor;
mod faults;
mod history;
mod multipath;
mod proof;
mod superblock;
