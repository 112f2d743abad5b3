//! Paths that are cut and come back, with and without caches of their own, and crashes.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{
    DiskOptions, Ended, Failure, Fault, FaultRule, Rng, RunOptions, SectorModel, Sim, SimClock, SimPath,
    SwarmOptions, Workload, World, swarm,
};
use block_io::{
    AlignedBuffer, BlockDevice, Clock, DevicePath, Durability, IoError, MultiPath, MultiPathError,
    MultiPathOptions, Operation, ZeroMode,
};

const SECTORS: u64 = 16;

type Device = MultiPath<SimPath, SimClock>;

fn options(unflushed_limit: u64) -> MultiPathOptions {
    MultiPathOptions {
        patience: Duration::from_millis(500),
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(20),
        unflushed_limit,
    }
}

fn path(name: &str, device: SimPath) -> DevicePath<SimPath> {
    DevicePath {
        device,
        name: name.into(),
        identity: None,
    }
}

/// Two paths to the first disk.
fn two_paths(sim: &Sim, caches: bool) -> (Rc<Device>, [SimPath; 2]) {
    let make = || match caches {
        true => SimPath::with_cache(sim.disk(0), sim.clock()),
        false => SimPath::new(sim.disk(0), sim.clock()),
    };
    let paths = [make(), make()];
    let known = vec![path("a", paths[0].clone()), path("b", paths[1].clone())];
    let device = MultiPath::new(known, options(if caches { 4096 } else { 0 }), sim.clock()).unwrap();
    (Rc::new(device), paths)
}

async fn write(
    device: &impl BlockDevice,
    offset: u64,
    bytes: &[u8],
    durability: Durability,
) -> Result<(), IoError> {
    let mut buffer = AlignedBuffer::new(bytes.len());
    buffer.as_mut_slice().copy_from_slice(bytes);
    // SAFETY: the buffer lives until the write has ended.
    let piece = [unsafe { buffer.io(0, usize::MAX) }];
    device.write(offset, &piece, durability).await
}

async fn read(device: &impl BlockDevice, offset: u64, length: usize) -> Result<Vec<u8>, IoError> {
    let buffer = AlignedBuffer::new(length);
    // SAFETY: the buffer lives until the read has ended.
    let piece = [unsafe { buffer.io(0, usize::MAX) }];
    device.read(offset, &piece).await?;
    Ok(buffer.as_slice().to_vec())
}

/// Waits until all paths are up; the simulator ends what waits for ever.
async fn all_up(device: &Device, sim: &Sim) {
    while !device.paths().iter().all(|path| path.1) {
        sim.clock().sleep(Duration::from_millis(1)).await;
    }
}

fn world(disks: usize) -> World {
    World::new((0..disks).map(|_| DiskOptions::new("disk", SECTORS * 512)))
}

#[test]
fn requests_take_the_next_path_and_come_back_when_that_is_cut_too() {
    for caches in [false, true] {
        let ran = world(1).run(&RunOptions::random(1), async |sim| {
            let (device, paths) = two_paths(&sim, caches);
            write(&*device, 0, &[1; 512], Durability::Volatile).await.unwrap();
            paths[0].cut().await;
            assert_eq!(read(&*device, 0, 512).await.unwrap(), [1; 512]);
            let up: Vec<bool> = device.paths().iter().map(|path| path.1).collect();
            assert_eq!(up, [false, true]);
            paths[0].restore();
            all_up(&device, &sim).await;
            paths[1].cut().await;
            assert_eq!(read(&*device, 0, 512).await.unwrap(), [1; 512]);
            write(&*device, 512, &[2; 512], Durability::Volatile)
                .await
                .unwrap();
            device.flush().await.unwrap();
            assert_eq!(sim.disk(0).read_bytes(512, 512).await.unwrap(), [2; 512]);
        });
        ran.unwrap();
    }
}

