//! The frozen image as the mover reads it.
//!
//! ```text
//!   pieces of virtual disks ─► windows: where are they? (asked from the storage manager, with a configuration identifier)
//!                                │ known, devices here        │ not readable as it is, no devices, moved too often, an I/O error
//!                                ▼                            ▼
//!                         read the devices               the storage manager reads
//!                                │
//!                         still the same identifier? ── no ─► ask again, read again
//! ```
//!
//! The identifier is asked for before a window is read for the first time, and compared after each batch. What was read in between is right if it
//! is the same: places differ from all others that a range ever had, so one that was left and taken again shows. A snapshot that is read is pinned, so that the file system
//! does not free its blocks; volumes may be moved all the same, which the identifier tells.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use api::virtual_disk::{ChangedRange, DiskAnswer, DiskOperation, DiskPlaces, PlacedOn, ReadRanges};
use api::{Problem, ProblemKind};

use super::devices::{Device, Devices, Run, read_all};
use crate::archive::{From, ImageIdentity};
use crate::file::{ALIGN, Buffer, Buffers};
use crate::plan::ImageDisk;

/// Bytes of a disk that are asked for at once.
pub(super) const WINDOW: u64 = 64 << 20;
/// Windows that are remembered.
const WINDOWS: usize = 64;
/// Buffers of a piece that are kept to be used again: those of two batches.
const BUFFERS: usize = 34;
/// How often it is asked again for a batch where its data are.
const TRIES: u32 = 5;
/// How long a pin lasts, and when it is made again.
const PIN: Duration = Duration::from_secs(600);
const RENEW: Duration = Duration::from_secs(200);
const SECTOR: u64 = 512;

/// Who has the pool open, as a mover asks it.
pub trait Pool: Send {
    /// The disks that belong to the principal: those that its machine has attached for writing.
    ///
    /// # Errors
    /// It gives no answer; so for all methods.
    fn own_disks(&self) -> Result<Vec<String>, Problem>;

    /// Does an operation.
    ///
    /// # Errors
    /// See [`Self::own_disks`].
    fn disk(&self, operation: DiskOperation) -> Result<DiskAnswer, Problem>;

    /// Reads ranges of a snapshot: whole sectors, in ascending order.
    ///
    /// # Errors
    /// See [`Self::own_disks`].
    fn read(&self, ranges: ReadRanges, take: &mut (dyn FnMut(u64, &[u8]) + Send)) -> Result<(), Problem>;
}

/// Bytes of a disk of the image, at most [`crate::message::MAX_CONTENT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) disk: usize,
    pub(super) start: u64,
    pub(super) length: usize,
}

impl Piece {
    fn end(&self) -> u64 {
        self.start + self.length as u64
    }

    /// The windows in which it lies.
    pub(super) fn windows(&self) -> impl Iterator<Item = (usize, u64)> + use<> {
        let disk = self.disk;
        (self.start / WINDOW..self.end().div_ceil(WINDOW)).map(move |window| (disk, window))
    }
}

/// What was read.
pub(super) type Bytes = (Buffer, From);

struct Disk {
    /// `/vm/a.dsk@snapshot`.
    path: String,
    identity: ImageIdentity,
    pin: Option<u64>,
    pinned: Instant,
    /// Instead of a pool: an image.
    image: Option<Device>,
}

/// The frozen image.
pub(super) struct Image {
    pool: Option<Box<dyn Pool>>,
    devices: Devices,
    disks: Vec<Disk>,
    windows: BTreeMap<(usize, u64), DiskPlaces>,
    buffers: Buffers,
    /// How often places were not any more where they had been.
    pub(super) moved: u64,
    /// What a person should know.
    pub(super) notes: BTreeSet<String>,
}

fn unexpected() -> Problem {
    Problem::new(
        ProblemKind::Host,
        "the storage manager answered something else than it was asked",
    )
    .remedy("see that both are of this version")
}

