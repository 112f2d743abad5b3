//! `fs-load run FOLDER SEED COUNT [JOURNAL]`: a random load on a file system that knows what must be there.
//! `fs-load check FOLDER SEED < JOURNAL`: whether what a load said to be durable is there.
//! `fs-load odd FOLDER`: makes a tree with one of everything; `fs-load list FOLDER`: all that there is to know of a tree.
//!
//! Two workers, each in a folder of its own, create, write (buffered and past the page cache), truncate, allocate, punch holes,
//! zero ranges, rename, link, delete, sync and read; each keeps the content of its files in memory, compares what it reads, and
//! at the end, when the page cache has been dropped, everything. COUNT operations each, or 0: until SIGTERM.
//!
//! Now and then a worker makes something durable and says so in JOURNAL, which must outlive the machine, one line each. Loads in
//! several folders may share it.
//!
//! ```text
//! FOLDER file WORKER NUMBER        a new file: written, fsync(2) on it and on its folder. It is never touched again
//! FOLDER latest WORKER NUMBER      a file that is replaced by rename(2) each time has content NUMBER, or a later one
//! ```

mod tree;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, Error, ErrorKind, Result, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Files of a worker that change.
const FILES: u64 = 20;
/// Their largest size in bytes.
const LARGEST: u64 = 192 << 10;
/// Durable files of a worker; no more are made then.
const DURABLE: u64 = 150;
const PAGE: usize = 4096;
const WORKERS: u64 = 2;

/// Set by SIGTERM.
static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse::<u64>().ok();
    let result = match words.as_slice() {
        ["run", folder, seed, count, journal @ ..] if journal.len() < 2 => {
            match (number(seed), number(count)) {
                (Some(seed), Some(count)) => run(Path::new(folder), seed, count, journal.first().copied()),
                _ => return usage(),
            }
        }
        ["check", folder, seed] => match number(seed) {
            Some(seed) => check(Path::new(folder), seed, std::io::stdin().lock()),
            None => return usage(),
        },
        ["odd", folder] => tree::make(Path::new(folder)),
        ["list", folder] => tree::list(Path::new(folder)),
        _ => return usage(),
    };
    match result {
        Ok(said) => {
            println!("fs-load: {said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("fs-load: FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: fs-load run FOLDER SEED COUNT [JOURNAL] | check FOLDER SEED < JOURNAL | odd FOLDER | list FOLDER"
    );
    ExitCode::from(2)
}

/// Runs all workers to their end.
fn run(folder: &Path, seed: u64, count: u64, journal: Option<&str>) -> Result<String> {
    extern "C" fn stop(_: libc::c_int) {
        STOP.store(true, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = stop;
    // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
    let mut workers = (0..WORKERS)
        .map(|number| Worker::new(folder, seed, number, journal))
        .collect::<Result<Vec<_>>>()?;
    // The folders themselves.
    sync();
    let operations = std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter_mut()
            .map(|worker| scope.spawn(move || worker.work(count)))
            .collect();
        threads.into_iter().try_fold(0, |sum, thread| {
            let result = thread.join().map_err(|_| Error::other("a worker panicked"))?;
            result.map(|operations| sum + operations)
        })
    })?;
    // What is read from now on comes from the disk.
    sync();
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let (mut files, mut durable) = (0, 0);
    for worker in &workers {
        files += worker.verify_all()?;
        durable += worker.durable + worker.latest;
    }
    Ok(format!(
        "{operations} operations, {files} files verified, {durable} times durable"
    ))
}

fn sync() {
    // SAFETY: sync(2) takes nothing and returns nothing.
    unsafe { libc::sync() };
}

/// Reads a journal, and what it says.
fn check(folder: &Path, seed: u64, journal: impl BufRead) -> Result<String> {
    let mut latest = BTreeMap::new();
    let mut files = 0;
    for line in journal.lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let bad = || Error::other(format!("the journal says {line:?}"));
        let [of, what, worker, number] = words.as_slice() else {
            return Err(bad());
        };
        if Path::new(of) != folder {
            continue;
        }
        let (worker, number): (u64, u64) = match (worker.parse(), number.parse()) {
            (Ok(worker), Ok(number)) => (worker, number),
            _ => return Err(bad()),
        };
        match *what {
            "file" => {
                let path = folder.join(format!("w{worker}/durable{number}"));
                compare(&path, &content(seed, worker, number))?;
                files += 1;
            }
            "latest" => drop(latest.insert(worker, number)),
            _ => return Err(bad()),
        }
    }
    let mut said = format!("{files} durable files are there");
    for (worker, number) in latest {
        let path = folder.join(format!("w{worker}/latest"));
        let bytes = at(&path, fs::read(&path))?;
        let found = bytes
            .first_chunk()
            .map(|number| u64::from_le_bytes(*number))
            .ok_or_else(|| wrong(&path, "it is too short"))?;
        if found < number {
            return Err(wrong(
                &path,
                &format!("content {found} is there, {number} was durable"),
            ));
        }
        compare(&path, &content(seed, worker, found))?;
        // Writing to a string cannot fail.
        let _ok = write!(said, ", worker {worker} was at {number} and is at {found}");
    }
    Ok(said)
}

