//! Volumes of every layout on the devices of a pool: what lies where, redundancy, and every change of it while guests run.
//!
//! A *pool* is a set of labelled devices and the volumes on them. Each device holds the whole configuration of the pool. The
//! code is plain `async fn` over [`BlockDevice`](block_io::BlockDevice) and [`Clock`](block_io::Clock); it runs on one worker in
//! production, and in the simulator in tests. See `docs/src/volumes.md` for pictures, `docs/src/formats/` for the media.
//!
//! ```text
//!   Volume (a BlockDevice)       address space = sections, one after the other
//!     Section                    columns, stripe unit, parity 0, 1 or 2:   stripe · raid5 · raid6
//!       Column                   members that hold the same bytes:         mirror · leg being filled · extent being moved
//!         Member                 extents, one after the other:             concat
//!           Extent               (device, start, length)
//! ```
//!
//! All layouts are points in this one picture, so there is one implementation of each mechanism: a resync, a rebuild onto a
//! spare, the move of an extent, the evacuation of a device are all "fill a member of a column, then drop another"; a change of
//! layout, a grow, a shrink are "replace a section piece by piece".

mod bytes;
mod checksum;
mod engine;
pub mod format;
pub mod logs;
pub mod model;
pub mod place;
pub mod store;

pub use engine::core::Refused;
pub use engine::counters::{CLASSES, Count, Histogram, Statistics};
pub use engine::event::Event;
pub use engine::hot::{DeviceLoad, HotSpots, LegLoad, Sample};
pub use engine::meter::{Meter, Pace};
pub use engine::physical::Physical;
pub use engine::pool::{NewDevice, NewVolume, OpenOptions, Pool, PoolError};
pub use engine::usage::Usage;
pub use engine::volume::Volume;
