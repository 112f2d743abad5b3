//! What the layer above does not use is not copied, and what it uses is right in every copy, whatever it begins and ceases to use
//! meanwhile.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{DiskOptions, Ended, Failure, Rng, RunOptions, Schedule, Sim, SimClock, SimDisk, World};
use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf};
use volume_manager::model::{DeviceId, JobKind, Layout};
use volume_manager::{Event, NewDevice, OpenOptions, Usage, Volume};

use crate::harness::{
    self, Model, SimPool, UNIT, attributes, create, failed, new_device, new_volume, open, read_bytes, settle,
};

const BLOCKS: u64 = 48;
const DISKS: usize = 6;
const MIB: u64 = 1 << 20;

/// Sectors of a block: so much of a write a crash keeps or loses.
const SECTORS: usize = 8;

/// A very small file system: which blocks are in use, and what their sectors hold.
#[derive(Default)]
struct Blocks {
    used: BTreeSet<u64>,
    content: BTreeMap<u64, [u8; SECTORS]>,
    /// Block, and what a write that has not ended puts there.
    writing: BTreeMap<u64, u8>,
}

#[derive(Clone, Default)]
struct FileSystem(Rc<RefCell<Blocks>>);

impl Usage for FileSystem {
    fn next_used(&self, offset: u64, end: u64) -> Option<Range<u64>> {
        let blocks = self.0.borrow();
        let next = blocks.used.range(offset / UNIT..end.div_ceil(UNIT)).next()?;
        Some(next * UNIT..(next + 1) * UNIT)
    }
}

type SimVolume = Volume<SimDisk, SimClock>;

impl FileSystem {
    async fn write(&self, volume: &SimVolume, block: u64, fill: u8) -> Result<(), Failure> {
        {
            let mut blocks = self.0.borrow_mut();
            blocks.used.insert(block);
            blocks.writing.insert(block, fill);
        }
        let mut buffer = AlignedBuffer::new(usize::try_from(UNIT).unwrap());
        buffer.as_mut_slice().fill(fill);
        // SAFETY: the buffer lives until the write has ended.
        let memory: [IoBuf; 1] = [unsafe { buffer.io(0, buffer.as_slice().len()) }];
        volume
            .write(block * UNIT, &memory, Durability::Durable)
            .await
            .map_err(failed)?;
        let mut blocks = self.0.borrow_mut();
        blocks.writing.remove(&block);
        blocks.content.insert(block, [fill; SECTORS]);
        Ok(())
    }

    fn release(&self, block: u64) {
        let mut blocks = self.0.borrow_mut();
        blocks.used.remove(&block);
        blocks.content.remove(&block);
    }

    /// A block whose first write had not ended is not in use; one that was being overwritten has the old or the new content in each sector.
    fn crashed(&self) {
        let blocks = &mut *self.0.borrow_mut();
        let content = &blocks.content;
        blocks.used.retain(|block| content.contains_key(block));
    }

    async fn verify(&self, volume: &SimVolume) -> Result<(), Failure> {
        let used: Vec<u64> = self.0.borrow().used.iter().copied().collect();
        for block in used {
            let found = read_bytes(volume, block * UNIT, usize::try_from(UNIT).unwrap())
                .await
                .map_err(failed)?;
            let blocks = &mut *self.0.borrow_mut();
            let old = blocks.content.get(&block).copied();
            let new = blocks.writing.get(&block).copied();
            let mut now = [0; SECTORS];
            for (number, sector) in found.chunks(found.len() / SECTORS).enumerate() {
                let fill = sector[0];
                let allowed = [old.map(|old| old[number]), new];
                if !allowed.contains(&Some(fill)) || sector.iter().any(|byte| *byte != fill) {
                    let text =
                        format!("sector {number} of block {block} holds {fill}, not one of {allowed:?}");
                    return Err(text.as_str().into());
                }
                now[number] = fill;
            }
            // What was read once stays.
            blocks.content.insert(block, now);
            blocks.writing.remove(&block);
        }
        Ok(())
    }
}