/// What a durable file of a worker has in it: its number, then noise, up to 24 KiB.
fn content(seed: u64, worker: u64, number: u64) -> Vec<u8> {
    let mut random = Random::new(seed ^ (worker << 56) ^ (number << 24));
    let length = 1 + random.below(24 << 10);
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend(random.bytes(length));
    bytes
}

fn compare(path: &Path, expected: &[u8]) -> Result<()> {
    let found = at(path, fs::read(path))?;
    if found.len() != expected.len() {
        let text = format!("it has {} bytes instead of {}", found.len(), expected.len());
        return Err(wrong(path, &text));
    }
    match found
        .iter()
        .zip(expected)
        .position(|(found, expected)| found != expected)
    {
        None => Ok(()),
        Some(offset) => Err(wrong(
            path,
            &format!(
                "at {offset} of {} there is {:02x?} instead of {:02x?}",
                found.len(),
                found.iter().skip(offset).take(8).collect::<Vec<_>>(),
                expected.iter().skip(offset).take(8).collect::<Vec<_>>()
            ),
        )),
    }
}

fn wrong(path: &Path, what: &str) -> Error {
    Error::other(format!("{}: {what}", path.display()))
}

/// An error with the path it is about.
fn at<T>(path: &Path, result: Result<T>) -> Result<T> {
    result.map_err(|error| Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// xorshift64: the same sequence each time.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..count.div_ceil(8) {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(size(count));
        bytes
    }
}

/// All sizes here are far below what a machine word holds.
fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// A file that changes: where it is, and what must be in it.
struct Shadow {
    path: PathBuf,
    bytes: Vec<u8>,
}

struct Worker {
    folder: PathBuf,
    /// How the journal calls the load.
    load: String,
    seed: u64,
    number: u64,
    random: Random,
    journal: Option<File>,
    files: BTreeMap<u64, Shadow>,
    names: u64,
    durable: u64,
    latest: u64,
}

impl Worker {
    fn new(folder: &Path, seed: u64, number: u64, journal: Option<&str>) -> Result<Self> {
        let load = folder.display().to_string();
        let folder = folder.join(format!("w{number}"));
        for sub in ["a", "b"] {
            at(&folder, fs::create_dir_all(folder.join(sub)))?;
        }
        let journal = match journal {
            Some(path) => Some(at(Path::new(path), OpenOptions::new().append(true).open(path))?),
            None => None,
        };
        Ok(Self {
            folder,
            load,
            seed,
            number,
            random: Random::new(seed.wrapping_mul(WORKERS).wrapping_add(number)),
            journal,
            files: BTreeMap::new(),
            names: 0,
            durable: 0,
            latest: 0,
        })
    }

    fn work(&mut self, count: u64) -> Result<u64> {
        let mut done = 0;
        while (count == 0 || done < count) && !STOP.load(Ordering::Relaxed) {
            self.operation()?;
            done += 1;
        }
        Ok(done)
    }

    fn operation(&mut self) -> Result<()> {
        let slot = self.random.below(FILES);
        let Some(mut shadow) = self.files.remove(&slot) else {
            let path = self.new_path();
            at(&path, File::create_new(&path).map(drop))?;
            let bytes = Vec::new();
            self.files.insert(slot, Shadow { path, bytes });
            return Ok(());
        };
        let path = shadow.path.clone();
        let kept = match self.random.below(24) {
            0..=6 => self.write(&mut shadow).map(|()| true),
            7..=8 => self.write_direct(&mut shadow).map(|()| true),
            9..=10 => self.truncate(&mut shadow).map(|()| true),
            11..=13 => self.allocate(&mut shadow).map(|()| true),
            14..=16 => self.read(&shadow).map(|()| true),
            17 => self.rename(&mut shadow).map(|()| true),
            18 => self.link(&mut shadow).map(|()| true),
            19 => self.other_names().map(|()| true),
            20 => self.sync(&shadow).map(|()| true),
            21 => fs::remove_file(&shadow.path).map(|()| false),
            22 => self.make_durable().map(|()| true),
            _ => self.replace_latest().map(|()| true),
        };
        if at(&path, kept)? {
            self.files.insert(slot, shadow);
        }
        Ok(())
    }

