//! The command line as clap sees it: names, arguments, help.

use std::path::PathBuf;

use api::{
    ByteSize, DeviceId, DiskBus, DiskLimits, DiskSerial, MacAddress, NetBackend, OnError, PortForward,
    QueueSize, RestartPolicy, Seconds, TapName, VmName,
};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::mover::MoverArguments;
use crate::share::ShareCommand;
use crate::storage::{
    DeviceArguments, FileArguments, JobArguments, PoolArguments, VirtualDiskArguments, VolumeArguments,
};

/// A hypervisor for Linux/KVM with storage management beneath the guest.
#[derive(Debug, Parser)]
#[command(
    name = "smsvmm",
    version,
    disable_help_subcommand = true,
    max_term_width = 110
)]
pub(crate) struct Cli {
    /// Log more to standard error: -v info, -vv debug, -vvv trace (default: warnings; SMSVMM_LOG selects per module).
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the virtual machine that a file describes, until it ends.
    ///
    /// Exit status: 0 the guest powered off (or rebooted with power.on-reboot = "stop"), 1 smsvmm failed, 2 wrong usage or
    /// configuration, 3 the guest crashed, 4 it was stopped hard.
    ///
    /// SIGTERM, SIGINT and SIGHUP press the guest's power button; a second one, or power.shutdown-timeout, stops it hard.
    Run(RunArguments),
    /// Manage this host: own its pools, serve their disks to machines, start and watch machines.
    ///
    /// SIGTERM and SIGINT end it in order: guests are asked to shut down (again: they are stopped), then the pools are closed. SIGHUP has the
    /// program executed anew, as after an upgrade: machines go on, and their disks pause for a moment.
    Serve(ServeArguments),
    /// What this host offers to virtual machines.
    #[command(subcommand)]
    Host(HostCommand),
    /// Look at and steer a running virtual machine through its management socket.
    Vm(VmArguments),
    /// Pools of devices: make one, look at it, check it, move it between hosts.
    ///
    /// Which pool: --config FILE with `[pool]` devices = [...], or --devices d0,d1,... While a virtual machine has a pool open, its
    /// devices are locked and these commands say so.
    Pool(PoolArguments),
    /// The devices of a pool.
    Device(DeviceArguments),
    /// The volumes of a pool.
    Volume(VolumeArguments),
    /// The files of a pool: virtual disks, in a file system over its volumes.
    ///
    /// `file format` makes it. Paths begin with /.
    File(FileArguments),
    /// Virtual disks of a pool: files with snapshots, modes, images that come in and go out.
    ///
    /// A disk is a path that ends with .dsk; a snapshot of it is /vm/root.dsk@NAME.
    Disk(VirtualDiskArguments),
    /// Long operations on a pool.
    Job(JobArguments),
    /// What happened to a pool that is open: devices that fail and come, volumes, jobs, space.
    Events(EventsArguments),
    /// What a pool that is open, and its machine, have to do: refreshed until Ctrl-C.
    Top(TopArguments),
    /// What a machine did just now: a dump of all that it can tell of itself, a disk's requests as they end.
    Debug(DebugArguments),
    /// Give disks to virtual machines of other programs.
    #[command(subcommand)]
    Share(ShareCommand),
    /// Have the machines of this host managed over the network: TLS 1.3, roles, an audit log.
    ///
    /// Commands reach them with --config of a file that has `[remote]` with address, machine, ca, and token-file or certificate and key.
    Gateway(GatewayArguments),
    /// Who may come through a gateway, and what they may do.
    Principal(PrincipalArguments),
    /// Make a small certificate authority, and certificates of it, for gateways and their clients.
    #[command(subcommand)]
    Certificate(CertificateCommand),
    /// Backups of guests: made from frozen images while they run, listed, verified, restored.
    Mover(MoverArguments),
    /// Print a script that completes smsvmm's commands in a shell: `source <(smsvmm completions bash)`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one for each command: `man ./smsvmm-disk-snapshot.1`.
    Manual {
        /// The folder to which they are written.
        folder: PathBuf,
    },
}

/// Which process, by its management socket.
#[derive(Debug, Args)]
pub(crate) struct ProcessArguments {
    /// The management socket of who has the pool open.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pub(crate) socket: Option<PathBuf>,

