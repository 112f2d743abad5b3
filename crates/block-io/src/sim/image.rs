//! The content of a medium: sparse, and cheap to copy, since copies share pages.

use std::collections::BTreeMap;
use std::rc::Rc;

const PAGE: usize = 4096;
type Page = [u8; PAGE];
type Pages = BTreeMap<u64, Rc<Page>>;

/// Bytes that are zero until written.
#[derive(Debug, Clone, Default)]
pub(super) struct Image {
    base: Rc<Pages>,
    /// What differs from `base`; `None` is a page of zeroes.
    own: BTreeMap<u64, Option<Rc<Page>>>,
}

impl Image {
    fn page(&self, index: u64) -> Option<&Rc<Page>> {
        match self.own.get(&index) {
            Some(page) => page.as_ref(),
            None => self.base.get(&index),
        }
    }

    fn page_mut(&mut self, index: u64) -> &mut Page {
        let base = &self.base;
        let slot = self.own.entry(index).or_insert_with(|| base.get(&index).cloned());
        Rc::make_mut(slot.get_or_insert_with(|| Rc::new([0; PAGE])))
    }

    pub(super) fn read(&self, offset: u64, target: &mut [u8]) {
        for (index, start, range) in pieces(offset, target.len()) {
            let piece = &mut target[range];
            match self.page(index) {
                Some(page) => piece.copy_from_slice(&page[start..start + piece.len()]),
                None => piece.fill(0),
            }
        }
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
        for (index, _) in self.base.range(first_whole..end_whole) {
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
        let hidden = self
            .base
            .keys()
            .filter(|index| self.own.contains_key(index))
            .count();
        let own = self.own.values().filter(|page| page.is_some()).count();
        (self.base.len() - hidden + own) as u64
    }

    pub(super) fn has_page_at(&self, offset: u64) -> bool {
        self.page(offset / PAGE as u64).is_some()
    }

    /// Makes later copies cheap.
    pub(super) fn freeze(&mut self) {
        if self.own.is_empty() {
            return;
        }
        let base = Rc::make_mut(&mut self.base);
        for (index, page) in std::mem::take(&mut self.own) {
            match page {
                Some(page) => base.insert(index, page),
                None => base.remove(&index),
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
}
