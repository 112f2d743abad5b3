//! Bitmaps in memory, on the volume, and after crashes.

use std::collections::BTreeSet;

use block_io::sim::{
    DiskOptions, ExploreOptions, Failure, Fault, FaultRule, RunOptions, Scenario, Shared, Sim, SimDisk,
    World, explore,
};
use block_io::{BlockDevice, Operation};

use super::*;
use crate::meta_io::demand;
use crate::superblock::{self, Holders, LayoutOptions, Superblock, layout};

const UUID: [u8; 16] = *b"the file system!";
/// Two pages.
const BLOCKS: u64 = 40_000;

fn small() -> Layout {
    layout(256, &LayoutOptions::default()).unwrap()
}

fn large() -> Layout {
    let options = LayoutOptions {
        journal_blocks: Some(8),
        ..LayoutOptions::default()
    };
    layout(BLOCKS, &options).unwrap()
}

fn on_disk<T: 'static>(blocks: u64, script: impl AsyncFnOnce(Sim) -> T) -> T {
    let mut world = World::new([DiskOptions::new("meta", blocks * 4096)]);
    let ran = world.run(&RunOptions::in_order(), |sim| async move { script(sim).await });
    ran.unwrap().ended.done().unwrap()
}

fn fresh(sim: &Sim, layout: Layout) -> MetaSpace<SimDisk> {
    MetaSpace::format(Rc::new(sim.disk(0)), layout, UUID)
}

async fn reload(sim: &Sim, layout: Layout, state: SpaceState) -> Result<MetaSpace<SimDisk>, MetaSpaceError> {
    MetaSpace::load(Rc::new(sim.disk(0)), layout, UUID, state).await
}

fn take(space: &MetaSpace<SimDisk>, count: u64) -> Vec<u64> {
    let mut blocks = Vec::new();
    assert!(space.allocate(count, &mut blocks));
    blocks
}

#[test]
fn all_blocks_but_the_reserved_are_handed_out_once() {
    on_disk(256, async |sim| {
        let space = fresh(&sim, small());
        let reserved: u64 = small().reserved().map(|region| region.blocks).sum();
        assert_eq!(space.free_count(), 256 - reserved);
        let mut blocks = take(&space, 100);
        assert!(!space.allocate(256 - reserved - 99, &mut blocks));
        assert_eq!(blocks.len(), 100);
        assert!(space.allocate(256 - reserved - 100, &mut blocks));
        assert_eq!(space.free_count(), 0);
        let different: BTreeSet<u64> = blocks.iter().copied().collect();
        assert_eq!(different.len(), blocks.len());
        let inside = |block: &u64| {
            small()
                .reserved()
                .any(|region| (region.first..region.end()).contains(block))
        };
        assert!(!blocks.iter().any(|block| inside(block) || *block >= 256));
    });
}

#[test]
fn blocks_come_in_one_run_where_there_is_one() {
    on_disk(256, async |sim| {
        let space = fresh(&sim, small());
        // Blocks 1 to 15 and 17 to 31 are free: a run of 20 is not there.
        assert_eq!(take(&space, 4), [1, 2, 3, 4]);
        let run = take(&space, 20);
        assert!(
            run.is_sorted() && run[19] - run[0] == 19 && run[0] > 32,
            "{run:?}"
        );
        let rest = space.free_count();
        let scattered = take(&space, rest);
        assert_eq!(scattered.len() as u64, rest);
        assert!(!space.allocate(1, &mut Vec::new()));
        demand(&["metadata space: scattered blocks", "metadata space: no room"]);
    });
}

#[test]
fn a_freed_block_is_not_handed_out_before_the_superblock_that_frees_it() {
    on_disk(256, async |sim| {
        let space = fresh(&sim, small());
        let all = take(&space, space.free_count());
        space.free(&all[..3]).unwrap();
        assert_eq!((space.free_count(), space.waiting_count()), (0, 3));
        space.committed();
        assert_eq!(space.free_count(), 0);
        let first = space.store().await.unwrap();
        assert!(!space.allocate(1, &mut Vec::new()));
        // Freed after the store: that is for the next one.
        space.free(&all[3..5]).unwrap();
        space.committed();
        assert_eq!((space.free_count(), space.waiting_count()), (3, 2));
        assert_eq!(take(&space, 3), all[..3]);
        let second = space.store().await.unwrap();
        space.committed();
        assert_eq!((first.number, second.number), (1, 2));
        assert_eq!(take(&space, 2), all[3..5]);
    });
}

