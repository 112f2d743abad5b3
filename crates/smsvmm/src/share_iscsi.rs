//! `smsvmm share iscsi`: disks for initiators on a network.
//!
//! One worker has the disks, the sockets and the sessions; this thread waits for a signal, and then has the target finish what
//! initiators have asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Context;
use api::{ByteSize, Problem, ProblemKind, Share, ShareKind};
use block_io::{BlockDevice, Device, Geometry, ListenAddress, Worker, WorkerOptions};
use clap::Args;
use management::Server;
use serde_json::json;
use storage_manager::{HostedDisk, HostedPool, VirtualDisk};
use storage_virtualizer::DiskHandle;
use storage_virtualizer::iscsi::{
    Access, IscsiOptions, IscsiServer, IscsiServerError, IscsiTarget, IscsiUnit, MAX_TRANSFER, check_name,
};
use storage_virtualizer::scsi::{Identity, Provisioning, Unit, UnitOptions, VendorCommands};
use storage_virtualizer::virtio_blk::fitting_serial;
use vmm::sandbox::Opens;

use crate::exit::{Exit, UsageError};
use crate::logs;
use crate::output::{print, print_json};
use crate::pool::{PoolThreads, served, with_pool};
use crate::share_api::{Policies, Principals, Shelf, serial_of};
use crate::share_iscsi_access;
use crate::share_iscsi_manage::{Forget, IscsiShare, Open, PlaceOfLun, refused};
use crate::share_manage::{self, Base, Management, Opened, is_stopping, not_opened};
use crate::share_nbd::{device_options, named, reachable};
use crate::share_sandbox::Confined;
use crate::signals::Signals;
use crate::storage::Which;

/// iSCSI's port.
const PORT: u16 = 3260;

#[derive(Debug, Args)]
pub(crate) struct IscsiArguments {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    threads: PoolThreads,

    /// Disks of the pool that --config or --devices names, or snapshots: /vm/root.dsk, /vm/root.dsk@monday.
    #[arg(conflicts_with = "images", required_unless_present = "images")]
    paths: Vec<String>,

    /// A file or block device of this host, or nbd://..., under its file name or the one before `=`. May be given several times.
    #[arg(long = "image", value_name = "[NAME=]FILE")]
    images: Vec<String>,

    /// Listen on this address; the port is 3260 if none is written. May be given several times: all portals lead to all disks. Anyone who can
    /// connect can try to log in: take a loopback address or a network of its own, and CHAP.
    #[arg(long, value_name = "ADDRESS[:PORT]", required = true, value_parser = portal)]
    listen: Vec<SocketAddr>,

    /// The target's name; by default iqn.2026-11.local.smsvmm: and the host's name.
    #[arg(long, value_name = "IQN")]
    target: Option<String>,

    /// Only this initiator may log in. May be given several times.
    #[arg(long = "initiator", value_name = "IQN", conflicts_with = "access")]
    initiators: Vec<String>,

    /// Initiators must prove by CHAP that they are this user ...
    #[arg(
        long,
        value_name = "NAME",
        requires = "chap_secret",
        conflicts_with = "access"
    )]
    chap_user: Option<String>,

    /// ... and know the secret in this file: its first line, 12 to 256 bytes.
    #[arg(long, value_name = "FILE", requires = "chap_user")]
    chap_secret: Option<PathBuf>,

    /// For initiators that want the target to prove who it is: its CHAP name ...
    #[arg(
        long,
        value_name = "NAME",
        requires = "mutual_chap_secret",
        requires = "chap_user"
    )]
    mutual_chap_user: Option<String>,

    /// ... and the file with its secret, another one than that of --chap-secret.
    #[arg(long, value_name = "FILE", requires = "mutual_chap_user")]
    mutual_chap_secret: Option<PathBuf>,

    /// Who may log in, sees which disks and proves it how, as a TOML file: `[[initiator]]` with `name`, `disks`, `chap`, `mutual`. With
    /// `[[target]]` (`name`, `disks`) and `[[target.initiator]]` there are several targets.
    #[arg(long, value_name = "FILE")]
    access: Option<PathBuf>,

    /// Initiators cannot write.
    #[arg(long)]
    read_only: bool,

    /// Use the host's page cache.
    #[arg(long, conflicts_with = "paths")]
    buffered: bool,

    /// Connections at once.
    #[arg(long, value_name = "NUMBER", default_value_t = 64)]
    connections: usize,

    #[command(flatten)]
    management: Management,
}

