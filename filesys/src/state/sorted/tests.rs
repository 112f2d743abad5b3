//! Sorted or not, the same comes out.

use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::{BlockDevice, Durability, Geometry, IoBuf, IoError, ZeroMode};

use super::Sorted;
use crate::entry::Entry;
use crate::inode::{Inode, Kind};
use crate::record::{Record, VolumeRecord};
use crate::state::{Effects, ROOT, State};
use crate::units::{CLUSTER, FileId, Location, SUBS, SubMask, VolumeIndex};

/// A device that nobody reads or writes.
#[derive(Debug)]
struct Unused;

impl BlockDevice for Unused {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: CLUSTERS * CLUSTER,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            discard_granularity: 4096,
            read_only: false,
        }
    }
    fn size(&self) -> u64 {
        CLUSTERS * CLUSTER
    }
    async fn read(&self, _: u64, _: &[IoBuf]) -> Result<(), IoError> {
        Ok(())
    }
    async fn write(&self, _: u64, _: &[IoBuf], _: Durability) -> Result<(), IoError> {
        Ok(())
    }
    async fn flush(&self) -> Result<(), IoError> {
        Ok(())
    }
    async fn discard(&self, _: u64, _: u64) -> Result<(), IoError> {
        Ok(())
    }
    async fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode) -> Result<(), IoError> {
        Ok(())
    }
}

/// Two pages of a bitmap.
const CLUSTERS: u64 = 40_000;
const FILES: [FileId; 2] = [FileId(20), FileId(21)];
/// Clusters of a file: a little more than two pages of a map.
const FILE: u64 = 600;

fn state() -> State<Unused> {
    let state = State::blank(1, BTreeMap::from([([1; 16], Rc::new(Unused))]));
    apply(
        &state,
        &Record::Volume(VolumeRecord {
            index: VolumeIndex(1),
            uuid: [1; 16],
            name: "v".into(),
            class: String::new(),
            clusters: CLUSTERS,
            bitmap: 18,
            sums: 19,
            draining: false,
        }),
    )
    .unwrap();
    for file in FILES {
        let inode = Box::new(Inode::new(file, Kind::File, ROOT, &file.to_string()));
        apply(&state, &Record::Create { inode }).unwrap();
    }
    state
}

fn apply(state: &State<Unused>, record: &Record) -> Result<(), String> {
    let done = state.apply(record, &mut Effects::default());
    done.map_err(|stop| format!("{stop:?}"))
}

fn apply_sorted(state: &State<Unused>, sorted: &mut Sorted) -> Result<(), String> {
    assert!(sorted.missing(state).unwrap().is_empty());
    let bits = sorted.apply(state).map_err(|stop| format!("{stop:?}"))?;
    assert!(bits.missing(state).unwrap().is_empty());
    bits.apply(state).map_err(|stop| format!("{stop:?}"))
}

/// Entries, bits, counts of the files, free clusters.
type Seen = (Vec<Entry>, Vec<bool>, Vec<(u64, u64)>, u64);

/// All that can be seen of a state.
fn seen(state: &State<Unused>) -> Seen {
    let (mut entries, mut inodes) = (Vec::new(), Vec::new());
    for file in FILES {
        let file = state.file(file).unwrap();
        let map = file.map().unwrap();
        entries.extend((0..FILE).map(|cluster| map.entry(cluster).unwrap()));
        let inode = file.inode.borrow();
        inodes.push((inode.allocated, inode.placement));
    }
    let volume = state.volume(VolumeIndex(1)).unwrap();
    let bits = (0..CLUSTERS).map(|cluster| volume.is_set(cluster).unwrap());
    (entries, bits.collect(), inodes, volume.free())
}

fn place(cluster: u64) -> Location {
    Location {
        volume: VolumeIndex(1),
        cluster,
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A change that is possible, as the state tells.
fn draw(random: &mut Random, state: &State<Unused>) -> Record {
    let file = FILES[usize::from(random.below(2) == 1)];
    let subs = u64::from(SUBS);
    let cluster = random.below(FILE - 20);
    if random.below(3) == 0 {
        return Record::Clear {
            file,
            first: cluster * subs + random.below(subs),
            count: random.below(20 * subs),
            zero: random.below(2) == 0,
        };
    }
    let volume = state.volume(VolumeIndex(1)).unwrap();
    let count = 1 + random.below(10);
    // Few places, so that what one file gives up another one takes, on both sides of the end of a bitmap's page.
    let free = |first: u64| (first..first + count).all(|cluster| !volume.is_set(cluster).unwrap());
    let to = loop {
        let first = 32_768 - 2000 + random.below(4000);
        if free(first) {
            break first;
        }
    };
    let old = state.file(file).unwrap().map().unwrap().entry(cluster).unwrap();
    let mask = SubMask(u16::try_from(random.below(1 << 16)).unwrap() | 1);
    let at = old.location().filter(|_| count == 1).unwrap_or(place(to));
    Record::Map {
        file,
        first: u32::try_from(cluster).unwrap(),
        count: u32::try_from(count).unwrap(),
        entry: Entry::at(at).with_valid(mask).with_kept(random.below(4) == 0),
        moved: random.below(4) == 0,
    }
}

#[test]
fn sorted_changes_end_as_those_in_order_do() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (one, other) = (state(), state());
    let mut sorted = Sorted::default();
    let mut waited = 0;
    for turn in 0..6000 {
        let record = draw(&mut random, &one);
        apply(&one, &record).unwrap();
        if sorted.take(&record) {
            waited += 1;
        } else {
            apply_sorted(&other, &mut sorted).unwrap();
            apply(&other, &record).unwrap();
        }
        if turn % 500 == 499 {
            apply_sorted(&other, &mut sorted).unwrap();
            assert!(seen(&one) == seen(&other), "they differ after {turn} changes");
        }
    }
    assert!(waited > 5000, "{waited} waited");
}

#[test]
fn a_cluster_that_is_taken_before_it_is_given_up_is_noticed() {
    let map = |file, cluster, at| Record::Map {
        file,
        first: cluster,
        count: 1,
        entry: Entry::at(place(at)).with_valid(SubMask(1)),
        moved: false,
    };
    let gone = Record::Clear {
        file: FILES[1],
        first: 0,
        count: u64::from(SUBS),
        zero: false,
    };
    let (begin, take) = (map(FILES[1], 0, 7), map(FILES[0], 300, 7));
    for (records, sound) in [
        (vec![&begin, &gone, &take], true),
        (vec![&begin, &take, &gone], false),
    ] {
        let (one, other) = (state(), state());
        let in_order: Result<(), String> = records.iter().try_for_each(|record| apply(&one, record));
        let mut sorted = Sorted::default();
        assert!(records.iter().all(|record| sorted.take(record)));
        let at_once = apply_sorted(&other, &mut sorted);
        assert_eq!((in_order.is_ok(), at_once.is_ok()), (sound, sound), "{at_once:?}");
    }
}
