//! The content of a medium: sparse, cheap to copy, since copies share pages, and cheap to compare, since each page knows the
//! hash of its content.
//!
//! The *digest* of an image is the sum of a hash for each sector of 512 bytes, from its number and content; a sector of zeroes
//! counts 0. So equal contents have equal digests, however they came about, and a change of some sectors changes it by a
//! difference that needs only these.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::rng::{hash_bytes, mix};
use crate::IoBuf;
use crate::buffer::list;

const PAGE: usize = 4096;
/// Unit of the digest, whatever the sectors of the disk are.
const SECTOR: usize = 512;
static ZEROES: [u8; PAGE] = [0; PAGE];

/// Bytes and, once it was asked for, their digest. A page is only ever found under one index, which is part of that.
#[derive(Debug, Clone)]
struct Page {
    bytes: [u8; PAGE],
    digest: Cell<Option<u64>>,
}

impl Page {
    fn digest(&self, index: u64) -> u64 {
        self.digest.get().unwrap_or_else(|| {
            let digest = digest(index * PAGE as u64, &self.bytes);
            self.digest.set(Some(digest));
            digest
        })
    }
}

/// What `bytes` at `offset`, a multiple of a sector, add to the digest of an image.
pub(super) fn digest(offset: u64, bytes: &[u8]) -> u64 {
    let sectors = (offset / SECTOR as u64..).zip(bytes.chunks(SECTOR));
    sectors.fold(0, |sum, (number, sector)| {
        let digest = match *sector == ZEROES[..sector.len()] {
            true => 0,
            false => mix(hash_bytes(sector) ^ mix(number)),
        };
        sum.wrapping_add(digest)
    })
}

type Pages = BTreeMap<u64, Rc<Page>>;

#[derive(Debug, Clone, Default)]
struct Base {
    pages: Pages,
    digest: Cell<Option<u64>>,
}

/// Bytes that are zero until written.
#[derive(Debug, Clone, Default)]
pub(super) struct Image {
    base: Rc<Base>,
    /// What differs from `base`; `None` is a page of zeroes.
    own: BTreeMap<u64, Option<Rc<Page>>>,
}

/// What a range of an image was at one moment, not copied.
#[derive(Debug)]
pub(super) struct View {
    offset: u64,
    length: usize,
    pages: Vec<Option<Rc<Page>>>,
}

impl View {
    fn pieces(&self) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>, Option<&Rc<Page>>)> {
        let pages = self.pages.iter().map(Option::as_ref);
        pieces(self.offset, self.length)
            .zip(pages)
            .map(|((index, start, range), page)| (index, start, range, page))
    }

    /// Of its content.
    pub(super) fn digest(&self) -> u64 {
        self.pieces().fold(0, |sum, (index, start, range, page)| {
            let digest = match page {
                Some(page) if range.len() == PAGE => page.digest(index),
                Some(page) => digest(
                    index * PAGE as u64 + start as u64,
                    &page.bytes[start..start + range.len()],
                ),
                None => 0,
            };
            sum.wrapping_add(digest)
        })
    }

    pub(super) fn scatter(&self, buffers: &[IoBuf]) {
        for (_, start, range, page) in self.pieces() {
            let bytes = page.map_or(&ZEROES, |page| &page.bytes);
            list::scatter(buffers, range.start as u64, &bytes[start..start + range.len()]);
        }
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.length);
        for (_, start, range, page) in self.pieces() {
            let page = page.map_or(&ZEROES, |page| &page.bytes);
            bytes.extend_from_slice(&page[start..start + range.len()]);
        }
        bytes
    }
}

impl Image {
    fn page(&self, index: u64) -> Option<&Rc<Page>> {
        match self.own.get(&index) {
            Some(page) => page.as_ref(),
            None => self.base.pages.get(&index),
        }
    }

    fn page_mut(&mut self, index: u64) -> &mut [u8; PAGE] {
        let base = &self.base.pages;
        let slot = self.own.entry(index).or_insert_with(|| base.get(&index).cloned());
        let page = Rc::make_mut(slot.get_or_insert_with(|| {
            Rc::new(Page {
                bytes: ZEROES,
                digest: Cell::new(None),
            })
        }));
        page.digest.set(None);
        &mut page.bytes
    }

    pub(super) fn read(&self, offset: u64, target: &mut [u8]) {
        for (index, start, range) in pieces(offset, target.len()) {
            let piece = &mut target[range];
            match self.page(index) {
                Some(page) => piece.copy_from_slice(&page.bytes[start..start + piece.len()]),
                None => piece.fill(0),
            }
        }
    }

    /// What [`Self::read`] would give now.
    pub(super) fn view(&self, offset: u64, length: usize) -> View {
        let pages = pieces(offset, length).map(|(index, ..)| self.page(index).cloned());
        View {
            offset,
            length,
            pages: pages.collect(),
        }
    }

    /// Whether the range has content equal to `bytes`.
    pub(super) fn holds(&self, offset: u64, bytes: &[u8]) -> bool {
        pieces(offset, bytes.len()).all(|(index, start, range)| {
            let page = self.page(index).map_or(&ZEROES, |page| &page.bytes);
            page[start..start + range.len()] == bytes[range]
        })
    }

    /// Equal for images of equal content.
    pub(super) fn digest(&self) -> u64 {
        let of = |index: &u64, page: &Rc<Page>| page.digest(*index);
        let base = self.base.digest.get().unwrap_or_else(|| {
            let digests = self.base.pages.iter().map(|(index, page)| of(index, page));
            let digest = digests.fold(0, u64::wrapping_add);
            self.base.digest.set(Some(digest));
            digest
        });
        self.own.iter().fold(base, |sum, (index, page)| {
            let old = self.base.pages.get(index).map_or(0, |page| of(index, page));
            let new = page.as_ref().map_or(0, |page| of(index, page));
            sum.wrapping_sub(old).wrapping_add(new)
        })
    }

