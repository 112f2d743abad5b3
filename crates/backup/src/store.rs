//! A folder with archives: `STORE/PRINCIPAL/NAME.smsbackup`. One that is not complete is called `NAME.smsbackup.partial`.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::archive::{
    ArchiveError, ArchiveReader, ArchiveWriter, Chain, ChainError, Commit, Header, Mark, Record, Sink,
    read_commit,
};
use crate::file::{ReadAhead, WriteBehind};
use crate::message::{BackupInfo, Progress};
use crate::plan::{Entry, Extent, Time};
use crate::raw_text::RawText;

/// What the names of archives end with.
pub const ENDING: &str = "smsbackup";
const PARTIAL: &str = "smsbackup.partial";

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refuses.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was to be done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is one.
    #[error("there is a backup {0} already")]
    Exists(String),
    /// There is none.
    #[error("there is no backup {0}")]
    Missing(String),
    /// Somebody is writing it.
    #[error("backup {0} is being written by somebody else")]
    Busy(String),
    /// What there is of it is of another plan.
    #[error("what there is of backup {0} is of another plan: take another name, or abandon it")]
    OtherPlan(String),
    /// An archive cannot be read.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An archive cannot be read.
    #[error("{}", path.display())]
    Archive {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ArchiveError,
    },
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

