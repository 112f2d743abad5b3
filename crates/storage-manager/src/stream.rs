//! Bytes go into files and come out of them.
//!
//! ```text
//!   write_file:   source ──► thread that may block ──► pipe ──► task ──► file
//!   read_file:    file ──► task ──► pipe ──► thread that may block ──► sink
//! ```

use std::io::{self, Read, Write};
use std::ops::Range;

use api::file::{ReadRequest, WriteRequest, Written};
use api::{Problem, ProblemKind};
use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf, ZeroMode};
use filesys::{CLUSTER, FsError, NewFile, SUB_CLUSTER};

use crate::conversation::{Flow, Notice, Reporter, Work, on_worker};
use crate::device::DevicePaths;
use crate::pipe::{Pipe, pipe};
use crate::problem::{of_file_io, of_files};
use crate::storage::{Access, File, Storage, now};

/// Bytes of a piece; a multiple of [`CLUSTER`].
const PIECE: usize = 1 << 20;
/// Pieces on their way.
const PIECES: usize = 4;
/// Offsets and sizes of requests to files are multiples of this.
const SECTOR: u64 = 512;
const SECTOR_BYTES: usize = 512;
/// A file whose size is not known grows by what it has, within these limits.
const STEPS: Range<u64> = 16 << 20..1 << 30;

/// Some bytes.
struct Piece {
    buffer: AlignedBuffer,
    length: usize,
}

/// Writes what `source` gives to a file.
///
/// # Errors
/// The pool or its file system cannot be opened, the file cannot be written, or the source fails. A file that was made for this is
/// deleted then.
pub fn write_file(
    paths: DevicePaths,
    request: WriteRequest,
    source: impl Read + Send + 'static,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<Written, Problem> {
    let (there, here) = pipe(PIECES);
    let closer = here.closer();
    let thread = std::thread::Builder::new().name("input".into());
    thread.spawn(move || feed(source, &there)).map_err(|error| {
        Problem::new(
            ProblemKind::Host,
            format!("there can be no more threads: {error}"),
        )
    })?;
    let mut notify = |notice: Notice<'_>| {
        let flow = notify(notice);
        if flow == Flow::Stop {
            closer.close();
        }
        flow
    };
    on_worker(&mut notify, |reporter| async move {
        let storage = Storage::open(&paths, Access::Write).await?;
        let done = Box::pin(write(&storage, request, &here, &reporter)).await;
        let (mut written, events) = storage.end(done).await?;
        written.events = events;
        Ok(written)
    })
}

/// Reads pieces until the end, which it tells, or until nobody wants them: a queue that just ends was broken off.
fn feed(mut source: impl Read, to: &Pipe<io::Result<Option<Piece>>>) {
    loop {
        let mut buffer = AlignedBuffer::new(PIECE);
        let (length, error) = fill(&mut source, buffer.as_mut_slice());
        let ended = length < PIECE;
        if length > 0 && to.put(Ok(Some(Piece { buffer, length }))).is_err() {
            return;
        }
        if let Some(error) = error {
            // Without a taker nobody cares.
            let _ = to.put(Err(error));
            return;
        }
        if ended {
            let _ = to.put(Ok(None));
            return;
        }
    }
}

/// Reads until the buffer is full or there is no more.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<io::Error>) {
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match source.read(rest) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (length, Some(error)),
        }
    }
    (length, None)
}

async fn write(
    storage: &Storage,
    request: WriteRequest,
    from: &Pipe<io::Result<Option<Piece>>>,
    reporter: &Reporter<Written>,
) -> Result<Written, Problem> {
    check_multiple("--offset", request.offset.unwrap_or(0))?;
    check_multiple("--size", request.size.unwrap_or(0))?;
    let failed = |error: FsError| of_files(&error);
    let files = storage.files()?;
    let path = request.path.clone();
    let made = make(storage, &request).await?;
    let file = match storage.file(&path, filesys::Access::Write).await {
        Ok(file) => file,
        Err(problem) => return Err(problem),
    };
    let target = FileTarget {
        storage,
        path: &path,
        file,
        fixed: request.size,
        sparse_from: match (made, request.offset) {
            (false, Some(_)) => files.stat(&path).await.map_err(failed)?.size,
            _ => 0,
        },
    };
    let done = target.take_all(&request, made, from, reporter).await;
    drop(target);
    match done {
        Ok((bytes, zeroes)) => {
            let stat = files.stat(&path).await.map_err(failed)?;
            Ok(Written {
                path,
                made,
                bytes,
                zeroes,
                size: stat.size,
                allocated: stat.allocated,
                events: Vec::new(),
            })
        }
        Err(problem) if made => {
            // The first reason is the one that matters.
            let _ = files.delete(&path).await;
            Err(problem)
        }
        Err(problem) => Err(problem),
    }
}

