//! Virtual disks of a pool from the command line: made, kept, copied, imported and exported, and what is said to mistakes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod commands;
mod images;
mod mistakes;

#[allow(dead_code)]
#[path = "../files/help.rs"]
mod help;
#[allow(dead_code)]
#[path = "../storage/place.rs"]
mod place;
