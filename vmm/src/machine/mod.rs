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
mod managed;
mod manager;
mod metrics;
mod processors;
mod run;
mod scsi;
mod settings;
mod signals;
mod slots;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use api::{EventKind, EventLog, ExitReason, VmState, VmStatus};

use kvm_ioctls::Kvm;
use storage_virtualizer::scsi::VendorCommands;
use storage_virtualizer::virtio_scsi::VirtioScsiOptions;

pub use control::Control;
use devices::StartPasst;
pub use disk::{GuestDisk, PoolDisk, PoolDisks, blk_options, guest_disk, serial};
pub use manager::{Ask, ManagerDisks, Pools};
pub use metrics::{latencies, request_counts};
pub use scsi::{
    AddPoolUnit, OnResize, PoolUnit, SCSI_FAREWELL, SHORT_SCSI_FAREWELL, ScsiAdapter, ScsiBacking,
    ScsiUnitDisk, ScsiUnits, pool_unit, scsi_adapter, scsi_initiator,
};
pub use settings::{rates, set_controls, trace};
pub use slots::SlotError;

use crate::boot::{BootError, BootFiles, Kernel};
use crate::config::{ConsoleSpec, VmConfig};
use crate::console::{self, ConsoleError};
use crate::devices::event_loop::Subscriber;
use crate::devices::net::{Launcher, Sockets};
use crate::host::Remains;
use crate::memory::{MemoryError, Ram};
use crate::sandbox::{self, Sandbox, SandboxError};
use crate::vcpu::VcpuFault;
use crate::vm::{KvmError, open_kvm};

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
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
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
    kvm: Arc<Kvm>,
    sandbox: Sandbox,
    ram: Ram,
    kernel: Kernel,
    consoles: devices::Consoles,
    events: Arc<EventLog>,
    scsi: Arc<scsi::ScsiBus>,
    managed: Option<Arc<managed::ManagedScsi>>,
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
        limit_groups: config.limit_groups.clone(),
        last_event: 0,
    }
}

/// The sockets of disks that other processes serve.
fn served_disks(config: &VmConfig) -> impl Iterator<Item = &PathBuf> {
    config.disks.iter().filter_map(|disk| disk.vhost_user.as_ref())
}

/// Whether other processes have, or may have, the guest's memory: those that serve its disks.
fn has_served_disks(config: &VmConfig) -> bool {
    config.manager.is_some() || served_disks(config).next().is_some()
}

/// Starts the helper, if there may be something for it to do: only who can be asked for more devices, or whose disks are served
/// by others, needs it. To be called first of all, as it shall inherit as little as possible.
fn start_helper(config: &VmConfig, pools: &Pools) -> Result<Option<Arc<Launcher>>, MachineError> {
    if config.management.is_none() && !has_served_disks(config) {
        return Ok(None);
    }
    let sockets = if config.sandbox.landlock {
        Sockets::At(
            served_disks(config)
                .chain(&config.sandbox.paths)
                .cloned()
                .collect(),
        )
    } else {
        Sockets::Any
    };
    let helper = Launcher::start(&sockets, manager::door(pools, config.manager.as_ref()).as_ref())
        .map_err(MachineError::system("start a helper"))?;
    Ok(Some(Arc::new(helper)))
}

/// Sockets and links that this process makes, and removes when the VM has ended.
fn removed_at_end(config: &VmConfig) -> Vec<PathBuf> {
    let consoles = [Some(&config.console.serial), config.console.virtio.as_ref()];
    let consoles = consoles.into_iter().flatten().filter_map(|spec| match spec {
        ConsoleSpec::Socket(path) | ConsoleSpec::Pty(Some(path)) => Some(path),
        ConsoleSpec::Stdio | ConsoleSpec::Pty(None) | ConsoleSpec::File(_) | ConsoleSpec::Null => None,
    });
    let management = config.management.as_ref().map(|management| &management.socket);
    consoles.chain(management).cloned().collect()
}

/// A VM whose parts are all open, ready to run.
pub struct Vm {
    sandbox: Sandbox,
    session: run::Session,
    devices: Vec<devices::HostDevice>,
    control: Control,
}

impl Vm {
    /// Prepares the sandbox. Comes first, so that no thread is started that cannot be confined.
    ///
    /// # Errors
    /// The kernel refuses what the configuration wants.
    pub fn prepare_sandbox(config: &VmConfig) -> Result<Sandbox, MachineError> {
        let sandbox = Sandbox::prepare(&config.sandbox, removed_at_end(config))?;
        sandbox::before_message(console::terminal::restore);
        Ok(sandbox)
    }

