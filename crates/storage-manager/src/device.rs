//! Devices of the host by their paths: opened, locked, and asked what they carry.
//!
//! The only place that knows of what type devices are.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use api::storage::NewDevice;
use api::{Problem, ProblemKind};
use block_io::{HostDevice, OpenError, OpenOptions};
use volume_manager::store::{Content, inspect};

use crate::problem::{chain, of_io};

/// What pools lie on.
pub type Device = HostDevice;

/// Paths of a pool's devices, in any order.
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
    /// What is not: path, and why.
    pub(crate) absent: Vec<(String, Problem)>,
}

/// Opens and locks a device.
pub(crate) fn open(path: &str, access: Access) -> Result<Rc<Device>, Problem> {
    let options = OpenOptions {
        read_only: access == Access::Read,
        ..OpenOptions::default()
    };
    let mut tries = PATIENCE;
    loop {
        match Device::open(path, &options) {
            Ok(device) => return Ok(Rc::new(device)),
            Err(OpenError::InUse { .. }) if tries > 0 => tries -= 1,
            Err(error) => return Err(describe(path, &error)),
        }
        std::thread::sleep(PAUSE);
    }
}

/// So often, and so far apart, is tried to open a device that is in use: a command that only looks is done in a moment.
const PATIENCE: u32 = 20;
const PAUSE: Duration = Duration::from_millis(25);

/// Opens all devices that are there. One that exists and cannot be had is an error: with the pool open without it, it would miss
/// what is written, only because somebody else is using it, or because of a permission.
pub(crate) fn open_all(paths: &[String], access: Access) -> Result<Opened, Problem> {
    let mut opened = Opened {
        devices: Vec::new(),
        absent: Vec::new(),
    };
    for path in paths {
        match open(path, access) {
            Ok(device) => opened.devices.push((path.clone(), device)),
            Err(problem) if problem.kind == ProblemKind::NotFound => {
                opened.absent.push((path.clone(), problem));
            }
            Err(problem) => return Err(problem),
        }
    }
    if opened.devices.is_empty() {
        return Err(match opened.absent.into_iter().next() {
            Some((_, first)) if paths.len() == 1 => first,
            Some(_) => Problem::new(
                ProblemKind::NotFound,
                format!("none of the devices {} is there", paths.join(", ")),
            )
            .remedy("attach them, or correct their paths"),
            None => Problem::new(ProblemKind::Invalid, "no devices are given"),
        });
    }
    Ok(opened)
}

fn describe(path: &str, error: &OpenError) -> Problem {
    let make = format!("attach the device, or make the file, for example with `truncate -s 10G {path}`");
    let (kind, remedy) = match error {
        OpenError::InUse { .. } => (ProblemKind::Conflict, "stop that first: a pool is open only once"),
        OpenError::Open { source, .. } if is_absence(source) => (ProblemKind::NotFound, make.as_str()),
        OpenError::Open { .. } => (ProblemKind::Host, "see that this user may use it"),
        OpenError::NotWritable { .. } => (ProblemKind::Host, "let this user write to it"),
        OpenError::WrongKind { .. } => (ProblemKind::Invalid, "give a regular file or a block device"),
        OpenError::Examine { .. } => (
            ProblemKind::Host,
            "check the device; the kernel's log may say more",
        ),
    };
    let detail = match error {
        OpenError::InUse {
            holder: Some(holder), ..
        } => format!("{path} is in use by {holder}"),
        OpenError::InUse { holder: None, .. } => format!("{path} is in use"),
        OpenError::NotWritable { source, .. } => format!("cannot open {path} for writing: {source}"),
        other => chain(other),
    };
    Problem::new(kind, detail).about(path).remedy(remedy)
}

/// Whether there is no such device, or none behind its node.
fn is_absence(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let gone = [Errno::NOENT, Errno::NXIO, Errno::NODEV, Errno::NOTDIR];
    gone.iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Opens devices that are to be part of a pool, and sees that nothing known is destroyed unasked.
pub(crate) async fn open_new(new: &[NewDevice]) -> Result<Vec<Rc<Device>>, Problem> {
    let mut devices = Vec::new();
    let mut found = Vec::new();
    for (index, one) in new.iter().enumerate() {
        if new.iter().take(index).any(|other| other.path == one.path) {
            return Err(
                Problem::new(ProblemKind::Invalid, format!("{} is given twice", one.path)).about(&one.path),
            );
        }
        let device = open(&one.path, Access::Write)?;
        let content = inspect(&*device).await.map_err(|error| of_io(&error))?;
        if content != Content::Blank && !one.force {
            found.push(format!("{} carries {content}", one.path));
        }
        devices.push(device);
    }
    if found.is_empty() {
        return Ok(devices);
    }
    let paths: Vec<&str> = new.iter().map(|one| one.path.as_str()).collect();
    Err(Problem::new(ProblemKind::Conflict, found.join("; "))
        .about(paths.join(", "))
        .remedy("name other devices, or use --force, which destroys that"))
}
