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

mod device;
mod load;
mod offline;
mod opening;
mod operation;
mod problem;
mod random;
mod view;

pub use device::{Device, DevicePaths};
pub use load::hot_spots;
pub use offline::{Flow, Force, Notice, create, execute, status};
