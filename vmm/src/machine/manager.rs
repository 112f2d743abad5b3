//! The manager of this host, which has pools open and serves their disks to this process.
//!
//! ```text
//!   DeviceOpener ─► ManagerLink ── path ──► helper ── connects ──► the manager's socket
//!                       │        ◄── connection ──┘
//!                       └─ ManagerDisks: says there what is wanted, as the manager understands it
//! ```
//!
//! This process may not connect, so each request has its connection from the [helper](Launcher). That of a disk is, once the manager
//! has agreed, the disk's connection over vhost-user.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::virtual_disk::TransferRequest;
use api::{DeviceId, DiskChange, DiskConfig, Problem, ProblemKind, StorageAnswer, StorageRequest, Transfer};
use storage_virtualizer::vhost_user::front_end::Dialled;

use super::disk::PoolDisks;
use crate::devices::net::Launcher;

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

/// Says to a manager what this machine wants, at a connection to it that was just made. Is called inside the sandbox, by threads that
/// may wait, send and receive, and no more.
pub trait ManagerDisks: Send + Sync + fmt::Debug {
    /// Has it open a disk; afterwards it serves the disk at `connection`, over vhost-user. A machine that `goes_on` has had the disk before,
    /// from another manager.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    fn attach(&self, connection: &UnixStream, disk: &DiskConfig, goes_on: bool) -> Result<(), Problem>;

    /// Has it change a disk that it serves to this machine.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn change(&self, connection: &UnixStream, disk: &DeviceId, change: &DiskChange) -> Result<(), Problem>;

    /// Has it do something with the pool. Blocks until it is done.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn execute(&self, connection: &UnixStream, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// Has it move data between the pool and who is at the other end of what is returned.
    ///
    /// # Errors
    /// As [`Self::attach`].
    fn transfer(&self, connection: UnixStream, request: TransferRequest) -> Result<Transfer, Problem>;
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
    pub(super) fn attach(&self, disk: &DiskConfig, goes_on: bool) -> io::Result<Dialled> {
        let dialled = self.helper.connect(&self.socket)?;
        self.disks
            .attach(&dialled.socket, disk, goes_on)
            .map_err(io::Error::other)?;
        Ok(dialled)
    }

    pub(super) fn change(&self, disk: &DeviceId, change: &DiskChange) -> Result<(), Problem> {
        self.disks.change(&self.connect()?, disk, change)
    }

    pub(super) fn execute(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.disks.execute(&self.connect()?, request)
    }

    pub(super) fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem> {
        self.disks.transfer(self.connect()?, request)
    }

    fn connect(&self) -> Result<UnixStream, Problem> {
        let dialled = self.helper.connect(&self.socket).map_err(|error| {
            let text = format!("cannot reach the manager at {}: {error}", self.socket.display());
            Problem::new(ProblemKind::Host, text)
                .remedy("start it again; the machine goes on with its disks then")
        })?;
        Ok(dialled.socket)
    }
}
