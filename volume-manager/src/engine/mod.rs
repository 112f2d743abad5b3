//! An open pool at work: I/O, failures, jobs.
//!
//! ```text
//!   pool, create, admin    made; volumes and devices come and go; sizes change
//!   open            opened with recovery, kept in order, closed
//!   work, tasks     jobs: started, steered, waited for; what each kind does, read from the configuration step by step
//!   volume, reading     requests → sections → columns; reads and repairs
//!   rows, reconstruct   writes to rows with parity; what is computed from the others, and parity made anew
//!   fill, relayout  copying into members; replacing sections piece by piece; scrub: comparing
//!   copies          each copy by itself, and repairs by who knows what is right
//!   first           reads that the first answer of two legs ends
//!   hot, tune       which devices have how much load, and from which volumes; moving it
//!   usage           what the layer above uses of a volume: the rest is not copied
//!   core, degrade   the configuration and who may change it; what the failure of a device changes
//!   keep            the pool's logs
//!   physical        where bytes are on devices, for who reads them there
//!   map, disk, ranges, geometry, join, list, counters, event, job, meter     what all of them use
//! ```

pub(crate) mod admin;
pub(crate) mod copies;
pub(crate) mod core;
pub(crate) mod counters;
pub(crate) mod create;
pub(crate) mod degrade;
pub(crate) mod disk;
pub(crate) mod event;
pub(crate) mod fill;
pub(crate) mod first;
pub(crate) mod geometry;
pub(crate) mod hot;
pub(crate) mod job;
pub(crate) mod join;
pub(crate) mod keep;
pub(crate) mod list;
pub(crate) mod map;
pub(crate) mod meter;
pub(crate) mod open;
pub(crate) mod physical;
pub(crate) mod pool;
pub(crate) mod ranges;
pub(crate) mod reading;
pub(crate) mod reconstruct;
pub(crate) mod relayout;
pub(crate) mod rows;
pub(crate) mod scrub;
pub(crate) mod tasks;
pub(crate) mod tune;
pub(crate) mod usage;
pub(crate) mod volume;
pub(crate) mod work;
