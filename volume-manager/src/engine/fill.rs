//! Copying into members: resync after a crash, catching up after a detachment, rebuild, move of an extent.
//!
//! A copy works in windows. It claims the range of the volume that a window holds, so no write is under way there, reads what is
//! good, writes it to the members that lack it, and lets go. Writes go to these members all the time, so what lies behind the
//! copy stays right, and what lies before it will be copied.

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, cover};

use super::core::Refused;
use super::job::{Control, Stop};
use super::map::{Map, MemberMap, Payload, SectionMap};
use super::volume::Volume;
use crate::model::{self, MemberId, MemberState};

/// Bytes of a member that are copied under one claim; more if the stripe unit is larger.
const WINDOW: u64 = 256 << 10;
/// Bytes of a member after which the progress is made durable.
const CHECKPOINT: u64 = 256 << 20;

/// Requests of the guest are exempt from claiming while nobody copies; not while one of these lives.
pub(crate) struct Copying<'a>(&'a std::cell::Cell<u32>);

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

fn window(section: &SectionMap<impl BlockDevice>) -> u64 {
    let unit = section.shape.unit;
    if section.shape.columns == 1 {
        WINDOW
    } else {
        unit * (WINDOW / unit).max(1)
    }
}

fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: callers keep the buffer alive beyond the requests, and do not touch it meanwhile.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// From now on all writes claim their ranges; waits for those that did not.
    pub(crate) async fn copying(&self) -> Copying<'_> {
        self.volume.copying.set(self.volume.copying.get() + 1);
        let guard = Copying(&self.volume.copying);
        let model = self.volume.map().volume.clone();
        let old = self.volume.set_map(self.core.map_of(&model));
        self.core.drained(old).await;
        guard
    }

    /// Fills a member until it is in sync, and then makes the configuration say so, together with what `finish` does.
    pub(crate) async fn fill_member(
        &self,
        control: &Control,
        member: MemberId,
        finish: impl FnOnce(&mut model::Volume),
    ) -> Result<(), Stop> {
        let _copying = self.copying().await;
        let Some((section, column, state, length)) = self.find(&self.volume.map(), member) else {
            return Ok(());
        };
        let (mut cursor, catching_up) = match state {
            MemberState::Filling { cursor } => (cursor, false),
            MemberState::Stale { cursor } => (cursor, true),
            MemberState::InSync => (length, false),
        };
        let mut recorded = cursor;
        if catching_up {
            cover!("fill: a detached member catches up");
        }
        loop {
            let used = self.used_of_member(section, column, cursor, length);
            let (from, to) = used.unwrap_or((length, length));
            if from > cursor {
                cover!("fill: what is not in use is not copied");
                control.skip(from - cursor);
                cursor = from;
            }
            if cursor >= length {
                break;
            }
            let step = self
                .fill_window(section, column, member, (cursor, to), catching_up)
                .await?;
            cursor += step;
            control.progress(&self.core.clock, step).await?;
            if cursor - recorded >= CHECKPOINT && cursor < length {
                self.record_cursor(member, cursor).await?;
                recorded = cursor;
            }
        }
        self.flush_copy().await?;
        let id = self.volume.id;
        let changed = self.core.change(|config| {
            let faulty: Vec<_> = config
                .devices
                .iter()
                .filter(|device| !device.is_holder())
                .map(|device| device.id)
                .collect();
            let Some(volume) = config.volume_mut(id) else {
                return Ok(());
            };
            for other in members_mut(volume).filter(|other| other.id == member) {
                if other.extents.iter().any(|extent| faulty.contains(&extent.device)) {
                    cover!("fill: the device failed at the very end");
                    return Err(Stop::Failed("the device that was being filled failed".into()));
                }
                other.state = MemberState::InSync;
            }
            finish(volume);
            Ok(())
        });
        let (_, old) = changed.await?;
        let freed = self
            .core
            .reserve(old.iter().flat_map(|map| map.volume.extents().copied()).collect());
        for map in old {
            self.core.drained(map).await;
        }
        drop(freed);
        self.core.adopt_log_devices(id).await?;
        Ok(())
    }

    /// Section number, column, state and length of a member.
    fn find(&self, map: &Map<D>, member: MemberId) -> Option<(u32, usize, MemberState, u64)> {
        for section in &map.sections {
            for (index, column) in section.columns.iter().enumerate() {
                if let Some(found) = column.members.iter().find(|other| other.id == member) {
                    return Some((section.id, index, found.state, found.length()));
                }
            }
        }
        None
    }

    /// Copies one window, or as much of it as lies before `until`; gives its length.
    async fn fill_window(
        &self,
        section: u32,
        column: usize,
        member: MemberId,
        (cursor, until): (u64, u64),
        catching_up: bool,
    ) -> Result<u64, Stop> {
        let range = |map: &Map<D>| {
            let section = map.sections.iter().find(|candidate| candidate.id == section)?;
            let target = section
                .columns
                .get(column)?
                .members
                .iter()
                .find(|other| other.id == member)?;
            let window = window(section);
            let end = ((cursor / window + 1) * window).min(target.length()).min(until);
            Some((section.volume_range(cursor, end), end - cursor))
        };
        let gone = || Stop::Failed("the volume was changed while a member of it was being filled".into());
        let ((from, to), length) = range(&self.volume.map()).ok_or_else(gone)?;
        let _held = self.volume.ranges.hold(from, to).await;
        let map = self.volume.map();
        if range(&map) != Some(((from, to), length)) {
            return Err(gone());
        }
        if catching_up && to > from && !self.has_changed(from, to - from) {
            return Ok(length);
        }
        let Some(section) = map.sections.iter().find(|candidate| candidate.id == section) else {
            return Err(gone());
        };
        let target = section
            .columns
            .get(column)
            .and_then(|column| column.members.iter().find(|other| other.id == member));
        let target = target.ok_or_else(gone)?;
        let buffer = AlignedBuffer::new(usize::try_from(length).unwrap_or(0));
        let content = memory(&buffer);
        let read = if section.readable(column) {
            self.read_column(section, column, cursor, &content).await
        } else if section.shape.parity > 0 {
            cover!("fill: rebuilt from parity");
            self.reconstruct_range(section, column, cursor, &content).await
        } else {
            return Err(Stop::Failed("no device that holds a good copy is there".into()));
        };
        read.map_err(|error| Stop::because("cannot read what is to be copied", &error))?;
        let payload = Payload::Data(&content, Durability::Volatile);
        if let Err((device, error)) = target.write(self.clock(), cursor, length, payload).await {
            self.core.fail(&[device]).await?;
            return Err(Stop::because(
                "cannot write to the device that is being filled",
                &error,
            ));
        }
        Ok(length)
    }

    /// Whether detached members may miss something of a range.
    fn has_changed(&self, offset: u64, length: u64) -> bool {
        let regions = self.volume.regions(offset, length);
        if self.volume.is_unclean(offset, length) {
            return true;
        }
        let bitmap = self.volume.bitmap.borrow();
        bitmap
            .as_ref()
            .is_none_or(|bitmap| regions.clone().any(|region| bitmap.is_set(region)))
    }

    /// Makes durable what was copied, and also what it was copied from: a power cut must not take from the source what the copy
    /// has.
    async fn flush_copy(&self) -> Result<(), Stop> {
        if let Err(error) = self.core.flush_members(self.volume.id).await {
            self.core.fail(&[]).await?;
            return Err(Stop::because("cannot flush what was copied", &error));
        }
        Ok(())
    }

    async fn record_cursor(&self, member: MemberId, at: u64) -> Result<(), Stop> {
        self.flush_copy().await?;
        let id = self.volume.id;
        let changed = self.core.change(|config| {
            let volume = config.volume_mut(id);
            for other in volume
                .into_iter()
                .flat_map(members_mut)
                .filter(|other| other.id == member)
            {
                if let MemberState::Filling { cursor } | MemberState::Stale { cursor } = &mut other.state {
                    *cursor = at;
                }
            }
            Ok::<(), Refused>(())
        });
        changed.await.map(drop).map_err(Stop::from)
    }

    /// Makes the copies and parity of a region equal after a crash. False if a device that is needed for it is missing.
    pub(crate) async fn resync_region(&self, region: u32) -> Result<bool, Stop> {
        let (start, end) = {
            let size = self.volume.map().volume.size;
            let start = u64::from(region) * self.volume.region;
            (
                start.min(size),
                start.saturating_add(self.volume.region).min(size),
            )
        };
        let mut at = start;
        while at < end {
            // One window: a row, or as much of one column as a window.
            let map = self.volume.map();
            let Some((section, from, part)) = map.parts(at, end - at).next() else {
                break;
            };
            let row = section.shape.row_bytes();
            let step = if section.shape.columns == 1 {
                WINDOW.min(part)
            } else {
                (row - from % row).min(part)
            };
            let redundant = section.redundant;
            drop(map);
            if redundant && !self.resync_window(at, step).await? {
                return Ok(false);
            }
            at += step;
        }
        if let Err(error) = self.core.flush_members(self.volume.id).await {
            self.core.fail(&[]).await?;
            return Err(Stop::because("cannot flush what was resynced", &error));
        }
        Ok(true)
    }

    async fn resync_window(&self, at: u64, length: u64) -> Result<bool, Stop> {
        let (_held, map) = self.claim(at, length).await;
        for (section, from, part) in map.parts(at, length) {
            let shape = &section.shape;
            let (first, last) = if shape.columns == 1 {
                (from, from + part)
            } else {
                let row = shape.row_bytes();
                (from / row * shape.unit, (from + part).div_ceil(row) * shape.unit)
            };
            if shape.parity > 0 && !self.resync_parity(section, first, last).await? {
                return Ok(false);
            }
            for (index, column) in section.columns.iter().enumerate() {
                let Some(source) = column.sources().next() else {
                    continue;
                };
                let others: Vec<&MemberMap<D>> = column
                    .members
                    .iter()
                    .filter(|other| other.id != source.id && other.is_alive())
                    .collect();
                if others.is_empty() {
                    continue;
                }
                let mut at = first;
                while let Some((from, to)) = self.volume.next_used_of_column(section, index, at, last) {
                    self.copy_members(section, index, (from, to), &others).await?;
                    at = to;
                }
            }
        }
        Ok(true)
    }

    /// Copies a range of a column to some of its members. It is claimed.
    async fn copy_members(
        &self,
        section: &SectionMap<D>,
        column: usize,
        (from, to): (u64, u64),
        targets: &[&MemberMap<D>],
    ) -> Result<(), Stop> {
        let buffer = AlignedBuffer::new(usize::try_from(to - from).unwrap_or(0));
        let content = memory(&buffer);
        let read = self.read_column(section, column, from, &content).await;
        read.map_err(|error| Stop::because("cannot read what is to be resynced", &error))?;
        for target in targets {
            let payload = Payload::Data(&content, Durability::Volatile);
            if let Err((device, _)) = target.write(self.clock(), from, to - from, payload).await {
                self.core.fail(&[device]).await?;
            }
        }
        Ok(())
    }

    /// Computes the parity of rows anew.
    async fn resync_parity(&self, section: &SectionMap<D>, first: u64, last: u64) -> Result<bool, Stop> {
        let shape = &section.shape;
        for row in first / shape.unit..last / shape.unit {
            let data = (0..shape.data()).map(|data| shape.data_column(row, data));
            if data.into_iter().any(|column| !section.readable(column)) {
                cover!("fill: parity cannot be computed while a device is missing");
                return Ok(false);
            }
            let written = self.rewrite_parity(section, row).await;
            let failed = written.map_err(|error| Stop::because("cannot compute parity anew", &error))?;
            if !failed.is_empty() {
                self.core.fail(&failed).await?;
            }
        }
        Ok(true)
    }

    /// Resyncs all regions that a crash left in doubt, as far as the devices for it are there.
    pub(crate) async fn resync(&self, control: &Control) -> Result<(), Stop> {
        let regions: Vec<u32> = self.volume.unclean.borrow().keys().copied().collect();
        for region in regions {
            cover!("fill: a region is resynced after a crash");
            if self.resync_region(region).await? {
                self.volume.unclean.borrow_mut().remove(&region);
            }
            control.progress(&self.core.clock, self.volume.region).await?;
        }
        Ok(())
    }
}

pub(crate) fn members_mut(volume: &mut model::Volume) -> impl Iterator<Item = &mut model::Member> {
    let columns = volume
        .sections
        .iter_mut()
        .flat_map(|section| &mut section.columns);
    columns.flat_map(|column| &mut column.members)
}

/// When no member is detached any more, what the bitmap says is no longer of interest.
pub(crate) fn settle(volume: &mut model::Volume) {
    let mut members = volume
        .sections
        .iter()
        .flat_map(|section| &section.columns)
        .flat_map(|column| &column.members);
    if !members.any(|member| matches!(member.state, MemberState::Stale { .. })) {
        volume.bitmap_generation = 0;
    }
}