/// An address, with or without a port.
fn portal(text: &str) -> Result<SocketAddr, String> {
    let address = || text.trim_matches(['[', ']']).parse::<IpAddr>();
    text.parse::<SocketAddr>()
        .or_else(|_| address().map(|ip| SocketAddr::new(ip, PORT)))
        .map_err(|_| {
            "write an IP address, perhaps with a port: 127.0.0.1 or 127.0.0.1:3260 or [::1]:3260".to_owned()
        })
}

/// A disk as it is told of.
struct Shown {
    /// Place of its target.
    target: usize,
    lun: u16,
    name: String,
    size: u64,
}

pub(crate) fn iscsi(arguments: &IscsiArguments) -> anyhow::Result<Exit> {
    arguments.threads.check(&arguments.paths)?;
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    let options = options(arguments)?;
    // Before anything is opened: a second process with this socket ends here.
    let management = arguments.management.bind()?;
    let confined = Confined::prepare(&[], &arguments.management, Opens::Devices)?;
    if !arguments.paths.is_empty() {
        let serve = |pool: &Arc<HostedPool>| {
            serve_pool_disks(arguments, options, management, pool, (&confined, &signals))
        };
        with_pool(&arguments.which, arguments.threads, "iscsi", serve)?;
        return Ok(Exit::Success);
    }
    let images = images(arguments)?;
    let names: Vec<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
    let (options, places, _) = with_targets(options, arguments, &names)?;
    let mut shown = Vec::new();
    let mut units = Vec::new();
    let mut opened = Vec::new();
    for (place, ((name, device), text)) in images.into_iter().zip(&arguments.images).enumerate() {
        let (target, lun) = places.of(place)?;
        let (_, image) = named(text)?;
        let source = image.to_owned();
        opened.push((name.clone(), Opened { source, guard: None }));
        let unit = image_unit(&name, image, &device, arguments.read_only);
        shown.push(Shown {
            target,
            lun,
            name,
            size: device.geometry().size,
        });
        units.push(((target, lun), unit, device));
    }
    let worker = Worker::start("iscsi", WorkerOptions::default())?;
    let (here, offered, confine) = (worker.handle().clone(), options.clone(), confined.serving());
    let (started, done) = worker.run(move || async move {
        let unit = |((target, lun), unit, device)| IscsiUnit {
            target,
            lun,
            unit,
            disk: Rc::new(device),
        };
        let started = IscsiServer::start_here(&here, &offered, units.into_iter().map(unit).collect());
        // Its tasks begin when this one has ended.
        (started, confine())
    });
    let (server, control) = started?;
    done?;
    let (read_only, buffered) = (arguments.read_only, arguments.buffered);
    let open: Open<Device> = Box::new(move |control, (target, lun), meant| {
        let read_only = read_only || meant.read_only;
        let device = Device::open(&meant.source, &device_options(read_only, buffered));
        let device = device.map_err(|error| not_opened(&meant.source, &error))?;
        let unit = image_unit(&meant.name, &meant.source, &device, read_only);
        let added = control.add(move || {
            let disk = Rc::new(device);
            Ok(IscsiUnit {
                target,
                lun,
                unit,
                disk,
            })
        });
        added.map_err(|error| refused(&meant.name, &error))?;
        Ok(None)
    });
    let base = Base::new(ShareKind::Iscsi, None, addresses(&server), opened);
    let disks = (options.targets.as_slice(), by_place(&shown));
    let share = Arc::new(IscsiShare::new(base, disks, control, open, Box::new(|_| {})));
    serve(
        &shown,
        (server, &options),
        (share, management),
        arguments,
        (&confined, &signals),
    )?;
    Ok(Exit::Success)
}