/// The archives of one principal.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The archives in this folder, which need not exist yet.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where a complete backup is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.{ENDING}"))
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.{PARTIAL}"))
    }

    /// Opens a backup with those that it is built on.
    ///
    /// # Errors
    /// See [`StoreError`]; so for all methods.
    pub fn open(&self, name: &str) -> Result<Chain, StoreError> {
        crate::check::name(name).map_err(|_| StoreError::Missing(name.to_owned()))?;
        let path = self.path(name);
        if !path.exists() {
            return Err(StoreError::Missing(name.to_owned()));
        }
        Ok(Chain::open(path)?)
    }

    /// All archives, complete or not, in the order in which their images were frozen.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn list(&self) -> Result<Vec<BackupInfo>, StoreError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io("read", &self.folder)(error)),
        };
        let mut list = Vec::new();
        for entry in entries {
            let path = entry.map_err(io("read", &self.folder))?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let is_archive = [ENDING, PARTIAL].iter().any(|end| {
                name.strip_suffix(end)
                    .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            });
            if is_archive {
                list.push(info(&path).unwrap_or_else(|error| broken(&path, &error)));
            }
        }
        list.sort_by(|a, b| (a.frozen, &a.name).cmp(&(b.frozen, &b.name)));
        Ok(list)
    }

    /// Begins an archive. There is none of this name, complete or not.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn create(&self, stream: u64, header: &Header) -> Result<Draft, StoreError> {
        let name = &header.plan.name;
        // What is in a guest's files is nobody else's business.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        made.map_err(io("make", &self.folder))?;
        let path = self.partial(name);
        if self.path(name).exists() {
            return Err(StoreError::Exists(name.clone()));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StoreError::OtherPlan(name.clone()));
            }
            opened => opened.map_err(io("make", &path))?,
        };
        lock(&file, name)?;
        let file = WriteBehind::new(file, &path, 0).map_err(io("write", &path))?;
        let writer = ArchiveWriter::begin(file, stream, header).map_err(io("write", &path))?;
        Ok(Draft {
            store: self.clone(),
            name: name.clone(),
            writer,
            open: None,
        })
    }

    /// Goes on with an archive that is not complete, behind its last whole entry; none if there is nothing of it. `seen` gets what is in it
    /// already.
    ///
    /// # Errors
    /// It is of another plan, somebody writes it, or see [`StoreError`].
    pub fn resume(
        &self,
        header: &Header,
        seen: &mut dyn FnMut(Seen<'_>) -> Result<(), String>,
    ) -> Result<Option<Draft>, StoreError> {
        let mut draft = self.resume_within(header, seen)?;
        if let Some(draft) = &mut draft {
            draft.leave_open_entry()?;
        }
        Ok(draft)
    }

    /// The same, within the entry that was being written: see [`Draft::open_entry`].
    ///
    /// # Errors
    /// See [`Self::resume`].
    pub(crate) fn resume_within(
        &self,
        header: &Header,
        seen: &mut dyn FnMut(Seen<'_>) -> Result<(), String>,
    ) -> Result<Option<Draft>, StoreError> {
        let name = &header.plan.name;
        if self.path(name).exists() {
            return Err(StoreError::Exists(name.clone()));
        }
        let path = self.partial(name);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io("open", &path))?,
        };
        lock(&file, name)?;
        let failed = |source| StoreError::Archive {
            path: path.clone(),
            source,
        };
        let mut reader = ArchiveReader::new(ReadAhead::of(&file, &path).map_err(io("read", &path))?);
        let mut found = Found::default();
        loop {
            match reader.read() {
                Ok(Some(Record::Header(has))) if !is_same(&has, header) => {
                    return Err(StoreError::OtherPlan(name.clone()));
                }
                Ok(Some(record)) => match found.of(record) {
                    Place::Between => {
                        found
                            .whole(seen)
                            .map_err(|reason| failed(ArchiveError::Nonsense { number: 0, reason }))?;
                        found.good = Some(reader.state().mark());
                    }
                    Place::Within => found.within = Some(reader.state().mark()),
                    // A crash came before it got its name: its end is written again.
                    Place::End => {}
                },
                Ok(None) => break,
                Err(error) if error.is_unfinished() => break,
                Err(error) => return Err(failed(error)),
            }
        }
        let Some(good) = found.good.take() else {
            // Not even its beginning was written.
            fs::remove_file(&path).map_err(io("delete", &path))?;
            return Ok(None);
        };
        let (mark, open) = match (found.within.take(), found.open.take()) {
            (Some(mark), Some(open)) => (mark, Some((open, good))),
            _ => (good, None),
        };
        file.set_len(mark.position).map_err(io("cut", &path))?;
        let file = WriteBehind::new(file, &path, mark.position).map_err(io("read", &path))?;
        let mut state = reader.into_state();
        state.go_back(mark);
        Ok(Some(Draft {
            store: self.clone(),
            name: name.clone(),
            writer: ArchiveWriter::resume(file, state),
            open,
        }))
    }

    /// Deletes what there is of a backup that is not complete.
    ///
    /// # Errors
    /// There is none, or see [`StoreError`].
    pub fn abandon(&self, name: &str) -> Result<(), StoreError> {
        crate::check::name(name).map_err(|_| StoreError::Missing(name.to_owned()))?;
        let path = self.partial(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::Missing(name.to_owned()));
            }
            opened => opened.map_err(io("open", &path))?,
        };
        lock(&file, name)?;
        fs::remove_file(&path).map_err(io("delete", &path))
    }

    /// Reads a backup and those that it is built on, and checks everything.
    ///
    /// # Errors
    /// Something is not as it was written, or see [`StoreError`].
    pub fn verify(&self, name: &str, tick: &mut dyn FnMut(&Progress)) -> Result<Progress, StoreError> {
        self.open(name)?;
        verify(&self.path(name), tick)
    }
}

/// Reads an archive and those that it is built on, which are beside it, and checks everything.
///
/// # Errors
/// Something is not as it was written, or see [`StoreError`].
pub fn verify(path: &Path, tick: &mut dyn FnMut(&Progress)) -> Result<Progress, StoreError> {
    let mut chain = Chain::open(path.to_owned())?;
    let mut counting = Counting {
        progress: Progress::default(),
        tick,
    };
    chain.read(&mut counting)?;
    let paths: Vec<PathBuf> = chain.paths().skip(1).cloned().collect();
    for path in paths {
        let mut reader = ArchiveReader::new(ReadAhead::open(&path).map_err(io("open", &path))?);
        loop {
            match reader.read() {
                Ok(Some(_)) => (counting.tick)(&counting.progress),
                Ok(None) => break,
                Err(source) => return Err(StoreError::Archive { path, source }),
            }
        }
    }
    Ok(chain.commit().progress)
}

struct Counting<'a> {
    progress: Progress,
    tick: &'a mut dyn FnMut(&Progress),
}

