//! Images become disks, disks become images, disks are copied.
//!
//! ```text
//!   import:   image ──► thread that may block ──► pipe ──► task ──► /vm/root.dsk.part, at the end /vm/root.dsk
//!   export:   disk ──► task ──► pipe ──► thread that may block ──► .image.PID.part, at the end the image
//!   verify:   disk ──► task ──► pipe ──► thread that may block, which reads the image and compares
//! ```
//!
//! Nothing is half-done: what is made has another name until it is whole.

use std::ops::Range;

use api::virtual_disk::{CopyRequest, ImportRequest, TransferRequest, Transferred};
use api::{Problem, ProblemKind};
use block_io::{AlignedBuffer, BlockDevice, Durability};
use filesys::{FsError, NewFile, RangeKind};
use storage_virtualizer::disk::DiskPath;
use storage_virtualizer::disk::image::{Image, difference, first_non_zero};

use crate::conversation::{Flow, Notice, Reporter, Work, on_worker};
use crate::disks::{attributes_at, failed};
use crate::disks_image::{self as host, of_image};
use crate::live::{PoolAt, Side, converse};
use crate::moment::Moment;
use crate::pipe::{Pipe, pipe};
use crate::problem::{of_file_io, of_files};
use crate::storage::{Access, File, Storage, now};
use crate::stream::{memory, runs};

/// Bytes of a piece.
pub(crate) const PIECE: u64 = 1 << 20;
/// Pieces on their way.
pub(crate) const PIECES: usize = 4;
const SECTOR: u64 = 512;
/// Ranges of a map that are asked for at once.
const RANGES: usize = 4096;

/// Some bytes of a disk.
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) buffer: AlignedBuffer,
    pub(crate) length: usize,
}

impl Piece {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.as_slice().get(..self.length).unwrap_or_default()
    }
}

/// Starts a thread that may block.
pub(crate) fn thread<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>, Problem> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map_err(|error| {
        Problem::new(
            ProblemKind::Host,
            format!("there can be no more threads: {error}"),
        )
    })
}

/// A disk that is being made under another name.
struct Draft<'a> {
    storage: &'a Storage,
    path: DiskPath,
    part: String,
    file: Option<File>,
}

impl<'a> Draft<'a> {
    /// Of `size` bytes. What an earlier one has left is deleted.
    async fn new(storage: &'a Storage, path: &str, size: u64, thick: bool) -> Result<Self, Problem> {
        let path = DiskPath::new(path).map_err(failed)?;
        let part = format!("{path}.part");
        let files = storage.files()?;
        let disks = storage.disks()?;
        disks.check_free(&path).await.map_err(failed)?;
        match files.delete(&part).await {
            Ok(()) | Err(FsError::NotFound { .. }) => {}
            Err(error) => return Err(of_files(&error)),
        }
        let changes = api::file::AttributeChanges {
            thick: thick.then_some(true),
            ..Default::default()
        };
        let new = NewFile {
            size: size.checked_next_multiple_of(SECTOR).unwrap_or(size),
            attributes: attributes_at(storage, path.as_str(), &changes).await?,
            now: now(),
        };
        let made = files.create(&part, &new).await;
        made.map_err(|error| rename_in(of_files(&error), &part, path.as_str()))?;
        let file = match storage.file(&part, filesys::Access::Write).await {
            Ok(file) => file,
            Err(problem) => {
                // The first reason is the one that matters.
                let _ = files.delete(&part).await;
                return Err(problem);
            }
        };
        Ok(Self {
            storage,
            path,
            part,
            file: Some(file),
        })
    }

    fn file(&self) -> Result<&File, Problem> {
        let closed = || Problem::new(ProblemKind::Host, "the new disk is closed already");
        self.file.as_ref().ok_or_else(closed)
    }

    /// Writes a piece; tells how much of it was other than zeroes. The file has only zeroes there.
    async fn put(&self, piece: &mut Piece) -> Result<u64, Problem> {
        // A last sector that is not whole is filled up.
        let whole = piece.length.next_multiple_of(512);
        if let Some(tail) = piece.buffer.as_mut_slice().get_mut(piece.length..whole) {
            tail.fill(0);
        }
        let mut data = 0;
        let bytes = piece.buffer.as_slice().get(..whole).unwrap_or_default();
        for (range, is_zero) in runs(bytes, piece.offset) {
            if is_zero {
                continue;
            }
            data += (range.end - range.start) as u64;
            let place = piece.offset + range.start as u64;
            let memory = memory(&piece.buffer, range);
            let written = self.file()?.write(place, &memory, Durability::Volatile).await;
            written.map_err(|error| self.renamed(of_file_io(&error)))?;
        }
        Ok(data)
    }

