//! `smsvmm share vhost-user-scsi`: the same disks for several machines, which know of each other.
//!
//! ```text
//!   --socket a ─ adapter, an initiator ─┐
//!                                       ├─► target 0: LUN 0, 1, … = the disks
//!   --socket b ─ adapter, another one  ─┘
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use block_io::{Geometry, WorkerHandle};
use clap::Args;
use storage_manager::HostedPool;
use storage_virtualizer::DiskHandle;
use storage_virtualizer::controls::DiskControls;
use storage_virtualizer::scsi::{Identity, Provisioning, TransportId, Unit, UnitOptions};
use storage_virtualizer::vhost_user::VhostUserScsiServer;
use storage_virtualizer::virtio_blk::fitting_serial;
use storage_virtualizer::virtio_scsi::{ScsiGroup, VirtioScsiHandle, VirtioScsiOptions};

use crate::exit::{Exit, UsageError};
use crate::logs;
use crate::pool::{served, with_pool};
use crate::share::{Serving, handles};
use crate::share_iscsi::unique;
use crate::share_nbd::named;
use crate::signals::Signals;
use crate::storage::Which;

/// What a driver is told of segments of a request, as QEMU's own devices say.
const QUEUE_SIZE: u16 = 128;

#[derive(Debug, Args)]
pub(crate) struct VhostUserScsiArguments {
    #[command(flatten)]
    which: Which,
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
    #[command(flatten)]
    serving: Serving,
}

/// A disk that is to be shown to all machines.
struct Shown<H> {
    name: String,
    unit: Arc<Unit>,
    disk: H,
    controls: Arc<DiskControls>,
}

pub(crate) fn vhost_user_scsi(arguments: &VhostUserScsiArguments) -> anyhow::Result<Exit> {
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
    if !arguments.paths.is_empty() {
        let names: Vec<&str> = arguments.paths.iter().map(String::as_str).collect();
        unique(&names)?;
        let serve = |pool: &Arc<HostedPool>| serve_pool_disks(arguments, pool, &signals);
        with_pool(&arguments.which, "io-pool", serve)?;
        return Ok(Exit::Success);
    }
    let images = arguments.images.iter().map(|text| named(text));
    let images = images.collect::<Result<Vec<_>, UsageError>>()?;
    let names: Vec<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
    unique(&names)?;
    let mut disks = Vec::new();
    for (name, image) in &images {
        let disk = Arc::new(arguments.serving.open(Path::new(image), arguments.read_only)?);
        let path = std::path::absolute(image).unwrap_or_else(|_| image.into());
        let identity = Identity::from_name(&path.to_string_lossy(), &fitting_serial(name));
        let options = unit_options(identity, &disk.geometry(), Provisioning::Thin);
        disks.push(Shown {
            name: name.clone(),
            unit: Arc::new(Unit::new(options)),
            disk,
            controls: Arc::new(arguments.serving.controls(name)),
        });
    }
    let workers = arguments.serving.workers("scsi")?;
    serve(arguments, &disks, &handles(&workers), &signals)?;
    Ok(Exit::Success)
}

/// Serves disks of a pool.
fn serve_pool_disks(
    arguments: &VhostUserScsiArguments,
    pool: &HostedPool,
    signals: &Signals,
) -> anyhow::Result<()> {
    let (mut disks, mut guards) = (Vec::new(), Vec::new());
    for path in &arguments.paths {
        let disk = pool.disk(path, served(path, arguments.read_only))?;
        let name = path.rsplit('/').next().unwrap_or_default();
        let identity = Identity {
            uuid: disk.uuid(),
            ..Identity::from_name(path, &fitting_serial(name))
        };
        let unit = Unit::new(UnitOptions {
            store: disk.reservation_store(),
            ..unit_options(identity, &disk.handle().geometry(), Provisioning::ThinZeroes)
        });
        unit.restore_reservations(disk.reservations())
            .with_context(|| format!("cannot share {path}"))?;
        disks.push(Shown {
            name: path.clone(),
            unit: Arc::new(unit),
            disk: disk.handle().clone(),
            controls: Arc::new(arguments.serving.controls(path)),
        });
        guards.push(disk.into_guard());
    }
    let served = serve(arguments, &disks, &[pool.worker().clone()], signals);
    drop(guards);
    served
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

/// Serves the disks at all sockets until a signal comes.
fn serve<H: DiskHandle>(
    arguments: &VhostUserScsiArguments,
    disks: &[Shown<H>],
    workers: &[WorkerHandle],
    signals: &Signals,
) -> anyhow::Result<()> {
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
            (0_u16..).zip(disks).try_for_each(|(lun, shown)| {
                let (unit, controls) = (Arc::clone(&shown.unit), Arc::clone(&shown.controls));
                adapter.add((0, lun), unit, shown.disk.clone(), controls, None)
            })
        };
        let server = VhostUserScsiServer::start(socket, &options, workers.to_vec(), &group, prepare)?;
        servers.push(server);
    }
    for socket in &arguments.sockets {
        for (lun, disk) in disks.iter().enumerate() {
            logs::say(&format!(
                "smsvmm: LUN {lun}, {}, is served at {}",
                disk.name,
                socket.display()
            ));
        }
    }
    let signal = signals.next();
    logs::say(&format!("smsvmm: {signal}: the disks are closed"));
    servers.into_iter().for_each(VhostUserScsiServer::stop);
    Ok(())
}

/// The machine at a socket, as persistent reservations know it: the same as long as the socket has this path.
fn initiator(socket: &Path) -> TransportId {
    let path = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
    let name = format!("smsvmm adapter at {}", path.display());
    TransportId::sas(u64::from_be_bytes(Identity::from_name(&name, "").naa()))
}
