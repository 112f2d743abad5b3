//! A tree with one of everything that a file system can have, and a listing of a tree in which everything is: two trees are the same if
//! their listings are.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io::{Error, Read as _, Result};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink,
};
use std::path::{Path, PathBuf};

fn done(result: libc::c_int) -> Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

fn text(bytes: &[u8]) -> Result<CString> {
    Ok(CString::new(bytes)?)
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) -> Result<()> {
    let (path, name) = (text(path.as_os_str().as_bytes())?, text(name.as_bytes())?);
    // SAFETY: the strings end with a zero, and the value is as long as it is said to be.
    done(unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    })
}

fn make_node(path: &Path, kind: libc::mode_t, device: libc::dev_t) -> Result<()> {
    let path = text(path.as_os_str().as_bytes())?;
    // SAFETY: the string ends with a zero.
    done(unsafe { libc::mknod(path.as_ptr(), kind | 0o640, device) })
}

fn set_time(path: &Path, seconds: i64, nanoseconds: i64) -> Result<()> {
    let path = text(path.as_os_str().as_bytes())?;
    let time = libc::timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = [time, time];
    // SAFETY: the string ends with a zero, and there are two times.
    done(unsafe {
        libc::utimensat(
            libc::AT_FDCWD,
            path.as_ptr(),
            times.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
        )
    })
}

/// Bytes that are not all the same.
fn bytes(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..count).map(step).collect()
}

/// An access control list as the kernel takes it (linux/posix_acl_xattr.h): user 1000 may read.
fn list_of_access() -> Vec<u8> {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, may, id) in [
        (1, 6, u32::MAX),
        (2, 4, 1000),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        list.extend_from_slice(&u16::to_le_bytes(tag));
        list.extend_from_slice(&u16::to_le_bytes(may));
        list.extend_from_slice(&id.to_le_bytes());
    }
    list
}

