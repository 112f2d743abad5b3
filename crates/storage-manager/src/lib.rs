//! Pools put together from the names of their devices, and the operations of people on them.
//!
//! ```text
//!   command line ──Operation──► offline   opens the devices under a lock, does it, waits for its jobs, closes
//!                                  │
//!                 device, opening  │      names → devices; what may be destroyed
//!                 operation        │      Operation → calls of volume_manager::Pool
//!                 view             │      Configuration → api::storage types
//!                 problem          ▼      errors → problems with object, reason, remedy
//!                        volume_manager::Pool
//! ```
//!
//! A pool lives on one worker of block-io, so everything here that touches one is a task of that worker.

mod check;
mod configured;
mod conversation;
mod device;
mod disks;
mod disks_image;
mod disks_transfer;
mod disks_view;
mod export;
mod file_view;
mod files;
mod format;
mod hosted;
mod job_book;
mod live;
mod load;
mod member;
mod moment;
mod move_disk;
mod offline;
mod opening;
mod operation;
mod owners;
mod pipe;
mod places;
mod problem;
mod random;
mod ranges;
mod reservations;
mod scrub;
mod storage;
mod stream;
mod tail;
mod told;
mod view;
mod volumes;
mod works;

pub use conversation::{Flow, Notice, Work};
pub use device::{Device, DevicePaths};
pub use disks::{Disks, VirtualDisk, execute_disk, look_at_disks};
pub use disks_image::export_disk;
pub use disks_transfer::{copy_disk, import_disk};
pub use disks_view::disk_mode;
pub use export::DiskExport;
pub use files::execute_file;
pub use hosted::{DiskGuard, HostedDisk, HostedPool, ResizeHook};
pub use live::{Connect, Line, PoolAt};
pub use load::hot_spots;
pub use member::{Member, Sheet};
pub use offline::{Force, create, execute, status};
pub use owners::{owner_of_initiator, owner_of_machine};
pub use ranges::read_ranges;
pub use storage::{Access, File, FileSystem, Storage, Volume};
pub use storage_virtualizer::disk::{DiskMode, DiskOptions, PowerOff};
pub use stream::{read_file, write_file};
