//! Where the disks of a machine sit on its SCSI adapter.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{DiskBus, DiskConfig, InvalidValue};

/// Target and LUN.
pub type ScsiPlace = (u8, u16);

/// LUNs of a target (SAM-5 §4.7.4, flat addressing).
pub const MAX_LUNS: u16 = 16_384;
/// Targets of an adapter.
pub const MAX_TARGETS: u16 = 255;

/// How a target gives access to a disk that several targets show (SPC-4 §5.15.2.4): what initiators see as asymmetric logical unit
/// access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ScsiAccess {
    /// Fully.
    #[default]
    Optimized,
    /// Fully, but another way is the better one.
    NonOptimized,
    /// Not to the data.
    Standby,
    /// Hardly at all.
    Unavailable,
}

impl ScsiAccess {
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A further way to a disk: a `[[disk.path]]` of vm.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ScsiPath {
    /// The target that shows the disk as well.
    #[schemars(range(max = 254))]
    pub target: u8,
    /// Its LUN there; by default that of the first way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 16383))]
    pub lun: Option<u16>,
    /// How this way gives access.
    #[serde(default, skip_serializing_if = "ScsiAccess::is_default")]
    pub access: ScsiAccess,
}

impl DiskConfig {
    /// Most further ways to a disk.
    pub const MAX_PATHS: usize = 7;

    /// Checks what is said of the disk's place on a SCSI adapter.
    pub(crate) fn check_scsi(&self) -> Result<(), (&'static str, InvalidValue)> {
        let keys = [
            ("target", self.target.is_some()),
            ("lun", self.lun.is_some()),
            ("access", !self.access.is_default()),
            ("path", !self.paths.is_empty()),
        ];
        if self.bus != DiskBus::VirtioScsi {
            let set = keys.into_iter().find(|(_, set)| *set);
            return set.map_or(Ok(()), |(key, _)| {
                let text = "is for disks with bus = \"virtio-scsi\"";
                Err((key, InvalidValue::new(text)))
            });
        }
        let luns = self.paths.iter().filter_map(|path| path.lun).chain(self.lun);
        if let Some(lun) = luns.into_iter().find(|lun| *lun >= MAX_LUNS) {
            let text = format!("{lun} is not a LUN; use 0 to {}", MAX_LUNS - 1);
            return Err(("lun", InvalidValue::new(text)));
        }
        let targets = self.paths.iter().map(|path| path.target).chain(self.target);
        if targets.into_iter().any(|target| u16::from(target) >= MAX_TARGETS) {
            let text = format!("an adapter has targets 0 to {}", MAX_TARGETS - 1);
            return Err(("target", InvalidValue::new(text)));
        }
        if self.paths.len() > Self::MAX_PATHS {
            let text = format!(
                "a disk has at most {} further ways, not {}",
                Self::MAX_PATHS,
                self.paths.len()
            );
            return Err(("path", InvalidValue::new(text)));
        }
        if self.paths.is_empty() && !self.access.is_default() {
            let text = "is for a disk with several ways: give it a [[disk.path]]";
            return Err(("access", InvalidValue::new(text)));
        }
        let own = BTreeSet::from([self.target.unwrap_or(0)]);
        let targets = self.paths.iter().map(|path| path.target);
        let all: BTreeSet<u8> = targets.chain(own).collect();
        if all.len() <= self.paths.len() {
            let text = "each way to a disk goes by a target of its own";
            return Err(("path", InvalidValue::new(text)));
        }
        Ok(())
    }

    /// The places that are given, or were [taken](Self::take_places): the disk's own first, then those of the further ways.
    pub fn places(&self) -> Vec<ScsiPlace> {
        let Some(lun) = self.lun else { return Vec::new() };
        let own = (self.target.unwrap_or(0), lun);
        let others = self.paths.iter();
        let others = others.map(|path| (path.target, path.lun.unwrap_or(lun)));
        std::iter::once(own).chain(others).collect()
    }

