//! The check beside writers, and the repair across crashes.

use block_io::BlockDevice;
use block_io::sim::{ExploreOptions, Failure, Scenario, Shared, Sim, World, explore};
use filesys::{Access, FileId, Harm, VolumeIndex};

use crate::check::*;
use crate::harness::*;

#[test]
fn a_file_system_is_checked_while_it_is_used() {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        fs.create("/busy", &thin(20 << 20)).await.map_err(failed)?;
        let done = std::rc::Rc::new(std::cell::Cell::new(false));
        let (other, end) = (fs.clone(), std::rc::Rc::clone(&done));
        sim.spawn("writer", async move {
            let file = other.open_file("/busy", Access::Write).await.unwrap();
            for round in 0..400_u64 {
                let at = round.wrapping_mul(0x9e37_79b9) % 300 * 65536;
                if round % 3 == 2 {
                    file.discard(at, 65536).await.unwrap();
                } else {
                    write(&file, at, &pattern(at, 8192, 1)).await.unwrap();
                }
                let path = format!("/vm/old/n{}", round % 16);
                if round % 32 < 16 {
                    other.create(&path, &thin(1 << 20)).await.unwrap();
                } else {
                    other.delete(&path).await.unwrap();
                }
                if round % 7 == 0 {
                    other.checkpoint().await.unwrap();
                }
            }
            drop(file);
            end.set(true);
        });
        let mut checks = 0;
        while !done.get() {
            clean(&check(&fs).await?)?;
            checks += 1;
        }
        assert!(checks > 3, "{checks}");
        fs.close().await.map_err(failed)
    });
}

/// A repair that is crashed anywhere, and repeated.
struct Repair;

impl Scenario for Repair {
    type Model = Vec<u8>;

    fn world(&self) -> World {
        big()
    }

    async fn prepare(&self, sim: Sim, content: Shared<Vec<u8>>) -> Result<(), Failure> {
        let fs = everything(&sim).await?;
        let ids = Ids::of(&fs).await?;
        let file = fs.open_file("/vm/a3", Access::Read).await.map_err(failed)?;
        content.replace(read(&file, 0, 2 << 20).await.map_err(failed)?);
        drop(file);
        let harms = [
            Harm::Allocated(ids.a, 7),
            Harm::Bit(VolumeIndex(1), 200, true),
            Harm::Bit(VolumeIndex(0), 0, false),
            Harm::Leak(400),
            Harm::Orphan(FileId(9999), true),
            Harm::Name(ids.vm, "ghost".into(), FileId(9999), false, true),
            Harm::Name(ids.old, "again".into(), ids.thick, false, true),
            Harm::Name(ROOT, "sums".into(), ids.sums, false, false),
            Harm::Children(ids.a1, Some(ids.c1), 9),
            Harm::Frozen(ids.a1, false),
            Harm::Object(9000),
            Harm::Pin(5000, FileId(9999)),
        ];
        for harm in &harms {
            fs.harm(harm).await.map_err(failed)?;
        }
        fs.close().await.map_err(failed)
    }

    async fn run(&self, sim: Sim, _content: Shared<Vec<u8>>) -> Result<(), Failure> {
        let fs = open(&sim).await.map_err(failed)?;
        let report = repair(&fs).await?;
        if report.findings.len() < 12 || !report.left.is_empty() {
            return Err(format!("{report:#?}").as_str().into());
        }
        fs.close().await.map_err(failed)
    }

    async fn recover(&self, sim: Sim, content: Shared<Vec<u8>>) -> Result<(), Failure> {
        let fs = open(&sim).await.map_err(failed)?;
        let report = repair(&fs).await?;
        if report.findings.iter().any(|finding| !finding.repairable) || !report.left.is_empty() {
            return Err(format!("{report:#?}").as_str().into());
        }
        clean(&check(&fs).await?)?;
        let file = fs.open_file("/vm/a3", Access::Read).await.map_err(failed)?;
        same(&read(&file, 0, 2 << 20).await.map_err(failed)?, &content.borrow())?;
        drop(file);
        fs.close().await.map_err(failed)
    }
}

#[test]
fn a_repair_that_is_crashed_can_be_repeated() {
    let options = ExploreOptions {
        states: 8,
        nesting: 0,
        nested_states: 1,
        schedules: 1,
        ..ExploreOptions::default()
    };
    let numbers = explore(&Repair, &options).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(numbers.crash_states > 100, "{numbers}");
}
