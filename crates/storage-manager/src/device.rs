//! Devices by the texts that name them, paths of this host and addresses of others: opened, locked, and asked what they carry.
//!
//! The only place that knows of what kinds devices are.

use std::rc::Rc;
use std::time::{Duration, Instant};

use api::storage::NewDevice;
use api::{Problem, ProblemKind};
use block_io::{AlignedBuffer, BlockDevice, DeviceError, DeviceOptions, NbdError, OpenError, OpenOptions};
use volume_manager::model::Uuid;
use volume_manager::store::{Content, identity, inspect};

use crate::opening::{Blocking, blocking};
use crate::operation::Pool;
use crate::problem::{chain, of_io};

/// What pools lie on.
pub type Device = block_io::Device;

/// What names a pool's devices, in any order: paths, and whatever else [`block_io::Device::open`] takes.
pub type DevicePaths = Vec<String>;

/// How devices are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Only read, together with others who only read.
    Read,
    /// Read and written, by nobody else.
    Write,
}

/// What of a pool is there.
pub(crate) struct Opened {
    pub(crate) devices: Vec<(String, Rc<Device>)>,
    /// What is not: its name, and why.
    pub(crate) absent: Vec<(String, Problem)>,
}

/// A server that is gone, or silent, for so long has failed: together less than the half minute after which guests lose
/// patience with their disks.
const SERVER_PATIENCE: Duration = Duration::from_secs(10);
/// For so long, with pauses, is tried to open a device that is in use: a command that only looks is done in a moment.
const USE_PATIENCE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(25);

/// What the host's file system is to give at once to a sparse file that becomes a part of a pool: with four clusters, most first writes need not wait for
/// it, and it takes four times what was written at most.
const EXTENT: u32 = 256 << 10;

type Opening = std::io::Result<Blocking<Result<Device, Problem>>>;

/// Begins to open and lock a device.
fn begin(name: &str, access: Access) -> Opening {
    let name = name.to_owned();
    blocking(move || open_now(&name, access))
}

async fn end(name: &str, opening: Opening) -> Result<Rc<Device>, Problem> {
    let no_thread =
        |reason: String| Problem::new(ProblemKind::Host, format!("cannot open {name}: {reason}")).about(name);
    let opened = opening.map_err(|error| no_thread(error.to_string()))?.await;
    let device = opened.ok_or_else(|| no_thread("its thread ended".into()))??;
    Ok(Rc::new(device))
}

/// Opens and locks a device.
pub(crate) async fn open(name: &str, access: Access) -> Result<Rc<Device>, Problem> {
    end(name, begin(name, access)).await
}

fn open_now(name: &str, access: Access) -> Result<Device, Problem> {
    let options = DeviceOptions {
        host: OpenOptions {
            read_only: access == Access::Read,
            ..OpenOptions::default()
        },
        patience: SERVER_PATIENCE,
        silence: SERVER_PATIENCE,
    };
    let begun = Instant::now();
    let device = loop {
        match Device::open(name, &options) {
            Ok(device) => break device,
            Err(error) if begun.elapsed() < USE_PATIENCE && use_of(&error).is_some() => {}
            Err(error) => return Err(describe(name, &error)),
        }
        std::thread::sleep(PAUSE);
    };
    if access == Access::Write && device.geometry().read_only {
        let detail = format!("cannot open {name} for writing: its server lets nobody write");
        return Err(Problem::new(ProblemKind::Host, detail)
            .about(name)
            .remedy("have the server export it for writing"));
    }
    Ok(device)
}

