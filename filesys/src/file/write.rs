//! Writes.
//!
//! ```text
//!   all sub-clusters valid          the data go where the old ones are; no metadata
//!   some are not                    their clusters get places; the data go there; then the map says that they are valid
//!   parts of some that are not      these are read from the ancestors first and written whole, alone
//! ```

use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, IoError};
use smallvec::SmallVec;

use super::handle::File;
use super::memory::{self, whole};
use super::plan::{Part, Piece, Pieces, Source, parts};
use super::read::is_aligned;
use crate::core::Need;
use crate::entry::Entry;
use crate::error::{FsError, Refusal};
use crate::file_core::FileCore;
use crate::gate::{self, Boxed, Pass};
use crate::record::{MAP_BYTES, Record, UNCHECKED_BYTES};
use crate::state::{State, Stop};
use crate::tree::node::{FANOUT, Missing};
use crate::units::{CLUSTER, Location, SUB_CLUSTER, SubMask};
use crate::volume::VolumeCore;

/// Bytes of a file below one page of its map.
pub(super) const PAGE_BYTES: u64 = FANOUT as u64 * CLUSTER;

/// How a write is done.
enum Way<V> {
    /// Over valid data.
    Over(Pieces<V>),
    /// Some clusters get places, or sub-clusters become valid.
    Places,
    /// Parts of sub-clusters that have to be read first.
    Merge,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> File<V, C> {
    pub(super) async fn write_range(
        &self,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
        durability: Durability,
    ) -> Result<(), FsError> {
        if length == 0 {
            return Ok(());
        }
        self.core.check()?;
        let (first, last) = (offset / PAGE_BYTES, (offset + length - 1) / PAGE_BYTES);
        loop {
            let file = self.head();
            let pass = file.gate.share(first, last).await;
            if !Rc::ptr_eq(&file, &self.head()) {
                continue;
            }
            self.check_thawed(&file)?;
            check_inside(&file, offset, length)?;
            let _running = self.core.epochs.begin();
            match self
                .core
                .look(|state| Ok(way(state, &file, offset, length)?))
                .await?
            {
                Way::Over(pieces) => {
                    return self.write_over(&file, &pieces, buffers, durability).await;
                }
                Way::Places => {
                    return self
                        .write_places(&file, &pass, offset, length, buffers, durability)
                        .await;
                }
                Way::Merge => {}
            }
            drop(pass);
            let pass = file.gate.alone(first, last).await;
            if Rc::ptr_eq(&file, &self.head()) {
                self.check_thawed(&file)?;
                check_inside(&file, offset, length)?;
                return self
                    .write_merged(&file, &pass, offset, length, buffers, durability)
                    .await;
            }
        }
    }

    pub(super) fn check_thawed(&self, file: &FileCore) -> Result<(), FsError> {
        let inode = file.inode.borrow();
        if inode.is_frozen() || !inode.is_linked() {
            return Err(FsError::Frozen {
                file: inode.name.clone(),
            });
        }
        Ok(())
    }

    async fn write_over(
        &self,
        file: &FileCore,
        pieces: &[Piece<V>],
        buffers: &[IoBuf],
        durability: Durability,
    ) -> Result<(), FsError> {
        if let [
            Piece {
                source: Source::Data { volume, offset, .. },
                ..
            },
        ] = pieces
        {
            volume.check_works()?;
            volume.device.write(*offset, buffers, durability).await?;
            note_written(file, volume, durability);
            self.commit_durable(file, durability).await?;
            return Ok(volume.check_works()?);
        }
        let mut writes: Vec<Boxed<'_, Result<(), IoError>>> = Vec::new();
        let mut done = 0;
        for piece in pieces {
            let memory = memory::part(buffers, done, piece.length);
            done += piece.length;
            if let Source::Data { volume, offset, .. } = &piece.source {
                volume.check_works()?;
                writes.push(Box::pin(async move {
                    volume.device.write(*offset, &memory, durability).await?;
                    note_written(file, volume, durability);
                    Ok(())
                }));
            }
        }
        gate::all(writes).await.into_iter().collect::<Result<(), _>>()?;
        self.commit_durable(file, durability).await?;
        pieces.iter().try_for_each(|piece| match &piece.source {
            Source::Data { volume, .. } => Ok(volume.check_works()?),
            Source::Zero => Ok(()),
        })
    }

    /// Data that are durable are worth nothing before the map that says where they are is.
    async fn commit_durable(&self, file: &FileCore, durability: Durability) -> Result<(), FsError> {
        match durability {
            Durability::Durable => self.core.commit(file.group.get()).await,
            Durability::Volatile => Ok(()),
        }
    }

    /// Parts of sub-clusters: whole ones, with what they had before, through memory of our own.
    async fn write_merged(
        &self,
        file: &Rc<FileCore>,
        pass: &Pass<'_>,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
        durability: Durability,
    ) -> Result<(), FsError> {
        block_io::cover!("filesys: a part of a sub-cluster was written");
        let start = offset - offset % SUB_CLUSTER;
        let end = (offset + length).next_multiple_of(SUB_CLUSTER);
        let size = file.inode.borrow().size;
        let mut buffer = AlignedBuffer::new(usize::try_from(end - start).unwrap_or(0));
        // What lies behind the end of the file stays zero.
        let readable = end.min(size) - start;
        let memory = memory::part(&whole(&buffer), 0, readable);
        let inside = offset.is_multiple_of(SUB_CLUSTER) && (offset + length).is_multiple_of(SUB_CLUSTER);
        if !inside {
            self.read_alone(start, readable, &memory).await?;
        }
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let wanted = skip..skip + usize::try_from(length).unwrap_or(0);
        if let Some(target) = buffer.as_mut_slice().get_mut(wanted) {
            memory::gather(buffers, target);
        }
        let checked = file.inode.borrow().attributes.checksums
            || self
                .core
                .look(|_| {
                    for part in parts(start, end - start) {
                        if entry_of(file, part.cluster)?.is_checked() {
                            return Ok(true);
                        }
                    }
                    Ok(false)
                })
                .await?;
        let sums = if checked {
            buffer
                .as_slice()
                .chunks(usize::try_from(SUB_CLUSTER).unwrap_or(4096))
                .map(super::read::data_sum)
                .collect()
        } else {
            Vec::new()
        };
        let memory = whole(&buffer);
        self.write_whole(file, pass, start, end - start, &memory, durability, &sums)
            .await
    }

    async fn write_places(
        &self,
        file: &Rc<FileCore>,
        pass: &Pass<'_>,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
        durability: Durability,
    ) -> Result<(), FsError> {
        self.write_whole(file, pass, offset, length, buffers, durability, &[])
            .await
    }

    /// Writes to clusters that have places or get them; edges that are no whole sub-clusters are valid already.
    #[expect(
        clippy::too_many_arguments,
        reason = "a request with its memory, split from its callers"
    )]
    async fn write_whole(
        &self,
        file: &Rc<FileCore>,
        _pass: &Pass<'_>,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
        durability: Durability,
        sums: &[u32],
    ) -> Result<(), FsError> {
        let count =
            usize::try_from((offset + length).div_ceil(CLUSTER) - offset / CLUSTER).unwrap_or(usize::MAX);
        let ticket = self
            .core
            .admit(count.saturating_mul(MAP_BYTES + UNCHECKED_BYTES), Need::Ordinary)
            .await?;
        let mut places = self.core.places(file);
        let mut located: SmallVec<[(Part, Location); 2]> = SmallVec::new();
        for part in parts(offset, length) {
            let careful = self.careful.get();
            let at = self
                .core
                .place_loaded(file, &mut places, part.index(), careful)
                .await?;
            located.push((part, at));
        }
        check_places(&self.core.state, &located)?;
        let checking = if sums.is_empty() {
            None
        } else {
            Some(self.core.begin_checked(&ticket, &located).await?)
        };
        let written = self.write_located(file, &located, buffers, durability).await;
        if written.is_err() && !sums.is_empty() {
            block_io::cover!("filesys: a write of data with checksums failed");
            // Nobody knows what is there.
            self.core.put_sums(file, &located, &vec![0; sums.len()]).await?;
        }
        written?;
        if !sums.is_empty() {
            self.core.put_sums(file, &located, sums).await?;
        }
        drop(checking);
        let (group, ()) = self
            .core
            .transact_admitted(&ticket, |state| {
                // A volume may have failed while its data were on their way.
                check_places(state, &located)?;
                Ok((map_records(file, &located, !sums.is_empty())?, ()))
            })
            .await?;
        places.mapped();
        drop(places);
        file.group.set(file.group.get().max(group));
        if durability == Durability::Durable {
            self.core.commit(file.group.get()).await?;
            return check_places(&self.core.state, &located);
        }
        let mut before = None;
        for (_, at) in &located {
            if before.replace(at.volume) != Some(at.volume) {
                self.core.needs_flush(group, at.volume);
            }
        }
        Ok(())
    }

    /// Writes the data to their places, as few requests as can be.
    async fn write_located(
        &self,
        file: &FileCore,
        located: &[(Part, Location)],
        buffers: &[IoBuf],
        durability: Durability,
    ) -> Result<(), FsError> {
        let mut writes: Vec<Boxed<'_, Result<(), IoError>>> = Vec::new();
        let mut done = 0;
        let mut rest = located;
        while let Some((part, at)) = rest.first() {
            let from = at.offset() + part.start;
            let mut to = at.offset() + part.end;
            let run = 1 + rest[1..]
                .iter()
                .take_while(|(next, there)| {
                    let follows = there.volume == at.volume && there.offset() + next.start == to;
                    if follows {
                        to = there.offset() + next.end;
                    }
                    follows
                })
                .count();
            let volume = self.core.state.volume(at.volume)?;
            if run == located.len() {
                volume.device.write(from, buffers, durability).await?;
                note_written(file, &volume, durability);
                return Ok(());
            }
            let memory = memory::part(buffers, done, to - from);
            done += to - from;
            writes.push(Box::pin(async move {
                volume.device.write(from, &memory, durability).await?;
                note_written(file, &volume, durability);
                Ok(())
            }));
            rest = &rest[run..];
        }
        gate::all(writes).await.into_iter().collect::<Result<(), _>>()?;
        Ok(())
    }
}