fn addresses(server: &IscsiServer) -> Vec<String> {
    let shown = |address: &ListenAddress| match address {
        ListenAddress::Tcp(address) => Some(address.to_string()),
        ListenAddress::Unix(_) => None,
    };
    server.addresses().iter().filter_map(shown).collect()
}

fn by_place(shown: &[Shown]) -> BTreeMap<PlaceOfLun, String> {
    let place = |disk: &Shown| ((disk.target, disk.lun), disk.name.clone());
    shown.iter().map(place).collect()
}

fn serve<D: BlockDevice + 'static>(
    shown: &[Shown],
    (server, options): (IscsiServer, &IscsiOptions),
    (share, management): (Arc<IscsiShare<D>>, Option<Server>),
    arguments: &IscsiArguments,
    (confined, signals): (&Confined, &Signals),
) -> anyhow::Result<()> {
    let managed = share_manage::answer(management, Arc::clone(&share) as Arc<dyn Share>, confined)?;
    announce(shown, server.addresses(), options, arguments)?;
    let signal = signals.next();
    logs::say(&format!(
        "smsvmm: {signal}: finishing what initiators have asked for; they have {} s to log out",
        options.patience.0.as_secs()
    ));
    drop(managed);
    server.stop();
    share.base.close_all();
    Ok(())
}

/// Serves disks of a pool.
fn serve_pool_disks(
    arguments: &IscsiArguments,
    options: IscsiOptions,
    management: Option<Server>,
    pool: &Arc<HostedPool>,
    (confined, signals): (&Confined, &Signals),
) -> anyhow::Result<()> {
    let names: Vec<&str> = arguments.paths.iter().map(String::as_str).collect();
    unique(&names)?;
    let (options, places, policies) = with_targets(options, arguments, &names)?;
    let mut targets = Vec::new();
    for (place, target) in options.targets.iter().enumerate() {
        let principals = Principals::of_initiators(place, &target.access, &policies)?;
        targets.push((principals, Arc::<Shelf>::default()));
    }
    let (mut disks, mut shown) = (Vec::new(), Vec::new());
    for (place, path) in arguments.paths.iter().enumerate() {
        let (target, lun) = places.of(place)?;
        let disk = pool.disk(path, served(path, arguments.read_only))?;
        let (principals, shelf) = targets.get(target).context("a disk without a target")?;
        let unit = pool_unit(path, &disk, principals)?;
        shelf.put(lun, path, &disk)?;
        shown.push(Shown {
            target,
            lun,
            name: path.clone(),
            size: disk.size(),
        });
        disks.push(((target, lun), unit, disk));
    }
    let mut running = Vec::new();
    for (target, (principals, shelf)) in options.targets.iter().zip(&targets) {
        running.extend(principals.start(&target.access, pool, shelf, confined)?);
    }
    let (server, control) = pool.serve_iscsi(&disks, options.clone(), confined.serving())?;
    let opened = disks
        .into_iter()
        .zip(&arguments.paths)
        .map(|((_, _, disk), path)| {
            let (source, guard) = (path.clone(), Some(disk.into_guard()));
            (path.clone(), Opened { source, guard })
        });
    let base = Base::new(
        ShareKind::Iscsi,
        Some(Arc::clone(pool)),
        addresses(&server),
        opened,
    );
    let shelves: Vec<_> = targets.iter().map(|(_, shelf)| Arc::clone(shelf)).collect();
    let own = shelves.clone();
    let forget: Forget = Box::new(move |(target, lun)| {
        if let Some(shelf) = own.get(target) {
            shelf.take(lun);
        }
    });
    let open = open_in(Arc::clone(pool), targets, arguments.read_only);
    let listed = (options.targets.as_slice(), by_place(&shown));
    let share = Arc::new(IscsiShare::new(base, listed, control, open, forget));
    let ended = serve(
        &shown,
        (server, &options),
        (share, management),
        arguments,
        (confined, signals),
    );
    drop(running);
    shelves.iter().for_each(|shelf| shelf.clear());
    ended
}