/// Opens all devices that are there. One that exists and cannot be had is an error: with the pool open without it, it would miss
/// what is written, only because somebody else is using it, or because of a permission.
pub(crate) async fn open_all(names: &[String], access: Access) -> Result<Opened, Problem> {
    see_that_none_is_given_twice(names.iter())?;
    let openings: Vec<_> = names.iter().map(|name| (name, begin(name, access))).collect();
    let mut opened = Opened {
        devices: Vec::new(),
        absent: Vec::new(),
    };
    for (name, opening) in openings {
        match end(name, opening).await {
            Ok(device) => opened.devices.push((name.clone(), device)),
            Err(problem) if problem.kind == ProblemKind::NotFound => {
                opened.absent.push((name.clone(), problem));
            }
            Err(problem) => return Err(problem),
        }
    }
    if opened.devices.is_empty() {
        return Err(match opened.absent.into_iter().next() {
            Some((_, first)) if names.len() == 1 => first,
            Some(_) => Problem::new(
                ProblemKind::NotFound,
                format!("none of the devices {} is there", names.join(", ")),
            )
            .remedy("attach them, start their servers, or correct their names"),
            None => Problem::new(ProblemKind::Invalid, "no devices are given"),
        });
    }
    Ok(opened)
}

fn see_that_none_is_given_twice<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), Problem> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(Problem::new(ProblemKind::Invalid, format!("{name} is given twice")).about(name));
        }
    }
    Ok(())
}

/// Who uses the device, if that is why it was not opened.
fn use_of(error: &DeviceError) -> Option<&Option<String>> {
    match error {
        DeviceError::Host(OpenError::InUse { holder, .. })
        | DeviceError::Nbd {
            source: NbdError::InUse { holder },
            ..
        } => Some(holder),
        _ => None,
    }
}

fn describe(name: &str, error: &DeviceError) -> Problem {
    let make = format!("attach the device, or make the file, for example with `truncate -s 10G {name}`");
    let is_host = matches!(error, DeviceError::Host(_));
    let (kind, remedy) = match error {
        error if use_of(error).is_some() => {
            (ProblemKind::Conflict, "stop that first: a pool is open only once")
        }
        error if error.is_absence() && is_host => (ProblemKind::NotFound, make.as_str()),
        error if error.is_absence() => (ProblemKind::NotFound, "start the server, or correct the address"),
        DeviceError::Host(OpenError::Open { .. }) => (ProblemKind::Host, "see that this user may use it"),
        DeviceError::Host(OpenError::NotWritable { .. }) => (ProblemKind::Host, "let this user write to it"),
        DeviceError::Host(OpenError::WrongKind { .. }) => {
            (ProblemKind::Invalid, "give a regular file or a block device")
        }
        DeviceError::Host(_) => (
            ProblemKind::Host,
            "check the device; the kernel's log may say more",
        ),
        DeviceError::Address(_) => (
            ProblemKind::Invalid,
            "a path that begins like this is written with ./",
        ),
        DeviceError::Paths(_) => (ProblemKind::Invalid, "give paths to one device"),
        _ => (ProblemKind::Host, "check the server"),
    };
    let detail = match error {
        error if let Some(holder) = use_of(error) => in_use(name, holder.as_deref()),
        DeviceError::Host(OpenError::NotWritable { path, source }) => {
            format!("cannot open {} for writing: {source}", path.display())
        }
        other => chain(other),
    };
    Problem::new(kind, detail).about(name).remedy(remedy)
}

fn in_use(name: &str, holder: Option<&str>) -> String {
    let ourselves = format!("(pid {})", std::process::id());
    match holder {
        Some(holder) if holder.ends_with(&ourselves) => {
            format!(
                "{name} is in use by this very process: it was given twice, under two names, or is one of its pool's devices"
            )
        }
        Some(holder) => format!("{name} is in use by {holder}"),
        None => format!("{name} is in use"),
    }
}

/// Opens and locks a device that is to be part of a pool.
fn open_as_new(name: &str) -> Result<Device, Problem> {
    let device = open_now(name, Access::Write)?;
    device.prefer_extents(EXTENT);
    Ok(device)
}

/// Opens devices that are to be part of a pool, and sees that nothing known is destroyed unasked.
pub(crate) async fn open_new(new: &[NewDevice]) -> Result<Vec<Rc<Device>>, Problem> {
    see_that_none_is_given_twice(new.iter().map(|one| &one.path))?;
    let openings: Vec<_> = new
        .iter()
        .map(|one| {
            let name = one.path.clone();
            (one, blocking(move || open_as_new(&name)))
        })
        .collect();
    let mut devices = Vec::new();
    for (one, opening) in openings {
        devices.push(end(&one.path, opening).await?);
    }
    see_that_they_may_be_used(new, &devices).await?;
    Ok(devices)
}

