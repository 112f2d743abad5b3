//! Images of this kind are made: data in order of the disk, tables behind the data they are about, the header last.
//!
//! ```text
//!   header │ data … │ L2 │ data … │ L2 │ … │ L1 │ refcount blocks │ refcount table
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::header::{MAGIC, VERSION_3_LENGTH};
use crate::disk::image::{ImageError, ImageWriter, is_zero};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BYTES: usize = 1 << CLUSTER_BITS;
/// Entries of a second table.
const ENTRIES: u64 = CLUSTER / 8;
/// Reference counts of 16 bits in a block.
const COUNTS: u64 = CLUSTER / 2;
/// The only reference to something.
const COPIED: u64 = 1 << 63;

/// An image that is being made, in a file that is empty so far.
#[derive(Debug)]
pub struct Qcow2Writer {
    file: File,
    size: u64,
    /// The next cluster of the file that is free.
    next: u64,
    l1: Vec<u64>,
    /// The second table that is being filled, by its number.
    l2: Option<(u64, Vec<u8>)>,
    /// The cluster of the disk that is being filled, by its number.
    cluster: Option<(u64, Vec<u8>)>,
}

impl Qcow2Writer {
    /// An image of a disk of `size` bytes.
    ///
    /// # Errors
    /// The size is not possible.
    pub fn create(file: File, size: u64) -> Result<Self, ImageError> {
        let tables = size.div_ceil(CLUSTER * ENTRIES).max(1);
        let tables = usize::try_from(tables)
            .ok()
            .filter(|tables| *tables <= (32 << 20) / 8)
            .ok_or_else(|| ImageError::Unsupported(format!("a qcow2 image cannot have {size} bytes")))?;
        Ok(Self {
            file,
            size,
            next: 1,
            l1: vec![0; tables],
            l2: None,
            cluster: None,
        })
    }

    fn put(&self, cluster: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let place = cluster * CLUSTER;
        let written = self.file.write_all_at(bytes, place);
        written.map_err(ImageError::io(format!(
            "cannot write the image at offset {place}"
        )))
    }

    /// Takes free clusters of the file.
    fn take(&mut self, count: u64) -> u64 {
        let first = self.next;
        self.next += count;
        first
    }

    fn end_cluster(&mut self) -> Result<(), ImageError> {
        let Some((number, bytes)) = self.cluster.take() else {
            return Ok(());
        };
        if is_zero(&bytes) {
            return Ok(());
        }
        let table = number / ENTRIES;
        if self.l2.as_ref().is_some_and(|(current, _)| *current != table) {
            self.end_table()?;
        }
        let place = self.take(1);
        self.put(place, &bytes)?;
        let (_, l2) = self.l2.get_or_insert_with(|| (table, vec![0; CLUSTER_BYTES]));
        let index = usize::try_from(number % ENTRIES * 8).unwrap_or(0);
        if let Some(entry) = l2.get_mut(index..index + 8) {
            entry.copy_from_slice(&((place * CLUSTER) | COPIED).to_be_bytes());
        }
        Ok(())
    }

    fn end_table(&mut self) -> Result<(), ImageError> {
        let Some((table, bytes)) = self.l2.take() else {
            return Ok(());
        };
        let place = self.take(1);
        self.put(place, &bytes)?;
        let entry = usize::try_from(table)
            .ok()
            .and_then(|table| self.l1.get_mut(table));
        if let Some(entry) = entry {
            *entry = (place * CLUSTER) | COPIED;
        }
        Ok(())
    }