/// A volume that has failed takes no writes.
fn check_places<V: BlockDevice>(state: &State<V>, located: &[(Part, Location)]) -> Result<(), FsError> {
    let mut before = None;
    for (_, at) in located {
        if before.replace(at.volume) != Some(at.volume) {
            state.volume(at.volume)?.check_works()?;
        }
    }
    Ok(())
}

/// The file may have shrunk while a write waited for its turn.
fn check_inside(file: &FileCore, offset: u64, length: u64) -> Result<(), FsError> {
    let inode = file.inode.borrow();
    if offset + length > inode.size {
        block_io::cover!("filesys: a file shrank under a write");
        return Err(FsError::State {
            object: inode.name.clone(),
            problem: "it became smaller meanwhile".into(),
        });
    }
    Ok(())
}

/// A write to a volume has completed.
pub(crate) fn note_written<V>(file: &FileCore, volume: &VolumeCore<V>, durability: Durability) {
    if durability == Durability::Durable {
        return;
    }
    let written = volume.written.get() + 1;
    volume.written.set(written);
    file.written.borrow_mut().insert(volume.index, written);
}

/// How a write has to be done.
fn way<V: BlockDevice>(state: &State<V>, file: &FileCore, offset: u64, length: u64) -> Result<Way<V>, Stop> {
    let Some(map) = file.map() else {
        return Ok(Way::Merge);
    };
    if file.inode.borrow().attributes.checksums {
        return Ok(Way::Merge);
    }
    let mut pieces = Pieces::new();
    let mut places = false;
    for part in parts(offset, length) {
        let entry = map.entry(part.cluster)?;
        let touched = part.touched().0;
        let edges = touched & !SubMask::inside(part.start, part.end).0;
        // What has checksums gets new ones, whatever the attributes say now.
        if edges & !entry.valid() != 0 || entry.is_checked() {
            return Ok(Way::Merge);
        }
        let Some(at) = entry.location() else {
            places = true;
            continue;
        };
        let volume = state.volume(at.volume)?;
        if edges != 0 && !is_aligned(&volume, at.offset() + part.start, part.end - part.start) {
            return Ok(Way::Merge);
        }
        if touched & !entry.valid() == 0 {
            over(&mut pieces, volume, at, part);
        } else {
            places = true;
        }
    }
    Ok(if places { Way::Places } else { Way::Over(pieces) })
}

