//! How many devices must have a configuration, and be there to open it. Pure arithmetic of sets.
//!
//! Be C the last acknowledged configuration with its holders A, and C' the next one with its holders B.
//!
//! - C' is *durable* when at least half of A and more than half of B have it.
//! - C can be opened when more than half of A is there and no newer one is seen.
//!
//! So whatever opens C meets a device that has C', and takes C'. When A = B, one half is not enough, and all is the usual
//! majority; when a mirror of two loses a device, the other one is half of A and all of B and goes on alone, and the lost one
//! is never more than half of A.
//!
//! Who finds C' somewhere does not know whether it is durable. To open it, more than half of B must be there, and it must be
//! impossible that a successor of C that is not C' was acknowledged: at least half of A has C' (then C can no longer be opened
//! without meeting C'), or more than half of A is there (then such a successor would be seen).
//!
//! When too few take C', another one, C'', may be tried in its place, say without the devices that failed. An opening could
//! choose C', too, so what is demanded of C'' for A is demanded for B as well: it has several *predecessors*.

use std::collections::BTreeSet;

use crate::model::DeviceId;

/// Devices.
pub type Set = BTreeSet<DeviceId>;

fn common(one: &Set, other: &Set) -> usize {
    one.intersection(other).count()
}

/// At least half of `all` is in `some`.
fn half(all: &Set, some: &Set) -> bool {
    common(all, some) * 2 >= all.len()
}

/// More than half of `all` is in `some`.
pub fn majority(all: &Set, some: &Set) -> bool {
    common(all, some) * 2 > all.len()
}

/// Whether a configuration with `holders`, which follows those whose holders are in `previous`, cannot be lost once all in
/// `have` have it.
pub fn is_durable(previous: &[Set], holders: &Set, have: &Set) -> bool {
    previous.iter().all(|previous| half(previous, have)) && majority(holders, have)
}

/// Whether such a configuration may be opened when the devices in `present` are there and those in `have` have it.
pub fn may_open(previous: &[Set], holders: &Set, present: &Set, have: &Set) -> bool {
    let excludes_others = |previous: &Set| half(previous, have) || majority(previous, present);
    majority(holders, present) && previous.iter().all(excludes_others)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(bits: u32) -> Set {
        (0..5).filter(|bit| bits & 1 << bit != 0).map(DeviceId).collect()
    }

    fn subsets(of: u32) -> impl Iterator<Item = u32> {
        (0..32).filter(move |bits| bits & !of == 0)
    }

    #[test]
    fn whatever_opens_a_configuration_meets_its_durable_successor() {
        let mut met = 0;
        for (before, holders, have) in triples() {
            if !is_durable(&[set(before)], &set(holders), &set(have)) {
                continue;
            }
            for present in 0..32 {
                if majority(&set(before), &set(present)) {
                    assert_ne!(have & present, 0, "{before:b} {holders:b} {have:b} {present:b}");
                    met += 1;
                }
                // And whatever opens the successor itself meets one that has it.
                if may_open(&[set(before)], &set(holders), &set(present), &set(have & present)) {
                    assert_ne!(have & present, 0, "{before:b} {holders:b} {have:b} {present:b}");
                }
            }
        }
        assert!(met > 10_000, "{met}");
    }

    fn triples() -> impl Iterator<Item = (u32, u32, u32)> {
        (1..32).flat_map(|before| {
            (1..32)
                .flat_map(move |holders| subsets(before | holders).map(move |have| (before, holders, have)))
        })
    }

    /// A successor C' that was interrupted and another one, D, of an opening that did not see it: not both are ever
    /// opened or acknowledged without one seeing the other.
    #[test]
    fn an_interrupted_successor_and_an_acknowledged_one_are_never_both_opened() {
        let mut pairs = 0;
        for (before, holders, have) in triples() {
            // D is durable, and those who acknowledged it had not seen C'.
            for acknowledged in subsets(before & !have) {
                if !half(&set(before), &set(acknowledged)) {
                    continue;
                }
                // Now C' is to be opened by devices that have no D.
                for present in subsets(!acknowledged & 31) {
                    let opens = may_open(&[set(before)], &set(holders), &set(present), &set(have & present));
                    // D came of an opening by more than half of `before`, all without C'.
                    let possible = majority(&set(before), &set(before & !have));
                    assert!(
                        !(opens && possible),
                        "{before:b} {holders:b} {have:b} {acknowledged:b} {present:b}"
                    );
                    pairs += 1;
                }
            }
        }
        assert!(pairs > 10_000, "{pairs}");
    }

    #[test]
    fn a_mirror_of_two_goes_on_with_one_and_the_lost_one_never_opens_alone() {
        let (both, kept, lost) = (set(0b11), set(0b01), set(0b10));
        assert!(is_durable(std::slice::from_ref(&both), &kept, &kept));
        assert!(may_open(std::slice::from_ref(&both), &kept, &kept, &kept));
        assert!(!may_open(&[], &both, &lost, &lost));
        assert!(!majority(&both, &lost));
    }

    #[test]
    fn what_is_durable_can_be_opened_by_those_that_have_it() {
        for (before, holders, have) in triples() {
            let (before, holders, have) = (set(before), set(holders), set(have));
            if is_durable(std::slice::from_ref(&before), &holders, &have) {
                assert!(may_open(&[before], &holders, &have, &have));
            }
        }
    }
}
