//! One of two data volumes cannot be flushed any more. Files on the other one go on as if nothing had happened; whoever wanted data on
//! the failed one to be durable is told that they are not; and no crash shows a file what somebody else had there.

use block_io::sim::{
    ExploreOptions, Failure, Fault, FaultRule, Numbers, Scenario, Shared, Sim, World, explore,
};
use block_io::{Durability, IoCause, IoError, Operation, ZeroMode};
use filesys::{Attributes, Event, FsError, Snapshot, Target, VolumeIndex};

use crate::harness::{SimFs, failed, format, open};
use crate::machine::{Handle, Promise, adds_up, change, is_sound, verify};
use crate::model::{Change, Model};
use crate::scripts::{create, handle};

const KIB: u64 = 1024;
const DATA: u64 = 2 << 20;
const VOLATILE: Durability = Durability::Volatile;

/// What happens to the volume of `/bad` while `/good` is on the other one.
#[derive(Debug)]
struct Story {
    /// Flushes of the volume that succeed before one fails.
    after: u64,
    for_ever: bool,
    /// Who notices first: a flush of the file itself, or the group of the journal that has records of both.
    by_group: bool,
    /// Files with checksums.
    checksums: bool,
}

fn on(volume: u16, checksums: bool) -> Attributes {
    Attributes {
        target: Target::Volume(VolumeIndex(volume)),
        checksums,
        ..Attributes::default()
    }
}

/// It must fail because of the volume, and say so.
fn is_told<T>(what: &str, result: Result<T, IoError>) -> Result<(), Failure> {
    match result {
        Err(error) if matches!(error.cause(), IoCause::EarlierFlushFailed) => Ok(()),
        Err(error) => Err(format!("{what}: {error}: {}", error.cause()).as_str().into()),
        Ok(_) => Err(format!("{what} succeeds on a volume that has failed")
            .as_str()
            .into()),
    }
}

async fn layer(
    fs: &SimFs,
    promise: &Promise,
    below: &str,
    layer: &str,
    on: Option<&Handle>,
) -> Result<(), Failure> {
    let what = Change::Snapshot(vec![(below.into(), layer.into())]);
    let snapshot = Snapshot {
        path: below,
        layer,
        handle: on.map(|handle| &handle.file),
    };
    let done = change(promise, what, fs.snapshot(&[snapshot], 1)).await?;
    if let (Some(_), Some(handle)) = (done, on) {
        let node = promise.borrow().find(layer);
        handle.node.set(node.ok_or("no layer in the model")?);
    }
    Ok(())
}

impl Story {
    /// What the file on the volume that is about to fail does: new clusters, parts of sub-clusters over a parent, zeroes, discards, the same
    /// again.
    async fn work_on(&self, bad: &Handle, promise: &Promise) -> Result<(), IoError> {
        bad.write(promise, 64 * KIB, 8 * KIB, VOLATILE).await?;
        bad.write(promise, 8 * KIB + 512, 512, VOLATILE).await?;
        bad.zero(promise, 4 * KIB, 4 * KIB, ZeroMode::MayUnmap).await?;
        bad.write(promise, 4 * KIB, 4 * KIB, VOLATILE).await?;
        bad.discard(promise, 68 * KIB, 4 * KIB).await?;
        bad.write(promise, 68 * KIB, 4 * KIB, VOLATILE).await?;
        bad.write(promise, 0, 4 * KIB, VOLATILE).await
    }

    async fn go_on(&self, fs: &SimFs, good: &Handle, promise: &Promise, round: u64) -> Result<(), Failure> {
        good.write(promise, (64 + 16 * round) * KIB, 8 * KIB, VOLATILE)
            .await?;
        good.write(promise, 512, 1024, VOLATILE).await?;
        good.flush(promise).await?;
        good.check(promise, 0, 128 * KIB).await?;
        create(fs, promise, &format!("/new{round}"), 64 * KIB, on(1, false)).await
    }
}

impl Scenario for Story {
    type Model = Model;

    fn world(&self) -> World {
        crate::harness::world(2, DATA)
    }