    /// What writing `bytes`, zeroes if there are none, over a range of whole sectors adds to the digest.
    pub(super) fn difference(&self, offset: u64, length: u64, bytes: Option<&[u8]>) -> u64 {
        let old = self.view(offset, usize::try_from(length).unwrap_or(0)).digest();
        bytes.map_or(0, |bytes| digest(offset, bytes)).wrapping_sub(old)
    }

    pub(super) fn write(&mut self, offset: u64, source: &[u8]) {
        for (index, start, range) in pieces(offset, source.len()) {
            let piece = &source[range];
            self.page_mut(index)[start..start + piece.len()].copy_from_slice(piece);
        }
    }

    pub(super) fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let first_whole = offset.div_ceil(PAGE as u64);
        let end_whole = end / PAGE as u64;
        if first_whole >= end_whole {
            return self.zero_small(offset, end);
        }
        self.zero_small(offset, first_whole * PAGE as u64);
        self.zero_small(end_whole * PAGE as u64, end);
        self.own
            .retain(|index, _| !(first_whole..end_whole).contains(index));
        for (index, _) in self.base.pages.range(first_whole..end_whole) {
            self.own.insert(*index, None);
        }
    }

    fn zero_small(&mut self, offset: u64, end: u64) {
        let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(0);
        for (index, start, range) in pieces(offset, length) {
            if self.page(index).is_some() {
                self.page_mut(index)[start..start + range.len()].fill(0);
            }
        }
    }

    /// How many pages have content.
    pub(super) fn pages(&self) -> u64 {
        let base = &self.base.pages;
        let hidden = self.own.keys().filter(|index| base.contains_key(index)).count();
        let own = self.own.values().filter(|page| page.is_some()).count();
        (base.len() - hidden + own) as u64
    }

    pub(super) fn has_page_at(&self, offset: u64) -> bool {
        self.page(offset / PAGE as u64).is_some()
    }

    /// Makes later copies cheap, if they are not yet.
    pub(super) fn freeze(&mut self) {
        // A base is copied as a whole when it changes, and every copy of the image copies all of `own`.
        if self.own.len() <= self.base.pages.len() / 16 {
            return;
        }
        let base = Rc::make_mut(&mut self.base);
        base.digest.set(None);
        for (index, page) in std::mem::take(&mut self.own) {
            match page {
                Some(page) => base.pages.insert(index, page),
                None => base.pages.remove(&index),
            };
        }
    }
}

/// Cuts a range at page boundaries: page index, start in the page, range in the buffer.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= length {
            return None;
        }
        let at = offset + done as u64;
        let start = usize::try_from(at % PAGE as u64).unwrap_or(0);
        let size = (PAGE - start).min(length - done);
        let range = done..done + size;
        done += size;
        Some((at / PAGE as u64, start, range))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_share_pages_and_do_not_see_each_others_writes() {
        let mut image = Image::default();
        image.write(4000, &[1; 200]);
        image.freeze();
        let mut copy = image.clone();
        copy.write(4090, &[2; 12]);
        image.zero(0, 1 << 40);
        let mut bytes = [0; 16];
        copy.read(4088, &mut bytes);
        assert_eq!(bytes, [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1]);
        image.read(4088, &mut bytes);
        assert_eq!((bytes, image.pages(), copy.pages()), ([0; 16], 0, 2));
    }

    #[test]
    fn zeroing_a_part_of_a_page_leaves_the_rest() {
        let mut image = Image::default();
        image.write(0, &[7; 12288]);
        image.zero(4095, 4098);
        let mut bytes = [9; 12288];
        image.read(0, &mut bytes);
        assert!(bytes[..4095].iter().all(|byte| *byte == 7));
        assert!(bytes[4095..8193].iter().all(|byte| *byte == 0));
        assert!(bytes[8193..].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn digests_are_those_of_the_content_however_it_came_about() {
        let mut image = Image::default();
        image.write(512, &[7; 8192]);
        let before = image.digest();
        let difference = image.difference(4608, 512, Some(&[9; 512]));
        let mut other = image.clone();
        other.freeze();
        other.write(4608, &[9; 512]);
        assert_eq!(other.digest(), before.wrapping_add(difference));
        assert_eq!(other.view(0, 1 << 16).digest(), other.digest());
        assert!(other.holds(4096, &[[7; 512], [9; 512]].concat()) && !image.holds(4608, &[9; 512]));
        let undone = other.difference(4608, 512, Some(&[7; 512]));
        assert_eq!(other.digest().wrapping_add(undone), before);
        other.write(4608, &[7; 512]);
        other.write(1 << 20, &[0; 4096]);
        other.freeze();
        assert_eq!(other.digest(), before);
        let gone = other.difference(0, 1 << 16, None);
        other.zero(0, 1 << 16);
        assert_eq!((other.digest(), before.wrapping_add(gone)), (0, 0));
    }

    #[test]
    fn content_that_changes_places_has_another_digest() {
        let mut image = Image::default();
        image.write(0, &[1; 512]);
        image.write(512, &[2; 512]);
        let mut swapped = Image::default();
        swapped.write(0, &[2; 512]);
        swapped.write(512, &[1; 512]);
        assert_ne!(image.digest(), swapped.digest());
    }
}