impl Sink for Counting<'_> {
    fn entry(&mut self, _number: u64, _entry: &Entry) -> io::Result<bool> {
        Ok(true)
    }

    fn data(&mut self, _offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.progress.bytes += bytes.len() as u64;
        (self.tick)(&self.progress);
        Ok(())
    }

    fn zeroes(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn end(&mut self, _problem: Option<&str>) -> io::Result<()> {
        self.progress.entries += 1;
        (self.tick)(&self.progress);
        Ok(())
    }
}

/// What is in an archive already.
#[derive(Debug)]
pub enum Seen<'a> {
    /// An entry.
    Entry(&'a Entry),
    /// More extents of it, and whether even more follow.
    Extents(&'a [Extent], bool),
}

/// An entry that has begun in an archive, and has no end there.
#[derive(Debug, Clone)]
pub(crate) struct OpenEntry {
    /// What its first frame says.
    pub(crate) entry: Entry,
    /// Its further extents, in the frames in which they are.
    pub(crate) extents: VecDeque<Vec<Extent>>,
    /// Its content up to this byte is there.
    pub(crate) done: u64,
}

/// Where a record leaves the archive.
enum Place {
    Between,
    Within,
    End,
}

/// What is found in an archive that is not complete.
#[derive(Default)]
struct Found {
    /// Behind the last whole entry.
    good: Option<Mark>,
    /// Behind the last frame of the one that is open.
    within: Option<Mark>,
    open: Option<OpenEntry>,
}

impl Found {
    fn of(&mut self, record: Record<'_>) -> Place {
        let mut add = |end: u64| {
            if let Some(open) = &mut self.open {
                open.done = end;
            }
            Place::Within
        };
        match record {
            Record::Header(_) | Record::EntryEnd(_) => Place::Between,
            Record::Entry(_, entry) => {
                self.open = Some(OpenEntry {
                    entry: *entry,
                    extents: VecDeque::new(),
                    done: 0,
                });
                Place::Within
            }
            Record::Extents(extents) => {
                if let Some(open) = &mut self.open {
                    open.extents.push_back(extents);
                }
                Place::Within
            }
            Record::Data { offset, bytes } => add(offset + bytes.len() as u64),
            Record::Zeroes { offset, length } | Record::InParent { offset, length, .. } => {
                add(offset + length)
            }
            Record::Commit(_) => Place::End,
        }
    }

    /// The open entry is whole, and counts.
    fn whole(&mut self, seen: &mut dyn FnMut(Seen<'_>) -> Result<(), String>) -> Result<(), String> {
        self.within = None;
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        seen(Seen::Entry(&open.entry))?;
        let all = open.extents.len();
        for (number, extents) in open.extents.iter().enumerate() {
            seen(Seen::Extents(extents, number + 1 < all))?;
        }
        Ok(())
    }
}

/// Whether an archive was begun with the same plan, image and parent.
fn is_same(found: &Header, wanted: &Header) -> bool {
    let mut plan = found.plan.clone();
    plan.resume = wanted.plan.resume;
    plan == wanted.plan
        && found.image == wanted.image
        && found.parent == wanted.parent
        && found.principal == wanted.principal
}

fn lock(file: &File, name: &str) -> Result<(), StoreError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(fs::TryLockError::WouldBlock) => Err(StoreError::Busy(name.to_owned())),
        Err(fs::TryLockError::Error(source)) => Err(io("lock", Path::new(name))(source)),
    }
}

/// What an archive is, without reading its content.
///
/// # Errors
/// It cannot be read, or is none.
pub fn info(path: &Path) -> Result<BackupInfo, StoreError> {
    let failed = |source| StoreError::Archive {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io("open", path))?;
    let archive = file.metadata().map_err(io("read", path))?.len();
    let is_partial = path.extension().is_some_and(|ending| ending == "partial");
    let commit = match is_partial {
        true => None,
        false => read_commit(&mut file).map_err(io("read", path))?,
    };
    file.seek(SeekFrom::Start(0)).map_err(io("read", path))?;
    let mut reader = ArchiveReader::new(BufReader::new(file));
    let header = match reader.read().map_err(failed)? {
        Some(Record::Header(header)) => *header,
        _ => return Err(failed(ArchiveError::Incomplete { entries: 0 })),
    };
    let stream = reader.state().stream;
    let commit = commit.filter(|(of, _)| *of == stream).map(|(_, commit)| commit);
    Ok(of(&header, commit.as_ref(), archive))
}

