//! A volume's mapping as I/O uses it: made from the configuration, never changed, replaced as a whole.
//!
//! A request takes the map when it begins and keeps it until it has ended; who has replaced a map and must know that nobody
//! uses the old one any more waits until it is the only one that holds it.

use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::{BlockDevice, Clock, Durability, IoBuf, IoError, Operation, ZeroMode};

use super::counters::Counters;
use super::disk::Disk;
use super::geometry::Shape;
use super::join::{self, Boxed};
use super::list;
use crate::model::{self, DeviceId, MemberId, MemberState};

/// A volume's mapping.
pub(crate) struct Map<D> {
    /// What it was made from.
    pub(crate) volume: model::Volume,
    pub(crate) sections: Vec<SectionMap<D>>,
}

/// A section's.
pub(crate) struct SectionMap<D> {
    pub(crate) id: u32,
    /// Its first byte in the volume.
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) shape: Shape,
    /// The loss of some device can be made good.
    pub(crate) redundant: bool,
    pub(crate) columns: Vec<ColumnMap<D>>,
}

/// A column's.
pub(crate) struct ColumnMap<D> {
    pub(crate) members: Vec<MemberMap<D>>,
}

/// A member's.
pub(crate) struct MemberMap<D> {
    pub(crate) id: MemberId,
    pub(crate) state: MemberState,
    extents: Vec<Run<D>>,
    /// What it has done; lives on in the maps that replace this one.
    pub(crate) counters: Rc<Counters>,
}

impl<D> Clone for MemberMap<D> {
    fn clone(&self) -> Self {
        let extents = self.extents.iter().map(|run| Run {
            disk: Rc::clone(&run.disk),
            ..*run
        });
        Self {
            id: self.id,
            state: self.state,
            extents: extents.collect(),
            counters: Rc::clone(&self.counters),
        }
    }
}

struct Run<D> {
    /// First byte within the member.
    at: u64,
    disk: Rc<Disk<D>>,
    /// First byte on the device.
    start: u64,
    length: u64,
}

/// What a write puts into its range.
#[derive(Clone, Copy)]
pub(crate) enum Payload<'a> {
    Data(&'a [IoBuf], Durability),
    Zero(ZeroMode),
    Discard,
}

impl<D: BlockDevice> Map<D> {
    /// The map of `volume`. A device that is not open gets a `Disk` from `disk` that is not alive.
    pub(crate) fn new(volume: &model::Volume, disk: &dyn Fn(DeviceId) -> Rc<Disk<D>>) -> Self {
        let mut start = 0;
        let sections = volume.sections.iter().map(|section| {
            let map = SectionMap::new(section, start, disk);
            start += section.length;
            map
        });
        Self {
            sections: sections.collect(),
            volume: volume.clone(),
        }
    }

    /// The sections that a range touches: section, first byte within it, length.
    pub(crate) fn parts(&self, offset: u64, length: u64) -> impl Iterator<Item = (&SectionMap<D>, u64, u64)> {
        let end = offset.saturating_add(length);
        let first = self
            .sections
            .partition_point(|section| section.start + section.length <= offset);
        self.sections[first..]
            .iter()
            .take_while(move |section| section.start < end)
            .map(move |section| {
                let from = offset.max(section.start) - section.start;
                let to = (end - section.start).min(section.length);
                (section, from, to - from)
            })
    }

    /// All devices that hold data of the volume, each once.
    pub(crate) fn disks(&self) -> Vec<Rc<Disk<D>>> {
        each_once(self.members())
    }

    /// Whether some of the range lies in a section with parity.
    pub(crate) fn has_parity(&self, offset: u64, length: u64) -> bool {
        self.parts(offset, length)
            .any(|(section, _, _)| section.shape.parity > 0)
    }

    /// Whether the loss of some device can be made good in some section.
    pub(crate) fn redundant(&self) -> bool {
        self.sections.iter().any(|section| section.redundant)
    }