    /// It is whole: it gets its name.
    async fn finish(&mut self) -> Result<(), Problem> {
        let flushed = self.file()?.flush().await;
        flushed.map_err(|error| self.renamed(of_file_io(&error)))?;
        self.file = None;
        let named = self.storage.files()?.rename(&self.part, self.path.as_str()).await;
        named.map_err(|error| of_files(&error))
    }

    /// Tells what was made of so many bytes of data; if that failed, nothing is left of it.
    async fn end(
        mut self,
        made: Result<u64, Problem>,
        path: &str,
        size: u64,
        verified: bool,
    ) -> Result<Transferred, Problem> {
        match made {
            Ok(data) => Ok(Transferred {
                path: path.to_owned(),
                format: None,
                size,
                data,
                verified,
                events: Vec::new(),
            }),
            Err(problem) => {
                self.file = None;
                if let Ok(files) = self.storage.files() {
                    // The first reason is the one that matters.
                    let _ = files.delete(&self.part).await;
                }
                Err(problem)
            }
        }
    }

    fn renamed(&self, problem: Problem) -> Problem {
        rename_in(problem, &self.part, self.path.as_str())
    }
}

/// People know the disk by the name that it will have.
fn rename_in(mut problem: Problem, part: &str, path: &str) -> Problem {
    problem.detail = problem.detail.replace(part, path);
    problem.object = problem.object.map(|object| object.replace(part, path));
    problem
}

pub(crate) fn broken_off(what: &str, path: &str) -> Problem {
    Problem::new(
        ProblemKind::Stopping,
        format!("{what} {path} was broken off; nothing is left of it"),
    )
    .about(path)
}

/// Makes a disk from an image.
///
/// # Errors
/// The image or the pool cannot be opened or read, the disk cannot be made, or they differ afterwards. Then there is no new disk.
pub fn import_disk(
    pool: PoolAt,
    mut request: ImportRequest,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<Transferred, Problem> {
    let (image, format) = host::open(&request.image, request.format, request.backing)?;
    let image_size = image.size();
    let size = request.size.unwrap_or(image_size);
    if size < image_size {
        let detail = format!(
            "{} has {image_size} bytes, more than the {size} of --size",
            request.image
        );
        return Err(Problem::new(ProblemKind::Invalid, detail).about(&request.image));
    }
    request.size = Some(size);
    let (there, here) = pipe(PIECES);
    let (to_check, checks) = pipe(PIECES);
    let closers = (here.closer(), to_check.closer());
    let verify = request.verify;
    let name = request.image.clone();
    let feeder = thread("image", move || feed(image, &there, &checks, verify, &name))?;
    let mut notify = |notice: Notice<'_>| {
        let flow = notify(notice);
        if flow == Flow::Stop {
            closers.0.close();
            closers.1.close();
        }
        flow
    };
    let done = match pool {
        PoolAt::Devices(paths) => on_worker(&mut notify, move |reporter| async move {
            let storage = Storage::open(&paths, Access::Write).await?;
            let done = Box::pin(import(&storage, &request, size, &here, to_check, &reporter)).await;
            // The thread must not wait for a task that is gone.
            drop(here);
            let (mut done, events) = storage.end(done).await?;
            done.events = events;
            Ok(done)
        }),
        PoolAt::Machine(connect) => {
            let line = connect(&TransferRequest::Import(request))?;
            let side = Side {
                up: Some(here),
                data: None,
                checks: Some(to_check),
                size,
            };
            converse(line, side, &mut notify).0
        }
    };
    drop(feeder);
    done.map(|mut done| {
        done.format = Some(format);
        done
    })
}

/// Reads all data of an image; then, if it is wanted, compares what the disk has with it.
fn feed(
    mut image: Box<dyn Image>,
    to: &Pipe<Result<Option<Piece>, Problem>>,
    checks: &Pipe<Piece>,
    verify: bool,
    name: &str,
) {
    let read = host::read_all(image.as_mut(), &mut |piece| to.put(Ok(Some(piece))).is_ok());
    let last = match read {
        Ok(()) => Ok(None),
        Err(error) => Err(of_image(name, &error)),
    };
    let ended = last.is_err();
    if to.put(last).is_err() || ended || !verify {
        return;
    }
    let compared = compare(image.as_mut(), checks, name);
    // Without a taker nobody cares.
    let _ = to.put(compared.map(|()| None));
}

