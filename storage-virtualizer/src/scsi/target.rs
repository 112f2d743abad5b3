//! The logical units of a target, and which initiator sees which of them.
//!
//! ```text
//!   transport ── connect(nexus, visible) ──► Target ── LUN n ──► unit, and what the transport keeps with it (its disk)
//!                                              │
//!      add, remove: REPORTED LUNS DATA HAS CHANGED for each nexus, on each unit that it sees
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use super::sense::{Code, Sense};
use super::transfer::Moved;
use super::unit::{Reset, Unit};
use super::{Check, Command, Fail, Nexus, Outcome, inquiry, report};

/// LUNs are below this: what flat addressing can say (SAM-5 §4.7.7.4).
pub const MAX_LUNS: u16 = 1 << 14;

/// A LUN cannot be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// It is in use.
    #[error("LUN {lun} is in use: choose another")]
    InUse {
        /// The LUN.
        lun: u16,
    },
    /// It cannot be addressed.
    #[error("LUN {lun} is not below {MAX_LUNS}")]
    TooHigh {
        /// The LUN.
        lun: u16,
    },
}

/// LUNs that a nexus may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Visible {
    /// All of the target.
    All,
    /// Those of these that exist.
    Only(BTreeSet<u16>),
}

impl Visible {
    fn has(&self, lun: u16) -> bool {
        match self {
            Self::All => true,
            Self::Only(luns) => luns.contains(&lun),
        }
    }
}

/// A logical unit of a target.
#[derive(Debug)]
pub struct Lun<H> {
    /// Its number.
    pub number: u16,
    /// The unit.
    pub unit: Arc<Unit>,
    /// What the transport keeps with it: how it gets at the disk.
    pub handle: H,
}

/// What a command is addressed to.
#[derive(Debug)]
pub enum Found<H> {
    /// A logical unit: [`super::execute`].
    Lun(Arc<Lun<H>>),
    /// No unit, or none for this nexus, or the well-known LUN of REPORT LUNS: [`execute_without_unit`].
    Absent {
        /// It is the well-known LUN.
        well_known: bool,
    },
}

#[derive(Debug)]
struct Table<H> {
    luns: BTreeMap<u16, Arc<Lun<H>>>,
    nexuses: Vec<(Weak<Nexus>, Visible)>,
}

/// A target: logical units by number. `H` is what the transport keeps with each.
#[derive(Debug)]
pub struct Target<H> {
    table: RwLock<Table<H>>,
    generation: AtomicU64,
}

impl<H> Default for Target<H> {
    fn default() -> Self {
        Self {
            table: RwLock::new(Table {
                luns: BTreeMap::new(),
                nexuses: Vec::new(),
            }),
            generation: AtomicU64::new(0),
        }
    }
}

impl<H> Table<H> {
    /// LUNs that `visible` lets through.
    fn seen(&self, visible: &Visible) -> Arc<[u16]> {
        self.luns
            .keys()
            .copied()
            .filter(|lun| visible.has(*lun))
            .collect()
    }

    /// Shows each nexus what it sees now. Those whose list has changed are told, on all units that they see.
    fn refresh(&mut self) {
        self.nexuses.retain(|(nexus, _)| nexus.strong_count() > 0);
        for (nexus, visible) in &self.nexuses {
            let Some(nexus) = nexus.upgrade() else { continue };
            let seen = self.seen(visible);
            let before = nexus.visible();
            if before == seen {
                continue;
            }
            for lun in seen.iter().filter_map(|lun| self.luns.get(lun)) {
                lun.unit.with(|state| {
                    let is_new = !before.contains(&lun.number);
                    let state = state.nexus(&nexus);
                    // That power came on says it all for a new one.
                    if !is_new {
                        state.attend(Code::REPORTED_LUNS_CHANGED);
                    }
                });
            }
            nexus.show(seen);
        }
    }
}

