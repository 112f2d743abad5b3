//! What a backup is of: folders and files on file systems, whose disks are those of smsvmm; or whole disks.
//!
//! ```text
//!   /srv/data ──► the mount at /srv: ext4 on 8:17 ──► sdb1: from byte 1048576 of sdb ──► the host's disk of that serial number
//! ```

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::dm::{self, Table};
use super::fiemap::Span;
use crate::freeze::disks_of;
use crate::host::AgentError;
use crate::mounts::{self, Mount};

/// A file system with something to be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct System {
    /// Where it is mounted.
    pub(crate) mount: Mount,
    /// The disks below it: `sdb`. More than one only below a logical volume.
    pub(crate) disks: Vec<String>,
    /// The partition of that disk; none if it has all of the disk.
    pub(crate) partition: Option<u32>,
    /// Where on the disk; of a logical volume all of that.
    pub(crate) span: Span,
    /// Where a logical volume is on the disks.
    pub(crate) table: Option<Table>,
}

/// A file or folder, with all that is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    /// Which of the file systems.
    pub(crate) system: usize,
    /// Its path from the root of that.
    pub(crate) inner: PathBuf,
    /// What it is called in the backup: its path here without `/` at the beginning; empty for `/`.
    pub(crate) name: PathBuf,
}

/// What a backup is of.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    pub(crate) systems: Vec<System>,
    pub(crate) trees: Vec<Tree>,
    /// Whole disks: `sdb`.
    pub(crate) disks: Vec<String>,
    /// Folders of mounted file systems that shall stand still.
    pub(crate) frozen: Vec<PathBuf>,
    /// What people should know.
    pub(crate) notes: Vec<String>,
}

fn here(path: &Path) -> impl FnOnce(std::io::Error) -> AgentError {
    let what = path.display().to_string();
    move |source| AgentError::Here { what, source }
}

fn no(text: String) -> AgentError {
    AgentError::Text(text)
}

/// Options with which a file system is mounted to be looked at, without changing it and beside itself.
pub(crate) fn options(kind: &str) -> Result<&'static [&'static str], String> {
    match kind {
        "ext4" | "ext3" => Ok(&["noload"]),
        "ext2" => Ok(&[]),
        "xfs" => Ok(&["norecovery", "nouuid"]),
        "btrfs" => Err(
            "a frozen image of btrfs cannot be mounted beside the file system that it was made of; back up its whole disk instead \
             (--source /dev/sdX)"
                .to_owned(),
        ),
        other => Err(format!(
            "{other} is no file system whose frozen image can be read (those are ext4, ext3, ext2 and XFS)"
        )),
    }
}

/// Finds out what `paths` are. Symbolic links stand for what they lead to.
///
/// # Errors
/// One of them is nothing that can be backed up; the reason says what is.
pub(crate) fn sources(paths: &[PathBuf]) -> Result<Sources, AgentError> {
    let mounts = mounts::all().map_err(here(Path::new("/proc/self/mountinfo")))?;
    let mut found = Sources::default();
    for path in paths {
        let real = fs::canonicalize(path).map_err(here(path))?;
        let metadata = fs::metadata(&real).map_err(here(path))?;
        if metadata.file_type().is_block_device() {
            whole_disk(&real, &mounts, &mut found)?;
        } else {
            tree(&real, metadata.dev(), &mounts, &mut found)?;
        }
    }
    forget_doubles(&mut found.trees);
    for tree in &found.trees {
        let point = Path::new("/").join(&tree.name);
        let below = mounts
            .iter()
            .filter(|mount| mount.point != point && mount.point.starts_with(&point));
        let below = below
            .filter(|mount| has_device(mount.device))
            .map(|mount| mount.point.display().to_string());
        found.notes.extend(below.map(|mount| {
            format!("what is mounted at {mount} is not part of it: name it as a source as well")
        }));
    }
    Ok(found)
}

/// Not one of the kernel's own (proc, tmpfs ...).
fn has_device(device: (u32, u32)) -> bool {
    device.0 != 0
}

/// What lies in another tree is there anyway.
fn forget_doubles(trees: &mut Vec<Tree>) {
    let all = trees.clone();
    let mut at = 0;
    trees.retain(|tree| {
        let mine = at;
        at += 1;
        !all.iter().enumerate().any(|(other, above)| {
            above.system == tree.system
                && tree.name.starts_with(&above.name)
                && tree.inner.starts_with(&above.inner)
                && (above.name != tree.name || other < mine)
        })
    });
}

