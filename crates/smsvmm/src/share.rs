//! `smsvmm share`: disks for virtual machines of others.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use block_io::{Cache, HostDevice, OpenOptions, Worker, WorkerHandle, WorkerOptions};
use clap::{Args, Subcommand};
use storage_manager::HostedPool;
use storage_virtualizer::controls::{DiskControls, Rate, RateLimit};
use storage_virtualizer::vhost_user::{VhostUserOptions, VhostUserServer};
use storage_virtualizer::virtio_blk::{MAX_QUEUES, VirtioBlkOptions, fitting_serial};

use crate::exit::{Exit, UsageError};
use crate::pool::{served, with_pool};
use crate::share_control::{
    self, AddArguments, DisconnectArguments, RemoveArguments, StatusArguments, StopArguments,
};
use crate::share_iscsi::{self, IscsiArguments};
use crate::share_nbd::{self, NbdArguments};
use crate::share_scsi::{self, VhostUserScsiArguments};
use crate::signals::Signals;
use crate::storage::Which;
use crate::{debug, logs};

/// A limited disk may be ahead of its rate by what it has in so many parts of a second.
const BURST_PARTS: u64 = 10;

#[derive(Debug, Subcommand)]
pub(crate) enum ShareCommand {
    /// Serve disks to any vhost-user-blk front-end: QEMU, Cloud Hypervisor, smsvmm.
    ///
    /// Disks are paths in a pool, which is named by --config or --devices, or images of the host by --image. Each disk has a socket of
    /// its own: the first --socket is that of the first disk, and so on. Serves until SIGTERM, SIGINT
    /// or SIGHUP; requests in flight are ended then. A front-end that connects again (QEMU: reconnect=1) goes on where it was, also
    /// after this process was killed.
    VhostUser(VhostUserArguments),
    /// Serve disks as SCSI disks to any vhost-user-scsi front-end: QEMU and others.
    ///
    /// All disks are logical units of one target: the first is LUN 0. Each --socket is a SCSI adapter for one machine, and an initiator of
    /// its own: so several machines can share disks, with persistent reservations between them. Serves until SIGTERM, SIGINT or SIGHUP;
    /// requests in flight are ended then.
    VhostUserScsi(VhostUserScsiArguments),
    /// Serve disks over NBD, to qemu, nbdcopy, the Linux kernel and others, until SIGTERM, SIGINT or SIGHUP.
    ///
    /// Prints an address for each disk when it is ready. Clients that are connected when it ends get answers to what they have
    /// asked for.
    Nbd(NbdArguments),
    /// Serve disks over iSCSI, to initiators (libiscsi, QEMU and others), until SIGTERM, SIGINT or SIGHUP.
    ///
    /// All disks are logical units of one target, the first is LUN 0, unless --access says otherwise. Prints how to reach it when it is ready. Initiators that are logged in
    /// when it ends are asked to log out, and get answers to what they have asked for.
    Iscsi(IscsiArguments),
    /// What a process with --management serves, and to whom.
    Status(StatusArguments),
    /// Have a process with --management serve one more disk; clients of others notice nothing.
    Add(AddArguments),
    /// Have a process with --management serve a disk no more: what is in flight is answered, and then the disk is free.
    Remove(RemoveArguments),
    /// Have a process with --management end the connection of a client, after what it has in flight. It may come again.
    Disconnect(DisconnectArguments),
    /// End a process with --management, as SIGTERM does.
    Stop(StopArguments),
}

#[derive(Debug, Args)]
pub(crate) struct VhostUserArguments {
    #[command(flatten)]
    which: Which,
    /// Disks of the pool, or snapshots: /vm/root.dsk, /vm/root.dsk@monday.
    #[arg(conflicts_with = "image", required_unless_present = "image")]
    paths: Vec<String>,
    /// Where to listen; only this user may connect.
    #[arg(long, required = true, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// A raw disk image or a block device.
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The guests cannot write; then several may use a disk at once.
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    serving: Serving,
}

/// How queues and disks are served.
#[derive(Debug, Clone, Args)]
pub(crate) struct Serving {
    /// Virtqueues for requests that a front-end may have.
    #[arg(long, default_value_t = 4, value_name = "NUMBER")]
    pub(crate) queues: u16,
    /// Threads that serve the queues of images. Disks of a pool have one thread together.
    #[arg(long, default_value_t = 1, value_name = "NUMBER", conflicts_with = "paths")]
    threads: u16,
    /// Use the host's page cache.
    #[arg(long, conflicts_with = "paths")]
    buffered: bool,
    /// Look for further requests for this long before sleeping: faster at low depth, for CPU time.
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    poll_us: u32,
    /// At most so many requests per second for each disk.
    #[arg(long, value_name = "NUMBER")]
    limit_iops: Option<u64>,
    /// At most so many bytes per second for each disk.
    #[arg(long, value_name = "BYTES")]
    limit_bytes: Option<u64>,
}

pub(crate) fn execute(command: &ShareCommand) -> anyhow::Result<Exit> {
    debug::tell_on_panic();
    match command {
        ShareCommand::VhostUser(arguments) => vhost_user(arguments),
        ShareCommand::VhostUserScsi(arguments) => share_scsi::vhost_user_scsi(arguments),
        ShareCommand::Iscsi(arguments) => share_iscsi::iscsi(arguments),
        ShareCommand::Nbd(arguments) => share_nbd::nbd(arguments),
        ShareCommand::Status(arguments) => share_control::status(arguments),
        ShareCommand::Add(arguments) => share_control::add(arguments),
        ShareCommand::Remove(arguments) => share_control::remove(arguments),
        ShareCommand::Disconnect(arguments) => share_control::disconnect(arguments),
        ShareCommand::Stop(arguments) => share_control::stop(arguments),
    }
}