/// Opens further disks of a pool; each target has its principals, and the disks that these see.
fn open_in(
    pool: Arc<HostedPool>,
    targets: Vec<(Arc<Principals>, Arc<Shelf>)>,
    read_only: bool,
) -> Open<VirtualDisk> {
    Box::new(move |control, place, meant| {
        let (principals, shelf) = targets.get(place.0).ok_or_else(is_stopping)?;
        let path = meant.source.as_str();
        let disk = pool.disk(path, served(path, read_only || meant.read_only))?;
        let shown = pool_unit(path, &disk, principals).and_then(|unit| {
            shelf.put(place.1, path, &disk)?;
            Ok(pool.show(control, place, &unit, &disk)?)
        });
        let guard = disk.into_guard();
        match shown {
            Ok(()) => Ok(Some(guard)),
            Err(error) => {
                shelf.take(place.1);
                guard.close();
                Err(match error.downcast_ref::<IscsiServerError>() {
                    Some(error) => refused(path, error),
                    None => Problem::new(ProblemKind::Host, format!("{error:#}")).about(path),
                })
            }
        }
    })
}

/// The logical unit of an image.
fn image_unit(name: &str, image: &str, device: &Device, read_only: bool) -> Arc<Unit> {
    let place = std::path::absolute(image).unwrap_or_else(|_| image.into());
    let identity = Identity::from_name(&place.to_string_lossy(), &fitting_serial(name));
    let thin = Provisioning::Thin;
    Arc::new(Unit::new(unit_options(
        identity,
        &device.geometry(),
        read_only,
        thin,
    )))
}

/// The logical unit of a disk of a pool.
fn pool_unit(path: &str, disk: &HostedDisk, principals: &Arc<Principals>) -> anyhow::Result<Arc<Unit>> {
    let geometry = disk.handle().geometry();
    let identity = Identity {
        uuid: disk.uuid(),
        ..Identity::from_name(path, &serial_of(path))
    };
    let store = disk.reservation_store();
    // Those that are read-only have none.
    let read_only = store.is_none();
    let unit = Unit::new(UnitOptions {
        store,
        vendor: Some(Arc::clone(principals) as Arc<dyn VendorCommands>),
        ..unit_options(identity, &geometry, read_only, Provisioning::ThinZeroes)
    });
    unit.restore_reservations(disk.reservations())
        .with_context(|| format!("cannot share {path}"))?;
    Ok(Arc::new(unit))
}

/// A logical unit on a disk of this geometry; `identity` is no other disk's, anywhere.
fn unit_options(identity: Identity, geometry: &Geometry, read_only: bool, thin: Provisioning) -> UnitOptions {
    UnitOptions {
        read_only: read_only || geometry.read_only,
        provisioning: if geometry.discard_granularity == 0 {
            Provisioning::Full
        } else {
            thin
        },
        max_transfer: MAX_TRANSFER as u64,
        // All but ACA, and resets of the target: ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, TARGET RESET.
        task_management: [0xda, 0x00],
        ..UnitOptions::new(identity)
    }
}

/// Names and devices of the images.
fn images(arguments: &IscsiArguments) -> anyhow::Result<Vec<(String, Device)>> {
    let options = device_options(arguments.read_only, arguments.buffered);
    let mut images = Vec::new();
    for text in &arguments.images {
        let (name, image) = named(text)?;
        images.push((name, image));
    }
    let names: Vec<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
    unique(&names)?;
    let open = |(name, image): (String, &str)| Ok((name, Device::open(image, &options)?));
    images.into_iter().map(open).collect()
}

