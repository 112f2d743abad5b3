//! Rot, lost and misdirected writes on one device of a mirror or of RAID-5: everything is read right and repaired. On both: errors that
//! name file and offset, never wrong data.

use std::rc::Rc;

use block_io::sim::{
    DiskOptions, Failure, Fault, FaultRule, Numbers, RunOptions, Sim, SimClock, SimDisk, World,
};
use block_io::{AlignedBuffer, BlockDevice, Durability, Operation};
use filesys::{
    Access, Attributes, Copies, Event, File, FileSystem, FormatOptions, FsError, GivenVolume, NewFile,
    OpenOptions, Pace, Redundancy, ScrubFinding, ScrubOptions, ScrubPosition, ScrubReport,
};
use volume_manager::model::{Layout, Uuid};
use volume_manager::{Pool, Volume};

use crate::harness::{failed, memory, pattern, same};
use crate::pools::{self, options};

#[path = "heal_copies.rs"]
mod copies;

type SimVolume = Volume<SimDisk, SimClock>;
type HealFs = FileSystem<SimVolume, SimClock>;
type HealFile = File<SimVolume, SimClock>;

const DISK: u64 = 16 << 20;
const META: u64 = 2 << 20;
const DATA: u64 = 4 << 20;
const SIZE: u64 = 1 << 20;
const SUB: u64 = 4096;

struct Rig {
    pool: Pool<SimDisk, SimClock>,
    meta: SimVolume,
    data: SimVolume,
    redundancy: Redundancy,
}

fn world(disks: u64) -> World {
    World::new((0..disks).map(|index| DiskOptions::new(&format!("d{index}"), DISK)))
}

fn rig(pool: Pool<SimDisk, SimClock>) -> Rig {
    let (meta, data) = (pool.volume("meta").unwrap(), pool.volume("data").unwrap());
    let redundancy = Redundancy::default();
    redundancy.set_meta(Some(Rc::new(meta.clone())));
    redundancy.set_volume([1; 16], Some(Rc::new(data.clone())));
    Rig {
        pool,
        meta,
        data,
        redundancy,
    }
}

async fn make(sim: &Sim, disks: usize, layout: Layout) -> Result<Rig, Failure> {
    let devices = pools::devices(sim, disks);
    let pool = Pool::create("tank", Uuid(7), devices, &options(1), sim.clock())
        .await
        .map_err(failed)?;
    for (number, (name, size)) in [("meta", META), ("data", DATA)].into_iter().enumerate() {
        pool.create_volume(pools::volume(number, name, size, layout))
            .await
            .map_err(failed)?;
    }
    while let Some(job) = pool.jobs().into_iter().find(|job| job.is_live()) {
        pool.wait(job.id).await.map_err(failed)?;
    }
    Ok(rig(pool))
}

fn given(rig: &Rig) -> Vec<GivenVolume<SimVolume>> {
    vec![GivenVolume {
        uuid: [1; 16],
        name: "data".into(),
        class: String::new(),
        device: Rc::new(rig.data.clone()),
    }]
}

fn fs_options(rig: &Rig) -> OpenOptions {
    OpenOptions {
        cached_pages: 16,
        redundancy: rig.redundancy.clone(),
        ..OpenOptions::default()
    }
}

async fn format(sim: &Sim, rig: &Rig) -> Result<HealFs, Failure> {
    let meta = GivenVolume {
        uuid: [2; 16],
        name: "meta".into(),
        class: String::new(),
        device: Rc::new(rig.meta.clone()),
    };
    let format = FormatOptions {
        uuid: [9; 16],
        seed: 77,
        journal_blocks: Some(64),
        grow_to: 0,
    };
    FileSystem::format(meta, given(rig), &format, fs_options(rig), sim.clock())
        .await
        .map_err(failed)
}

async fn open(sim: &Sim, rig: &Rig) -> Result<HealFs, FsError> {
    let meta = Rc::new(rig.meta.clone());
    FileSystem::open(meta, given(rig), fs_options(rig), sim.clock()).await
}

fn checked() -> NewFile {
    NewFile {
        size: SIZE,
        attributes: Some(Attributes {
            checksums: true,
            ..Attributes::default()
        }),
        ..NewFile::default()
    }
}

async fn write(file: &HealFile, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
    let mut buffer = AlignedBuffer::new(bytes.len());
    buffer.as_mut_slice().copy_from_slice(bytes);
    file.write(offset, &memory(&buffer), Durability::Volatile)
        .await
        .map_err(failed)
}

