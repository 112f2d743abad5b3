//! What a request needs to be allowed: one table for who decides and for who documents.

use api::Right;
use api::file::Target;

use crate::Request;

/// What a request needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs<'a> {
    /// This right.
    pub right: Right,
    /// Or this one: whoever may make disks may have snapshots, too.
    pub or: Option<Right>,
    /// To see these disks or snapshots.
    pub sees: Vec<&'a str>,
    /// To change these disks or snapshots.
    pub changes: Vec<&'a str>,
    /// To make these disks.
    pub makes: Vec<&'a str>,
    /// These to be names that a snapshot can have.
    pub names: Vec<&'a str>,
    /// To name these volumes.
    pub volumes: Vec<&'a str>,
    /// To name these storage classes.
    pub classes: Vec<&'a str>,
    /// To name these devices.
    pub devices: Vec<&'a str>,
}

impl Needs<'_> {
    fn of(right: Right) -> Self {
        Self {
            right,
            or: None,
            sees: Vec::new(),
            changes: Vec::new(),
            makes: Vec::new(),
            names: Vec::new(),
            volumes: Vec::new(),
            classes: Vec::new(),
            devices: Vec::new(),
        }
    }
}

impl<'a> Needs<'a> {
    fn seeing(right: Right, disk: &'a str) -> Self {
        Self {
            sees: vec![disk],
            ..Self::of(right)
        }
    }

    fn changing(right: Right, disk: &'a str) -> Self {
        Self {
            changes: vec![disk],
            ..Self::of(right)
        }
    }

    fn changing_all(right: Right, disks: &'a [String]) -> Self {
        Self {
            changes: disks.iter().map(String::as_str).collect(),
            ..Self::of(right)
        }
    }

    fn placed(mut self, target: Option<&'a Target>) -> Self {
        match target {
            Some(Target::Volume(volume)) => self.volumes.push(volume),
            Some(Target::Class(class)) => self.classes.push(class),
            Some(Target::Any) | None => {}
        }
        self
    }
}

impl Request {
    /// What it needs to be allowed.
    pub fn needs(&self) -> Needs<'_> {
        match self {
            Self::Describe {}
            | Self::ListDisks {}
            | Self::ListVolumes {}
            | Self::ListJobs {}
            | Self::JobStatus { .. }
            // A job is the guest's own, or it does not exist for it.
            | Self::CancelJob { .. }
            | Self::ReplicationStatus {}
            | Self::HsmStatus {} => Needs::of(Right::Observe),
            Self::DiskStatus { disk } => Needs::seeing(Right::Observe, disk),
            Self::CreateDisk { disk, target, .. } => Needs {
                makes: vec![disk],
                ..Needs::of(Right::Create)
            }
            .placed(target.as_ref()),
            Self::CloneDisk { source, disk, .. } => Needs {
                makes: vec![disk],
                ..Needs::seeing(Right::Create, source)
            },
            // A backup reads the frozen image through it.
            Self::AttachDisk { disk, .. } | Self::DetachDisk { disk } if split_snapshot(disk).1.is_some() => Needs {
                or: Some(Right::Create),
                ..Needs::seeing(Right::Image, disk)
            },
            Self::AttachDisk { disk, read_only: true } | Self::DetachDisk { disk } => Needs::seeing(Right::Create, disk),
            Self::AttachDisk { disk, read_only: false } => Needs::changing(Right::Create, disk),
            Self::DeleteDisk { disk } => Needs::changing(Right::Delete, disk),
            Self::ResizeDisk { disk, .. } => Needs::changing(Right::Resize, disk),
            Self::Snapshot { disks, name, .. } => Needs {
                names: vec![name],
                ..Needs::changing_all(Right::Snapshot, disks)
            },
            Self::DeleteSnapshot { snapshot } => Needs::changing(Right::Snapshot, snapshot),
            Self::Revert { snapshot } => Needs::changing(Right::Revert, snapshot),
            Self::Commit { disk } | Self::Discard { disk } => Needs::changing(Right::Revert, disk),
            Self::SetAttributes { disk, .. } => Needs::changing(Right::Attributes, disk),
            Self::MoveDisk { disk, to, .. } => Needs::changing(Right::Move, disk).placed(Some(to)),
            Self::MoveVolume { volume, from, to, .. } => Needs {
                volumes: vec![volume],
                devices: from.iter().chain(to).map(String::as_str).collect(),
                ..Needs::of(Right::Move)
            },
            Self::SetLayout { volume, devices, .. } => Needs {
                volumes: vec![volume],
                devices: devices.iter().map(String::as_str).collect(),
                ..Needs::of(Right::Layout)
            },
            Self::FreezeImage { disks, name } | Self::ReleaseImage { disks, name } => Needs {
                names: vec![name],
                ..Needs::changing_all(Right::Image, disks)
            },
            Self::Extents { disk } | Self::ConfigurationId { disk } => Needs::seeing(Right::Image, disk),
            Self::Changed { disk, since, until } => Needs {
                names: std::iter::once(since).chain(until).map(String::as_str).collect(),
                ..Needs::seeing(Right::Image, disk)
            },
        }
    }
}

