//! `smsvmm share`: disks for virtual machines of others.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::{Problem, ProblemKind, Share, ShareKind};
use block_io::{Cache, HostDevice, OpenOptions, Worker, WorkerHandle};
use clap::{Args, Subcommand};
use management::Server;
use storage_manager::{HostedPool, VirtualDisk};
use storage_virtualizer::controls::{DiskControls, Rate, RateLimit};
use storage_virtualizer::vhost_user::{VhostUserOptions, VhostUserServer};
use storage_virtualizer::virtio_blk::{MAX_QUEUES, VirtioBlkOptions, fitting_serial};
use storage_virtualizer::{DiskHandle, PinnedDisk};
use vmm::sandbox::Opens;

use crate::exit::{Exit, UsageError};
use crate::pool::{PoolThreads, served, with_pool};
use crate::share_blk_manage::{BlkShare, Open, Served};
use crate::share_control::{
    self, AddArguments, DisconnectArguments, RemoveArguments, StatusArguments, StopArguments,
};
use crate::share_iscsi::{self, IscsiArguments};
use crate::share_manage::{self, Base, Management, not_opened};
use crate::share_nbd::{self, NbdArguments, absolute};
use crate::share_sandbox::Confined;
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
    #[command(flatten)]
    threads: PoolThreads,
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
    #[command(flatten)]
    management: Management,
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
    /// Have the kernel hold the memory of front-ends, which costs it less CPU time per request. Only for virtual machines whose memory stays as it is:
    /// without balloon, free page reporting and memory that is taken back
    #[arg(long)]
    pub(crate) pin_memory: bool,
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
    arguments.threads.check(&arguments.paths)?;
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
    // Before anything is opened: a second process with this socket ends here.
    let management = arguments.management.bind()?;
    if management.is_some() {
        arguments.check_names()?;
    }
    let confined = Confined::prepare(&arguments.socket, &arguments.management, Opens::DevicesAndSockets)?;
    if !arguments.paths.is_empty() {
        let serve = |pool: &Arc<HostedPool>| {
            pool.confine_worker(confined.serving())?;
            serve_pool_disks(arguments, management, pool, (&confined, &signals))
        };
        with_pool(&arguments.which, arguments.threads, "io-pool", serve)?;
        return Ok(Exit::Success);
    }
    let settings = arguments.settings(&confined);
    let mut disks = Vec::new();
    for (image, socket) in arguments.image.iter().zip(&arguments.socket) {
        let served = share(&settings, image, socket, arguments.read_only)?;
        let name = absolute(image).display().to_string();
        disks.push((name.clone(), name, served));
        logs::say(&format!(
            "smsvmm: {} is served at {}",
            image.display(),
            socket.display()
        ));
    }
    let all_read_only = arguments.read_only;
    let open: Open<Arc<HostDevice>> = Box::new(move |meant, socket| {
        let served = share(
            &settings,
            Path::new(&meant.source),
            socket,
            all_read_only || meant.read_only,
        );
        served.map_err(|error| not_opened(&meant.source, error.as_ref()))
    });
    let base = Base::new(ShareKind::VhostUser, None, Vec::new(), []);
    let share = BlkShare::new(base, disks, open);
    serve(&share, management, (&confined, &signals)).map(|()| Exit::Success)
}

/// Serves until a signal comes.
fn serve<H: DiskHandle>(
    share: &Arc<BlkShare<H>>,
    management: Option<Server>,
    (confined, signals): (&Confined, &Signals),
) -> anyhow::Result<()> {
    let managed = share_manage::answer(management, Arc::clone(share) as Arc<dyn Share>, confined)?;
    let signal = signals.next();
    logs::say(&format!("smsvmm: {signal}: the disks are closed"));
    drop(managed);
    share.end();
    Ok(())
}

