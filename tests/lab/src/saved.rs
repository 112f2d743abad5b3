//! The saved state of a booted lab host: made once per kind of host, then the start of every lab.
//!
//! Two files: the memory, which QEMU maps privately (so a start copies nothing and disturbs nobody), and the rest of the
//! machine, some hundred KiB. They fit only the QEMU, images and machine that they were made with, hence the key.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::fs::FlockOperation;

use crate::machine::{self, Machine, Start};
use crate::{Builder, Cache, Key, Share};

/// The two files.
pub(crate) struct Saved {
    pub(crate) memory: PathBuf,
    pub(crate) state: PathBuf,
}

/// The saved state for this kind of host; boots a host to make it when there is none yet.
pub(crate) fn ensure(cache: &Cache, builder: &Builder) -> Result<Saved> {
    let folder = cache.path("saved");
    fs::create_dir_all(&folder)?;
    let mut key = Key::new().with(machine::description(builder));
    for image in ["emulator", "lab", "lab-images"] {
        key = key.with(cache.image(image)?.to_string_lossy().as_bytes());
    }
    let saved = Saved {
        memory: folder.join(format!("{key}.memory")),
        state: folder.join(format!("{key}.state")),
    };
    if saved.state.exists() {
        return Ok(saved);
    }
    // Others may be making the same one.
    let lock = File::create(folder.join("lock"))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    if !saved.state.exists() {
        make(cache, builder, &saved).context("cannot save the state of a lab host")?;
    }
    Ok(saved)
}

fn make(cache: &Cache, builder: &Builder, saved: &Saved) -> Result<()> {
    let begin = Instant::now();
    forget_old_ones(cache)?;
    eprintln!("lab: booting a lab host once, to save its state ...");
    let share = Share::new(cache, None)?;
    let memory = saved.memory.with_extension("memory.new");
    let state = saved.state.with_extension("state.new");
    File::create(&memory)?.set_len(u64::from(builder.memory_mib) << 20)?;
    let mut host = Machine::start(
        cache,
        builder,
        share.image(),
        Start::Boot {
            memory_file: Some(&memory),
        },
    )?;
    // Let what the boot left behind come to rest.
    std::thread::sleep(Duration::from_secs(1));
    host.save(&state)?;
    drop(host);
    fs::rename(&memory, &saved.memory)?;
    fs::rename(&state, &saved.state)?;
    eprintln!("lab: saved in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Removes states that were made more than two days ago: each takes some hundred MiB, and new images make new ones.
/// A lab that runs keeps its files, removed or not.
fn forget_old_ones(cache: &Cache) -> Result<()> {
    for entry in fs::read_dir(cache.path("saved"))? {
        let entry = entry?;
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        if entry.file_name() != "lock" && age > Duration::from_secs(2 * 86_400) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
