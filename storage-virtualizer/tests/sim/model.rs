//! What was promised about the disks.
//!
//! Each *writer* writes to all disks in turn, at places of its own, and begins nothing before its last request has ended. So what it has
//! written is a log, and any one moment shows a beginning of that log, on all disks: that is how a snapshot of several disks is
//! known to be of one moment. What a crash leaves of a disk is less certain: each place has what was last flushed, or something later.

use std::collections::BTreeMap;

use block_io::sim::Failure;

use crate::harness::{Block, whole};

/// Disks of a history.
pub(crate) const DISKS: usize = 2;
pub(crate) const WRITERS: usize = 3;
/// Blocks of a disk that a writer has for itself, one after the other.
pub(crate) const OWN: u64 = 12;
/// Blocks that are written at all.
pub(crate) const PLACES: u64 = WRITERS as u64 * OWN;

/// What all places of a disk have.
pub(crate) type Content = Vec<Block>;

/// A request of a writer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) disk: usize,
    pub(crate) place: u64,
    pub(crate) value: Block,
}

/// What a writer has done since its log was begun.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log {
    /// The last one may be under way.
    pub(crate) entries: Vec<Entry>,
    pub(crate) acknowledged: usize,
}

/// What a place may have after a crash: what was flushed, and everything since.
#[derive(Debug, Clone)]
struct Place {
    may: Vec<Block>,
    /// The place of what was acknowledged last.
    last: usize,
}

/// An operation that was begun, and not acknowledged.
#[derive(Debug, Clone)]
pub(crate) enum Begun {
    /// Where each log was.
    Snapshot {
        disks: Vec<usize>,
        name: String,
        from: Vec<usize>,
    },
    Delete {
        disk: usize,
        name: String,
    },
    Clone {
        disk: usize,
        name: String,
        to: String,
    },
    DeleteClone {
        name: String,
    },
    Revert {
        disk: usize,
        name: String,
    },
    Resize {
        disk: usize,
        size: u64,
    },
    Reserve {
        disk: usize,
        reservations: Vec<u8>,
    },
}

/// The promise.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// Of each disk, when the logs were begun.
    base: Vec<Content>,
    pub(crate) logs: Vec<Log>,
    places: Vec<Vec<Place>>,
    pub(crate) sizes: Vec<u64>,
    /// Disks that have been used, and are known by their identifiers since.
    pub(crate) used: Vec<bool>,
    /// The persistent reservations that each disk has.
    pub(crate) reservations: Vec<Vec<u8>>,
    /// What the snapshots of each disk have.
    pub(crate) snapshots: Vec<BTreeMap<String, Content>>,
    /// Clones, and what was written to them.
    pub(crate) clones: BTreeMap<String, Content>,
    pub(crate) begun: Option<Begun>,
    /// Numbers that were given.
    pub(crate) stamp: u64,
    pub(crate) names: u64,
}

impl Model {
    pub(crate) fn new(size: u64) -> Self {
        let zeroes = vec![whole(0); usize::try_from(PLACES).unwrap()];
        let place = Place {
            may: vec![whole(0)],
            last: 0,
        };
        Self {
            base: vec![zeroes.clone(); DISKS],
            logs: vec![Log::default(); WRITERS],
            places: vec![vec![place; zeroes.len()]; DISKS],
            sizes: vec![size; DISKS],
            used: vec![true, false],
            reservations: vec![Vec::new(); DISKS],
            snapshots: vec![BTreeMap::new(); DISKS],
            clones: BTreeMap::new(),
            begun: None,
            stamp: 0,
            names: 0,
        }
    }

    pub(crate) fn name(&mut self, begin: &str) -> String {
        self.names += 1;
        format!("{begin}{}", self.names)
    }

    pub(crate) fn write_begins(&mut self, writer: usize, entry: Entry) {
        self.logs[writer].entries.push(entry);
        self.place(entry).may.push(entry.value);
    }

    pub(crate) fn written(&mut self, writer: usize, entry: Entry, durable: bool) {
        self.logs[writer].acknowledged += 1;
        let place = self.place(entry);
        place.last = place.may.len() - 1;
        if durable {
            place.may.drain(..place.last);
            place.last = 0;
        }
    }

