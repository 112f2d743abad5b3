//! Pools from the command line: what is printed, with which status it ends, what the JSON looks like; and what becomes of pools
//! whose devices are damaged, foreign, full, or behind servers that die or lie.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod commands;
mod damage;
mod network;
mod open;
mod place;

#[allow(dead_code)]
#[path = "../../../block-io/tests/nbd/fake.rs"]
mod fake;
#[allow(dead_code)]
#[path = "../../../block-io/tests/nbd/servers.rs"]
mod servers;
