//! How the files of a virtual disk are called.
//!
//! ```text
//!   /vm/root.dsk        the disk, as everybody calls it; its first layer
//!   /vm/root-3.redo     a layer; the number says nothing but that it is another one
//!   /vm/root.disk       the descriptor: which layer is what
//!   /vm/root.dsk@monday a snapshot of the disk, as everybody calls it
//! ```

use filesys::MAX_NAME;

use super::error::DiskError;

/// What the name of a disk ends with.
pub const SUFFIX: &str = ".dsk";
/// The longest name of a snapshot, in bytes.
pub const MAX_SNAPSHOT_NAME: usize = 63;
/// The longest description of a snapshot, in bytes.
pub const MAX_DESCRIPTION: usize = 1000;
/// Room for what is appended to a disk's name.
const ROOM: usize = "-4294967295.redo".len();

/// The path of a disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskPath(String);

impl DiskPath {
    /// Checks a path. It is one that the file system takes, and ends with `.dsk`.
    ///
    /// # Errors
    /// It is not.
    pub fn new(path: &str) -> Result<Self, DiskError> {
        let bad = |problem| DiskError::Name {
            name: path.to_owned(),
            problem,
        };
        if !path.starts_with('/') {
            return Err(bad("the path of a disk begins with /"));
        }
        // One disk has one path, as it has one lock.
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let name = parts.last().copied().unwrap_or_default();
        let Some(stem) = name.strip_suffix(SUFFIX) else {
            return Err(bad("the name of a disk ends with .dsk"));
        };
        if stem.is_empty() {
            return Err(bad("there is nothing before .dsk"));
        }
        if stem.len() + ROOM > MAX_NAME {
            return Err(bad(
                "it is too long: a disk's layers have longer names than the disk",
            ));
        }
        Ok(Self(format!("/{}", parts.join("/"))))
    }

    /// The path of a disk, and the snapshot of it that is meant, if one is: `/vm/root.dsk@monday`.
    ///
    /// # Errors
    /// It is neither.
    pub fn with_snapshot(text: &str) -> Result<(Self, Option<String>), DiskError> {
        let at = format!("{SUFFIX}@");
        match text.rsplit_once(&at) {
            Some((stem, snapshot)) if !snapshot.contains('/') => {
                check_snapshot(snapshot)?;
                Ok((Self::new(&format!("{stem}{SUFFIX}"))?, Some(snapshot.to_owned())))
            }
            _ => Ok((Self::new(text)?, None)),
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn stem(&self) -> &str {
        self.0.strip_suffix(SUFFIX).unwrap_or(&self.0)
    }

    /// The path of the layer of a number.
    pub(crate) fn layer(&self, number: u32) -> String {
        format!("{}-{number}.redo", self.stem())
    }

    /// The path of the descriptor.
    pub(crate) fn descriptor(&self) -> String {
        format!("{}.disk", self.stem())
    }
}

impl std::fmt::Display for DiskPath {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Whether `path` is that of a file with data of `disk`: its first layer, which has the disk's path, or one that came with a snapshot.
pub fn is_layer_of(disk: &str, path: &str) -> bool {
    let stem = disk.strip_suffix(SUFFIX).unwrap_or(disk);
    let number = path.strip_prefix(stem).and_then(|rest| rest.strip_prefix('-'));
    let number = number.and_then(|rest| rest.strip_suffix(".redo"));
    path == disk || number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Whether a snapshot can be called so.
pub(crate) fn check_snapshot(name: &str) -> Result<(), DiskError> {
    let problem = if name.is_empty() {
        "the name of a snapshot is not empty"
    } else if name.len() > MAX_SNAPSHOT_NAME {
        "the name of a snapshot has at most 63 bytes"
    } else if name
        .chars()
        .any(|character| character.is_control() || character.is_whitespace() || "/@".contains(character))
    {
        "the name of a snapshot has no spaces, no control characters, no / and no @"
    } else {
        return Ok(());
    };
    Err(DiskError::Name {
        name: name.to_owned(),
        problem,
    })
}

/// Whether a snapshot can be described so.
pub(crate) fn check_description(name: &str, description: &str) -> Result<(), DiskError> {
    if description.len() <= MAX_DESCRIPTION {
        return Ok(());
    }
    Err(DiskError::Name {
        name: name.to_owned(),
        problem: "the description of a snapshot has at most 1000 bytes",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_ends_with_dsk_and_begins_with_a_slash() {
        assert_eq!(DiskPath::new("//vm///root.dsk").unwrap().as_str(), "/vm/root.dsk");
        for bad in ["root.dsk", "/vm/root", "/vm/.dsk", "/", "/vm/root.dsk@x"] {
            DiskPath::new(bad).unwrap_err();
        }
        let long = format!("/{}.dsk", "x".repeat(240));
        assert!(DiskPath::new(&long).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn a_snapshot_stands_behind_an_at_sign() {
        let (disk, snapshot) = DiskPath::with_snapshot("/a@b.dsk@monday").unwrap();
        assert_eq!((disk.as_str(), snapshot.as_deref()), ("/a@b.dsk", Some("monday")));
        assert_eq!(DiskPath::with_snapshot("/a.dsk").unwrap().1, None);
        for bad in ["/a.dsk@", "/a.dsk@x y", "/a.dsk@x/y.dsk@"] {
            DiskPath::with_snapshot(bad).unwrap_err();
        }
    }

    #[test]
    fn the_files_of_a_disk_have_its_name() {
        let disk = DiskPath::new("/vm/root.dsk").unwrap();
        assert_eq!(disk.layer(3), "/vm/root-3.redo");
        assert!(is_layer_of(disk.as_str(), disk.as_str()) && is_layer_of(disk.as_str(), &disk.layer(3)));
        for other in [
            "/vm/root.disk",
            "/vm/root-3-1.redo",
            "/vm/root2-3.redo",
            "/root-3.redo",
        ] {
            assert!(!is_layer_of(disk.as_str(), other), "{other}");
        }
        assert_eq!(disk.descriptor(), "/vm/root.disk");
    }
}