    /// Members go on counting where those of the map that this one replaces were.
    pub(super) fn go_on_counting(&mut self, old: &Self) {
        let known: BTreeMap<MemberId, &Rc<Counters>> = old
            .members()
            .map(|member| (member.id, &member.counters))
            .collect();
        let columns = self.sections.iter_mut().flat_map(|section| &mut section.columns);
        for member in columns.flat_map(|column| &mut column.members) {
            if let Some(counters) = known.get(&member.id) {
                member.counters = Rc::clone(counters);
            }
        }
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &MemberMap<D>> {
        let columns = self.sections.iter().flat_map(|section| &section.columns);
        columns.flat_map(|column| &column.members)
    }
}

/// The devices of some members, each once.
fn each_once<'a, D: 'a>(members: impl Iterator<Item = &'a MemberMap<D>>) -> Vec<Rc<Disk<D>>> {
    let mut disks: Vec<Rc<Disk<D>>> = Vec::new();
    for run in members.flat_map(|member| &member.extents) {
        if !disks.iter().any(|disk| Rc::ptr_eq(disk, &run.disk)) {
            disks.push(Rc::clone(&run.disk));
        }
    }
    disks
}

impl<D: BlockDevice> SectionMap<D> {
    /// All devices that hold data of the section, each once.
    pub(crate) fn disks(&self) -> Vec<Rc<Disk<D>>> {
        each_once(self.columns.iter().flat_map(|column| &column.members))
    }

    pub(crate) fn new(section: &model::Section, start: u64, disk: &dyn Fn(DeviceId) -> Rc<Disk<D>>) -> Self {
        let columns = section.columns.iter().map(|column| ColumnMap {
            members: column
                .members
                .iter()
                .map(|member| MemberMap::new(member, disk))
                .collect(),
        });
        Self {
            id: section.id,
            start,
            length: section.length,
            redundant: section.is_redundant(),
            shape: Shape {
                columns: section.columns.len(),
                parity: usize::try_from(section.parity).unwrap_or(0),
                unit: section.unit,
                rotation: section.rotation,
            },
            columns: columns.collect(),
        }
    }

    /// Whether a crash between the writes of two members could leave them different.
    pub(crate) fn has_several_targets(&self) -> bool {
        self.columns.iter().any(|column| column.targets().count() > 1)
    }

    /// The column with a readable member, if there is one.
    pub(crate) fn readable(&self, column: usize) -> bool {
        self.columns
            .get(column)
            .is_some_and(|column| column.sources().next().is_some())
    }

    /// Columns without a readable member.
    pub(crate) fn missing(&self) -> usize {
        (0..self.columns.len())
            .filter(|column| !self.readable(*column))
            .count()
    }

    /// The range of the volume whose rows hold `from..to` of the members.
    pub(crate) fn volume_range(&self, from: u64, to: u64) -> (u64, u64) {
        if self.shape.columns == 1 {
            return (
                self.start + from.min(self.length),
                self.start + to.min(self.length),
            );
        }
        let (unit, row) = (self.shape.unit, self.shape.row_bytes());
        let first = (from / unit).saturating_mul(row);
        let last = to.div_ceil(unit).saturating_mul(row).min(self.length);
        (self.start + first.min(self.length), self.start + last)
    }
}

impl<D: BlockDevice> ColumnMap<D> {
    /// Members whose content is good, on devices that are there.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &MemberMap<D>> {
        self.members
            .iter()
            .filter(|member| member.state == MemberState::InSync && member.is_alive())
    }

    /// Members that writes go to. One that is in sync but whose device is gone is among them: its failure has to be recorded
    /// before the write may be acknowledged.
    pub(crate) fn targets(&self) -> impl Iterator<Item = &MemberMap<D>> {
        self.members
            .iter()
            .filter(|member| member.state == MemberState::InSync || member.is_alive())
    }

