//! Who may still be reading or writing a cluster that no map has any more.
//!
//! Every request belongs to the *epoch* in which it began. A cluster that is freed is noted with the epoch of that moment, and can be used
//! again once no request of that epoch or an older one is left. This costs a request two additions.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Counts requests by epoch.
#[derive(Debug)]
pub(crate) struct Epochs {
    /// Requests of epochs `first`, `first + 1`, …; the last is the present one.
    running: RefCell<VecDeque<u64>>,
    first: Cell<u64>,
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            running: RefCell::new(VecDeque::from([0])),
            first: Cell::new(0),
        }
    }
}

/// A request that runs.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    epochs: &'a Epochs,
    epoch: u64,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.epochs.end(self.epoch);
    }
}

impl Epochs {
    /// A request begins.
    pub(crate) fn begin(&self) -> Running<'_> {
        let mut running = self.running.borrow_mut();
        if let Some(last) = running.back_mut() {
            *last += 1;
        }
        Running {
            epochs: self,
            epoch: self.first.get() + running.len() as u64 - 1,
        }
    }

    fn end(&self, epoch: u64) {
        let mut running = self.running.borrow_mut();
        let index = usize::try_from(epoch - self.first.get()).unwrap_or(0);
        if let Some(count) = running.get_mut(index) {
            *count -= 1;
        }
        while running.len() > 1 && running.front() == Some(&0) {
            running.pop_front();
            self.first.set(self.first.get() + 1);
        }
    }

    /// Ends the present epoch, and tells its number: what is freed now is free when [`Self::is_over`].
    pub(crate) fn turn(&self) -> u64 {
        let mut running = self.running.borrow_mut();
        let epoch = self.first.get() + running.len() as u64 - 1;
        running.push_back(0);
        while running.len() > 1 && running.front() == Some(&0) {
            running.pop_front();
            self.first.set(self.first.get() + 1);
        }
        epoch
    }

    /// Whether no request of this epoch or an older one is left.
    pub(crate) fn is_over(&self, epoch: u64) -> bool {
        self.first.get() > epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_over_when_its_requests_and_all_older_ones_are() {
        let epochs = Epochs::default();
        let old = epochs.begin();
        let first = epochs.turn();
        let young = epochs.begin();
        let second = epochs.turn();
        drop(young);
        assert!(!epochs.is_over(first) && !epochs.is_over(second));
        drop(old);
        assert!(epochs.is_over(first) && epochs.is_over(second));
        assert!(epochs.is_over(epochs.turn()));
    }
}
