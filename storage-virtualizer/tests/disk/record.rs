//! A record that is replaced again and again, crashed at every event: it says what was last acknowledged, or what was being written.

use block_io::sim::{
    ExploreOptions, Failure, Scenario, Shared, Sim, World, explore_parallel, fingerprint, threads,
};
use storage_virtualizer::disk::Record;

use crate::help::*;

const PATH: &str = "/.record";
const MAGIC: [u8; 8] = *b"SMSVTEST";

/// What it may say.
#[derive(Debug, Clone, Default)]
struct Promise {
    allowed: Vec<Option<Vec<u8>>>,
}

/// It is written so many times; of several sizes, so that what is torn was not there before.
#[derive(Debug, Clone)]
struct Script(u8);

fn content(number: u8) -> Vec<u8> {
    vec![number; 9000 * usize::from(number % 3 + 1)]
}

impl Scenario for Script {
    type Model = Promise;

    fn world(&self) -> World {
        world(6 << 20)
    }

    async fn prepare(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        promise.borrow_mut().allowed = vec![None];
        format(&sim).await?.close().await.map_err(failed)
    }

    async fn run(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let fs = open(&sim).await?;
        let (record, mut now) = Record::open(fs, PATH, MAGIC).await.map_err(failed)?;
        for number in 1..=self.0 {
            let next = Some(content(number));
            promise.borrow_mut().allowed = vec![now, next.clone()];
            record.replace(|| next.clone(), 3).await.map_err(failed)?;
            promise.borrow_mut().allowed = vec![next.clone()];
            now = next;
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let fs = open(&sim).await?;
        let (record, found) = Record::open(fs.clone(), PATH, MAGIC).await.map_err(failed)?;
        let allowed = promise.borrow().allowed.clone();
        if !allowed.contains(&found) {
            let lengths = |known: &Option<Vec<u8>>| known.as_ref().map(Vec::len);
            return Err(format!("{:?} bytes are none of {allowed:?}", lengths(&found)).into());
        }
        // It goes on, also after another crash.
        let next = Some(vec![99; 700]);
        promise.borrow_mut().allowed.push(next.clone());
        record.replace(|| next.clone(), 3).await.map_err(failed)?;
        promise.borrow_mut().allowed = vec![next.clone()];
        let (_, again) = Record::open(fs.clone(), PATH, MAGIC).await.map_err(failed)?;
        same(&again, &next)?;
        is_sound(&fs).await
    }

    fn fingerprint(&self, promise: &Promise) -> Option<u64> {
        Some(fingerprint(&promise.allowed))
    }
}

#[test]
fn a_record_is_whole_after_every_crash() {
    let options = ExploreOptions {
        states: 4,
        nesting: 1,
        nested_states: 2,
        nested_one_in: 4,
        ..ExploreOptions::default()
    };
    let numbers =
        explore_parallel(&Script(5), &options, threads()).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(
        numbers.missing(&["record: a slot was not written whole"]),
        Vec::<&str>::new()
    );
    assert!(numbers.crash_states > 40, "{numbers}");
}