    fn place(&mut self, entry: Entry) -> &mut Place {
        &mut self.places[entry.disk][usize::try_from(entry.place).unwrap()]
    }

    /// What a flush that begins now is going to make durable.
    pub(crate) fn flush_begins(&self, disk: usize) -> Content {
        self.places[disk]
            .iter()
            .map(|place| place.may[place.last])
            .collect()
    }

    /// It did. Values of one place are all different, but for zeroes, of which the last one counts.
    pub(crate) fn flushed(&mut self, disk: usize, covered: &[Block]) {
        for (place, value) in self.places[disk].iter_mut().zip(covered) {
            let at = place
                .may
                .iter()
                .rposition(|may| may == value && *value != whole(0));
            // Which of several zeroes it was is not known: then nothing is certain.
            let Some(at) = at else { continue };
            place.may.drain(..at);
            place.last = place.last.saturating_sub(at);
        }
    }

    /// What the disk has when nothing is under way.
    pub(crate) fn now(&self, disk: usize) -> Content {
        let ends: Vec<usize> = self.logs.iter().map(|log| log.acknowledged).collect();
        (0..WRITERS)
            .flat_map(|writer| self.own_at(disk, writer, ends[writer]))
            .collect()
    }

    /// What a writer's places of a disk had after so many entries of its log.
    fn own_at(&self, disk: usize, writer: usize, end: usize) -> Content {
        let first = writer * usize::try_from(OWN).unwrap();
        let mut own = self.base[disk][first..first + usize::try_from(OWN).unwrap()].to_vec();
        for entry in self.logs[writer].entries.iter().take(end) {
            if entry.disk == disk {
                own[usize::try_from(entry.place).unwrap() - first] = entry.value;
            }
        }
        own
    }

    /// Where the logs are: what was acknowledged by now.
    pub(crate) fn marks(&self) -> Vec<usize> {
        self.logs.iter().map(|log| log.acknowledged).collect()
    }

    /// Contents of some disks must be of one moment, which was not before `from`.
    pub(crate) fn check_moment(&self, found: &[(usize, Content)], from: &[usize]) -> Result<(), Failure> {
        let own = usize::try_from(OWN).unwrap();
        for (writer, log) in self.logs.iter().enumerate() {
            let range = writer * own..(writer + 1) * own;
            let fits = (from[writer]..=log.entries.len()).any(|end| {
                found
                    .iter()
                    .all(|(disk, content)| content[range.clone()] == self.own_at(*disk, writer, end))
            });
            if !fits {
                let log: Vec<_> = log.entries.iter().skip(from[writer].saturating_sub(3)).collect();
                return Err(format!(
                    "what writer {writer} wrote is of no moment since {}: {found:?}, log {log:?}",
                    from[writer]
                )
                .as_str()
                .into());
            }
        }
        Ok(())
    }

    /// What a crash has left of a disk must be allowed.
    pub(crate) fn check_left(&self, disk: usize, found: &[Block]) -> Result<(), Failure> {
        for (number, (place, value)) in self.places[disk].iter().zip(found).enumerate() {
            let allowed =
                (0..value.len()).all(|sector| place.may.iter().any(|may| may[sector] == value[sector]));
            if !allowed {
                return Err(format!(
                    "disk {disk} has {value:?} at place {number} after a crash, and may have {:?}",
                    place.may
                )
                .as_str()
                .into());
            }
        }
        Ok(())
    }

    /// The logs begin anew with what is there. What was not certain stays so until it is written and flushed.
    pub(crate) fn begin(&mut self, found: &[Content]) {
        self.logs = vec![Log::default(); WRITERS];
        for (disk, content) in found.iter().enumerate() {
            self.base[disk].clone_from(content);
            for (place, value) in self.places[disk].iter_mut().zip(content) {
                place.may.retain(|may| may != value);
                place.may.push(*value);
                place.last = place.may.len() - 1;
            }
        }
    }

    /// A disk has become what it was.
    pub(crate) fn reverted(&mut self, disk: usize, content: &Content) {
        let mut now: Vec<Content> = (0..DISKS).map(|disk| self.now(disk)).collect();
        now[disk].clone_from(content);
        for (place, value) in self.places[disk].iter_mut().zip(content) {
            *place = Place {
                may: vec![*value],
                last: 0,
            };
        }
        self.begin(&now);
    }
}