/// The disk and the snapshot that `/web1/root.dsk@monday` names.
pub fn split_snapshot(path: &str) -> (&str, Option<&str>) {
    match path.rfind(".dsk@") {
        Some(at) if !path[at + 5..].contains('/') => (&path[..at + 4], Some(&path[at + 5..])),
        _ => (path, None),
    }
}

/// Sees that a snapshot can be called `name`.
///
/// # Errors
/// What is wrong.
pub fn check_snapshot_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > 63 {
        return Err("the name of a snapshot has 1 to 63 bytes");
    }
    match name
        .chars()
        .any(|character| character.is_control() || character.is_whitespace() || "/@".contains(character))
    {
        true => Err("the name of a snapshot has no spaces, no control characters, no / and no @"),
        false => Ok(()),
    }
}

/// Sees that `path` is that of a disk, in its one spelling: no empty parts, no `.` and `..`, no control characters.
///
/// # Errors
/// What is wrong.
pub fn check_disk_path(path: &str) -> Result<(), &'static str> {
    let Some(rest) = path.strip_prefix('/') else {
        return Err("the path of a disk begins with /");
    };
    if path.len() > 1024 {
        return Err("it has more than 1024 bytes");
    }
    if path.chars().any(char::is_control) {
        return Err("it has control characters");
    }
    if rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("it has an empty part, `.` or `..`");
    }
    if path.contains(".dsk@") {
        return Err("what follows .dsk@ is the name of a snapshot");
    }
    match rest.rsplit('/').next().and_then(|name| name.strip_suffix(".dsk")) {
        Some(stem) if !stem.is_empty() => Ok(()),
        _ => Err("the name of a disk ends with .dsk"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_one_spelling() {
        for good in ["/a.dsk", "/vm/über.dsk", "/a/b/c.d.dsk", "/a@x.dsk"] {
            check_disk_path(good).unwrap();
        }
        for bad in [
            "",
            "a.dsk",
            "/",
            "/a",
            "/.dsk",
            "//a.dsk",
            "/a//b.dsk",
            "/a/../b.dsk",
            "/./a.dsk",
            "/a.dsk/",
            "/a\n.dsk",
            "/a-1.redo",
            "/a.disk",
            "/a.dsk@x.dsk",
        ] {
            assert!(check_disk_path(bad).is_err(), "{bad:?}");
        }
        assert_eq!(split_snapshot("/a.dsk@b"), ("/a.dsk", Some("b")));
        assert_eq!(split_snapshot("/a.dsk@b/c.dsk"), ("/a.dsk@b/c.dsk", None));
        assert_eq!(split_snapshot("/a.dsk"), ("/a.dsk", None));
    }

    #[test]
    fn a_snapshot_is_attached_for_reading_whatever_is_said() {
        let attach = |disk: &str, read_only| Request::AttachDisk {
            disk: disk.into(),
            read_only,
        };
        assert!(attach("/a.dsk@b", false).needs().changes.is_empty());
        assert!(attach("/a.dsk", true).needs().changes.is_empty());
        assert_eq!(attach("/a.dsk", false).needs().changes, ["/a.dsk"]);
    }

    #[test]
    fn whoever_may_freeze_images_may_read_them() {
        let attach = |disk: &str, read_only| Request::AttachDisk {
            disk: disk.into(),
            read_only,
        };
        let rights = |request: Request| (request.needs().right, request.needs().or);
        let (image, create) = ((Right::Image, Some(Right::Create)), (Right::Create, None));
        assert_eq!(rights(attach("/a.dsk@b", true)), image);
        assert_eq!(rights(attach("/a.dsk", true)), create);
        assert_eq!(rights(attach("/a.dsk", false)), create);
        let detach = |disk: &str| Request::DetachDisk { disk: disk.into() };
        assert_eq!(rights(detach("/a.dsk@b")), image);
        assert_eq!(rights(detach("/a.dsk")), create);
    }
}
