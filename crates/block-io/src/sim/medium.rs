//! What a disk holds: its durable image, its volatile changes in order, its requests in flight. Plain data without
//! tasks and wakers, so a crash state is a copy. The rules are in the module comment of [`sim`](super).

use std::rc::Rc;
use std::sync::Arc;

use super::fault::FaultRule;
use super::image::{Image, View};
use super::rng::{Rng, hash_bytes, mix};
use crate::{Geometry, Operation};

/// Ranges up to so many bytes are zeroed and discarded sector by sector.
const FINE: u64 = 16 << 20;

/// What a simulated disk is like.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// Its name in errors.
    pub name: Arc<str>,
    /// What it says of itself.
    pub geometry: Geometry,
    /// Bytes that a crash leaves whole: 512, or 4096 for a disk with 4096-byte sectors.
    pub sector: u32,
    /// Pages of 4096 bytes after which it is full, as a sparse file on a full file system.
    pub capacity: Option<u64>,
}

impl DiskOptions {
    /// A disk of `size` bytes with sectors of 512 bytes.
    pub fn new(name: &str, size: u64) -> Self {
        Self::with_sector(name, size, 512)
    }

    /// A disk of `size` bytes whose logical blocks and sectors have `sector` bytes.
    pub fn with_sector(name: &str, size: u64, sector: u32) -> Self {
        let geometry = Geometry {
            size,
            logical_block: sector,
            physical_block: sector,
            optimal_io: 0,
            discard_granularity: sector,
            read_only: false,
        };
        Self {
            name: name.into(),
            geometry,
            sector,
            capacity: None,
        }
    }
}

/// New content of a range.
#[derive(Debug, Clone)]
pub(super) enum Payload {
    Bytes { data: Rc<[u8]>, skip: usize },
    Zero,
}

/// A change that a crash may keep or lose, sector by sector.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) order: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) payload: Payload,
}

impl Change {
    fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// The part within `offset..end`, if there is one.
    pub(super) fn part(&self, offset: u64, end: u64) -> Option<Self> {
        let (first, last) = (self.offset.max(offset), self.end().min(end));
        (first < last).then(|| Self {
            order: self.order,
            offset: first,
            length: last - first,
            payload: match &self.payload {
                Payload::Zero => Payload::Zero,
                Payload::Bytes { data, skip } => Payload::Bytes {
                    data: Rc::clone(data),
                    skip: skip + usize::try_from(first - self.offset).unwrap_or(usize::MAX),
                },
            },
        })
    }

    /// What is left outside `offset..end`.
    fn without(&self, offset: u64, end: u64) -> impl Iterator<Item = Self> + use<> {
        let before = self.part(0, offset);
        before.into_iter().chain(self.part(end, u64::MAX))
    }

    pub(super) fn bytes(&self) -> Option<&[u8]> {
        match &self.payload {
            Payload::Zero => None,
            Payload::Bytes { data, skip } => {
                data.get(*skip..skip.checked_add(usize::try_from(self.length).ok()?)?)
            }
        }
    }

    pub(super) fn apply(&self, image: &mut Image) {
        match self.bytes() {
            Some(bytes) => image.write(self.offset, bytes),
            None => image.zero(self.offset, self.length),
        }
    }
}

/// What a request becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    Normal,
    Fail(i32),
    Lost,
    Misdirected(u64),
}

#[derive(Debug, Clone)]
pub(super) struct InFlight {
    pub(super) id: u64,
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) durable: bool,
    pub(super) effect: Effect,
    /// What writes put there; what a crash may keep of it.
    pub(super) change: Option<Change>,
    /// Flush: changes below this order become durable.
    pub(super) below: u64,
}

/// A disk without power: it can be copied, crashed, kept and brought back.
#[derive(Debug, Clone)]
pub struct Medium {
    pub(super) options: DiskOptions,
    pub(super) durable: Image,
    /// `durable` changed by `volatile`.
    visible: Image,
    pub(super) volatile: Vec<Change>,
    pub(super) in_flight: Vec<InFlight>,
    pub(super) rules: Vec<FaultRule>,
    pub(super) dropped: bool,
    pub(super) slow: u64,
    order: u64,
    /// Counts what a crash could notice.
    pub(super) version: u64,
}

impl Medium {
    /// A new disk, all zeroes.
    pub fn new(options: DiskOptions) -> Self {
        Self {
            options,
            durable: Image::default(),
            visible: Image::default(),
            volatile: Vec::new(),
            in_flight: Vec::new(),
            rules: Vec::new(),
            dropped: false,
            slow: 1,
            order: 0,
            version: 0,
        }
    }

