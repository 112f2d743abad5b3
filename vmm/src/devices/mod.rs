//! The virtual devices other than disks: network card, entropy source, console.
//!
//! Each is a [`virtio_core::VirtioDevice`] and knows nothing of PCI. A network card serves its queues in threads of its
//! own, because its work is system calls that move data; the entropy source and the console have little to do and live on
//! the VMM's event loop ([`event_loop`]).

pub mod event_loop;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod net;
pub mod rng;
pub mod virtio_console;

mod guest_buffers;
mod used_ring;

#[cfg(test)]
mod test_driver;
