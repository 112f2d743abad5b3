//! The exhaustive level for what changes a pool: every operation is crashed at every event, the pool is opened again, which is
//! crashed in turn at a share of its events, the work goes on by itself, and at the end everything is as it was asked for, with the guest's data in it.

use block_io::sim::{ExploreOptions, Failure, Scenario, Shared, Sim, World};
use block_io::{BlockDevice, Durability};
use volume_manager::Event;
use volume_manager::model::{DeviceId, JobId, JobKind, JobState, Layout};

use crate::harness::{
    self, Promise, SimPool, attributes, create, depth, failed, flush, new_device, new_volume, open, settle,
    verify, write,
};

/// What is being done when the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Create,
    Delete,
    Grow,
    Shrink,
    AddDevice,
    RemoveDevice,
    Evacuate,
    /// Another device is put in the place of one, which leaves.
    Replace,
    /// The same for one that has failed.
    ReplaceFailed,
    /// A device is replaced, and somebody thinks better of it.
    Cancel,
    Relayout(Layout),
    /// A device fails, and nothing else happens.
    Fail,
    /// A device fails, comes back, and catches up.
    Return,
    Scrub,
}

struct Case {
    layout: Layout,
    act: Act,
}

const SIZE: u64 = 12 * harness::UNIT;
/// The disk of the device that is replaced; the volume lies on it, as on the first of all.
const VICTIM: usize = 0;

impl Case {
    fn disks(&self) -> usize {
        let needed = |layout: Layout| layout.columns() * layout.legs();
        let most = match self.act {
            Act::Relayout(to) => needed(self.layout).max(needed(to)),
            _ => needed(self.layout),
        };
        usize::try_from(most).unwrap().max(3) + 1
    }
}

async fn writes(pool: &SimPool, model: &Shared<Promise>, fill: u8) -> Result<(), Failure> {
    let volume = pool.volume("v").map_err(failed)?;
    write(&volume, model, 512, fill, 1024, Durability::Volatile).await?;
    flush(&volume, model).await?;
    write(&volume, model, 8192, fill + 1, 4096, Durability::Volatile).await
}

/// The disk that is no device of the pool at the beginning takes the place of another.
async fn replace(sim: &Sim, pool: &SimPool, old: DeviceId, new: usize) -> Result<JobId, Failure> {
    pool.replace_device(old, new_device(sim, new), 0)
        .await
        .map_err(failed)
}

/// A replacement that a crash has cut is either under way, or has left nothing and can be asked for again.
async fn see_that_it_is_replaced(
    sim: &Sim,
    pool: &SimPool,
    old: DeviceId,
    new: usize,
) -> Result<(), Failure> {
    let there = |pool: &SimPool, wanted: DeviceId| pool.configuration().device(wanted).is_some();
    let came = DeviceId(u32::try_from(new).unwrap());
    if !there(pool, came) {
        if !there(pool, old) {
            return Err("the old device has left, and the new one is not there".into());
        }
        let job = replace(sim, pool, old, new).await?;
        pool.wait(job).await.map_err(failed)?;
    }
    match there(pool, came) && !there(pool, old) {
        true => Ok(()),
        false => Err(format!(
            "not replaced: {:?}, {:?}",
            pool.configuration().devices,
            pool.jobs()
        )
        .as_str()
        .into()),
    }
}

fn see_that_no_copy_is_too_many(pool: &SimPool) -> Result<(), Failure> {
    for volume in &pool.configuration().volumes {
        let legs = volume.attributes.layout.legs() as usize;
        let mut columns = volume.sections.iter().flat_map(|section| &section.columns);
        if columns.any(|column| column.members.len() != legs) {
            return Err(format!("there are not {legs} copies of everything: {volume:?}")
                .as_str()
                .into());
        }
    }
    Ok(())
}

impl Scenario for Case {
    type Model = Promise;

    fn fingerprint(&self, model: &Promise) -> Option<u64> {
        Some(model.fingerprint())
    }

    fn world(&self) -> World {
        harness::short_world(self.disks() as u64)
    }

    async fn prepare(&self, sim: Sim, model: Shared<Promise>) -> Result<(), Failure> {
        let pool = create(&sim, &model, self.disks() - 1).await?;
        if self.act == Act::Create {
            return pool.close().await.map_err(failed);
        }
        let volume = pool
            .create_volume(new_volume(self.layout, SIZE))
            .await
            .map_err(failed)?;
        write(
            &volume,
            &model,
            0,
            1,
            usize::try_from(SIZE).unwrap(),
            Durability::Volatile,
        )
        .await?;
        flush(&volume, &model).await?;
        drop(volume);
        pool.close().await.map_err(failed)
    }

