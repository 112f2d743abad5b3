//! A disk that another process serves, as the guest's driver meets it: with our own server, and with servers that are broken, gone,
//! or mean harm.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

#[path = "../driver/mod.rs"]
mod driver;
mod fake;
mod hostile;
mod life;
mod place;
mod scsi;