impl Image {
    /// The disks of a pool, pinned.
    pub(super) fn of_pool(
        pool: Box<dyn Pool>,
        devices: Devices,
        disks: &[ImageDisk],
    ) -> Result<Self, Problem> {
        let mut image = Self {
            pool: Some(pool),
            devices,
            disks: Vec::new(),
            windows: BTreeMap::new(),
            buffers: Buffers::new(BUFFERS),
            moved: 0,
            notes: BTreeSet::new(),
        };
        for disk in disks {
            let path = format!("{}@{}", disk.disk, disk.snapshot);
            let pin = image.pin(&path, None)?;
            image.disks.push(Disk {
                path: path.clone(),
                identity: ImageIdentity {
                    identity: String::new(),
                    size: 0,
                },
                pin: Some(pin),
                pinned: Instant::now(),
                image: None,
            });
            let places = image.ask(&path, 0, 0, None)?;
            if let Some(last) = image.disks.last_mut() {
                last.identity = ImageIdentity {
                    identity: places.identity,
                    size: places.size,
                };
            }
        }
        Ok(image)
    }

    /// Images that somebody else keeps frozen.
    pub(super) fn of_images(disks: Vec<(String, Device)>) -> Self {
        let disks = disks.into_iter().map(|(path, device)| Disk {
            identity: ImageIdentity {
                identity: format!("image {path}"),
                size: device.size(),
            },
            path,
            pin: None,
            pinned: Instant::now(),
            image: Some(device),
        });
        Self {
            pool: None,
            devices: Devices::default(),
            disks: disks.collect(),
            windows: BTreeMap::new(),
            buffers: Buffers::new(BUFFERS),
            moved: 0,
            notes: BTreeSet::new(),
        }
    }

    pub(super) fn identities(&self) -> Vec<ImageIdentity> {
        self.disks.iter().map(|disk| disk.identity.clone()).collect()
    }

    pub(super) fn reads_devices(&self) -> bool {
        self.pool.is_none() || !self.devices.is_empty()
    }

    fn operate(&self, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
        match &self.pool {
            Some(pool) => pool.disk(operation),
            None => Err(unexpected()),
        }
    }

    fn pin(&self, path: &str, replaces: Option<u64>) -> Result<u64, Problem> {
        let pin = DiskOperation::Pin {
            path: path.to_owned(),
            seconds: PIN.as_secs(),
            replaces,
        };
        match self.operate(pin)? {
            DiskAnswer::Pinned(pin) => Ok(pin.pin),
            _ => Err(unexpected()),
        }
    }

    /// Sees that pins do not end while they are needed.
    pub(super) fn keep(&mut self) -> Result<(), Problem> {
        for number in 0..self.disks.len() {
            let Some(disk) = self.disks.get(number) else { break };
            let Some(old) = disk.pin.filter(|_| disk.pinned.elapsed() >= RENEW) else {
                continue;
            };
            let pin = self.pin(&disk.path, Some(old))?;
            if let Some(disk) = self.disks.get_mut(number) {
                disk.pin = Some(pin);
                disk.pinned = Instant::now();
            }
        }
        Ok(())
    }

    /// The image may be given up from now on.
    pub(super) fn release(&mut self) -> Result<(), Problem> {
        let pins: Vec<u64> = self.disks.iter_mut().filter_map(|disk| disk.pin.take()).collect();
        for pin in pins {
            self.operate(DiskOperation::Unpin { pin })?;
        }
        Ok(())
    }

    fn ask(
        &self,
        path: &str,
        offset: u64,
        length: u64,
        unless: Option<String>,
    ) -> Result<DiskPlaces, Problem> {
        let places = DiskOperation::Places {
            path: path.to_owned(),
            offset,
            length,
            unless,
        };
        match self.operate(places)? {
            DiskAnswer::Places(places) => Ok(*places),
            _ => Err(unexpected()),
        }
    }

    /// What was written to a disk between two of its snapshots, in order.
    pub(super) fn changed(&self, disk: &str, since: &str, until: &str) -> Result<Vec<ChangedRange>, Problem> {
        let changed = DiskOperation::Changed {
            path: disk.to_owned(),
            since: since.to_owned(),
            until: Some(until.to_owned()),
        };
        match self.operate(changed)? {
            DiskAnswer::Changed(ranges) => Ok(ranges),
            _ => Err(unexpected()),
        }
    }

