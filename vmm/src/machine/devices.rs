//! Opens what the configuration names, and makes devices of it: disks, network cards, entropy, consoles.
//!
//! A [`HostDevice`] is a device that no machine has yet, or has no more: it holds the host's side (image, tap, passt) and
//! survives reboots. The same [`DeviceOpener`] serves the start of the VM and later requests to attach.

use std::sync::Arc;
use std::time::Duration;

use api::{
    ByteSize, DeviceId, DeviceState, DiskConfig, DiskStatus, EventLog, NetBackend as NetKind, NetConfig,
    NetStatus, Problem, ProblemKind, VmName, VmStatus,
};
use block_io::{Worker, WorkerOptions, error_chain};
use event_manager::SubscriberOps;
use storage_virtualizer::vhost_user::front_end::FrontEndHandle;
use storage_virtualizer::virtio_scsi::VirtioScsiOptions;
use virtio_core::VirtioDevice;

use super::MachineError;
use super::disk::{DiskError, OpenDisk, PoolDisks};
use super::managed::ManagedScsi;
use super::manager::ManagerLink;
use super::metrics::NetCounters;
use super::scsi::{ScsiAdapter, ScsiBus, ScsiDisk, scsi_adapter};
use super::settings::{DiskSetting, DiskSettings};
use crate::config::{ConsoleSpec, VmConfig};
use crate::console::{Console, ConsoleHandle, ConsoleOptions};
use crate::devices::event_loop::EventLoop;
use crate::devices::net::{Launcher, Net, NetBackend, NetError, NetOptions, PasstOptions};
use crate::devices::rng::Rng;
use crate::devices::virtio_console::VirtioConsole;
use crate::sandbox::{self, Sandbox};

/// What a device is, with what is told of it in the VM's status.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    /// A disk of `size` bytes; one that another process serves by `link` may change its size.
    Disk {
        setting: Arc<DiskSetting>,
        size: ByteSize,
        link: Option<FrontEndHandle>,
    },
    /// A network card.
    Net { config: Box<NetConfig> },
    /// The adapter of the SCSI disks, which are [its own](super::scsi::ScsiBus).
    ScsiAdapter,
    /// The entropy source.
    Rng,
    /// The virtio console.
    Console,
}

/// A device that can be put into a machine.
pub(super) struct HostDevice {
    pub(super) id: DeviceId,
    pub(super) kind: Kind,
    pub(super) device: Box<dyn VirtioDevice>,
    /// Threads that serve the device; they end after it.
    pub(super) workers: Vec<Worker>,
    /// What else must end after it.
    pub(super) guard: Option<Box<dyn Send>>,
}

/// What is opened for a running machine.
pub(super) enum Attachment {
    /// A device for the PCI bus.
    Device(HostDevice),
    /// A SCSI disk; and the adapter, if it is the first one.
    Scsi {
        adapter: Option<HostDevice>,
        disk: ScsiDisk,
    },
    /// A SCSI disk that the manager serves; and the adapter, if it is the first one.
    Managed {
        adapter: Option<HostDevice>,
        disk: DiskStatus,
    },
}

impl Kind {
    pub(super) fn disk_status(&self, state: DeviceState) -> Option<DiskStatus> {
        let Kind::Disk { setting, size, link } = self else {
            return None;
        };
        let is_away = link.as_ref().is_some_and(|link| !link.is_connected());
        Some(DiskStatus {
            config: setting.config(),
            state: match state {
                DeviceState::Attached | DeviceState::Active if is_away => DeviceState::Waiting,
                state => state,
            },
            size: link
                .as_ref()
                .map_or(*size, |link| ByteSize::from_bytes(link.size())),
            stopped: setting.stopped(),
        })
    }

    pub(super) fn net_status(&self, state: DeviceState) -> Option<NetStatus> {
        let Kind::Net { config } = self else { return None };
        Some(NetStatus {
            config: (**config).clone(),
            state,
        })
    }

    /// Whether an administrator may take it out of a running VM.
    pub(super) fn is_removable(&self) -> bool {
        matches!(self, Kind::Disk { .. } | Kind::Net { .. })
    }
}

