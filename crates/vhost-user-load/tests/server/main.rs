//! The vhost-user-blk server under load: in this process, in one that is killed, and with front-ends that mean harm.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod hostile;
mod killed;
mod life;
mod place;
