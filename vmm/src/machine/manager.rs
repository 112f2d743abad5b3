//! The manager of this host, which has pools open and serves their disks to this process.
//!
//! ```text
//!   DeviceOpener ─► ManagerLink ── request ──► helper ── connects, asks (ManagerDisks::say) ──► the manager's socket
//!                       │        ◄── connection ──┘
//!                       └─ ManagerDisks: makes the request, and reads the answer
//! ```
//!
//! This process may not connect, so each request has its connection from the [helper](Launcher). That of a disk is, once the manager
//! has agreed, the disk's connection over vhost-user.
//!
//! A manager that has started this machine has given it a socket of its own, where it is believed nothing; but the socket may as well be that of the
//! manager's administrator, who can have machines made of any file of the host. So it is the helper that says what is wanted, out of a few things that a machine needs, and the manager takes one request from a connection: nothing else can be said there later.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::virtual_disk::TransferRequest;
use api::{
    DeviceId, DiskChange, DiskConfig, DiskLimits, Problem, ProblemKind, StorageAnswer, StorageRequest,
    TracePage, Transfer,
};
use storage_virtualizer::vhost_user::front_end::Dialled;

use super::disk::PoolDisks;
use crate::devices::net::{Launcher, ManagerDoor};

/// Who has the disks that are not images of the host.
#[derive(Debug, Clone)]
pub enum Pools {
    /// Nobody: there are none.
    None,
    /// This process.
    Own(Arc<dyn PoolDisks>),
    /// The host's manager, at the socket that the configuration names.
    Manager(Arc<dyn ManagerDisks>),
}

/// Has the manager asked for something; the answer is to be read from the connection.
pub type Ask<'a> = &'a dyn Fn(&str) -> Result<Dialled, Problem>;

/// Knows how a manager is asked, and what it answers. But for [`Self::say`], what is here is called inside the sandbox, by threads that may
/// wait, send and receive, and no more.
pub trait ManagerDisks: Send + Sync + fmt::Debug {
    /// The words in which a manager is asked for `request`, which one of the other methods has made. Is called in the helper, outside of
    /// the sandbox, and believes nothing: whoever took over this machine's process shall have no more from the manager than what a machine needs.
    ///
    /// # Errors
    /// No machine asks for that.
    fn say(&self, request: &str) -> io::Result<Vec<u8>>;

    /// Has it open a disk, which it serves at the connection that is returned, over vhost-user; or, of a SCSI disk, for the machine's adapter,
    /// and tells there how it is. `limits` are what it shares with others. A machine that `goes_on` has had the disk
    /// before, from another manager.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    fn attach(
        &self,
        ask: Ask<'_>,
        disk: &DiskConfig,
        limits: Option<DiskLimits>,
        goes_on: bool,
    ) -> Result<Dialled, Problem>;

    /// Has it serve the queues of the machine's SCSI adapter at the connection that is returned, over vhost-user, when so many of its disks are
    /// there, which are of `pool`.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn attach_adapter(&self, ask: Ask<'_>, pool: Option<String>, disks: u32) -> Result<Dialled, Problem>;

    /// Has it tell the last requests of a disk that it serves to this machine.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn trace(&self, ask: Ask<'_>, disk: &DeviceId, after: &str) -> Result<TracePage, Problem>;

    /// Has it change limits that disks which it serves to this machine share.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn change_group(&self, ask: Ask<'_>, group: &DeviceId, change: &DiskLimits) -> Result<(), Problem>;

    /// Has it change a disk that it serves to this machine.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn change(&self, ask: Ask<'_>, disk: &DeviceId, change: &DiskChange) -> Result<(), Problem>;

    /// Has it do something with the pool. Blocks until it is done.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn execute(&self, ask: Ask<'_>, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// Has it move data between the pool and who is at the other end of what is returned.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn transfer(&self, ask: Ask<'_>, request: TransferRequest) -> Result<Transfer, Problem>;
}

/// What the helper knows of the manager, if this machine has one.
pub(super) fn door(pools: &Pools, socket: Option<&PathBuf>) -> Option<ManagerDoor> {
    let (Pools::Manager(disks), Some(socket)) = (pools, socket) else {
        return None;
    };
    let disks = Arc::clone(disks);
    Some(ManagerDoor {
        socket: socket.clone(),
        say: Arc::new(move |request| disks.say(request)),
    })
}

/// The manager, and the way to it.
#[derive(Debug, Clone)]
pub(super) struct ManagerLink {
    helper: Arc<Launcher>,
    socket: PathBuf,
    disks: Arc<dyn ManagerDisks>,
}

impl ManagerLink {
    pub(super) fn new(helper: Arc<Launcher>, socket: PathBuf, disks: Arc<dyn ManagerDisks>) -> Self {
        Self {
            helper,
            socket,
            disks,
        }
    }

    /// The manager's socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A connection at which the manager serves a disk.
    ///
    /// # Errors
    /// It is away, or refuses; later it may not.
    pub(super) fn attach(
        &self,
        disk: &DiskConfig,
        limits: Option<DiskLimits>,
        goes_on: bool,
    ) -> Result<Dialled, Problem> {
        self.disks
            .attach(&|request| self.ask(request), disk, limits, goes_on)
    }

    /// A connection at which the manager serves the queues of the machine's SCSI adapter.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub(super) fn attach_adapter(&self, pool: Option<String>, disks: u32) -> Result<Dialled, Problem> {
        self.disks
            .attach_adapter(&|request| self.ask(request), pool, disks)
    }

    pub(super) fn trace(&self, disk: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        self.disks.trace(&|request| self.ask(request), disk, after)
    }

    pub(super) fn change_group(&self, group: &DeviceId, change: &DiskLimits) -> Result<(), Problem> {
        self.disks
            .change_group(&|request| self.ask(request), group, change)
    }

    pub(super) fn change(&self, disk: &DeviceId, change: &DiskChange) -> Result<(), Problem> {
        self.disks.change(&|request| self.ask(request), disk, change)
    }

    pub(super) fn execute(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.disks.execute(&|request| self.ask(request), request)
    }

    pub(super) fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem> {
        self.disks.transfer(&|request| self.ask(request), request)
    }

    fn ask(&self, request: &str) -> Result<Dialled, Problem> {
        self.helper.ask_manager(request).map_err(|error| {
            let text = format!(
                "the manager cannot be asked at {}: {error}",
                self.socket.display()
            );
            Problem::new(ProblemKind::Host, text).remedy("see whether `smsvmm serve` runs")
        })
    }
}
