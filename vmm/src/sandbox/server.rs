//! The sandbox of a program that serves disks to others: `smsvmm share`.
//!
//! Who speaks NBD, iSCSI or vhost-user with it is as hostile as a guest. So all threads are confined when the disks are open and the sockets are
//! listened at, before anybody is served, in one of three ways:
//!
//! ```text
//!   Serves     what clients say is read here, and their requests are done: opens no file, connects to nobody, listens to nothing else
//!   Connects   connects again to devices of a pool, and images, on other machines: reads files (how names are looked up), writes none
//!   Opens      only where there is a management socket, with the threads behind it: opens what is served later, starts threads of all kinds
//! ```
//!
//! None starts a program, makes memory executable, or looks into other processes. What is forbidden ends the process in a thread that serves; in the
//! others, where libraries do what nobody knows before (who looks up names), it fails.
//!
//! What this kernel cannot do is told as a warning by the thread that enters last ([`ServerSandbox::enter`]), and not missed. `SMSVMM_SECCOMP` is
//! as for [`confine_program`](super::confine_program).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use landlock::{AccessFs, BitFlags, RulesetCreated};
use rustix::thread::CapabilitySet;

use super::files::{self, Enforced, NEWEST};
use super::filter::{Filter, Forbidden};
use super::program::mode;
use super::rules::Rule;
use super::{SandboxError, privileges, tables, violation};
use crate::config::Seccomp;

/// What is open to everybody in a file system in memory: folders and marks of users are made there.
const SHARED_MEMORY: &str = "/dev/shm";

/// What a thread of the program does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerPart {
    /// Serves clients, or waits for others who do.
    Serves,
    /// Connects to devices on other machines.
    Connects,
    /// Opens what is served later; serves, where nothing is.
    Opens,
}

/// What may be opened later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opens {
    /// Files that exist, as far as the process could open them before, and devices on other machines.
    Devices,
    /// These, and sockets, one for each disk, which are made and removed anywhere.
    DevicesAndSockets,
}

/// What a program that serves disks needs beyond what is open.
#[derive(Debug, Clone, Default)]
pub struct ServerPlaces {
    /// Its sockets, which are removed at the end.
    pub sockets: Vec<PathBuf>,
    /// What may be opened later, where there is somebody who may ask for it.
    pub opens: Option<Opens>,
}

/// A prepared sandbox. Clones are the same sandbox.
#[derive(Debug, Clone)]
pub struct ServerSandbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mode: Seccomp,
    serves: Confinement,
    connects: Confinement,
    opens: Option<Confinement>,
}

/// What is left to threads of one kind.
#[derive(Debug)]
struct Confinement {
    kept: CapabilitySet,
    files: RulesetCreated,
    /// None if there is none to be, or it cannot be made.
    filter: Option<Filter>,
}

impl ServerSandbox {
    /// Prepares everything; nothing is enforced yet.
    ///
    /// # Errors
    /// `SMSVMM_SECCOMP` is something else than `on`, `log` and `off`, or rules for files cannot be made.
    pub fn prepare(places: &ServerPlaces) -> Result<Self, SandboxError> {
        let mode = mode()?;
        if mode == Seccomp::On
            && let Err(error) = violation::install_handler()
        {
            tracing::warn!(%error, "a forbidden system call ends the process without a message");
        }
        let removal = files::parents(&places.sockets);
        let removes = files::allow(files::ruleset(false)?, &removal, AccessFs::RemoveFile.into())?;
        let serves = Confinement {
            kept: for_removal(&removal),
            files: removes,
            filter: filter(tables::SERVER, Forbidden::Ends, mode),
        };
        let connects = Confinement {
            // Sockets of servers that are other users'.
            kept: CapabilitySet::DAC_OVERRIDE,
            files: beneath_all(files::connecting_ruleset()?, reading())?,
            filter: filter(tables::SERVER_CONNECTS, Forbidden::Fails, mode),
        };
        let opens = places
            .opens
            .map(|what| opening(what, &removal, mode))
            .transpose()?;
        Ok(Self(Arc::new(Inner {
            mode,
            serves,
            connects,
            opens,
        })))
    }

