//! Blocks that are free and yet kept: somebody reads an older state of the trees while checkpoints go on.
//!
//! A hold costs room, since blocks that checkpoints leave are not used again while it lasts. Who needs the room breaks all holds; who has
//! one asks [`Hold::lasts`] after each read, and begins again if it does not.

use super::MetaSpace;

/// What is held.
#[derive(Debug, Default)]
pub(super) struct Held {
    holders: u64,
    /// Counts how often all holds were broken.
    broken: u64,
    blocks: Vec<u64>,
    /// Blocks that were handed out since the first of the holds began, as bits.
    taken: Vec<u64>,
}

impl Held {
    pub(super) fn is_wanted(&self) -> bool {
        self.holders > 0
    }

    pub(super) fn keep(&mut self, blocks: Vec<u64>) {
        self.blocks.extend(blocks);
    }

    pub(super) fn note_taken(&mut self, block: u64) {
        super::set(&mut self.taken, block, true);
    }

    /// No hold is left. Gives what was held.
    fn end(&mut self) -> Vec<u64> {
        self.holders = 0;
        self.taken = Vec::new();
        std::mem::take(&mut self.blocks)
    }
}

/// Blocks that are in use now keep their content as long as this is there and [`Self::lasts`].
#[derive(Debug)]
pub(crate) struct Hold<'a, V> {
    space: &'a MetaSpace<V>,
    broken: u64,
}

impl<V> Hold<'_, V> {
    /// Whether nobody has broken it.
    pub(crate) fn lasts(&self) -> bool {
        self.space.state.borrow().held.broken == self.broken
    }

    /// Whether a block may have been handed out since.
    pub(crate) fn was_taken(&self, block: u64) -> bool {
        !self.lasts() || super::is_set(&self.space.state.borrow().held.taken, block)
    }
}

impl<V> Drop for Hold<'_, V> {
    fn drop(&mut self) {
        if !self.lasts() {
            return;
        }
        let mut state = self.space.state.borrow_mut();
        state.held.holders -= 1;
        if state.held.holders == 0 {
            let blocks = state.held.end();
            state.hand_out(&blocks);
        }
    }
}

impl<V> MetaSpace<V> {
    /// Keeps the blocks that are in use now.
    pub(crate) fn hold(&self) -> Hold<'_, V> {
        let mut state = self.state.borrow_mut();
        if state.held.holders == 0 {
            state.held.taken = vec![0; state.image.len()];
        }
        state.held.holders += 1;
        Hold {
            space: self,
            broken: state.held.broken,
        }
    }

    /// Ends all holds, since their room is needed. Whether that gave any.
    pub(crate) fn break_holds(&self) -> bool {
        let mut state = self.state.borrow_mut();
        if state.held.holders == 0 {
            return false;
        }
        block_io::cover!("metadata space: holds are broken");
        state.held.broken += 1;
        let blocks = state.held.end();
        state.hand_out(&blocks);
        !blocks.is_empty()
    }

    /// The bitmap as it is, in words of 64 blocks.
    pub(crate) fn image(&self) -> Vec<u64> {
        self.state.borrow().image.clone()
    }

    /// Marks a block as in use that a page is in, although it was not marked.
    pub(crate) fn mark_used(&self, block: u64) {
        let mut state = self.state.borrow_mut();
        if !super::is_set(&state.busy, block) {
            super::set(&mut state.busy, block, true);
            state.free = state.free.saturating_sub(1);
        }
        state.change(block, true);
    }
}
