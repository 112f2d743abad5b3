//! Replacing a volume's sections by others, while it is in use: change of layout, of class, of stripe unit.
//!
//! # How
//! The volume is its sections, in order. The first one that is not as it should be, *old*, gets a successor, *new*, of its whole
//! length. The boundary between the two moves from the front to the back: what is before it lies in *new*, what is behind it in
//! *old*.
//!
//! ```text
//!   … ┌──────────── new ────────────┬───────────── old ─────────────┐ …
//!     │ moved                       │ piece being copied │ not yet  │
//!     └─────────────────────────────┴────────────────────┴──────────┘
//!                                 boundary: a change of the configuration per piece
//! ```
//!
//! A piece is copied window by window under claims. Guests go on writing into *old*, and windows that they touch are copied again.
//! After a few rounds the whole piece is claimed, the last windows are copied, the new devices are flushed, and a new configuration
//! moves the boundary. So at every moment the configuration says where the data are, and all of it is there: a crash costs
//! the copy of one piece. There is no cursor to trust and nothing to undo.
//!
//! A piece is whole rows of both sections, so that parity always covers whole rows on either side.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, ZeroMode, cover};

use super::core::Refused;
use super::disk::Disk;
use super::job::{Control, Stop};
use super::list;
use super::map::{Payload, SectionMap};
use super::volume::Volume;
use crate::logs::parity::ParityLog;
use crate::model::{self, Attributes, BLOCK, Configuration, DeviceId, Extent, MemberState, Section};
use crate::place;

/// Bytes of the volume per change of the boundary, about.
const PIECE: u64 = 16 << 20;
/// Bytes copied under one claim, about.
const WINDOW: u64 = 256 << 10;
/// Rounds of copying before the piece is claimed as a whole.
const ROUNDS: u32 = 4;

/// Which windows of a piece were written since they were copied.
pub(crate) struct Touched {
    start: u64,
    end: u64,
    window: u64,
    windows: RefCell<BTreeSet<u64>>,
}

impl Touched {
    /// A range of the volume was written.
    pub(crate) fn touch(&self, offset: u64, length: u64) {
        let (from, to) = (offset.max(self.start), (offset + length).min(self.end));
        if from < to {
            let index = |byte: u64| (byte - self.start) / self.window;
            self.windows.borrow_mut().extend(index(from)..=index(to - 1));
        }
    }

