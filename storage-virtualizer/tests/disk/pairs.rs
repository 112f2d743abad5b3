//! Two operations, one after the other, crashed as in `crash`.

use block_io::sim::ExploreOptions;

use crate::crash::{ALL, Op, Script, explore_all};

impl Op {
    /// Whether it can be done after another one.
    fn is_possible_after(self, first: Self) -> bool {
        use Op::*;
        let once = [
            Create,
            Snapshot,
            GroupSnapshot,
            SnapshotClosed,
            DeleteFirst,
            DeleteSecond,
            Rename,
            CloneSnapshot,
            CloneNow,
        ];
        let needs_one = [DeleteFirst, Rename, Revert, CloneSnapshot, Merge];
        let needs_two = [DeleteSecond, RevertToSecond, Merge];
        let needs_decision = [
            Revert,
            RevertToSecond,
            CloneNow,
            Nonpersistent,
            NonpersistentPowerOff,
        ];
        let needs_more_than_nothing = [Snapshot, GroupSnapshot, CloneNow, Grow, Shrink];
        let clones = [CloneSnapshot, CloneNow];
        let impossible = first == Delete
            || first == self && once.contains(&self)
            || clones.contains(&first) && clones.contains(&self)
            || [DeleteFirst, Rename, Merge].contains(&first) && needs_one.contains(&self)
            || [DeleteSecond, Merge].contains(&first) && needs_two.contains(&self)
            || [Undoable, Append, CommitLive].contains(&first) && needs_decision.contains(&self)
            || first == Nonpersistent && needs_more_than_nothing.contains(&self)
            || first == Shrink && [Write, Merge].contains(&self);
        !impossible
    }
}

/// One of so many pairs is tried; with `SMSVMM_SIM_DEPTH` above 1 all of them.
const ONE_IN: usize = 5;

#[test]
fn two_operations_are_done_or_not_done_after_a_crash() {
    let options = ExploreOptions {
        states: 2,
        nesting: 0,
        ..ExploreOptions::default()
    };
    let all = std::env::var("SMSVMM_SIM_DEPTH").is_ok_and(|depth| depth != "1");
    let pairs = ALL
        .iter()
        .flat_map(|first| ALL.iter().map(|second| [*first, *second]));
    let pairs = pairs.filter(|[first, second]| second.is_possible_after(*first));
    let pairs = pairs
        .enumerate()
        .filter(|(number, _)| all || number % ONE_IN == 0);
    let scripts: Vec<Script> = pairs.map(|(_, pair)| Script(pair.to_vec())).collect();
    println!("{} pairs", scripts.len());
    let numbers = explore_all(scripts, &options);
    assert!(numbers.crash_states > 1000, "{numbers}");
}