pub(crate) fn unique(names: &[&str]) -> Result<(), UsageError> {
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(**name)) {
        Some(twice) => Err(UsageError::new(format!(
            "{twice} is given twice; who uses them could not tell the two from each other (images may have a name of their own: NAME=FILE)"
        ))),
        None => Ok(()),
    }
}

/// The target's name where none is given: stays the same on a host.
fn default_target() -> String {
    let name = rustix::system::uname();
    let host = name.nodename().to_string_lossy().to_ascii_lowercase();
    let fitting = |letter: char| letter.is_ascii_alphanumeric() || letter == '-' || letter == '.';
    let host: String = host.chars().filter(|letter| fitting(*letter)).take(64).collect();
    let host = if host.is_empty() { "host" } else { &host };
    format!("iqn.2026-11.local.smsvmm:{host}")
}

fn options(arguments: &IscsiArguments) -> anyhow::Result<IscsiOptions> {
    for initiator in &arguments.initiators {
        check_name(initiator).map_err(|error| UsageError::new(format!("--initiator: {error}")))?;
    }
    Ok(IscsiOptions {
        listen: arguments.listen.iter().copied().map(ListenAddress::Tcp).collect(),
        connections: arguments.connections.max(1),
        ..IscsiOptions::default()
    })
}

/// Which target, and which LUN of it, each disk is.
struct Places(Vec<(usize, u16)>);

impl Places {
    fn of(&self, disk: usize) -> anyhow::Result<(usize, u16)> {
        self.0.get(disk).copied().context("a disk without a target")
    }
}

/// Completes the options by targets and who may log in; `names` are those of the disks.
fn with_targets(
    mut options: IscsiOptions,
    arguments: &IscsiArguments,
    names: &[&str],
) -> anyhow::Result<(IscsiOptions, Places, Policies)> {
    let name = arguments.target.clone().unwrap_or_else(default_target);
    check_name(&name).map_err(|error| UsageError::new(format!("--target: {error}")))?;
    let (targets, policies) = match &arguments.access {
        Some(file) => share_iscsi_access::read(file, names, &name)?,
        None => {
            let target = IscsiTarget {
                access: access(arguments)?,
                ..IscsiTarget::open(&name)
            };
            (vec![(target, (0..names.len()).collect())], Policies::new())
        }
    };
    if arguments.target.is_some() && targets.iter().all(|(target, _)| target.name != name) {
        let text = "--target and the targets of --access: leave one of them out";
        return Err(UsageError::new(text.to_owned()).into());
    }
    let mut places = vec![(0, 0); names.len()];
    for (number, (target, disks)) in targets.into_iter().enumerate() {
        options.targets.push(IscsiTarget {
            alias: match target.alias {
                alias if alias.is_empty() => "smsvmm".to_owned(),
                alias => alias,
            },
            ..target
        });
        for (lun, disk) in (0_u16..).zip(disks) {
            places[disk] = (number, lun);
        }
    }
    warn_of_open_portals(&options, arguments);
    Ok((options, Places(places), policies))
}

/// Who may log in, as the command line says.
fn access(arguments: &IscsiArguments) -> anyhow::Result<Vec<Access>> {
    let chap = share_iscsi_access::chap(
        arguments.chap_user.as_ref().zip(arguments.chap_secret.as_deref()),
        arguments
            .mutual_chap_user
            .as_ref()
            .zip(arguments.mutual_chap_secret.as_deref()),
    )?;
    let access = |initiator: Option<&String>| Access {
        initiator: initiator.cloned(),
        luns: None,
        chap: chap.clone(),
    };
    if arguments.initiators.is_empty() {
        return Ok(vec![access(None)]);
    }
    Ok(arguments
        .initiators
        .iter()
        .map(|name| access(Some(name)))
        .collect())
}

