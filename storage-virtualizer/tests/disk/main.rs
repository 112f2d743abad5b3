//! Virtual disks, the whole stack below them on simulated disks: what they read is what was written, whatever happens.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod crash;
mod help;
mod load;
mod pairs;
mod record;
mod stories;
