//! Reads.

use block_io::{AlignedBuffer, BlockDevice, Clock, IoBuf};

use super::handle::File;
use super::memory::{self, whole};
use super::plan::{Piece, Pieces, Source};
use super::write::PAGE_BYTES;
use crate::checksum::crc32c;
use crate::error::{FsError, Refusal};
use crate::event::Event;
use crate::gate::{self, Boxed};
use crate::state::Stop;
use crate::tree::node::Body;
use crate::tree::radix::Look;
use crate::units::{SUB_CLUSTER, SUBS};
use crate::volume::VolumeCore;

/// What to do when data differ from their checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mismatch {
    /// It is an error: a write may be between its data and their checksum.
    Tell,
    /// Nobody writes there: the other copies are asked.
    Heal,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> File<V, C> {
    pub(super) async fn read_range(
        &self,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
    ) -> Result<(), FsError> {
        let read = self.read_once(offset, length, buffers, Mismatch::Tell).await;
        let Err(FsError::Checksum { .. }) = read else {
            return read;
        };
        // A write may have been between its data and their checksum.
        block_io::cover!("filesys: a checksum differs at first sight");
        let (first, last) = (offset / PAGE_BYTES, (offset + length - 1) / PAGE_BYTES);
        let file = self.head();
        let _alone = file.gate.alone(first, last).await;
        self.read_alone(offset, length, buffers).await
    }

    /// As [`Self::read_range`], where nobody writes meanwhile: what differs is looked for in other copies.
    pub(super) async fn read_alone(
        &self,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
    ) -> Result<(), FsError> {
        let read = self.read_once(offset, length, buffers, Mismatch::Heal).await;
        if let Err(FsError::Checksum { file, offset }) = &read {
            tracing::error!(%file, offset, "data are not what was written");
            self.core.event(Event::Corrupt {
                file: *file,
                offset: *offset,
            });
        }
        read
    }

    async fn read_once(
        &self,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
        mismatch: Mismatch,
    ) -> Result<(), FsError> {
        if length == 0 {
            return Ok(());
        }
        // Places that are looked up now are not given away before this ends.
        let _running = self.core.epochs.begin();
        let pieces = self.read_plan(offset, length).await?;
        if let [
            Piece {
                source:
                    Source::Data {
                        volume,
                        offset: from,
                        checked: false,
                    },
                ..
            },
        ] = &*pieces
            && is_aligned(volume, *from, length)
        {
            return Ok(volume.device.read(*from, buffers).await?);
        }
        self.read_pieces(offset, &pieces, buffers, mismatch).await
    }

    async fn read_plan(&self, offset: u64, length: u64) -> Result<Pieces<V>, FsError> {
        loop {
            let chain = if self.chain_is_fresh() {
                self.known_chain()
            } else {
                self.chain().await?
            };
            match self.plan_read(&self.core.state, &chain, offset, length) {
                Ok(pieces) => return Ok(pieces),
                Err(stop) => self.core.resolve(Refusal::Stop(stop)).await?,
            }
        }
    }

    async fn read_pieces(
        &self,
        offset: u64,
        pieces: &[Piece<V>],
        buffers: &[IoBuf],
        mismatch: Mismatch,
    ) -> Result<(), FsError> {
        let mut reads: Vec<Boxed<'_, Result<(), FsError>>> = Vec::new();
        let mut done = 0;
        for piece in pieces {
            let memory = memory::part(buffers, done, piece.length);
            let at = offset + done;
            done += piece.length;
            match &piece.source {
                Source::Zero => memory.iter().for_each(|buffer| buffer.fill(0)),
                Source::Data {
                    volume,
                    offset,
                    checked,
                } => {
                    reads.push(Box::pin(async move {
                        if !checked && is_aligned(volume, *offset, piece.length) {
                            return Ok(volume.device.read(*offset, &memory).await?);
                        }
                        let checked = checked.then_some(mismatch);
                        self.read_whole(volume, at, *offset, piece.length, checked, &memory)
                            .await
                    }));
                }
            }
        }
        gate::all(reads).await.into_iter().collect()
    }

    /// Reads whole sub-clusters into memory of our own, verifies them, and copies what is wanted.
    async fn read_whole(
        &self,
        volume: &VolumeCore<V>,
        at: u64,
        offset: u64,
        length: u64,
        checked: Option<Mismatch>,
        buffers: &[IoBuf],
    ) -> Result<(), FsError> {
        let start = offset - offset % SUB_CLUSTER;
        let end = (offset + length).next_multiple_of(SUB_CLUSTER);
        let mut buffer = AlignedBuffer::new(usize::try_from(end - start).unwrap_or(0));
        volume.device.read(start, &whole(&buffer)).await?;
        let from = at - (offset - start).min(at);
        match checked {
            None => {}
            Some(Mismatch::Tell) => self.verify(volume, from, start, buffer.as_slice()).await?,
            Some(Mismatch::Heal) => {
                let healed = self.core.heal_data(volume, start, buffer.as_mut_slice()).await?;
                self.core.tell_healed(self.id(), from, &healed)?;
            }
        }
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let wanted = skip..skip + usize::try_from(length).unwrap_or(0);
        memory::scatter(buffers, buffer.as_slice().get(wanted).unwrap_or_default());
        Ok(())
    }

    /// Compares sub-clusters with their checksums.
    async fn verify(&self, volume: &VolumeCore<V>, at: u64, start: u64, bytes: &[u8]) -> Result<(), FsError> {
        for (number, sub) in (0_u64..).zip(bytes.chunks(usize::try_from(SUB_CLUSTER).unwrap_or(4096))) {
            let index = start / SUB_CLUSTER + number;
            let known = self.core.look(|_| Ok(sum_of(volume, index)?)).await?;
            if known == 0 || known == data_sum(sub) {
                continue;
            }
            let offset = at + number * SUB_CLUSTER;
            let file = self.id();
            return Err(FsError::Checksum { file, offset });
        }
        Ok(())
    }
}

/// Whether a volume takes a request like this as it is.
pub(super) fn is_aligned<V: BlockDevice>(volume: &VolumeCore<V>, offset: u64, length: u64) -> bool {
    // What a volume must be able to do; all others ask it.
    if (offset | length).is_multiple_of(SUB_CLUSTER) {
        return true;
    }
    let block = u64::from(volume.device.geometry().logical_block);
    offset.is_multiple_of(block) && length.is_multiple_of(block)
}

/// The checksum of sub-cluster number `index` of a volume; 0 is unknown.
pub(crate) fn sum_of<V>(volume: &VolumeCore<V>, index: u64) -> Result<u32, Stop> {
    Ok(match volume.sums.look(index)? {
        Look::Empty | Look::Run(_) => 0,
        Look::Leaf(node) => match &*node.body.borrow() {
            Body::Sums(sums) => sums[usize::try_from(index % sums.len() as u64).unwrap_or(0)],
            _ => 0,
        },
    })
}

/// The checksum of a sub-cluster's data; never 0.
pub(crate) fn data_sum(bytes: &[u8]) -> u32 {
    crc32c(bytes).max(1)
}

const _: () = assert!(SUBS == 16);
