//! Space that files have given up is given back to the devices.
//!
//! ```text
//!   record that frees a cluster ──► durable, and nobody reads it any more ──► can be taken again, and is noted here
//!                                                                                  │ some time later, if nobody took it
//!                                                        can be taken ◄── discard ◄┘ held meanwhile
//! ```
//!
//! A discard is advice, so nothing depends on it: what is noted is forgotten by a crash, and when there is too much of it. Who needs space
//! does not wait for discards, but what is just being discarded is not to be had for so long.

use std::cell::RefCell;
use std::collections::BTreeMap;

use block_io::{BlockDevice, Clock};

use crate::core::Core;
use crate::gate::{self, Either};
use crate::units::{CLUSTER, Location, VolumeIndex};
use crate::volume::VolumeCore;

/// Runs that are noted, at most.
const MOST: usize = 1 << 16;
/// Clusters of a request, at most: 1 GiB.
const RUN: u64 = 1 << 14;

/// What can be discarded.
#[derive(Debug, Default)]
pub(crate) struct Trims(RefCell<BTreeMap<Location, u64>>);

impl Trims {
    /// Clusters are free. Tells whether these are the first ones.
    pub(crate) fn note(&self, first: Location, count: u64) -> bool {
        let mut runs = self.0.borrow_mut();
        let before = runs.range_mut(..first).next_back();
        if let Some((start, length)) = before
            && start.plus(*length) == first
        {
            *length += count;
            return false;
        }
        if runs.len() < MOST {
            runs.insert(first, count);
        }
        runs.len() == 1
    }

    fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    fn take(&self) -> Vec<(Location, u64)> {
        let runs = std::mem::take(&mut *self.0.borrow_mut());
        let mut joined: Vec<(Location, u64)> = Vec::with_capacity(runs.len());
        for (first, count) in runs {
            match joined.last_mut() {
                Some((start, length)) if start.plus(*length) == first => *length += count,
                _ => joined.push((first, count)),
            }
        }
        joined
    }
}

/// Clusters that nobody takes while they are discarded.
struct Held<'a, V> {
    volume: &'a VolumeCore<V>,
    first: u64,
    count: u64,
}

impl<V> Drop for Held<'_, V> {
    fn drop(&mut self) {
        (self.first..self.first + self.count).for_each(|cluster| self.volume.release(cluster));
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Discards what was given up, some time later: then there is more of it, and what was taken again is not discarded for nothing.
    pub(crate) async fn trim_lately(&self) {
        let is_over = || self.closing.get() || self.check().is_err();
        loop {
            self.changed
                .until(|| (is_over() || !self.trims.is_empty()).then_some(()))
                .await;
            let end = self.changed.until(|| is_over().then_some(()));
            let pause = self.clock.sleep(self.options.commit_after);
            if is_over() || matches!(gate::first(end, pause).await, Either::First(())) {
                return;
            }
            self.trim().await;
        }
    }

    /// Discards all that was given up and is free.
    pub(crate) async fn trim(&self) {
        self.release_freed();
        for (first, count) in self.trims.take() {
            let mut at = first.cluster;
            while at < first.cluster + count {
                at = self.trim_run(first.volume, at, first.cluster + count).await;
            }
        }
    }

    /// Discards the first free run from `from` on, and tells where to go on.
    async fn trim_run(&self, index: VolumeIndex, from: u64, end: u64) -> u64 {
        // It may have left meanwhile.
        let Ok(volume) = self.state.volume(index) else {
            return end;
        };
        let mut held = Held {
            volume: &volume,
            first: from,
            count: 0,
        };
        let end = end.min(from + RUN);
        while held.first + held.count < end {
            let next = held.first + held.count;
            match self.look(|_| Ok(volume.take(next)?)).await {
                Ok(true) => held.count += 1,
                Ok(false) if held.count == 0 => held.first += 1,
                Ok(false) => break,
                Err(_) => return end,
            }
        }
        let (first, count) = (held.first, held.count);
        if count > 0 && !volume.failed.get() {
            block_io::cover!("filesys: free space is discarded");
            let done = volume.device.discard(first * CLUSTER, count * CLUSTER).await;
            if let Err(error) = done {
                tracing::debug!(volume = volume.record().name, %error, "free space was not discarded");
            }
        }
        drop(held);
        self.changed.notify();
        first + count.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined() {
        let trims = Trims::default();
        let at = |cluster| Location {
            volume: VolumeIndex(1),
            cluster,
        };
        assert!(trims.note(at(10), 2));
        assert!(!trims.note(at(14), 1));
        assert!(!trims.note(at(12), 2));
        assert!(!trims.note(at(3), 1));
        assert_eq!(trims.take(), [(at(3), 1), (at(10), 5)]);
        assert!(trims.is_empty());
    }
}
