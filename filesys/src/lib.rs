//! The built-in file system: one name space over all volumes of a pool, made for few and huge files, the virtual disks.
//!
//! The code is plain `async fn` over [`BlockDevice`](block_io::BlockDevice) and [`Clock`](block_io::Clock); it runs on the pool's
//! worker in production, and in the simulator in tests. See `docs/src/filesys.md` for pictures, `docs/src/formats/filesys.md` for the
//! media.
//!
//! ```text
//!   FileSystem   File (a BlockDevice)          namespace, layers, file: what users call
//!        │            │
//!        └── core ────┘                        plans from the state, executes records, shares everything
//!              │
//!        state: apply(record)                  all metadata in memory, as trees of pages (tree), with volumes (volume) and files
//!         │            │
//!      journal     checkpoint                  records that are durable; trees that are durable (meta_space, superblock)
//!         └─────┬──────┘
//!        metadata volume                       data volumes: only data
//! ```

mod check;
mod checkpoint;
mod checksum;
mod copy;
mod core;
mod entry;
mod epochs;
mod error;
mod event;
mod failed_volume;
mod file;
mod file_core;
mod gate;
mod harm;
mod hash;
mod heal;
#[doc(hidden)]
pub mod hostile;
mod inode;
mod journal;
mod layers;
mod meta_io;
mod meta_space;
mod namespace;
mod open;
mod orphans;
mod pins;
mod record;
mod relocate;
mod replay;
mod report;
mod scrub;
mod state;
mod sums;
mod superblock;
mod tree;
mod trim;
mod units;
mod volume;
mod volumes;
mod wire;

pub use check::{CheckOptions, Finding, Progress, Report, Severity};
pub use error::FsError;
pub use event::Event;
pub use file::{Access, File};
#[doc(hidden)]
pub use harm::Harm;
pub use heal::{Copies, Redundancy};
pub use inode::{Attributes, Kind, Target};
pub use layers::Snapshot;
pub use namespace::{DirectoryEntry, NewFile, Stat};
pub use open::{FileSystem, FormatOptions, GivenVolume, OpenOptions};
pub use pins::Pin;
pub use relocate::{Relocation, RelocationProgress};
pub use report::{ExtentReport, FileExtent, PhysicalExtent, Place, Placed, Range, RangeKind, Usage};
pub use scrub::{Pace, ScrubFinding, ScrubOptions, ScrubPhase, ScrubPosition, ScrubReport};
pub use state::Damage;
pub use units::{CLUSTER, FileId, Location, MAX_FILE, MAX_NAME, MAX_VOLUMES, SUB_CLUSTER, VolumeIndex};
pub use volumes::{MetadataStat, VolumeStat};