    /// Opens everything that the VM needs of this host; `pools` says who has the disks that are not images, `vendor` does vendor-specific
    /// commands of SCSI disks.
    ///
    /// # Errors
    /// Something is missing, forbidden or in use. What was opened is closed again.
    pub fn open(
        config: VmConfig,
        sandbox: Sandbox,
        pools: Pools,
        vendor: Option<Arc<dyn VendorCommands>>,
    ) -> Result<Self, MachineError> {
        let started = Instant::now();
        let helper = start_helper(&config, &pools)?;
        let passt = match &helper {
            Some(helper) if config.management.is_some() => StartPasst::There(helper.clone()),
            _ => StartPasst::No,
        };
        let (pool, manager) = match (pools, &config.manager, &helper) {
            (Pools::Own(pool), ..) => (Some(pool), None),
            (Pools::Manager(disks), Some(socket), Some(helper)) => {
                let link = manager::ManagerLink::new(helper.clone(), socket.clone(), disks);
                (None, Some(link))
            }
            _ => (None, None),
        };
        let shared_memory = config.memory.shared || has_served_disks(&config);
        let kvm = open_kvm()?;
        let kernel = Kernel::open(BootFiles {
            kernel: config.boot.kernel.clone(),
            initrd: config.boot.initrd.clone(),
            command_line: config.boot.cmdline.clone(),
        })?;
        let ram = Ram::new(config.memory.ram(shared_memory))?;
        let mut main_loop = MainLoop::new().map_err(|error| MachineError::MainLoop(error.to_string()))?;
        let events = Arc::new(EventLog::new());
        let settings = Arc::new(settings::DiskSettings::new(&config.limit_groups, events.clone()));
        let managed = manager.clone().map(|link| {
            managed::ManagedScsi::new(link, Arc::clone(&settings), sandbox.clone(), events.clone())
        });
        let scsi = Arc::new(scsi::ScsiBus::new(events.clone(), vendor));
        let (queues, queue_size, targets) = config.scsi.clone().unwrap_or_default().for_disks(&config.disks);
        let opener = devices::DeviceOpener {
            vm: config.name.clone(),
            scsi: scsi.clone(),
            scsi_options: VirtioScsiOptions {
                initiator: scsi_initiator(config.name.as_str()),
                queues: queues.into(),
                queue_size: queue_size.get(),
                last_target: targets.saturating_sub(1),
            },
            sandbox: sandbox.clone(),
            pool,
            manager,
            managed: managed.clone(),
            settings,
            passt: StartPasst::Here,
            helper,
            shared_memory,
            net_counters: Arc::default(),
            events: events.clone(),
        };
        let later = devices::DeviceOpener {
            passt,
            ..opener.clone()
        };
        let (control, inbox) = Control::new(events.clone(), later, initial_status(&config))
            .map_err(MachineError::system("create an eventfd"))?;
        control.pause_when_a_disk_stops();
        let consoles = devices::Consoles::open(&config, &mut main_loop, &control)?;
        let devices = devices::open_all(&config, &opener, &main_loop.remote_endpoint(), &consoles)?;
        let parts = Parts {
            config,
            kvm,
            sandbox: sandbox.clone(),
            ram,
            kernel,
            consoles,
            events,
            scsi,
            managed,
            started,
        };
        let session = run::Session::new(parts, main_loop, inbox)?;
        Ok(Vm {
            sandbox,
            session,
            devices,
            control,
        })
    }

    /// The sandbox, for threads that serve the VM: each calls its hook ([`Sandbox::thread`]) first of all.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// A handle to steer the VM from other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Enters the sandbox, runs the guest on this thread until its end, and gives everything back to the host. What is left of
    /// the micro-guest that examined the host is waited for before the guest starts, but not while its machine is built.
    ///
    /// # Errors
    /// KVM or the host refuses something that the VM needs.
    pub fn run(self, micro_guest: Remains) -> Result<ExitReason, MachineError> {
        let Vm {
            sandbox,
            session,
            devices,
            control,
        } = self;
        drop(control);
        sandbox.enter()?;
        let events = session.events();
        let result = session.run(devices, micro_guest);
        if let Ok(reason) = &result {
            events.record(EventKind::Stopped {
                reason: reason.clone(),
            });
        }
        result
    }
}
