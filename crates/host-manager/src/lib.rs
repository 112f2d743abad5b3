//! The manager of a host: `smsvmm serve`.
//!
//! ```text
//!   smsvmm ... ─► management socket ─► Manager ─┬─ pools      open as long as the manager lives
//!   machines' processes ───────────────────┘    ├─ disks      served to machines' processes, over vhost-user
//!                                               └─ machines   definitions; processes that are started, watched, started again
//! ```
//!
//! # What outlives what
//! - *A machine ends:* its connections close, its disks are closed as at power-off; if its process dies, they are left as after a crash. The
//!   manager goes on.
//! - *The manager ends, in whatever way:* machines go on; their disks answer no more, so what the guest asks of them waits. The next manager
//!   opens the pools, finds the machines by their processes, and their processes ask for their disks again: what was in flight is done again.
//!
//! The manager keeps no record of disks in use: who uses one says so by a connection, and says so again to the next manager.

// The way of a request from a virtqueue to a device is one future, of all layers: nothing on it is allocated.
#![recursion_limit = "256"]

mod accounts;
mod config;
mod disks;
mod door;
mod group;
mod machines;
mod manager;
mod places;
mod principal;
mod process;
mod served;
mod store;
mod units;
mod users;

pub use config::{Allow, AtEnd, HostConfig, MachinesConfig, Management, Pools};
pub use disks::{DiskService, MachineDoor};
pub use door::Storage;
pub use machines::{MachineOptions, Machines};
pub use manager::Manager;
pub use process::Report;
pub use users::Users;
