//! `smsvmm share vhost-user-scsi`: the same disks for several machines, which know of each other.
//!
//! ```text
//!   --socket a ─ adapter, an initiator ─┐
//!                                       ├─► target 0: LUN 0, 1, … = the disks
//!   --socket b ─ adapter, another one  ─┘
//! ```
//!
//! With disks of a pool, the machine at each socket is a principal of the expanded API, which may look at the disks that it sees, or what
//! --access says:
//!
//! ```toml
//! [[machine]]
//! socket = "a.sock"                     # relative to the file
//! name = "web1"                         # by default the socket's
//! [machine.expanded-api]                # as in vm.toml
//! allow = ["snapshot"]
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use api::{ExpandedPolicy, Problem, ProblemKind, Share, ShareKind, VmName};
use block_io::{BlockDevice, Geometry, HostDevice, WorkerHandle};
use clap::Args;
use management::Server;
use serde::Deserialize;
use storage_manager::{HostedPool, VirtualDisk};
use storage_virtualizer::scsi::{Identity, Provisioning, TransportId, Unit, UnitOptions, VendorCommands};
use storage_virtualizer::vhost_user::VhostUserScsiServer;
use storage_virtualizer::virtio_blk::fitting_serial;
use storage_virtualizer::virtio_scsi::{ScsiGroup, VirtioScsiHandle, VirtioScsiOptions};
use storage_virtualizer::{DiskHandle, PinnedDisk};
use vmm::sandbox::Opens;

use crate::exit::{Exit, UsageError};
use crate::pool::{PoolThreads, served, with_pool};
use crate::share::{Serving, handles};
use crate::share_api::{Principals, Shelf, name_of, serial_of};
use crate::share_iscsi::unique;
use crate::share_manage::{self, Base, Management, not_opened};
use crate::share_nbd::{absolute, named};
use crate::share_sandbox::Confined;
use crate::share_scsi_manage::{Forget, NewUnit, Open, ScsiShare};
use crate::signals::Signals;
use crate::storage::Which;
use crate::{logs, toml_file};

/// What a driver is told of segments of a request, as QEMU's own devices say.
const QUEUE_SIZE: u16 = 128;

#[derive(Debug, Args)]
pub(crate) struct VhostUserScsiArguments {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    threads: PoolThreads,
    /// Disks of the pool, or snapshots: /vm/shared.dsk, /vm/shared.dsk@monday.
    #[arg(conflicts_with = "images", required_unless_present = "images")]
    paths: Vec<String>,
    /// Where to listen; only this user may connect. Once for each machine, which is known to reservations by this path.
    #[arg(long = "socket", required = true, value_name = "PATH")]
    sockets: Vec<PathBuf>,
    /// A raw disk image or a block device, under its file name or the one before `=`. May be given several times.
    #[arg(long = "image", value_name = "[NAME=]FILE")]
    images: Vec<String>,
    /// The guests cannot write.
    #[arg(long)]
    read_only: bool,
    /// What the machines may ask of storage management by their disks: a file with a table `machine` for each socket, and in it `expanded-api`
    /// as in vm.toml. Those that are not in it may look at their disks.
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    access: Option<PathBuf>,
    #[command(flatten)]
    serving: Serving,
    #[command(flatten)]
    management: Management,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct AccessFile {
    #[serde(default)]
    machine: Vec<MachineAccess>,
}

/// The machine at a socket.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MachineAccess {
    socket: PathBuf,
    name: Option<VmName>,
    #[serde(default)]
    expanded_api: ExpandedPolicy,
}

/// Who is at each of `sockets`, and what he may.
fn machines(
    sockets: &[PathBuf],
    access: Option<&Path>,
) -> anyhow::Result<Vec<(TransportId, VmName, ExpandedPolicy)>> {
    let mut named: Vec<(PathBuf, MachineAccess)> = Vec::new();
    if let Some(file) = access {
        let refuse = |what: String| UsageError::new(format!("{}: {what}", file.display()));
        let read: AccessFile = toml_file::read(file)?;
        let folder = absolute(file);
        let folder = folder.parent().unwrap_or(Path::new("/"));
        for machine in read.machine {
            let socket = absolute(&folder.join(&machine.socket));
            let shown = machine.socket.display();
            if !sockets.iter().any(|served| absolute(served) == socket) {
                return Err(refuse(format!("{shown} is not served; name it by --socket")).into());
            }
            if named.iter().any(|(other, _)| *other == socket) {
                return Err(refuse(format!("{shown} is there twice")).into());
            }
            let policy = machine.expanded_api.check();
            policy.map_err(|(key, error)| refuse(format!("{shown}: expanded-api.{key} {error}")))?;
            named.push((socket, machine));
        }
    }
    let machine = |socket: &PathBuf| {
        let place = absolute(socket);
        let own = named.iter().find(|(other, _)| *other == place);
        let own = own.map(|(_, machine)| machine);
        let name = match own.and_then(|machine| machine.name.clone()) {
            Some(name) => name,
            None => name_of(&socket.file_stem().unwrap_or_default().to_string_lossy())?,
        };
        let policy = own.map(|machine| machine.expanded_api.clone());
        Ok((initiator(socket), name, policy.unwrap_or_default()))
    };
    sockets.iter().map(machine).collect()
}

