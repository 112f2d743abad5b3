//! The side of who asks.

use std::io::{self, Cursor, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError};

use api::virtual_disk::{TransferRequest, Transferred};
use api::{Problem, ProblemKind};

use super::frame::{Frame, Order, nonsense};
use crate::conversation::{Flow, Notice, TICK, Work};
use crate::device::DevicePaths;
use crate::disks_image::Message;
use crate::disks_transfer::{Piece, thread};
use crate::pipe::Pipe;

/// Makes the connection to a machine, which has agreed to the request.
pub type Connect = Box<dyn FnOnce(&TransferRequest) -> Result<Line, Problem>>;

/// Where a pool is.
pub enum PoolAt {
    /// Nobody has it open: these are its devices.
    Devices(DevicePaths),
    /// A machine that runs has it open.
    Machine(Connect),
}

/// A connection to the process that has the pool open.
#[derive(Debug)]
pub struct Line {
    /// What has arrived already.
    pub early: Vec<u8>,
    /// The rest; blocking.
    pub stream: UnixStream,
}

/// The pipes that the connection stands in for.
pub(crate) struct Side {
    /// What goes to the pool.
    pub(crate) up: Option<Pipe<Result<Option<Piece>, Problem>>>,
    /// What comes out of it.
    pub(crate) data: Option<Pipe<Message>>,
    /// What comes out of it to be compared.
    pub(crate) checks: Option<Pipe<Piece>>,
    /// Bytes of the disk, if that is known.
    pub(crate) size: u64,
}

enum Told {
    Work(Work),
    /// The last word.
    Done(Box<Result<Transferred, Problem>>),
    /// The image takes no more.
    Refused,
    Broken(Option<io::Error>),
}

/// Waits until the data are moved, and tells how that gets on. Also tells whether this side did not take them.
pub(crate) fn converse(
    line: Line,
    side: Side,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> (Result<Transferred, Problem>, bool) {
    let mut refused = false;
    let done = exchange(line, side, notify, &mut refused);
    (done, refused)
}

fn exchange(
    line: Line,
    side: Side,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
    refused: &mut bool,
) -> Result<Transferred, Problem> {
    let broken = |error: io::Error| Problem::new(ProblemKind::Host, error.to_string());
    let Line { early, stream } = line;
    let (sender, receiver) = mpsc::channel();
    let from = stream.try_clone().map_err(broken)?;
    let listener = Listener {
        data: side.data,
        checks: side.checks,
        order: Order::new(side.size),
        sender,
    };
    // They end with the connection.
    drop(thread("transfer-in", move || {
        listener.run(&mut Cursor::new(early).chain(from));
    })?);
    if let Some(up) = side.up {
        let mut to = stream.try_clone().map_err(broken)?;
        drop(thread("transfer-out", move || speak(&mut to, &up))?);
    }
    loop {
        let flow = match receiver.recv_timeout(TICK) {
            Ok(Told::Done(done)) => {
                let _ = stream.shutdown(Shutdown::Both);
                return *done;
            }
            Ok(Told::Work(work)) => notify(Notice::Work(&work)),
            Ok(Told::Refused) => {
                *refused = true;
                Flow::Stop
            }
            Ok(Told::Broken(Some(error))) => return Err(broken(error)),
            Err(RecvTimeoutError::Timeout) => notify(Notice::Tick),
            Ok(Told::Broken(None)) | Err(RecvTimeoutError::Disconnected) => {
                let detail = "the machine ended in the middle of it; nothing of it is left";
                return Err(Problem::new(ProblemKind::Stopping, detail));
            }
        };
        if flow == Flow::Stop {
            // The other side breaks off, and says so. It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}

fn speak(to: &mut UnixStream, up: &Pipe<Result<Option<Piece>, Problem>>) {
    while let Some(item) = up.take() {
        let frame = match item {
            Ok(Some(piece)) => Frame::Piece(piece),
            Ok(None) => Frame::End,
            Err(problem) => Frame::Problem(Box::new(problem)),
        };
        if frame.write(to).is_err() {
            // The other side has ended; why is told in the other direction.
            return;
        }
    }
}

struct Listener {
    data: Option<Pipe<Message>>,
    checks: Option<Pipe<Piece>>,
    order: Order,
    sender: mpsc::Sender<Told>,
}

impl Listener {
    fn run(mut self, from: &mut impl Read) {
        let last = loop {
            match Frame::read(from) {
                Ok(Some(Frame::Done(done))) => break Told::Done(done),
                Ok(Some(frame)) => {
                    if let Err(error) = self.frame(frame) {
                        break Told::Broken(Some(error));
                    }
                }
                Ok(None) => break Told::Broken(None),
                Err(error) => match error.kind() {
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                        break Told::Broken(None);
                    }
                    _ => break Told::Broken(Some(error)),
                },
            }
        };
        // Who asked waits for it, or has ended.
        let _ = self.sender.send(last);
    }

    fn frame(&mut self, frame: Frame) -> io::Result<()> {
        match frame {
            Frame::Size(size) => {
                self.order = Order::new(size);
                self.put(Message::Size(size));
            }
            Frame::Piece(piece) => {
                self.order.check(&piece)?;
                match (&self.data, &self.checks) {
                    (Some(_), _) => self.put(Message::Piece(piece)),
                    // Who compares says by itself that they differ.
                    (None, Some(checks)) => drop(checks.put(piece)),
                    (None, None) => return Err(nonsense("more than all pieces")),
                }
            }
            Frame::End => {
                self.order.again();
                match self.data.is_some() {
                    true => {
                        self.put(Message::End);
                        self.data = None;
                    }
                    false => self.checks = None,
                }
            }
            Frame::Work(work) => drop(self.sender.send(Told::Work(work))),
            Frame::Done(_) | Frame::Problem(_) => return Err(nonsense("a frame that is not its to send")),
        }
        Ok(())
    }

    fn put(&self, message: Message) {
        if let Some(data) = &self.data
            && data.put(message).is_err()
        {
            drop(self.sender.send(Told::Refused));
        }
    }
}
