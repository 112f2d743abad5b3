//! What a guest may: the only place where that is decided.
//!
//! A disk is *its own* if the machine has it attached, or if the policy names it. Of what is not its own a guest is not even told whether
//! there is such a thing.

use api::{DiskConfig, ExpandedPolicy, Problem, ProblemKind};
use expanded_api::{Request, check_disk_path, check_snapshot_name, split_snapshot};

/// A disk of the pool that the machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Own {
    /// Its path, in its one spelling.
    pub(crate) path: String,
    /// The snapshot of it that is attached.
    pub(crate) snapshot: Option<String>,
    /// The guest can write it.
    pub(crate) writable: bool,
}

impl Own {
    /// None if it is no disk of a pool.
    pub(crate) fn of(config: &DiskConfig) -> Option<Self> {
        let (path, snapshot) = split_snapshot(config.file.as_deref()?);
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        Some(Self {
            path: format!("/{}", parts.join("/")),
            snapshot: snapshot.map(str::to_owned),
            writable: !config.read_only && snapshot.is_none(),
        })
    }
}

fn forbidden(detail: String) -> Problem {
    Problem::new(ProblemKind::Forbidden, detail)
}

fn disk_of(path: &str) -> Result<&str, Problem> {
    let (disk, snapshot) = split_snapshot(path);
    check_disk_path(disk).map_err(|reason| {
        Problem::new(
            ProblemKind::Invalid,
            format!("`{}` names no disk: {reason}", shown(path)),
        )
    })?;
    snapshot.map_or(Ok(()), snapshot_name)?;
    Ok(disk)
}

fn snapshot_name(name: &str) -> Result<(), Problem> {
    check_snapshot_name(name).map_err(|reason| {
        Problem::new(
            ProblemKind::Invalid,
            format!("`{}` names no snapshot: {reason}", shown(name)),
        )
    })
}

/// What a guest wrote, for people: not too long, and in one line.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().nth(80).is_some() {
        shown.push_str("...");
    }
    shown
}

/// Sees that the guest may do what it asks for.
///
/// # Errors
/// [`ProblemKind::Forbidden`], or [`ProblemKind::Invalid`] if a name is none.
pub(crate) fn allow(policy: &ExpandedPolicy, own: &[Own], request: &Request) -> Result<(), Problem> {
    let needs = request.needs();
    if !policy.allows(needs.right) && !needs.or.is_some_and(|right| policy.allows(right)) {
        let right = needs.right.name();
        return Err(forbidden(format!(
            "this guest lacks the right `{right}`, which {} needs",
            request.name()
        ))
        .remedy(format!(
            "the administrator gives it by allow = [\"{right}\"] in [expanded-api] of vm.toml"
        )));
    }
    for path in needs.sees {
        let disk = disk_of(path)?;
        // Of a disk of which it has only one snapshot, it has only that.
        let sees = own.iter().any(|own| {
            own.path == disk && (own.snapshot.is_none() || own.snapshot.as_deref() == split_snapshot(path).1)
        });
        if !sees && !policy.has_object(disk) {
            return Err(not_its_own(path));
        }
    }
    needs.names.iter().try_for_each(|name| snapshot_name(name))?;
    let of_snapshots = matches!(request, Request::DeleteSnapshot { .. } | Request::Revert { .. });
    for path in needs.changes {
        let disk = disk_of(path)?;
        if split_snapshot(path).1.is_some() != of_snapshots {
            let (is, wanted) = match of_snapshots {
                true => ("disk", "snapshot (/web1/data.dsk@monday)"),
                false => ("snapshot", "disk"),
            };
            let text = format!(
                "`{}` names a {is}, and {} wants a {wanted}",
                shown(path),
                request.name()
            );
            return Err(Problem::new(ProblemKind::Invalid, text));
        }
        if policy.has_object(disk) || own.iter().any(|own| own.path == disk && own.writable) {
            continue;
        }
        return Err(match own.iter().any(|own| own.path == disk) {
            true => forbidden(format!("this guest has {} only to read", shown(path))).about(shown(path)),
            false => not_its_own(path),
        });
    }
    for path in needs.makes {
        if split_snapshot(path).1.is_some() {
            let text = format!("`{}` is the name of a snapshot, not of a disk", shown(path));
            return Err(Problem::new(ProblemKind::Invalid, text));
        }
        if !policy.has_object(disk_of(path)?) {
            let text = format!("this guest may not make {}", shown(path));
            return Err(forbidden(text)
                .about(shown(path))
                .remedy(where_it_may("objects", &policy.objects)));
        }
    }
    if let Some(volume) = needs.volumes.iter().find(|volume| !policy.has_volume(volume)) {
        let text = format!("this guest may not name volume {}", shown(volume));
        return Err(forbidden(text).remedy(where_it_may("volumes", &policy.volumes)));
    }
    if let Some(class) = needs.classes.first()
        && !policy.volumes.iter().any(|pattern| pattern == "*")
    {
        let text = format!(
            "this guest may not name storage class {}: that needs volumes = [\"*\"]",
            shown(class)
        );
        return Err(forbidden(text));
    }
    let unnamed = needs
        .devices
        .iter()
        .find(|device| !policy.devices.iter().any(|own| own == *device));
    if let Some(device) = unnamed {
        let text = format!("this guest may not name device {}", shown(device));
        return Err(forbidden(text).remedy(where_it_may("devices", &policy.devices)));
    }
    Ok(())
}

