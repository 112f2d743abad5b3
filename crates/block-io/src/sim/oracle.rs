//! The oracle: which content each sector of a disk or volume may have, from what was promised to its user.
//!
//! Every write makes a version of each of its sectors, with the time of its begin and of its end. A version is
//! *superseded* by another that began after it had ended and that was successful. So a read may return each version
//! that no other supersedes, where others count that had ended when the read began; that is what the trait
//! [`BlockDevice`](crate::BlockDevice) promises to concurrent requests. After a crash, only versions that are known to
//! be durable supersede: those written with FUA, and those that had ended when a completed flush began.

use std::collections::{BTreeMap, BTreeSet};

use super::rng::{fingerprint, hash_bytes};
use crate::Durability;

/// Names something that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

#[derive(Debug, Clone)]
struct Version {
    ticket: u64,
    /// Of the content; `None` matches anything (after a discard).
    content: Option<u64>,
    begin: u64,
    end: Option<u64>,
    /// Its end was a success, so it supersedes.
    successful: bool,
    durable: bool,
}

impl Version {
    fn supersedes(&self, older: &Self) -> bool {
        self.successful && older.end.is_some_and(|end| end < self.begin)
    }
}

/// What each sector may hold. The user of the disk tells it what it begins and what ends.
#[derive(Debug, Clone)]
pub struct SectorModel {
    sector: u64,
    time: u64,
    zero: u64,
    sectors: BTreeMap<u64, Vec<Version>>,
    /// Begun, not ended: range and durability of writes.
    writes: BTreeMap<u64, (u64, u64, Durability)>,
    /// Begun, not checked: what they may return must not be forgotten.
    reads: BTreeSet<u64>,
}

impl Default for SectorModel {
    fn default() -> Self {
        Self::new(512)
    }
}

impl SectorModel {
    /// A disk of zeroes with sectors of `sector` bytes.
    pub fn new(sector: u32) -> Self {
        Self {
            sector: sector.into(),
            time: 1,
            zero: hash_bytes(&vec![0; sector as usize]),
            sectors: BTreeMap::new(),
            writes: BTreeMap::new(),
            reads: BTreeSet::new(),
        }
    }

    fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// A write of `bytes` begins.
    pub fn write_begins(&mut self, offset: u64, bytes: &[u8], durability: Durability) -> Ticket {
        let size = usize::try_from(self.sector).unwrap_or(512);
        let contents: Vec<Option<u64>> = bytes
            .chunks(size)
            .map(|sector| Some(hash_bytes(sector)))
            .collect();
        self.begins(offset, contents.into_iter(), durability)
    }

    /// A range is being zeroed.
    pub fn zeroes_begin(&mut self, offset: u64, length: u64) -> Ticket {
        let content = Some(self.zero);
        let count = usize::try_from(length / self.sector).unwrap_or(0);
        self.begins(offset, std::iter::repeat_n(content, count), Durability::Volatile)
    }

    /// A range is being discarded.
    pub fn discard_begins(&mut self, offset: u64, length: u64) -> Ticket {
        let count = usize::try_from(length / self.sector).unwrap_or(0);
        self.begins(offset, std::iter::repeat_n(None, count), Durability::Volatile)
    }

    fn begins(
        &mut self,
        offset: u64,
        contents: impl Iterator<Item = Option<u64>>,
        durability: Durability,
    ) -> Ticket {
        let begin = self.tick();
        let first = offset / self.sector;
        let mut count = 0;
        for content in contents {
            let zero = Self::first_version(self.zero);
            let versions = self.sectors.entry(first + count).or_insert_with(|| vec![zero]);
            versions.push(Version {
                ticket: begin,
                content,
                begin,
                end: None,
                successful: false,
                durable: false,
            });
            count += 1;
        }
        self.writes.insert(begin, (first, count, durability));
        Ticket(begin)
    }

    fn first_version(content: u64) -> Version {
        Version {
            ticket: 0,
            content: Some(content),
            begin: 0,
            end: Some(0),
            successful: true,
            durable: true,
        }
    }

    /// A write, zeroing or discard was acknowledged.
    pub fn succeeded(&mut self, ticket: Ticket) {
        self.ends(ticket, true);
    }

    /// A write, zeroing or discard failed: each sector has the old or the new content.
    pub fn failed(&mut self, ticket: Ticket) {
        self.ends(ticket, false);
    }

    fn ends(&mut self, ticket: Ticket, successful: bool) {
        let end = self.tick();
        let oldest_read = self.oldest_read();
        let Some((first, count, durability)) = self.writes.remove(&ticket.0) else {
            return;
        };
        for (_, versions) in self.sectors.range_mut(first..first + count) {
            for version in versions.iter_mut().filter(|version| version.ticket == ticket.0) {
                version.end = Some(end);
                version.successful = successful;
                version.durable = successful && durability == Durability::Durable;
            }
            forget_superseded(versions, oldest_read);
        }
    }

    fn oldest_read(&self) -> u64 {
        self.reads.first().copied().unwrap_or(u64::MAX)
    }

