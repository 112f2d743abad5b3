//! A frozen image is here for a while: its disks are attached, and a file system in one of them can be read.
//!
//! What was taken is given back in any case, the last first: the file system is mounted nowhere but behind a file descriptor, so that
//! it goes with this program whatever ends it; the disks are detached and the image is released by [`Taken`], also when it is dropped.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::ProblemKind;
use expanded_api::{Answer, GuestDisk, Request};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use super::locate::{System, options};
use super::signals;
use crate::host::{AgentError, Host, sms_disks};

/// A disk that was attached should be here after this time.
const HOT_PLUG: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(50);

/// What was taken of the host, to be given back.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    host: &'a Host,
    /// Snapshots that are attached.
    attached: Vec<String>,
    /// The image: its name and its disks.
    image: Option<(String, Vec<String>)>,
    /// What is attached already was left by a run of this program that was killed.
    takes_over: bool,
}

impl<'a> Taken<'a> {
    pub(crate) fn new(host: &'a Host) -> Self {
        Self {
            host,
            attached: Vec::new(),
            image: None,
            takes_over: false,
        }
    }

    /// Snapshots that are attached already are taken, instead of being refused: a run that was killed has left them. To be called only when
    /// nobody else can be at work with them.
    pub(crate) fn take_over(&mut self) {
        self.takes_over = true;
    }

    /// There is an image, or may be one.
    pub(crate) fn image(&mut self, name: &str, disks: &[String]) {
        self.image = Some((name.to_owned(), disks.to_vec()));
    }

    /// The image stays.
    pub(crate) fn keep_image(&mut self) {
        self.image = None;
    }

