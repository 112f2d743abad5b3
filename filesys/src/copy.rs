//! Data are copied from place to place: when files are relocated, and when layers are merged.
//!
//! Who copies has the parts of the files alone, so nobody writes to either place. Checksums go with the data, they are not computed
//! anew: what is rotten stays known as rotten. But the old place is given up afterwards, and with it all other copies that a mirror or
//! parity has of it. So data with checksums are verified first, and what is not right is taken from another copy while there is one.

use std::rc::Rc;

use block_io::{BlockDevice, Clock, Durability, IoBuf, ScratchBuffer};

use crate::core::Core;
use crate::entry::Entry;
use crate::error::FsError;
use crate::event::Event;
use crate::file::note_written;
use crate::file_core::FileCore;
use crate::units::{CLUSTER, Location, SUB_CLUSTER, SUBS, SubMask};
use crate::volume::VolumeCore;

/// Sub-clusters that follow each other, at both ends.
struct Span<V> {
    source: Rc<VolumeCore<V>>,
    target: Rc<VolumeCore<V>>,
    /// Bytes on the volumes.
    from: u64,
    to: u64,
    length: u64,
    /// First byte in the file.
    at: u64,
    /// They have checksums.
    checked: bool,
}

impl<V> Span<V> {
    fn bytes(&self) -> usize {
        // At most a run of clusters that is copied at once.
        usize::try_from(self.length).unwrap_or(0)
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Copies sub-clusters of a cluster of a file to the same places of another one. `entry` is what the map says of the source.
    pub(crate) async fn copy_subs(
        &self,
        file: &FileCore,
        cluster: u64,
        entry: Entry,
        to: Location,
        mask: SubMask,
    ) -> Result<(), FsError> {
        let Some(from) = entry.location() else {
            return Ok(());
        };
        let (source, target) = (self.state.volume(from.volume)?, self.state.volume(to.volume)?);
        let runs = &*runs(mask);
        let span = |(first, count): (u32, u64)| {
            let skip = u64::from(first) * SUB_CLUSTER;
            Span {
                source: Rc::clone(&source),
                target: Rc::clone(&target),
                from: from.offset() + skip,
                to: to.offset() + skip,
                length: count * SUB_CLUSTER,
                at: cluster * CLUSTER + skip,
                checked: entry.is_checked(),
            }
        };
        let [(first, _), .., (last, count)] = *runs else {
            return match *runs {
                [run] => self.copy_span(file, &span(run)).await,
                _ => Ok(()),
            };
        };
        // One read, with what lies between, costs less than several.
        let all = span((first, u64::from(last - first) + count));
        let mut read = ScratchBuffer::new(all.bytes());
        let together = all
            .source
            .device
            .read(all.from, &part(&read, 0, all.bytes()))
            .await
            .is_ok();
        for run in runs.iter().copied().map(span) {
            if together {
                let skip = usize::try_from(run.from - all.from).unwrap_or(0);
                self.write_span(file, &run, &mut read, skip).await?;
            } else {
                // Perhaps what lies between cannot be read, which nobody needs.
                block_io::cover!("filesys: parts are copied one by one as they cannot be read together");
                self.copy_span(file, &run).await?;
            }
        }
        Ok(())
    }

    /// Copies whole clusters of a file that follow each other, `count` from the one that `entry` speaks of.
    pub(crate) async fn copy_clusters(
        &self,
        file: &FileCore,
        cluster: u64,
        entry: Entry,
        to: Location,
        count: u64,
    ) -> Result<(), FsError> {
        let Some(from) = entry.location() else {
            return Ok(());
        };
        let span = Span {
            source: self.state.volume(from.volume)?,
            target: self.state.volume(to.volume)?,
            from: from.offset(),
            to: to.offset(),
            length: count * CLUSTER,
            at: cluster * CLUSTER,
            checked: entry.is_checked(),
        };
        self.copy_span(file, &span).await
    }

    async fn copy_span(&self, file: &FileCore, span: &Span<V>) -> Result<(), FsError> {
        let mut buffer = ScratchBuffer::new(span.bytes());
        let memory = part(&buffer, 0, span.bytes());
        span.source.device.read(span.from, &memory).await?;
        self.write_span(file, span, &mut buffer, 0).await
    }

    /// Puts what was read to its place; it begins after `skip` bytes of `buffer`.
    async fn write_span(
        &self,
        file: &FileCore,
        span: &Span<V>,
        buffer: &mut ScratchBuffer,
        skip: usize,
    ) -> Result<(), FsError> {
        span.target.check_works()?;
        let (first, to_first) = (span.from / SUB_CLUSTER, span.to / SUB_CLUSTER);
        let count = span.length / SUB_CLUSTER;
        let checking = self
            .begin_copy(&span.source, &span.target, to_first, count)
            .await?;
        if span.checked {
            let data = &mut buffer.as_mut_slice()[skip..skip + span.bytes()];
            let healed = self.heal_data(&span.source, span.from, data).await?;
            if let Err(FsError::Checksum { file, offset }) = self.tell_healed(file.id, span.at, &healed) {
                block_io::cover!("filesys: data that are lost are copied with the checksum that says so");
                tracing::error!(%file, offset, "data are not what was written, and are copied as they are");
                self.event(Event::Corrupt { file, offset });
            }
        }
        let memory = part(buffer, skip, span.bytes());
        let write = span.target.device.write(span.to, &memory, Durability::Volatile);
        write.await?;
        note_written(file, &span.target, Durability::Volatile);
        if checking.is_some() {
            self.copy_sums(&span.source, first, &span.target, to_first, count)
                .await?;
        }
        Ok(())
    }
}

/// A part of a buffer for a request, which is awaited while the buffer lives.
fn part(buffer: &ScratchBuffer, start: usize, length: usize) -> [IoBuf; 1] {
    // SAFETY: the functions above keep the buffer, and do not use it otherwise, until the request has ended.
    [unsafe { buffer.io(start, length) }]
}

/// Sub-clusters of a mask that follow each other: the first, and their count.
fn runs(mask: SubMask) -> Vec<(u32, u64)> {
    let mut runs = Vec::new();
    let mut sub = 0;
    while sub < SUBS {
        let count = (sub..SUBS).take_while(|sub| mask.contains(*sub)).count();
        if count > 0 {
            runs.push((sub, count as u64));
        }
        sub += u32::try_from(count).unwrap_or(SUBS) + 1;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_mask() {
        assert_eq!(runs(SubMask(0)), []);
        assert_eq!(runs(SubMask(0xffff)), [(0, 16)]);
        assert_eq!(runs(SubMask(0b1011_0000_0000_0110)), [(1, 2), (12, 2), (15, 1)]);
    }
}