    async fn run(&self, sim: Sim, model: Shared<Promise>) -> Result<(), Failure> {
        let pool = open(&sim, &model, |disk| disk + 1 < self.disks())
            .await
            .map_err(failed)?;
        let victim = || pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0].device;
        match self.act {
            Act::Create => drop(
                pool.create_volume(new_volume(self.layout, SIZE))
                    .await
                    .map_err(failed)?,
            ),
            Act::Delete => pool.delete_volume("v").await.map_err(failed)?,
            Act::Grow => pool.resize("v", SIZE + 4096, SIZE).await.map_err(failed)?,
            Act::Shrink => {
                // What is behind the new end is given up.
                pool.resize("v", SIZE - 4096, 0).await.map_err(failed)?;
            }
            Act::AddDevice => {
                pool.add_device(new_device(&sim, self.disks() - 1))
                    .await
                    .map_err(failed)?;
            }
            Act::RemoveDevice => {
                let used: Vec<DeviceId> = pool
                    .configuration()
                    .extents()
                    .map(|extent| extent.device)
                    .collect();
                let config = pool.configuration();
                let free = config
                    .devices
                    .iter()
                    .map(|device| device.id)
                    .find(|id| !used.contains(id));
                if let Some(id) = free {
                    pool.remove_device(id).await.map_err(failed)?;
                }
            }
            Act::Evacuate => {
                let kind = JobKind::Evacuate {
                    device: victim(),
                    to: None,
                    remove: false,
                };
                pool.add_device(new_device(&sim, self.disks() - 1))
                    .await
                    .map_err(failed)?;
                let job = pool.start(kind, 0).await.map_err(failed)?;
                writes(&pool, &model, 2).await?;
                pool.wait(job).await.map_err(failed)?;
            }
            Act::Replace | Act::ReplaceFailed => {
                if self.act == Act::ReplaceFailed {
                    sim.detach(VICTIM);
                    writes(&pool, &model, 4).await?;
                }
                let job = replace(&sim, &pool, DeviceId(0), self.disks() - 1).await?;
                writes(&pool, &model, 2).await?;
                pool.wait(job).await.map_err(failed)?;
            }
            Act::Cancel => {
                let job = replace(&sim, &pool, DeviceId(0), self.disks() - 1).await?;
                writes(&pool, &model, 2).await?;
                // It may have ended by itself, or ends now.
                drop(pool.steer(job, JobState::Cancelled).await);
                drop(pool.wait(job).await);
                writes(&pool, &model, 4).await?;
            }
            Act::Relayout(to) => {
                let volume = pool.configuration().volumes[0].id;
                let kind = JobKind::Relayout {
                    volume,
                    target: attributes(to),
                };
                let job = pool.start(kind, 0).await.map_err(failed)?;
                writes(&pool, &model, 2).await?;
                pool.wait(job).await.map_err(failed)?;
            }
            Act::Fail | Act::Return => {
                let disk = usize::try_from(victim().0).unwrap();
                writes(&pool, &model, 2).await?;
                sim.detach(disk);
                writes(&pool, &model, 4).await?;
                if self.act == Act::Return {
                    sim.attach(disk);
                    let id = DeviceId(u32::try_from(disk).unwrap());
                    let io = std::rc::Rc::new(sim.disk(disk));
                    pool.readmit(id, "again", io).await.map_err(failed)?;
                    writes(&pool, &model, 6).await?;
                    settle(&pool).await?;
                }
            }
            Act::Scrub => {
                let job = pool
                    .start(JobKind::Scrub { volume: None }, 0)
                    .await
                    .map_err(failed)?;
                writes(&pool, &model, 2).await?;
                pool.wait(job).await.map_err(failed)?;
            }
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, model: Shared<Promise>) -> Result<(), Failure> {
        model.borrow_mut().sectors.crashed();
        for disk in 0..self.disks() {
            sim.attach(disk);
        }
        // One that is broken does not come back.
        let there = |disk: usize| self.act != Act::ReplaceFailed || disk != VICTIM;
        let pool = open(&sim, &model, there).await.map_err(failed)?;
        settle(&pool).await?;
        if matches!(self.act, Act::Replace | Act::ReplaceFailed) {
            see_that_it_is_replaced(&sim, &pool, DeviceId(0), self.disks() - 1).await?;
        }
        volume_manager::place::verify(&pool.configuration()).map_err(|wrong| {
            Failure::from(format!("{}: {:?}", wrong.join("; "), pool.configuration()).as_str())
        })?;
        if self.act == Act::Cancel {
            see_that_no_copy_is_too_many(&pool)?;
        }
        match pool.volume("v") {
            Ok(volume) if self.act == Act::Create => {
                let bytes = harness::read_bytes(&volume, 0, usize::try_from(SIZE).unwrap())
                    .await
                    .map_err(failed)?;
                if bytes.iter().any(|byte| *byte != 0) {
                    return Err("a new volume is not zero".into());
                }
            }
            Ok(volume) if self.act == Act::Shrink && volume.size() < SIZE => {
                let bytes = harness::read_bytes(&volume, 0, usize::try_from(volume.size()).unwrap())
                    .await
                    .map_err(failed)?;
                let ticket = model.borrow_mut().sectors.read_begins();
                model.borrow_mut().sectors.check(ticket, 0, &bytes)?;
            }
            Ok(volume) => verify(&volume, &model).await?,
            Err(_) if matches!(self.act, Act::Create | Act::Delete) => {}
            Err(error) => return Err(failed(error)),
        }
        if let (Act::Relayout(to), Some(volume)) = (self.act, pool.configuration().volumes.first())
            && volume.attributes.layout == to
            && volume
                .sections
                .iter()
                .any(|section| section.columns.len() != to.columns() as usize)
        {
            return Err(
                format!("the change of layout did not end: {volume:?}, {:?}", pool.jobs())
                    .as_str()
                    .into(),
            );
        }
        pool.take_events();
        let scrub = pool
            .start(JobKind::Scrub { volume: None }, 0)
            .await
            .map_err(failed)?;
        pool.wait(scrub).await.map_err(failed)?;
        let bad: Vec<Event> = pool
            .take_events()
            .into_iter()
            .filter(|event| matches!(event, Event::Repaired { .. }))
            .collect();
        if !bad.is_empty() {
            return Err(format!("copies or parity differ after recovery: {bad:?}")
                .as_str()
                .into());
        }
        pool.close().await.map_err(failed)
    }
}