#[test]
fn what_is_not_in_use_cannot_be_freed() {
    on_disk(256, async |sim| {
        let space = fresh(&sim, small());
        let blocks = take(&space, 2);
        for bad in [0, 16, 34, 255, 256, u64::MAX, 200, blocks[0]] {
            let error = space.free(&[blocks[0], blocks[1], bad]).unwrap_err();
            assert!(
                matches!(error, MetaSpaceError::NotFreeable { block, .. } if block == bad),
                "{error}"
            );
            assert!(blocks.iter().all(|block| space.is_used(*block)));
        }
        space.free(&blocks).unwrap();
    });
}

#[test]
fn a_bitmap_is_loaded_as_it_was_stored_and_only_differences_are_written() {
    on_disk(BLOCKS, async |sim| {
        let space = fresh(&sim, large());
        take(&space, 1000);
        let mut state = space.store().await.unwrap();
        space.committed();
        for round in 0..6 {
            let loaded = reload(&sim, large(), state).await.unwrap();
            assert_eq!(loaded.free_count(), space.free_count());
            assert!((0..BLOCKS).all(|block| loaded.is_used(block) == space.is_used(block)));
            assert_eq!(loaded.current(), state);
            let differs = loaded.state.borrow().differs.clone();
            assert_eq!(differs[usize::from(state.number % 2 == 1)], [false, false]);
            // The first page is always different from the other bitmap, the second once.
            assert_eq!(differs[usize::from(state.number % 2 == 0)], [true, round == 0]);
            take(&space, 1);
            state = space.store().await.unwrap();
            space.committed();
        }
    });
}

#[test]
fn damage_and_lost_writes_are_noticed() {
    on_disk(BLOCKS, async |sim| {
        let space = fresh(&sim, large());
        let mut states = Vec::new();
        let mut before = vec![0; 8192];
        for _ in 0..4 {
            take(&space, 1);
            let area = large().bitmaps[usize::from(space.current().number.is_multiple_of(2))].first * 4096;
            sim.with_medium(0, |medium| medium.peek(area, &mut before));
            states.push(space.store().await.unwrap());
            space.committed();
        }
        let state = states[3];
        let area = large().bitmaps[0].first;
        for bit in (0..4096 * 8).step_by(7) {
            sim.with_medium(0, |medium| {
                medium.rot(area * 4096 + bit / 8, u32::try_from(bit % 8).unwrap())
            });
            let error = reload(&sim, large(), state).await.unwrap_err();
            assert!(
                matches!(error, MetaSpaceError::Damaged { page: 0, .. }),
                "{error}"
            );
            sim.with_medium(0, |medium| {
                medium.rot(area * 4096 + bit / 8, u32::try_from(bit % 8).unwrap())
            });
        }
        reload(&sim, large(), state).await.unwrap();
        for wrong in [states[2], states[1]] {
            assert!(reload(&sim, large(), wrong).await.is_ok() == (wrong == states[2]));
        }
        // Its last write was lost.
        sim.with_medium(0, |medium| medium.poke(area * 4096, &before));
        let error = reload(&sim, large(), state).await.unwrap_err();
        assert!(matches!(error, MetaSpaceError::Stale { number: 4 }), "{error}");
        // The second page in the place of the first.
        sim.with_medium(0, |medium| {
            let mut page = vec![0; 4096];
            medium.peek((area + 1) * 4096, &mut page);
            medium.poke(area * 4096, &page);
        });
        let error = reload(&sim, large(), state).await.unwrap_err();
        assert!(
            matches!(error, MetaSpaceError::Damaged { page: 0, .. }),
            "{error}"
        );
        sim.inject(0, FaultRule::once(Fault::Error, Operation::Read));
        assert!(matches!(
            reload(&sim, large(), state).await,
            Err(MetaSpaceError::Device(_))
        ));
        demand(&[
            "metadata space: a stale bitmap is refused",
            "metadata space: a damaged page is refused",
        ]);
    });
}