fn whole_disk(device: &Path, mounts: &[Mount], found: &mut Sources) -> Result<(), AgentError> {
    let name = device
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let folder = Path::new("/sys/class/block").join(&name);
    if folder.join("partition").exists() || !folder.exists() {
        return Err(no(format!("{} is no whole disk", device.display())));
    }
    if !found.disks.contains(&name) {
        found.disks.push(name.clone());
    }
    for mount in mounts.iter().filter(|mount| has_device(mount.device)) {
        let mut below = std::collections::BTreeSet::new();
        disks_of(&folder_of(mount.device), &mut below, 0);
        if below.contains(&name) {
            found.frozen.push(mount.point.clone());
        }
    }
    Ok(())
}

fn folder_of(device: (u32, u32)) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", device.0, device.1))
}

fn tree(real: &Path, device: u64, mounts: &[Mount], found: &mut Sources) -> Result<(), AgentError> {
    let device = (libc::major(device), libc::minor(device));
    let mount = mounts::of_path(mounts, real);
    let not_on_disk = || no(format!("{} is not on a file system of a disk", real.display()));
    let mount = mount.ok_or_else(not_on_disk)?;
    options(&mount.kind).map_err(|reason| no(format!("{}: {reason}", real.display())))?;
    if mount.device != device {
        return Err(not_on_disk());
    }
    let below = real.strip_prefix(&mount.point).unwrap_or(Path::new(""));
    let root = mount.root.strip_prefix("/").unwrap_or(Path::new(""));
    let known = found
        .systems
        .iter()
        .position(|system| system.mount.device == device);
    let system = match known {
        Some(known) => known,
        None => {
            found.systems.push(system(mount)?);
            found.frozen.push(mount.point.clone());
            found.systems.len() - 1
        }
    };
    let joined = |above: &Path| match below.as_os_str().as_bytes() {
        [] => above.to_owned(),
        _ => above.join(below),
    };
    found.trees.push(Tree {
        system,
        inner: joined(root),
        name: real.strip_prefix("/").unwrap_or(real).to_owned(),
    });
    Ok(())
}

fn system(mount: &Mount) -> Result<System, AgentError> {
    let folder = folder_of(mount.device);
    let real = fs::canonicalize(&folder).map_err(here(&folder))?;
    match real.join("dm").exists() {
        true => volume(mount, &real),
        false => place(mount, &real),
    }
}

/// What to say instead, where files cannot be taken: the disks below a device, by its folder in sysfs.
fn instead(folder: &Path) -> String {
    let mut disks = std::collections::BTreeSet::new();
    disks_of(folder, &mut disks, 0);
    let disks: Vec<String> = disks.into_iter().map(|disk| format!("/dev/{disk}")).collect();
    format!("--source {}", disks.join(" "))
}

/// Where a file system on a logical volume is.
fn volume(mount: &Mount, folder: &Path) -> Result<System, AgentError> {
    let refused = |reason: String| {
        let name = fs::read_to_string(folder.join("dm/name")).unwrap_or_default();
        no(format!(
            "{} is on the volume {}, whose files cannot be backed up by their place: {reason}; back up the whole disks below it \
             ({})",
            mount.point.display(),
            name.trim(),
            instead(folder)
        ))
    };
    let mut disks: Vec<String> = Vec::new();
    let below = |device| {
        let real = fs::canonicalize(folder_of(device)).map_err(|error| error.to_string())?;
        if real.join("dm").exists() || real.join("md").exists() {
            let name = real.file_name().unwrap_or_default().display();
            return Err(format!("a part of it is on {name}, which is put together itself"));
        }
        let mut below = place(mount, &real).map_err(|error| error.to_string())?;
        let disk = below.disks.pop().unwrap_or_default();
        let known = disks.iter().position(|known| *known == disk);
        let known = known.unwrap_or_else(|| {
            disks.push(disk);
            disks.len() - 1
        });
        Ok((known, below.span))
    };
    let table = dm::table(mount.device).and_then(|text| Table::parse(&text, below));
    let table = table.map_err(refused)?;
    Ok(System {
        mount: mount.clone(),
        disks,
        partition: None,
        span: Span {
            start: 0,
            length: table.length(),
        },
        table: Some(table),
    })
}

impl System {
    /// Whether a logical volume is still where it was.
    ///
    /// # Errors
    /// It is not, or nobody knows.
    pub(crate) fn has_not_moved(&self) -> Result<(), AgentError> {
        match self.table.is_none() || system(&self.mount)? == *self {
            true => Ok(()),
            false => Err(no(format!(
                "the volume of {} was moved or got another size while the image was made: make the backup again",
                self.mount.point.display()
            ))),
        }
    }
}

