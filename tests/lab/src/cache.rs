//! Where the images lie, and how they are named.
//!
//! Each image is a folder `store/NAME-KEY`, KEY being a hash of all that it was made from; `current/NAME` is a symlink
//! to the one in use. A folder is made under another name and renamed when complete, so that what is there is whole.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};

/// The folder of everything that `cargo xtask setup` makes.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The folder named by the environment variable `SMSVMM_CACHE`, or `target/cache` of this work tree.
    #[must_use]
    pub fn locate() -> Self {
        let root = match std::env::var_os("SMSVMM_CACHE") {
            Some(folder) => PathBuf::from(folder),
            None => repository().join("target/cache"),
        };
        Self { root }
    }

    /// A path in the cache.
    #[must_use]
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// The folder of an image, if it has been made.
    ///
    /// # Errors
    /// When it has not: the message says which command makes it.
    pub fn image(&self, name: &str) -> Result<PathBuf> {
        let link = self.root.join("current").join(name);
        fs::canonicalize(&link).with_context(|| {
            format!(
                "there is no image `{name}` ({}); run `cargo xtask setup`",
                link.display()
            )
        })
    }

    /// Makes an image unless the store has it under this key, and makes it the current one. `build` fills an empty folder.
    ///
    /// # Errors
    /// Those of `build` and of the file system.
    pub fn make(&self, name: &str, key: Key, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let store = self.root.join("store");
        let folder = store.join(format!("{name}-{key}"));
        if !folder.exists() {
            let unfinished = store.join(format!(".{name}-{key}.{}", std::process::id()));
            remove(&unfinished)?;
            fs::create_dir_all(&unfinished)
                .with_context(|| format!("cannot make {}", unfinished.display()))?;
            build(&unfinished).with_context(|| format!("cannot make the image `{name}`"))?;
            fs::rename(&unfinished, &folder)?;
        }
        mark_as_used(&folder);
        let current = self.root.join("current");
        fs::create_dir_all(&current)?;
        let link = current.join(name);
        let target = Path::new("../store").join(format!("{name}-{key}"));
        if fs::read_link(&link).ok().as_deref() != Some(&target) {
            let new = current.join(format!(".{name}.{}", std::process::id()));
            remove(&new)?;
            symlink(&target, &new)?;
            fs::rename(&new, &link)?;
        }
        Ok(folder)
    }
}

/// What [`Cache::prune`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Folders and files that were removed, by name.
    pub removed: Vec<String>,
}