/// Compares what comes, in order of the disk, with an image.
pub(crate) fn compare(image: &mut dyn Image, from: &Pipe<Piece>, name: &str) -> Result<(), Problem> {
    let failed = |error| of_image(name, &error);
    let mut at = 0;
    while let Some(piece) = from.take() {
        let differ = difference(image, at, piece.offset, piece.bytes()).map_err(failed)?;
        if let Some(place) = differ {
            return Err(differs(name, place));
        }
        at = piece.offset + piece.length as u64;
    }
    let size = image.size();
    match first_non_zero(image, at, size).map_err(failed)? {
        Some(place) => Err(differs(name, place)),
        None => Ok(()),
    }
}

fn differs(name: &str, place: u64) -> Problem {
    Problem::new(
        ProblemKind::Host,
        format!("the disk and {name} differ at offset {place}"),
    )
    .about(name)
    .remedy("see whether somebody else writes to it, then do it again")
}

pub(crate) async fn import(
    storage: &Storage,
    request: &ImportRequest,
    size: u64,
    from: &Pipe<Result<Option<Piece>, Problem>>,
    checks: Pipe<Piece>,
    reporter: &Reporter<Transferred>,
) -> Result<Transferred, Problem> {
    let mut draft = Draft::new(storage, &request.path, size, request.thick).await?;
    let filled = fill(&mut draft, request, size, from, checks, reporter).await;
    draft.end(filled, &request.path, size, request.verify).await
}

async fn fill(
    draft: &mut Draft<'_>,
    request: &ImportRequest,
    size: u64,
    from: &Pipe<Result<Option<Piece>, Problem>>,
    checks: Pipe<Piece>,
    reporter: &Reporter<Transferred>,
) -> Result<u64, Problem> {
    let stopped = || broken_off("importing", &request.path);
    let mut data = 0;
    loop {
        let Some(piece) = from.receive().await else {
            return Err(stopped());
        };
        let Some(mut piece) = piece? else { break };
        if reporter.stopped() {
            return Err(stopped());
        }
        data += draft.put(&mut piece).await?;
        reporter.work(Work {
            what: format!("import {}", request.path),
            done: piece.offset + piece.length as u64,
            total: size,
        });
    }
    if request.verify {
        draft.file()?.flush().await.map_err(|error| of_file_io(&error))?;
        let part = draft.part.clone();
        let what = format!("verify {}", request.path);
        send_all(
            draft.storage,
            Of::File(&part),
            draft.file()?,
            &checks,
            reporter,
            &what,
        )
        .await?;
        drop(checks);
        match from.receive().await {
            Some(compared) => compared.map(drop)?,
            None => return Err(stopped()),
        }
    }
    if reporter.stopped() {
        return Err(stopped());
    }
    draft.finish().await?;
    Ok(data)
}

/// What is read.
#[derive(Clone, Copy)]
pub(crate) enum Of<'a> {
    /// A file by its path.
    File(&'a str),
    /// A disk or a snapshot by its path.
    Disk(&'a str),
}

/// Who takes pieces of a disk.
pub(crate) trait Taker {
    /// Whether more is wanted.
    async fn send(&self, piece: Piece) -> bool;
}

impl Taker for Pipe<Piece> {
    async fn send(&self, piece: Piece) -> bool {
        Pipe::send(self, piece).await.is_ok()
    }
}

/// Sends all data of a disk, in order. Who takes them may have enough before the end.
pub(crate) async fn send_all<D: BlockDevice, T>(
    storage: &Storage,
    of: Of<'_>,
    disk: &D,
    to: &impl Taker,
    reporter: &Reporter<T>,
    what: &str,
) -> Result<u64, Problem> {
    let size = disk.size();
    let mut sent = 0;
    let mut pieces = Pieces::new(storage, of, size);
    while let Some(range) = pieces.next().await? {
        let piece = read_piece(disk, range.clone()).await?;
        sent += range.end - range.start;
        if reporter.stopped() || !to.send(piece).await {
            break;
        }
        reporter.work(Work {
            what: what.to_owned(),
            done: range.end,
            total: size,
        });
    }
    Ok(sent)
}

pub(crate) async fn read_piece<D: BlockDevice>(disk: &D, range: Range<u64>) -> Result<Piece, Problem> {
    let length = usize::try_from(range.end - range.start).unwrap_or(0);
    let buffer = AlignedBuffer::new(length);
    let read = disk.read(range.start, &memory(&buffer, 0..length)).await;
    read.map_err(|error| of_file_io(&error))?;
    Ok(Piece {
        offset: range.start,
        buffer,
        length,
    })
}

/// The ranges of a disk that have data, none longer than a piece.
struct Pieces<'a> {
    storage: &'a Storage,
    of: Of<'a>,
    size: u64,
    found: std::collections::VecDeque<Range<u64>>,
    next: Option<u64>,
}

