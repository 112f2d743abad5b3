//! The file system in the simulator.

mod harness;
mod smoke;