    /// Attaches a snapshot, and waits until its device is here.
    ///
    /// # Errors
    /// The host refuses, or the disk does not come.
    pub(crate) fn attach(&mut self, snapshot: &str) -> Result<PathBuf, AgentError> {
        let request = Request::AttachDisk {
            disk: snapshot.to_owned(),
            read_only: true,
        };
        // Whatever comes of it: it may be attached.
        self.attached.push(snapshot.to_owned());
        let (serial, size) = match self.host.ask(&request) {
            Ok(Answer::Attached(attached)) => (attached.serial, attached.size),
            Ok(other) => return Err(AgentError::Answer(format!("{other:?}"))),
            Err(error) => {
                let refused = matches!(&error, AgentError::Problem(_));
                let taken_over = match refused && self.takes_over {
                    true => left_over(&self.host.disks()?, snapshot),
                    false => None,
                };
                match taken_over {
                    Some(left) => left,
                    None => {
                        if refused {
                            self.attached.pop();
                        }
                        return Err(error);
                    }
                }
            }
        };
        let begin = Instant::now();
        loop {
            let here = sms_disks().into_iter().find(|found| found.serial == serial);
            if let Some(found) = here.filter(|found| has_size(&found.path, size)) {
                return Ok(found.path);
            }
            signals::check()?;
            if begin.elapsed() > HOT_PLUG {
                return Err(AgentError::Text(format!(
                    "{snapshot} was attached, and does not come as a disk (serial number {serial})"
                )));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Gives everything back; what could not be, with the command to do it by hand.
    pub(crate) fn give_back(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        while let Some(snapshot) = self.attached.pop() {
            if let Err(error) = given(self.host.detach(&snapshot)) {
                left.push(format!(
                    "{snapshot} is still attached ({error}): sms-agent disk detach {snapshot}"
                ));
            }
        }
        if let Some((name, disks)) = self.image.take() {
            let request = Request::ReleaseImage {
                disks: disks.clone(),
                name: name.clone(),
            };
            if let Err(error) = given(self.host.ask_until_free(&request)) {
                let disks = disks.join(" ");
                left.push(format!(
                    "the image {name} is still there ({error}): sms-agent release-image --name {name} {disks}"
                ));
            }
        }
        left
    }
}

/// Serial number and bytes of a snapshot that is attached.
fn left_over(disks: &[GuestDisk], snapshot: &str) -> Option<(String, u64)> {
    let mut attached = disks.iter().filter(|disk| disk.id.is_some() && disk.read_only);
    let found = attached.find(|disk| disk.path.as_deref() == Some(snapshot))?;
    Some((found.serial.clone()?, found.size))
}

/// What is gone already is given back.
fn given(result: Result<(), AgentError>) -> Result<(), AgentError> {
    match result {
        Err(AgentError::Problem(problem)) if problem.kind == ProblemKind::NotFound => Ok(()),
        result => result,
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for left in self.give_back() {
            eprintln!("sms-agent: {left}");
        }
    }
}

fn sysfs(device: &Path) -> PathBuf {
    Path::new("/sys/class/block").join(device.file_name().unwrap_or_default())
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn has_size(device: &Path, bytes: u64) -> bool {
    number(&sysfs(device).join("size")) == Some(bytes / 512)
}

/// The device of a file system in the image, when the kernel has found the partition.
///
/// # Errors
/// It does not come, or is another one.
pub(crate) fn device_of(system: &System, disk: &Path) -> Result<PathBuf, AgentError> {
    let Some(wanted) = system.partition else {
        return Ok(disk.to_owned());
    };
    let folder = sysfs(disk);
    let begin = Instant::now();
    loop {
        let parts = fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut parts =
            parts.filter(|part| number(&part.path().join("partition")) == Some(u64::from(wanted)));
        if let Some(part) = parts.next() {
            let is_it = number(&part.path().join("start")) == Some(system.span.start / 512)
                && number(&part.path().join("size")) == Some(system.span.length / 512);
            let device = Path::new("/dev").join(part.file_name());
            if !is_it {
                return Err(AgentError::Text(format!(
                    "partition {wanted} of the image is not where that of {} is: the partition table was changed since the machine \
                     started; start it again",
                    system.disks.join(", ")
                )));
            }
            if device.exists() {
                return Ok(device);
            }
        }
        signals::check()?;
        if begin.elapsed() > HOT_PLUG {
            let disk = disk.display();
            return Err(AgentError::Text(format!(
                "{disk} does not get its partition {wanted}"
            )));
        }
        std::thread::sleep(LOOK);
    }
}

/// Mounts the file system of a device to be read, nowhere: what is returned is its root, and it goes with that.
///
/// # Errors
/// The kernel's, in its words.
pub(crate) fn mount(kind: &str, device: &Path) -> Result<OwnedFd, AgentError> {
    let failed = |text: String| {
        AgentError::Text(format!(
            "the frozen image cannot be mounted ({kind} on {}): {text}",
            device.display()
        ))
    };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
        rustix::io::Errno::NOSYS => failed("that needs Linux 5.2 or newer".to_owned()),
        error => failed(error.to_string()),
    })?;
    let make = || -> rustix::io::Result<OwnedFd> {
        fsconfig_set_string(context.as_fd(), "source", device)?;
        fsconfig_set_flag(context.as_fd(), "ro")?;
        for option in options(kind).unwrap_or_default() {
            fsconfig_set_flag(context.as_fd(), *option)?;
        }
        fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().map_err(|error| {
        let said = words(&context);
        failed(if said.is_empty() {
            error.to_string()
        } else {
            format!("{error}; {said}")
        })
    })
}

/// What the kernel has to say about a mount that failed.
fn words(context: &OwnedFd) -> String {
    let mut lines = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(count) = rustix::io::read(context, &mut buffer[..]) {
        if count == 0 || lines.len() > 8 {
            break;
        }
        lines.push(String::from_utf8_lossy(&buffer[..count]).trim().to_owned());
    }
    lines.join("; ")
}

/// A file that can be read of it.
pub(crate) fn open(folder: impl AsFd, name: &[u8]) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, openat};
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOATIME;
    Ok(File::from(openat(folder, name, flags, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str, serial: Option<&str>, read_only: bool) -> GuestDisk {
        GuestDisk {
            path: Some(path.to_owned()),
            id: serial.map(|_| "disk7".parse().unwrap()),
            serial: serial.map(str::to_owned),
            size: 4096,
            allocated: 0,
            read_only,
            volumes: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    #[test]
    fn what_a_killed_run_has_left_attached_is_found_and_nothing_else_is_taken_for_it() {
        let image = "/vm/a.dsk@backup-x";
        let all = [
            disk("/vm/a.dsk", Some("one"), false),
            disk("/vm/a.dsk@backup-y", Some("two"), true),
            disk(image, None, true),
            disk(image, Some("three"), true),
        ];
        assert_eq!(left_over(&all, image), Some(("three".to_owned(), 4096)));
        assert_eq!(left_over(&all[..3], image), None);
        assert_eq!(left_over(&all, "/vm/a.dsk"), None);
    }
}