#[test]
fn requests_fail_when_all_paths_are_cut_for_too_long_and_succeed_again_later() {
    let ran = world(1).run(&RunOptions::random(1), async |sim| {
        let (device, paths) = two_paths(&sim, false);
        paths[0].cut().await;
        paths[1].cut().await;
        let start = sim.clock().now();
        let error = read(&*device, 0, 512).await.unwrap_err();
        assert!(error.is_transport(), "{error:?}");
        let waited = sim.clock().now() - start;
        assert!(
            waited >= Duration::from_millis(500) && waited < Duration::from_millis(600),
            "{waited:?}"
        );
        let start = sim.clock().now();
        assert!(device.flush().await.unwrap_err().is_transport());
        assert_eq!(sim.clock().now(), start);
        paths[1].restore();
        while !device.paths()[1].1 {
            sim.clock().sleep(Duration::from_millis(1)).await;
        }
        read(&*device, 0, 512).await.unwrap();
    });
    ran.unwrap();
}

#[test]
fn an_error_of_the_medium_or_a_full_disk_is_no_reason_to_change_paths() {
    let ran = world(1).run(&RunOptions::random(1), async |sim| {
        let (device, _paths) = two_paths(&sim, false);
        for (fault, errno) in [(Fault::Error, libc::EIO), (Fault::NoSpace, libc::ENOSPC)] {
            sim.inject(0, FaultRule::once(fault, Operation::Write));
            let error = write(&*device, 0, &[1; 512], Durability::Volatile)
                .await
                .unwrap_err();
            let text = format!("{error:?}");
            assert!(
                !error.is_transport() && text.contains(&format!("code: {errno}")),
                "{text}"
            );
            assert!(device.paths().iter().all(|path| path.1));
        }
    });
    ran.unwrap();
}

#[test]
fn eio_is_an_error_of_the_path_if_a_probe_fails_here_and_succeeds_elsewhere() {
    // Two disks stand for the two ends of the paths: only the first has faults.
    let ran = world(2).run(&RunOptions::random(1), async |sim| {
        let known = (0..2).map(|disk| path("a", SimPath::new(sim.disk(disk), sim.clock())));
        let device = MultiPath::new(known.collect(), options(0), sim.clock()).unwrap();
        sim.inject(0, FaultRule::always(Fault::Error, Operation::Read));
        assert_eq!(read(&device, 512, 512).await.unwrap(), [0; 512]);
        assert!(!device.paths()[0].1 && device.paths()[1].1);
    });
    ran.unwrap();
}

#[test]
fn an_unplugged_disk_that_is_plugged_in_again_is_a_path_again() {
    let ran = world(2).run(&RunOptions::random(1), async |sim| {
        let known = (0..2).map(|disk| path("a", SimPath::new(sim.disk(disk), sim.clock())));
        let device = MultiPath::new(known.collect(), options(0), sim.clock()).unwrap();
        sim.inject(0, FaultRule::once(Fault::Drop, Operation::Read));
        read(&device, 0, 512).await.unwrap();
        assert!(!device.paths()[0].1);
        sim.attach(0);
        all_up(&device, &sim).await;
    });
    ran.unwrap();
}

#[test]
fn paths_to_different_devices_are_refused() {
    let mut world = World::new([DiskOptions::new("a", 8192), DiskOptions::new("b", 4096)]);
    let ran = world.run(&RunOptions::random(1), async |sim| {
        let ways = || (0..2).map(|disk| path("way", SimPath::new(sim.disk(disk), sim.clock())));
        let error = MultiPath::new(ways().collect(), options(0), sim.clock()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("size in bytes is 8192 there and 4096 here"),
            "{error}"
        );
        let mut same: Vec<_> = [0, 0]
            .map(|disk| path("way", SimPath::new(sim.disk(disk), sim.clock())))
            .into();
        same[0].identity = Some("serial 1".into());
        same[1].identity = Some("serial 2".into());
        let error = MultiPath::new(same, options(0), sim.clock()).unwrap_err();
        assert!(error.to_string().contains("serial 1"), "{error}");
        let error = MultiPath::<SimPath, SimClock>::new(Vec::new(), options(0), sim.clock());
        assert_eq!(error.unwrap_err(), MultiPathError::NoPath);
    });
    ran.unwrap();
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Write {
        sector: u64,
        count: u64,
        fill: u8,
        fua: bool,
    },
    Zero {
        sector: u64,
        count: u64,
    },
    Read {
        sector: u64,
        count: u64,
    },
    Flush,
    Cut {
        path: usize,
    },
    Restore {
        path: usize,
    },
    Crash {
        after: u64,
    },
}