const ALL: [Layout; 6] = [
    Layout::Concat,
    Layout::Stripe { columns: 2 },
    Layout::Mirror { legs: 2 },
    Layout::StripeMirror { columns: 2, legs: 2 },
    Layout::Raid5 { columns: 3 },
    Layout::Raid6 { columns: 4 },
];

/// Explores every layout × act.
fn run(layouts: &[Layout], acts: &[Act], states: u64, marks: &[&str]) {
    run_at(&depth(16, 2, 3), layouts, acts, states, marks);
}

/// As [`run`], so deep.
fn run_at(depth: &ExploreOptions, layouts: &[Layout], acts: &[Act], states: u64, marks: &[&str]) {
    let cases = layouts.iter().flat_map(|layout| {
        acts.iter().map(|act| {
            let (layout, act) = (*layout, *act);
            (format!("{layout}, {act:?}"), Case { layout, act })
        })
    });
    harness::explore_all(cases, depth, states, marks);
}

#[test]
fn volumes_and_devices_come_go_and_change_their_size() {
    let acts = [
        Act::Create,
        Act::Delete,
        Act::Grow,
        Act::Shrink,
        Act::AddDevice,
        Act::RemoveDevice,
    ];
    run(&ALL, &acts, 40_000, &[]);
}

#[test]
fn data_are_moved_off_a_device() {
    run(&ALL, &[Act::Evacuate], 93_000, &[]);
}

#[test]
fn a_device_is_replaced() {
    run_at(&depth(8, 1, 3), &ALL, &[Act::Replace], 15_000, &[]);
}

#[test]
fn a_device_that_failed_is_replaced() {
    let layouts: Vec<Layout> = ALL.into_iter().filter(|layout| layout.tolerates() > 0).collect();
    run_at(&depth(8, 1, 3), &layouts, &[Act::ReplaceFailed], 15_000, &[]);
}

#[test]
fn a_replacement_is_cancelled() {
    let marks = ["work: what a cancelled move had begun goes"];
    run_at(&depth(8, 1, 3), &ALL, &[Act::Cancel], 15_000, &marks);
}

#[test]
fn a_layout_changes() {
    let mirror = |legs| Layout::Mirror { legs };
    let others = [
        (mirror(2), mirror(3)),
        (mirror(3), mirror(2)),
        (Layout::Concat, mirror(2)),
    ];
    let pairs =
        (0..ALL.len()).flat_map(|from| [1, 3].map(|step| (ALL[from], ALL[(from + step) % ALL.len()])));
    let cases = pairs.chain(others).map(|(layout, to)| {
        let act = Act::Relayout(to);
        (format!("{layout}, {act:?}"), Case { layout, act })
    });
    harness::explore_all(cases, &depth(16, 2, 3), 162_000, &[]);
}

#[test]
fn a_device_fails_and_comes_back() {
    let layouts: Vec<Layout> = ALL.into_iter().filter(|layout| layout.tolerates() > 0).collect();
    run_at(
        &depth(20, 2, 3),
        &layouts,
        &[Act::Fail, Act::Return],
        157_000,
        &["pool: a parity log is replayed"],
    );
}

#[test]
fn a_scrub_goes_on() {
    run(&ALL, &[Act::Scrub], 35_000, &[]);
}
