//! The sandbox: what is left to this process once everything that the VM needs is open.
//!
//! A guest that finds a bug in a device gets hold of a thread. What that thread may still do is limited in three ways, each
//! on its own: no capabilities, and no way to get any; no files but those that are open, and no network connections
//! (Landlock); no system calls but those that this kind of thread needs (seccomp).
//!
//! ```text
//!   Sandbox::prepare()      filters are compiled, rules made, the handler for violations installed; nothing is enforced
//!        │  threads that start before the VM runs confine themselves by a hook:   thread(Kind::DiskWorker) …
//!   Vm::open …              opens everything
//!   Sandbox::enter()        confines the main thread, and through it all threads that it starts:
//!        Main ─► Vcpu ─► NetQueue                       (narrower with each step)
//!        Management ─► DiskWorker                       (of disks that are attached later)
//! ```
//!
//! All of it belongs to a thread, not to the process, and is inherited by the threads that it starts; so every thread goes
//! through its hook. Filters add up and can only become narrower.

mod descriptors;
mod files;
mod filter;
mod kind;
mod names;
mod privileges;
mod program;
mod rules;
mod server;
mod tables;
mod violation;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use descriptors::close_on_exec;
pub use files::Places;
pub use kind::Kind;
pub use program::{ProgramPlaces, confine_program};
pub use server::{Opens, ServerPart, ServerPlaces, ServerSandbox};
pub use violation::{EXIT_STATUS, before_message};

use crate::config::{SandboxConfig, Seccomp};
use files::{Enforced, Files};
use filter::Filter;

/// The sandbox cannot be prepared or entered.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A path of the configuration cannot be used.
    #[error("{key}: {} cannot be opened; it must exist at the start", path.display())]
    Place {
        /// What names it.
        key: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program is confined by other means than those that there are.
    #[error("SMSVMM_SECCOMP={0} is not known; use on, log or off")]
    Mode(String),
    /// Landlock's rules cannot be made.
    #[error("cannot make Landlock rules; sandbox.landlock = false goes without")]
    Landlock(#[source] landlock::RulesetError),
    /// A table cannot be compiled.
    #[error("cannot compile the system call filter of thread {}", kind.name())]
    Compile {
        /// Whose.
        kind: Kind,
        /// Why.
        source: seccompiler::BackendError,
    },
    /// The kernel refuses.
    #[error("cannot {action}; sandbox.seccomp = \"off\" and sandbox.landlock = false go without a sandbox")]
    Enter {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A prepared sandbox. Clones are the same sandbox.
#[derive(Debug, Clone)]
pub struct Sandbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mode: Seccomp,
    filters: BTreeMap<Kind, Filter>,
    files: Option<Files>,
}

impl Sandbox {
    /// Prepares everything that must be prepared while files can still be opened.
    ///
    /// # Errors
    /// A path of `config` does not exist, or the kernel refuses.
    pub fn prepare(config: &SandboxConfig, removed_at_end: Vec<PathBuf>) -> Result<Self, SandboxError> {
        let places = Places {
            attachable: config.paths.clone(),
            removed_at_end,
        };
        let files = if config.landlock {
            Some(Files::new(&places)?)
        } else {
            None
        };
        let mut filters = BTreeMap::new();
        for kind in Kind::ALL {
            let filter = Filter::compile(kind, config.seccomp);
            if let Some(filter) = filter.map_err(|source| SandboxError::Compile { kind, source })? {
                filters.insert(kind, filter);
            }
        }
        if config.seccomp == Seccomp::On {
            violation::install_handler().map_err(|source| SandboxError::Enter {
                action: "install the handler for forbidden system calls",
                source,
            })?;
        }
        Ok(Self(Arc::new(Inner {
            mode: config.seccomp,
            filters,
            files,
        })))
    }

    /// Confines the calling thread, which is to become the main loop, and hides the process's memory. Everything must be open.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn enter(&self) -> Result<(), SandboxError> {
        if privileges::is_root() {
            tracing::warn!("running as root; an ordinary user in group kvm is enough");
        }
        // Who debugs without a filter wants to look into the process, too.
        if self.0.mode == Seccomp::On {
            privileges::hide_memory().map_err(|source| SandboxError::Enter {
                action: "hide the memory",
                source,
            })?;
        }
        let enforced = self.confine(Kind::Main)?;
        let landlock = match enforced {
            None => "off".to_owned(),
            Some(Enforced::Fully(version)) => format!("version {version}"),
            Some(Enforced::Partly(version)) => format!("version {version}, which lacks some rights"),
            Some(Enforced::Not) => "not in this kernel".to_owned(),
        };
        let seccomp = match self.0.mode {
            Seccomp::On => "on",
            Seccomp::Log => "log only",
            Seccomp::Off => "off",
        };
        tracing::info!(seccomp, landlock, capabilities = "none", "sandbox entered");
        Ok(())
    }

    /// A hook for the start of threads of `kind`: confines the thread that calls it.
    pub fn thread(&self, kind: Kind) -> impl Fn() -> io::Result<()> + Clone + Send + Sync + use<> {
        let sandbox = self.clone();
        move || match sandbox.confine(kind) {
            Ok(_) => Ok(()),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Confines the calling thread. The order matters: each step may forbid what those before it need.
    fn confine(&self, kind: Kind) -> Result<Option<Enforced>, SandboxError> {
        let failed = |action| move |source| SandboxError::Enter { action, source };
        privileges::drop_all().map_err(failed("drop capabilities"))?;
        let files = self.0.files.as_ref().map(|files| files.restrict(kind));
        let enforced = files.transpose().map_err(failed("restrict files by Landlock"))?;
        if let Some(filter) = self.0.filters.get(&kind) {
            filter.install().map_err(failed("install a system call filter"))?;
        }
        Ok(enforced)
    }
}