/// Random histories on two paths.
struct Paths {
    caches: bool,
    clients: usize,
    /// `false` builds it wrong: nothing is remembered though there are caches.
    remembers: bool,
}

type Oracle = Rc<RefCell<SectorModel>>;

async fn step(device: &Device, paths: &[SimPath; 2], oracle: &Oracle, step: &Step) -> Result<(), Failure> {
    let bytes_of = |sectors: u64| usize::try_from(sectors * 512).unwrap();
    let lost = |error: IoError| {
        if error.is_transport() {
            Ok(())
        } else {
            Err(Failure::from(error))
        }
    };
    match *step {
        Step::Write {
            sector,
            count,
            fill,
            fua,
        } => {
            let bytes = vec![fill; bytes_of(count)];
            let durability = if fua {
                Durability::Durable
            } else {
                Durability::Volatile
            };
            let ticket = oracle.borrow_mut().write_begins(sector * 512, &bytes, durability);
            match write(device, sector * 512, &bytes, durability).await {
                Ok(()) => oracle.borrow_mut().succeeded(ticket),
                Err(error) => {
                    oracle.borrow_mut().failed(ticket);
                    lost(error)?;
                }
            }
        }
        Step::Zero { sector, count } => {
            let ticket = oracle.borrow_mut().zeroes_begin(sector * 512, count * 512);
            match device
                .write_zeroes(sector * 512, count * 512, ZeroMode::MayUnmap)
                .await
            {
                Ok(()) => oracle.borrow_mut().succeeded(ticket),
                Err(error) => {
                    oracle.borrow_mut().failed(ticket);
                    lost(error)?;
                }
            }
        }
        Step::Read { sector, count } => {
            let ticket = oracle.borrow_mut().read_begins();
            match read(device, sector * 512, bytes_of(count)).await {
                Ok(bytes) => oracle.borrow_mut().check(ticket, sector * 512, &bytes)?,
                Err(error) => {
                    oracle.borrow_mut().read_failed(ticket);
                    lost(error)?;
                }
            }
        }
        Step::Flush => {
            let ticket = oracle.borrow_mut().flush_begins();
            match device.flush().await {
                Ok(()) => oracle.borrow_mut().flushed(ticket),
                Err(error) => lost(error)?,
            }
        }
        Step::Cut { path } => paths[path].cut().await,
        Step::Restore { path } => paths[path].restore(),
        Step::Crash { .. } => {}
    }
    Ok(())
}

impl Paths {
    async fn work(&self, sim: Sim, oracle: Oracle, steps: Vec<Step>) -> Result<(), Failure> {
        let (device, paths) = two_paths(&sim, self.caches);
        let device = match self.remembers {
            true => device,
            false => {
                let known = vec![path("a", paths[0].clone()), path("b", paths[1].clone())];
                Rc::new(MultiPath::new(known, options(0), sim.clock()).unwrap())
            }
        };
        let results = Rc::new(RefCell::new(Vec::new()));
        for client in 0..self.clients {
            // Each has sectors of its own to write: what overlapping writes leave is not what this is about.
            let share: Vec<Step> = steps.iter().skip(client).step_by(self.clients).cloned().collect();
            let (device, paths, oracle) = (Rc::clone(&device), paths.clone(), Rc::clone(&oracle));
            let results = Rc::clone(&results);
            sim.spawn(&format!("client {client}"), async move {
                let mut result = Ok(());
                for next in &share {
                    result = result.and(step(&device, &paths, &oracle, next).await);
                }
                results.borrow_mut().push(result);
            });
        }
        while results.borrow().len() < self.clients {
            sim.clock().sleep(Duration::from_millis(1)).await;
        }
        results.take().into_iter().collect()
    }
}

