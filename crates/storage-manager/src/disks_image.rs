//! Images on the host: opened, read, and made, on a thread that may block.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use api::virtual_disk::{ExportRequest, ImageFormat, TransferRequest, Transferred};
use api::{Problem, ProblemKind};
use block_io::{AlignedBuffer, BlockDevice};
use storage_virtualizer::disk::image::qcow2::{Qcow2, Qcow2Writer, is_qcow2};
use storage_virtualizer::disk::image::{Image, ImageError, ImageWriter, Raw, RawWriter};

use crate::conversation::{Flow, Notice, Reporter, on_worker};
use crate::disks_transfer::{Of, PIECE, PIECES, Piece, broken_off, compare, send_all, thread};
use crate::live::{PoolAt, Side, converse};
use crate::moment::Moment;
use crate::pipe::{Pipe, pipe};
use crate::storage::{Access, Storage};

/// Images that are built on each other, at most.
const MOST_BACKING: usize = 64;

/// A problem of an image.
pub(crate) fn of_image(name: &str, error: &ImageError) -> Problem {
    let kind = match error {
        ImageError::Io { .. } => ProblemKind::Host,
        _ => ProblemKind::Invalid,
    };
    Problem::new(kind, format!("{name}: {}", crate::problem::chain(error))).about(name)
}

fn of_host(what: &str, name: &str, error: &io::Error) -> Problem {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => ProblemKind::NotFound,
        io::ErrorKind::AlreadyExists => ProblemKind::Conflict,
        _ => ProblemKind::Host,
    };
    Problem::new(kind, format!("cannot {what} {name}: {error}")).about(name)
}

/// Opens an image; tells what it is.
pub(crate) fn open(
    name: &str,
    format: Option<ImageFormat>,
    backing: bool,
) -> Result<(Box<dyn Image>, ImageFormat), Problem> {
    open_below(name, format, backing, 0)
}

/// As [`open`], with so many images built on it.
fn open_below(
    name: &str,
    format: Option<ImageFormat>,
    backing: bool,
    depth: usize,
) -> Result<(Box<dyn Image>, ImageFormat), Problem> {
    let mut file = File::open(name).map_err(|error| of_host("open", name, &error))?;
    let data = file.metadata().map_err(|error| of_host("open", name, &error))?;
    if data.is_dir() {
        let detail = format!("{name} is a directory, not an image");
        return Err(Problem::new(ProblemKind::Invalid, detail).about(name));
    }
    let failed = |error| of_image(name, &error);
    let format = match format {
        Some(format) => format,
        None => {
            let mut first = Vec::new();
            let read = file.by_ref().take(4).read_to_end(&mut first);
            read.map_err(|error| of_host("read", name, &error))?;
            match is_qcow2(&first) {
                true => ImageFormat::Qcow2,
                false => ImageFormat::Raw,
            }
        }
    };
    if format == ImageFormat::Raw {
        return Ok((Box::new(Raw::open(file).map_err(failed)?), format));
    }
    let length = file.seek(io::SeekFrom::End(0));
    let length = length.map_err(|error| of_host("find the size of", name, &error))?;
    let mut image = Qcow2::open((file, length)).map_err(failed)?;
    if let Some((below, kind)) = image.backing().map_err(failed)? {
        let opened = open_backing(name, &below, kind.as_deref(), backing, depth)?;
        image.set_backing(opened);
    }
    Ok((Box::new(image), format))
}

/// Opens the image on which another one is built.
fn open_backing(
    name: &str,
    below: &str,
    kind: Option<&str>,
    wanted: bool,
    depth: usize,
) -> Result<Box<dyn Image>, Problem> {
    let refused = |detail: String, remedy: &str| {
        let problem = Problem::new(ProblemKind::Invalid, detail).about(name);
        Err(problem.remedy(remedy))
    };
    if !wanted {
        return refused(
            format!("{name} is built on another image, {below:?}"),
            "use --backing, if you trust it, or put both into one with `qemu-img convert`",
        );
    }
    if depth >= MOST_BACKING {
        return refused(
            format!("{name} is built on more than {MOST_BACKING} images, or on itself"),
            "put them into one with `qemu-img convert`",
        );
    }
    let path = below.strip_prefix("file:").unwrap_or(below);
    let format = match kind {
        None => None,
        Some("raw") => Some(ImageFormat::Raw),
        Some("qcow2") => Some(ImageFormat::Qcow2),
        Some(other) => {
            return refused(
                format!("{name} is built on an image of format {other:?}, which cannot be read here"),
                "put them into one with `qemu-img convert`",
            );
        }
    };
    if path.contains("://") || path.starts_with("json:") || path.starts_with("nbd:") {
        return refused(
            format!("{name} is built on {below:?}, which is no file"),
            "put them into one with `qemu-img convert`",
        );
    }
    let folder = Path::new(name).parent().unwrap_or(Path::new(""));
    let path = folder.join(path);
    let (image, _) = open_below(&path.to_string_lossy(), format, true, depth + 1)?;
    Ok(image)
}

