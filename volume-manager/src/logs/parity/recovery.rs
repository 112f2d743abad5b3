//! What a parity log holds after a crash.

use std::collections::BTreeMap;

use block_io::{BlockDevice, cover};

use super::format::{self, BLOCK, Found, Piece};
use super::{Identity, LogCopy, ParityLog, Shape};
use crate::bytes;
use crate::logs::LogError;

/// Bytes read at once when headers are sought.
const STRIDE: u64 = 1 << 20;

/// By sequence: the header, and the copies that have it.
type Records = BTreeMap<u64, (Found, Vec<usize>)>;

/// A log that was read. Replay it, flush the section, then restart it. All of that may be interrupted, and is done again then.
#[derive(Debug)]
pub struct Recovery<D> {
    shape: Shape,
    copies: Vec<LogCopy<D>>,
    /// From the tail on.
    records: Records,
    /// Behind all headers.
    head: u64,
}

/// All valid headers of copies, as they are found.
#[derive(Debug, Default)]
struct Headers {
    records: Records,
    /// Sequence and tail of the newest.
    newest: Option<(u64, u64)>,
    head: u64,
}

impl Headers {
    fn add(&mut self, copy: usize, found: Found) {
        self.newest = self.newest.max(Some((found.sequence, found.tail)));
        self.head = self.head.max(found.sequence + found.blocks);
        let (first, copies) = self
            .records
            .entry(found.sequence)
            .or_insert_with(|| (found.clone(), Vec::new()));
        // Copies are written from the same memory. Another one with a valid checksum can only be damage; the first one counts.
        if *first == found {
            copies.push(copy);
        }
    }

    /// The records that must be replayed.
    fn since_tail(self) -> Option<(Records, u64)> {
        let (_, tail) = self.newest?;
        let mut records = self.records;
        records.retain(|sequence, (found, _)| *sequence >= tail && !found.is_checkpoint());
        Some((records, self.head))
    }
}

impl<D: BlockDevice + 'static> Recovery<D> {
    pub(super) async fn read(shape: Shape, copies: Vec<LogCopy<D>>) -> Result<Self, LogError> {
        let ring = shape.blocks()?;
        let mut headers = Headers::default();
        for (index, copy) in copies.iter().enumerate() {
            let mut at = 0;
            while at < ring * BLOCK as u64 {
                let length = STRIDE.min(ring * BLOCK as u64 - at);
                let read = bytes::read(&*copy.device, copy.start + at, in_memory(length)).await;
                let buffer = read.map_err(|source| copy.failure(source))?;
                for (slot, block) in (at / BLOCK as u64..).zip(buffer.as_slice().chunks_exact(BLOCK)) {
                    if let Some(found) = format::decode_header(block, shape.identity, slot, ring) {
                        headers.add(index, found);
                    }
                }
                at += length;
            }
        }
        let Identity { volume, section } = shape.identity;
        let (records, head) = headers
            .since_tail()
            .ok_or(LogError::NoRecord { volume, section })?;
        Ok(Self {
            shape,
            copies,
            records,
            head,
        })
    }

    /// Gives every record that may not have reached its place to `apply`, in order, with its row: the pieces must be written as
    /// they are. Returns how many there were.
    ///
    /// # Errors
    /// Those of `apply`; a copy cannot be read.
    pub async fn replay<E: From<LogError>>(
        &self,
        apply: &mut impl AsyncFnMut(u64, &[Piece<'_>]) -> Result<(), E>,
    ) -> Result<u64, E> {
        let ring = self.shape.blocks()?;
        let mut replayed = 0;
        for (sequence, (found, copies)) in &self.records {
            let at = sequence % ring * BLOCK as u64 + BLOCK as u64;
            let copies = copies.iter().filter_map(|index| self.copies.get(*index));
            for copy in copies {
                let read = bytes::read(&*copy.device, copy.start + at, found.padded()).await;
                let mut payload = read.map_err(|source| copy.failure(source))?;
                if let Some(pieces) = found.pieces(payload.as_mut_slice()) {
                    apply(found.row, &pieces).await?;
                    replayed += 1;
                    break;
                }
                cover!("parity log: a record that is not whole on a copy");
            }
        }
        Ok(replayed)
    }

    /// The log, ready for use: what it held is never replayed again. First replay it and flush the section.
    ///
    /// # Errors
    /// A copy has failed.
    pub async fn restart(self) -> Result<ParityLog<D>, LogError> {
        ParityLog::begin(self.shape, self.copies, self.head).await
    }
}

fn in_memory(length: u64) -> usize {
    // At most `STRIDE`.
    usize::try_from(length).unwrap_or(0)
}

/// The rows that a ring says must be replayed; for the fuzzer.
#[doc(hidden)]
pub fn parse_ring(ring: &[u8], identity: Identity) -> Option<Vec<u64>> {
    let blocks = (ring.len() / BLOCK) as u64;
    let mut headers = Headers::default();
    for (slot, block) in (0..).zip(ring.chunks_exact(BLOCK)) {
        if let Some(found) = format::decode_header(block, identity, slot, blocks) {
            headers.add(0, found);
        }
    }
    let (records, _) = headers.since_tail()?;
    let mut rows = Vec::new();
    for (sequence, (found, _)) in records {
        let start = usize::try_from(sequence % blocks).ok()? * BLOCK + BLOCK;
        let mut payload = ring.get(start..)?.get(..found.padded())?.to_vec();
        if found.pieces(&mut payload).is_some() {
            rows.push(found.row);
        }
    }
    Some(rows)
}