/// Serves disks of a pool.
fn serve_pool_disks(
    arguments: &VhostUserArguments,
    management: Option<Server>,
    pool: &Arc<HostedPool>,
    (confined, signals): (&Confined, &Signals),
) -> anyhow::Result<()> {
    let (settings, all_read_only) = (arguments.settings(confined), arguments.read_only);
    let here = Arc::clone(pool);
    let open = move |path: &str, socket: &Path, read_only: bool| -> anyhow::Result<Served<_>> {
        let options = served(path, all_read_only || read_only);
        let disk = here.disk(path, options)?;
        let name = path.rsplit('/').next().unwrap_or_default();
        let server = VhostUserServer::start(
            socket,
            disk.handle().clone(),
            settings.server_options(name, options.read_only),
            vec![here.worker().clone()],
        );
        let (handle, resized) = (disk.handle().clone(), disk.resize_hook());
        let guard = disk.into_guard();
        match server {
            Ok(server) => Ok(Served {
                socket: absolute(socket),
                disk: handle,
                server,
                workers: Vec::new(),
                guard: Some(guard),
                resized: Some(resized),
            }),
            Err(error) => {
                drop((handle, resized));
                guard.close();
                Err(error.into())
            }
        }
    };
    let mut disks = Vec::new();
    for (path, socket) in arguments.paths.iter().zip(&arguments.socket) {
        disks.push((path.clone(), path.clone(), open(path, socket, false)?));
        logs::say(&format!("smsvmm: {path} is served at {}", socket.display()));
    }
    let open: Open<PinnedDisk<VirtualDisk>> = Box::new(move |meant, socket| {
        let opened = open(&meant.source, socket, meant.read_only);
        opened.map_err(|error| match error.downcast::<Problem>() {
            Ok(problem) => problem,
            Err(error) => Problem::new(ProblemKind::Conflict, format!("{error:#}")).about(&meant.source),
        })
    });
    let base = Base::new(ShareKind::VhostUser, Some(Arc::clone(pool)), Vec::new(), []);
    serve(&BlkShare::new(base, disks, open), management, (confined, signals))
}

/// What is the same for all disks of a process.
#[derive(Clone)]
struct Settings(Serving, Confined);

impl Settings {
    fn server_options(&self, name: &str, read_only: bool) -> VhostUserOptions {
        let mut options = VhostUserOptions {
            device: VirtioBlkOptions {
                serial: fitting_serial(name),
                queues: self.0.queues,
                controls: Arc::new(self.0.controls(name)),
                ..VhostUserOptions::default().device
            },
            memory_stays: self.0.pin_memory,
            confine: Some(self.1.front_ends()),
            ..VhostUserOptions::default()
        };
        if read_only {
            options.front_ends = 64;
        }
        options
    }
}

impl VhostUserArguments {
    fn settings(&self, confined: &Confined) -> Settings {
        Settings(self.serving.clone(), confined.clone())
    }

    /// Who manages disks tells them by their paths.
    fn check_names(&self) -> Result<(), UsageError> {
        let images = self
            .image
            .iter()
            .map(|image| absolute(image).display().to_string());
        let mut seen = BTreeSet::new();
        match self
            .paths
            .iter()
            .cloned()
            .chain(images)
            .find(|name| !seen.insert(name.clone()))
        {
            Some(twice) => Err(UsageError::new(format!(
                "{twice} is given twice: with --management, a disk has one socket"
            ))),
            None => Ok(()),
        }
    }
}

fn share(
    settings: &Settings,
    image: &Path,
    socket: &Path,
    read_only: bool,
) -> anyhow::Result<Served<Arc<HostDevice>>> {
    let name = image
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let disk = Arc::new(settings.0.open(image, read_only)?);
    let workers = settings.0.workers(&name, &settings.1)?;
    let options = settings.server_options(&name, read_only);
    let server = VhostUserServer::start(socket, Arc::clone(&disk), options, handles(&workers))?;
    Ok(Served {
        socket: absolute(socket),
        disk,
        server,
        workers,
        guard: None,
        resized: None,
    })
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
    pub(crate) fn workers(&self, name: &str, confined: &Confined) -> anyhow::Result<Vec<Worker>> {
        let start = |number| Worker::start(&format!("io-{number}-{name}"), confined.worker());
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