/// Reads all data of an image, as long as `take` wants more.
pub(crate) fn read_all(image: &mut dyn Image, take: &mut dyn FnMut(Piece) -> bool) -> Result<(), ImageError> {
    let mut at = 0;
    while let Some(range) = image.next_data(at)? {
        // Pieces of a disk are written in whole sectors.
        let mut start = (range.start / 512 * 512).max(at);
        while start < range.end {
            let stop = ((start / PIECE + 1) * PIECE)
                .min(range.end.next_multiple_of(512))
                .min(image.size());
            let length = usize::try_from(stop - start).unwrap_or(0);
            let mut buffer = AlignedBuffer::new(length.next_multiple_of(512));
            if let Some(target) = buffer.as_mut_slice().get_mut(..length) {
                image.read(start, target)?;
            }
            let piece = Piece {
                offset: start,
                buffer,
                length,
            };
            if !take(piece) {
                return Ok(());
            }
            start = stop;
        }
        at = start;
    }
    Ok(())
}

/// An image that is being made beside its place, and deleted unless it is finished.
struct Draft {
    part: PathBuf,
    target: PathBuf,
    force: bool,
    done: bool,
}

impl Draft {
    fn new(request: &ExportRequest) -> Result<(Self, File), Problem> {
        let name = &request.image;
        let target = PathBuf::from(name);
        match fs::symlink_metadata(&target) {
            Ok(data) if !data.is_file() => {
                let detail = format!("{name} is there, and is no file that could be replaced");
                return Err(Problem::new(ProblemKind::Conflict, detail).about(name));
            }
            Ok(_) if !request.force => {
                return Err(
                    Problem::new(ProblemKind::Conflict, format!("{name} exists already"))
                        .about(name)
                        .remedy("take another name, or use --force, which replaces it"),
                );
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(of_host("look at", name, &error)),
        }
        let file_name = target
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let part = target.with_file_name(format!(".{file_name}.{}.part", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&part);
        let file = file.map_err(|error| of_host("make", &part.to_string_lossy(), &error))?;
        let draft = Self {
            part,
            target,
            force: request.force,
            done: false,
        };
        Ok((draft, file))
    }

    /// It is whole: it gets its name.
    fn finish(mut self) -> Result<(), Problem> {
        let name = self.target.to_string_lossy().into_owned();
        let named = match self.force {
            true => fs::rename(&self.part, &self.target),
            // Nobody who made a file of that name meanwhile loses it.
            false => rename_new(&self.part, &self.target),
        };
        named.map_err(|error| of_host("make", &name, &error))?;
        self.done = true;
        let folder = match self.target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| of_host("make durable", &name, &error))
    }
}

/// Gives a file a name that nobody has.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let flags = rustix::fs::RenameFlags::NOREPLACE;
    match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, flags) {
        // The file system of the host cannot do that in one step.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !to.exists() => fs::rename(from, to),
        done => done.map_err(io::Error::from),
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.done {
            // There is nobody to tell.
            let _ = fs::remove_file(&self.part);
        }
    }
}

fn writer(file: File, format: ImageFormat, size: u64) -> Result<Box<dyn ImageWriter>, ImageError> {
    Ok(match format {
        ImageFormat::Raw => Box::new(RawWriter::create(file, size)?),
        ImageFormat::Qcow2 => Box::new(Qcow2Writer::create(file, size)?),
    })
}

/// What the task tells the thread.
pub(crate) enum Message {
    /// The disk has so many bytes.
    Size(u64),
    Piece(Piece),
    /// That was all.
    End,
}

