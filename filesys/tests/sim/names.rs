//! The name space against the simplest model there is: a map from paths to what they name. Every answer is predicted, errors too.

use std::collections::BTreeMap;

use block_io::sim::{Failure, Sim};
use filesys::{FileId, FsError, Kind};
use proptest::prelude::*;

use crate::harness::{SimFs, failed, format, open, thin, try_world, world};

/// What is done.
#[derive(Debug, Clone)]
enum Step {
    MakeDirectory(String),
    Create(String),
    Rename(String, String),
    Delete(String),
    List(String),
    Stat(String),
    Resize(String, u64),
    /// Closed and opened; or opened without having been closed, as after a crash that loses nothing.
    Reopen {
        orderly: bool,
    },
    Checkpoint,
}

/// How an operation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    NotFound,
    Exists,
    NotDirectory,
    IsDirectory,
    NotEmpty,
    Path,
    State,
}

#[derive(Debug, Clone)]
struct Node {
    directory: bool,
    id: FileId,
    size: u64,
}

type Key = Vec<String>;

/// What has which path; the root is not in it.
#[derive(Debug, Clone, Default)]
struct Names(BTreeMap<Key, Node>);

fn outcome<T>(result: &Result<T, FsError>) -> Result<Outcome, Failure> {
    Ok(match result {
        Ok(_) => Outcome::Done,
        Err(FsError::NotFound { .. }) => Outcome::NotFound,
        Err(FsError::Exists { .. }) => Outcome::Exists,
        Err(FsError::NotDirectory { .. }) => Outcome::NotDirectory,
        Err(FsError::IsDirectory { .. }) => Outcome::IsDirectory,
        Err(FsError::NotEmpty { .. }) => Outcome::NotEmpty,
        Err(FsError::Path { .. }) => Outcome::Path,
        Err(FsError::State { .. }) => Outcome::State,
        Err(other) => return Err(other.to_string().as_str().into()),
    })
}

fn parts(path: &str) -> Result<Key, Outcome> {
    let rest = path.strip_prefix('/').ok_or(Outcome::Path)?;
    let parts: Key = rest
        .split('/')
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect();
    let bad = |part: &String| part.len() > 255 || part == "." || part == ".." || part.contains('\n');
    if parts.iter().any(bad) {
        return Err(Outcome::Path);
    }
    Ok(parts)
}

impl Names {
    /// What is at a path: `None` is the root.
    fn find(&self, key: &[String]) -> Result<Option<&Node>, Outcome> {
        let mut at = None;
        for length in 1..=key.len() {
            if at.is_some_and(|node: &Node| !node.directory) {
                return Err(Outcome::NotDirectory);
            }
            at = Some(self.0.get(&key[..length]).ok_or(Outcome::NotFound)?);
        }
        Ok(at)
    }

    /// Where something new would get its name.
    fn spot(&self, path: &str) -> Result<Key, Outcome> {
        let key = parts(path)?;
        let (_, above) = key.split_last().ok_or(Outcome::Exists)?;
        if self.find(above)?.is_some_and(|node| !node.directory) {
            return Err(Outcome::NotDirectory);
        }
        match self.0.contains_key(&key) {
            true => Err(Outcome::Exists),
            false => Ok(key),
        }
    }

    fn below<'a>(&'a self, key: &'a [String]) -> impl Iterator<Item = (&'a Key, &'a Node)> {
        let within = move |other: &Key| other.len() > key.len() && other.starts_with(key);
        self.0.iter().filter(move |(other, _)| within(other))
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Outcome> {
        let old = parts(from)?;
        self.find(&old)?;
        let new = self.spot(to)?;
        if new.starts_with(&old) {
            return Err(Outcome::Path);
        }
        let moved: Vec<Key> = self
            .0
            .keys()
            .filter(|key| key.starts_with(&old))
            .cloned()
            .collect();
        for key in moved {
            if let Some(node) = self.0.remove(&key) {
                let key = [new.as_slice(), &key[old.len()..]].concat();
                self.0.insert(key, node);
            }
        }
        Ok(())
    }

    fn delete(&mut self, path: &str) -> Result<(), Outcome> {
        let key = parts(path)?;
        if self.find(&key)?.is_none() {
            return Err(Outcome::State);
        }
        if self.below(&key).next().is_some() {
            return Err(Outcome::NotEmpty);
        }
        self.0.remove(&key);
        Ok(())
    }
}

fn path(key: &[String]) -> String {
    format!("/{}", key.join("/"))
}

/// An operation ended as the model says.
fn same<T>(found: &Result<T, FsError>, expected: Result<(), Outcome>) -> Result<(), Failure> {
    let (found, expected) = (outcome(found)?, expected.err().unwrap_or(Outcome::Done));
    if found == expected {
        return Ok(());
    }
    Err(format!("{found:?} instead of {expected:?}").as_str().into())
}

async fn list(fs: &SimFs, names: &Names, path: &str) -> Result<(), Failure> {
    let found = fs.list(path).await;
    let key = parts(path);
    let expected = key.clone().and_then(|key| match names.find(&key)? {
        Some(node) if !node.directory => Err(Outcome::NotDirectory),
        _ => Ok(()),
    });
    same(&found, expected)?;
    let (Ok(found), Ok(key)) = (found, key) else {
        return Ok(());
    };
    let found: Vec<_> = found
        .into_iter()
        .map(|entry| (entry.name, entry.id, entry.kind == Kind::Directory))
        .collect();
    let expected: Vec<_> = names
        .below(&key)
        .filter(|(other, _)| other.len() == key.len() + 1)
        .map(|(other, node)| (other[key.len()].clone(), node.id, node.directory))
        .collect();
    if found != expected {
        return Err(format!("{found:?} instead of {expected:?}").as_str().into());
    }
    Ok(())
}