async fn read(file: &HealFile, offset: u64, length: u64) -> Result<Vec<u8>, Failure> {
    let buffer = AlignedBuffer::new(usize::try_from(length).unwrap());
    file.read(offset, &memory(&buffer)).await.map_err(failed)?;
    Ok(buffer.as_slice().to_vec())
}

/// Where a disk has these bytes.
fn find(sim: &Sim, disk: usize, bytes: &[u8]) -> Vec<u64> {
    let mut image = vec![0; usize::try_from(DISK).unwrap()];
    sim.with_medium(disk, |medium| medium.peek(0, &mut image));
    let places = image.chunks(512).enumerate();
    places
        .filter(|(_, sector)| bytes.starts_with(sector))
        .map(|(number, _)| number as u64 * 512)
        .collect()
}

fn rot(sim: &Sim, disk: usize, offset: u64) {
    sim.with_medium(disk, |medium| medium.rot(offset + 77, 3));
}

/// Rots all that a disk has of these bytes; gives how many places.
fn rot_all(sim: &Sim, disk: usize, bytes: &[u8]) -> usize {
    let places = find(sim, disk, bytes);
    places.iter().for_each(|place| rot(sim, disk, *place));
    places.len()
}

async fn scrub(fs: &HealFs) -> Result<ScrubReport, Failure> {
    fs.scrub(ScrubOptions::default(), |_| Pace::Go)
        .await
        .map_err(failed)
}

async fn is_whole(fs: &HealFs) -> Result<(), Failure> {
    let report = scrub(fs).await?;
    if report.is_clean() && report.data > 0 && report.blocks > 0 {
        return Ok(());
    }
    Err(format!("a second scrub finds {report:?}").as_str().into())
}

fn numbers<F: Future<Output = Result<(), Failure>>>(
    world: &mut World,
    story: impl FnOnce(Sim) -> F,
) -> Numbers {
    let mut numbers = Numbers::default();
    let ran = world
        .run(&RunOptions::in_order(), story)
        .unwrap_or_else(|failure| panic!("{failure}"));
    ran.ended
        .done()
        .expect("no crash")
        .unwrap_or_else(|failure| panic!("{failure}"));
    numbers.collect();
    numbers
}

fn demand(numbers: &Numbers, marks: &[&str]) {
    let missing = numbers.missing(marks);
    assert!(missing.is_empty(), "{missing:?} were not reached");
}

const LAYOUTS: [(usize, Layout); 2] = [(2, Layout::Mirror { legs: 2 }), (3, Layout::Raid5 { columns: 3 })];

#[test]
fn rot_of_data_on_any_one_disk_is_read_right_and_repaired() {
    for (disks, layout) in LAYOUTS {
        for bad in 0..disks {
            let numbers = numbers(&mut world(disks as u64), async move |sim| {
                let rig = make(&sim, disks, layout).await?;
                let fs = format(&sim, &rig).await?;
                fs.create("/a", &checked()).await.map_err(failed)?;
                let file = fs.open_file("/a", Access::Write).await.map_err(failed)?;
                let content = pattern(0, usize::try_from(SIZE).unwrap(), 7);
                write(&file, 0, &content).await?;
                file.flush().await.map_err(failed)?;
                let mut rotten = 0;
                // All that one disk has of a part of the file.
                for sector in content.chunks(512).take(512) {
                    rotten += rot_all(&sim, bad, sector);
                }
                assert!(rotten > 100, "{rotten} sectors");
                same(&read(&file, 0, SIZE).await?, &content)?;
                let first = scrub(&fs).await?;
                assert_eq!(first.lost, 0, "{first:?}");
                let events = fs.take_events();
                let told = events.iter().any(|event| matches!(event, Event::Repaired { .. }));
                assert!(told || first.repaired > 0, "{events:?} {first:?}");
                is_whole(&fs).await?;
                same(&read(&file, 0, SIZE).await?, &content)?;
                drop(file);
                fs.close().await.map_err(failed)
            });
            demand(
                &numbers,
                &["volume: a range is repaired by who knows what it holds"],
            );
        }
    }
}