fn warn_of_open_portals(options: &IscsiOptions, arguments: &IscsiArguments) {
    let mut open = options
        .targets
        .iter()
        .flat_map(|target| &target.access)
        .filter(|access| access.chap.is_none())
        .peekable();
    if let Some(address) = arguments
        .listen
        .iter()
        .find(|address| !address.ip().is_loopback())
        && open.peek().is_some()
    {
        let who = if open.any(|access| access.initiator.is_none()) {
            "everybody who reaches this address can use the disks"
        } else {
            "everybody who reaches this address and knows the name of an initiator can use its disks"
        };
        tracing::warn!(%address, "{who}: see --chap-user");
    }
}

/// Says where the disks are, and how to get at them.
fn announce(
    shown: &[Shown],
    addresses: &[ListenAddress],
    options: &IscsiOptions,
    arguments: &IscsiArguments,
) -> anyhow::Result<()> {
    let portals: Vec<SocketAddr> = addresses
        .iter()
        .filter_map(|address| match address {
            ListenAddress::Tcp(address) => Some(SocketAddr::new(reachable(address.ip()), address.port())),
            ListenAddress::Unix(_) => None,
        })
        .collect();
    let Some(first) = portals.first() else {
        return Ok(());
    };
    let name = |disk: &Shown| options.targets.get(disk.target).map_or("", |target| &target.name);
    let uri = |disk: &Shown| format!("iscsi://{first}/{}/{}", name(disk), disk.lun);
    if arguments.which.json {
        let of = |target: usize| -> Vec<_> {
            let own = shown.iter().filter(|disk| disk.target == target);
            own.map(|disk| json!({ "lun": disk.lun, "name": disk.name, "size": disk.size, "uri": uri(disk) }))
                .collect()
        };
        let targets: Vec<_> = options
            .targets
            .iter()
            .enumerate()
            .map(|(place, target)| json!({ "target": target.name, "units": of(place) }))
            .collect();
        return match targets.as_slice() {
            [only] => {
                print_json(&json!({ "target": only["target"], "portals": portals, "units": only["units"] }))
            }
            _ => print_json(&json!({ "portals": portals, "targets": targets })),
        };
    }
    let mut text = String::new();
    for (place, target) in options.targets.iter().enumerate() {
        writeln!(text, "target {}", target.name)?;
        let mut own: Vec<_> = shown.iter().filter(|disk| disk.target == place).collect();
        own.sort_by_key(|disk| disk.lun);
        for disk in own {
            let size = ByteSize::from_bytes(disk.size);
            writeln!(text, "LUN {}: {}, {size}: {}", disk.lun, disk.name, uri(disk))?;
        }
    }
    for portal in &portals {
        writeln!(text, "portal {portal}")?;
    }
    writeln!(text, "libiscsi: iscsi-ls --show-luns iscsi://{first}")?;
    if let Some(disk) = shown.first() {
        writeln!(text, "QEMU:     qemu-img info {}", uri(disk))?;
    }
    writeln!(text, "Linux:    iscsiadm -m discovery -t sendtargets -p {first}")?;
    for target in &options.targets {
        writeln!(
            text,
            "          iscsiadm -m node -T {} -p {first} --login",
            target.name
        )?;
    }
    Ok(print(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_has_the_usual_port_if_none_is_written() {
        for (text, expected) in [
            ("127.0.0.1", "127.0.0.1:3260"),
            ("127.0.0.1:3261", "127.0.0.1:3261"),
            ("::1", "[::1]:3260"),
            ("[::1]", "[::1]:3260"),
            ("[::1]:7", "[::1]:7"),
        ] {
            assert_eq!(portal(text).unwrap().to_string(), expected);
        }
        assert!(portal("localhost").is_err());
    }

    #[test]
    fn the_default_name_is_one() {
        check_name(&default_target()).unwrap();
    }
}