impl<H> Target<H> {
    fn read(&self) -> RwLockReadGuard<'_, Table<H>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table<H>> {
        let table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: whoever sees the new generation finds what it is about.
        self.generation.fetch_add(1, Ordering::Release);
        table
    }

    /// Changes whenever [`Self::find`] may answer otherwise: who remembers its answers looks here first.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Adds a logical unit. All nexuses that see it are told.
    ///
    /// # Errors
    /// The LUN is in use or impossible.
    pub fn add(&self, number: u16, unit: Arc<Unit>, handle: H) -> Result<Arc<Lun<H>>, TargetError> {
        if number >= MAX_LUNS {
            return Err(TargetError::TooHigh { lun: number });
        }
        let mut table = self.write();
        if table.luns.contains_key(&number) {
            return Err(TargetError::InUse { lun: number });
        }
        let lun = Arc::new(Lun { number, unit, handle });
        table.luns.insert(number, Arc::clone(&lun));
        table.refresh();
        Ok(lun)
    }

    /// Removes a logical unit; commands that found it before go on. All nexuses that saw it are told.
    pub fn remove(&self, number: u16) -> Option<Arc<Lun<H>>> {
        let mut table = self.write();
        let lun = table.luns.remove(&number)?;
        table.refresh();
        Some(lun)
    }

    /// A nexus has come, which may see `visible`. It is a part of the target as long as its owner holds it.
    pub fn connect(&self, nexus: &Arc<Nexus>, visible: Visible) {
        let mut table = self.write();
        table.nexuses.push((Arc::downgrade(nexus), visible));
        table.refresh();
    }

    /// Changes what a nexus sees.
    pub fn set_visible(&self, nexus: &Nexus, visible: Visible) {
        let mut table = self.write();
        for (other, own) in &mut table.nexuses {
            if std::ptr::eq(other.as_ptr(), nexus) {
                *own = visible.clone();
            }
        }
        table.refresh();
    }

    /// A nexus has gone (SAM-5 §6.3.4).
    pub fn disconnect(&self, nexus: &Nexus) {
        let mut table = self.write();
        table
            .nexuses
            .retain(|(other, _)| !std::ptr::eq(other.as_ptr(), nexus));
        for lun in table.luns.values() {
            lun.unit.detach(nexus);
        }
    }

    /// What the eight bytes of a LUN field mean to `nexus`.
    pub fn find(&self, nexus: &Nexus, address: [u8; 8]) -> Found<H> {
        let table = self.read();
        match decode_lun(address) {
            Some(number) if nexus.visible().binary_search(&number).is_ok() => match table.luns.get(&number) {
                Some(lun) => Found::Lun(Arc::clone(lun)),
                None => Found::Absent { well_known: false },
            },
            _ => Found::Absent {
                well_known: address == report::WELL_KNOWN_LUN,
            },
        }
    }

    /// All logical units, by number.
    pub fn luns(&self) -> Vec<Arc<Lun<H>>> {
        self.read().luns.values().cloned().collect()
    }

    /// TARGET RESET, or the transport's hard reset: all units.
    pub fn reset(&self) {
        self.luns().iter().for_each(|lun| lun.unit.reset(Reset::Target));
    }

    /// I_T NEXUS RESET (SAM-5 §7.7).
    pub fn reset_nexus(&self, nexus: &Nexus) {
        for lun in self.luns() {
            if nexus.visible().binary_search(&lun.number).is_ok() {
                lun.unit.reset_nexus(nexus);
            }
        }
    }
}

/// Executes a command to a LUN that has no unit (SPC-4 §6.6.2, §6.33, §6.39), or to the well-known one.
pub fn execute_without_unit(nexus: &Nexus, command: &Command<'_>, well_known: bool) -> Outcome {
    match without_unit(nexus, command, well_known) {
        Ok(moved) => Outcome::good(moved),
        Err(Fail::Sense(sense)) => Outcome::check(sense, false),
        Err(Fail::Conflict) => Outcome::conflict(),
    }
}

fn without_unit(nexus: &Nexus, command: &Command<'_>, well_known: bool) -> Check<Moved> {
    match command.cdb.first() {
        Some(0x12) => inquiry::absent(command, well_known),
        Some(0xa0) => report::report_luns(command, nexus),
        Some(0x03) if well_known => Ok(report::request_sense_well_known(command)),
        Some(0x03) => Ok(report::request_sense_absent(command)),
        Some(0x00) if well_known => Ok(Moved::NOTHING),
        _ if well_known => Err(Sense::illegal(Code::INVALID_OPERATION_CODE)
            .at(true, 0, None)
            .into()),
        _ => Err(Sense::illegal(Code::LOGICAL_UNIT_NOT_SUPPORTED).into()),
    }
}