    /// What it is like.
    pub fn options(&self) -> &DiskOptions {
        &self.options
    }

    /// Changes that are not durable yet, requests in flight not counted.
    pub fn volatile_changes(&self) -> usize {
        self.volatile.len()
    }

    /// Makes it larger.
    pub fn grow(&mut self, size: u64) {
        let geometry = &mut self.options.geometry;
        geometry.size = geometry.size.max(size);
    }

    /// Reads the present content, past all faults.
    pub fn peek(&self, offset: u64, target: &mut [u8]) {
        self.visible.read(offset, target);
    }

    /// Changes the content durably, past all faults.
    pub fn poke(&mut self, offset: u64, source: &[u8]) {
        self.visible.write(offset, source);
        self.durable.write(offset, source);
        self.forget(offset, source.len() as u64);
        self.version += 1;
    }

    /// Flips bit `bit` (0 to 7) of the byte at `offset`, which no checksum of the disk notices.
    pub fn rot(&mut self, offset: u64, bit: u32) {
        let mut byte = [0];
        self.visible.read(offset, &mut byte);
        byte[0] ^= 1_u8.rotate_left(bit);
        self.visible.write(offset, &byte);
        self.durable.read(offset, &mut byte);
        byte[0] ^= 1_u8.rotate_left(bit);
        self.durable.write(offset, &byte);
        self.version += 1;
    }

    /// Takes away what makes it fail: rules, its being dropped or slow. Its content stays.
    pub fn repair(&mut self) {
        self.rules.clear();
        self.dropped = false;
        self.slow = 1;
    }

    /// Makes everything volatile durable, as an orderly power-off does.
    pub fn settle(&mut self) {
        let mut rng = Rng::new(0);
        while let Some(id) = self.in_flight.first().map(|request| request.id) {
            self.complete(id, &mut rng, true);
        }
        self.flush(u64::MAX);
    }

    pub(super) fn submit(&mut self, mut request: InFlight, rng: &mut Rng, orderly: bool) {
        if request.operation == Operation::Discard {
            request.change = self.discarded(request.offset, request.length, rng, orderly);
        }
        match request.effect {
            Effect::Lost => request.change = None,
            Effect::Misdirected(to) => {
                if let Some(change) = &mut request.change {
                    change.offset = to;
                }
            }
            Effect::Normal | Effect::Fail(_) => {}
        }
        request.below = self.order;
        self.version += 1;
        self.in_flight.push(request);
    }

    /// Ends a request; returns what it read.
    pub(super) fn complete(&mut self, id: u64, rng: &mut Rng, orderly: bool) -> Option<View> {
        let at = self.in_flight.iter().position(|request| request.id == id)?;
        let request = self.in_flight.remove(at);
        let failed = matches!(request.effect, Effect::Fail(_));
        match request.operation {
            Operation::Read => {
                if failed {
                    return None;
                }
                if !orderly {
                    self.show_parts_of_writes(request.offset, request.length, rng);
                }
                let length = usize::try_from(request.length).unwrap_or(0);
                return Some(self.visible.view(request.offset, length));
            }
            Operation::Flush => {
                if !failed {
                    self.flush(request.below);
                }
            }
            Operation::Write | Operation::WriteZeroes | Operation::Discard => {
                if let Some(change) = request.change {
                    match (failed, orderly) {
                        (false, _) => self.change(change, request.durable),
                        (true, false) => self.change_in_part(&change, rng),
                        (true, true) => {}
                    }
                }
            }
        }
        self.version += 1;
        None
    }

    /// Adds to the end of the volatile changes, or to what is durable.
    fn change(&mut self, mut change: Change, durable: bool) {
        change.apply(&mut self.visible);
        if durable {
            change.apply(&mut self.durable);
            self.forget(change.offset, change.length);
        } else {
            change.order = self.order;
            self.order += 1;
            self.volatile.push(change);
        }
    }

    /// Forgets volatile changes of a range.
    fn forget(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        if self
            .volatile
            .iter()
            .any(|old| old.offset < end && offset < old.end())
        {
            let old = std::mem::take(&mut self.volatile);
            self.volatile = old.iter().flat_map(|old| old.without(offset, end)).collect();
        }
    }

    /// Makes changes below `order` durable.
    fn flush(&mut self, order: u64) {
        let count = self.volatile.partition_point(|change| change.order < order);
        for change in self.volatile.drain(..count) {
            change.apply(&mut self.durable);
        }
    }