    /// Confines the calling thread, and all that it starts from now on, which is to be the last one that does: everything must be open. Hides
    /// the process's memory.
    pub fn enter(&self) {
        if self.0.mode == Seccomp::On
            && let Err(error) = privileges::hide_memory()
        {
            tracing::warn!(%error, "the memory is not hidden");
        }
        for (lacking, error) in self.confine(ServerPart::Opens) {
            match error {
                Some(error) => tracing::warn!(%error, "{lacking}"),
                None => tracing::warn!("{lacking}"),
            }
        }
    }

    /// A hook for the start of threads: confines the thread that calls it. It never fails: what a kernel cannot do is told by [`Self::enter`].
    pub fn thread(&self, part: ServerPart) -> impl Fn() -> io::Result<()> + Clone + Send + Sync + use<> {
        let sandbox = self.clone();
        move || {
            for (lacking, error) in sandbox.confine(part) {
                tracing::debug!(?part, ?error, "{lacking}");
            }
            Ok(())
        }
    }

    /// Confines the calling thread; what could not be done. The order matters: each step may forbid what those before it need.
    fn confine(&self, part: ServerPart) -> Vec<(&'static str, Option<io::Error>)> {
        let mut lacking = Vec::new();
        let inner = &self.0;
        let confinement = match part {
            ServerPart::Serves => &inner.serves,
            ServerPart::Connects => &inner.connects,
            ServerPart::Opens => inner.opens.as_ref().unwrap_or(&inner.serves),
        };
        if let Err(error) = privileges::drop_but(confinement.kept) {
            lacking.push(("capabilities cannot be dropped", Some(error)));
        }
        match files::restrict(&confinement.files) {
            Ok(Enforced::Fully(_) | Enforced::Partly(_)) => {}
            Ok(Enforced::Not) => {
                lacking.push(("files are not restricted: this kernel has no Landlock", None))
            }
            Err(error) => lacking.push(("files are not restricted: Landlock is refused", Some(error))),
        }
        let installed = confinement.filter.as_ref().map_or(Ok(()), Filter::install);
        if let Err(error) = installed {
            lacking.push((
                "system calls are not restricted: the filter is refused",
                Some(error),
            ));
        }
        lacking
    }
}

fn filter(tables: &[&[Rule]], forbidden: Forbidden, mode: Seccomp) -> Option<Filter> {
    Filter::of_server(tables, forbidden, mode).unwrap_or_else(|error| {
        tracing::warn!(%error, "system calls are not restricted: the filter cannot be made");
        None
    })
}

fn reading() -> BitFlags<AccessFs> {
    AccessFs::from_read(NEWEST) & !AccessFs::Execute
}

fn beneath_all(rules: RulesetCreated, access: BitFlags<AccessFs>) -> Result<RulesetCreated, SandboxError> {
    files::allow(rules, &[PathBuf::from("/")], access)
}

/// What is left to those who open what somebody asks for, who may ask for everything that the process could open.
fn opening(what: Opens, removal: &[PathBuf], mode: Seccomp) -> Result<Confinement, SandboxError> {
    let writing = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let rules = beneath_all(files::connecting_ruleset()?, reading() | writing)?;
    // Marks that a device on another machine is used.
    let marks = [PathBuf::from(SHARED_MEMORY)];
    let rules = files::allow(rules, &marks, AccessFs::MakeReg | AccessFs::MakeDir)?;
    let files = match what {
        Opens::Devices => files::allow(rules, removal, AccessFs::RemoveFile.into())?,
        Opens::DevicesAndSockets => beneath_all(rules, AccessFs::MakeSock | AccessFs::RemoveFile)?,
    };
    Ok(Confinement {
        // Files that are others', and memory of front-ends that rings hold.
        kept: CapabilitySet::DAC_OVERRIDE
            | CapabilitySet::DAC_READ_SEARCH
            | CapabilitySet::FOWNER
            | CapabilitySet::IPC_LOCK,
        files,
        filter: filter(tables::SERVER_OPENS, Forbidden::Fails, mode),
    })
}

/// What it takes to remove a socket from one of `folders`: root needs it for those that are others'.
fn for_removal(folders: &[PathBuf]) -> CapabilitySet {
    let user = rustix::process::geteuid().as_raw();
    let is_own = |folder: &Path| fs::metadata(folder).is_ok_and(|folder| folder.uid() == user);
    match folders.iter().all(|folder| is_own(folder)) {
        true => CapabilitySet::empty(),
        false => CapabilitySet::DAC_OVERRIDE,
    }
}
