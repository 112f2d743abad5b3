//! The store of a pool's configuration in the simulator: crashes, missing devices, failing and stale devices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod history;
mod pool;
mod proof;
mod stories;