    /// A flush begins.
    pub fn flush_begins(&mut self) -> Ticket {
        Ticket(self.tick())
    }

    /// A flush was acknowledged. One that failed promises nothing: do not call this.
    pub fn flushed(&mut self, ticket: Ticket) {
        let oldest_read = self.oldest_read();
        for versions in self.sectors.values_mut() {
            for version in versions.iter_mut() {
                version.durable |= version.successful && version.end.is_some_and(|end| end < ticket.0);
            }
            forget_superseded(versions, oldest_read);
        }
    }

    /// A read begins; the ticket goes to [`Self::check`].
    pub fn read_begins(&mut self) -> Ticket {
        let begin = self.tick();
        self.reads.insert(begin);
        Ticket(begin)
    }

    /// A read failed, so there is nothing to check.
    pub fn read_failed(&mut self, ticket: Ticket) {
        self.reads.remove(&ticket.0);
    }

    /// Whether a read that began with `ticket` and ends now may return `bytes`.
    ///
    /// # Errors
    /// The first sector with impossible content, described.
    pub fn check(&mut self, ticket: Ticket, offset: u64, bytes: &[u8]) -> Result<(), String> {
        self.reads.remove(&ticket.0);
        self.allows_since(ticket.0, offset, bytes)
    }

    /// As [`Self::check`], for a read during which nothing else happens.
    ///
    /// # Errors
    /// The first sector with impossible content, described.
    pub fn allows(&self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        self.allows_since(u64::MAX, offset, bytes)
    }

    fn allows_since(&self, begin: u64, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let size = usize::try_from(self.sector).unwrap_or(512);
        for (sector, content) in (offset / self.sector..).zip(bytes.chunks(size)) {
            let Some(versions) = self.sectors.get(&sector) else {
                if is_zero(content) {
                    continue;
                }
                return Err(format!("sector {sector}, never written, is not zero"));
            };
            let hash = hash_bytes(content);
            let ended = |version: &&Version| version.end.is_some_and(|end| end < begin);
            let possible = |version: &&Version| {
                version.content.is_none_or(|content| content == hash)
                    && !versions
                        .iter()
                        .filter(ended)
                        .any(|newer| newer.supersedes(version))
            };
            if !versions.iter().any(|version| possible(&version)) {
                let known = versions
                    .iter()
                    .rev()
                    .find(|version| version.content == Some(hash));
                let what = match known {
                    Some(version) if version.ticket == 0 => "the content that it had at the start".to_owned(),
                    Some(version) => format!("the content of the write begun at time {}", version.ticket),
                    None => "content that no write put there, or long overwritten".to_owned(),
                };
                let newest = versions.last().map_or(0, |version| version.ticket);
                return Err(format!(
                    "sector {sector} has {what}, which is not allowed; the newest write began at time {newest}"
                ));
            }
        }
        Ok(())
    }

    /// The process was killed and the power has stayed: all that had ended is there, and of the rest anything may be.
    pub fn killed(&mut self) {
        for version in self.sectors.values_mut().flatten() {
            version.durable |= version.successful;
        }
        self.crashed();
    }

    /// The power was cut: of what was not durable, anything may be there.
    pub fn crashed(&mut self) {
        let end = self.tick();
        self.writes.clear();
        self.reads.clear();
        for versions in self.sectors.values_mut() {
            forget_superseded(versions, u64::MAX);
            // Of those that are left, none supersedes any other.
            for version in versions.iter_mut() {
                version.begin = 0;
                version.end = Some(end);
                version.durable = false;
            }
        }
    }

    /// Of what may be read after a crash now, for [`Scenario::fingerprint`](super::Scenario::fingerprint): equal if
    /// [`Self::crashed`] leaves the same knowledge.
    pub fn fingerprint(&self) -> u64 {
        let mut after = self.clone();
        after.crashed();
        after.known()
    }

    /// As [`Self::fingerprint`], for [`Self::killed`].
    pub fn killed_fingerprint(&self) -> u64 {
        let mut after = self.clone();
        after.killed();
        after.known()
    }

    fn known(&self) -> u64 {
        let sectors = self.sectors.iter().map(|(sector, versions)| {
            let mut contents: Vec<_> = versions.iter().map(|version| version.content).collect();
            contents.sort_unstable();
            contents.dedup();
            (sector, contents)
        });
        fingerprint(&sectors.collect::<Vec<_>>())
    }

    /// The range was read after a crash: this is its durable content from now on. Call it if the system promises that
    /// what was read once does not go away in the next crash.
    pub fn settle(&mut self, offset: u64, bytes: &[u8]) {
        let size = usize::try_from(self.sector).unwrap_or(512);
        for (sector, content) in (offset / self.sector..).zip(bytes.chunks(size)) {
            let versions = self.sectors.entry(sector).or_default();
            versions.clear();
            versions.push(Self::first_version(hash_bytes(content)));
        }
    }

