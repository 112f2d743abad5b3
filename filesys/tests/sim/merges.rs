//! Merges of files whose maps have several pages: these are in work at once, and a crash leaves any of them done.

use block_io::BlockDevice;
use block_io::sim::{ExploreOptions, Failure, Scenario, Shared, Sim, World, explore_parallel, threads};
use filesys::{Access, Snapshot};

use crate::harness::*;
use crate::machine::is_sound;

const PAGE: u64 = 256 << 16;
const CLUSTER: u64 = 64 << 10;
const PAGES: u64 = 3;

/// Where the base, and the layer on it, were written: offset in a page and length.
const BASE: [(u64, usize); 4] = [
    (0, 64 << 10),
    (CLUSTER + 4096, 8192),
    (2 * CLUSTER, 4096),
    (2 * CLUSTER + 49152, 512),
];
const LAYER: [(u64, usize); 5] = [
    // Three runs: read together, put into the base's cluster.
    (8192, 4096),
    (20480, 8192),
    (61440, 4096),
    // The layer's part is the larger one.
    (CLUSTER + 8192, 24576),
    (2 * CLUSTER + 16384, 4096),
];

struct Merge;

fn expected(page: u64) -> Vec<u8> {
    let mut bytes = vec![0; 3 << 16];
    for (number, (at, length)) in BASE.iter().chain(&LAYER).enumerate() {
        let fill = u8::try_from(number).unwrap() + 1;
        let start = usize::try_from(*at).unwrap();
        bytes[start..start + length].copy_from_slice(&pattern(page * PAGE + at, *length, fill));
    }
    bytes
}

/// `done`: the merge was acknowledged.
async fn shall_be(fs: &SimFs, done: bool) -> Result<(), Failure> {
    let found = fs.open_file("/layer", Access::Read).await;
    let file = match found {
        Ok(_) if done => return Err("the layer is still there".into()),
        Ok(file) => file,
        Err(_) => fs.open_file("/base", Access::Read).await.map_err(failed)?,
    };
    for page in 0..PAGES {
        let bytes = read(&file, page * PAGE, 3 << 16).await.map_err(failed)?;
        same(&bytes, &expected(page)).map_err(|failure| failure.context(&format!("page {page}")))?;
    }
    Ok(())
}

impl Scenario for Merge {
    type Model = bool;

    fn world(&self) -> World {
        world(1, 3 << 20)
    }

    async fn prepare(&self, sim: Sim, _: Shared<bool>) -> Result<(), Failure> {
        let fs = format(&sim, 1).await.map_err(failed)?;
        fs.create("/base", &thin(PAGES * PAGE)).await.map_err(failed)?;
        let file = fs.open_file("/base", Access::Write).await.map_err(failed)?;
        let layer = Snapshot {
            path: "/base",
            layer: "/layer",
            handle: Some(&file),
        };
        for (number, (at, length)) in BASE.iter().chain(&LAYER).enumerate() {
            if number == BASE.len() {
                fs.snapshot(std::slice::from_ref(&layer), 1)
                    .await
                    .map_err(failed)?;
            }
            let fill = u8::try_from(number).unwrap() + 1;
            for page in 0..PAGES {
                let at = page * PAGE + at;
                write(&file, at, &pattern(at, *length, fill))
                    .await
                    .map_err(failed)?;
            }
        }
        file.flush().await.map_err(failed)?;
        drop(file);
        shall_be(&fs, false).await?;
        fs.close().await.map_err(failed)
    }

    async fn run(&self, sim: Sim, model: Shared<bool>) -> Result<(), Failure> {
        let fs = open(&sim).await.map_err(failed)?;
        fs.absorb("/layer", true).await.map_err(failed)?;
        *model.borrow_mut() = true;
        shall_be(&fs, true).await?;
        fs.close().await.map_err(failed)
    }

    async fn recover(&self, sim: Sim, model: Shared<bool>) -> Result<(), Failure> {
        let done = *model.borrow();
        let fs = open(&sim).await.map_err(failed)?;
        shall_be(&fs, done).await?;
        is_sound(&fs).await?;
        if fs.stat("/layer").await.is_ok() {
            fs.absorb("/layer", true).await.map_err(failed)?;
            shall_be(&fs, true).await?;
            is_sound(&fs).await?;
        }
        fs.close().await.map_err(failed)
    }
}

#[test]
fn a_crash_leaves_any_of_the_pages_done() {
    let options = ExploreOptions {
        states: 8,
        nesting: 1,
        nested_states: 1,
        nested_one_in: 64,
        schedules: 2,
    };
    let numbers = explore_parallel(&Merge, &options, threads()).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    let missing = numbers.missing(&[
        "filesys: pages of a merge are in work at once",
        "filesys: an absorption goes on",
    ]);
    assert!(missing.is_empty(), "{missing:?} were not reached");
    assert!(numbers.crash_states > 500, "{numbers}");
}

/// Broken off after its first pages, asked for again.
#[test]
fn a_merge_that_is_broken_off_goes_on() {
    run(Merge.world(), async |sim: Sim| {
        Merge.prepare(sim.clone(), Shared::default()).await?;
        let fs = open(&sim).await.map_err(failed)?;
        let mut asked = 0;
        let done = fs.absorb_while("/layer", true, || {
            asked += 1;
            false
        });
        assert!(!done.await.map_err(failed)?);
        assert!((1..=3).contains(&asked), "asked {asked} times");
        shall_be(&fs, false).await?;
        is_sound(&fs).await?;
        fs.absorb("/layer", true).await.map_err(failed)?;
        shall_be(&fs, true).await?;
        fs.close().await.map_err(failed)
    });
}