async fn stat(fs: &SimFs, names: &Names, path: &str) -> Result<(), Failure> {
    let found = fs.stat(path).await;
    let key = parts(path);
    same(&found, key.clone().and_then(|key| names.find(&key).map(drop)))?;
    let (Ok(found), Ok(key)) = (found, key) else {
        return Ok(());
    };
    let Ok(Some(node)) = names.find(&key) else {
        return Ok(());
    };
    let entries = names
        .below(&key)
        .filter(|(other, _)| other.len() == key.len() + 1);
    let size = if node.directory {
        entries.count() as u64
    } else {
        node.size
    };
    let is = (found.id, found.kind == Kind::Directory, found.size);
    if is != (node.id, node.directory, size) {
        return Err(format!("{is:?} instead of {:?}, size {size}", node)
            .as_str()
            .into());
    }
    Ok(())
}

/// Everything, from the root on.
async fn all(fs: &SimFs, names: &Names) -> Result<(), Failure> {
    list(fs, names, "/").await?;
    for (key, node) in &names.0 {
        stat(fs, names, &path(key)).await?;
        if node.directory {
            list(fs, names, &path(key)).await?;
        }
        let found = fs.path_of(node.id).await.map_err(failed)?;
        if found.as_deref() != Some(path(key).as_str()) {
            return Err(format!("{found:?} instead of {}", path(key)).as_str().into());
        }
    }
    Ok(())
}

async fn step(fs: &SimFs, names: &mut Names, step: &Step) -> Result<(), Failure> {
    match step {
        Step::MakeDirectory(path) | Step::Create(path) => {
            let directory = matches!(step, Step::MakeDirectory(_));
            let made = match directory {
                true => fs.make_directory(path, None, 1).await,
                false => fs.create(path, &thin(8192)).await,
            };
            let spot = names.spot(path);
            same(&made, spot.clone().map(drop))?;
            if let (Ok(key), Ok(id)) = (spot, made) {
                let size = 8192;
                names.0.insert(key, Node { directory, id, size });
            }
            Ok(())
        }
        Step::Rename(from, to) => same(&fs.rename(from, to).await, names.rename(from, to)),
        Step::Delete(path) => same(&fs.delete(path).await, names.delete(path)),
        Step::List(path) => list(fs, names, path).await,
        Step::Stat(path) => stat(fs, names, path).await,
        Step::Resize(path, size) => {
            let found = fs.resize(path, *size).await;
            let node = parts(path).and_then(|key| match names.find(&key)? {
                Some(node) if !node.directory => Ok(key),
                _ => Err(Outcome::IsDirectory),
            });
            same(&found, node.clone().map(drop))?;
            if let Some(node) = node.ok().and_then(|key| names.0.get_mut(&key)) {
                node.size = *size;
            }
            Ok(())
        }
        Step::Checkpoint => fs.checkpoint().await.map_err(failed),
        Step::Reopen { .. } => Ok(()),
    }
}

async fn story(sim: Sim, steps: Vec<Step>) -> Result<(), Failure> {
    let mut fs = format(&sim, 1).await.map_err(failed)?;
    let mut names = Names::default();
    for (number, one) in steps.iter().enumerate() {
        if let Step::Reopen { orderly } = one {
            if *orderly {
                fs.close().await.map_err(failed)?;
            }
            drop(fs);
            fs = open(&sim).await.map_err(failed)?;
            all(&fs, &names).await?;
        }
        let done = step(&fs, &mut names, one).await;
        done.map_err(|failure| failure.context(&format!("step {number}, {one:?}")))?;
    }
    all(&fs, &names).await?;
    let report = fs.check(filesys::CheckOptions::default()).await.map_err(failed)?;
    if let Some(first) = report.findings.first() {
        return Err(format!("the check finds {first:?}").as_str().into());
    }
    // What is there can be emptied, from below.
    for key in names.0.keys().rev() {
        fs.delete(&path(key)).await.map_err(failed)?;
    }
    list(&fs, &Names::default(), "/").await?;
    fs.close().await.map_err(failed)
}

fn paths() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        6 => prop::sample::select(vec!["a", "b", "c", "d"]).prop_map(str::to_owned),
        1 => Just("n".repeat(255)),
        1 => Just("ä".repeat(127)),
    ];
    let good = prop::collection::vec(name, 0..4).prop_map(|parts| format!("/{}", parts.join("/")));
    let odd = vec!["", "a", "/a/../b", "/.", "//a//b/", "/a\nb", "/"];
    let odd = prop::sample::select(odd).prop_map(str::to_owned);
    prop_oneof![30 => good, 1 => odd, 1 => Just(format!("/{}", "n".repeat(256)))]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => paths().prop_map(Step::MakeDirectory),
        4 => paths().prop_map(Step::Create),
        4 => (paths(), paths()).prop_map(|(from, to)| Step::Rename(from, to)),
        3 => paths().prop_map(Step::Delete),
        2 => paths().prop_map(Step::List),
        2 => paths().prop_map(Step::Stat),
        1 => (paths(), 0_u64..5).prop_map(|(path, size)| Step::Resize(path, size * 4096)),
        1 => any::<bool>().prop_map(|orderly| Step::Reopen { orderly }),
        1 => Just(Step::Checkpoint),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn names_are_what_a_map_says(steps in steps()) {
        let ran = try_world(&mut world(1, 8 << 20), async |sim| story(sim, steps.clone()).await);
        prop_assert!(ran.is_ok(), "{}", ran.unwrap_err());
    }
}