/// Opens disks and network cards for a VM.
#[derive(Debug, Clone)]
pub(super) struct DeviceOpener {
    /// Name of the VM, from which MAC addresses are derived.
    pub(super) vm: VmName,
    /// Confines the threads of the devices.
    pub(super) sandbox: Sandbox,
    /// The SCSI disks.
    pub(super) scsi: Arc<ScsiBus>,
    /// What the adapter is like if it is made.
    pub(super) scsi_options: VirtioScsiOptions,
    /// Who has the disks that are not images.
    pub(super) pool: Option<Arc<dyn PoolDisks>>,
    /// The host's manager, if it has them.
    pub(super) manager: Option<ManagerLink>,
    /// The SCSI disks that it serves.
    pub(super) managed: Option<Arc<ManagedScsi>>,
    /// What can be changed of disks in use.
    pub(super) settings: Arc<DiskSettings>,
    pub(super) passt: StartPasst,
    /// Connects to the servers of disks.
    pub(super) helper: Option<Arc<Launcher>>,
    /// Other processes can have the guest's memory.
    pub(super) shared_memory: bool,
    /// What network cards count.
    pub(super) net_counters: Arc<NetCounters>,
    /// The log of the VM.
    pub(super) events: Arc<EventLog>,
}

/// Who starts passt.
#[derive(Debug, Clone)]
pub(super) enum StartPasst {
    /// This process: it is not in the sandbox yet.
    Here,
    /// The launcher.
    There(Arc<Launcher>),
    /// Nobody can.
    No,
}

impl DeviceOpener {
    /// Opens a disk for a running VM: fills in what is not given. A SCSI disk gets its place when it is put in.
    pub(super) fn disk(
        &self,
        mut config: DiskConfig,
        status: &VmStatus,
    ) -> Result<(Attachment, DiskStatus), Problem> {
        config.id = free_id(config.id, "disk", status);
        config
            .check()
            .map_err(|(key, error)| Problem::new(ProblemKind::Invalid, format!("{key} {error}")))?;
        let id = config.id.clone();
        let opened = match config.is_unit() {
            true if let Some((managed, manager)) = self.managed_scsi(&config) => self
                .open_managed(config, managed)
                .and_then(|disk| match self.managed_adapter(managed, manager) {
                    Ok(adapter) => Ok((
                        Attachment::Managed {
                            adapter,
                            disk: disk.clone(),
                        },
                        disk,
                    )),
                    Err(error) => {
                        managed.release(&disk.config.id);
                        Err(error)
                    }
                }),
            false => self
                .open_disk(config)
                .map(|(device, status)| (Attachment::Device(device), status)),
            true => self.open_scsi(config).and_then(|disk| {
                let status = DiskStatus {
                    config: disk.setting.config(),
                    state: DeviceState::Attached,
                    size: ByteSize::from_bytes(disk.geometry().size),
                    stopped: None,
                };
                let adapter = self.adapter()?;
                Ok((Attachment::Scsi { adapter, disk }, status))
            }),
        };
        opened.map_err(|error| problem(&id, &error))
    }

    /// Opens a network card for a running VM: fills in what is not given.
    pub(super) fn net(
        &self,
        mut config: NetConfig,
        status: &VmStatus,
    ) -> Result<(HostDevice, NetStatus), Problem> {
        config.id = free_id(config.id, "net", status);
        config.mac = Some(config.mac_or_derived(self.vm.as_str()));
        config
            .check()
            .map_err(|(key, error)| Problem::new(ProblemKind::Invalid, format!("{key} {error}")))?;
        if let Some(other) = status.nets.iter().find(|other| other.config.mac == config.mac) {
            let message = format!("network card `{}` has the same MAC address", other.config.id);
            return Err(Problem::new(ProblemKind::Conflict, message).about(&config.id));
        }
        let device = self
            .open_net(config.clone())
            .map_err(|error| problem(&config.id, &error))?;
        Ok((
            device,
            NetStatus {
                config,
                state: DeviceState::Attached,
            },
        ))
    }

    fn setting(&self, config: &DiskConfig) -> Result<Arc<DiskSetting>, DiskError> {
        self.settings.of(config).ok_or_else(|| DiskError::NoGroup {
            group: config
                .limit_group
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        })
    }

    /// Opens a SCSI disk.
    fn open_scsi(&self, config: DiskConfig) -> Result<ScsiDisk, DiskError> {
        let setting = self.setting(&config)?;
        let source = super::disk::open_unit(&config, self)?;
        self.settings.enter(config.id, &setting);
        Ok(ScsiDisk { setting, source })
    }

    /// The way to a SCSI disk that the manager serves; none if it is another disk.
    fn managed_scsi(&self, config: &DiskConfig) -> Option<(&Arc<ManagedScsi>, &ManagerLink)> {
        config.file.as_ref().filter(|_| config.is_unit())?;
        self.managed.as_ref().zip(self.manager.as_ref())
    }

    /// Has the manager open a SCSI disk.
    fn open_managed(&self, config: DiskConfig, managed: &Arc<ManagedScsi>) -> Result<DiskStatus, DiskError> {
        let setting = self.setting(&config)?;
        let status = managed.attach(&setting)?;
        self.settings.enter(config.id, &setting);
        Ok(status)
    }