impl Cache {
    /// Marks all current images as used now. Whoever relies on them without making them calls this, or they may be pruned.
    pub fn keep_current(&self) {
        for entry in fs::read_dir(self.root.join("current"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Ok(folder) = fs::canonicalize(entry.path()) {
                mark_as_used(&folder);
            }
        }
    }

    /// Removes images that are not current and that no work tree has used for `age`, and what was left unfinished as long ago.
    ///
    /// Several work trees may share a cache, each with recipes of its own, but only one of them has its images in `current`:
    /// hence the age, which counts from the last set-up that asked for the image.
    ///
    /// # Errors
    /// When the store cannot be listed. What cannot be removed stays for the next time.
    pub fn prune(&self, age: Duration) -> Result<Pruned> {
        let now = SystemTime::now();
        let current: Vec<PathBuf> = fs::read_dir(self.root.join("current"))?
            .filter_map(|entry| fs::canonicalize(entry.ok()?.path()).ok())
            .collect();
        let store = fs::canonicalize(self.root.join("store"))?;
        let mut pruned = Pruned::default();
        for entry in fs::read_dir(&store)? {
            let entry = entry?;
            let path = entry.path();
            // A clock that was set back gives times in the future: those are young.
            let idle = now
                .duration_since(entry.metadata()?.modified()?)
                .unwrap_or_default();
            if idle <= age || current.contains(&path) {
                continue;
            }
            // Out of the way at once, so that nobody takes half of it for the whole.
            let name = entry.file_name().to_string_lossy().into_owned();
            let trash = store.join(format!(".pruned.{name}.{}", std::process::id()));
            let gone = if name.starts_with('.') {
                remove(&path)
            } else {
                fs::rename(&path, &trash)
                    .map_err(Into::into)
                    .and_then(|()| remove(&trash))
            };
            if gone.is_ok() {
                pruned.removed.push(name);
            }
        }
        pruned.removed.sort();
        Ok(pruned)
    }
}

/// The time of a folder in the store is that of its last use. What cannot be marked only looks unused.
fn mark_as_used(folder: &Path) {
    if let Ok(file) = fs::File::open(folder) {
        drop(file.set_modified(SystemTime::now()));
    }
}

/// The top folder of this work tree.
#[must_use]
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

fn remove(path: &Path) -> Result<()> {
    let result = match path.symlink_metadata() {
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return Ok(()),
    };
    result.with_context(|| format!("cannot remove {}", path.display()))
}

/// A hash over the inputs of an image (FNV-1a, 64 bits): names things, protects nothing; apt checks the signatures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// The key of no inputs.
    #[must_use]
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// The key with one more input.
    #[must_use]
    pub fn with(self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        let length = (input.len() as u64).to_le_bytes();
        let hash = input.iter().chain(&length).fold(self.0, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Self(hash)
    }

    /// The hash itself.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

impl Default for Key {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_every_input_and_their_borders() {
        assert_ne!(Key::new().with("ab").with("c"), Key::new().with("a").with("bc"));
        assert_ne!(Key::new().with("a"), Key::new().with("a").with(""));
        assert_eq!(Key::new().with("a").to_string(), Key::new().with("a").to_string());
    }

    #[test]
    fn what_nobody_has_used_for_long_is_pruned() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache {
            root: folder.path().to_path_buf(),
        };
        let make = |input: &str| {
            let key = Key::new().with(input);
            let fill = |folder: &Path| Ok(fs::write(folder.join("input"), input)?);
            cache.make("thing", key, fill).unwrap()
        };
        let day = Duration::from_secs(86_400);
        let used = |folder: &Path, days: u32| {
            let file = fs::File::open(folder).unwrap();
            file.set_modified(SystemTime::now() - days * day).unwrap();
        };
        let (old, other_tree, current) = (make("old"), make("other"), make("current"));
        let unfinished = cache.path("store/.thing-0123.99");
        fs::create_dir(&unfinished).unwrap();
        used(&old, 15);
        used(&other_tree, 13);
        used(&current, 100);
        used(&unfinished, 15);

        let pruned = cache.prune(14 * day).unwrap();
        assert_eq!(pruned.removed.len(), 2, "{pruned:?}");
        assert!(!old.exists() && !unfinished.exists());
        assert!(other_tree.exists() && current.exists());
        assert_eq!(
            fs::read_dir(cache.path("store")).unwrap().count(),
            2,
            "nothing half-removed"
        );

        // Asking for an image is using it, and so is having it as the current one.
        used(&other_tree, 15);
        make("other");
        cache.keep_current();
        make("current");
        assert_eq!(cache.prune(14 * day).unwrap(), Pruned::default());
    }

    #[test]
    fn an_image_is_made_once_per_key() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache {
            root: folder.path().to_path_buf(),
        };
        let mut made = 0;
        for input in ["1", "1", "2"] {
            cache
                .make("thing", Key::new().with(input), |folder| {
                    made += 1;
                    Ok(fs::write(folder.join("input"), input)?)
                })
                .unwrap();
        }
        assert_eq!(made, 2);
        assert_eq!(
            fs::read_to_string(cache.image("thing").unwrap().join("input")).unwrap(),
            "2"
        );
        assert!(
            cache
                .image("other")
                .unwrap_err()
                .to_string()
                .contains("cargo xtask setup")
        );
    }
}