async fn guest(
    sim: Sim,
    volume: SimVolume,
    files: FileSystem,
    odd: u64,
    stop: Rc<Cell<bool>>,
    ended: Rc<Cell<u32>>,
) {
    while !stop.get() {
        let (block, fill, action) =
            sim.random(|rng| (rng.below(BLOCKS / 2) * 2 + odd, 1 + rng.below(255), rng.below(4)));
        if action == 0 {
            files.release(block);
        } else if files
            .write(&volume, block, u8::try_from(fill).unwrap())
            .await
            .is_err()
        {
            break;
        }
        let pause = sim.random(|rng| rng.below(300));
        sim.clock().sleep(Duration::from_micros(pause)).await;
    }
    ended.set(ended.get() + 1);
}

/// Fills the disks with what must not matter, makes a pool with a spare and a volume that is in use in part.
async fn prepare(sim: &Sim, model: &Model, files: &FileSystem, layout: Layout) -> Result<(), Failure> {
    for disk in sim.disks() {
        let junk = vec![0xee; usize::try_from(harness::DISK - 4 * MIB).unwrap()];
        disk.write_bytes(4 * MIB, &junk, Durability::Durable)
            .await
            .map_err(failed)?;
    }
    let pool = create(sim, model, DISKS - 1).await?;
    let spare = NewDevice {
        spare: true,
        ..new_device(sim, DISKS - 1)
    };
    pool.add_device(spare).await.map_err(failed)?;
    let volume = pool
        .create_volume(new_volume(layout, BLOCKS * UNIT))
        .await
        .map_err(failed)?;
    for block in 0..8 {
        files.write(&volume, block * 5, 7).await?;
    }
    drop(volume);
    pool.close().await.map_err(failed)
}

async fn open_used(
    sim: &Sim,
    model: &Model,
    files: &FileSystem,
    without: Option<usize>,
) -> Result<SimPool, Failure> {
    let pool = open(sim, model, |disk| Some(disk) != without)
        .await
        .map_err(failed)?;
    pool.volume("v")
        .map_err(failed)?
        .set_usage(Some(Rc::new(files.clone())));
    Ok(pool)
}

fn devices(pool: &SimPool) -> Vec<DeviceId> {
    let config = pool.configuration();
    let members = config.volumes[0]
        .sections
        .iter()
        .flat_map(|section| &section.columns);
    let members = members.flat_map(|column| &column.members);
    members.map(|member| member.extents[0].device).collect()
}

/// Guests work while a device fails or is emptied, a leg is added, or the layout changes.
async fn work(sim: Sim, model: Model, files: FileSystem, seed: u64) -> Result<(), Failure> {
    let pool = open_used(&sim, &model, &files, None).await?;
    let volume = pool.volume("v").map_err(failed)?;
    let (stop, ended) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
    for odd in 0..2 {
        let guest = guest(
            sim.clone(),
            volume.clone(),
            files.clone(),
            odd,
            Rc::clone(&stop),
            Rc::clone(&ended),
        );
        sim.spawn("guest", guest);
    }
    sim.clock().sleep(Duration::from_millis(3)).await;
    let device = devices(&pool)[usize::try_from(seed / 4).unwrap() % devices(&pool).len()];
    let target = match pool.configuration().volumes[0].attributes.layout {
        Layout::Mirror { .. } => Layout::Mirror { legs: 3 },
        Layout::Raid5 { .. } => Layout::StripeMirror { columns: 2, legs: 2 },
        _ => Layout::Raid5 { columns: 3 },
    };
    let kind = match seed % 4 {
        0 => {
            sim.detach(usize::try_from(device.0).unwrap());
            None
        }
        1 => Some(JobKind::Evacuate {
            device,
            to: None,
            remove: false,
        }),
        2 => Some(JobKind::Relayout {
            volume: pool.configuration().volumes[0].id,
            target: attributes(target),
        }),
        _ => Some(JobKind::Scrub { volume: None }),
    };
    if let Some(kind) = kind {
        let job = pool.start(kind, 0).await.map_err(failed)?;
        pool.wait(job).await.map_err(failed)?;
    } else {
        // The spare takes over.
        sim.clock().sleep(Duration::from_secs(5)).await;
    }
    stop.set(true);
    while ended.get() < 2 {
        sim.clock().sleep(Duration::from_millis(1)).await;
    }
    files.verify(&volume).await
}