impl<'a> Pieces<'a> {
    fn new(storage: &'a Storage, of: Of<'a>, size: u64) -> Self {
        Self {
            storage,
            of,
            size,
            found: Default::default(),
            next: Some(0),
        }
    }

    async fn next(&mut self) -> Result<Option<Range<u64>>, Problem> {
        loop {
            if let Some(range) = self.found.pop_front() {
                let end = range.end.min((range.start / PIECE + 1) * PIECE);
                if end < range.end {
                    self.found.push_front(end..range.end);
                }
                return Ok(Some(range.start..end));
            }
            let Some(from) = self.next else { return Ok(None) };
            let (ranges, next) = match self.of {
                Of::File(path) => {
                    let map = self.storage.files()?.map(path, from, RANGES).await;
                    map.map_err(|error| of_files(&error))?
                }
                Of::Disk(path) => self
                    .storage
                    .disks()?
                    .map(path, from, RANGES)
                    .await
                    .map_err(failed)?,
            };
            self.next = next;
            let data = ranges.into_iter().filter(|range| range.kind == RangeKind::Data);
            let size = self.size;
            let data = data.map(|range| range.offset..(range.offset + range.length).min(size));
            self.found.extend(data.filter(|range| range.start < range.end));
        }
    }
}

/// Copies a disk or a snapshot.
///
/// # Errors
/// There is none, it cannot be read now, the new name is taken, or there is no space. Then there is no new disk.
pub fn copy_disk(
    pool: PoolAt,
    request: CopyRequest,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<Transferred, Problem> {
    match pool {
        PoolAt::Devices(paths) => on_worker(notify, |reporter| async move {
            let storage = Storage::open(&paths, Access::Write).await?;
            let (done, _) = Box::pin(copy(&storage, &request, &reporter)).await;
            let (mut done, events) = storage.end(done).await?;
            done.events = events;
            Ok(done)
        }),
        PoolAt::Machine(connect) => {
            let line = connect(&TransferRequest::Copy(request))?;
            let side = Side {
                up: None,
                data: None,
                checks: None,
                size: 0,
            };
            converse(line, side, notify).0
        }
    }
}

/// Also tells which disk may have a layer more than it needs.
pub(crate) async fn copy(
    storage: &Storage,
    request: &CopyRequest,
    reporter: &Reporter<Transferred>,
) -> (Result<Transferred, Problem>, Option<String>) {
    storage
        .at_a_moment(&request.path, async |moment| {
            let size = moment.disk.size();
            let mut draft = Draft::new(storage, &request.to, size, request.thick).await?;
            let copied = copy_data(storage, moment, &mut draft, request, reporter).await;
            draft.end(copied, &request.to, size, request.verify).await
        })
        .await
}

async fn copy_data(
    storage: &Storage,
    moment: &Moment,
    draft: &mut Draft<'_>,
    request: &CopyRequest,
    reporter: &Reporter<Transferred>,
) -> Result<u64, Problem> {
    let disk = &*moment.disk;
    let size = disk.size();
    let mut data = 0;
    for verify in [false, true] {
        if verify && !request.verify {
            continue;
        }
        let mut pieces = Pieces::new(storage, Of::Disk(&moment.path), size);
        while let Some(range) = pieces.next().await? {
            if reporter.stopped() {
                return Err(broken_off("copying", &request.to));
            }
            let mut piece = read_piece(disk, range.clone()).await?;
            if verify {
                let copied = read_piece(draft.file()?, range.clone()).await?;
                if copied.bytes() != piece.bytes() {
                    return Err(differs(&request.path, range.start));
                }
            } else {
                data += draft.put(&mut piece).await?;
            }
            reporter.work(Work {
                what: format!("{} {}", if verify { "verify" } else { "copy" }, request.to),
                done: range.end,
                total: size,
            });
        }
    }
    draft.finish().await?;
    Ok(data)
}
