//! The side of the process that has the pool open.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use api::virtual_disk::TransferRequest;
use api::{Problem, ProblemKind, Transfer};
use block_io::WorkerHandle;
use storage_virtualizer::disk::DiskPath;

use super::frame::{Frame, Order, nonsense};
use crate::conversation::{Flow, Notice, TICK, on_handle};
use crate::disks::failed;
use crate::disks_image::Message;
use crate::disks_transfer::{PIECES, Piece, thread};
use crate::hosted::{self, Ends};
use crate::pipe::{Closer, Pipe, pipe};

/// The transfers that are under way. They are broken off before the pool is closed.
#[derive(Debug, Default, Clone)]
pub(crate) struct Transfers(Arc<Mutex<UnderWay>>);

#[derive(Debug, Default)]
struct UnderWay {
    closed: bool,
    next: u64,
    lines: BTreeMap<u64, UnixStream>,
}

impl Transfers {
    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Breaks off all, and there are no more.
    pub(crate) fn close(&self) {
        let mut under_way = self.lock();
        under_way.closed = true;
        for line in under_way.lines.values() {
            // What is told in the other direction may still arrive. It may have ended by itself.
            let _ = line.shutdown(Shutdown::Read);
        }
    }

    /// None if there are no more.
    fn enter(&self, line: &UnixStream) -> io::Result<Option<Entered>> {
        let line = line.try_clone()?;
        let mut under_way = self.lock();
        if under_way.closed {
            return Ok(None);
        }
        let number = under_way.next;
        under_way.next += 1;
        under_way.lines.insert(number, line);
        Ok(Some(Entered(self.clone(), number)))
    }
}

struct Entered(Transfers, u64);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.lock().lines.remove(&self.1);
    }
}

/// What serves a connection. See [`api::Vm::transfer`].
pub(crate) fn transfer(
    worker: WorkerHandle,
    transfers: Transfers,
    request: TransferRequest,
) -> Result<Transfer, Problem> {
    let path = match &request {
        TransferRequest::Import(import) => &import.path,
        TransferRequest::Export(export) => &export.path,
        TransferRequest::Copy(copy) => &copy.path,
        TransferRequest::Read(read) => &read.path,
    };
    DiskPath::with_snapshot(path).map_err(failed)?;
    let size = match &request {
        TransferRequest::Import(import) => import
            .size
            .ok_or_else(|| Problem::new(ProblemKind::Invalid, "the size of the image is not given"))?,
        _ => 0,
    };
    Ok(Box::new(move |line| {
        if let Err(error) = serve(&worker, &transfers, request, size, &line) {
            tracing::debug!(%error, "a transfer could not be served");
        }
    }))
}

fn serve(
    worker: &WorkerHandle,
    transfers: &Transfers,
    request: TransferRequest,
    size: u64,
    line: &UnixStream,
) -> io::Result<()> {
    let Some(_entered) = transfers.enter(line)? else {
        return Ok(());
    };
    let to = Arc::new(Mutex::new(line.try_clone()?));
    let stop = Arc::new(AtomicBool::new(false));
    let (up_there, up_here) = pipe(PIECES);
    let (data_here, data_there) = pipe(PIECES);
    let (checks_here, checks_there) = pipe(PIECES);
    let hearing = Hearing {
        line: line.try_clone()?,
        to: up_there,
        order: Order::new(size),
        stop: Arc::clone(&stop),
        closers: (data_here.closer(), checks_here.closer()),
    };
    let heard = thread("transfer-in", move || hearing.run()).map_err(io::Error::other)?;
    let told = Arc::clone(&to);
    let telling = thread("transfer-out", move || tell(&told, data_there, checks_there));
    let telling = telling.map_err(io::Error::other)?;

    let mut last = Instant::now();
    let mut notify = |notice: Notice<'_>| {
        if let Notice::Work(work) = notice
            && last.elapsed() >= TICK
        {
            last = Instant::now();
            // Who is not there is noticed by the thread that hears.
            let _ = send(&to, &Frame::Work(work.clone()));
        }
        Flow::GoOn
    };
    let ends = Ends {
        size,
        up: up_here,
        data: data_here,
        checks: checks_here,
    };
    let done = on_handle(worker, &stop, &mut notify, move |reporter| {
        hosted::move_data(request, ends, reporter)
    });
    // All pieces are there before the last word.
    let _ = telling.join();
    let said = send(&to, &Frame::Done(Box::new(done)));
    // It may have ended by itself.
    let _ = line.shutdown(Shutdown::Both);
    let _ = heard.join();
    said
}

fn send(to: &Mutex<UnixStream>, frame: &Frame) -> io::Result<()> {
    let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
    frame.write(&mut *to)
}

/// Sends pieces. What is not taken is not sent: then the task finds that nobody wants more.
fn tell(to: &Mutex<UnixStream>, data: Pipe<Message>, checks: Pipe<Piece>) {
    while let Some(message) = data.take() {
        let frame = match message {
            Message::Size(size) => Frame::Size(size),
            Message::Piece(piece) => Frame::Piece(piece),
            Message::End => Frame::End,
        };
        if send(to, &frame).is_err() {
            return;
        }
    }
    drop(data);
    while let Some(piece) = checks.take() {
        if send(to, &Frame::Piece(piece)).is_err() {
            return;
        }
    }
    // If it does not arrive, nothing else does.
    let _ = send(to, &Frame::End);
}

/// What comes in.
struct Hearing {
    line: UnixStream,
    to: Pipe<Result<Option<Piece>, Problem>>,
    order: Order,
    stop: Arc<AtomicBool>,
    closers: (Closer<Message>, Closer<Piece>),
}

impl Hearing {
    /// Until the other side ends, or breaks off.
    fn run(mut self) {
        let end = loop {
            match Frame::read(&mut self.line) {
                // If the task has ended, the last word is on its way.
                Ok(Some(frame)) => match self.item(frame) {
                    Ok(item) => drop(self.to.put(item)),
                    Err(error) => break Err::<(), _>(error),
                },
                Ok(None) => break Ok(()),
                // It went away in the middle of a frame.
                Err(error) if error.kind() != io::ErrorKind::InvalidData => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = end {
            let problem = Problem::new(ProblemKind::Invalid, error.to_string());
            let _ = self.to.put(Err(problem));
        }
        self.stop.store(true, Ordering::Relaxed);
        self.closers.0.close();
        self.closers.1.close();
    }

    fn item(&mut self, frame: Frame) -> io::Result<Result<Option<Piece>, Problem>> {
        match frame {
            Frame::Piece(piece) => {
                self.order.check(&piece)?;
                Ok(Ok(Some(piece)))
            }
            Frame::End => Ok(Ok(None)),
            Frame::Problem(problem) => Ok(Err(*problem)),
            Frame::Size(_) | Frame::Work(_) | Frame::Done(_) => {
                Err(nonsense("a frame that is not its to send"))
            }
        }
    }
}