/// The LUN field for logical unit `number`: peripheral addressing where it is possible, flat elsewhere (SAM-5 §4.7).
pub fn encode_lun(number: u16) -> [u8; 8] {
    let [high, low] = number.to_be_bytes();
    let method = if number < 256 { 0x00 } else { 0x40 };
    [method | (high & 0x3f), low, 0, 0, 0, 0, 0, 0]
}

/// The logical unit that a LUN field means; none if it is of another kind, or of a second level.
pub fn decode_lun(address: [u8; 8]) -> Option<u16> {
    if address[2..] != [0; 6] {
        return None;
    }
    match address[0] >> 6 {
        // Bus 0 only.
        0 if address[0] == 0 => Some(address[1].into()),
        1 => Some(u16::from_be_bytes([address[0] & 0x3f, address[1]])),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::{Identity, TransportId, UnitOptions};

    fn unit(name: &str) -> Arc<Unit> {
        Arc::new(Unit::new(UnitOptions::new(Identity::from_name(name, name))))
    }

    fn nexus(address: u64) -> Arc<Nexus> {
        Arc::new(Nexus::new(TransportId::sas(address), 1))
    }

    fn attentions(unit: &Unit, nexus: &Nexus) -> Vec<Code> {
        unit.with(|state| state.nexus(nexus).attentions.drain(..).collect())
    }

    #[test]
    fn lun_fields_are_peripheral_or_flat() {
        assert_eq!(encode_lun(255), [0, 255, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode_lun(0x3fff), [0x7f, 0xff, 0, 0, 0, 0, 0, 0]);
        for number in [0, 1, 255, 256, 0x3fff] {
            assert_eq!(decode_lun(encode_lun(number)), Some(number));
        }
        // Flat addressing of a low number; another bus; a second level; a well-known LUN.
        assert_eq!(decode_lun([0x40, 3, 0, 0, 0, 0, 0, 0]), Some(3));
        assert_eq!(decode_lun([0x01, 3, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(decode_lun([0, 3, 0, 1, 0, 0, 0, 0]), None);
        assert_eq!(decode_lun(report::WELL_KNOWN_LUN), None);
    }

    #[test]
    fn a_nexus_sees_its_luns_and_is_told_of_changes() {
        let target = Target::default();
        let (all, some) = (nexus(1), nexus(2));
        let units: Vec<_> = (0..3).map(|number| unit(&format!("u{number}"))).collect();
        target.add(0, Arc::clone(&units[0]), ()).unwrap();
        target.connect(&all, Visible::All);
        target.connect(&some, Visible::Only([0, 300].into()));
        for nexus in [&all, &some] {
            assert_eq!(attentions(&units[0], nexus), [Code::POWER_ON_OCCURRED]);
        }
        let generation = target.generation();
        target.add(7, Arc::clone(&units[1]), ()).unwrap();
        assert_ne!(target.generation(), generation);
        assert_eq!(attentions(&units[0], &all), [Code::REPORTED_LUNS_CHANGED]);
        assert_eq!(attentions(&units[1], &all), [Code::POWER_ON_OCCURRED]);
        assert_eq!(attentions(&units[0], &some), []);
        target.add(300, Arc::clone(&units[2]), ()).unwrap();
        assert_eq!(attentions(&units[0], &some), [Code::REPORTED_LUNS_CHANGED]);
        assert_eq!(*all.visible(), [0, 7, 300]);
        assert_eq!(*some.visible(), [0, 300]);
        assert!(matches!(
            target.find(&some, encode_lun(7)),
            Found::Absent { well_known: false }
        ));
        assert!(matches!(target.find(&all, encode_lun(7)), Found::Lun(lun) if lun.number == 7));
        target.remove(7).unwrap();
        assert_eq!(attentions(&units[0], &all), [Code::REPORTED_LUNS_CHANGED]);
        assert!(matches!(
            target.find(&all, encode_lun(7)),
            Found::Absent { well_known: false }
        ));
        assert!(matches!(
            target.find(&all, report::WELL_KNOWN_LUN),
            Found::Absent { well_known: true }
        ));
        assert_eq!(
            target.add(0, unit("x"), ()).err(),
            Some(TargetError::InUse { lun: 0 })
        );
        assert_eq!(
            target.add(MAX_LUNS, unit("x"), ()).err(),
            Some(TargetError::TooHigh { lun: MAX_LUNS })
        );
    }
}