#[test]
fn rot_of_all_copies_is_an_error_that_names_file_and_offset() {
    for (disks, layout) in LAYOUTS {
        let numbers = numbers(&mut world(disks as u64), async move |sim| {
            let rig = make(&sim, disks, layout).await?;
            let fs = format(&sim, &rig).await?;
            let id = fs.create("/a", &checked()).await.map_err(failed)?;
            let file = fs.open_file("/a", Access::Write).await.map_err(failed)?;
            let content = pattern(0, usize::try_from(SIZE).unwrap(), 7);
            write(&file, 0, &content).await?;
            file.flush().await.map_err(failed)?;
            // What lies beside it in the row and in the other leg, too.
            for disk in 0..disks {
                for sector in content.chunks(512) {
                    rot_all(&sim, disk, sector);
                }
            }
            let error = read(&file, 5 * SUB, SUB).await.unwrap_err().to_string();
            assert!(
                error.contains("checksum") && error.contains(&(5 * SUB).to_string()),
                "{error}"
            );
            let report = scrub(&fs).await?;
            assert_eq!(report.lost, SIZE / SUB);
            let named = |finding: &ScrubFinding| matches!(finding, ScrubFinding::Data { file, name, offset } if *file == id && name.contains('a') && *offset == 5 * SUB);
            assert!(report.findings.iter().any(named), "{:?}", report.findings);
            Ok(())
        });
        demand(&numbers, &["filesys: no copy of data is right"]);
    }
}

#[test]
fn lost_and_misdirected_writes_are_noticed_and_repaired() {
    for fault in [Fault::LostWrite, Fault::MisdirectedWrite(1 << 20)] {
        for (disks, layout) in LAYOUTS {
            numbers(&mut world(disks as u64), async move |sim| {
                let rig = make(&sim, disks, layout).await?;
                let fs = format(&sim, &rig).await?;
                fs.create("/a", &checked()).await.map_err(failed)?;
                let file = fs.open_file("/a", Access::Write).await.map_err(failed)?;
                let length = usize::try_from(SIZE).unwrap();
                write(&file, 0, &pattern(0, length, 7)).await?;
                file.flush().await.map_err(failed)?;
                let first = pattern(0, 512, 7);
                let places = (0..disks).find_map(|disk| Some((disk, *find(&sim, disk, &first).first()?)));
                let (disk, place) = places.unwrap();
                let rule = FaultRule::once(fault, Operation::Write).within(place..place + 65536);
                sim.inject(disk, rule);
                let content = pattern(0, length, 8);
                write(&file, 0, &content).await?;
                file.flush().await.map_err(failed)?;
                same(&read(&file, 0, SIZE).await?, &content)?;
                let first = scrub(&fs).await?;
                assert_eq!(first.lost, 0, "{first:?}");
                is_whole(&fs).await?;
                same(&read(&file, 0, SIZE).await?, &content)
            });
        }
    }
}

/// A file system with some files, not closed: its journal has to be replayed.
async fn some_files(sim: &Sim, rig: &Rig) -> Result<Vec<u8>, Failure> {
    let fs = format(sim, rig).await?;
    for number in 0..12 {
        fs.create(&format!("/f{number}"), &checked())
            .await
            .map_err(failed)?;
    }
    let file = fs.open_file("/f3", Access::Write).await.map_err(failed)?;
    let content = pattern(0, 262_144, 9);
    write(&file, 0, &content).await?;
    file.flush().await.map_err(failed)?;
    fs.checkpoint().await.map_err(failed)?;
    write(&file, 524_288, &content).await?;
    file.flush().await.map_err(failed)?;
    for number in 12..20 {
        fs.create(&format!("/f{number}"), &checked())
            .await
            .map_err(failed)?;
    }
    fs.sync().await.map_err(failed)?;
    Ok(content)
}

async fn files_are_there(fs: &HealFs, content: &[u8]) -> Result<(), Failure> {
    let file = fs.open_file("/f3", Access::Read).await.map_err(failed)?;
    same(&read(&file, 0, 262_144).await?, content)?;
    same(&read(&file, 524_288, 262_144).await?, content)?;
    for number in 0..20 {
        fs.open_file(&format!("/f{number}"), Access::Read)
            .await
            .map_err(failed)?;
    }
    Ok(())
}

/// Rots all blocks of the metadata volume that are not zero on one disk: superblocks, journal, bitmaps, pages, parity.
fn rot_metadata(sim: &Sim, rig: &Rig, bad: usize) -> u64 {
    let config = rig.pool.configuration();
    let name = format!("d{bad}");
    let device = config
        .devices
        .iter()
        .find(|device| device.name == name)
        .unwrap()
        .id;
    let volume = config
        .volumes
        .iter()
        .find(|volume| volume.name == "meta")
        .unwrap();
    let mut rotten = 0;
    for extent in volume.extents().filter(|extent| extent.device == device) {
        for block in (extent.start..extent.start + extent.length).step_by(4096) {
            let mut bytes = [0; 512];
            sim.with_medium(bad, |medium| medium.peek(block, &mut bytes));
            if bytes != [0; 512] {
                rot(sim, bad, block);
                rotten += 1;
            }
        }
    }
    rotten
}

