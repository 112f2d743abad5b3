//! An open pool at work: I/O, failures, jobs.
//!
//! ```text
//!   pool      create, open, close; volumes and devices come and go
//!   jobs      long operations: what to do next follows from the configuration, so they go on after any crash
//!   volume    requests → sections → columns          rows   sections with parity
//!   fill      copying into members                   relayout  replacing sections piece by piece
//!   core      the configuration and who may change it; failing devices
//!   map, disk, ranges, geometry, join, list          what all of them use
//! ```

pub(crate) mod admin;
pub(crate) mod core;
pub(crate) mod counters;
pub(crate) mod degrade;
pub(crate) mod disk;
pub(crate) mod event;
pub(crate) mod fill;
pub(crate) mod geometry;
pub(crate) mod job;
pub(crate) mod join;
pub(crate) mod list;
pub(crate) mod map;
pub(crate) mod pool;
pub(crate) mod ranges;
pub(crate) mod relayout;
pub(crate) mod rows;
pub(crate) mod scrub;
pub(crate) mod volume;
pub(crate) mod work;
