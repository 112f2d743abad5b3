//! How `smsvmm share` confines itself: threads that serve open nothing, and without `--management` no others are left (`vmm::sandbox`, of a server).
//!
//! ```text
//!   share ─► prepare                before anything is opened: threads that connect to other machines confine themselves when they start
//!     pool, images, sockets are opened
//!     workers, threads of front-ends, of the expanded API ─► serving()          before they hear anybody
//!     first thread, management ─► enter()                                       share_manage::answer
//! ```

use std::io;
use std::path::PathBuf;

use block_io::{BackgroundHooks, WorkerOptions, hook_background};
use storage_virtualizer::vhost_user::ThreadHook;
use vmm::sandbox::{Opens, ServerPart, ServerPlaces, ServerSandbox};

use crate::exit::UsageError;
use crate::share_manage::Management;

/// The sandbox of this process. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Confined(ServerSandbox);

impl Confined {
    /// To be called before anything is opened. `sockets` are those that are listened at; where disks are added, `opens` is what that opens.
    ///
    /// # Errors
    /// The environment is wrong.
    pub(crate) fn prepare(
        sockets: &[PathBuf],
        management: &Management,
        opens: Opens,
    ) -> Result<Self, UsageError> {
        let own = management.socket();
        let places = ServerPlaces {
            sockets: sockets.iter().chain(own).cloned().collect(),
            opens: own.map(|_| opens),
        };
        let sandbox = ServerSandbox::prepare(&places).map_err(UsageError::new)?;
        hook_background(BackgroundHooks {
            connects: Box::new(sandbox.thread(ServerPart::Connects)),
            blocks: Box::new(sandbox.thread(ServerPart::Serves)),
        });
        Ok(Self(sandbox))
    }

    /// A hook for threads that serve: confines the one that calls it.
    pub(crate) fn serving(&self) -> impl Fn() -> io::Result<()> + Clone + Send + Sync + use<> {
        self.0.thread(ServerPart::Serves)
    }

    /// The same for threads that speak with front-ends.
    pub(crate) fn front_ends(&self) -> ThreadHook {
        ThreadHook::new(self.serving())
    }

    /// The same for a worker.
    pub(crate) fn worker(&self) -> WorkerOptions {
        WorkerOptions {
            on_start: Some(Box::new(self.serving())),
            ..WorkerOptions::default()
        }
    }

    /// Confines the calling thread, the last that is not, with all that it starts from now on.
    pub(crate) fn enter(&self) {
        self.0.enter();
    }
}