    /// Writes to all targets. In a `redundant` section nothing is sent to devices that are out of service: what they miss is
    /// made good from others. In another they are the only hope.
    pub(crate) async fn write(
        &self,
        clock: &impl Clock,
        offset: u64,
        length: u64,
        payload: Payload<'_>,
        redundant: bool,
    ) -> Written<D> {
        if redundant && self.targets().any(|member| !member.is_alive()) {
            return self.write_without_the_dead(clock, offset, length, payload).await;
        }
        let mut targets = self.targets();
        match (targets.next(), targets.next(), targets.next()) {
            (Some(one), None, _) => Written::of(one, one.write(clock, offset, length, payload).await),
            (Some(one), Some(two), None) => {
                let first = one.write(clock, offset, length, payload);
                let (first, second) = join::both(first, two.write(clock, offset, length, payload)).await;
                let mut written = Written::of(one, first);
                written.add(Written::of(two, second));
                written
            }
            _ => {
                let writes = self.targets().map(|member| -> Boxed<'_, Written<D>> {
                    Box::pin(async move {
                        Written::of(member, member.write(clock, offset, length, payload).await)
                    })
                });
                let mut all = Written::default();
                for written in join::all(writes.collect()).await {
                    all.add(written);
                }
                all
            }
        }
    }
}

impl<D: BlockDevice> ColumnMap<D> {
    #[cold]
    async fn write_without_the_dead(
        &self,
        clock: &impl Clock,
        offset: u64,
        length: u64,
        payload: Payload<'_>,
    ) -> Written<D> {
        let mut all = Written::default();
        for member in self.targets() {
            let dead = member.disks().find(|disk| !disk.is_alive());
            all.add(match dead {
                Some(disk) => {
                    let gone = disk.gone(Operation::Write, offset, length);
                    Written::of(member, Err((Rc::clone(disk), gone)))
                }
                None => Written::of(member, member.write(clock, offset, length, payload).await),
            });
        }
        all
    }
}

/// How the writes of a column's members ended.
pub(crate) struct Written<D> {
    /// At least one member that is in sync has it.
    pub(crate) good: bool,
    /// Devices that did not take it.
    pub(crate) failed: Vec<Rc<Disk<D>>>,
    pub(crate) error: Option<IoError>,
}

impl<D> Default for Written<D> {
    fn default() -> Self {
        Self {
            good: false,
            failed: Vec::new(),
            error: None,
        }
    }
}

impl<D> Written<D> {
    fn of(member: &MemberMap<D>, result: Result<(), (Rc<Disk<D>>, IoError)>) -> Self {
        match result {
            Ok(()) => Self {
                good: member.state == MemberState::InSync,
                ..Self::default()
            },
            Err((device, error)) => Self {
                good: false,
                failed: vec![device],
                error: Some(error),
            },
        }
    }

    fn add(&mut self, other: Self) {
        self.good |= other.good;
        self.failed.extend(other.failed);
        self.error = self.error.take().or(other.error);
    }
}

/// How the writes of several columns ended.
pub(crate) struct Put<D> {
    /// Devices that did not take it.
    pub(crate) failed: Vec<Rc<Disk<D>>>,
    /// Why a column has it on no member that is in sync.
    pub(crate) bad: Option<IoError>,
}

impl<D> Default for Put<D> {
    fn default() -> Self {
        Self {
            failed: Vec::new(),
            bad: None,
        }
    }
}

impl<D> From<Written<D>> for Put<D> {
    fn from(written: Written<D>) -> Self {
        Self {
            failed: written.failed,
            bad: written.error.filter(|_| !written.good),
        }
    }
}

impl<D> Put<D> {
    /// One column more.
    pub(crate) fn add(&mut self, written: Written<D>) {
        let Self { failed, bad } = written.into();
        self.failed.extend(failed);
        self.bad = bad.or(self.bad.take());
    }
}

impl<D: BlockDevice> MemberMap<D> {
    pub(crate) fn new(member: &model::Member, disk: &dyn Fn(DeviceId) -> Rc<Disk<D>>) -> Self {
        let mut at = 0;
        let extents = member.extents.iter().map(|extent| {
            let run = Run {
                at,
                disk: disk(extent.device),
                start: extent.start,
                length: extent.length,
            };
            at += extent.length;
            run
        });
        Self {
            id: member.id,
            state: member.state,
            extents: extents.collect(),
            counters: Rc::default(),
        }
    }