    fn new_path(&mut self) -> PathBuf {
        self.names += 1;
        let sub = if self.random.below(2) == 0 { "a" } else { "b" };
        self.folder.join(sub).join(format!("f{}", self.names))
    }

    fn write(&mut self, shadow: &mut Shadow) -> Result<()> {
        let offset = self.random.below(LARGEST - (32 << 10));
        let length = 1 + self.random.below(32 << 10);
        let bytes = self.random.bytes(length);
        let file = OpenOptions::new().write(true).open(&shadow.path)?;
        file.write_all_at(&bytes, offset)?;
        overwrite(&mut shadow.bytes, offset, &bytes);
        Ok(())
    }

    /// Past the page cache: whole pages from memory that is aligned to pages.
    fn write_direct(&mut self, shadow: &mut Shadow) -> Result<()> {
        let page = PAGE as u64;
        let pages = 1 + self.random.below(8);
        let offset = self.random.below(LARGEST / page - 8) * page;
        let bytes = self.random.bytes(pages * page);
        let mut memory = vec![0; bytes.len() + PAGE];
        let skip = memory.as_ptr().align_offset(PAGE);
        let aligned = memory
            .get_mut(skip..skip + bytes.len())
            .ok_or_else(|| Error::other("memory cannot be aligned"))?;
        aligned.copy_from_slice(&bytes);
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&shadow.path)?;
        file.write_all_at(aligned, offset)?;
        overwrite(&mut shadow.bytes, offset, &bytes);
        Ok(())
    }

    fn truncate(&mut self, shadow: &mut Shadow) -> Result<()> {
        let length = self.random.below(LARGEST);
        OpenOptions::new()
            .write(true)
            .open(&shadow.path)?
            .set_len(length)?;
        shadow.bytes.resize(size(length), 0);
        Ok(())
    }

    /// fallocate(2): more space, a hole, zeroes.
    fn allocate(&mut self, shadow: &mut Shadow) -> Result<()> {
        let offset = self.random.below(LARGEST - (64 << 10));
        let length = 1 + self.random.below(64 << 10);
        let (mode, zeroes, grows) = match self.random.below(4) {
            0 => (0, false, true),
            1 => (libc::FALLOC_FL_KEEP_SIZE, false, false),
            2 => (
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                true,
                false,
            ),
            _ => (libc::FALLOC_FL_ZERO_RANGE, true, true),
        };
        let file = OpenOptions::new().write(true).open(&shadow.path)?;
        let (from, count) = (
            i64::try_from(offset).map_err(Error::other)?,
            i64::try_from(length).map_err(Error::other)?,
        );
        // SAFETY: the descriptor is open; fallocate takes numbers only.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, from, count) } != 0 {
            return Err(Error::last_os_error());
        }
        let end = size(offset + length);
        if grows && shadow.bytes.len() < end {
            shadow.bytes.resize(end, 0);
        }
        if zeroes {
            let end = end.min(shadow.bytes.len());
            let range = size(offset).min(end)..end;
            shadow.bytes.get_mut(range).unwrap_or_default().fill(0);
        }
        Ok(())
    }

    fn read(&mut self, shadow: &Shadow) -> Result<()> {
        let offset = self.random.below(shadow.bytes.len() as u64);
        let length = self
            .random
            .below(48 << 10)
            .min(shadow.bytes.len() as u64 - offset);
        let mut bytes = vec![0; size(length)];
        File::open(&shadow.path)?.read_exact_at(&mut bytes, offset)?;
        let begin = size(offset);
        if shadow.bytes.get(begin..begin + bytes.len()) != Some(&bytes) {
            return Err(Error::other(format!(
                "a read of {length} at {offset} gives other bytes"
            )));
        }
        Ok(())
    }

    fn rename(&mut self, shadow: &mut Shadow) -> Result<()> {
        let path = self.new_path();
        fs::rename(&shadow.path, &path)?;
        shadow.path = path;
        Ok(())
    }

    fn link(&mut self, shadow: &mut Shadow) -> Result<()> {
        let path = self.new_path();
        fs::hard_link(&shadow.path, &path)?;
        fs::remove_file(&shadow.path)?;
        shadow.path = path;
        Ok(())
    }

    /// Folders and symbolic links that come and go.
    fn other_names(&mut self) -> Result<()> {
        let path = self.new_path();
        fs::create_dir_all(path.join("deep/er"))?;
        symlink("er", path.join("deep/link"))?;
        if fs::read_link(path.join("deep/link"))? != Path::new("er") {
            return Err(Error::other("a symbolic link names something else"));
        }
        fs::remove_dir_all(&path)
    }

    fn sync(&mut self, shadow: &Shadow) -> Result<()> {
        let file = OpenOptions::new().write(true).open(&shadow.path)?;
        if self.random.below(2) == 0 {
            file.sync_data()
        } else {
            file.sync_all()
        }
    }

    fn make_durable(&mut self) -> Result<()> {
        if self.durable == DURABLE {
            return Ok(());
        }
        self.durable += 1;
        let path = self.folder.join(format!("durable{}", self.durable));
        let mut file = File::create_new(&path)?;
        file.write_all(&content(self.seed, self.number, self.durable))?;
        file.sync_all()?;
        File::open(&self.folder)?.sync_all()?;
        self.say("file", self.durable)
    }

    fn replace_latest(&mut self) -> Result<()> {
        self.latest += 1;
        let (new, path) = (self.folder.join("latest.new"), self.folder.join("latest"));
        let mut file = File::create(&new)?;
        file.write_all(&content(self.seed, self.number, self.latest))?;
        file.sync_data()?;
        fs::rename(&new, &path)?;
        File::open(&self.folder)?.sync_all()?;
        self.say("latest", self.latest)
    }

    fn say(&mut self, what: &str, number: u64) -> Result<()> {
        let line = format!("{} {what} {} {number}\n", self.load, self.number);
        match &mut self.journal {
            Some(journal) => journal.write_all(line.as_bytes()),
            None => Ok(()),
        }
    }

    /// Compares all files, and that there are no others; their number.
    fn verify_all(&self) -> Result<u64> {
        for shadow in self.files.values() {
            compare(&shadow.path, &shadow.bytes)?;
        }
        for number in 1..=self.durable {
            let path = self.folder.join(format!("durable{number}"));
            compare(&path, &content(self.seed, self.number, number))?;
        }
        if self.latest > 0 {
            compare(
                &self.folder.join("latest"),
                &content(self.seed, self.number, self.latest),
            )?;
        }
        for sub in ["a", "b"] {
            for entry in fs::read_dir(self.folder.join(sub))? {
                let path = entry?.path();
                if !self.files.values().any(|shadow| shadow.path == path) {
                    return Err(Error::new(
                        ErrorKind::AlreadyExists,
                        format!("{} should not be there", path.display()),
                    ));
                }
            }
        }
        Ok(self.files.len() as u64 + self.durable + u64::from(self.latest > 0))
    }
}

