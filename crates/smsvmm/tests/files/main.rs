//! Files of a pool from the command line: what is written is read again, whatever happens to devices, volumes and processes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod broken;
mod commands;
mod help;
mod scrub;
mod volumes;

#[allow(dead_code)]
#[path = "../storage/place.rs"]
mod place;