/// All is well again, and what is in use is the same whichever device is missing.
async fn check(sim: Sim, model: Model, files: FileSystem) -> Result<(), Failure> {
    for disk in 0..DISKS {
        sim.attach(disk);
    }
    let pool = open_used(&sim, &model, &files, None).await?;
    let volume = pool.volume("v").map_err(failed)?;
    files.verify(&volume).await?;
    settle(&pool).await?;
    files.verify(&volume).await?;
    let parity = pool.configuration().volumes[0]
        .sections
        .iter()
        .all(|section| section.parity > 0);
    if parity {
        // Parity fits everywhere, also where nothing is in use.
        volume.set_usage(None);
    }
    pool.take_events();
    let scrub = pool
        .start(JobKind::Scrub { volume: None }, 0)
        .await
        .map_err(failed)?;
    pool.wait(scrub).await.map_err(failed)?;
    let differ = |event: &Event| matches!(event, Event::Repaired { .. });
    if let Some(event) = pool.take_events().into_iter().find(differ) {
        return Err(event.to_string().as_str().into());
    }
    drop(volume);
    let devices = devices(&pool);
    pool.close().await.map_err(failed)?;
    for device in devices {
        let missing = usize::try_from(device.0).unwrap();
        let pool = open_used(&sim, &model, &files, Some(missing)).await?;
        files.verify(&pool.volume("v").map_err(failed)?).await?;
        pool.close().await.map_err(failed)?;
        let pool = open_used(&sim, &model, &files, None).await?;
        settle(&pool).await?;
        pool.close().await.map_err(failed)?;
    }
    Ok(())
}

fn run(
    world: &mut World,
    options: &RunOptions,
    what: &str,
    work: impl AsyncFnOnce(Sim) -> Result<(), Failure>,
) -> bool {
    let ran = world
        .run(options, |sim| work(sim))
        .unwrap_or_else(|failure| panic!("{what}: {failure}"));
    match ran.ended {
        Ended::Done(Ok(())) => false,
        Ended::Done(Err(failure)) => panic!("{what}: {failure}"),
        Ended::Crashed => true,
    }
}

fn history(layout: Layout, seed: u64) {
    let what = format!("{layout}, seed {seed}");
    let mut world = harness::world(DISKS as u64);
    let mut rng = Rng::new(seed);
    let (model, files) = (Model::default(), FileSystem::default());
    run(&mut world, &RunOptions::in_order(), &what, async |sim| {
        prepare(&sim, &model, &files, layout).await
    });
    world.settle();
    let mut options = RunOptions {
        schedule: Schedule::Random,
        ..RunOptions::random(rng.next_u64())
    };
    if !seed.is_multiple_of(3) {
        options = options.crash_after(rng.below(1500));
    }
    let crashed = run(&mut world, &options, &what, async |sim| {
        work(sim, Rc::clone(&model), files.clone(), seed).await
    });
    world.crash(&mut rng);
    if crashed {
        files.crashed();
    }
    run(
        &mut world,
        &RunOptions::random(rng.next_u64()),
        &what,
        async |sim| check(sim, Rc::clone(&model), files.clone()).await,
    );
}

#[test]
fn what_is_in_use_is_right_in_every_copy_through_crashes_and_failing_devices() {
    for layout in [
        Layout::Mirror { legs: 2 },
        Layout::StripeMirror { columns: 2, legs: 2 },
        Layout::Raid5 { columns: 3 },
    ] {
        for seed in 0..24 {
            history(layout, seed);
        }
    }
}

/// What the devices of a pool have read and written so far.
fn traffic(pool: &SimPool) -> (u64, u64) {
    let all = pool.device_statistics();
    let sum = |of: fn(&volume_manager::Statistics) -> u64| all.iter().map(|(_, device)| of(device)).sum();
    (
        sum(|device| device.reads.bytes),
        sum(|device| device.writes.bytes),
    )
}

/// Ten ranges of a MiB each.
struct Tenths;

impl Usage for Tenths {
    fn next_used(&self, offset: u64, end: u64) -> Option<Range<u64>> {
        (0..10)
            .map(|number| number * 100 * MIB..number * 100 * MIB + MIB)
            .find(|range| range.end > offset && range.start < end)
    }
}

