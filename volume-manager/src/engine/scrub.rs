//! Reading everything, to find what is wrong before it is needed.
//!
//! Members that cannot be read are written anew from others ([`Volume::read_column`] has that done). Copies that differ are made
//! equal to the first one, parity that does not fit is computed anew: without checksums nobody can say which one was right, so the
//! event tells a person where it was. What lies in regions that are being resynced is left to the resync.

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, cover};

use super::event::Event;
use super::job::{Control, Stop};
use super::map::{MemberMap, Payload, SectionMap};
use super::volume::Volume;

/// Bytes of a volume that are looked at under one claim, for sections without rows.
const WINDOW: u64 = 256 << 10;

fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: callers keep the buffer alive beyond the requests, and do not touch it meanwhile.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Reads the whole volume, compares what is there more than once, and repairs.
    pub(crate) async fn scrub(&self, control: &Control) -> Result<(), Stop> {
        let mut at = 0;
        loop {
            let size = self.volume.map().volume.size;
            let used = self.volume.next_used(at, size).map_or(size, |(from, _)| from);
            if used > at {
                cover!("scrub: what is not in use is not read");
                control.skip(used - at);
                at = used;
            }
            let step = {
                let map = self.volume.map();
                let Some((section, from, part)) = map.parts(at, u64::MAX - at).next() else {
                    break;
                };
                let row = section.shape.row_bytes();
                if section.shape.columns == 1 {
                    WINDOW.min(part)
                } else {
                    (row - from % row).min(part)
                }
            };
            self.scrub_window(at, step).await?;
            control.progress(&self.core.clock, step).await?;
            self.core.go_on()?;
            at += step;
        }
        Ok(())
    }

    async fn scrub_window(&self, at: u64, length: u64) -> Result<(), Stop> {
        let _copying = self.copying().await;
        let (_held, map) = self.claim(at, length).await;
        if self.volume.is_unclean(at, length) {
            return Ok(());
        }
        for (section, from, part) in map.parts(at, length) {
            let shape = &section.shape;
            let (first, last) = if shape.columns == 1 {
                (from, from + part)
            } else {
                let row = shape.row_bytes();
                (from / row * shape.unit, (from + part).div_ceil(row) * shape.unit)
            };
            let mut repaired = 0;
            for (index, column) in section.columns.iter().enumerate() {
                let mut at = first;
                while let Some((from, to)) = self.volume.next_used_of_column(section, index, at, last) {
                    repaired += self.compare_members(column, from, to).await?;
                    at = to;
                }
            }
            if shape.parity > 0 {
                repaired += self.compare_parity(section, first, last).await?;
            }
            if repaired > 0 {
                cover!("scrub: copies or parity differed");
                self.core.tell(Event::Repaired {
                    volume: self.volume.name.to_string(),
                    offset: at,
                    length: repaired,
                });
            }
        }
        Ok(())
    }

    /// Makes the members of a column equal to the first that can be read; gives the bytes that differed.
    async fn compare_members(
        &self,
        column: &super::map::ColumnMap<D>,
        first: u64,
        last: u64,
    ) -> Result<u64, Stop> {
        let length = usize::try_from(last - first).unwrap_or(0);
        let mut good: Option<AlignedBuffer> = None;
        let mut bad: Vec<&MemberMap<D>> = Vec::new();
        for member in column.sources() {
            let buffer = AlignedBuffer::new(length);
            match member.read(self.clock(), first, &memory(&buffer)).await {
                Err(_) => bad.push(member),
                Ok(()) => match &good {
                    None => good = Some(buffer),
                    Some(reference) if reference.as_slice() != buffer.as_slice() => bad.push(member),
                    Some(_) => {}
                },
            }
        }
        let Some(good) = good else { return Ok(0) };
        for member in &bad {
            let content = memory(&good);
            let payload = Payload::Data(&content, Durability::Durable);
            if let Err((device, _)) = member.write(self.clock(), first, last - first, payload).await {
                self.core.fail(&[device]).await?;
            }
        }
        Ok((last - first) * bad.len() as u64)
    }

    /// Makes the parity of rows fit; gives the bytes that did not.
    async fn compare_parity(&self, section: &SectionMap<D>, first: u64, last: u64) -> Result<u64, Stop> {
        let shape = &section.shape;
        let mut repaired = 0;
        for row in first / shape.unit..last / shape.unit {
            if section.missing() > 0 {
                // What is missing cannot be compared; the resync makes it whole.
                continue;
            }
            let fits = self.parity_fits(section, row).await;
            match fits {
                Ok(true) => {}
                Ok(false) => {
                    let written = self.rewrite_parity(section, row).await;
                    let failed =
                        written.map_err(|error| Stop::because("cannot compute parity anew", &error))?;
                    self.core.fail(&failed).await?;
                    repaired += shape.unit;
                }
                // A column that cannot be read is being repaired.
                Err(_) => cover!("scrub: a column cannot be read"),
            }
        }
        Ok(repaired)
    }
}
