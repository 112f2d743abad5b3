//! PCI Express as the guest sees it: one root bus with a host bridge and up to 31 functions, each a device of its own.
//!
//! ```text
//!   ECAM window ───┐
//!   ports CF8/CFC ─┴─► PciBus ── configuration access ──► slot 0: host bridge
//!                        │                                slot n: PciFunction (virtio transport)
//!   32/64-bit windows ───┴─ address decode table ───────► PciFunction::bar_read / bar_write
//! ```
//!
//! Functions appear and vanish while the guest runs (hot-plug, [`crate::machine`]); the decode table follows every move of a
//! BAR. Interrupts are message-signalled only: there are no INTx pins and no interrupt routing table.

mod bus;
mod config;
mod msix;

pub use bus::{Cf8, Ecam, HostBridge, PciBus, PciError, Window};
pub use config::{BarKind, ConfigSpace, Identity};
pub use msix::{Msix, NO_VECTOR};

use std::ops::Range;

/// One function on the bus. Called on vCPU threads.
pub trait PciFunction: Send + Sync {
    /// Reads `data.len()` (1, 2 or 4) bytes of configuration space from `offset` on; never crosses a dword.
    fn config_read(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration space, as [`Self::config_read`] reads it.
    fn config_write(&self, offset: usize, data: &[u8]);

    /// The guest physical addresses at which the function's memory BAR answers now, if it does.
    fn bar(&self) -> Option<Range<u64>>;

    /// Reads the BAR's memory; any width from 1 to 8 bytes, any alignment.
    fn bar_read(&self, offset: u64, data: &mut [u8]);

    /// Writes the BAR's memory.
    fn bar_write(&self, offset: u64, data: &[u8]);
}
