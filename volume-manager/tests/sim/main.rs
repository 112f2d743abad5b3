//! The volume manager in the simulator: crashes at every event, failing devices, everything online.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod copies;
mod crash;
mod detached;
mod harness;
mod interrupted;
mod load;
mod online;
mod partial;
mod scale;
mod swarm;
mod usage;