fn where_it_may(key: &str, names: &[String]) -> String {
    match names {
        [] => format!("the administrator allows some by {key} in [expanded-api] of vm.toml"),
        _ => format!("it may: {}", names.join(", ")),
    }
}

fn not_its_own(path: &str) -> Problem {
    forbidden(format!("{} is no disk of this guest", shown(path))).about(shown(path))
}

#[cfg(test)]
mod tests {
    use api::Right;
    use api::file::Target;

    use super::*;

    fn policy(allow: &[Right]) -> ExpandedPolicy {
        ExpandedPolicy {
            allow: allow.to_vec(),
            objects: vec!["/vm1/*".into()],
            volumes: vec!["safe".into()],
            devices: vec!["d1".into()],
            ..ExpandedPolicy::default()
        }
    }

    fn own() -> Vec<Own> {
        let own = |path: &str, snapshot: Option<&str>, writable| Own {
            path: path.into(),
            snapshot: snapshot.map(Into::into),
            writable,
        };
        vec![
            own("/root.dsk", None, true),
            own("/tools.dsk", None, false),
            own("/base.dsk", Some("gold"), false),
        ]
    }

    fn request(text: &str) -> Request {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_table_of_what_is_allowed() {
        use ProblemKind::{Forbidden, Invalid};
        let all = policy(&Right::ALL);
        for (text, expected) in [
            (r#"{"command": "disk-status", "disk": "/root.dsk"}"#, None),
            (r#"{"command": "disk-status", "disk": "/tools.dsk"}"#, None),
            (
                r#"{"command": "disk-status", "disk": "/base.dsk"}"#,
                Some(Forbidden),
            ),
            (r#"{"command": "disk-status", "disk": "/base.dsk@gold"}"#, None),
            (
                r#"{"command": "disk-status", "disk": "/base.dsk@iron"}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "disk-status", "disk": "/vm2/root.dsk"}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "disk-status", "disk": "/vm1/../vm2/root.dsk"}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "disk-status", "disk": "/vm1//root.dsk"}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "disk-status", "disk": "/vm1/root-1.redo"}"#,
                Some(Invalid),
            ),
            (r#"{"command": "delete-disk", "disk": "/vm1/a.dsk"}"#, None),
            (
                r#"{"command": "delete-disk", "disk": "/vm2/a.dsk"}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "resize-disk", "disk": "/tools.dsk", "size": 1}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "snapshot", "disks": ["/root.dsk", "/vm2/a.dsk"], "name": "x"}"#,
                Some(Forbidden),
            ),
            (r#"{"command": "snapshot", "disks": [], "name": "x"}"#, None),
            (r#"{"command": "revert", "snapshot": "/vm1/a.dsk@x"}"#, None),
            (
                r#"{"command": "revert", "snapshot": "/vm1/a.dsk"}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "delete-disk", "disk": "/vm1/a.dsk@x"}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "snapshot", "disks": ["/vm1/a.dsk@x"], "name": "x"}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "snapshot", "disks": ["/vm1/a.dsk"], "name": "x/../y"}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "release-image", "disks": ["/vm1/a.dsk"], "name": "x@y"}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "changed", "disk": "/root.dsk", "since": ""}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "revert", "snapshot": "/tools.dsk@x"}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "create-disk", "disk": "/vm1/new.dsk", "size": 1}"#,
                None,
            ),
            (
                r#"{"command": "create-disk", "disk": "/vm1/new.dsk@x", "size": 1}"#,
                Some(Invalid),
            ),
            (
                r#"{"command": "create-disk", "disk": "/new.dsk", "size": 1}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "create-disk", "disk": "/vm1/n.dsk", "size": 1, "target": {"volume": "fast"}}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "clone-disk", "source": "/base.dsk@gold", "disk": "/vm1/b.dsk"}"#,
                None,
            ),
            (
                r#"{"command": "clone-disk", "source": "/vm2/a.dsk", "disk": "/vm1/b.dsk"}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "attach-disk", "disk": "/tools.dsk"}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "attach-disk", "disk": "/tools.dsk", "read-only": true}"#,
                None,
            ),
            (
                r#"{"command": "move-disk", "disk": "/root.dsk", "to": {"volume": "safe"}}"#,
                None,
            ),
            (
                r#"{"command": "move-disk", "disk": "/root.dsk", "to": {"class": "ssd"}}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "move-volume", "volume": "safe", "from": "d1"}"#,
                None,
            ),
            (
                r#"{"command": "move-volume", "volume": "safe", "to": "/dev/sdb"}"#,
                Some(Forbidden),
            ),
            (
                r#"{"command": "set-layout", "volume": "safe", "layout": "raid5"}"#,
                None,
            ),
            (
                r#"{"command": "set-layout", "volume": "fs-meta", "layout": "concat"}"#,
                Some(Forbidden),
            ),
            (r#"{"command": "extents", "disk": "/vm2/a.dsk"}"#, Some(Forbidden)),
        ] {
            let request = request(text);
            let found = allow(&all, &own(), &request).err().map(|problem| problem.kind);
            assert_eq!(found, expected, "{text}");
            // Without the right, nothing but to look.
            if request.needs().right != Right::Observe {
                let refused = allow(&policy(&[]), &own(), &request).unwrap_err();
                assert_eq!(refused.kind, Forbidden, "{text}");
                assert!(
                    refused.to_string().contains(request.needs().right.name()),
                    "{refused}"
                );
            }
        }
    }

    #[test]
    fn a_frozen_image_of_an_own_disk_is_attached_with_either_right() {
        let attach = |disk: &str| Request::AttachDisk {
            disk: disk.into(),
            read_only: true,
        };
        let detach = |disk: &str| Request::DetachDisk { disk: disk.into() };
        for (right, whole) in [(Right::Image, false), (Right::Create, true)] {
            let policy = policy(&[right]);
            let may = |request| allow(&policy, &own(), &request).is_ok();
            assert!(may(attach("/root.dsk@backup")) && may(detach("/root.dsk@backup")));
            assert_eq!(
                (may(attach("/tools.dsk")), may(detach("/tools.dsk"))),
                (whole, whole)
            );
            // Another snapshot of a disk of which it has only one; another's disk.
            assert!(!may(attach("/base.dsk@iron")) && !may(attach("/vm2/root.dsk@backup")));
        }
        assert!(allow(&policy(&[Right::Snapshot]), &own(), &attach("/root.dsk@backup")).is_err());
    }

    #[test]
    fn a_class_is_for_those_who_may_name_all_volumes() {
        let mut policy = policy(&[Right::Move]);
        policy.volumes = vec!["*".into()];
        let request = Request::MoveDisk {
            disk: "/root.dsk".into(),
            to: Target::Class("ssd".into()),
            background: false,
        };
        allow(&policy, &own(), &request).unwrap();
    }

    #[test]
    fn a_disk_of_the_machine_is_known_in_its_one_spelling() {
        let mut config = DiskConfig::new("x");
        assert_eq!(Own::of(&config), None);
        config.file = Some("//vm///a.dsk@b".into());
        let own = Own::of(&config).unwrap();
        assert_eq!(
            (own.path.as_str(), own.snapshot.as_deref(), own.writable),
            ("/vm/a.dsk", Some("b"), false)
        );
    }

    #[test]
    fn what_a_guest_wrote_is_shown_in_one_short_line() {
        assert_eq!(shown("a\nb"), "a\\nb");
        assert_eq!(shown(&"x".repeat(1000)).len(), 83);
    }
}