    pub(crate) fn length(&self) -> u64 {
        self.extents.last().map_or(0, |run| run.at + run.length)
    }

    /// Whether all its devices are there.
    pub(crate) fn is_alive(&self) -> bool {
        self.extents.iter().all(|run| run.disk.is_alive())
    }

    /// The device of its byte `offset`.
    pub(crate) fn disk_at(&self, offset: u64) -> Option<&Rc<Disk<D>>> {
        let next = self.extents.partition_point(|run| run.at <= offset);
        Some(&self.extents.get(next.checked_sub(1)?)?.disk)
    }

    /// Its devices.
    pub(crate) fn disks(&self) -> impl Iterator<Item = &Rc<Disk<D>>> {
        self.extents.iter().map(|run| &run.disk)
    }

    /// The runs that a range touches: run, first byte on its device, first byte within the range, length.
    /// Where a range of the member is: device, first byte on it, bytes.
    pub(super) fn places(&self, offset: u64, length: u64) -> impl Iterator<Item = (DeviceId, u64, u64)> {
        self.runs(offset, length)
            .map(|(run, start, _, part)| (run.disk.id, start, part))
    }

    fn runs(&self, offset: u64, length: u64) -> impl Iterator<Item = (&Run<D>, u64, u64, u64)> {
        let end = offset.saturating_add(length);
        let first = self.extents.partition_point(|run| run.at + run.length <= offset);
        self.extents[first..]
            .iter()
            .take_while(move |run| run.at < end)
            .map(move |run| {
                let from = offset.max(run.at);
                let to = end.min(run.at + run.length);
                (run, run.start + (from - run.at), from - offset, to - from)
            })
    }

    /// Fills `buffers` from byte `offset` on; an error names the device.
    pub(crate) async fn read(
        &self,
        clock: &impl Clock,
        offset: u64,
        buffers: &[IoBuf],
    ) -> Result<(), (Rc<Disk<D>>, IoError)> {
        let (length, since) = (list::length(buffers), clock.moment());
        let read = self.read_runs(clock, offset, length, buffers).await;
        let took = clock.moment().saturating_sub(since);
        self.counters.count(Operation::Read, length, took, read.is_ok());
        read
    }

    async fn read_runs(
        &self,
        clock: &impl Clock,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
    ) -> Result<(), (Rc<Disk<D>>, IoError)> {
        for (run, start, skip, part) in self.runs(offset, length) {
            let done = if part == length {
                run.disk.read(clock, start, buffers).await
            } else {
                run.disk
                    .read(clock, start, &list::part(buffers, skip, part))
                    .await
            };
            done.map_err(|error| (Rc::clone(&run.disk), error))?;
        }
        Ok(())
    }

    /// Puts `payload` into a range; an error names the device.
    pub(crate) async fn write(
        &self,
        clock: &impl Clock,
        offset: u64,
        length: u64,
        payload: Payload<'_>,
    ) -> Result<(), (Rc<Disk<D>>, IoError)> {
        let since = clock.moment();
        let written = self.write_runs(clock, offset, length, payload).await;
        let took = clock.moment().saturating_sub(since);
        self.counters
            .count(Operation::Write, length, took, written.is_ok());
        written
    }

    async fn write_runs(
        &self,
        clock: &impl Clock,
        offset: u64,
        length: u64,
        payload: Payload<'_>,
    ) -> Result<(), (Rc<Disk<D>>, IoError)> {
        for (run, start, skip, part) in self.runs(offset, length) {
            let disk = &run.disk;
            let done = match payload {
                Payload::Data(buffers, durability) if part == length => {
                    disk.write(clock, start, buffers, durability).await
                }
                Payload::Data(buffers, durability) => {
                    disk.write(clock, start, &list::part(buffers, skip, part), durability)
                        .await
                }
                Payload::Zero(mode) => disk.zero(clock, start, part, mode).await,
                Payload::Discard => disk.discard(clock, start, part).await,
            };
            done.map_err(|error| (Rc::clone(disk), error))?;
        }
        Ok(())
    }
}
