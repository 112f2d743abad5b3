//! The file system in the simulator.

mod features;
mod harness;
mod smoke;