/// Makes the file if it is not there; tells whether it was not.
async fn make(storage: &Storage, request: &WriteRequest) -> Result<bool, Problem> {
    let files = storage.files()?;
    let path = &request.path;
    let failed = |error: FsError| of_files(&error);
    match files.stat(path).await {
        Ok(_) if request.thick => {
            let detail = format!("{path} exists, and --thick is for new files");
            Err(Problem::new(ProblemKind::Invalid, detail)
                .about(path)
                .remedy("delete it first, or leave --thick out"))
        }
        Ok(_) => Ok(false),
        Err(FsError::NotFound { .. }) => {
            let attributes = match request.thick {
                true => Some(filesys::Attributes {
                    thick: true,
                    ..directory_attributes(storage, path).await?
                }),
                false => None,
            };
            let start = request.offset.unwrap_or(0);
            let expected = request.expected.map(|expected| start.saturating_add(expected));
            let size = request.size.or(expected).unwrap_or(0);
            let new = NewFile {
                size: size.checked_next_multiple_of(SECTOR).unwrap_or(size),
                attributes,
                now: now(),
            };
            files.create(path, &new).await.map_err(failed)?;
            Ok(true)
        }
        Err(error) => Err(failed(error)),
    }
}

/// What a file would get where it is made.
async fn directory_attributes(storage: &Storage, path: &str) -> Result<filesys::Attributes, Problem> {
    let directory = path.rsplit_once('/').map_or("/", |(directory, _)| directory);
    let directory = if directory.is_empty() { "/" } else { directory };
    let stat = storage.files()?.stat(directory).await;
    Ok(stat.map_err(|error| of_files(&error))?.attributes)
}

fn check_multiple(option: &str, value: u64) -> Result<(), Problem> {
    if value.is_multiple_of(SECTOR) {
        return Ok(());
    }
    Err(Problem::new(
        ProblemKind::Invalid,
        format!("{option} {value} is not possible: files are written in sectors of {SECTOR} bytes"),
    ))
}

/// A file that is being written.
struct FileTarget<'a> {
    storage: &'a Storage,
    path: &'a str,
    file: File,
    /// It must have this size.
    fixed: Option<u64>,
    /// From here on it reads as zeroes where nothing was written.
    sparse_from: u64,
}