    /// The identity of a snapshot that need not be one of the image.
    pub(super) fn identity_of(&self, disk: &str, snapshot: &str) -> Result<String, Problem> {
        Ok(self.ask(&format!("{disk}@{snapshot}"), 0, 0, None)?.identity)
    }

    /// Sees that it is known where a window is. Whether it was where it was.
    fn look(&mut self, window: (usize, u64)) -> Result<bool, Problem> {
        let (number, index) = window;
        let Some(disk) = self.disks.get(number) else {
            return Err(unexpected());
        };
        let known = self
            .windows
            .get(&window)
            .and_then(|known| known.configuration.clone());
        let start = index * WINDOW;
        let length = disk.identity.size.saturating_sub(start).min(WINDOW);
        let places = self.ask(&disk.path, start, length, known.clone())?;
        if places.identity != disk.identity.identity {
            let detail = format!("{} is another snapshot than it was", disk.path);
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .remedy("freeze an image again, and begin another backup"));
        }
        if places.same && known.is_some() {
            return Ok(true);
        }
        if let Some(why) = &places.unreadable {
            self.notes.insert(why.clone());
        }
        if self.windows.len() >= WINDOWS {
            // The disks are read in order: what is behind is not needed soon.
            self.windows.pop_first();
        }
        self.windows.insert(window, places);
        if known.is_some() {
            self.moved += 1;
        }
        Ok(false)
    }

    /// Reads pieces; they are in the order of `pieces`. `None` reads as zeroes.
    pub(super) fn read(&mut self, pieces: &[Piece]) -> Result<Vec<Option<Bytes>>, Problem> {
        let mut done: Vec<Option<Option<Bytes>>> = pieces.iter().map(|_| None).collect();
        let mut left: Vec<usize> = (0..pieces.len()).collect();
        if self.pool.is_none() {
            return self.read_images(pieces);
        }
        let mut by_export = Vec::new();
        if self.devices.is_empty() {
            by_export = std::mem::take(&mut left);
        }
        for _ in 0..TRIES {
            if left.is_empty() {
                break;
            }
            let windows: BTreeSet<_> = left
                .iter()
                .filter_map(|number| pieces.get(*number))
                .flat_map(Piece::windows)
                .collect();
            if windows.len() > WINDOWS / 2 {
                // More than can be remembered at once: in two parts.
                break;
            }
            let missing = windows.iter().filter(|window| !self.windows.contains_key(window));
            if self.windows.len() + missing.count() > WINDOWS {
                self.windows.retain(|window, _| windows.contains(window));
            }
            for window in &windows {
                // Where it was when it was asked last; whether it was still there is told after the reads.
                if !self.windows.contains_key(window) {
                    self.look(*window)?;
                }
            }
            self.read_devices(pieces, &mut left, &mut by_export, &mut done);
            let mut moved = BTreeSet::new();
            for window in windows {
                if !self.look(window)? {
                    moved.insert(window);
                }
            }
            left = (0..pieces.len())
                .filter(|number| {
                    let of = pieces.get(*number).into_iter().flat_map(Piece::windows);
                    let read = done.get(*number).is_some_and(Option::is_some);
                    read && of.into_iter().any(|window| moved.contains(&window))
                })
                .collect();
            for number in &left {
                if let Some(done) = done.get_mut(*number) {
                    *done = None;
                }
            }
        }
        by_export.extend(left);
        self.read_export(pieces, by_export, &mut done)?;
        Ok(done.into_iter().map(Option::unwrap_or_default).collect())
    }

    fn read_images(&self, pieces: &[Piece]) -> Result<Vec<Option<Bytes>>, Problem> {
        let mut runs = Vec::new();
        for piece in pieces {
            let device = self.disks.get(piece.disk).and_then(|disk| disk.image.as_ref());
            runs.push(Run {
                device: device.ok_or_else(unexpected)?,
                start: piece.start,
                length: piece.length,
            });
        }
        let read = read_all(&runs, &self.buffers).into_iter();
        read.map(|bytes| match bytes {
            Ok(bytes) => Ok(Some((bytes, From::Devices))),
            Err(error) => Err(Problem::new(ProblemKind::Host, error)),
        })
        .collect()
    }

    /// Reads what is known to be on devices that are here; the others of `left` go to `by_export`.
    fn read_devices(
        &mut self,
        pieces: &[Piece],
        left: &mut Vec<usize>,
        by_export: &mut Vec<usize>,
        done: &mut [Option<Option<Bytes>>],
    ) {
        let (mut runs, mut places) = (Vec::new(), Vec::new());
        for number in left.drain(..) {
            let Some(piece) = pieces.get(number) else { continue };
            match self.runs(piece) {
                Some(found) => {
                    places.push((
                        number,
                        runs.len()..runs.len() + found.len(),
                        found.iter().map(|(skip, _)| *skip).collect::<Vec<_>>(),
                    ));
                    runs.extend(found.into_iter().map(|(_, run)| run));
                }
                None => by_export.push(number),
            }
        }
        let mut read = read_all(&runs, &self.buffers);
        let mut notes: Vec<String> = by_export
            .iter()
            .filter_map(|number| self.missing(pieces.get(*number)?))
            .collect();
        for (number, range, skips) in places {
            let Some(piece) = pieces.get(number) else { continue };
            let read = read.get_mut(range).unwrap_or_default();
            let mut bytes: Option<Buffer> = None;
            let mut failed = false;
            let is_all = |part: &Buffer| part.len() == piece.length;
            for (part, skip) in read.iter_mut().zip(skips) {
                match part {
                    Ok(part) if is_all(part) => {
                        bytes = Some(std::mem::replace(part, Vec::new().into()));
                    }
                    Ok(part) => {
                        let whole = bytes.get_or_insert_with(|| vec![0; piece.length].into());
                        if let Some(place) = whole.as_mut_slice().get_mut(skip..skip + part.len()) {
                            place.copy_from_slice(part);
                        }
                    }
                    Err(error) => {
                        notes.push(error.clone());
                        failed = true;
                    }
                }
            }
            match (failed, done.get_mut(number)) {
                (false, Some(done)) => *done = Some(bytes.map(|bytes| (bytes, From::Devices))),
                // Another copy may be good.
                _ => by_export.push(number),
            }
        }
        self.notes.extend(notes.into_iter().take(8));
    }

    /// The device that keeps a piece from being read here, if there is one.
    fn missing(&self, piece: &Piece) -> Option<String> {
        for window in piece.windows() {
            let places = self.windows.get(&window)?;
            let mut devices = places.devices.iter();
            if let Some(on) = devices.find(|on| self.devices.get(&places.pool, &on.uuid).is_none()) {
                let PlacedOn { device, uuid } = on;
                return Some(format!(
                    "d{device} ({uuid}) is none of the devices that mover.toml names"
                ));
            }
        }
        None
    }

    /// What of the piece is where, with its place in the piece. None if it cannot be read here.
    fn runs(&self, piece: &Piece) -> Option<Vec<(usize, Run<'_>)>> {
        let mut runs = Vec::new();
        for window in piece.windows() {
            let places = self.windows.get(&window)?;
            places.configuration.as_ref()?;
            let first = places
                .extents
                .partition_point(|extent| extent.offset.saturating_add(extent.length) <= piece.start);
            for extent in places.extents.get(first..)? {
                if extent.offset >= piece.end() {
                    break;
                }
                let start = extent.offset.max(piece.start);
                let end = extent.offset.checked_add(extent.length)?.min(piece.end());
                let on = places.devices.iter().find(|on| on.device == extent.device)?;
                runs.push((
                    usize::try_from(start - piece.start).ok()?,
                    Run {
                        device: self.devices.get(&places.pool, &on.uuid)?,
                        start: extent.start.checked_add(start - extent.offset)?,
                        length: usize::try_from(end.checked_sub(start)?).ok()?,
                    },
                ));
            }
        }
        Some(runs)
    }

    /// Has the storage manager read pieces.
    fn read_export(
        &self,
        pieces: &[Piece],
        numbers: Vec<usize>,
        done: &mut [Option<Option<Bytes>>],
    ) -> Result<(), Problem> {
        let mut by_disk: BTreeMap<usize, Vec<(Piece, usize)>> = BTreeMap::new();
        for number in numbers {
            if let Some(piece) = pieces.get(number) {
                by_disk.entry(piece.disk).or_default().push((*piece, number));
            }
        }
        for (number, mut wanted) in by_disk {
            let (Some(disk), Some(pool)) = (self.disks.get(number), &self.pool) else {
                return Err(unexpected());
            };
            wanted.sort_by_key(|(piece, _)| piece.start);
            let mut ranges: Vec<(u64, u64)> = Vec::new();
            for (piece, _) in &wanted {
                let (start, end) = (
                    piece.start / SECTOR * SECTOR,
                    piece.end().next_multiple_of(SECTOR),
                );
                match ranges.last_mut() {
                    Some((at, length)) if start <= *at + *length => *length = (*length).max(end - *at),
                    _ => ranges.push((start, end - start)),
                }
            }
            let mut buffers: Vec<(Piece, usize, Vec<u8>)> = wanted
                .into_iter()
                .map(|(piece, number)| (piece, number, vec![0; piece.length]))
                .collect();
            let request = ReadRanges {
                path: disk.path.clone(),
                ranges: ranges.clone(),
            };
            let mut got = 0;
            let mut take = |offset: u64, bytes: &[u8]| {
                got += bytes.len() as u64;
                copy(&mut buffers, offset, bytes);
            };
            patiently(|| pool.read(request.clone(), &mut take))?;
            // The last sector of a disk may be a part of one.
            let wanted: u64 = ranges.iter().map(|(_, length)| length).sum();
            if got.next_multiple_of(SECTOR) < wanted {
                let detail = format!("{}: {got} of {wanted} bytes came", disk.path);
                return Err(Problem::new(ProblemKind::Host, detail));
            }
            for (_, number, bytes) in buffers {
                if let Some(done) = done.get_mut(number) {
                    *done = Some(Some((bytes.into(), From::Export)));
                }
            }
        }
        Ok(())
    }

    /// The ranges of a window of a disk that have data, as far as that is known.
    pub(super) fn data_in(&mut self, disk: usize, window: u64) -> Result<Vec<(u64, u64)>, Problem> {
        let size = self.disks.get(disk).map_or(0, |disk| disk.identity.size);
        let (start, end) = (window * WINDOW, ((window + 1) * WINDOW).min(size));
        if self.pool.is_some() {
            self.look((disk, window))?;
            if let Some(places) = self.windows.get(&(disk, window))
                && places.configuration.is_some()
            {
                let mut data: Vec<(u64, u64)> = Vec::new();
                for extent in &places.extents {
                    let stop = extent.offset.saturating_add(extent.length).min(end);
                    if stop <= extent.offset.max(start) {
                        continue;
                    }
                    match data.last_mut() {
                        Some((_, last)) if *last == extent.offset => *last = stop,
                        _ => data.push((extent.offset.max(start), stop)),
                    }
                }
                return Ok(data);
            }
        }
        Ok(vec![(start, end)])
    }
}

/// Others may be moving data through the machine's process, which takes only a few at a time.
fn patiently(mut read: impl FnMut() -> Result<(), Problem>) -> Result<(), Problem> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match read() {
            Err(problem) if problem.kind == ProblemKind::Exhausted && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(200));
            }
            done => return done,
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // If it fails, pins end by themselves.
        let _ = self.release();
    }
}

/// Puts bytes of a disk to where they are wanted. The buffers are in the order of their pieces.
fn copy(buffers: &mut [(Piece, usize, Vec<u8>)], offset: u64, bytes: &[u8]) {
    let stop = offset + bytes.len() as u64;
    for (piece, _, buffer) in buffers {
        if piece.start >= stop {
            break;
        }
        let (from, to) = (piece.start.max(offset), piece.end().min(stop));
        let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        if from < to
            && let Some(source) = bytes.get(index(from - offset)..index(to - offset))
            && let Some(place) = buffer.get_mut(index(from - piece.start)..index(to - piece.start))
        {
            place.copy_from_slice(source);
        }
    }
}

const _: () = assert!(WINDOW.is_multiple_of(ALIGN as u64) && WINDOW <= api::virtual_disk::MAX_PLACES);
