//! As whom machines' processes run.
//!
//! A machine has a user of its own, which is a number out of a range that nobody else uses, as with containers: no account is made for it. The
//! number is kept with the definition, and no two machines have the same. It is looked for from a place that follows from the machine's name, so
//! that one that is deleted and defined anew mostly has its number again, and another one mostly does not get what is left of it.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;

use api::VmName;
use crc_fast::{CrcAlgorithm, checksum};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Deserializer};

use crate::accounts;

/// Numbers that neither accounts, nor useradd's ranges for containers (up to 600100000), nor systemd's (up to 1879048191) take.
const USUAL: RangeInclusive<u32> = 1_900_000_000..=1_900_065_535;
/// What gives a process another user, and lets it open what its machine's definition names.
const NEEDED: CapabilitySet = CapabilitySet::SETUID
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::DAC_OVERRIDE);

/// `machines.users` of host.toml.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Users {
    /// One for each machine, out of a range that is usually free, if the manager is root.
    #[default]
    Usual,
    /// One for each machine, out of these.
    Range(RangeInclusive<u32>),
    /// An account of the host, for all machines.
    Account(String),
    /// The manager's own.
    Manager,
}

impl<'de> Deserialize<'de> for Users {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).map_err(serde::de::Error::custom)
    }
}

fn parse(text: &str) -> Result<Users, String> {
    if text == "manager" {
        return Ok(Users::Manager);
    }
    if !text.starts_with(|first: char| first.is_ascii_digit()) {
        return match text.is_empty() {
            true => {
                Err("is empty; give a range like \"200000-265535\", an account, or \"manager\"".to_owned())
            }
            false => Ok(Users::Account(text.to_owned())),
        };
    }
    let range = text.split_once('-').and_then(|(first, last)| {
        let (first, last) = (
            first.trim().parse::<u32>().ok()?,
            last.trim().parse::<u32>().ok()?,
        );
        // The highest number means nobody.
        (first >= 1000 && first <= last && last < u32::MAX).then_some(first..=last)
    });
    let wrong = || format!("`{text}` is no range of users; give one like \"200000-265535\", from 1000 on");
    range.map(Users::Range).ok_or_else(wrong)
}

/// Whom a process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What the manager can do about users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum UserPlan {
    /// Nothing: machines run as the manager.
    Own,
    Each(RangeInclusive<u32>),
    All(User),
}

impl UserPlan {
    /// What can be done of what is wanted; if it is less, why.
    ///
    /// # Errors
    /// There is no such account.
    pub(crate) fn new(wanted: &Users) -> Result<(Self, Option<String>), String> {
        let plan = match wanted {
            Users::Manager => return Ok((Self::Own, None)),
            Users::Usual => Self::Each(USUAL),
            Users::Range(range) => Self::Each(range.clone()),
            Users::Account(name) => Self::All(account(name)?),
        };
        let has = rustix::thread::capabilities(None);
        if !has.is_ok_and(|has| has.effective.contains(NEEDED)) {
            let text = "machines run as the manager's user, and are not kept apart by users: the manager is not root";
            return Ok((Self::Own, Some(text.to_owned())));
        }
        let highest = match &plan {
            Self::Each(range) => *range.end(),
            Self::All(user) => user.uid.max(user.gid),
            Self::Own => 0,
        };
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        if !is_mapped(&map, highest) {
            let text = format!(
                "machines run as the manager's user, and are not kept apart by users: in this container there is no user {highest}; \
                 name a range that it has by machines.users in host.toml"
            );
            return Ok((Self::Own, Some(text)));
        }
        Ok((plan, None))
    }

