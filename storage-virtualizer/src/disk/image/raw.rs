//! Raw images: files and block devices that hold the bytes of a disk, one after the other.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom as Where, seek};
use rustix::io::Errno;

use super::{Image, ImageError, ImageWriter, is_zero};

/// What is written as a hole if it is zeroes, in bytes.
const HOLE: usize = 4096;

/// A raw image that is read.
#[derive(Debug)]
pub struct Raw {
    file: File,
    size: u64,
}

impl Raw {
    /// The image in a file.
    ///
    /// # Errors
    /// Its size cannot be found out.
    pub fn open(mut file: File) -> Result<Self, ImageError> {
        // Of a block device as well.
        let size = file.seek(SeekFrom::End(0));
        let size = size.map_err(ImageError::io("cannot find out the size of the image"))?;
        Ok(Self { file, size })
    }
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImageError> {
        if from >= self.size {
            return Ok(None);
        }
        match seek(&self.file, Where::Data(from)) {
            Ok(start) if start < self.size => {
                let end = seek(&self.file, Where::Hole(start)).unwrap_or(self.size);
                Ok(Some(start..end.clamp(start + 1, self.size)))
            }
            Ok(_) => Ok(None),
            // Nothing but a hole follows.
            Err(Errno::NXIO) => Ok(None),
            // It does not know about holes.
            Err(_) => Ok(Some(from..self.size)),
        }
    }

    fn read(&mut self, offset: u64, target: &mut [u8]) -> Result<(), ImageError> {
        let read = self.file.read_exact_at(target, offset);
        read.map_err(ImageError::io(format!(
            "cannot read the image at offset {offset}"
        )))
    }
}

/// A raw image that is being made, in a file that is empty so far.
#[derive(Debug)]
pub struct RawWriter {
    file: File,
}

impl RawWriter {
    /// An image of `size` bytes, all of it a hole.
    ///
    /// # Errors
    /// The file cannot be made so large.
    pub fn create(file: File, size: u64) -> Result<Self, ImageError> {
        let sized = file.set_len(size);
        sized.map_err(ImageError::io(format!("cannot make an image of {size} bytes")))?;
        Ok(Self { file })
    }
}

impl ImageWriter for RawWriter {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let is_hole = |part: &[u8]| is_zero(part);
            let count = rest
                .chunks(HOLE)
                .take_while(|part| !is_hole(part))
                .map(<[u8]>::len)
                .sum();
            let (data, behind) = rest.split_at(count);
            let place = offset + at as u64;
            let written = self.file.write_all_at(data, place);
            written.map_err(ImageError::io(format!(
                "cannot write the image at offset {place}"
            )))?;
            let holes: usize = behind
                .chunks(HOLE)
                .take_while(|part| is_hole(part))
                .map(<[u8]>::len)
                .sum();
            at += count + holes;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ImageError> {
        self.file
            .sync_all()
            .map_err(ImageError::io("cannot make the image durable"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::image::{difference, first_non_zero};

    #[test]
    fn what_is_written_is_read_and_holes_are_skipped() {
        let mut writer = RawWriter::create(tempfile::tempfile().unwrap(), 1 << 20).unwrap();
        let mut bytes = vec![0; 3 * HOLE];
        bytes[HOLE] = 7;
        writer.write(HOLE as u64 * 16, &bytes).unwrap();
        writer.finish().unwrap();
        let mut raw = Raw::open(writer.file).unwrap();
        assert_eq!(raw.size(), 1 << 20);
        let data = raw.next_data(0).unwrap().unwrap();
        assert!(data.contains(&(17 * HOLE as u64)), "{data:?}");
        assert_eq!(
            first_non_zero(&mut raw, 0, 1 << 20).unwrap(),
            Some(17 * HOLE as u64)
        );
        assert_eq!(difference(&mut raw, 0, 16 * HOLE as u64, &bytes).unwrap(), None);
        bytes[5] = 1;
        assert_eq!(
            difference(&mut raw, 0, 16 * HOLE as u64, &bytes).unwrap(),
            Some(16 * HOLE as u64 + 5)
        );
        assert_eq!(raw.next_data(19 * HOLE as u64).unwrap(), None);
    }
}