#[test]
fn a_store_that_fails_or_is_dropped_is_repeated_in_full() {
    on_disk(BLOCKS, async |sim| {
        let space = fresh(&sim, large());
        space.store().await.unwrap();
        space.committed();
        space.store().await.unwrap();
        space.committed();
        take(&space, 1);
        sim.inject(0, FaultRule::once(Fault::Error, Operation::Write));
        assert!(matches!(space.store().await, Err(MetaSpaceError::Device(_))));
        {
            let mut store = std::pin::pin!(space.store());
            let polled =
                std::future::poll_fn(|context| std::task::Poll::Ready(store.as_mut().poll(context))).await;
            assert!(polled.is_pending());
        }
        let state = space.store().await.unwrap();
        assert_eq!(state.number, 3);
        let loaded = reload(&sim, large(), state).await.unwrap();
        assert_eq!(loaded.free_count(), space.free_count());
        demand(&["metadata space: a bitmap cannot be written"]);
    });
}

#[derive(Debug, Clone, Default)]
struct Promise {
    /// What is in use, by sequence of the superblock.
    used: Vec<(u64, BTreeSet<u64>)>,
    acknowledged: u64,
}

struct Checkpoints;

fn failed(error: impl std::fmt::Display) -> Failure {
    error.to_string().into()
}

/// One checkpoint: takes blocks, frees some, commits.
async fn checkpoint(
    disk: &SimDisk,
    space: &MetaSpace<SimDisk>,
    superblock: &mut Superblock,
    holders: &mut Holders,
    promise: &Shared<Promise>,
) -> Result<(), Failure> {
    let mut blocks = Vec::new();
    let mut used = promise.borrow().used.last().cloned().unwrap_or_default().1;
    // Blocks in both pages.
    space.state.borrow_mut().cursor = if superblock.sequence.is_multiple_of(2) {
        50
    } else {
        35_000
    };
    if !space.allocate(3, &mut blocks) {
        return Err("no room".into());
    }
    if blocks.iter().any(|block| used.contains(block)) {
        return Err(format!("{blocks:?} are in use").into());
    }
    let free: Vec<u64> = used.iter().copied().take(2).collect();
    space.free(&free).map_err(failed)?;
    used.extend(&blocks);
    used.retain(|block| !free.contains(block));
    promise.borrow_mut().used.push((superblock.sequence, used));
    superblock.space = space.store().await.map_err(failed)?;
    disk.flush().await?;
    superblock::write(disk, superblock, holders)
        .await
        .map_err(failed)?;
    space.committed();
    promise.borrow_mut().acknowledged = superblock.sequence;
    Ok(())
}

impl Scenario for Checkpoints {
    type Model = Promise;

    fn world(&self) -> World {
        World::new([DiskOptions::new("meta", BLOCKS * 4096)])
    }

    async fn prepare(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let space = fresh(&sim, large());
        let mut first = Superblock {
            sequence: 1,
            uuid: UUID,
            layout: large(),
            ..Superblock::default()
        };
        first.replay.group = 1;
        checkpoint(
            &sim.disk(0),
            &space,
            &mut first,
            &mut Holders::default(),
            &promise,
        )
        .await
    }

    async fn run(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        for _ in 0..2 {
            self.recover(sim.clone(), Rc::clone(&promise)).await?;
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let disk = sim.disk(0);
        let opened = superblock::open(&disk).await.map_err(failed)?;
        let mut superblock = opened.superblock;
        let mut holders = opened.holders;
        let space = reload(&sim, large(), superblock.space).await.map_err(failed)?;
        let used = {
            let mut promise = promise.borrow_mut();
            promise
                .used
                .retain(|(sequence, _)| *sequence <= superblock.sequence);
            let last = promise.used.last().cloned().unwrap_or_default();
            if last.0 != superblock.sequence || superblock.sequence < promise.acknowledged {
                return Err(
                    format!("sequence {} after {}", superblock.sequence, promise.acknowledged).into(),
                );
            }
            last.1
        };
        let reserved: BTreeSet<u64> = large()
            .reserved()
            .flat_map(|region| region.first..region.end())
            .collect();
        if space.free_count() != BLOCKS - (reserved.len() + used.len()) as u64
            || !used.iter().all(|block| space.is_used(*block))
        {
            return Err("the bitmap is not that of the superblock".into());
        }
        for _ in 0..2 {
            superblock.sequence = superblock.sequence.max(opened.next_sequence - 1) + 1;
            checkpoint(&disk, &space, &mut superblock, &mut holders, &promise).await?;
        }
        Ok(())
    }
}

#[test]
fn a_crash_in_a_checkpoint_leaves_a_bitmap_and_its_superblock() {
    let options = ExploreOptions {
        nesting: 1,
        nested_states: 3,
        ..ExploreOptions::default()
    };
    let numbers = explore(&Checkpoints, &options).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(numbers.crash_states > 1000, "{numbers}");
}