    /// The adapter of the disks that the manager serves as a device, if there was none before.
    fn managed_adapter(
        &self,
        managed: &Arc<ManagedScsi>,
        manager: &ManagerLink,
    ) -> Result<Option<HostDevice>, DiskError> {
        if !managed.needs_adapter() {
            return Ok(None);
        }
        let device =
            super::disk::managed_adapter(managed, manager, self).inspect_err(|_| managed.no_adapter())?;
        Ok(Some(HostDevice {
            id: super::managed::adapter_id(),
            kind: Kind::ScsiAdapter,
            device,
            workers: Vec::new(),
            guard: None,
        }))
    }

    /// The SCSI adapter as a device, if there was none before.
    fn adapter(&self) -> Result<Option<HostDevice>, DiskError> {
        self.scsi.adapter(|| {
            let mut workers = Vec::new();
            let ScsiAdapter { device, units } = if let Some(pool) = &self.pool {
                pool.adapter(&self.scsi_options)?
            } else {
                for number in 0..self.scsi_options.queues {
                    workers.push(Worker::start(
                        &format!("io-scsi{number}"),
                        WorkerOptions {
                            on_start: Some(Box::new(self.sandbox.thread(sandbox::Kind::DiskWorker))),
                            ..WorkerOptions::default()
                        },
                    )?);
                }
                let handles = workers.iter().map(|worker| worker.handle().clone());
                // There are images only.
                scsi_adapter::<Arc<block_io::HostDevice>>(&self.scsi_options, handles.collect())?.0
            };
            let device = HostDevice {
                id: adapter_id(),
                kind: Kind::ScsiAdapter,
                device,
                workers,
                guard: None,
            };
            Ok((units, device))
        })
    }

    fn open_disk(&self, config: DiskConfig) -> Result<(HostDevice, DiskStatus), DiskError> {
        let setting = self.setting(&config)?;
        let OpenDisk {
            device,
            workers,
            size,
            guard,
            link,
        } = super::disk::open(&config, &setting, self)?;
        if link.as_ref().is_some_and(FrontEndHandle::is_read_only) {
            setting.make_read_only();
        }
        let id = config.id;
        self.settings.enter(id.clone(), &setting);
        let status = DiskStatus {
            config: setting.config(),
            state: DeviceState::Attached,
            size,
            stopped: None,
        };
        let device = HostDevice {
            id,
            kind: Kind::Disk { setting, size, link },
            device,
            workers,
            guard,
        };
        Ok((device, status))
    }

    fn open_net(&self, config: NetConfig) -> Result<HostDevice, NetError> {
        let backend = match (config.backend, &config.tap) {
            (NetKind::Tap, Some(tap)) => NetBackend::open_tap(tap.as_str(), u16::from(config.queues))?,
            (NetKind::Tap, None) => {
                return Err(NetError::Options("backend tap needs the key `tap`".to_owned()));
            }
            (NetKind::User, _) => {
                let mut options = PasstOptions::new(config.mac_or_derived(self.vm.as_str()));
                options.forward.clone_from(&config.forward);
                options.mtu = config.mtu;
                match &self.passt {
                    StartPasst::Here => NetBackend::start_passt(&options)?,
                    StartPasst::There(launcher) => NetBackend::launch_passt(launcher, &options)?,
                    StartPasst::No => {
                        let why = "the user network cannot be attached to a running VM without [management]";
                        return Err(NetError::Options(why.to_owned()));
                    }
                }
            }
        };
        let options = NetOptions {
            thread_setup: Some(Arc::new(self.sandbox.thread(sandbox::Kind::NetQueue))),
            ..NetOptions::from_config(&config, self.vm.as_str())
        };
        let device = Net::new(backend, options)?;
        self.net_counters
            .enter(config.id.clone(), device.statistics_while_there());
        Ok(HostDevice {
            id: config.id.clone(),
            kind: Kind::Net {
                config: Box::new(config),
            },
            device: Box::new(device),
            workers: Vec::new(),
            guard: None,
        })
    }
}

/// The name of the SCSI adapter.
pub(super) fn adapter_id() -> DeviceId {
    // This is a name.
    "scsi".parse().unwrap_or_default()
}

/// `id`, or the first free one with `prefix` if it is unassigned.
fn free_id(id: DeviceId, prefix: &str, status: &VmStatus) -> DeviceId {
    let taken = |id: &DeviceId| {
        status.disks.iter().any(|disk| disk.config.id == *id)
            || status.nets.iter().any(|net| net.config.id == *id)
    };
    if id.is_unassigned() {
        DeviceId::first_free(prefix, taken)
    } else {
        id
    }
}

