//! A virtual machine from its configuration to its end.
//!
//! ```text
//!   VmConfig ── Vm::open ──► everything of the host that the VM needs is open: memory, kernel, disks, network, consoles
//!                 │            (all errors of set-up come from here; nothing has started yet)
//!                 ▼
//!              Vm::run ───► build a machine ─► guest runs ─► its life ends ─► tear down ─┬─► ExitReason
//!                             ▲                                                          │
//!                             └───────────────────── reboot ─────────────────────────────┘
//! ```
//!
//! A reboot makes a new machine (a new KVM VM) out of the same open parts: the same configuration, with the devices that
//! were attached meanwhile, and no file is opened a second time. Threads: the caller of [`Vm::run`] is the main loop; each
//! vCPU has a thread; each disk and network card brings its queue workers.

mod build;
mod control;
mod devices;
mod disk;
mod processors;
mod run;
mod signals;
mod slots;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use api::{EventKind, EventLog, ExitReason, VmState, VmStatus};

pub use control::Control;
pub use slots::SlotError;

use crate::boot::{BootError, BootFiles, Kernel};
use crate::config::{HugePages, VmConfig};
use crate::console::ConsoleError;
use crate::devices::event_loop::Subscriber;
use crate::memory::{MemoryError, Pages, Ram, RamOptions};
use crate::vcpu::VcpuFault;
use crate::vm::KvmError;

/// The main loop of the VM.
type MainLoop = event_manager::EventManager<Subscriber>;

/// A VM cannot be started or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel and initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A device cannot be opened.
    #[error("cannot open device `{id}`")]
    Device {
        /// Its name in the configuration.
        id: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device cannot be put on the bus.
    #[error("cannot attach device `{id}`")]
    Slot {
        /// Its name in the configuration.
        id: String,
        /// Why.
        source: SlotError,
    },
    /// A table for the guest cannot be made.
    #[error("cannot describe the machine to the guest")]
    Description(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The operating system refused something.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// The main loop cannot go on.
    #[error("the main loop cannot go on: {0}")]
    MainLoop(String),
    /// KVM cannot run the guest any further.
    #[error("the guest cannot go on")]
    Vcpu(#[source] VcpuFault),
    /// A device does not come to rest.
    #[error("device `{id}` still has requests in flight {seconds} seconds after the guest was stopped")]
    Busy {
        /// Its name.
        id: String,
        /// Seconds waited.
        seconds: u64,
    },
}

impl MachineError {
    pub(crate) fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| MachineError::System { action, source }
    }
}

/// What lives as long as the VM, over all its reboots.
struct Parts {
    config: VmConfig,
    ram: Ram,
    kernel: Kernel,
    consoles: devices::Consoles,
    events: Arc<EventLog>,
    started: Instant,
}

impl Parts {
    /// The VM's status as far as it does not depend on the machine.
    fn initial_status(&self) -> VmStatus {
        initial_status(&self.config)
    }
}

/// What is known of a VM before it runs.
fn initial_status(config: &VmConfig) -> VmStatus {
    VmStatus {
        name: config.name.clone(),
        state: VmState::Starting,
        pid: std::process::id(),
        uptime_seconds: 0,
        resets: 0,
        cpus: config.cpus.count,
        memory: config.memory.size,
        disks: Vec::new(),
        nets: Vec::new(),
        last_event: 0,
    }
}

/// A VM whose parts are all open, ready to run.
pub struct Vm {
    session: run::Session,
    devices: Vec<devices::HostDevice>,
    control: Control,
}

impl Vm {
    /// Opens everything that the VM needs of this host.
    ///
    /// # Errors
    /// Something is missing, forbidden or in use. What was opened is closed again.
    pub fn open(config: VmConfig) -> Result<Self, MachineError> {
        let started = Instant::now();
        let kernel = Kernel::open(BootFiles {
            kernel: config.boot.kernel.clone(),
            initrd: config.boot.initrd.clone(),
            command_line: config.boot.cmdline.clone(),
        })?;
        let ram = Ram::new(RamOptions {
            size: config.memory.size.bytes(),
            pages: match config.memory.huge_pages {
                HugePages::None => Pages::Small,
                HugePages::Transparent => Pages::Transparent,
                HugePages::Size2M => Pages::Huge2M,
                HugePages::Size1G => Pages::Huge1G,
            },
            shared: config.memory.shared,
            prefault: config.memory.prefault,
        })?;
        let mut main_loop = MainLoop::new().map_err(|error| MachineError::MainLoop(error.to_string()))?;
        let events = Arc::new(EventLog::new());
        let opener = devices::DeviceOpener {
            vm: config.name.clone(),
        };
        let (control, inbox) = Control::new(events.clone(), opener.clone(), initial_status(&config))
            .map_err(MachineError::system("create an eventfd"))?;
        let consoles = devices::Consoles::open(&config, &mut main_loop, &control)?;
        let devices = devices::open_all(&config, &opener, &main_loop.remote_endpoint(), &consoles)?;
        let parts = Parts {
            config,
            ram,
            kernel,
            consoles,
            events,
            started,
        };
        let session = run::Session::new(parts, main_loop, inbox)?;
        Ok(Vm {
            session,
            devices,
            control,
        })
    }

    /// A handle to steer the VM from other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Runs the guest on this thread until its end, and gives everything back to the host.
    ///
    /// # Errors
    /// KVM or the host refuses something that the VM needs.
    pub fn run(self) -> Result<ExitReason, MachineError> {
        let Vm {
            session,
            devices,
            control,
        } = self;
        drop(control);
        let events = session.events();
        let result = session.run(devices);
        if let Ok(reason) = &result {
            events.record(EventKind::Stopped {
                reason: reason.clone(),
            });
        }
        result
    }
}
