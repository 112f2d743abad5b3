//! A guest writes, flushes, discards, several requests at a time, while its disk is managed: snapshots, commits, merges, deletions of
//! snapshots. What it reads is what it wrote, and snapshots are what the disk was at one moment.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::sim::{Ended, Failure, RunOptions, Sim};
use block_io::{BlockDevice, Clock, Durability};
use storage_virtualizer::disk::{DiskMode, Disks, NewSnapshot};

use crate::help::*;

const D: &str = "/guest.dsk";
const CLUSTERS: u64 = 6;
const WRITERS: u64 = 4;

/// For each 4 KiB: what was acknowledged, and what may have been written since.
#[derive(Default)]
struct Known {
    acknowledged: BTreeMap<u64, u64>,
    /// Begun, and not ended.
    begun: BTreeMap<u64, u64>,
}

impl Known {
    /// What a moment that began earlier and ended now may show.
    fn fits(&self, before: &BTreeMap<u64, u64>, offset: u64, found: u64) -> bool {
        let old = before.get(&offset).copied().unwrap_or(0);
        let new = self.acknowledged.get(&offset).copied().unwrap_or(0);
        // Stamps of one place ascend.
        (old..=new.max(self.begun.get(&offset).copied().unwrap_or(0))).contains(&found)
    }
}

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.into(),
        description: String::new(),
        now: 3,
    }
}

async fn guest(
    sim: Sim,
    disk: Rc<SimVirtualDisk>,
    known: Rc<RefCell<Known>>,
    writer: u64,
    stop: Rc<Cell<bool>>,
) -> Result<u64, Failure> {
    let mut stamp = 0;
    let mut done = 0;
    while !stop.get() {
        let (cluster, sub) = sim.random(|rng| (rng.below(CLUSTERS), rng.below(4)));
        // Each writer has places of its own.
        let offset = cluster * CLUSTER + (writer * 4 + sub) * 4096;
        stamp += 1;
        known.borrow_mut().begun.insert(offset, stamp);
        put(&*disk, offset, stamp, Durability::Volatile).await?;
        known.borrow_mut().acknowledged.insert(offset, stamp);
        known.borrow_mut().begun.remove(&offset);
        if sim.random(|rng| rng.chance(1, 8)) {
            disk.flush().await?;
        }
        same(&get(&*disk, offset).await?, &stamp)?;
        done += 1;
        sim.clock().sleep(std::time::Duration::from_micros(20)).await;
    }
    Ok(done)
}

/// A snapshot is the disk at one moment between `before` and now.
async fn check_snapshot(disks: &SimDisks, name: &str, expected: &BTreeMap<u64, u64>) -> Result<(), Failure> {
    let disk = disks
        .open(&format!("{D}@{name}"), reading())
        .await
        .map_err(failed)?;
    for (offset, stamp) in expected {
        same(&get(&disk, *offset).await?, stamp)?;
    }
    Ok(())
}

/// Results of those who work beside the story.
type Results = Rc<RefCell<Vec<Result<u64, Failure>>>>;

/// In half of the orders, somebody merges and somebody looks all the time, while everything else is done. How many they are.
fn spawn_managers(sim: &Sim, disks: &SimDisks, stop: &Rc<Cell<bool>>, ended: &Results) -> usize {
    let managers = sim.random(|rng| rng.index(2)) * 2;
    for manager in 0..managers {
        let (sim_of_manager, disks) = (sim.clone(), disks.clone());
        let (stop, ended) = (Rc::clone(stop), Rc::clone(ended));
        sim.spawn(&format!("manager {manager}"), async move {
            let mut done = 0;
            let result = loop {
                let result = match manager {
                    0 => disks.merge(D, 3).await.map(drop),
                    _ => disks.status(D).await.map(drop),
                };
                if let Err(error) = result {
                    break Err(failed(error));
                }
                done += 1;
                if stop.get() {
                    break Ok(done);
                }
                let pause = std::time::Duration::from_micros(300);
                sim_of_manager.clock().sleep(pause).await;
            };
            ended.borrow_mut().push(result);
        });
    }
    managers
}

