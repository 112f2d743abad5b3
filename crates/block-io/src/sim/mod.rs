//! The simulator: a computer with disks, whose time, scheduling, crashes and faults are ours (feature `sim`).
//!
//! # Why
//! Storage code is wrong in the moments that tests on real files never see: between two sectors of one write, between a
//! write and its flush, while it recovers from the last crash. Here these moments are enumerated, or drawn from a seed.
//! The code under test is the production code: plain `async fn` over [`BlockDevice`](crate::BlockDevice) and
//! [`Clock`](crate::Clock).
//!
//! ```text
//!   explore (all crash points × all crash states, nested;        swarm (long random histories, replay, shrinking)
//!        │   on all processors, equal states once)                      │
//!        └──────────────────────────────┬────────────────────────────┘
//!   World: the media, survives crashes; World::run = one power-on          SectorModel: what was promised (oracle)
//!        │
//!   Sim: seeded executor: which task runs next, which request ends next, virtual clock, hash of all events, deadlocks
//!        │
//!   SimDisk: BlockDevice          FaultPlan: which faults, how many copies may be hit at once
//!        │
//!   Medium: durable image + volatile writes in order + requests in flight
//! ```
//!
//! # The crash model
//! A medium is an array of *sectors* ([`DiskOptions::sector`] bytes, the unit that a power cut leaves whole). It has a
//! durable image D, an ordered list V of volatile changes, and a set F of requests in flight.
//!
//! - A write is copied when it is submitted, and then is in F. When it completes, it moves to the end of V (so V is in the
//!   order of completion); with FUA it is applied to D instead, and what V has for these sectors is forgotten.
//! - A flush remembers at its submission what is in V. When it completes, that part of V is applied to D in order.
//!   Writes that complete while the flush is in flight gain nothing by it.
//! - A read sees D changed by V in order, as of a moment between its submission and its completion. Of writes in F that
//!   overlap it, it sees any subset of the sectors; what was seen once stays seen.
//! - Zeroing is a write of zeroes. A discard is a write of, chosen by the seed for each sector, the old content, zeroes or
//!   garbage; later reads agree on it. Ranges above 16 MiB are decided as a whole.
//! - A process may be *killed* between any two events, while the power stays: every completed change is still there, in D or V as before,
//!   and of F, each sector is there or not. What outlives processes is left ([`Sim::lasting_memory`]), which a crash takes.
//! - A crash may come between any two events. Each sector then holds *independently* its content in D, or what any one
//!   change of V or F has for it. (For each sector, that is what keeping any subset of V and F, applied in any order,
//!   leads to.) Nothing else survives; memory is lost.
//! - A request that fails has changed each sector of its range or has not.
//!
//! Nothing depends on wall clocks, addresses, threads or the iteration order of hash maps: one seed is one history, and
//! two runs of it have the same [`RunSummary::hash`].

mod crash;
mod disk;
mod executor;
mod explore;
mod fault;
mod host;
mod image;
mod medium;
mod memory;
mod oracle;
mod path;
mod report;
mod rng;
mod swarm;
mod world;

pub use crash::CrashStates;
pub use disk::SimDisk;
pub use executor::{Schedule, Sim, SimClock};
pub(crate) use executor::{spawn_on_current, watch};
pub use explore::{ExploreOptions, Scenario, Shared, explore, explore_parallel, threads};
pub use fault::{AtMostDevices, Fault, FaultPlan, FaultPolicy, FaultRates, FaultRule, Hit};
pub use host::Host;
pub use medium::{DiskOptions, Medium};
pub use oracle::{SectorModel, Ticket};
pub use path::SimPath;
pub use report::{Failure, Numbers};
pub use rng::{Rng, fingerprint};
pub use swarm::{Shrunk, SwarmOptions, Workload, shrink, swarm};
pub use world::{Ended, RunOptions, RunSummary, World};