/// Makes an image from a disk or a snapshot.
///
/// # Errors
/// The disk or the pool cannot be opened or read, the image cannot be made, or they differ afterwards. Then there is no new image.
pub fn export_disk(
    pool: PoolAt,
    request: ExportRequest,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<Transferred, Problem> {
    let (draft, file) = Draft::new(&request)?;
    let (here, there) = pipe(PIECES);
    let (checks_here, checks) = pipe(PIECES);
    let closers = (here.closer(), checks_here.closer());
    let asked = request.clone();
    let part = draft.part.clone();
    let sink = thread("image", move || take(&asked, file, &part, &there, &checks))?;
    let mut stopped = false;
    let mut notify = |notice: Notice<'_>| {
        let flow = notify(notice);
        if flow == Flow::Stop {
            stopped = true;
            closers.0.close();
            closers.1.close();
        }
        flow
    };
    let asked = request.clone();
    let (done, refused) = match pool {
        PoolAt::Devices(paths) => {
            let done = on_worker(&mut notify, |reporter| async move {
                let storage = Storage::open(&paths, Access::Read).await?;
                let (done, _) = Box::pin(export(&storage, &asked, here, checks_here, &reporter)).await;
                let (mut done, events) = storage.end(done).await?;
                done.events = events;
                Ok(done)
            });
            (done, false)
        }
        PoolAt::Machine(connect) => match connect(&TransferRequest::Export(asked)) {
            Ok(line) => {
                let side = Side {
                    up: None,
                    data: Some(here),
                    checks: Some(checks_here),
                    size: 0,
                };
                converse(line, side, &mut notify)
            }
            Err(problem) => {
                drop((here, checks_here));
                (Err(problem), false)
            }
        },
    };
    let taken = sink.join();
    let taken = taken.unwrap_or_else(|_| {
        Err(Problem::new(
            ProblemKind::Host,
            "the image's thread ended unexpectedly",
        ))
    });
    if stopped {
        return Err(broken_off("exporting", &request.path));
    }
    let (done, taken) = match (done, taken) {
        // It ended because of that.
        (_, Err(problem)) if refused => return Err(problem),
        (done, taken) => (done?, taken),
    };
    taken?;
    draft.finish()?;
    Ok(done)
}

/// Writes what comes; then, if it is wanted, reads it again and compares.
fn take(
    request: &ExportRequest,
    file: File,
    part: &Path,
    from: &Pipe<Message>,
    checks: &Pipe<Piece>,
) -> Result<(), Problem> {
    let name = &request.image;
    let failed = |error| of_image(name, &error);
    let Some(Message::Size(size)) = from.take() else {
        return Ok(());
    };
    let mut writer = writer(file, request.format, size).map_err(failed)?;
    loop {
        match from.take() {
            Some(Message::Piece(piece)) => writer.write(piece.offset, piece.bytes()).map_err(failed)?,
            Some(Message::End) => break,
            // The task has failed, and says why.
            Some(Message::Size(_)) | None => return Ok(()),
        }
    }
    writer.finish().map_err(failed)?;
    drop(writer);
    if !request.verify {
        return Ok(());
    }
    let (mut image, _) = open(&part.to_string_lossy(), Some(request.format), false)?;
    compare(image.as_mut(), checks, name)
}

/// Also tells which disk may have a layer more than it needs.
pub(crate) async fn export(
    storage: &Storage,
    request: &ExportRequest,
    to: Pipe<Message>,
    checks: Pipe<Piece>,
    reporter: &Reporter<Transferred>,
) -> (Result<Transferred, Problem>, Option<String>) {
    storage
        .at_a_moment(&request.path, async |moment| {
            read_out(storage, moment, request, to, checks, reporter).await
        })
        .await
}

async fn read_out(
    storage: &Storage,
    moment: &Moment,
    request: &ExportRequest,
    to: Pipe<Message>,
    checks: Pipe<Piece>,
    reporter: &Reporter<Transferred>,
) -> Result<Transferred, Problem> {
    let (disk, of) = (&*moment.disk, Of::Disk(&moment.path));
    let size = disk.size();
    // Who does not take it any more says why.
    let _ = to.send(Message::Size(size)).await;
    let what = format!("export {}", request.path);
    let data = send_all(storage, of, disk, &Wrap(&to), reporter, &what).await?;
    if reporter.stopped() {
        return Err(broken_off("exporting", &request.path));
    }
    let _ = to.send(Message::End).await;
    drop(to);
    if request.verify {
        let what = format!("verify {}", request.path);
        send_all(storage, of, disk, &checks, reporter, &what).await?;
    }
    if reporter.stopped() {
        return Err(broken_off("exporting", &request.path));
    }
    Ok(Transferred {
        path: request.path.clone(),
        format: Some(request.format),
        size,
        data,
        verified: request.verify,
        events: Vec::new(),
    })
}

/// Pieces as messages.
struct Wrap<'a>(&'a Pipe<Message>);

impl crate::disks_transfer::Taker for Wrap<'_> {
    async fn send(&self, piece: Piece) -> bool {
        self.0.send(Message::Piece(piece)).await.is_ok()
    }
}
