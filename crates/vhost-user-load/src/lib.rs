//! Drives a vhost-user-blk server as a virtual machine would, without one: the guest's memory is a memfd, its driver is here.
//!
//! ```text
//!   load: what to ask for, how fast it went, whether the bytes are right
//!     └ queue: a virtqueue as Linux' driver uses it: indirect descriptors, event index, one doorbell per batch
//!         └ front_end: the connection; made again when the server was restarted, with what was in flight
//! ```
//! For benches (`cargo xtask bench disks`), and for tests: [`load::run`] in verify mode finds lost, misplaced and torn writes, also
//! over a server that is killed and started again.

pub mod front_end;
pub mod histogram;
pub mod load;
pub mod pattern;
pub mod queue;