async fn story(sim: Sim) -> Result<(), Failure> {
    let fs = format(&sim).await?;
    let disks = Disks::new(fs.clone());
    create(&disks, D, CLUSTERS * CLUSTER).await?;
    let mode = match sim.random(|rng| rng.below(2)) {
        0 => DiskMode::Persistent,
        _ => DiskMode::Append,
    };
    let disk = attach(&disks, D, mode).await?;
    let (known, stop) = (Rc::new(RefCell::new(Known::default())), Rc::new(Cell::new(false)));
    let ended = Results::default();
    for writer in 0..WRITERS {
        let (disk, known, stop, ended) = (
            Rc::clone(&disk),
            Rc::clone(&known),
            Rc::clone(&stop),
            Rc::clone(&ended),
        );
        let sim_of_guest = sim.clone();
        sim.spawn(&format!("guest {writer}"), async move {
            let result = guest(sim_of_guest, disk, known, writer, stop).await;
            ended.borrow_mut().push(result);
        });
    }
    let managers = spawn_managers(&sim, &disks, &stop, &ended);
    let mut kept: BTreeMap<String, BTreeMap<u64, u64>> = BTreeMap::new();
    for step in 0..24 {
        sim.clock().sleep(std::time::Duration::from_micros(200)).await;
        match sim.random(|rng| rng.below(5)) {
            0 | 1 if kept.len() < 4 => {
                let name = format!("s{step}");
                let before = known.borrow().acknowledged.clone();
                disks.snapshot(&[D], &named(&name)).await.map_err(failed)?;
                // What it has is fixed now, and fits what was known.
                let reader = disks
                    .open(&format!("{D}@{name}"), reading())
                    .await
                    .map_err(failed)?;
                let mut content = BTreeMap::new();
                for place in 0..CLUSTERS * 16 {
                    let found = get(&reader, place * 4096).await?;
                    if !known.borrow().fits(&before, place * 4096, found) {
                        return Err(format!("snapshot {name} has {found} at {place}").into());
                    }
                    content.insert(place * 4096, found);
                }
                kept.insert(name, content);
            }
            2 => {
                let chosen = kept
                    .keys()
                    .nth(sim.random(|rng| rng.index(kept.len().max(1))))
                    .cloned();
                if let Some(name) = chosen {
                    kept.remove(&name);
                    disks.delete_snapshot(D, &name, 3).await.map_err(failed)?;
                }
            }
            3 => {
                disks.merge(D, 3).await.map_err(failed)?;
            }
            _ if mode == DiskMode::Append => disks.commit(D, 3).await.map_err(failed)?,
            _ => {}
        }
        for (name, content) in &kept {
            check_snapshot(&disks, name, content).await?;
        }
    }
    stop.set(true);
    while ended.borrow().len() < WRITERS as usize + managers {
        sim.clock().sleep(std::time::Duration::from_millis(1)).await;
    }
    for result in ended.take() {
        if result? == 0 {
            return Err("a guest did nothing".into());
        }
    }
    disks.close(disk, 3).await.map_err(failed)?;
    if mode == DiskMode::Append {
        disks.commit(D, 3).await.map_err(failed)?;
    }
    for name in kept.keys() {
        disks.delete_snapshot(D, name, 3).await.map_err(failed)?;
    }
    fs.settled().await;
    same(&disks.merge(D, 3).await.map_err(failed)?, &true)?;
    let reader = disks.open(D, reading()).await.map_err(failed)?;
    let expected = known.borrow().acknowledged.clone();
    for (offset, stamp) in &expected {
        same(&get(&reader, *offset).await?, stamp)?;
    }
    same(
        &names(&fs).await?,
        &vec!["guest.disk".to_owned(), "guest.dsk".to_owned()],
    )?;
    is_sound(&fs).await
}

#[test]
fn a_guest_notices_nothing_of_what_is_done_with_its_disk() {
    for seed in 0..24 {
        let mut world = world(8 << 20);
        let ran = world
            .run(&RunOptions::random(seed), story)
            .unwrap_or_else(|failure| panic!("seed {seed}: {failure}"));
        match ran.ended {
            Ended::Done(result) => result.unwrap_or_else(|failure| panic!("seed {seed}: {failure}")),
            Ended::Crashed => panic!("crashed"),
        }
    }
}
