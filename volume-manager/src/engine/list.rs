//! Parts of scatter lists.

use block_io::IoBuf;

/// Sum of the lengths.
pub(crate) fn length(buffers: &[IoBuf]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

/// `length` bytes of the list from byte `skip` on.
pub(crate) fn part(buffers: &[IoBuf], skip: u64, length: u64) -> Vec<IoBuf> {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let mut rest = usize::try_from(length).unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    for buffer in buffers {
        if rest == 0 {
            break;
        }
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        let piece = buffer.slice(skip, rest);
        skip = 0;
        rest -= piece.len();
        parts.push(piece);
    }
    parts
}

/// A list that is taken apart from its beginning on.
pub(crate) struct Rest<'a> {
    buffers: &'a [IoBuf],
    /// Bytes of the first one that are taken.
    taken: usize,
}

impl<'a> Rest<'a> {
    pub(crate) fn of(buffers: &'a [IoBuf]) -> Self {
        Self { buffers, taken: 0 }
    }

    /// Puts the next `length` bytes at the end of `target`, or what is left.
    pub(crate) fn take(&mut self, length: u64, target: &mut Vec<IoBuf>) {
        let mut wanted = usize::try_from(length).unwrap_or(usize::MAX);
        while let Some((first, behind)) = self.buffers.split_first()
            && wanted > 0
        {
            let piece = first.slice(self.taken, wanted);
            self.taken += piece.len();
            wanted -= piece.len();
            if self.taken == first.len() {
                (self.buffers, self.taken) = (behind, 0);
            }
            if !piece.is_empty() {
                target.push(piece);
            }
        }
    }
}

/// Copies the list into `target`; both are equally long.
pub(crate) fn gather(buffers: &[IoBuf], target: &mut [u8]) {
    let mut start = 0;
    for buffer in buffers {
        let end = (start + buffer.len()).min(target.len());
        if let Some(part) = target.get_mut(start..end) {
            buffer.copy_to_slice(part);
        }
        start = end;
    }
}

/// Copies `source` into the list; both are equally long.
pub(crate) fn scatter(buffers: &[IoBuf], source: &[u8]) {
    let mut start = 0;
    for buffer in buffers {
        let end = (start + buffer.len()).min(source.len());
        if let Some(part) = source.get(start..end) {
            buffer.copy_from_slice(part);
        }
        start = end;
    }
}

#[cfg(test)]
mod tests {
    use block_io::AlignedBuffer;

    use super::*;

    #[test]
    fn what_is_taken_in_turn_are_the_parts_of_the_list() {
        let memory = AlignedBuffer::new(64);
        // SAFETY: `memory` outlives the list; nobody uses its bytes.
        let list = unsafe {
            [
                memory.io(0, 5),
                memory.io(8, 0),
                memory.io(16, 1),
                memory.io(32, 20),
            ]
        };
        let places = |list: &[IoBuf]| -> Vec<(usize, usize)> {
            list.iter()
                .map(|buffer| (buffer.address().addr(), buffer.len()))
                .collect()
        };
        for lengths in [
            vec![26],
            vec![1; 26],
            vec![5, 1, 20],
            vec![3, 0, 4, 19, 7],
            vec![6, 40],
        ] {
            let (mut rest, mut done) = (Rest::of(&list), 0);
            for length in lengths {
                let mut taken = Vec::new();
                rest.take(length, &mut taken);
                assert_eq!(places(&taken), places(&part(&list, done, length)));
                done += length;
            }
            let mut nothing = Vec::new();
            rest.take(1, &mut nothing);
            assert!(nothing.is_empty());
        }
    }
}