/// As [`open_new`], by the thread that asks, which may be the only one that is allowed to. What they carry is not looked at yet.
pub(crate) fn open_new_here(new: &[NewDevice]) -> Result<Vec<Device>, Problem> {
    see_that_none_is_given_twice(new.iter().map(|one| &one.path))?;
    new.iter().map(|one| open_as_new(&one.path)).collect()
}

/// Sees that nothing known is destroyed unasked.
pub(crate) async fn see_that_they_may_be_used(
    new: &[NewDevice],
    devices: &[Rc<Device>],
) -> Result<(), Problem> {
    let mut found = Vec::new();
    for (one, device) in new.iter().zip(devices) {
        let content = inspect(&**device).await.map_err(|error| of_io(&error))?;
        if content != Content::Blank && !one.force {
            found.push(format!("{} carries {content}", one.path));
        }
        see_that_it_has_its_size(&one.path, device).await?;
    }
    if found.is_empty() {
        return Ok(());
    }
    let paths: Vec<&str> = new.iter().map(|one| one.path.as_str()).collect();
    Err(Problem::new(ProblemKind::Conflict, found.join("; "))
        .about(paths.join(", "))
        .remedy("name other devices, or use --force, which destroys that"))
}

/// Reads the last block: a server, or a stick, may claim to be larger than it is.
async fn see_that_it_has_its_size(name: &str, device: &Device) -> Result<(), Problem> {
    let (size, block) = (device.size(), device.geometry().logical_block);
    let Some(last) = size.checked_sub(u64::from(block)) else {
        // Far too small, which its owner-to-be says.
        return Ok(());
    };
    let buffer = AlignedBuffer::new(usize::try_from(block).unwrap_or(4096));
    // SAFETY: nobody else uses the buffer, and it outlives the read that is awaited here.
    let piece = [unsafe { buffer.io(0, usize::try_from(block).unwrap_or(4096)) }];
    device.read(last, &piece).await.map_err(|error| {
        let detail = format!(
            "{name} claims to have {size} bytes, and its last block cannot be read: {}",
            chain(&error)
        );
        Problem::new(ProblemKind::Host, detail)
            .about(name)
            .remedy("give it its true size, or use another device")
    })
}

/// Sees that devices with these identities, just labelled, are different ones: two addresses may lead to one export.
pub(crate) async fn see_that_they_differ(labelled: &[(String, Uuid, Rc<Device>)]) -> Result<(), Problem> {
    for (name, uuid, device) in labelled {
        let found = identity(&**device).await.map_err(|error| of_io(&error))?;
        let found = found.map(|(_, device)| device);
        if found == Some(*uuid) {
            continue;
        }
        let other = labelled.iter().find(|(_, other, _)| found == Some(*other));
        let detail = match other {
            Some((other, ..)) => format!("{name} and {other} are the same device"),
            None => format!("{name} does not keep what is written to it"),
        };
        return Err(Problem::new(ProblemKind::Invalid, detail)
            .about(name)
            .remedy("give each device once; --force overwrites the label that was just made"));
    }
    Ok(())
}

/// Sees that `device` is none that `pool` uses already, under another name: no force overwrites that.
pub(crate) async fn see_that_it_is_none_of(pool: &Pool, name: &str, device: &Device) -> Result<(), Problem> {
    let config = pool.configuration();
    let Some((of, uuid)) = identity(device).await.map_err(|error| of_io(&error))? else {
        return Ok(());
    };
    let same = config
        .devices
        .iter()
        .find(|known| of == config.pool && known.uuid == uuid && pool.is_in_service(known.id));
    match same {
        Some(known) => Err(Problem::new(
            ProblemKind::Invalid,
            format!("{name} is {} of this pool, under another name", known.name),
        )
        .about(name)
        .remedy("give another device")),
        None => Ok(()),
    }
}