    /// Whether each sector can have one content only, so that [`Self::settle`] would tell it nothing.
    pub fn is_certain(&self) -> bool {
        let certain = |versions: &Vec<Version>| matches!(versions.as_slice(), [one] if one.content.is_some());
        self.sectors.values().all(certain)
    }

    /// Bytes from the first to the last sector that was ever written: what a check must read.
    pub fn written(&self) -> impl Iterator<Item = u64> {
        self.sectors.keys().map(|sector| sector * self.sector)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // Without branches within a block, so that the compiler can take many bytes at once.
    bytes
        .chunks(512)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Versions that a durable one supersedes can never be seen again, but by reads that began before that one ended.
fn forget_superseded(versions: &mut Vec<Version>, oldest_read: u64) {
    if versions.len() < 2 {
        return;
    }
    let is_final = |version: &&Version| version.durable && version.end.is_some_and(|end| end < oldest_read);
    let durable: Vec<Version> = versions.iter().filter(is_final).cloned().collect();
    versions.retain(|version| !durable.iter().any(|newer| newer.supersedes(version)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(model: &mut SectorModel, byte: u8) -> bool {
        let read = model.read_begins();
        model.check(read, 0, &[byte; 512]).is_ok()
    }

    #[test]
    fn a_read_sees_the_last_completed_write_or_a_concurrent_one() {
        let mut model = SectorModel::new(512);
        let one = model.write_begins(0, &[1; 512], Durability::Volatile);
        assert!(allows(&mut model, 0) && allows(&mut model, 1) && !allows(&mut model, 2));
        model.succeeded(one);
        assert!(!allows(&mut model, 0) && allows(&mut model, 1));
        let two = model.write_begins(0, &[2; 512], Durability::Volatile);
        model.failed(two);
        assert!(allows(&mut model, 1) && allows(&mut model, 2) && !allows(&mut model, 0));
    }

    #[test]
    fn a_crash_goes_back_to_what_was_flushed_but_no_further() {
        let mut model = SectorModel::new(512);
        for value in 1..=4 {
            let write = model.write_begins(0, &[value; 512], Durability::Volatile);
            model.succeeded(write);
            if value == 2 {
                let flush = model.flush_begins();
                model.flushed(flush);
            }
        }
        assert!(!allows(&mut model, 3));
        model.crashed();
        let allowed: Vec<u8> = (0..6).filter(|value| allows(&mut model, *value)).collect();
        assert_eq!(allowed, [2, 3, 4]);
        assert!(!model.is_certain() && model.allows(0, &[4; 512]).is_ok());
        model.settle(0, &[3; 512]);
        assert!(allows(&mut model, 3) && !allows(&mut model, 4));
        assert!(model.is_certain() && model.allows(0, &[4; 512]).is_err());
        // What was never written is zero.
        assert!(model.allows(512, &[0; 512]).is_ok() && model.allows(512, &[1; 512]).is_err());
    }

    #[test]
    fn fingerprints_are_equal_when_a_crash_leaves_the_same() {
        let write = |model: &mut SectorModel, value| {
            let write = model.write_begins(0, &[value; 512], Durability::Volatile);
            model.succeeded(write);
        };
        let flush = |model: &mut SectorModel| {
            let flush = model.flush_begins();
            model.flushed(flush);
        };
        let mut model = SectorModel::new(512);
        let blank = model.fingerprint();
        write(&mut model, 1);
        let volatile = model.fingerprint();
        flush(&mut model);
        let durable = model.fingerprint();
        assert!(blank != volatile && volatile != durable && blank != durable);
        let mut other = SectorModel::new(512);
        for value in [2, 2, 1] {
            write(&mut other, value);
        }
        assert_ne!(other.fingerprint(), volatile);
        flush(&mut other);
        assert_eq!(other.fingerprint(), durable);
        // A read makes no difference, and knowing that the write has ended makes none as long as it is not durable.
        let read = other.read_begins();
        other.write_begins(512, &[3; 512], Durability::Volatile);
        let begun = other.fingerprint();
        assert!(other.check(read, 0, &[1; 512]).is_ok());
        assert_eq!(other.fingerprint(), begun);
        write(&mut model, 1);
        assert_eq!(model.fingerprint(), durable);
    }

    #[test]
    fn a_flush_promises_nothing_for_writes_that_end_after_its_begin() {
        let mut model = SectorModel::new(512);
        let write = model.write_begins(0, &[1; 512], Durability::Volatile);
        let flush = model.flush_begins();
        model.succeeded(write);
        model.flushed(flush);
        model.crashed();
        assert!(allows(&mut model, 0) && allows(&mut model, 1));
    }

    #[test]
    fn a_discarded_range_may_read_as_anything_until_it_is_written() {
        let mut model = SectorModel::new(512);
        let discard = model.discard_begins(0, 512);
        model.succeeded(discard);
        assert!(allows(&mut model, 77));
        let write = model.write_begins(0, &[1; 512], Durability::Durable);
        model.succeeded(write);
        model.crashed();
        assert!(allows(&mut model, 1) && !allows(&mut model, 0) && !allows(&mut model, 77));
    }
}