pub(crate) fn vhost_user_scsi(arguments: &VhostUserScsiArguments) -> anyhow::Result<Exit> {
    arguments.threads.check(&arguments.paths)?;
    arguments.serving.check()?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = arguments.sockets.iter().find(|socket| !seen.insert(*socket)) {
        return Err(UsageError::new(format!(
            "--socket {} is given twice: each machine needs one of its own",
            twice.display()
        ))
        .into());
    }
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    // Before anything is opened: a second process with this socket ends here.
    let management = arguments.management.bind()?;
    let confined = Confined::prepare(&arguments.sockets, &arguments.management, Opens::Devices)?;
    if !arguments.paths.is_empty() {
        let names: Vec<&str> = arguments.paths.iter().map(String::as_str).collect();
        unique(&names)?;
        let serve = |pool: &Arc<HostedPool>| {
            pool.confine_worker(confined.serving())?;
            serve_pool_disks(arguments, management, pool, (&confined, &signals))
        };
        with_pool(&arguments.which, arguments.threads, "io-pool", serve)?;
        return Ok(Exit::Success);
    }
    let images = arguments.images.iter().map(|text| named(text));
    let images = images.collect::<Result<Vec<_>, UsageError>>()?;
    let names: Vec<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
    unique(&names)?;
    let mut disks = Vec::new();
    for (name, image) in &images {
        let disk = arguments.serving.open(Path::new(image), arguments.read_only)?;
        disks.push((
            name.clone(),
            (*image).to_owned(),
            image_unit(&arguments.serving, name, image, disk),
        ));
    }
    let workers = arguments.serving.workers("scsi", &confined)?;
    let (serving, all_read_only) = (arguments.serving.clone(), arguments.read_only);
    let open: Open<Arc<HostDevice>> = Box::new(move |_, meant| {
        let read_only = all_read_only || meant.read_only;
        let disk = serving.open(Path::new(&meant.source), read_only);
        let disk = disk.map_err(|error| not_opened(&meant.source, error.as_ref()))?;
        Ok(image_unit(&serving, &meant.name, &meant.source, disk))
    });
    let servers = start(arguments, &disks, &handles(&workers), &confined)?;
    let base = Base::new(ShareKind::VhostUserScsi, None, sockets(arguments), []);
    let share = ScsiShare::new(base, servers, disks, open, Box::new(|_| {}));
    serve(&share, management, (&confined, &signals))?;
    Ok(Exit::Success)
}

fn image_unit(serving: &Serving, name: &str, image: &str, disk: HostDevice) -> NewUnit<Arc<HostDevice>> {
    let identity = Identity::from_name(
        &absolute(Path::new(image)).to_string_lossy(),
        &fitting_serial(name),
    );
    let options = unit_options(identity, &disk.geometry(), Provisioning::Thin);
    NewUnit {
        unit: Arc::new(Unit::new(options)),
        disk: Arc::new(disk),
        controls: Arc::new(serving.controls(name)),
        guard: None,
        resized: None,
    }
}