    /// The user of a machine that has had `had`, where others have those that are `taken`. None: the manager's own.
    ///
    /// # Errors
    /// All are taken.
    pub(crate) fn user(
        &self,
        name: &VmName,
        had: Option<u32>,
        taken: &BTreeSet<u32>,
    ) -> Result<Option<User>, String> {
        let range = match self {
            Self::Own => return Ok(None),
            Self::All(user) => return Ok(Some(*user)),
            Self::Each(range) => range,
        };
        let same = |number| User {
            uid: number,
            gid: number,
        };
        if let Some(had) = had
            && range.contains(&had)
            && !taken.contains(&had)
        {
            return Ok(Some(same(had)));
        }
        let (first, count) = (*range.start(), u64::from(range.end() - range.start()) + 1);
        let begin = checksum(CrcAlgorithm::Crc64Nvme, name.as_str().as_bytes()) % count;
        let number = |step: u64| first + u32::try_from((begin + step) % count).unwrap_or(0);
        let free = (0..count).map(number).find(|number| !taken.contains(number));
        let full = || format!("all {count} users of machines.users in host.toml are taken");
        free.map(|number| Some(same(number))).ok_or_else(full)
    }
}

/// Whether /proc/self/uid_map has a user.
fn is_mapped(map: &str, user: u32) -> bool {
    // Without the file there are no namespaces.
    map.is_empty() || map.lines().any(|line| {
        let numbers: Vec<u64> = line
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        matches!(numbers.as_slice(), [first, _, count] if (*first..first + count).contains(&u64::from(user)))
    })
}

/// An account of the host.
fn account(name: &str) -> Result<User, String> {
    match accounts::user(name).map_err(|error| format!("machines.users: {error}"))? {
        User { uid: 0, .. } => Err(format!("machines.users: `{name}` is root; \"manager\" says that")),
        user => Ok(user),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_host_toml_says() {
        assert_eq!(parse("200000-265535"), Ok(Users::Range(200_000..=265_535)));
        assert_eq!(parse("manager"), Ok(Users::Manager));
        assert_eq!(parse("libvirt-qemu"), Ok(Users::Account("libvirt-qemu".into())));
        for wrong in ["", "7", "5-9", "3000-2000", "1000-4294967295", "1000-x"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(UserPlan::new(&Users::Account("no-such-account".into())).is_err());
        assert!(UserPlan::new(&Users::Account("root".into())).is_err());
        assert_eq!(UserPlan::new(&Users::Manager), Ok((UserPlan::Own, None)));
    }

    #[test]
    fn no_two_machines_have_one_user_and_each_keeps_its_own() {
        let plan = UserPlan::Each(5000..=5003);
        let mut taken = BTreeSet::new();
        let names: Vec<VmName> = ["a", "b", "c", "d", "e"].map(|name| name.parse().unwrap()).into();
        for name in &names[..4] {
            let user = plan.user(name, None, &taken).unwrap().unwrap();
            assert!((5000..=5003).contains(&user.uid) && user.gid == user.uid);
            assert!(taken.insert(user.uid), "{user:?}");
        }
        assert!(plan.user(&names[4], None, &taken).is_err());
        taken.remove(&5002);
        assert_eq!(plan.user(&names[4], None, &taken).unwrap().unwrap().uid, 5002);
        assert_eq!(
            plan.user(&names[0], Some(5002), &taken).unwrap().unwrap().uid,
            5002
        );
        // One that it had by another configuration, or that another machine has by now.
        taken.insert(5002);
        taken.remove(&5001);
        for had in [9, 5002] {
            assert_eq!(
                plan.user(&names[0], Some(had), &taken).unwrap().unwrap().uid,
                5001
            );
        }
        let same = User { uid: 64055, gid: 108 };
        assert_eq!(UserPlan::All(same).user(&names[0], None, &taken), Ok(Some(same)));
        assert_eq!(UserPlan::Own.user(&names[0], Some(5000), &taken), Ok(None));
    }

    #[test]
    fn a_container_may_have_few_users() {
        assert!(is_mapped("         0          0 4294967295\n", 1_900_065_535));
        assert!(!is_mapped("0 100000 65536", 1_900_065_535));
        assert!(is_mapped("0 100000 65536\n200000 400000 65536", 265_535));
    }
}
