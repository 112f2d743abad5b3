//! A whole file system whose metadata somebody has changed who knows how: pages are different, and all checksums are right. It is opened,
//! listed, read, checked and repaired. Errors are fine; panics, circles and other files' data in what the check calls sound are not.

use std::ops::ControlFlow;

use arbitrary::Unstructured;
use block_io::BlockDevice;
use block_io::sim::{Ended, RunOptions, Sim};
use filesys::{Access, CheckOptions, Kind, Relocation};

use crate::filesys_image::{Editor, FILES, Fs, Page, image, open, read};

/// Entries that are looked at.
const MOST_NAMES: usize = 500;

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let closed = input.arbitrary()?;
    let mut world = image(closed);
    let mut editor = Editor::of(&world);
    let (pages, blocks) = (editor.pages(), editor.journal());
    let changes = input.int_in_range(1..=3_u8)?;
    let mut one = changes == 1;
    for _ in 0..changes {
        match input.int_in_range(0..=15_u8)? {
            0 => superblock(input, &mut editor)?,
            1..=3 if !closed => {
                one = false;
                journal(input, &mut editor, &blocks)?;
            }
            _ => page(input, &mut editor, &pages)?,
        }
    }
    editor.store(&mut world);
    let (read_only, writes) = (input.ratio(1, 4)?, input.arbitrary()?);
    let options = RunOptions {
        max_events: 200_000,
        ..RunOptions::in_order()
    };
    let ran = world.run(&options, |sim| live(sim, read_only, writes, one));
    match ran.unwrap_or_else(|failure| panic!("{failure}")).ended {
        Ended::Done(()) => Ok(()),
        Ended::Crashed => unreachable!("nothing crashes it"),
    }
}

/// Changes bytes, or whole slots.
fn damage(input: &mut Unstructured<'_>, bytes: &mut [u8]) -> arbitrary::Result<()> {
    for _ in 0..input.int_in_range(1..=3_u8)? {
        // Most of a page is often zeroes, which tell nothing.
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 1;
        let room = if input.ratio(1, 8)? { bytes.len() } else { used };
        let place = input.choose_index(room)?;
        match input.int_in_range(0..=6_u8)? {
            0 => {
                let wide: u64 = *input.choose(&[
                    0,
                    1,
                    16,
                    255,
                    256,
                    0x7fff_ffff,
                    0xffff_ffff,
                    1 << 40,
                    1 << 63,
                    u64::MAX,
                ])?;
                for (byte, new) in bytes.iter_mut().skip(place).zip(wide.to_le_bytes()) {
                    *byte = new;
                }
            }
            1 => {
                let (from, to) = (input.choose_index(room)? / 16 * 16, place / 16 * 16);
                if from + 16 <= bytes.len() && to + 16 <= bytes.len() {
                    bytes.copy_within(from..from + 16, to);
                }
            }
            2 => {
                // One slot everywhere: a tree that shares its branches.
                let from = place / 16 * 16;
                if from + 16 <= bytes.len() {
                    for at in (0..bytes.len() / 16).map(|slot| slot * 16) {
                        bytes.copy_within(from..from + 16, at);
                    }
                }
            }
            3 => bytes[place] = bytes[place].wrapping_add(1),
            4 => bytes[place] ^= 1 << input.int_in_range(0..=7_u8)?,
            _ => bytes[place] = input.arbitrary()?,
        }
    }
    Ok(())
}

fn page(input: &mut Unstructured<'_>, editor: &mut Editor, pages: &[Page]) -> arbitrary::Result<()> {
    let page = input.choose(pages)?;
    damage(
        input,
        &mut editor.bytes[page.block * 4096..(page.block + 1) * 4096],
    )?;
    editor.seal(page);
    Ok(())
}

fn superblock(input: &mut Unstructured<'_>, editor: &mut Editor) -> arbitrary::Result<()> {
    let place = input.int_in_range(0..=191_usize)?;
    let byte: u8 = input.arbitrary()?;
    editor.edit_superblocks(|bytes| bytes[place] ^= byte);
    Ok(())
}

fn journal(input: &mut Unstructured<'_>, editor: &mut Editor, blocks: &[usize]) -> arbitrary::Result<()> {
    if blocks.is_empty() {
        return Ok(());
    }
    let block = *input.choose(blocks)?;
    let start = if input.ratio(1, 4)? { 16 } else { 64 };
    damage(input, &mut editor.bytes[block * 4096 + start..(block + 1) * 4096])?;
    editor.seal_journal(blocks);
    Ok(())
}

/// Uses everything.
async fn live(sim: Sim, read_only: bool, writes: bool, one: bool) {
    let Ok(fs) = open(&sim, read_only).await else {
        return;
    };
    let sound = match fs.check(CheckOptions::default()).await {
        Ok(report) => {
            assert!(report.findings.iter().all(|finding| !finding.problem.is_empty()));
            report.is_clean()
        }
        Err(_) => false,
    };
    names(&fs).await;
    contents(&fs, sound && one).await;
    if writes && !read_only {
        change(&fs).await;
    }
    if !read_only {
        let repair = CheckOptions {
            repair: true,
            ..CheckOptions::default()
        };
        let _ = fs.check(repair).await;
    }
    let _ = fs.close().await;
}

async fn names(fs: &Fs) {
    let mut directories = vec!["/".to_owned()];
    let mut seen = 0;
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs.list(&directory).await else {
            continue;
        };
        for entry in entries {
            seen += 1;
            if seen > MOST_NAMES {
                return;
            }
            let path = format!("{}/{}", directory.trim_end_matches('/'), entry.name);
            let _ = fs.stat(&path).await;
            let _ = fs.path_of(entry.id).await;
            if entry.kind == Kind::Directory {
                directories.push(path);
            }
        }
    }
}

/// Reads files. In a sound file system they have no data but their own.
async fn contents(fs: &Fs, sound: bool) {
    for (path, tags, size) in FILES {
        let Ok(file) = fs.open_file(path, Access::Read).await else {
            continue;
        };
        let size = file.size().min(size);
        for at in (0..size).step_by(256 << 10) {
            let length = (256 << 10).min(size - at) as usize;
            let Some(bytes) = read(&file, at, length).await else {
                continue;
            };
            if sound {
                let strange = bytes.iter().position(|byte| *byte != 0 && !tags.contains(byte));
                assert_eq!(
                    strange, None,
                    "{path} has another file's data at {at}, and the check finds nothing"
                );
            }
        }
    }
}

async fn change(fs: &Fs) {
    for (path, ..) in FILES {
        if let Ok(file) = fs.open_file(path, Access::Write).await {
            let _ = file.discard(65536, 1 << 18).await;
            let _ = file
                .write_zeroes(0, 65536, block_io::ZeroMode::KeepAllocated)
                .await;
            let _ = file.flush().await;
        }
    }
    if let Ok(stat) = fs.stat("/sums").await {
        let goes_on = |_| ControlFlow::Continue(());
        let _ = fs.relocate(stat.id, Relocation::Defragment, 0, goes_on).await;
    }
    for pin in fs.pins() {
        let _ = fs.unpin(pin.id).await;
    }
    let _ = fs.rename("/d/clone", "/clone").await;
    let _ = fs.resize("/clone", 65536).await;
    let _ = fs.delete("/clone").await;
    let _ = fs.absorb("/d/head", true).await;
    let _ = fs.delete("/thick").await;
    let _ = fs.settle().await;
    let _ = fs.make_directory("/new", None, 1).await;
    let _ = fs.sync().await;
    let _ = fs.checkpoint().await;
}