    fn change_in_part(&mut self, change: &Change, rng: &mut Rng) {
        let sector = u64::from(self.options.sector);
        if change.length > FINE {
            return;
        }
        for offset in (change.offset..change.end()).step_by(usize::try_from(sector).unwrap_or(512)) {
            if rng.chance(1, 2)
                && let Some(part) = change.part(offset, offset + sector)
            {
                self.change(part, false);
            }
        }
    }

    /// Writes in flight that overlap a read may be seen already, in part.
    fn show_parts_of_writes(&mut self, offset: u64, length: u64, rng: &mut Rng) {
        let end = offset + length;
        let overlapping: Vec<Change> = self
            .in_flight
            .iter()
            .filter_map(|request| request.change.as_ref()?.part(offset, end))
            .collect();
        for change in overlapping {
            self.change_in_part(&change, rng);
            self.version += 1;
        }
    }

    /// What a discard leaves.
    fn discarded(&self, offset: u64, length: u64, rng: &mut Rng, orderly: bool) -> Option<Change> {
        let zero = Change {
            order: 0,
            offset,
            length,
            payload: Payload::Zero,
        };
        if orderly || length > FINE {
            return rng.chance(1, 2).then_some(zero);
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.visible.read(offset, &mut bytes);
        for sector in bytes.chunks_mut(self.options.sector as usize) {
            match rng.below(3) {
                0 => {}
                1 => sector.fill(0),
                _ => rng.fill(sector),
            }
        }
        Some(Change {
            payload: Payload::Bytes {
                data: bytes.into(),
                skip: 0,
            },
            ..zero
        })
    }

    /// Whether a write there finds the disk full.
    pub(super) fn is_full_for(&self, offset: u64, length: u64) -> bool {
        let Some(capacity) = self.options.capacity else {
            return false;
        };
        let new = (offset / 4096..(offset + length).div_ceil(4096))
            .filter(|page| !self.visible.has_page_at(page * 4096))
            .count() as u64;
        new > 0 && self.visible.pages() + new > capacity
    }

    /// The disk after a crash, if nothing is kept that is not durable; for [`Self::keep`] and then [`Self::switch_on`].
    pub(super) fn crashed(&self) -> Self {
        let mut durable = self.durable.clone();
        durable.freeze();
        Self {
            options: self.options.clone(),
            visible: Image::default(),
            durable,
            volatile: Vec::new(),
            in_flight: Vec::new(),
            rules: self.rules.clone(),
            dropped: self.dropped,
            slow: self.slow,
            order: 0,
            version: 0,
        }
    }

    /// The disk after the process was killed, if nothing is kept of what was in flight; for [`Self::keep`].
    pub(super) fn killed(&self) -> Self {
        let mut visible = self.visible.clone();
        visible.freeze();
        Self {
            visible,
            volatile: self.volatile.clone(),
            order: self.order,
            ..self.crashed()
        }
    }

    /// Something is kept.
    pub(super) fn keep(&mut self, change: &Change, killed: bool) {
        if killed {
            self.change(change.clone(), false);
        } else {
            change.apply(&mut self.durable);
        }
    }

    /// After a crash, what is seen is what is durable.
    pub(super) fn switch_on(&mut self) {
        self.visible = self.durable.clone();
    }

    /// What is certainly there after a kill or a crash.
    pub(super) fn image(&self, killed: bool) -> &Image {
        if killed { &self.visible } else { &self.durable }
    }

    /// Of what is durable, and of all that decides how it answers after a crash; after a kill, also of what is seen.
    pub(super) fn digest(&self, killed: bool) -> u64 {
        let Self {
            durable,
            rules,
            dropped,
            slow,
            ..
        } = self;
        let rules = rules.iter().fold(0, |digest, rule| {
            mix(digest ^ hash_bytes(format!("{rule:?}").as_bytes()))
        });
        let condition = mix(rules ^ mix(slow << 1 | u64::from(*dropped)));
        if !killed {
            return durable.digest().wrapping_add(condition);
        }
        let volatile = self
            .volatile
            .iter()
            .fold(mix(durable.digest()), |digest, change| {
                let range = mix(change.offset) ^ change.length;
                mix(digest ^ range) ^ change.bytes().map_or(0, hash_bytes)
            });
        self.visible.digest().wrapping_add(condition ^ volatile)
    }

    /// What a crash may keep: volatile changes, then those in flight. Of a kill, the latter.
    pub(super) fn uncertain(&self, killed: bool) -> impl Iterator<Item = &Change> {
        let in_flight = self
            .in_flight
            .iter()
            .filter_map(|request| request.change.as_ref());
        let volatile = if killed { &[] } else { self.volatile.as_slice() };
        volatile.iter().chain(in_flight)
    }
}