impl FileTarget<'_> {
    async fn take_all(
        &self,
        request: &WriteRequest,
        made: bool,
        from: &Pipe<io::Result<Option<Piece>>>,
        reporter: &Reporter<Written>,
    ) -> Result<(u64, u64), Problem> {
        let start = request.offset.unwrap_or(0);
        if !made && request.offset.is_none() {
            self.resize(0).await?;
        }
        if let Some(size) = request.size {
            self.resize(size).await?;
        }
        let (mut at, mut zeroes) = (start, 0);
        let before = self.file.size();
        loop {
            let Some(piece) = from.receive().await else {
                let detail = format!("writing {} was broken off after {} bytes", self.path, at - start);
                return Err(Problem::new(ProblemKind::Stopping, detail).about(self.path));
            };
            let piece = piece.map_err(|error| {
                Problem::new(ProblemKind::Host, format!("cannot read the input: {error}"))
            })?;
            let Some(piece) = piece else { break };
            let end = at.saturating_add(piece.length as u64);
            self.grow(end).await?;
            zeroes += self.put(at, piece).await?;
            at = end;
            reporter.work(Work {
                what: format!("write {}", self.path),
                done: at - start,
                total: request.expected.unwrap_or(0),
            });
        }
        if request.size.is_none() {
            let keep = if made { 0 } else { before };
            let end = at
                .next_multiple_of(SECTOR)
                .max(if request.offset.is_some() { keep } else { 0 });
            self.cut(end).await?;
        }
        self.file.flush().await.map_err(|error| of_file_io(&error))?;
        Ok((at - start, zeroes))
    }

    async fn resize(&self, size: u64) -> Result<(), Problem> {
        if size == self.file.size() {
            return Ok(());
        }
        let resized = self.storage.files()?.resize(self.path, size).await;
        resized.map_err(|error| of_files(&error))
    }

    /// Sees that the file reaches to `end`; how far it will go in the end is not known.
    async fn grow(&self, end: u64) -> Result<(), Problem> {
        let size = self.file.size();
        if end <= size {
            return Ok(());
        }
        if let Some(fixed) = self.fixed {
            let detail = format!(
                "there is more than the {fixed} bytes that --size gives {}",
                self.path
            );
            return Err(Problem::new(ProblemKind::Invalid, detail).about(self.path));
        }
        let step = size.clamp(STEPS.start, STEPS.end);
        let wanted = end.max(size.saturating_add(step)).min(filesys::MAX_FILE);
        self.resize(wanted.max(end.next_multiple_of(SECTOR))).await
    }

    /// Makes the file as small as it shall be.
    async fn cut(&self, end: u64) -> Result<(), Problem> {
        if end >= self.file.size() {
            return self.resize(end).await;
        }
        // Files shrink to whole sub-clusters: what is lost of the last one is written again.
        let whole = end / SUB_CLUSTER * SUB_CLUSTER;
        let rest = usize::try_from(end - whole).unwrap_or(0);
        let buffer = AlignedBuffer::new(rest.max(1));
        if rest > 0 {
            let memory = memory(&buffer, 0..rest);
            let read = self.file.read(whole, &memory).await;
            read.map_err(|error| of_file_io(&error))?;
        }
        self.resize(whole).await?;
        if rest > 0 {
            self.resize(end).await?;
            let memory = memory(&buffer, 0..rest);
            let written = self.file.write(whole, &memory, Durability::Volatile).await;
            written.map_err(|error| of_file_io(&error))?;
        }
        Ok(())
    }

    /// Writes a piece; tells how much of it were zeroes that needed no data.
    async fn put(&self, at: u64, mut piece: Piece) -> Result<u64, Problem> {
        let failed = |error| of_file_io(&error);
        let end = piece.length.next_multiple_of(SECTOR_BYTES);
        if end > piece.length {
            self.complete(at, &mut piece, end).await?;
        }
        let mut zeroes = 0;
        for (range, is_zero) in runs(piece.buffer.as_slice().get(..end).unwrap_or_default(), at) {
            let (offset, length) = (at + range.start as u64, (range.end - range.start) as u64);
            if !is_zero {
                let memory = memory(&piece.buffer, range);
                let written = self.file.write(offset, &memory, Durability::Volatile).await;
                written.map_err(failed)?;
                continue;
            }
            zeroes += length;
            if offset < self.sparse_from {
                let zeroed = self.file.write_zeroes(offset, length, ZeroMode::MayUnmap).await;
                zeroed.map_err(failed)?;
            }
        }
        Ok(zeroes)
    }

    /// The last sector is not all new: its end stays as it was.
    async fn complete(&self, at: u64, piece: &mut Piece, end: usize) -> Result<(), Problem> {
        let sector = AlignedBuffer::new(SECTOR_BYTES);
        let start = end - SECTOR_BYTES;
        let memory = memory(&sector, 0..SECTOR_BYTES);
        let read = self.file.read(at + start as u64, &memory).await;
        read.map_err(|error| of_file_io(&error))?;
        let old = sector.as_slice().get(piece.length - start..).unwrap_or_default();
        if let Some(tail) = piece.buffer.as_mut_slice().get_mut(piece.length..end) {
            tail.copy_from_slice(old);
        }
        Ok(())
    }
}

/// For a request that is awaited while the buffer is there.
pub(crate) fn memory(buffer: &AlignedBuffer, range: Range<usize>) -> [IoBuf; 1] {
    // SAFETY: all callers keep the buffer, without touching it, until the request has ended.
    [unsafe { buffer.io(range.start, range.end - range.start) }]
}

/// Parts of a piece that goes to `at`, each with whether it is zeroes: whole clusters only, as others save no space.
pub(crate) fn runs(bytes: &[u8], at: u64) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let place = at + start as u64;
        let rest = usize::try_from(CLUSTER - place % CLUSTER).unwrap_or(bytes.len());
        let end = (start + rest).min(bytes.len());
        let part = bytes.get(start..end).unwrap_or_default();
        let is_zero = part.iter().all(|byte| *byte == 0);
        match runs.last_mut() {
            Some((range, before)) if *before == is_zero => range.end = end,
            _ => runs.push((start..end, is_zero)),
        }
        start = end;
    }
    runs
}

