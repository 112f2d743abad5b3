//! A SCSI adapter at a socket: vhost-user-scsi.
//!
//! The adapter, and with it the initiator's name and what its units know of it, lasts as long as the server; front-ends come and go, one at
//! a time. A front-end that goes is the loss of the I_T nexus (SAM-5 §6.3.4): persistent reservations stay.
//!
//! ```text
//!   socket a ─ front-end ─► adapter a, an initiator ─┐
//!                                                    ├─► units, shared: reservations, attentions, disks
//!   socket b ─ front-end ─► adapter b, another one  ─┘
//! ```

use std::fmt;
use std::io;
use std::path::Path;

use block_io::WorkerHandle;

use super::VhostUserError;
use super::listener::{Export, FrontEndState, Listener, ThreadHook};
use crate::disk_handle::DiskHandle;
use crate::queue::Counters;
use crate::virtio_scsi::{AddUnitError, ScsiGroup, VirtioScsi, VirtioScsiHandle, VirtioScsiOptions};

struct ScsiExport<H> {
    adapter: VirtioScsi<H>,
    memory_stays: bool,
}

impl<H: DiskHandle> Export for ScsiExport<H> {
    type Device = VirtioScsi<H>;
    /// The adapter counts over all front-ends.
    type Handle = ();

    fn device(&self) -> io::Result<(Self::Device, Self::Handle)> {
        Ok((self.adapter.twin(), ()))
    }

    fn memory_stays(&self) -> bool {
        self.memory_stays
    }

    fn counters((): &Self::Handle) -> Vec<Counters> {
        Vec::new()
    }
}

/// A SCSI adapter that is served at a socket, to one front-end at a time. Dropping it is [`Self::stop`].
pub struct VhostUserScsiServer<H: DiskHandle>(Listener<ScsiExport<H>>);

impl<H: DiskHandle> fmt::Debug for VhostUserScsiServer<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VhostUserScsiServer")
            .field("path", &self.0.path())
            .field("adapter", &self.0.export().adapter)
            .finish_non_exhaustive()
    }
}

impl<H: DiskHandle> VhostUserScsiServer<H> {
    /// Listens at `path` and serves an adapter, whose request queue n is served by worker n modulo their number. `prepare` adds the logical units
    /// that are there from the beginning: a front-end that has lost another server repeats its commands at once. What is a unit of several
    /// adapters of `group` is a unit of as many initiators.
    /// `memory_stays`, `confine`: see [`super::VhostUserOptions`]. The socket is for its owner only.
    ///
    /// # Errors
    /// Someone else is there, the options are impossible, `prepare` fails, or the host has nothing left.
    pub fn start(
        path: &Path,
        options: &VirtioScsiOptions,
        workers: Vec<WorkerHandle>,
        group: &ScsiGroup<H>,
        memory_stays: bool,
        confine: Option<ThreadHook>,
        prepare: impl FnOnce(&VirtioScsiHandle<H>) -> Result<(), AddUnitError>,
    ) -> Result<Self, VhostUserError> {
        let adapter = VirtioScsi::new_in(options, workers, Some(group))?;
        prepare(&adapter.handle())?;
        let export = ScsiExport {
            adapter,
            memory_stays,
        };
        Ok(Self(Listener::start(path, export, 1, confine)?))
    }

    /// Adds and removes logical units, and tells of their sizes; whoever is connected is told.
    pub fn handle(&self) -> VirtioScsiHandle<H> {
        self.0.export().adapter.handle()
    }

    /// Takes no further front-ends, ends what is in flight, closes the connection, and returns when no memory of a front-end is
    /// used any more. A front-end that reconnects to another server finds all its requests answered.
    pub fn stop(self) {
        drop(self);
    }

    /// Who is connected.
    pub fn clients(&self) -> Vec<FrontEndState> {
        self.0.clients()
    }

    /// Closes the connection of a front-end, and returns when what it had in flight has ended. It may connect again. False if there is none
    /// of this number.
    pub fn disconnect(&self, number: u64) -> bool {
        self.0.disconnect(number)
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.0.front_ends() != 0
    }

    /// What the request queues have done, for all front-ends.
    pub fn counters(&self) -> Counters {
        let counters = self.handle().counters();
        counters.into_iter().fold(Counters::default(), Counters::plus)
    }
}