/// Serves disks of a pool.
fn serve_pool_disks(
    arguments: &VhostUserScsiArguments,
    management: Option<Server>,
    pool: &Arc<HostedPool>,
    (confined, signals): (&Confined, &Signals),
) -> anyhow::Result<()> {
    let principals = Principals::of_machines(machines(&arguments.sockets, arguments.access.as_deref())?);
    let shelf = Arc::<Shelf>::default();
    let (serving, all_read_only) = (arguments.serving.clone(), arguments.read_only);
    let (here, own, principal) = (Arc::clone(pool), Arc::clone(&shelf), Arc::clone(&principals));
    let open = move |lun: u16, path: &str, read_only: bool| -> anyhow::Result<NewUnit<_>> {
        let disk = here.disk(path, served(path, all_read_only || read_only))?;
        let identity = Identity {
            uuid: disk.uuid(),
            ..Identity::from_name(path, &serial_of(path))
        };
        let unit = Unit::new(UnitOptions {
            store: disk.reservation_store(),
            vendor: Some(Arc::clone(&principal) as Arc<dyn VendorCommands>),
            ..unit_options(identity, &disk.handle().geometry(), Provisioning::ThinZeroes)
        });
        unit.restore_reservations(disk.reservations())
            .with_context(|| format!("cannot share {path}"))?;
        own.put(lun, path, &disk)?;
        Ok(NewUnit {
            unit: Arc::new(unit),
            disk: disk.handle().clone(),
            controls: Arc::new(serving.controls(path)),
            resized: Some(disk.resize_hook()),
            guard: Some(disk.into_guard()),
        })
    };
    let mut disks = Vec::new();
    for (lun, path) in (0..).zip(&arguments.paths) {
        disks.push((path.clone(), path.clone(), open(lun, path, false)?));
    }
    let running = principals.start(&[], pool, &shelf, confined)?;
    let servers = start(arguments, &disks, &[pool.worker().clone()], confined)?;
    let base = Base::new(
        ShareKind::VhostUserScsi,
        Some(Arc::clone(pool)),
        sockets(arguments),
        [],
    );
    let open: Open<PinnedDisk<VirtualDisk>> = Box::new(move |lun, meant| {
        open(lun, &meant.source, meant.read_only).map_err(|error| match error.downcast::<Problem>() {
            Ok(problem) => problem,
            Err(error) => Problem::new(ProblemKind::Host, format!("{error:#}")).about(&meant.source),
        })
    });
    let own = Arc::clone(&shelf);
    let forget: Forget = Box::new(move |lun| own.take(lun));
    let share = ScsiShare::new(base, servers, disks, open, forget);
    let ended = serve(&share, management, (confined, signals));
    drop(running);
    shelf.clear();
    ended
}

fn sockets(arguments: &VhostUserScsiArguments) -> Vec<String> {
    let shown = |socket: &PathBuf| absolute(socket).display().to_string();
    arguments.sockets.iter().map(shown).collect()
}

fn unit_options(identity: Identity, geometry: &Geometry, thin: Provisioning) -> UnitOptions {
    UnitOptions {
        read_only: geometry.read_only,
        provisioning: match geometry.discard_granularity {
            0 => Provisioning::Full,
            _ => thin,
        },
        ..UnitOptions::new(identity)
    }
}

/// Shows the disks at all sockets.
fn start<H: DiskHandle>(
    arguments: &VhostUserScsiArguments,
    disks: &[(String, String, NewUnit<H>)],
    workers: &[WorkerHandle],
    confined: &Confined,
) -> anyhow::Result<Vec<VhostUserScsiServer<H>>> {
    let group = ScsiGroup::default();
    let mut servers = Vec::new();
    for socket in &arguments.sockets {
        let options = VirtioScsiOptions {
            initiator: initiator(socket),
            queues: arguments.serving.queues,
            queue_size: QUEUE_SIZE,
            last_target: 0,
        };
        let prepare = |adapter: &VirtioScsiHandle<H>| {
            (0_u16..).zip(disks).try_for_each(|(lun, (_, _, new))| {
                let (unit, controls) = (Arc::clone(&new.unit), Arc::clone(&new.controls));
                adapter.add((0, lun), unit, new.disk.clone(), controls, None)
            })
        };
        let server = VhostUserScsiServer::start(
            socket,
            &options,
            workers.to_vec(),
            &group,
            arguments.serving.pin_memory,
            Some(confined.front_ends()),
            prepare,
        )?;
        servers.push(server);
    }
    for socket in &arguments.sockets {
        for (lun, (name, ..)) in disks.iter().enumerate() {
            logs::say(&format!(
                "smsvmm: LUN {lun}, {name}, is served at {}",
                socket.display()
            ));
        }
    }
    Ok(servers)
}

/// Serves until a signal comes.
fn serve<H: DiskHandle>(
    share: &Arc<ScsiShare<H>>,
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

/// The machine at a socket, as persistent reservations know it: the same as long as the socket has this path.
fn initiator(socket: &Path) -> TransportId {
    let path = absolute(socket);
    let name = format!("smsvmm adapter at {}", path.display());
    TransportId::sas(u64::from_be_bytes(Identity::from_name(&name, "").naa()))
}