/// A write to what must be in a file: behind its end, zeroes come first.
fn overwrite(bytes: &mut Vec<u8>, offset: u64, new: &[u8]) {
    let (begin, end) = (size(offset), size(offset) + new.len());
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    if let Some(range) = bytes.get_mut(begin..end) {
        range.copy_from_slice(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A load in a folder of its own, without the end that drops the page cache.
    fn loaded(folder: &Path) -> (Worker, String) {
        let mut worker = Worker::new(folder, 7, 0, None).unwrap();
        worker.work(4000).unwrap();
        let load = folder.display();
        let journal = format!(
            "{load} file 0 {}\n/elsewhere file 0 9999\n{load} latest 0 {}\n",
            worker.durable, worker.latest
        );
        (worker, journal)
    }

    #[test]
    fn a_file_that_is_not_what_was_written_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (worker, _) = loaded(folder.path());
        assert!(worker.verify_all().unwrap() > DURABLE);
        let shadow = worker
            .files
            .values()
            .find(|shadow| !shadow.bytes.is_empty())
            .unwrap();
        let file = OpenOptions::new().write(true).open(&shadow.path).unwrap();
        let last = shadow.bytes.len() - 1;
        file.write_all_at(&[!shadow.bytes[last]], last as u64).unwrap();
        let said = worker.verify_all().unwrap_err().to_string();
        assert!(said.contains(&format!("at {last} of")), "{said}");
        file.write_all_at(&[shadow.bytes[last]], last as u64).unwrap();
        File::create(worker.folder.join("a/more")).unwrap();
        let said = worker.verify_all().unwrap_err().to_string();
        assert!(said.contains("a/more should not be there"), "{said}");
    }

    #[test]
    fn what_was_durable_and_is_gone_or_older_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (worker, journal) = loaded(folder.path());
        let look = || check(folder.path(), 7, journal.as_bytes());
        assert!(look().unwrap().starts_with("1 durable files are there, worker 0"));
        let latest = worker.folder.join("latest");
        fs::write(&latest, content(7, 0, worker.latest - 1)).unwrap();
        let said = look().unwrap_err().to_string();
        assert!(said.contains("was durable"), "{said}");
        fs::write(&latest, content(7, 0, worker.latest + 1)).unwrap();
        look().unwrap();
        fs::remove_file(worker.folder.join(format!("durable{}", worker.durable))).unwrap();
        let said = look().unwrap_err().to_string();
        assert!(said.contains("No such file"), "{said}");
    }
}
