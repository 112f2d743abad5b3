//! Chains against the simplest model there is: every file is a copy of all its bytes. Layers, clones, absorptions and middle deletions
//! must not be visible in any of them, whatever their order, before and after the file system is opened again.

use block_io::sim::{Failure, Rng, Sim};
use block_io::{BlockDevice, ZeroMode};
use filesys::{Access, Attributes, FsError, NewFile, RangeKind, Snapshot};
use proptest::prelude::*;

use crate::harness::{SimFs, failed, format, open, read, same, try_world, world, write};

const SECTOR: u64 = 512;
const SUB: u64 = 4096;
/// Files that there may be: what they have fits on the volume.
const MOST: usize = 12;

/// What is done; numbers choose among the files that have names.
#[derive(Debug, Clone)]
enum Step {
    Write {
        file: usize,
        sector: u64,
        count: u64,
    },
    Discard {
        file: usize,
        sub: u64,
        count: u64,
    },
    Zero {
        file: usize,
        sector: u64,
        count: u64,
        keep: bool,
    },
    Snapshot {
        file: usize,
    },
    Clone {
        file: usize,
    },
    Absorb {
        file: usize,
        named: bool,
    },
    Delete {
        file: usize,
    },
    Resize {
        file: usize,
        subs: u64,
    },
    Flush {
        file: usize,
    },
    Reopen {
        orderly: bool,
    },
    Checkpoint,
}

#[derive(Debug, Clone)]
struct File {
    /// None if it was deleted and others need it.
    name: Option<String>,
    content: Vec<u8>,
    frozen: bool,
    parent: Option<usize>,
}

/// By number; numbers are never used again.
#[derive(Debug, Default)]
struct Files {
    all: std::collections::BTreeMap<usize, File>,
    next: usize,
}

impl Files {
    fn add(&mut self, content: Vec<u8>, parent: Option<usize>) -> String {
        let name = format!("/f{}", self.next);
        let file = File {
            name: Some(name.clone()),
            content,
            frozen: false,
            parent,
        };
        self.all.insert(self.next, file);
        self.next += 1;
        name
    }

    /// A file that has a name.
    fn pick(&self, index: usize) -> Option<(usize, &File, String)> {
        let named: Vec<_> = self.all.iter().filter(|(_, file)| file.name.is_some()).collect();
        let (number, file) = *named.get(index.checked_rem(named.len())?)?;
        Some((*number, file, file.name.clone()?))
    }

    fn children(&self, number: usize) -> Vec<usize> {
        let of = |file: &File| file.parent == Some(number);
        let children = self.all.iter().filter(|(_, file)| of(file));
        children.map(|(number, _)| *number).collect()
    }

    /// Files without names go when nobody needs them, and into the child that is left.
    fn settle(&mut self) {
        loop {
            let nameless = self.all.iter().filter(|(_, file)| file.name.is_none());
            let next = nameless
                .map(|(number, file)| (*number, file.parent, self.children(*number)))
                .find(|(_, _, children)| children.len() < 2);
            let Some((number, parent, children)) = next else {
                return;
            };
            self.all.remove(&number);
            for child in children {
                if let Some(child) = self.all.get_mut(&child) {
                    child.parent = parent;
                }
            }
        }
    }

    fn named_ancestor(&self, number: usize) -> Option<&File> {
        let mut at = self.all.get(&number)?.parent;
        while let Some(file) = self.all.get(&at?) {
            if file.name.is_some() {
                return Some(file);
            }
            at = file.parent;
        }
        None
    }
}

/// Bytes that tell which write they are of.
fn stamped(stamp: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    Rng::new(stamp).fill(&mut bytes);
    bytes
}

fn part(content: &mut [u8], offset: u64, length: u64) -> &mut [u8] {
    let at = usize::try_from(offset).unwrap();
    &mut content[at..at + usize::try_from(length).unwrap()]
}

/// The operation was refused because a file is frozen, exactly if it is.
fn refused_if<T>(frozen: bool, result: &Result<T, FsError>) -> Result<bool, Failure> {
    match (frozen, result) {
        (false, Ok(_)) => Ok(false),
        (true, Err(FsError::Frozen { .. } | FsError::State { .. } | FsError::Busy { .. })) => Ok(true),
        (_, Ok(_)) => Err("it was done, and must not be".into()),
        (_, Err(error)) => Err(format!("{error}").as_str().into()),
    }
}

/// A range within a file.
fn range(file: &File, offset: u64, length: u64) -> Option<(u64, u64)> {
    let length = length.min((file.content.len() as u64).checked_sub(offset)?);
    (length > 0).then_some((offset, length))
}

struct Story {
    fs: SimFs,
    files: Files,
    stamp: u64,
}