#[test]
fn rot_of_all_metadata_on_any_one_disk_is_healed_at_opening_and_by_a_scrub() {
    let mut all = Numbers::default();
    for (disks, layout) in LAYOUTS {
        for bad in 0..disks {
            let numbers = numbers(&mut world(disks as u64), async move |sim| {
                let rig = make(&sim, disks, layout).await?;
                let content = some_files(&sim, &rig).await?;
                let rotten = rot_metadata(&sim, &rig, bad);
                assert!(rotten > 10, "{rotten} blocks");
                let fs = open(&sim, &rig).await.map_err(failed)?;
                files_are_there(&fs, &content).await?;
                let first = scrub(&fs).await?;
                assert_eq!(first.lost, 0, "{first:?}");
                let events = fs.take_events();
                let told = events
                    .iter()
                    .any(|event| matches!(event, Event::MetadataRepaired { .. }));
                assert!(told || first.blocks_repaired > 0, "{events:?} {first:?}");
                is_whole(&fs).await?;
                files_are_there(&fs, &content).await?;
                fs.close().await.map_err(failed)
            });
            all.add(&numbers);
        }
    }
    demand(
        &all,
        &[
            "filesys: a good copy of a block of metadata",
            "journal: a block is taken from another copy",
            "metadata space: a page is taken from another copy",
            "superblock: another leg has a newer or a valid one",
            "filesys: a scrub repairs another copy of metadata",
        ],
    );
}

#[test]
fn a_scrub_goes_on_where_it_was_stopped_and_runs_beside_writers() {
    numbers(&mut world(3), async move |sim| {
        let rig = make(&sim, 3, Layout::Raid5 { columns: 3 }).await?;
        let content = some_files(&sim, &rig).await?;
        let fs = open(&sim, &rig).await.map_err(failed)?;
        // What was written shortly before the crash gets its checksums anew.
        let report = scrub(&fs).await?;
        assert!(report.filled > 0 && report.is_clean(), "{report:?}");
        for sector in content.chunks(512) {
            rot_all(&sim, 1, sector);
        }
        let writer = fs.open_file("/f5", Access::Write).await.map_err(failed)?;
        let mut from = ScrubPosition::default();
        let (mut repaired, mut steps) = (0, 0);
        loop {
            let options = ScrubOptions {
                from,
                ..ScrubOptions::default()
            };
            let report = fs.scrub(options, |_| Pace::Stop).await.map_err(failed)?;
            assert_eq!(report.lost, 0, "{report:?}");
            repaired += report.repaired;
            steps += 1;
            if report.position.phase == filesys::ScrubPhase::Done {
                break;
            }
            assert!(report.position > from);
            from = report.position;
            write(&writer, steps * SUB, &pattern(steps * SUB, 4096, 3)).await?;
        }
        assert!(repaired > 10 && steps > 3, "{repaired} in {steps} steps");
        is_whole(&fs).await?;
        files_are_there(&fs, &content).await
    });
}

#[test]
fn without_redundancy_a_damaged_block_is_told() {
    numbers(&mut world(2), async move |sim| {
        let rig = make(&sim, 2, Layout::Mirror { legs: 2 }).await?;
        rig.redundancy.set_volume([1; 16], None);
        let fs = format(&sim, &rig).await?;
        fs.create("/a", &checked()).await.map_err(failed)?;
        let file = fs.open_file("/a", Access::Write).await.map_err(failed)?;
        let content = pattern(0, 65536, 7);
        write(&file, 0, &content).await?;
        for disk in 0..2 {
            assert_eq!(rot_all(&sim, disk, &content[..512]), 1);
        }
        assert!(read(&file, 0, 4096).await.is_err());
        let events = fs.take_events();
        assert!(
            events
                .iter()
                .any(|event| matches!(event, Event::Corrupt { offset: 0, .. }))
        );
        same(&read(&file, 4096, 4096).await?, &content[4096..8192])?;
        let copies: Rc<dyn Copies> = Rc::new(rig.data.clone());
        assert_eq!(copies.copies(0, 4096), 2);
        Ok(())
    });
}