    /// Chooses what is not given of the places of a SCSI disk, beside what is `taken`: by default the first LUN of target 0 that is
    /// free. The places are taken then.
    ///
    /// # Errors
    /// One that is given is taken, or none is left: the key, and why.
    pub fn take_places(
        &mut self,
        taken: &mut BTreeSet<ScsiPlace>,
    ) -> Result<(), (&'static str, InvalidValue)> {
        let target = self.target.unwrap_or(0);
        let is_free = |lun: u16| {
            let others = self.paths.iter();
            let mut others = others.map(|path| (path.target, path.lun.unwrap_or(lun)));
            !taken.contains(&(target, lun)) && others.all(|place| !taken.contains(&place))
        };
        let lun = match self.lun {
            Some(lun) if is_free(lun) => lun,
            Some(lun) => {
                let text = format!("another disk has LUN {lun} of target {target}, or of a further way");
                return Err(("lun", InvalidValue::new(text)));
            }
            None => (0..MAX_LUNS).find(|lun| is_free(*lun)).ok_or_else(|| {
                let text = format!("no LUN of target {target} is free");
                ("lun", InvalidValue::new(text))
            })?,
        };
        (self.target, self.lun) = (Some(target), Some(lun));
        for path in &mut self.paths {
            path.lun = path.lun.or(Some(lun));
        }
        taken.extend(self.places());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(target: Option<u8>, lun: Option<u16>) -> DiskConfig {
        DiskConfig {
            bus: DiskBus::VirtioScsi,
            target,
            lun,
            ..DiskConfig::new("/a")
        }
    }

    fn path(target: u8, lun: Option<u16>) -> ScsiPath {
        ScsiPath {
            target,
            lun,
            access: ScsiAccess::NonOptimized,
        }
    }

    #[test]
    fn places_that_are_not_given_are_the_first_that_are_free() {
        let mut taken = BTreeSet::from([(0, 0), (0, 2), (1, 3)]);
        for (mut disk, expected) in [
            (disk(None, None), vec![(0, 1)]),
            (disk(Some(1), None), vec![(1, 0)]),
            (disk(Some(1), Some(7)), vec![(1, 7)]),
            // LUN 3 of target 1 is taken: both ways get 4.
            (
                DiskConfig {
                    paths: vec![path(1, None)],
                    ..disk(None, None)
                },
                vec![(0, 4), (1, 4)],
            ),
            (
                DiskConfig {
                    paths: vec![path(2, Some(9))],
                    ..disk(None, None)
                },
                vec![(0, 3), (2, 9)],
            ),
        ] {
            assert_eq!(disk.check_scsi(), Ok(()));
            disk.take_places(&mut taken).unwrap();
            assert_eq!(disk.places(), expected);
            let again = disk.take_places(&mut taken).unwrap_err();
            assert_eq!(again.0, "lun", "{again:?}");
        }
    }

    #[test]
    fn what_a_place_cannot_be_is_refused_with_its_key() {
        let blk = DiskConfig {
            lun: Some(1),
            ..DiskConfig::new("/a")
        };
        let paths = |paths| DiskConfig {
            paths,
            ..disk(None, None)
        };
        let alone = DiskConfig {
            access: ScsiAccess::Standby,
            ..disk(None, None)
        };
        for (disk, key) in [
            (blk, "lun"),
            (disk(None, Some(MAX_LUNS)), "lun"),
            (disk(Some(255), None), "target"),
            (paths(vec![path(0, None)]), "path"),
            (paths(vec![path(1, None), path(1, Some(2))]), "path"),
            (paths((1..=8).map(|target| path(target, None)).collect()), "path"),
            (alone, "access"),
        ] {
            assert_eq!(disk.check_scsi().map_err(|(key, _)| key), Err(key), "{disk:?}");
        }
    }
}