impl Story {
    /// Steps on content.
    async fn request(&mut self, number: usize, name: &str, step: &Step) -> Result<(), Failure> {
        let Some(file) = self.files.all.get_mut(&number) else {
            return Ok(());
        };
        let opened = self.fs.open_file(name, Access::Write).await;
        if refused_if(file.frozen, &opened)? {
            return Ok(());
        }
        let handle = opened.map_err(failed)?;
        self.stamp += 1;
        let done = match step {
            Step::Write { sector, count, .. } => {
                let Some((offset, length)) = range(file, sector * SECTOR, count * SECTOR) else {
                    return Ok(());
                };
                let bytes = stamped(self.stamp, length);
                part(&mut file.content, offset, length).copy_from_slice(&bytes);
                write(&handle, offset, &bytes).await
            }
            Step::Discard { sub, count, .. } => {
                let Some((offset, length)) = range(file, sub * SUB, count * SUB) else {
                    return Ok(());
                };
                part(&mut file.content, offset, length).fill(0);
                handle.discard(offset, length).await
            }
            Step::Zero {
                sector, count, keep, ..
            } => {
                let Some((offset, length)) = range(file, sector * SECTOR, count * SECTOR) else {
                    return Ok(());
                };
                part(&mut file.content, offset, length).fill(0);
                let mode = match keep {
                    true => ZeroMode::KeepAllocated,
                    false => ZeroMode::MayUnmap,
                };
                handle.write_zeroes(offset, length, mode).await
            }
            _ => handle.flush().await,
        };
        done.map_err(failed)
    }

    async fn step(&mut self, step: &Step) -> Result<(), Failure> {
        let file = match step {
            Step::Write { file, .. }
            | Step::Discard { file, .. }
            | Step::Zero { file, .. }
            | Step::Flush { file }
            | Step::Snapshot { file }
            | Step::Clone { file }
            | Step::Absorb { file, .. }
            | Step::Delete { file }
            | Step::Resize { file, .. } => *file,
            Step::Checkpoint => return self.fs.checkpoint().await.map_err(failed),
            Step::Reopen { .. } => return Ok(()),
        };
        let Some((number, file, name)) = self.files.pick(file) else {
            return Ok(());
        };
        let (content, frozen, parent) = (file.content.clone(), file.frozen, file.parent);
        let full = self.files.all.len() >= MOST;
        match step {
            Step::Snapshot { .. } if !full => {
                let layer = self.files.add(content, Some(number));
                let snapshot = Snapshot {
                    path: &name,
                    layer: &layer,
                    handle: None,
                };
                self.fs.snapshot(&[snapshot], 1).await.map_err(failed)?;
                self.files.all.entry(number).and_modify(|file| file.frozen = true);
            }
            Step::Clone { .. } if !full => {
                let path = format!("/f{}", self.files.next);
                let cloned = self.fs.clone_file(&name, &path, 1).await;
                if !refused_if(!frozen, &cloned)? {
                    self.files.add(content, Some(number));
                }
            }
            Step::Absorb { named, .. } => {
                let alone = parent.is_some_and(|parent| self.files.children(parent).len() == 1);
                let absorbed = self.fs.absorb(&name, *named).await;
                if !refused_if(!alone, &absorbed)?
                    && let Some(gone) = parent.and_then(|parent| self.files.all.remove(&parent))
                    && let Some(file) = self.files.all.get_mut(&number)
                {
                    block_io::cover!("chains: a layer absorbs its parent");
                    file.parent = gone.parent;
                    if *named {
                        file.name = gone.name;
                    }
                }
            }
            Step::Delete { .. } => {
                self.fs.delete(&name).await.map_err(failed)?;
                self.files.all.entry(number).and_modify(|file| file.name = None);
            }
            Step::Resize { subs, .. } => {
                let resized = self.fs.resize(&name, subs * SUB).await;
                if !refused_if(frozen, &resized)? {
                    let size = usize::try_from(subs * SUB).unwrap();
                    let resize = |file: &mut File| file.content.resize(size, 0);
                    self.files.all.entry(number).and_modify(resize);
                }
            }
            Step::Snapshot { .. } | Step::Clone { .. } => {}
            _ => self.request(number, &name, step).await?,
        }
        self.fs.settled().await;
        self.files.settle();
        Ok(())
    }

    /// Every file has its bytes, its parent, and is frozen if it shall be; what a layer has changed is known.
    async fn compare(&self) -> Result<(), Failure> {
        let named = self.files.all.iter().filter(|(_, file)| file.name.is_some());
        let mut count = 0;
        for (number, file) in named {
            let name = file.name.as_deref().unwrap_or_default();
            count += 1;
            self.compare_one(*number, name, file)
                .await
                .map_err(|failure| failure.context(name))?;
        }
        let listed = self.fs.list("/").await.map_err(failed)?.len();
        if listed != count {
            return Err(format!("{listed} names instead of {count}").as_str().into());
        }
        Ok(())
    }

