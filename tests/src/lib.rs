//! System stories: tests that run whole virtual machines.
//!
//! A story is a closure over the [`Host`] on which virtual machines run. Where this machine's KVM can run stock kernels
//! the closure runs right here; elsewhere the test program starts itself again in the lab, for this one test. The story
//! does not know where it is: it finds the same programs, images and folders.
//!
//! ```no_run
//! use stories::{Kernel, story};
//!
//! #[test]
//! fn a_guest_sees_its_processors() {
//!     story(|host| {
//!         let guest = host.vm("two").cpus(2).memory("512M").script("nproc").run()?;
//!         assert_eq!(guest.script_output().trim(), "2");
//!         assert_eq!(guest.exit_code(), Some(0));
//!         Ok(())
//!     });
//! }
//! ```
//!
//! Environment: `SMSVMM_BIN` names the program under test (else the one that cargo built), `SMSVMM_STORIES=here|lab` forces
//! the place, `SMSVMM_VMM=qemu` tells the same stories with QEMU, for comparison.

mod agent;
mod console;
mod emulated;
mod host;
mod place;
mod pool;
mod server;
mod terminal;
pub mod transfer;
mod vm;
mod watchdog;

use std::time::Duration;

use anyhow::Result;

pub use agent::Events;
pub use emulated::{emulated, emulated_with_agent, emulated_with_tools};
pub use host::{Host, Kernel};
pub use lab::Output;
pub use place::{program, run_program};
pub use pool::{MappedDevice, Pool};
pub use server::Server;
pub use terminal::{Mode, Terminal};
pub use vm::{Disk, Outcome, Vm, VmBuilder};

/// Rounds of a campaign, if this is one: `SMSVMM_CAMPAIGN`.
///
/// # Panics
/// When that is no number of rounds.
#[must_use]
pub fn campaign() -> Option<u32> {
    let rounds = std::env::var("SMSVMM_CAMPAIGN").ok()?;
    match rounds.parse() {
        Ok(rounds) if rounds != 0 => Some(rounds),
        _ => panic!("SMSVMM_CAMPAIGN is a number of rounds, not {rounds:?}"),
    }
}

/// What a story needs of the place where it is told.
#[derive(Clone, Debug)]
pub struct Story {
    pub(crate) lab: lab::Builder,
    pub(crate) limit: Duration,
    pub(crate) changes_the_host: bool,
    pub(crate) static_program: bool,
    pub(crate) guest_tools: bool,
    pub(crate) agent: bool,
}

impl Default for Story {
    fn default() -> Self {
        Self {
            lab: lab::Lab::builder(),
            limit: Duration::from_secs(240),
            changes_the_host: false,
            static_program: false,
            guest_tools: false,
            agent: false,
        }
    }
}

impl Story {
    /// Memory of the host in MiB, where more than the lab's 3072 is needed.
    #[must_use]
    pub fn host_memory_mib(mut self, mib: u32) -> Self {
        self.lab = self.lab.memory_mib(mib);
        self
    }

    /// Processors of the host, where more than the lab's one matter.
    #[must_use]
    pub fn host_cpus(mut self, cpus: u8) -> Self {
        self.lab = self.lab.cpus(cpus);
        self
    }

    /// Time in the lab passes with the instructions executed, so that what is measured repeats.
    #[must_use]
    pub fn deterministic(mut self) -> Self {
        self.lab = self.lab.deterministic(true);
        self
    }

    /// It needs root and changes its host (mounts, block devices, interfaces): always told in the lab.
    #[must_use]
    pub fn changes_the_host(mut self) -> Self {
        self.changes_the_host = true;
        self
    }

    /// It needs [`Host::static_smsvmm`].
    #[must_use]
    pub fn static_program(mut self) -> Self {
        self.static_program = true;
        self
    }

    /// Its guests use programs for file systems: [`VmBuilder::with_guest_tools`].
    #[must_use]
    pub fn guest_tools(mut self) -> Self {
        self.guest_tools = true;
        self
    }

    /// Its guests use `sms-agent`: [`VmBuilder::with_agent`].
    #[must_use]
    pub fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// When the whole story has failed.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Tells the story, in the right place.
    ///
    /// # Panics
    /// When the story fails: this is how a test says so.
    #[track_caller]
    pub fn tell<F: FnOnce(&Host) -> Result<()>>(self, story: F) {
        let name = place::test_name::<F>();
        if let Err(error) = place::tell(&self, &name, story) {
            panic!("{name}: {error:?}");
        }
    }
}

/// Tells a story with the usual needs.
///
/// # Panics
/// When the story fails: this is how a test says so.
#[track_caller]
pub fn story<F: FnOnce(&Host) -> Result<()>>(story: F) {
    Story::default().tell(story);
}