    /// A file that names the socket (`[management]`), or a gateway (`[remote]`) [default: $SMSVMM_CONFIG, or
    /// /etc/smsvmm/host.toml].
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArguments {
    #[command(flatten)]
    pub(crate) process: ProcessArguments,
    /// Go on as things happen, until the process ends.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Leave out events up to this number.
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    pub(crate) after: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DebugArguments {
    #[command(flatten)]
    pub(crate) place: Place,

    #[command(subcommand)]
    pub(crate) command: DebugCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// Print, as JSON, how the machine is, its last events, the last requests of each disk, counters, pools. Nothing of what is on the disks.
    Dump {
        /// Write it to this file.
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Print the last requests of a disk, and then each one as it ends: time, queue, operation, first byte + bytes, latency, outcome.
    Trace {
        /// The disk's identifier; `smsvmm vm status` lists them.
        disk: DeviceId,
        /// Print each as one line of JSON.
        #[arg(long)]
        json: bool,
        /// Print the last requests, and end.
        #[arg(long)]
        once: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct TopArguments {
    #[command(flatten)]
    pub(crate) process: ProcessArguments,
    /// Print it once; so does --json, as one document.
    #[arg(long)]
    pub(crate) once: bool,
    /// Seconds over which load is looked at, and after which it is shown anew.
    #[arg(long, default_value = "2", value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=60))]
    pub(crate) interval: u32,
}

#[derive(Debug, Args)]
pub(crate) struct GatewayArguments {
    /// The gateway's configuration: listen, certificate, key, client-ca, access, audit, machines.
    #[arg(value_name = "gateway.toml")]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct PrincipalArguments {
    /// The file of principals, which the gateway's configuration names; `add` makes it. Changes take effect at once.
    #[arg(long, global = true, value_name = "FILE", default_value = "access.toml")]
    pub(crate) access: PathBuf,

    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: PrincipalCommand,
}

/// What somebody may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleName {
    /// Look.
    Viewer,
    /// Run machines, and use their storage.
    Operator,
    /// Everything.
    Administrator,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PrincipalCommand {
    /// Let somebody in: by a token, which is printed once, or by a client certificate.
    Add {
        /// What the audit log calls it.
        name: String,
        /// What it may do.
        #[arg(long, value_enum)]
        role: RoleName,
        /// Only this machine; may be repeated [default: all].
        #[arg(long, value_name = "NAME")]
        vm: Vec<String>,
        /// For so many days [default: until it is revoked].
        #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..))]
        days: Option<u32>,
        /// It is known by this certificate (PEM), and has no token.
        #[arg(long, value_name = "FILE")]
        certificate: Option<PathBuf>,
    },
    /// Let somebody in no more.
    Revoke {
        /// Who.
        name: String,
    },
    /// Who is known.
    List,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CertificateCommand {
    /// An authority (ca.pem, ca.key), and a gateway's certificate (server.pem, server.key). What is there already stays.
    Init {
        /// Where to.
        folder: PathBuf,
        /// A name or address by which clients know the gateway's host; may be repeated.
        #[arg(long, value_name = "NAME", required = true)]
        host: Vec<String>,
        /// How long the gateway's certificate is valid.
        #[arg(long, default_value = "365", value_parser = clap::value_parser!(u32).range(1..36500))]
        days: u32,
    },
    /// A client's certificate (NAME.pem, NAME.key), signed by the authority in the folder.
    Client {
        /// Where the authority is.
        folder: PathBuf,
        /// The client's name.
        name: String,
        /// How long it is valid.
        #[arg(long, default_value = "365", value_parser = clap::value_parser!(u32).range(1..36500))]
        days: u32,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The machine's configuration.
    #[arg(value_name = "vm.toml")]
    pub(crate) config: PathBuf,

    /// Change the configuration: cpus=4, disk.0.read-only=true, 'disk.+.image=data.raw', 'boot.cmdline=console=ttyS0 quiet'.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,

    /// Check that the machine could be started and show its effective configuration; start nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Print the result of --dry-run as JSON.
    #[arg(long, requires = "dry_run")]
    pub(crate) json: bool,

    /// Write to this file how it ended: for a manager.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) report: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// The host's configuration: state, runtime, management, pools, machines.
    #[arg(value_name = "host.toml")]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Check what virtual machines need of this host, and say what to do where something is missing.
    ///
    /// Exit status: 0 if a stock guest can boot here, else 1.
    Check {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Which machine.
#[derive(Debug, Clone, Args)]
pub(crate) struct Place {
    /// The machine's management socket.
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// The machine's configuration, which names its management socket; or host.toml, or a file with `[remote]`
    /// [default: $SMSVMM_CONFIG, or /etc/smsvmm/host.toml].
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Of the machines of a host's manager, the one of this name; commands without an argument of their own take it as that as well.
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) vm: Option<VmName>,
}

#[derive(Debug, Args)]
pub(crate) struct VmArguments {
    #[command(flatten)]
    pub(crate) place: Place,

    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: VmCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Have the host's manager know a machine, or change what it knows; a change counts when the machine is started next.
    Define {
        /// The machine's configuration.
        #[arg(value_name = "vm.toml")]
        file: PathBuf,
        /// Start it when the manager is started.
        #[arg(long)]
        autostart: bool,
        /// When it is started again after it has ended by itself.
        #[arg(long, value_enum, default_value_t = RestartChoice::OnFailure)]
        restart: RestartChoice,
        /// Refuse if the manager knows a machine of this name already.
        #[arg(long)]
        new: bool,
    },
    /// The machines that the host's manager knows.
    List,
    /// Have the host's manager start a machine.
    Start(MachineName),
    /// Have a guest shut down, and wait until it has; power.shutdown-timeout of its configuration ends it hard.
    Shutdown {
        #[command(flatten)]
        machine: MachineName,
        /// Return when the guest was asked.
        #[arg(long)]
        no_wait: bool,
    },
    /// Have the host's manager forget a machine that is stopped. Its disks stay.
    Delete(MachineName),
    /// Show its state, disks and network cards.
    Status(MachineName),
    /// Press its power button: the guest is asked to shut down.
    PowerButton(MachineName),
    /// End it at once, as if its cable were pulled.
    Stop(MachineName),
    /// Press its reset button.
    Reset(MachineName),
    /// Stop its processors.
    Pause(MachineName),
    /// Let its processors run on, and a disk that stopped because of an error try again.
    Resume(MachineName),
    /// Add a disk.
    AttachDisk(DiskArguments),
    /// Add a network card.
    AttachNet(NetArguments),
    /// Change a disk while the guest uses it: limits of its rate, polling, what happens when it fails. What is not named stays.
    SetDisk {
        /// The disk's identifier; `smsvmm vm status` lists them.
        id: DeviceId,
        #[command(flatten)]
        settings: DiskSettingArguments,
    },
    /// Change limits that disks share, which [limit-groups] in vm.toml names. What is not named stays.
    SetLimits {
        /// The group's name.
        group: DeviceId,
        #[command(flatten)]
        limits: LimitArguments,
    },
    /// Ask the guest to let a disk or network card go, and wait until it has.
    Detach {
        /// The device's identifier; `smsvmm vm status` lists them.
        id: DeviceId,
        /// How long to wait for the guest, for example 10s or 2m.
        #[arg(long, default_value = "30s", value_name = "TIME")]
        timeout: Seconds,
        /// Return when the guest was asked.
        #[arg(long, conflicts_with = "timeout")]
        no_wait: bool,
    },
    /// Show what happened.
    Events {
        /// Go on as things happen, until the machine ends.
        #[arg(short, long)]
        follow: bool,
        /// Leave out events up to this number.
        #[arg(long, default_value_t = 0, value_name = "NUMBER")]
        after: u64,
    },
    /// Connect this terminal to a console that leads to a socket or a pseudo-terminal; Ctrl-] leaves it.
    Console {
        /// Which console.
        #[arg(default_value = "serial")]
        console: ConsoleName,
        /// Only look on: what is typed goes nowhere.
        #[arg(long)]
        read_only: bool,
    },
}

/// A machine of the host's manager.
#[derive(Debug, Clone, Args)]
pub(crate) struct MachineName {
    /// Its name, where the configuration is not its own.
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<VmName>,
}

/// When a machine is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestartChoice {
    /// It stays as it is.
    Never,
    /// When its guest crashed, or its process failed.
    OnFailure,
    /// Also when its guest powered off.
    Always,
}

impl From<RestartChoice> for RestartPolicy {
    fn from(choice: RestartChoice) -> Self {
        match choice {
            RestartChoice::Never => Self::Never,
            RestartChoice::OnFailure => Self::OnFailure,
            RestartChoice::Always => Self::Always,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConsoleName {
    /// The serial port (ttyS0).
    Serial,
    /// The virtio console (hvc0).
    Virtio,
}

#[derive(Debug, Args)]
pub(crate) struct DiskArguments {
    /// A raw disk image or a block device.
    #[arg(required_unless_present_any = ["file", "vhost_user"], conflicts_with = "file")]
    pub(crate) image: Option<PathBuf>,
    /// A disk of the machine's pool instead: /vm/data.dsk, or a snapshot, /vm/data.dsk@monday, with --read-only.
    #[arg(long, value_name = "PATH", conflicts_with = "buffered")]
    pub(crate) file: Option<String>,
    /// The pool of the host's manager that has the disk of --file, if it has several.
    #[arg(long, value_name = "NAME", requires = "file")]
    pub(crate) pool: Option<String>,
    /// A disk that another process serves at this socket, instead of an image.
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["image", "file", "serial", "buffered", "poll_us"])]
    pub(crate) vhost_user: Option<PathBuf>,
    /// Name within the machine [default: the first free of disk0, disk1, ...].
    #[arg(long)]
    pub(crate) id: Option<DeviceId>,
    /// How the guest sees it.
    #[arg(long, value_name = "virtio-blk|virtio-scsi", value_parser = disk_bus, default_value = "virtio-blk")]
    pub(crate) bus: DiskBus,
    /// Of a SCSI disk: the target of the machine's adapter that shows it [default: 0].
    #[arg(long, value_name = "NUMBER")]
    pub(crate) target: Option<u8>,
    /// Of a SCSI disk: its LUN [default: the first that is free].
    #[arg(long, value_name = "NUMBER")]
    pub(crate) lun: Option<u16>,
    /// The guest cannot write.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// What the guest reads as serial number.
    #[arg(long)]
    pub(crate) serial: Option<DiskSerial>,
    /// Request queues, 1 to 16.
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    pub(crate) queues: u8,
    /// Requests that fit in a queue.
    #[arg(long, value_parser = queue_size, value_name = "NUMBER")]
    pub(crate) queue_size: Option<QueueSize>,
    /// Use the host's page cache.
    #[arg(long)]
    pub(crate) buffered: bool,
    #[command(flatten)]
    pub(crate) settings: DiskSettingArguments,
    /// Share these limits, which [limit-groups] in vm.toml names, with other disks.
    #[arg(long, value_name = "GROUP")]
    pub(crate) limit_group: Option<DeviceId>,
}

fn disk_bus(text: &str) -> Result<DiskBus, String> {
    match text {
        "virtio-blk" => Ok(DiskBus::VirtioBlk),
        "virtio-scsi" => Ok(DiskBus::VirtioScsi),
        other => Err(format!(
            "`{other}` is not known here; use virtio-blk or virtio-scsi"
        )),
    }
}

/// What can be changed of a disk while it is used.
#[derive(Debug, Args)]
pub(crate) struct DiskSettingArguments {
    #[command(flatten)]
    pub(crate) limits: LimitArguments,
    /// Look for further requests for at most this long before sleeping, as long as that pays; 0: sleep at once.
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) poll_us: Option<u32>,
    /// When the disk fails a request: report it to the guest, or stop the machine until `smsvmm vm resume`.
    #[arg(long, value_name = "report|stop")]
    pub(crate) on_error: Option<OnError>,
}

/// Limits of a rate; 0 takes one away.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LimitArguments {
    /// At most so many requests per second; 0: no limit.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) limit_iops: Option<u64>,
    /// So many requests may come at once after a pause [default: what comes in a tenth of a second].
    #[arg(long, value_name = "NUMBER")]
    pub(crate) limit_iops_burst: Option<u64>,
    /// At most so many bytes per second, for example 50M; 0: no limit.
    #[arg(long, value_name = "SIZE")]
    pub(crate) limit_bytes: Option<ByteSize>,
    /// So many bytes may come at once after a pause [default: what comes in a tenth of a second].
    #[arg(long, value_name = "SIZE")]
    pub(crate) limit_bytes_burst: Option<ByteSize>,
}

impl LimitArguments {
    pub(crate) fn limits(self) -> DiskLimits {
        DiskLimits {
            iops: self.limit_iops,
            iops_burst: self.limit_iops_burst,
            bytes: self.limit_bytes,
            bytes_burst: self.limit_bytes_burst,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct NetArguments {
    /// Connect it to this tap interface instead of the user network.
    #[arg(long, value_name = "INTERFACE")]
    pub(crate) tap: Option<TapName>,
    /// A port of the host that leads to the guest, for example tcp:8022:22.
    #[arg(long, value_name = "PROTOCOL:HOST:GUEST", conflicts_with = "tap")]
    pub(crate) forward: Vec<PortForward>,
    /// Name within the machine [default: the first free of net0, net1, ...].
    #[arg(long)]
    pub(crate) id: Option<DeviceId>,
    /// Hardware address [default: derived from the names].
    #[arg(long)]
    pub(crate) mac: Option<MacAddress>,
    /// Pairs of queues, 1 to 8.
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    pub(crate) queues: u8,
    /// Buffers that fit in a queue.
    #[arg(long, value_parser = queue_size, value_name = "NUMBER")]
    pub(crate) queue_size: Option<QueueSize>,
    /// Largest packet without the Ethernet header.
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u16>,
    /// Offer no checksum and segmentation offloads.
    #[arg(long)]
    pub(crate) no_offload: bool,
}

impl NetArguments {
    pub(crate) fn backend(&self) -> NetBackend {
        if self.tap.is_some() {
            NetBackend::Tap
        } else {
            NetBackend::User
        }
    }
}

fn queue_size(text: &str) -> Result<QueueSize, String> {
    let number: u64 = text
        .parse()
        .map_err(|_| format!("`{text}` is not a whole number"))?;
    QueueSize::try_from(number).map_err(|error| error.to_string())
}
