//! The swarm level on a bare disk: the disk keeps what the oracle demands, and a disk that ignores flushes is found, with
//! a short history.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{
    DiskOptions, Ended, Failure, Rng, RunOptions, SectorModel, Sim, SimDisk, SwarmOptions, Workload, World,
    swarm,
};
use block_io::{BlockDevice, Clock, Durability, ZeroMode};

const SECTORS: u64 = 16;

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
    Discard {
        sector: u64,
        count: u64,
    },
    Read {
        sector: u64,
        count: u64,
    },
    Flush,
    /// The power is cut after so many events of what follows.
    Crash {
        after: u64,
    },
}

struct BareDisk {
    flushes: bool,
    /// Tasks that share the steps.
    clients: usize,
}

type Oracle = Rc<RefCell<SectorModel>>;

async fn step(disk: &SimDisk, oracle: &Oracle, step: &Step, flushes: bool) -> Result<(), Failure> {
    match *step {
        Step::Write {
            sector,
            count,
            fill,
            fua,
        } => {
            let bytes = vec![fill; usize::try_from(count * 512).unwrap()];
            let durability = if fua {
                Durability::Durable
            } else {
                Durability::Volatile
            };
            let ticket = oracle.borrow_mut().write_begins(sector * 512, &bytes, durability);
            disk.write_bytes(sector * 512, &bytes, durability).await?;
            oracle.borrow_mut().succeeded(ticket);
        }
        Step::Zero { sector, count } => {
            let ticket = oracle.borrow_mut().zeroes_begin(sector * 512, count * 512);
            disk.write_zeroes(sector * 512, count * 512, ZeroMode::MayUnmap)
                .await?;
            oracle.borrow_mut().succeeded(ticket);
        }
        Step::Discard { sector, count } => {
            let ticket = oracle.borrow_mut().discard_begins(sector * 512, count * 512);
            disk.discard(sector * 512, count * 512).await?;
            oracle.borrow_mut().succeeded(ticket);
        }
        Step::Read { sector, count } => {
            let ticket = oracle.borrow_mut().read_begins();
            let bytes = disk
                .read_bytes(sector * 512, usize::try_from(count * 512).unwrap())
                .await?;
            oracle.borrow_mut().check(ticket, sector * 512, &bytes)?;
        }
        Step::Flush => {
            let ticket = oracle.borrow_mut().flush_begins();
            if flushes {
                disk.flush().await?;
            }
            oracle.borrow_mut().flushed(ticket);
        }
        Step::Crash { .. } => {}
    }
    Ok(())
}

impl BareDisk {
    /// All clients at once, each with its share of the steps.
    async fn work(&self, sim: Sim, oracle: Oracle, steps: Vec<Step>) -> Result<(), Failure> {
        let results = Rc::new(RefCell::new(Vec::new()));
        for client in 0..self.clients {
            let share: Vec<Step> = steps.iter().skip(client).step_by(self.clients).cloned().collect();
            let (disk, oracle, results) = (sim.disk(0), Rc::clone(&oracle), Rc::clone(&results));
            let flushes = self.flushes;
            sim.spawn(&format!("client {client}"), async move {
                let mut result = Ok(());
                for next in &share {
                    result = result.and(step(&disk, &oracle, next, flushes).await);
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

impl Workload for BareDisk {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        (0..60)
            .map(|_| {
                let sector = rng.below(SECTORS - 4);
                let count = 1 + rng.below(4);
                match rng.below(16) {
                    0 => Step::Crash { after: rng.below(60) },
                    1 | 2 => Step::Flush,
                    3 => Step::Zero { sector, count },
                    4 => Step::Discard { sector, count },
                    5..9 => Step::Read { sector, count },
                    _ => Step::Write {
                        sector,
                        count,
                        fill: u8::try_from(1 + rng.below(255)).unwrap(),
                        fua: rng.chance(1, 4),
                    },
                }
            })
            .collect()
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let mut world = World::new([DiskOptions::new("disk", SECTORS * 512)]);
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

    fn simpler(&self, step: &Step) -> Vec<Step> {
        match step.clone() {
            Step::Write {
                sector,
                count,
                fill,
                fua,
            } if count > 1 => {
                vec![Step::Write {
                    sector,
                    count: 1,
                    fill,
                    fua,
                }]
            }
            _ => Vec::new(),
        }
    }
}

#[test]
fn the_disk_keeps_what_the_oracle_demands() {
    for clients in [1, 4] {
        let disk = BareDisk {
            flushes: true,
            clients,
        };
        let options = SwarmOptions {
            seed: 1,
            histories: 300,
        };
        let numbers = swarm(&disk, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
        println!("{numbers}");
        assert!(numbers.crash_states > 300 && numbers.events > 10_000, "{numbers}");
    }
}

#[test]
fn a_disk_that_ignores_flushes_is_found_with_a_history_of_a_few_steps() {
    let disk = BareDisk {
        flushes: false,
        clients: 1,
    };
    let options = SwarmOptions {
        seed: 1,
        histories: 300,
    };
    let shrunk = swarm(&disk, &options).unwrap_err();
    println!("{shrunk}");
    assert!(shrunk.history.len() <= 4 && shrunk.original == 60, "{shrunk}");
    assert!(shrunk.history.contains(&Step::Flush), "{shrunk}");
    let again = disk.generate(&mut Rng::new(shrunk.seed));
    assert!(
        disk.run(shrunk.seed, &again).is_err(),
        "the printed seed replays the failure"
    );
}