/// Where a file system is, by its device's folder in sysfs.
fn place(mount: &Mount, folder: &Path) -> Result<System, AgentError> {
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let number = |file: &str| -> Result<u64, AgentError> {
        let path = folder.join(file);
        let text = fs::read_to_string(&path).map_err(here(&path))?;
        text.trim()
            .parse()
            .map_err(|_| no(format!("{} is no number: {text:?}", path.display())))
    };
    let has_slaves = fs::read_dir(folder.join("slaves")).is_ok_and(|mut slaves| slaves.next().is_some());
    if has_slaves || folder.join("dm").exists() || folder.join("md").exists() {
        return Err(no(format!(
            "{} is on {}, which is put together in this machine (device mapper, md): its files cannot be backed up by their place \
             yet; back up the whole disks below it ({})",
            mount.point.display(),
            name(folder),
            instead(folder)
        )));
    }
    let bytes = |sectors: u64| {
        sectors
            .checked_mul(512)
            .ok_or_else(|| no("a disk larger than there can be".to_owned()))
    };
    let partition = match folder.join("partition").exists() {
        true => Some(u32::try_from(number("partition")?).map_err(|_| no("a strange partition".to_owned()))?),
        false => None,
    };
    let start = partition.map_or(Ok(0), |_| number("start"))?;
    let disk = match partition {
        Some(_) => folder.parent().map(name).unwrap_or_default(),
        None => name(folder),
    };
    Ok(System {
        mount: mount.clone(),
        disks: vec![disk],
        partition,
        span: Span {
            start: bytes(start)?,
            length: bytes(number("size")?)?,
        },
        table: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(point: &str) -> Mount {
        Mount {
            device: (8, 17),
            root: "/".into(),
            point: point.into(),
            kind: "ext4".into(),
        }
    }

    #[test]
    fn a_partition_is_found_with_its_place_on_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let partition = folder.path().join("sdb/sdb2");
        fs::create_dir_all(&partition).unwrap();
        for (file, text) in [("partition", "2\n"), ("start", "2048\n"), ("size", "4096\n")] {
            fs::write(partition.join(file), text).unwrap();
        }
        let found = place(&mount("/srv"), &partition).unwrap();
        assert_eq!((found.disks, found.partition), (vec!["sdb".to_owned()], Some(2)));
        assert_eq!((found.span.start, found.span.length), (1 << 20, 2 << 20));
        fs::write(partition.join("start"), "x").unwrap();
        assert!(place(&mount("/srv"), &partition).is_err());
        fs::write(partition.join("start"), u64::MAX.to_string()).unwrap();
        assert!(place(&mount("/srv"), &partition).is_err());
    }

    #[test]
    fn a_whole_disk_begins_at_zero_and_what_is_put_together_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("sdc");
        fs::create_dir_all(disk.join("slaves")).unwrap();
        fs::write(disk.join("size"), "8\n").unwrap();
        let found = place(&mount("/srv"), &disk).unwrap();
        assert_eq!(
            (found.span.start, found.span.length, found.partition),
            (0, 4096, None)
        );
        for (disk, partition) in [("sda", "sda3"), ("sdb", "sdb1")] {
            let below = folder.path().join(disk).join(partition);
            fs::create_dir_all(&below).unwrap();
            fs::write(below.join("partition"), "1\n").unwrap();
            std::os::unix::fs::symlink(below, folder.path().join("sdc/slaves").join(partition)).unwrap();
        }
        let refused = place(&mount("/srv"), &disk).unwrap_err().to_string();
        assert!(
            refused.contains("/srv is on sdc") && refused.contains("md"),
            "{refused}"
        );
        // What it says can be done as it stands.
        assert!(refused.contains("(--source /dev/sda /dev/sdb)"), "{refused}");
    }

    #[test]
    fn a_tree_in_another_one_is_there_once() {
        let tree = |name: &str| Tree {
            system: 0,
            inner: name.into(),
            name: name.into(),
        };
        let mut trees = vec![tree("srv/a"), tree("srv"), tree("srv"), tree("srvx")];
        forget_doubles(&mut trees);
        assert_eq!(trees, [tree("srv"), tree("srvx")]);
    }

    #[test]
    fn file_systems_that_cannot_be_read_say_why() {
        assert!(options("btrfs").unwrap_err().contains("whole disk"));
        assert!(options("zfs").unwrap_err().contains("zfs is no file system"));
        assert!(options("xfs").unwrap().contains(&"nouuid"));
        // What is on no disk at all.
        let refused = sources(&[PathBuf::from("/proc/self")]).unwrap_err().to_string();
        assert!(refused.contains("proc is no file system"), "{refused}");
    }
}