/// One that cannot be read is listed as well.
fn broken(path: &Path, error: &StoreError) -> BackupInfo {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let name = name
        .split_once(&format!(".{ENDING}"))
        .map_or(name, |(name, _)| name);
    BackupInfo {
        name: name.to_owned(),
        parent: None,
        description: format!("cannot be read: {}", crate::chain_of(error)),
        host: String::new(),
        frozen: Time::default(),
        complete: false,
        progress: Progress::default(),
        archive: fs::metadata(path).map_or(0, |data| data.len()),
        digest: String::new(),
    }
}

fn of(header: &Header, commit: Option<&Commit>, archive: u64) -> BackupInfo {
    BackupInfo {
        name: header.plan.name.clone(),
        parent: header.plan.parent.clone(),
        description: header.plan.description.clone(),
        host: header.plan.host.clone(),
        frozen: header.plan.frozen,
        complete: commit.is_some(),
        progress: commit.map(|commit| commit.progress).unwrap_or_default(),
        archive,
        digest: commit.map(|commit| commit.digest.clone()).unwrap_or_default(),
    }
}

/// An archive that is being written. It stays, to be gone on with, if it is not finished.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    name: String,
    /// What writes it.
    pub writer: ArchiveWriter<WriteBehind>,
    /// The entry in which it stands, and where that begins.
    open: Option<(OpenEntry, Mark)>,
}

impl Draft {
    /// What the backup is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many whole entries there are, and the path of the last one.
    pub(crate) fn whole_entries(&self) -> (u64, Option<RawText>) {
        let state = self.writer.state();
        let last = match &self.open {
            Some((_, mark)) => mark.last.clone(),
            None => state.last.clone(),
        };
        (state.progress.entries, last)
    }

    /// The entry in the middle of which the archive was left, if there is one: its content is to be gone on with, and
    /// then it is to be ended ([`Self::go_on_in_open_entry`]); or [`Self::leave_open_entry`] is to be called before anything else is written.
    pub(crate) fn open_entry(&self) -> Option<&OpenEntry> {
        self.open.as_ref().map(|(open, _)| open)
    }

    /// It is gone on with; it cannot be left any more.
    pub(crate) fn go_on_in_open_entry(&mut self) {
        self.open = None;
    }

    /// What there is of the entry in which the archive stands goes.
    pub(crate) fn leave_open_entry(&mut self) -> Result<(), StoreError> {
        let Some((_, mark)) = self.open.take() else {
            return Ok(());
        };
        let path = self.store.partial(&self.name);
        let cut = self.writer.get_mut().cut(mark.position);
        self.writer.go_back(mark);
        cut.map_err(io("cut", &path))
    }

    /// Makes what was written durable, so that one can go on after a crash.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn sync(&mut self) -> Result<(), StoreError> {
        let path = self.store.partial(&self.name);
        self.writer.get_mut().sync().map_err(io("write", &path))
    }

    /// It is complete: it becomes a backup.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn finish(self) -> Result<BackupInfo, StoreError> {
        let Self {
            store, name, writer, ..
        } = self;
        let (partial, path) = (store.partial(&name), store.path(&name));
        let (mut file, _) = writer.commit().map_err(io("write", &partial))?;
        file.sync().map_err(io("write", &partial))?;
        if path.exists() {
            return Err(StoreError::Exists(name));
        }
        fs::rename(&partial, &path).map_err(io("rename", &partial))?;
        // Whoever goes on with it from here on finds that there is one.
        drop(file);
        let folder = File::open(&store.folder).and_then(|folder| folder.sync_all());
        folder.map_err(io("make durable", &store.folder))?;
        info(&path)
    }
}