/// The whole chain of an error in one line, as a problem of the host.
fn problem(id: &DeviceId, error: &dyn std::error::Error) -> Problem {
    let text = format!("cannot open `{id}`: {}", error_chain(error));
    Problem::new(ProblemKind::Host, text).about(id)
}

/// The consoles of a VM.
pub(super) struct Consoles {
    serial: Console,
    virtio: Option<Console>,
}

/// How long pending console output may take to go out when the VM has ended.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

impl Consoles {
    /// Opens the consoles that the configuration names and puts them on the main loop.
    pub(super) fn open(
        config: &VmConfig,
        main_loop: &mut super::MainLoop,
        control: &super::Control,
    ) -> Result<Self, MachineError> {
        let mut open = |spec: &ConsoleSpec, name: &str| -> Result<Console, MachineError> {
            let control = control.clone();
            let options = ConsoleOptions {
                name: name.to_owned(),
                escape: config.console.escape.control_character(),
                commands: Arc::new(move |command| control.console_command(command)),
            };
            let mut console = Console::open(spec, options)?;
            if let Some(path) = console.path() {
                tracing::warn!(console = name, path = %path.display(), "console ready");
            }
            if let Some(subscriber) = console.take_subscriber() {
                main_loop.add_subscriber(subscriber);
            }
            Ok(console)
        };
        let serial = open(&config.console.serial, "serial")?;
        let virtio = config
            .console
            .virtio
            .as_ref()
            .map(|spec| open(spec, "virtio"))
            .transpose()?;
        Ok(Consoles { serial, virtio })
    }

    /// Where COM1 leads.
    pub(super) fn serial(&self) -> ConsoleHandle {
        self.serial.handle()
    }

    /// Writes out what is pending, and gives the terminal back.
    pub(super) fn close(self) {
        for console in [Some(self.serial), self.virtio].into_iter().flatten() {
            let lost = console.handle().flush(FLUSH_LIMIT);
            if lost > 0 {
                tracing::warn!(bytes = lost, "console output could not be written before the end");
            }
        }
    }
}

/// Opens all devices that the configuration names.
pub(super) fn open_all(
    config: &VmConfig,
    opener: &DeviceOpener,
    event_loop: &EventLoop,
    consoles: &Consoles,
) -> Result<Vec<HostDevice>, MachineError> {
    let device = |id: &DeviceId| {
        let id = id.to_string();
        move |source: Box<dyn std::error::Error + Send + Sync>| MachineError::Device { id, source }
    };
    let mut devices = Vec::new();
    if config.scsi.is_some() {
        let adapter = opener.adapter();
        devices.extend(adapter.map_err(|error| device(&adapter_id())(error.into()))?);
    }
    // The manager has all disks of its adapter before the guest looks at it.
    let mut managed = None;
    for disk in &config.disks {
        let failed = |error: DiskError| device(&disk.id)(error.into());
        if let Some(bus) = opener.managed_scsi(disk) {
            opener.open_managed(disk.clone(), bus.0).map_err(failed)?;
            managed.get_or_insert((devices.len(), bus));
            continue;
        }
        match disk.is_unit() {
            false => devices.push(opener.open_disk(disk.clone()).map_err(failed)?.0),
            true => {
                devices.extend(opener.adapter().map_err(failed)?);
                let disk = opener.open_scsi(disk.clone()).map_err(failed)?;
                opener.scsi.plug(disk).map_err(|problem| failed(problem.into()))?;
            }
        }
    }
    if let Some((place, (bus, manager))) = managed {
        let adapter = opener.managed_adapter(bus, manager);
        let adapter = adapter.map_err(|error| device(&super::managed::adapter_id())(error.into()))?;
        devices.splice(place..place, adapter);
    }
    for net in &config.nets {
        devices.push(
            opener
                .open_net(net.clone())
                .map_err(|error| device(&net.id)(error.into()))?,
        );
    }
    let mut internal = |id: &str, kind, device| {
        if let Ok(id) = id.parse() {
            devices.push(HostDevice {
                id,
                kind,
                device,
                workers: Vec::new(),
                guard: None,
            });
        }
    };
    if config.rng {
        internal(
            "rng",
            Kind::Rng,
            Box::new(Rng::new(event_loop.clone())) as Box<dyn VirtioDevice>,
        );
    }
    if let Some(console) = &consoles.virtio {
        internal(
            "console",
            Kind::Console,
            Box::new(VirtioConsole::new(event_loop.clone(), console.handle())),
        );
    }
    Ok(devices)
}
