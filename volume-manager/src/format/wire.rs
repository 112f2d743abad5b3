//! Numbers, texts and records as bytes and back: little-endian, bounded, without panics.

use super::configuration::DecodeError;
use crate::model::Uuid;

/// A record whose type has this bit may be ignored by who does not know it.
pub(super) const MAY_BE_SKIPPED: u16 = 0x8000;

/// Appends to bytes.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn uuid(&mut self, value: Uuid) {
        self.0.extend_from_slice(&value.0.to_le_bytes());
    }

    /// How many of something follow. What is encoded was checked, so the count is small.
    pub(super) fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub(super) fn text(&mut self, text: &str) {
        self.count(text.len());
        self.0.extend_from_slice(text.as_bytes());
    }

    /// A record with what `body` writes.
    pub(super) fn record(&mut self, kind: u16, version: u16, body: impl FnOnce(&mut Self)) {
        self.u16(kind);
        self.u16(version);
        let place = self.0.len();
        self.u32(0);
        body(self);
        let length = u32::try_from(self.0.len() - place - 4).unwrap_or(u32::MAX);
        self.0[place..place + 4].copy_from_slice(&length.to_le_bytes());
    }
}

/// Takes from bytes; knows of which object they are, for errors.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    object: String,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], object: impl Into<String>) -> Self {
        let object = object.into();
        Self { rest: bytes, object }
    }

    /// Names what is read from now on.
    pub(super) fn rename(&mut self, object: String) {
        self.object = object;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// An error about this object.
    pub(super) fn error(&self, problem: &'static str) -> DecodeError {
        let object = self.object.clone();
        DecodeError::Malformed { object, problem }
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or_else(|| self.error("it ends too early"))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or_else(|| self.error("it ends too early"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn uuid(&mut self) -> Result<Uuid, DecodeError> {
        Ok(Uuid(u128::from_le_bytes(self.array()?)))
    }

    pub(super) fn text(&mut self, most: usize) -> Result<String, DecodeError> {
        let length = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if length > most {
            return Err(self.error("a text is too long"));
        }
        let text = std::str::from_utf8(self.bytes(length)?);
        text.map(str::to_owned)
            .map_err(|_| self.error("a text is not UTF-8"))
    }

    /// Items as many as a count says: at most `most`. Nothing is allocated ahead of what is there.
    pub(super) fn list<T>(
        &mut self,
        most: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = self.u32()?;
        if usize::try_from(count).is_ok_and(|count| count > most) {
            return Err(self.error("a list has too many entries"));
        }
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(item(self)?);
        }
        Ok(list)
    }

    /// Nothing is left.
    pub(super) fn end(&self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(self.error("bytes are left over"))
    }
}
