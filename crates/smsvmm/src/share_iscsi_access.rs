//! The file of `smsvmm share iscsi --access`: targets, who may log in to them, who sees what, and how it is proved.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context;
use api::ExpandedPolicy;
use serde::Deserialize;
use storage_virtualizer::iscsi::{Access, Chap, IscsiTarget, Secret, check_name};

use crate::exit::UsageError;
use crate::share_api::Policies;

pub(crate) fn chap(
    own: Option<(&String, &Path)>,
    mutual: Option<(&String, &Path)>,
) -> anyhow::Result<Option<Chap>> {
    let Some((user, file)) = own else { return Ok(None) };
    let mutual = match mutual {
        Some((user, file)) => Some((user.clone(), secret(file)?)),
        None => None,
    };
    Ok(Some(Chap {
        user: user.clone(),
        secret: secret(file)?,
        mutual,
    }))
}

/// The first line of a file.
fn secret(file: &Path) -> anyhow::Result<Secret> {
    let read = || std::fs::read(file);
    let bytes = read().with_context(|| format!("cannot read the CHAP secret in {}", file.display()))?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if let Ok(metadata) = std::fs::metadata(file) {
        use std::os::unix::fs::MetadataExt;
        if metadata.mode() & 0o077 != 0 {
            tracing::warn!(file = %file.display(), "others can read this CHAP secret: chmod 600");
        }
    }
    Secret::new(line.to_vec()).with_context(|| format!("{} cannot be used", file.display()))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AccessFile {
    /// Of the only target, which has all disks.
    #[serde(default)]
    initiator: Vec<Initiator>,
    #[serde(default)]
    target: Vec<Target>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    name: String,
    #[serde(default)]
    alias: String,
    /// Its disks, by the names or paths under which they are served: LUN 0, 1, …
    disks: Vec<String>,
    #[serde(default)]
    initiator: Vec<Initiator>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Initiator {
    /// Its name, or `*` for all that are not named.
    name: String,
    /// Disks that it sees, by the names or paths under which they are served; all if absent.
    disks: Option<Vec<String>>,
    chap: Option<User>,
    mutual: Option<User>,
    /// What it may do of the expanded API.
    #[serde(default, rename = "expanded-api")]
    expanded_api: Option<ExpandedPolicy>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct User {
    user: String,
    /// Relative to the file.
    secret_file: PathBuf,
}

/// Targets, each with its disks: the places of these in the order in which they are served.
pub(crate) type Targets = Vec<(IscsiTarget, Vec<usize>)>;

/// Reads the file; `names` are those of the disks that are served, `target` is the name of the target if the file names none.
pub(crate) fn read(file: &Path, names: &[&str], target: &str) -> anyhow::Result<(Targets, Policies)> {
    let mut policies = Policies::new();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let parsed: AccessFile =
        toml::from_str(&text).with_context(|| format!("{} cannot be used", file.display()))?;
    let refuse = |what: String| anyhow::Error::from(UsageError::new(format!("{}: {what}", file.display())));
    if parsed.target.is_empty() {
        let target = IscsiTarget {
            access: initiators(file, parsed.initiator, names, (0, &mut policies))?,
            ..IscsiTarget::open(target)
        };
        return Ok((vec![(target, (0..names.len()).collect())], policies));
    }
    if !parsed.initiator.is_empty() {
        return Err(refuse(
            "there are targets, so write [[target.initiator]] below the one that is meant".to_owned(),
        ));
    }
    let mut targets = Targets::new();
    for target in parsed.target {
        check_name(&target.name).map_err(|error| refuse(error.to_string()))?;
        let mut places = Vec::new();
        for disk in &target.disks {
            let place = names.iter().position(|name| name == disk);
            let place = place.ok_or_else(|| {
                let known = names.join(", ");
                refuse(format!(
                    "{} has {disk}, which is not served; there are {known}",
                    target.name
                ))
            })?;
            let taken = targets.iter().flat_map(|(_, places)| places).chain(&places);
            if taken.copied().any(|other| other == place) {
                return Err(refuse(format!(
                    "{disk} is given twice: a disk belongs to one target"
                )));
            }
            places.push(place);
        }
        let own: Vec<&str> = target.disks.iter().map(String::as_str).collect();
        let access = initiators(file, target.initiator, &own, (targets.len(), &mut policies))
            .with_context(|| format!("the target {}", target.name))?;
        let (name, alias) = (target.name, target.alias);
        targets.push((IscsiTarget { name, alias, access }, places));
    }
    let has = |place: usize| targets.iter().any(|(_, places)| places.contains(&place));
    match (0..names.len()).find(|place| !has(*place)) {
        Some(place) => Err(refuse(format!("{} belongs to no target", names[place]))),
        None => Ok((targets, policies)),
    }
}

/// Who may log in to a target with disks of these names; what they may do goes to the policies of the target at that place.
fn initiators(
    file: &Path,
    initiators: Vec<Initiator>,
    names: &[&str],
    (place, policies): (usize, &mut Policies),
) -> anyhow::Result<Vec<Access>> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let refuse = |what: String| anyhow::Error::from(UsageError::new(format!("{}: {what}", file.display())));
    if initiators.is_empty() {
        return Err(refuse(
            "nobody may log in: write at least one [[initiator]]".to_owned(),
        ));
    }
    let mut list = Vec::new();
    for initiator in initiators {
        let name = initiator.name;
        if name != "*" {
            check_name(&name).map_err(|error| refuse(error.to_string()))?;
        }
        let luns = match initiator.disks {
            Some(disks) => Some(luns(&disks, names).map_err(|disk| {
                let known = names.join(", ");
                refuse(format!(
                    "{name} is to see {disk}, which is not served; there are {known}"
                ))
            })?),
            None => None,
        };
        if initiator.mutual.is_some() && initiator.chap.is_none() {
            return Err(refuse(format!("{name} has `mutual` without `chap`")));
        }
        if let Some(policy) = initiator.expanded_api {
            if name == "*" {
                return Err(refuse(
                    "those that are not named have no expanded-api: name who is to have it".to_owned(),
                ));
            }
            if !policy.allow.is_empty() && initiator.chap.is_none() {
                return Err(refuse(format!(
                    "{name} has rights in `expanded-api` and no `chap`: anyone could say that it is {name}"
                )));
            }
            policy
                .check()
                .map_err(|(key, error)| refuse(format!("{name}: expanded-api.{key} {error}")))?;
            policies.insert((place, name.clone()), policy);
        }
        let files = |user: Option<User>| user.map(|user| (user.user, folder.join(user.secret_file)));
        let (own, mutual) = (files(initiator.chap), files(initiator.mutual));
        let chap = chap(
            own.as_ref().map(|(user, file)| (user, file.as_path())),
            mutual.as_ref().map(|(user, file)| (user, file.as_path())),
        )?;
        list.push(Access {
            initiator: (name != "*").then_some(name),
            luns,
            chap,
        });
    }
    Ok(list)
}

/// LUNs of disks; the name of one that is not there.
fn luns(disks: &[String], names: &[&str]) -> Result<BTreeSet<u16>, String> {
    let lun = |disk: &String| {
        let place = names.iter().position(|name| name == disk);
        place
            .and_then(|place| u16::try_from(place).ok())
            .ok_or_else(|| disk.clone())
    };
    disks.iter().map(lun).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_who_sees_what() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), "0123456789abc\n").unwrap();
        let file = folder.path().join("access.toml");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write(
            "[[initiator]]\nname = \"iqn.2026-11.org.example:a\"\ndisks = [\"two\"]\nchap = { user = \"u\", secret-file = \"secret\" }\n\
             [[initiator]]\nname = \"*\"\n",
        );
        let (targets, _) = read(&file, &["one", "two"], "iqn.2026-11.org.example:t").unwrap();
        let [(target, places)] = targets.as_slice() else {
            panic!("{targets:?}")
        };
        assert_eq!(
            (target.name.as_str(), places.as_slice()),
            ("iqn.2026-11.org.example:t", &[0, 1][..])
        );
        let list = &target.access;
        assert_eq!(list[0].luns, Some([1].into()));
        assert_eq!(list[0].chap.as_ref().unwrap().user, "u");
        assert_eq!(list[1], Access::everybody());
        for (text, said) in [
            ("", "nobody may log in"),
            ("[[initiator]]\nname = \"a\"\n", "not an iSCSI name"),
            (
                "[[initiator]]\nname = \"*\"\ndisks = [\"three\"]\n",
                "there are one, two",
            ),
            (
                "[[initiator]]\nname = \"*\"\nmutual = { user = \"u\", secret-file = \"secret\" }\n",
                "without `chap`",
            ),
            ("[[initiator]]\nname = \"*\"\nlun = 3\n", "lun"),
            (
                "[[initiator]]\nname = \"*\"\nchap = { user = \"u\", secret-file = \"no\" }\n",
                "no",
            ),
        ] {
            write(text);
            let error = format!(
                "{:#}",
                read(&file, &["one", "two"], "iqn.2026-11.org.example:t").unwrap_err()
            );
            assert!(error.contains(said), "{error}");
        }
    }
    #[test]
    fn a_file_may_have_several_targets_with_their_own_disks_and_initiators() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("access.toml");
        let target = |name: &str, disks: &str, initiators: &str| {
            format!("[[target]]\nname = \"iqn.2026-11.org.example:{name}\"\ndisks = {disks}\n{initiators}")
        };
        let all = "[[target.initiator]]\nname = \"*\"\n";
        let one = "[[target.initiator]]\nname = \"iqn.2026-11.org.example:host\"\ndisks = [\"one\"]\n";
        let read = |text: String| {
            std::fs::write(&file, text).unwrap();
            super::read(&file, &["one", "two", "three"], "unused")
        };
        let good = target("a", "[\"three\", \"one\"]", one) + &target("b", "[\"two\"]", all);
        let (targets, _) = read(good).unwrap();
        assert_eq!(targets[0].1, [2, 0]);
        assert_eq!(targets[1].1, [1]);
        // LUNs are those of the target.
        assert_eq!(targets[0].0.access[0].luns, Some([1].into()));
        assert_eq!(targets[1].0.access, [Access::everybody()]);
        for (text, said) in [
            (
                target("a", "[\"one\", \"two\"]", all),
                "three belongs to no target",
            ),
            (
                target("a", "[\"one\", \"two\", \"three\"]", all) + &target("b", "[\"two\"]", all),
                "two is given twice",
            ),
            (target("a", "[\"four\"]", all), "there are one, two, three"),
            (
                target("a", "[\"one\", \"two\", \"three\"]", ""),
                "nobody may log in",
            ),
            (
                target("A", "[\"one\", \"two\", \"three\"]", all),
                "not an iSCSI name",
            ),
            (
                "[[initiator]]\nname = \"*\"\n".to_owned()
                    + &target("a", "[\"one\", \"two\", \"three\"]", all),
                "[[target.initiator]]",
            ),
        ] {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains(said), "{error}");
        }
    }
}