fn over<V>(pieces: &mut Pieces<V>, volume: Rc<VolumeCore<V>>, at: Location, part: Part) {
    let (from, length) = (at.offset() + part.start, part.end - part.start);
    if let Some(Piece {
        source: Source::Data {
            volume: before,
            offset,
            ..
        },
        length: so_far,
    }) = pieces.last_mut()
        && before.index == volume.index
        && *offset + *so_far == from
    {
        *so_far += length;
        return;
    }
    pieces.push(Piece {
        source: Source::Data {
            volume,
            offset: from,
            checked: false,
        },
        length,
    });
}

/// What the map says of clusters whose data are there now.
fn map_records(
    file: &FileCore,
    located: &[(Part, Location)],
    checked: bool,
) -> Result<SmallVec<[Record; 1]>, Refusal> {
    let mut records = SmallVec::new();
    for (part, at) in located {
        let old = entry_of(file, part.cluster)?;
        let base = if old.location() == Some(*at) {
            old
        } else {
            Entry::at(*at).with_subs(0, old.zero())
        };
        let new = base
            .with_valid(part.touched())
            .with_checked(checked || base.is_checked());
        if new == old {
            continue;
        }
        Record::push_map(&mut records, file.id, part.index(), new, false);
    }
    Ok(records)
}

pub(crate) fn entry_of(file: &FileCore, cluster: u64) -> Result<Entry, Missing> {
    file.map().map_or(Ok(Entry::HOLE), |map| map.entry(cluster))
}
