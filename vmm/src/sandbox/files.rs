//! Landlock: which files a thread may open, remove or change, and that it makes no connection over the network.
//!
//! Everything that a VM needs is open before; what is open stays usable. Kernels without Landlock (before 5.13), or with less
//! of it, enforce what they can.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::SandboxError;
use super::kind::Kind;

/// The newest Landlock whose rights are asked for. What the kernel does not know is left out.
pub(super) const NEWEST: ABI = ABI::V7;

/// Places that the main loop and management need after the start.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Files and folders for disks that are attached later: read and written, not created. They must exist.
    pub attachable: Vec<PathBuf>,
    /// Sockets and links that are removed at the end.
    pub removed_at_end: Vec<PathBuf>,
}

/// The rulesets of all kinds of threads.
#[derive(Debug)]
pub(super) struct Files {
    main: RulesetCreated,
    management: RulesetCreated,
    others: RulesetCreated,
}

impl Files {
    pub(super) fn new(places: &Places) -> Result<Self, SandboxError> {
        let removal = parents(&places.removed_at_end);
        let main = ruleset(true)?;
        let main = allow(main, &removal, AccessFs::RemoveFile.into())?;

        let (read, write) = (
            AccessFs::from_read(NEWEST) & !AccessFs::Execute,
            AccessFs::WriteFile | AccessFs::Truncate,
        );
        let device = AccessFs::IoctlDev;
        let management = ruleset(true)?;
        let management = allow_all(
            management,
            "sandbox.paths",
            &places.attachable,
            read | write | device,
        )?;
        let management = allow(management, &removal, AccessFs::RemoveFile.into())?;
        // Sizes and queues of block devices, features of interfaces; who has an image open.
        let information = ["/sys", "/proc/self"].map(PathBuf::from);
        let management = allow(management, &information, read)?;
        let devices = ["/dev/null", "/dev/net/tun"].map(PathBuf::from);
        let management = allow(management, &devices, write | device | AccessFs::ReadFile)?;

        Ok(Self {
            main,
            management,
            others: ruleset(false)?,
        })
    }

    /// Puts the calling thread, and all that it will start, under the rules of `kind`, for good.
    pub(super) fn restrict(&self, kind: Kind) -> io::Result<Enforced> {
        let ruleset = match kind {
            Kind::Main => &self.main,
            Kind::Management => &self.management,
            Kind::Signals
            | Kind::Vcpu
            | Kind::DiskWorker
            | Kind::PoolWorker
            | Kind::NetQueue
            | Kind::DiskLink => &self.others,
        };
        restrict(ruleset)
    }
}

/// Puts the calling thread, and all that it will start, under `ruleset`, for good.
pub(super) fn restrict(ruleset: &RulesetCreated) -> io::Result<Enforced> {
    let status = ruleset.try_clone()?.restrict_self().map_err(io::Error::other)?;
    let version = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
        _ => 0,
    };
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Enforced::Fully(version),
        RulesetStatus::PartiallyEnforced => Enforced::Partly(version),
        RulesetStatus::NotEnforced => Enforced::Not,
    })
}

/// How far the kernel's Landlock goes, with its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Enforced {
    Fully(u32),
    Partly(u32),
    Not,
}

/// A ruleset that allows nothing. `ends_children`: its threads send signals to child processes (to end passt).
pub(super) fn ruleset(ends_children: bool) -> Result<RulesetCreated, SandboxError> {
    let mut scopes: BitFlags<Scope> = Scope::AbstractUnixSocket.into();
    if !ends_children {
        scopes |= Scope::Signal;
    }
    nothing_but(scopes, AccessNet::from_all(NEWEST))
}

/// The same, but for connections to other hosts.
pub(super) fn connecting_ruleset() -> Result<RulesetCreated, SandboxError> {
    nothing_but(
        Scope::AbstractUnixSocket | Scope::Signal,
        AccessNet::BindTcp.into(),
    )
}

fn nothing_but(scopes: BitFlags<Scope>, net: BitFlags<AccessNet>) -> Result<RulesetCreated, SandboxError> {
    let create = || -> Result<RulesetCreated, RulesetError> {
        Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(net)?
            .scope(scopes)?
            .create()
    };
    create().map_err(SandboxError::Landlock)
}

/// Adds `access` beneath `paths`, which must exist; `key` names them.
pub(super) fn allow_all(
    mut ruleset: RulesetCreated,
    key: &'static str,
    paths: &[PathBuf],
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, SandboxError> {
    for path in paths {
        let fd = PathFd::new(path).map_err(|error| SandboxError::Place {
            key,
            path: path.clone(),
            source: reason(error),
        })?;
        let access = if path.is_dir() {
            access
        } else {
            access & AccessFs::from_file(NEWEST)
        };
        ruleset = ruleset
            .add_rule(PathBeneath::new(fd, access))
            .map_err(SandboxError::Landlock)?;
    }
    Ok(ruleset)
}

/// Adds `access` beneath those of `paths` that exist.
pub(super) fn allow(
    mut ruleset: RulesetCreated,
    paths: &[PathBuf],
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, SandboxError> {
    for path in paths {
        let Ok(fd) = PathFd::new(path) else { continue };
        let access = if path.is_dir() {
            access
        } else {
            access & AccessFs::from_file(NEWEST)
        };
        ruleset = ruleset
            .add_rule(PathBeneath::new(fd, access))
            .map_err(SandboxError::Landlock)?;
    }
    Ok(ruleset)
}

/// The folders in which `paths` lie.
pub(super) fn parents(paths: &[PathBuf]) -> Vec<PathBuf> {
    let folder = |path: &PathBuf| match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let mut folders: Vec<_> = paths.iter().map(folder).collect();
    folders.sort_unstable();
    folders.dedup();
    folders
}

/// The kernel's answer, without the path, which our own message has.
fn reason(error: PathFdError) -> io::Error {
    match error {
        PathFdError::OpenCall { source, .. } => source,
        error => io::Error::other(error),
    }
}