    fn range(&self, index: u64) -> (u64, u64) {
        let from = self.start + index * self.window;
        (from, (from + self.window).min(self.end))
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Bytes at whose multiples a section can be cut.
fn grain(section: &Section) -> u64 {
    if section.columns.len() == 1 {
        BLOCK
    } else {
        section.row()
    }
}

/// Whether a section is laid out as asked for.
pub(crate) fn fits(config: &Configuration, section: &Section, block: u32, wanted: &Attributes) -> bool {
    let layout = wanted.layout;
    let shape = section.columns.len() == layout.columns() as usize
        && section.parity == layout.parity()
        && (section.columns.len() == 1 || section.unit == wanted.stripe_unit)
        && section
            .columns
            .iter()
            .all(|column| column.members.len() >= layout.legs() as usize);
    shape && section_extents(section).all(|extent| allowed(config, extent.device, block, wanted))
}

/// Whether extents of a volume may lie on a device.
pub(crate) fn allowed(config: &Configuration, id: DeviceId, block: u32, wanted: &Attributes) -> bool {
    let Some(device) = config.device(id) else {
        return false;
    };
    (wanted.class.is_empty() || device.class == wanted.class)
        && (wanted.devices.is_empty() || wanted.devices.contains(&id))
        && device.block <= block
}

fn section_extents(section: &Section) -> impl Iterator<Item = &Extent> {
    let members = section.columns.iter().flat_map(|column| &column.members);
    members.flat_map(|member| &member.extents)
}

/// Takes `bytes` off the front of every member.
pub(crate) fn cut_front(section: &mut Section, bytes: u64) {
    section.length -= bytes;
    let single = section.columns.len() == 1;
    let of_member = if single {
        bytes
    } else {
        bytes / section.row() * section.unit
    };
    if single {
        section.unit -= bytes;
    } else {
        section.rotation = (section.rotation + bytes / section.row()) % section.columns.len() as u64;
    }
    for member in section.columns.iter_mut().flat_map(|column| &mut column.members) {
        let mut rest = of_member;
        member.extents.retain_mut(|extent| {
            let cut = rest.min(extent.length);
            rest -= cut;
            extent.start += cut;
            extent.length -= cut;
            extent.length > 0
        });
        if let MemberState::Filling { cursor } | MemberState::Stale { cursor } = &mut member.state {
            *cursor = cursor.saturating_sub(of_member);
        }
    }
}

/// Moves the boundary: the first `length` bytes of section `old` are now in `new`, which is before it already or comes there.
fn move_boundary(volume: &mut model::Volume, old: u32, new: &Section, length: u64) {
    let Some(index) = volume.sections.iter().position(|section| section.id == old) else {
        return;
    };
    let before = index
        .checked_sub(1)
        .and_then(|before| volume.sections.get_mut(before));
    match before.filter(|section| section.id == new.id) {
        Some(section) => section.length += length,
        None => volume.sections.insert(
            index,
            Section {
                length,
                ..new.clone()
            },
        ),
    }
    let Some(index) = volume.sections.iter().position(|section| section.id == old) else {
        return;
    };
    if let Some(section) = volume.sections.get_mut(index) {
        if section.length == length {
            volume.sections.remove(index);
        } else {
            cut_front(section, length);
        }
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Does a part of what is to be done so that the whole volume is as `wanted`. False when nothing is left to do.
    pub(crate) async fn relayout_step(&self, control: &Control, wanted: &Attributes) -> Result<bool, Stop> {
        let config = self.core.config();
        let Some(model) = config.volume(self.volume.id) else {
            return Err(Stop::Failed("the volume was deleted".into()));
        };
        let place = model
            .sections
            .iter()
            .position(|section| !fits(&config, section, model.block, wanted));
        let Some(place) = place else { return Ok(false) };
        let Some(old) = model.sections.get(place) else {
            return Ok(false);
        };
        // The successor is there already if an earlier step, or a run before a crash, has begun it.
        let before = place.checked_sub(1).and_then(|before| model.sections.get(before));
        let begun = before.filter(|section| self.capacity(section) - section.length >= old.length);
        let (new, log, reserved) = match begun {
            Some(section) => (section.clone(), None, None),
            None => {
                let (section, log) = self.successor(model, old, wanted).await?;
                let reserved = self.core.reserve(extents_of(&section));
                (section, log, Some(reserved))
            }
        };
        if new.is_redundant() && model.log_devices.is_empty() {
            cover!("relayout: a volume becomes redundant");
            self.core
                .first_log_devices(self.volume.id, place::log_devices(&new))
                .await?;
        }
        let start: u64 = model
            .sections
            .iter()
            .take(place)
            .map(|section| section.length)
            .sum();
        let placed = if reserved.is_some() { 0 } else { new.length };
        let common = grain(old) / gcd(grain(old), grain(&new)) * grain(&new);
        let length = (PIECE.max(common) / common * common).min(old.length);
        self.move_piece(control, old.id, &new, placed, start, length, log)
            .await?;
        Ok(true)
    }

    /// Bytes of the volume that fit into a section's members.
    fn capacity(&self, section: &Section) -> u64 {
        let member = section
            .columns
            .first()
            .and_then(|column| column.members.first())
            .map_or(0, model::Member::length);
        if section.columns.len() == 1 {
            member
        } else {
            member / section.unit * section.row()
        }
    }

    async fn successor(
        &self,
        model: &model::Volume,
        old: &Section,
        wanted: &Attributes,
    ) -> Result<(Section, Option<Rc<ParityLog<D>>>), Stop> {
        let request = place::SectionRequest {
            length: old.length,
            attributes: wanted,
            block: model.block,
            excluded: &[],
            use_spares: false,
            bitmap: 0,
            state: MemberState::InSync,
            number: model.next_section,
            first_member: model.next_member,
        };
        let placed = place::place_section(&self.core.placing(), &request);
        let section = placed
            .map_err(|error| Stop::because("there is no place for the new layout", &error))?
            .section;
        if section.parity == 0 {
            return Ok((section, None));
        }
        let log = self.core.new_parity_log(model.uuid, &section).await;
        let log =
            log.map_err(|error| Stop::because("cannot make the parity log of the new layout", &error))?;
        Ok((section, Some(log)))
    }

    /// Moves `length` bytes of the volume from `start` on, the front of section `old`, into `new`, whose first `placed` bytes
    /// are in use.
    #[expect(clippy::too_many_arguments, reason = "all of it describes one piece")]
    async fn move_piece(
        &self,
        control: &Control,
        old: u32,
        new: &Section,
        placed: u64,
        start: u64,
        length: u64,
        log: Option<Rc<ParityLog<D>>>,
    ) -> Result<(), Stop> {
        let _copying = self.copying().await;
        let target = Section {
            length: placed + length,
            ..new.clone()
        };
        let target = SectionMap::new(&target, start - placed, &|id| self.core.disk(id));
        let row = target.shape.row_bytes();
        let window = if target.shape.columns == 1 {
            WINDOW
        } else {
            (WINDOW.max(row) / row) * row
        };
        let touched = Rc::new(Touched {
            start,
            end: start + length,
            window,
            windows: RefCell::new((0..length.div_ceil(window)).collect()),
        });
        *self.volume.shadow.borrow_mut() = Some(Rc::clone(&touched));
        let done = self
            .copy_and_switch(control, old, new, &target, &touched, log)
            .await;
        *self.volume.shadow.borrow_mut() = None;
        done
    }

    async fn copy_and_switch(
        &self,
        control: &Control,
        old: u32,
        new: &Section,
        target: &SectionMap<D>,
        touched: &Touched,
        log: Option<Rc<ParityLog<D>>>,
    ) -> Result<(), Stop> {
        for round in 0..ROUNDS {
            let windows = touched.windows.take();
            if windows.is_empty() {
                break;
            }
            if round > 0 {
                cover!("relayout: windows that were written meanwhile are copied again");
            }
            for index in windows {
                let (from, to) = touched.range(index);
                let _held = self.volume.ranges.hold(from, to).await;
                touched.windows.borrow_mut().remove(&index);
                let copied = self.copy_window(target, from, to).await?;
                if round == 0 {
                    control.skip(to - from - copied);
                    control.progress(&self.core.clock, copied).await?;
                }
            }
        }
        let held = self.volume.ranges.hold(touched.start, touched.end).await;
        for index in touched.windows.take() {
            cover!("relayout: the last windows are copied while guests wait");
            let (from, to) = touched.range(index);
            self.copy_window(target, from, to).await?;
        }
        for disk in target.disks() {
            let flushed = disk.flush(&self.core.clock).await;
            flushed.map_err(|error| Stop::because("cannot flush the devices of the new layout", &error))?;
        }
        let (id, length) = (self.volume.id, touched.end - touched.start);
        if let Some(log) = log {
            self.volume.logs.borrow_mut().insert(new.id, log);
        }
        let changed = self.core.change(|config| {
            let faulty =
                |extent: &Extent| !config.device(extent.device).is_some_and(model::Device::is_holder);
            if section_extents(new).any(faulty)
                && !config
                    .volume(id)
                    .is_some_and(|volume| volume.sections.iter().any(|section| section.id == new.id))
            {
                return Err(Stop::Failed(
                    "a device of the new layout failed: try again".into(),
                ));
            }
            let Some(volume) = config.volume_mut(id) else {
                return Err(Stop::Failed("the volume was deleted".into()));
            };
            if new.is_redundant() && volume.log_devices.is_empty() {
                return Err(Stop::Failed(
                    "the devices for the volume's log failed: try again".into(),
                ));
            }
            move_boundary(volume, old, new, length);
            volume.next_section = volume.next_section.max(new.id + 1);
            let last = section_members(new).map(|member| member.id.0).max().unwrap_or(0);
            volume.next_member = volume.next_member.max(last + 1);
            Ok(())
        });
        let (_, maps) = changed.await?;
        let freed = self.core.reserve(
            maps.iter()
                .flat_map(|map| map.volume.extents().copied())
                .collect(),
        );
        for map in maps {
            self.core.drained(map).await;
        }
        drop(freed);
        drop(held);
        let map = self.volume.map();
        self.volume
            .logs
            .borrow_mut()
            .retain(|id, _| map.sections.iter().any(|section| section.id == *id));
        drop(map);
        Ok(())
    }

    /// Copies a window of the volume into the new section, which becomes zero where nothing is in use; gives the bytes that
    /// were copied. The window is claimed.
    async fn copy_window(&self, target: &SectionMap<D>, from: u64, to: u64) -> Result<u64, Stop> {
        let length = to - from;
        let buffer = AlignedBuffer::new(usize::try_from(length).unwrap_or(0));
        // SAFETY: the buffer outlives the requests below, which are all that uses it.
        let memory: [IoBuf; 1] = [unsafe { buffer.io(0, buffer.as_slice().len()) }];
        let (mut at, mut copied) = (from, 0);
        while let Some((start, end)) = self.volume.next_used(at, to) {
            let map = self.volume.map();
            let part = list::part(&memory, start - from, end - start);
            let read = self.read_map(&map, start, &part, true).await;
            drop(map);
            read.map_err(|error| Stop::because("cannot read what is to be moved", &error))?;
            copied += end - start;
            at = end;
        }
        let within = from - target.start;
        let mut failed = Vec::new();
        if copied == 0 {
            cover!("relayout: what is not in use becomes zero");
            failed.extend(self.zero_rows(target, within, length).await);
        } else if target.shape.parity > 0 {
            failed.extend(self.put_rows(target, within, &buffer).await);
        } else {
            let payload = Payload::Data(&memory, Durability::Volatile);
            failed.extend(self.put_columns(target, within, length, payload).await.failed);
        }
        if failed.is_empty() {
            return Ok(copied);
        }
        self.core.fail(&failed).await?;
        Err(Stop::Failed(
            "a device of the new layout failed: try again".into(),
        ))
    }

    /// Makes a part of a section zero that nobody reads yet, whole rows, the last one perhaps short; gives the devices that failed.
    async fn zero_rows(&self, target: &SectionMap<D>, from: u64, length: u64) -> Vec<Rc<Disk<D>>> {
        let (payload, shape) = (Payload::Zero(ZeroMode::MayUnmap), &target.shape);
        if shape.parity == 0 {
            return self.put_columns(target, from, length, payload).await.failed;
        }
        let row = shape.row_bytes();
        let (first, last) = (
            from / row * shape.unit,
            (from + length).div_ceil(row) * shape.unit,
        );
        let mut failed = Vec::new();
        for column in &target.columns {
            let written = column
                .write(self.clock(), first, last - first, payload, true)
                .await;
            failed.extend(written.failed);
        }
        failed
    }
}

fn section_members(section: &Section) -> impl Iterator<Item = &model::Member> {
    section.columns.iter().flat_map(|column| &column.members)
}

fn extents_of(section: &Section) -> Vec<Extent> {
    section_extents(section).chain(&section.log).copied().collect()
}

impl From<place::PlaceError> for Stop {
    fn from(error: place::PlaceError) -> Self {
        Self::Failed(Refused::because("there is no place", &error).to_string())
    }
}