#[test]
fn of_a_gibibyte_with_ten_mebibytes_in_use_ten_are_copied() {
    let disks = (0..4).map(|index| DiskOptions::new(&format!("d{index}"), 3 << 30));
    let mut world = World::new(disks);
    run(&mut world, &RunOptions::in_order(), "copies", async |sim| {
        let pool = create(&sim, &Model::default(), 4).await?;
        let mut new = new_volume(Layout::Mirror { legs: 2 }, 1 << 30);
        new.region = 0;
        let volume = pool.create_volume(new).await.map_err(failed)?;
        volume.set_usage(Some(Rc::new(Tenths)));
        let id = pool.configuration().volumes[0].id;
        let relayout = |layout| JobKind::Relayout {
            volume: id,
            target: attributes(layout),
        };
        let device = devices(&pool)[0];
        let evacuate = JobKind::Evacuate {
            device,
            to: None,
            remove: false,
        };
        let cases = [
            ("a third leg", relayout(Layout::Mirror { legs: 3 }), 10, Some(10)),
            ("a scrub", JobKind::Scrub { volume: None }, 30, Some(0)),
            ("an evacuation", evacuate, 10, Some(10)),
            // What is made zero counts as written.
            ("another layout", relayout(Layout::Raid5 { columns: 3 }), 10, None),
        ];
        for (what, kind, read, written) in cases {
            let before = traffic(&pool);
            let job = pool.start(kind, 0).await.map_err(failed)?;
            pool.wait(job).await.map_err(failed)?;
            let after = traffic(&pool);
            let (reads, writes) = (after.0 - before.0, after.1 - before.1);
            println!("{what}: {} KiB read, {} KiB written", reads >> 10, writes >> 10);
            // A window that is in use in part is copied as a whole when the layout changes.
            assert!(
                reads >= read * MIB && reads <= (read + 3) * MIB,
                "{what} read {reads} bytes"
            );
            if let Some(written) = written {
                assert!(
                    writes >= written * MIB && writes <= (written + 3) * MIB,
                    "{what} wrote {writes} bytes"
                );
            }
        }
        drop(volume);
        pool.close().await.map_err(failed)
    });
}

async fn open_with_waiting_jobs(sim: &Sim, model: &Model) -> Result<SimPool, Failure> {
    let disks = sim.disks().into_iter();
    let devices = disks.map(|disk| (format!("d{}", disk.index()), Rc::new(disk)));
    let options = OpenOptions {
        jobs_wait: true,
        ..harness::options(model)
    };
    SimPool::open(devices.collect(), &options, sim.clock())
        .await
        .map_err(failed)
}

#[test]
fn a_job_that_goes_on_at_an_open_waits_until_it_is_known_what_is_in_use() {
    let disks = (0..4).map(|index| DiskOptions::new(&format!("d{index}"), 3 << 30));
    let mut world = World::new(disks);
    run(&mut world, &RunOptions::in_order(), "jobs wait", async |sim| {
        let model = Model::default();
        let pool = create(&sim, &model, 4).await?;
        let mut new = new_volume(Layout::Mirror { legs: 2 }, 1 << 30);
        new.region = 0;
        pool.create_volume(new).await.map_err(failed)?;
        let third_leg = JobKind::Relayout {
            volume: pool.configuration().volumes[0].id,
            target: attributes(Layout::Mirror { legs: 3 }),
        };
        pool.start(third_leg, MIB).await.map_err(failed)?;
        pool.close().await.map_err(failed)?;

        let pool = open_with_waiting_jobs(&sim, &model).await?;
        sim.clock().sleep(Duration::from_secs(60)).await;
        assert_eq!(traffic(&pool), (0, 0), "a job works although it should wait");
        let volume = pool.volume("v").map_err(failed)?;
        volume.set_usage(Some(Rc::new(Tenths)));
        pool.let_jobs_begin();
        settle(&pool).await?;
        let (read, written) = traffic(&pool);
        let copied = 9 * MIB..=11 * MIB;
        assert!(copied.contains(&read), "{read} bytes were read");
        assert!(copied.contains(&written), "{written} bytes were written");

        // One that never begins does not keep the pool from being closed.
        let scrub = pool.start(JobKind::Scrub { volume: None }, MIB).await;
        scrub.map_err(failed)?;
        drop(volume);
        pool.close().await.map_err(failed)?;
        let pool = open_with_waiting_jobs(&sim, &model).await?;
        assert!(pool.jobs().iter().any(|job| job.is_live()));
        pool.close().await.map_err(failed)
    });
}
