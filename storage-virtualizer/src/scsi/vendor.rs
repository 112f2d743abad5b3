//! Where vendor-specific commands go, if somebody does them.
//!
//! A unit has a [`VendorCommands`] or none. The standard path costs one compare of the operation code, and only where a command
//! is not a plain read or write.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use super::{Command, Nexus, Outcome, Unit};

/// EXPANDED API IN and OUT.
pub const VENDOR_OPCODES: [u8; 2] = [0xc0, 0xc1];
/// The page of vital product data that tells of them.
pub const VENDOR_PAGE: u8 = 0xe5;

/// Does vendor-specific commands.
pub trait VendorCommands: Send + Sync + fmt::Debug {
    /// Executes a command with one of [`VENDOR_OPCODES`]; what it answers is made by [`Outcome::done`] and
    /// [`Outcome::failed`].
    fn execute<'a>(
        &'a self,
        unit: &'a Unit,
        nexus: &'a Nexus,
        command: &'a Command<'a>,
    ) -> Pin<Box<dyn Future<Output = Outcome> + 'a>>;

    /// What page [`VENDOR_PAGE`] of `unit` says to `nexus`, without its header of four bytes.
    fn page(&self, unit: &Unit, nexus: &Nexus) -> Vec<u8>;
}