    async fn compare_one(&self, number: usize, name: &str, file: &File) -> Result<(), Failure> {
        let handle = self.fs.open_file(name, Access::Read).await.map_err(failed)?;
        let stat = self.fs.stat(name).await.map_err(failed)?;
        let frozen = file.frozen || !self.files.children(number).is_empty();
        if (stat.size, stat.frozen) != (file.content.len() as u64, frozen) {
            return Err(format!(
                "{stat:?} instead of {} bytes, frozen {frozen}",
                file.content.len()
            )
            .as_str()
            .into());
        }
        let found = read(&handle, 0, file.content.len()).await.map_err(failed)?;
        same(&found, &file.content)?;
        let Some(before) = self.files.named_ancestor(number) else {
            return Ok(());
        };
        let ancestor = before.name.as_deref();
        let (ranges, rest) = self
            .fs
            .changed(name, ancestor, 0, 100_000)
            .await
            .map_err(failed)?;
        assert_eq!(rest, None);
        // What is in no range is as it was.
        let mut merged = before.content.clone();
        merged.resize(file.content.len(), 0);
        for range in ranges {
            let length = range
                .length
                .min((file.content.len() as u64).saturating_sub(range.offset));
            let new = match range.kind {
                RangeKind::Zero => vec![0; usize::try_from(length).unwrap()],
                _ => part(&mut file.content.clone(), range.offset, length).to_vec(),
            };
            part(&mut merged, range.offset, length).copy_from_slice(&new);
        }
        same(&merged, &file.content).map_err(|failure| failure.context("changed ranges"))
    }
}

async fn story(sim: Sim, first: (bool, bool), steps: Vec<Step>) -> Result<(), Failure> {
    let mut story = Story {
        fs: format(&sim, 1).await.map_err(failed)?,
        files: Files::default(),
        stamp: 0,
    };
    let base = story.files.add(vec![0; 48 * 4096], None);
    let new = NewFile {
        size: 48 * SUB,
        attributes: Some(Attributes {
            thick: first.0,
            checksums: first.1,
            ..Attributes::default()
        }),
        now: 1,
    };
    story.fs.create(&base, &new).await.map_err(failed)?;
    for (number, step) in steps.iter().enumerate() {
        let done = story.step(step).await;
        done.map_err(|failure| failure.context(&format!("step {number}, {step:?}")))?;
        if let Step::Reopen { orderly } = step {
            // Without a power cut all that was written is there in either case.
            if *orderly {
                story.fs.close().await.map_err(failed)?;
            } else {
                story.fs.sync().await.map_err(failed)?;
            }
            story.fs = open(&sim).await.map_err(failed)?;
            story.fs.settled().await;
        }
        story
            .compare()
            .await
            .map_err(|failure| failure.context(&format!("after step {number}, {step:?}")))?;
    }
    let report = story.fs.check(filesys::CheckOptions::default());
    if let Some(first) = report.await.map_err(failed)?.findings.first() {
        return Err(format!("the check finds {first:?}").as_str().into());
    }
    story.fs.close().await.map_err(failed)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let file = || any::<prop::sample::Index>().prop_map(|index| index.index(64));
    let sectors = || (0_u64..400, 1_u64..140);
    let step = prop_oneof![
        10 => (file(), sectors()).prop_map(|(file, (sector, count))| Step::Write { file, sector, count }),
        4 => (file(), 0_u64..48, 1_u64..20).prop_map(|(file, sub, count)| Step::Discard { file, sub, count }),
        3 => (file(), sectors(), any::<bool>())
            .prop_map(|(file, (sector, count), keep)| Step::Zero { file, sector, count, keep }),
        6 => file().prop_map(|file| Step::Snapshot { file }),
        4 => file().prop_map(|file| Step::Clone { file }),
        5 => (file(), any::<bool>()).prop_map(|(file, named)| Step::Absorb { file, named }),
        4 => file().prop_map(|file| Step::Delete { file }),
        3 => (file(), 1_u64..60).prop_map(|(file, subs)| Step::Resize { file, subs }),
        2 => file().prop_map(|file| Step::Flush { file }),
        1 => any::<bool>().prop_map(|orderly| Step::Reopen { orderly }),
        1 => Just(Step::Checkpoint),
    ];
    prop::collection::vec(step, 1..50)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_are_not_visible_in_what_files_hold(first in any::<(bool, bool)>(), steps in steps()) {
        let ran = try_world(&mut world(1, 16 << 20), async |sim| story(sim, first, steps.clone()).await);
        prop_assert!(ran.is_ok(), "{}", ran.unwrap_err());
    }
}
