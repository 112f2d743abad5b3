//! What is mounted where: /proc/self/mountinfo (proc(5)).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Major and minor number of the device.
    pub(crate) device: (u32, u32),
    /// The folder of the file system that is mounted here; `/` but for bind mounts.
    pub(crate) root: PathBuf,
    /// Where.
    pub(crate) point: PathBuf,
    /// `ext4`.
    pub(crate) kind: String,
}

/// All mounts that this program sees, in the order in which they were made.
pub(crate) fn all() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// Lines that are none are left out.
pub(crate) fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let (root, point) = (unescaped(fields.next()?), unescaped(fields.next()?));
    // Optional fields end with a dash.
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        root,
        point,
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// Spaces and the like are written in octal.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut result = Vec::new();
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        let code = (*byte == b'\\').then(|| after.get(..3)).flatten();
        let code = code.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        result.push(code.unwrap_or(*byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(result))
}

/// Where a device is mounted: the mount that is highest up in the tree of folders, and of the whole file system if there is one.
pub(crate) fn of_device(mounts: &[Mount], device: (u32, u32)) -> Option<&Mount> {
    let of_it = mounts.iter().filter(|mount| mount.device == device);
    // Of a bind mount of a folder it is enough to have any folder.
    of_it.min_by_key(|mount| (mount.root != Path::new("/"), mount.point.as_os_str().len()))
}

/// The mount in which a path is that has no symbolic links: the longest; of two at the same place the later one hides the other.
pub(crate) fn of_path<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let above = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    above.max_by_key(|mount| mount.point.as_os_str().as_bytes().len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                          23 22 8:17 /sub /a rw shared:2 master:1 - xfs /dev/sdb1 rw\n\
                          24 22 8:17 / /with\\040space rw - xfs /dev/sdb1 rw\n\
                          25 22 0:5 / /srv rw - tmpfs none rw\n\
                          26 22 8:33 / /srv rw - ext4 /dev/sdc1 rw\n\
                          27 22 8:49 / /raw\xff\\134 rw - ext4 /dev/sdd1 rw\n\
                          nonsense\n28 22 8:x / / rw - a b\n29 22 8:65 / /short rw\n";

    #[test]
    fn mounts_are_read_and_what_is_none_is_left_out() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 6);
        assert_eq!(
            (mounts[1].kind.as_str(), mounts[1].root.to_str()),
            ("xfs", Some("/sub"))
        );
        assert_eq!(mounts[5].point.as_os_str().as_bytes(), b"/raw\xff\\");
    }

    #[test]
    fn the_mount_of_a_whole_file_system_is_preferred() {
        let mounts = parse(TEXT);
        let point = |device| of_device(&mounts, device).map(|mount| mount.point.clone());
        assert_eq!(point((8, 17)), Some(PathBuf::from("/with space")));
        assert_eq!(point((8, 1)), Some(PathBuf::from("/")));
        assert_eq!(point((8, 2)), None);
    }

    #[test]
    fn a_path_is_in_the_longest_mount_and_in_the_latest_there() {
        let mounts = parse(TEXT);
        let device = |path: &str| of_path(&mounts, Path::new(path)).map(|mount| mount.device);
        for (path, expected) in [
            ("/srv", (8, 33)),
            ("/srv/x", (8, 33)),
            ("/srvx", (8, 1)),
            ("/a/b", (8, 17)),
            ("/", (8, 1)),
        ] {
            assert_eq!(device(path), Some(expected), "{path}");
        }
    }
}