/// Makes the tree in a folder that is there.
pub(crate) fn make(folder: &Path) -> Result<String> {
    let at = |name: &[u8]| folder.join(OsStr::from_bytes(name));
    fs::create_dir_all(at(b"deep/er/still"))?;
    for (name, content) in [
        (&b"plain"[..], bytes(300_000, 1)),
        (b"empty", Vec::new()),
        (b"short", bytes(5001, 2)),
        (b"one", vec![7]),
        (b"odd \xff\n\\name", bytes(100, 3)),
        (&[b'n'; 255], bytes(10, 4)),
        (b"deep/er/still/file", bytes(70_000, 5)),
        (b"program", bytes(9000, 6)),
        (b"listed", bytes(4096, 7)),
    ] {
        fs::write(at(name), content)?;
    }
    // Holes: at the beginning, between, and at the end; and more extents than are asked for at once.
    let sparse = File::create(at(b"sparse"))?;
    sparse.set_len(64 << 20)?;
    for offset in [1 << 20, 5_000_001, 40 << 20] {
        sparse.write_all_at(&bytes(10_000, 8), offset)?;
    }
    let pieces = File::create(at(b"pieces"))?;
    for piece in 0..300 {
        pieces.write_all_at(&bytes(4096, 9), piece * 8192)?;
    }
    // Allocated and not written.
    let allocated = File::create(at(b"allocated"))?;
    // SAFETY: it takes no memory.
    done(unsafe { libc::fallocate(allocated.as_raw_fd(), 0, 0, 1 << 20) })?;
    allocated.write_all_at(&bytes(1000, 10), 500_000)?;

    fs::hard_link(at(b"plain"), at(b"deep/another name"))?;
    symlink("../nowhere", at(b"deep/link"))?;
    symlink("/etc/passwd", at(b"absolute"))?;
    make_node(&at(b"pipe"), libc::S_IFIFO, 0)?;
    make_node(&at(b"null"), libc::S_IFCHR, libc::makedev(1, 3))?;
    make_node(&at(b"disk"), libc::S_IFBLK, libc::makedev(7, 300))?;

    set_xattr(&at(b"plain"), "user.note", b"\x00\xff binary")?;
    set_xattr(&at(b"plain"), "user.empty", b"")?;
    set_xattr(&at(b"deep"), "trusted.note", b"only root")?;
    set_xattr(&at(b"absolute"), "trusted.link", b"of the link itself")?;
    set_xattr(&at(b"listed"), "system.posix_acl_access", &list_of_access())?;
    set_xattr(&at(b"deep"), "system.posix_acl_default", &list_of_access())?;
    chown(at(b"program"), Some(1000), Some(1001))?;
    fs::set_permissions(at(b"program"), Permissions::from_mode(0o4755))?;
    // cap_net_bind_service, permitted and effective (linux/capability.h, VFS_CAP_REVISION_2).
    let capability: Vec<u8> = [0x0200_0001_u32, 1 << 10, 0, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    set_xattr(&at(b"short"), "security.capability", &capability)?;
    set_time(&at(b"one"), -86_400, 5)?;
    set_time(&at(b"deep/link"), 2_000_000_000, 123_456_789)?;
    fs::set_permissions(at(b"deep/er"), Permissions::from_mode(0o1711))?;
    set_time(&at(b"deep"), 1_000_000_000, 999_999_999)?;
    Ok("a tree with one of everything".to_owned())
}

fn shown(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// FNV-1a, 64 bits.
fn sum(path: &Path) -> Result<u64> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 16];
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(sum);
        }
        for byte in &buffer[..count] {
            sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn xattrs(path: &Path) -> Result<Vec<String>> {
    let path = text(path.as_os_str().as_bytes())?;
    let mut names = vec![0_u8; 1 << 16];
    // SAFETY: the string ends with a zero, and the buffer is as long as it is said to be.
    let length = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let length = usize::try_from(length).map_err(|_| Error::last_os_error())?;
    let mut found = Vec::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0_u8; 1 << 16];
        let zero_ended = text(name)?;
        // SAFETY: as above.
        let length = unsafe {
            libc::lgetxattr(
                path.as_ptr(),
                zero_ended.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        let length = usize::try_from(length).map_err(|_| Error::last_os_error())?;
        found.push(format!("{}={}", shown(name), shown(&value[..length])));
    }
    found.sort();
    Ok(found)
}

/// The names in a tree, each folder before what is in it.
fn names(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    entries.sort();
    for path in entries {
        let is_folder = fs::symlink_metadata(&path)?.is_dir();
        found.push(path.clone());
        if is_folder {
            names(&path, found)?;
        }
    }
    Ok(())
}

/// Prints a line for each name in a folder.
pub(crate) fn list(folder: &Path) -> Result<String> {
    let mut all = Vec::new();
    names(folder, &mut all)?;
    let mut first = HashMap::new();
    for (number, path) in all.iter().enumerate() {
        let name = path.strip_prefix(folder).unwrap_or(path);
        let metadata = fs::symlink_metadata(path)?;
        let kind = metadata.file_type();
        let mut line = format!(
            "{} {:o} {}:{} {}.{:09}",
            shown(name.as_os_str().as_bytes()),
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.mtime(),
            metadata.mtime_nsec()
        );
        let _ = match () {
            () if kind.is_file() => write!(line, " {} {:016x}", metadata.size(), sum(path)?),
            () if kind.is_symlink() => {
                write!(line, " -> {}", shown(fs::read_link(path)?.as_os_str().as_bytes()))
            }
            () if kind.is_char_device() || kind.is_block_device() => write!(line, " {:x}", metadata.rdev()),
            () => Ok(()),
        };
        let same = *first.entry(metadata.ino()).or_insert(number);
        let _ = match same == number {
            true => write!(line, " {}", xattrs(path)?.join(" ")),
            false => write!(
                line,
                " like {}",
                shown(
                    all[same]
                        .as_os_str()
                        .as_bytes()
                        .strip_prefix(folder.as_os_str().as_bytes())
                        .unwrap_or_default()
                )
            ),
        };
        println!("{line}");
    }
    Ok(format!("{} names", all.len()))
}