impl Workload for Paths {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        let share = SECTORS / self.clients as u64;
        let step = |rng: &mut Rng, client: u64| {
            let count = 1 + rng.below(2);
            let sector = client * share + rng.below(share - count + 1);
            match rng.below(24) {
                0 => Step::Crash {
                    after: rng.below(300),
                },
                1 | 2 => Step::Flush,
                3 => Step::Zero { sector, count },
                4 | 5 => Step::Cut {
                    path: usize::from(rng.chance(1, 2)),
                },
                6..10 => Step::Restore {
                    path: usize::from(rng.chance(1, 2)),
                },
                10..15 => Step::Read {
                    sector: rng.below(SECTORS - 1),
                    count,
                },
                _ => Step::Write {
                    sector,
                    count,
                    fill: u8::try_from(1 + rng.below(255)).unwrap(),
                    fua: rng.chance(1, 4),
                },
            }
        };
        (0..80)
            .map(|number| step(rng, number % self.clients as u64))
            .collect()
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let mut world = world(1);
        let oracle: Oracle = Rc::default();
        for part in history.split_inclusive(|step| matches!(step, Step::Crash { .. })) {
            let mut options = RunOptions::random(rng.next_u64());
            if let Some(Step::Crash { after }) = part.last() {
                options = options.crash_after(*after);
            }
            let ran = world.run(&options, |sim| self.work(sim, Rc::clone(&oracle), part.to_vec()))?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.crash(&mut rng);
            oracle.borrow_mut().crashed();
            let bytes = world.run(&RunOptions::in_order(), async |sim| {
                sim.disk(0)
                    .read_bytes(0, usize::try_from(SECTORS * 512).unwrap())
                    .await
            })?;
            let bytes = bytes.ended.done().ok_or("no crash was asked for")??;
            let ticket = oracle.borrow_mut().read_begins();
            oracle.borrow_mut().check(ticket, 0, &bytes)?;
            oracle.borrow_mut().settle(0, &bytes);
        }
        Ok(())
    }

    fn simpler(&self, _step: &Step) -> Vec<Step> {
        Vec::new()
    }
}

#[test]
fn two_paths_keep_what_the_oracle_demands_of_one_disk() {
    let mut marks = std::collections::BTreeSet::new();
    for (caches, clients) in [(false, 1), (false, 4), (true, 1), (true, 4)] {
        let paths = Paths {
            caches,
            clients,
            remembers: true,
        };
        let options = SwarmOptions {
            seed: 1,
            histories: 300,
        };
        let numbers = swarm(&paths, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
        println!("{numbers}");
        marks.extend(numbers.marks.keys().copied());
    }
    for mark in [
        "multipath: a request repeated on another path",
        "multipath: a success of an old epoch repeated",
        "multipath: an unflushed write repeated",
        "multipath: a path came back",
        "multipath: all paths are down for too long",
    ] {
        assert!(marks.contains(mark), "never reached: {mark}");
    }
}

#[test]
fn paths_with_caches_and_nothing_remembered_are_found_to_lose_writes() {
    let paths = Paths {
        caches: true,
        clients: 1,
        remembers: false,
    };
    let options = SwarmOptions {
        seed: 1,
        histories: 300,
    };
    let shrunk = swarm(&paths, &options).unwrap_err();
    println!("{shrunk}");
    assert!(shrunk.history.len() <= 6, "{shrunk}");
}

#[test]
fn a_path_that_lost_its_cache_and_is_back_at_once_gets_what_was_not_flushed() {
    let ran = world(1).run(&RunOptions::random(1), async |sim| {
        let (device, paths) = two_paths(&sim, true);
        paths[0].cut().await;
        write(&*device, 512, &[2; 512], Durability::Volatile)
            .await
            .unwrap();
        paths[1].cut().await;
        paths[1].restore();
        device.flush().await.unwrap();
        assert_eq!(sim.disk(0).read_bytes(512, 512).await.unwrap(), [2; 512]);
    });
    ran.unwrap();
}