    async fn prepare(&self, sim: Sim, promise: Shared<Model>) -> Result<(), Failure> {
        let fs = format(&sim, 2).await.map_err(failed)?;
        // What others had: data that must not be seen again.
        for volume in 0..2 {
            create(&fs, &promise, "/others", DATA - 256 * KIB, on(volume, false)).await?;
            let others = handle(&fs, &promise, "/others").await?;
            for start in (0..DATA - 256 * KIB).step_by(256 << 10) {
                others.write(&promise, start, 256 * KIB, VOLATILE).await?;
            }
            others.flush(&promise).await?;
            drop(others);
            let what = Change::Delete {
                path: "/others".into(),
            };
            change(&promise, what, fs.delete("/others")).await?;
            fs.settled().await;
            fs.checkpoint().await.map_err(failed)?;
        }
        for (path, volume) in [("/bad", 0), ("/good", 1)] {
            create(&fs, &promise, path, 128 * KIB, on(volume, self.checksums)).await?;
            let file = handle(&fs, &promise, path).await?;
            file.write(&promise, 0, 16 * KIB, VOLATILE).await?;
            file.flush(&promise).await?;
            drop(file);
            layer(&fs, &promise, path, &format!("{path}.1"), None).await?;
        }
        fs.close().await.map_err(failed)
    }

    async fn run(&self, sim: Sim, promise: Shared<Model>) -> Result<(), Failure> {
        let fs = open(&sim).await.map_err(failed)?;
        let bad = handle(&fs, &promise, "/bad.1").await?;
        let good = handle(&fs, &promise, "/good.1").await?;
        let rule = match self.for_ever {
            true => FaultRule::always(Fault::Error, Operation::Flush),
            false => FaultRule::once(Fault::Error, Operation::Flush),
        };
        sim.inject(1, rule.after(self.after));
        for _ in 0..self.after {
            bad.write(&promise, 96 * KIB, 4 * KIB, VOLATILE).await?;
            bad.flush(&promise).await?;
        }
        self.work_on(&bad, &promise).await?;
        if self.by_group {
            // One group of the journal has records of both.
            self.go_on(&fs, &good, &promise, 0).await?;
        } else if bad.flush(&promise).await.is_ok() {
            return Err("a flush succeeds that must fail".into());
        }
        let events = fs.take_events();
        if !events
            .iter()
            .any(|event| matches!(event, Event::VolumeFailed { .. }))
        {
            return Err(format!("nobody is told: {events:?}").as_str().into());
        }
        is_told("a flush", bad.flush(&promise).await)?;
        is_told("a write", bad.write(&promise, 80 * KIB, 4 * KIB, VOLATILE).await)?;
        is_told(
            "an overwrite",
            bad.write(&promise, 0, 4 * KIB, Durability::Durable).await,
        )?;
        match fs.sync().await {
            Err(FsError::Io(_)) => {}
            other => return Err(format!("sync: {other:?}").as_str().into()),
        }
        self.go_on(&fs, &good, &promise, 1).await?;
        layer(&fs, &promise, "/good.1", "/good.2", Some(&good)).await?;
        self.go_on(&fs, &good, &promise, 2).await?;
        fs.checkpoint().await.map_err(failed)?;
        // Names have nothing to do with the volume.
        let what = Change::Rename {
            from: "/bad".into(),
            to: "/worse".into(),
        };
        change(&promise, what, fs.rename("/bad", "/worse")).await?;
        self.go_on(&fs, &good, &promise, 3).await?;
        is_sound(&fs).await?;
        drop((bad, good));
        fs.close().await.map_err(failed)
    }

    async fn recover(&self, sim: Sim, promise: Shared<Model>) -> Result<(), Failure> {
        let fs = open(&sim).await.map_err(failed)?;
        let seen = verify(&fs, &promise, u64::MAX).await?;
        fs.settled().await;
        adds_up(&fs, &promise, Some(&seen)).await?;
        is_sound(&fs).await
    }

    fn fingerprint(&self, model: &Model) -> Option<u64> {
        Some(model.fingerprint())
    }
}

#[test]
fn files_on_other_volumes_go_on_and_nothing_strange_is_seen() {
    let options = ExploreOptions {
        states: 24,
        nesting: 1,
        nested_states: 4,
        nested_one_in: 64,
        schedules: 1,
    };
    let mut total = Numbers::default();
    for index in 0..16_u64 {
        let story = Story {
            after: index & 1,
            for_ever: index & 2 != 0,
            by_group: index & 4 != 0,
            checksums: index & 8 != 0,
        };
        match explore(&story, &options) {
            Ok(numbers) => total.add(&numbers),
            Err(failure) => panic!("{story:?}: {failure}"),
        }
    }
    println!("{total}");
    let missing = total.missing(&[
        "filesys: a volume failed",
        "filesys: writes to a volume that failed are taken back",
        "filesys: checksums of a volume that failed are not trusted",
        "journal: groups were rewritten",
    ]);
    assert!(missing.is_empty(), "{missing:?} were not reached");
}