fn vhost_user(arguments: &VhostUserArguments) -> anyhow::Result<Exit> {
    let disks = arguments.image.len() + arguments.paths.len();
    if arguments.socket.len() != disks {
        return Err(UsageError::new(format!(
            "{disks} disks and {} --socket: each disk needs a socket of its own",
            arguments.socket.len()
        ))
        .into());
    }
    arguments.serving.check()?;
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    if !arguments.paths.is_empty() {
        let serve = |pool: &Arc<HostedPool>| serve_pool_disks(arguments, pool, &signals);
        with_pool(&arguments.which, "io-pool", serve)?;
        return Ok(Exit::Success);
    }
    let mut shares = Vec::new();
    for (image, socket) in arguments.image.iter().zip(&arguments.socket) {
        shares.push(share(arguments, image, socket)?);
        logs::say(&format!(
            "smsvmm: {} is served at {}",
            image.display(),
            socket.display()
        ));
    }
    let signal = signals.next();
    logs::say(&format!("smsvmm: {signal}: the disks are closed"));
    for (server, workers) in shares {
        server.stop();
        drop(workers);
    }
    Ok(Exit::Success)
}

/// Serves disks of a pool.
fn serve_pool_disks(
    arguments: &VhostUserArguments,
    pool: &HostedPool,
    signals: &Signals,
) -> anyhow::Result<()> {
    let mut shares = Vec::new();
    for (path, socket) in arguments.paths.iter().zip(&arguments.socket) {
        let options = served(path, arguments.read_only);
        let disk = pool.disk(path, options)?;
        let name = path.rsplit('/').next().unwrap_or_default();
        let server = VhostUserServer::start(
            socket,
            disk.handle().clone(),
            server_options(arguments, name, options.read_only),
            vec![pool.worker().clone()],
        )?;
        shares.push((server, disk.into_guard()));
        logs::say(&format!("smsvmm: {path} is served at {}", socket.display()));
    }
    let signal = signals.next();
    logs::say(&format!("smsvmm: {signal}: the disks are closed"));
    for (server, guard) in shares {
        server.stop();
        drop(guard);
    }
    Ok(())
}

fn server_options(arguments: &VhostUserArguments, name: &str, read_only: bool) -> VhostUserOptions {
    let mut options = VhostUserOptions {
        device: VirtioBlkOptions {
            serial: fitting_serial(name),
            queues: arguments.serving.queues,
            controls: Arc::new(arguments.serving.controls(name)),
            ..VhostUserOptions::default().device
        },
        ..VhostUserOptions::default()
    };
    if read_only {
        options.front_ends = 64;
    }
    options
}

type Share = (VhostUserServer<Arc<HostDevice>>, Vec<Worker>);

fn share(arguments: &VhostUserArguments, image: &Path, socket: &Path) -> anyhow::Result<Share> {
    let name = image
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let disk = arguments.serving.open(image, arguments.read_only)?;
    let workers = arguments.serving.workers(&name)?;
    let options = server_options(arguments, &name, arguments.read_only);
    let server = VhostUserServer::start(socket, Arc::new(disk), options, handles(&workers))?;
    Ok((server, workers))
}

pub(crate) fn handles(workers: &[Worker]) -> Vec<WorkerHandle> {
    workers.iter().map(|worker| worker.handle().clone()).collect()
}

impl Serving {
    /// # Errors
    /// A number is impossible.
    pub(crate) fn check(&self) -> Result<(), UsageError> {
        if (1..=MAX_QUEUES).contains(&self.queues) && (1..=MAX_QUEUES).contains(&self.threads) {
            return Ok(());
        }
        Err(UsageError::new(format!(
            "there are 1 to {MAX_QUEUES} queues and threads"
        )))
    }

    /// Opens an image.
    pub(crate) fn open(&self, image: &Path, read_only: bool) -> anyhow::Result<HostDevice> {
        let options = OpenOptions {
            read_only,
            cache: if self.buffered {
                Cache::Buffered
            } else {
                Cache::Direct
            },
            ..OpenOptions::default()
        };
        Ok(HostDevice::open(image, &options)?)
    }

    /// Threads for an image of this name.
    pub(crate) fn workers(&self, name: &str) -> anyhow::Result<Vec<Worker>> {
        let start = |number| Worker::start(&format!("io-{number}-{name}"), WorkerOptions::default());
        Ok((0..self.threads).map(start).collect::<Result<_, _>>()?)
    }

    /// The settings of the disk of this name.
    pub(crate) fn controls(&self, name: &str) -> DiskControls {
        let rate = |per_second: u64| Rate {
            per_second,
            burst: per_second / BURST_PARTS,
        };
        let controls = DiskControls::default();
        controls.recorder().set_name(name);
        controls.set_polling(Duration::from_micros(self.poll_us.into()));
        controls.set_limit(RateLimit {
            operations: self.limit_iops.map(rate),
            bytes: self.limit_bytes.map(rate),
        });
        controls
    }
}