/// Gives the bytes of a file to `sink`; tells how many there were. A sink that takes no more is no error.
///
/// # Errors
/// The pool or its file system cannot be opened, the file cannot be read, or the sink fails.
pub fn read_file(
    paths: DevicePaths,
    request: ReadRequest,
    sink: impl Write + Send + 'static,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<u64, Problem> {
    let (here, there) = pipe(PIECES);
    let closer = here.closer();
    let thread = std::thread::Builder::new().name("output".into());
    let thread = thread.spawn(move || drain(sink, &there)).map_err(|error| {
        Problem::new(
            ProblemKind::Host,
            format!("there can be no more threads: {error}"),
        )
    })?;
    let mut stopped = false;
    let mut notify = |notice: Notice<'_>| {
        let flow = notify(notice);
        if flow == Flow::Stop {
            stopped = true;
            closer.close();
        }
        flow
    };
    let path = request.path.clone();
    let count = on_worker(&mut notify, |_| async move {
        let storage = Storage::open(&paths, Access::Read).await?;
        Box::pin(read(&storage, &request, &here)).await
    })?;
    if stopped {
        // Nobody knows whether the sink takes anything any more.
        let detail = format!("reading {path} was broken off");
        return Err(Problem::new(ProblemKind::Stopping, detail).about(path));
    }
    match thread.join() {
        Ok(Ok(())) => Ok(count),
        Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(count),
        Ok(Err(error)) => Err(Problem::new(
            ProblemKind::Host,
            format!("cannot write the output: {error}"),
        )),
        Err(_) => Err(Problem::new(
            ProblemKind::Host,
            "the output's thread ended unexpectedly",
        )),
    }
}

fn drain(mut sink: impl Write, from: &Pipe<(AlignedBuffer, Range<usize>)>) -> io::Result<()> {
    while let Some((buffer, range)) = from.take() {
        sink.write_all(buffer.as_slice().get(range).unwrap_or_default())?;
    }
    sink.flush()
}

async fn read(
    storage: &Storage,
    request: &ReadRequest,
    to: &Pipe<(AlignedBuffer, Range<usize>)>,
) -> Result<u64, Problem> {
    let file = storage.file(&request.path, filesys::Access::Read).await?;
    let size = file.size();
    if request.offset > size {
        let detail = format!(
            "{} has {size} bytes, so there is no offset {}",
            request.path, request.offset
        );
        return Err(Problem::new(ProblemKind::Invalid, detail).about(&request.path));
    }
    let length = request.length.unwrap_or(u64::MAX).min(size - request.offset);
    let end = request.offset + length;
    let mut at = request.offset;
    while at < end {
        let first = at / SECTOR * SECTOR;
        let stop = (first / PIECE as u64 + 1) * PIECE as u64;
        let stop = stop.min(end.next_multiple_of(SECTOR));
        let length = usize::try_from(stop - first).unwrap_or(0);
        let buffer = AlignedBuffer::new(length);
        let read = file.read(first, &memory(&buffer, 0..length)).await;
        read.map_err(|error| of_file_io(&error))?;
        let next = stop.min(end);
        let range = usize::try_from(at - first).unwrap_or(0)..usize::try_from(next - first).unwrap_or(0);
        if to.send((buffer, range)).await.is_err() {
            break;
        }
        at = next;
    }
    Ok(at - request.offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_zeroes_only_in_whole_clusters() {
        let cluster = usize::try_from(CLUSTER).unwrap();
        let mut bytes = vec![0; 4 * cluster];
        bytes[cluster + 5] = 1;
        let found = runs(&bytes, 0);
        assert_eq!(
            found,
            [
                (0..cluster, true),
                (cluster..2 * cluster, false),
                (2 * cluster..4 * cluster, true)
            ]
        );
        // In the middle of a cluster, the first part is as long as that cluster's rest.
        let found = runs(&bytes, CLUSTER - 512);
        assert_eq!(found[0], (0..512 + cluster - cluster, true));
    }

    #[test]
    fn a_buffer_is_filled_from_several_reads() {
        let mut source = io::Read::chain(&b"abc"[..], &b"defg"[..]);
        let mut buffer = [0; 5];
        assert_eq!(fill(&mut source, &mut buffer).0, 5);
        assert_eq!(&buffer, b"abcde");
        assert_eq!(fill(&mut source, &mut buffer).0, 2);
    }
}