    /// All clusters have one reference. Returns where the table of reference counts is, and its clusters.
    fn write_counts(&mut self) -> Result<(u64, u64), ImageError> {
        // Blocks and table count themselves.
        let (mut blocks, mut table) = (0, 0);
        loop {
            let all = self.next + blocks + table;
            let (wanted, of_table) = (all.div_ceil(COUNTS), (blocks * 8).div_ceil(CLUSTER).max(1));
            if (wanted, of_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (wanted, of_table);
        }
        let first = self.take(blocks);
        let place = self.take(table);
        let mut entries = Vec::new();
        for block in 0..blocks {
            let counted = self.next.saturating_sub(block * COUNTS).min(COUNTS);
            let mut bytes = Vec::with_capacity(CLUSTER_BYTES);
            for _ in 0..counted {
                bytes.extend(1_u16.to_be_bytes());
            }
            bytes.resize(CLUSTER_BYTES, 0);
            self.put(first + block, &bytes)?;
            entries.extend(((first + block) * CLUSTER).to_be_bytes());
        }
        entries.resize(entries.len().next_multiple_of(CLUSTER_BYTES), 0);
        self.put(place, &entries)?;
        Ok((place * CLUSTER, table))
    }

    fn header(&self, l1: u64, counts: (u64, u64)) -> Vec<u8> {
        let word = |number: u64| u32::try_from(number).unwrap_or(0).to_be_bytes();
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(word(3));
        // No backing file.
        bytes.extend([0; 12]);
        bytes.extend(CLUSTER_BITS.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        // Not encrypted.
        bytes.extend(word(0));
        bytes.extend(word(self.l1.len() as u64));
        bytes.extend(l1.to_be_bytes());
        bytes.extend(counts.0.to_be_bytes());
        bytes.extend(word(counts.1));
        // No snapshots, no features.
        bytes.extend([0; 12 + 24]);
        // Reference counts of 2^4 bits.
        bytes.extend(word(4));
        bytes.extend(VERSION_3_LENGTH.to_be_bytes());
        // No extensions; the cluster is filled up.
        bytes.resize(CLUSTER_BYTES, 0);
        bytes
    }
}

impl ImageWriter for Qcow2Writer {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let number = at / CLUSTER;
            if self
                .cluster
                .as_ref()
                .is_some_and(|(current, _)| *current != number)
            {
                self.end_cluster()?;
            }
            let inside = usize::try_from(at % CLUSTER).unwrap_or(0);
            let (here, behind) = rest.split_at(rest.len().min(CLUSTER_BYTES - inside));
            let (_, cluster) = self
                .cluster
                .get_or_insert_with(|| (number, vec![0; CLUSTER_BYTES]));
            if let Some(place) = cluster.get_mut(inside..inside + here.len()) {
                place.copy_from_slice(here);
            }
            at += here.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ImageError> {
        self.end_cluster()?;
        self.end_table()?;
        let mut l1: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        l1.resize(l1.len().next_multiple_of(CLUSTER_BYTES), 0);
        let place = self.take(l1.len() as u64 / CLUSTER);
        self.put(place, &l1)?;
        let counts = self.write_counts()?;
        let durable = || ImageError::io("cannot make the image durable");
        self.file.sync_all().map_err(durable())?;
        // Without a header it is no image: all that it speaks of is there.
        self.put(0, &self.header(place * CLUSTER, counts))?;
        self.file.sync_all().map_err(durable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::image::Image;
    use crate::disk::image::qcow2::{Qcow2, survives};

    fn image(size: u64, writes: &[(u64, u8, usize)]) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        let mut writer = Qcow2Writer::create(file, size).unwrap();
        for (offset, value, length) in writes {
            writer.write(*offset, &vec![*value; *length]).unwrap();
        }
        writer.finish().unwrap();
        let mut bytes = vec![0; usize::try_from(writer.file.metadata().unwrap().len()).unwrap()];
        writer.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let last = 3 * CLUSTER * ENTRIES;
        let size = last + 512;
        let writes = [
            (4096, 1, 8192),
            (CLUSTER * 5 - 512, 2, 1024),
            (CLUSTER * 9, 0, 70_000),
            (last, 3, 512),
        ];
        let mut image = Qcow2::open(image(size, &writes)).unwrap();
        assert_eq!(image.size(), size);
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(range) = image.next_data(at).unwrap() {
            at = range.end;
            found.push(range);
        }
        assert_eq!(found, [0..CLUSTER, 4 * CLUSTER..6 * CLUSTER, last..size]);
        for (offset, value, length) in writes {
            let mut bytes = vec![9; length];
            image.read(offset, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == value));
        }
        let mut bytes = vec![9; 4096];
        image.read(0, &mut bytes).unwrap();
        assert!(is_zero(&bytes));
    }

    #[test]
    fn a_truncated_image_is_noticed_wherever_it_ends() {
        let whole = image(8 * CLUSTER, &[(0, 1, CLUSTER_BYTES * 3)]);
        // The first table, the reference counts and their table come last.
        for cluster in 0..whole.len() / CLUSTER_BYTES - 3 {
            let cut = whole[..cluster * CLUSTER_BYTES + 100].to_vec();
            let read = Qcow2::open(cut).and_then(|mut image| {
                let range = image.next_data(0)?;
                assert_eq!(range, Some(0..3 * CLUSTER));
                image.read(0, &mut vec![0; 3 * CLUSTER_BYTES])
            });
            let error = read.unwrap_err().to_string();
            assert!(error.contains("truncated"), "{cluster}: {error}");
        }
    }

    #[test]
    fn changed_bytes_do_no_harm() {
        let whole = image(8 * CLUSTER, &[(0, 1, 512)]);
        // Header and tables.
        let tables = [0, 2, 3];
        for start in tables {
            for place in 0..128 {
                for value in [0, 1, 2, 0x40, 0x80, 0xff] {
                    let mut bytes = whole.clone();
                    bytes[start * CLUSTER_BYTES + place] = value;
                    survives(&bytes);
                }
            }
        }
    }
}
