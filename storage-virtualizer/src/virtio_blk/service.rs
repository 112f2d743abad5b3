//! The requests of one queue, as [`Service`] wants them.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block_io::{BlockDevice, IoBuf, Operation};

use super::execute::{Context, ID_LENGTH, execute, status_of};
use super::request::{Ranges, Request, Status, decode};
use crate::chain::Buffers;
use crate::queue::recorder::{Asked, Ended, Ring};
use crate::queue::{Admission, Gate, QueueStatistics, ServerLink, Service};

/// What the queues of a device share.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) id: [u8; ID_LENGTH],
    /// The driver wants write-back (the `writeback` field).
    pub(super) write_back: AtomicBool,
}

/// One queue's requests to the disk.
pub(super) struct BlkService<L> {
    pub(super) disk: L,
    pub(super) settings: Arc<Settings>,
    pub(super) statistics: Arc<QueueStatistics>,
    /// Of the worker's thread.
    pub(super) ring: Arc<Ring>,
    /// Number of the queue.
    pub(super) queue: u16,
    pub(super) gate: Gate,
    /// The driver can flush; without, every write must be durable (virtio 1.2 §5.2.6.2).
    pub(super) flush: bool,
    /// The driver may choose write-through.
    pub(super) config_wce: bool,
    /// Whoever keeps the record of what is in flight gives it to our successor.
    pub(super) outlived: bool,
}

impl<L> BlkService<L>
where
    L: Deref<Target: BlockDevice + Sized> + 'static,
{
    /// The disk's answer, however long it takes; none if the server ends before.
    async fn have_done(
        &self,
        server: &ServerLink,
        request: &Request<'_>,
        asked: Asked,
        begin: u64,
    ) -> Option<Status> {
        loop {
            if self.gate.is_closed() {
                // Not on the usual way: memory for it only where it is needed.
                match Box::pin(self.gate.admit(server, request.limited_bytes(), || false)).await {
                    Admission::Go => {}
                    Admission::Fail => return Some(Status::IoError),
                    Admission::Abandon => return None,
                }
            }
            let context = Context {
                id: &self.settings.id,
                write_back: self.writes_back(),
                outlived: self.outlived,
            };
            let outcome = execute(&*self.disk, request, context).await;
            if let Err(error) = &outcome {
                server.log(error);
                if self.gate.stops_on(error) {
                    self.record(asked, status_of(&outcome), begin);
                    continue;
                }
            }
            return Some(status_of(&outcome));
        }
    }

    fn writes_back(&self) -> bool {
        self.flush && (!self.config_wce || self.settings.write_back.load(Ordering::Relaxed))
    }

    fn count(&self, asked: Asked) {
        match asked.operation {
            Some(Operation::Read) => self.statistics.count_read(asked.length),
            Some(Operation::Write) => self.statistics.count_write(asked.length),
            Some(Operation::Flush) => self.statistics.count_flush(),
            Some(Operation::Discard | Operation::WriteZeroes) | None => self.statistics.count_other(),
        }
    }

    /// A request, or one attempt of it, ends now.
    fn record(&self, asked: Asked, status: Status, begin: u64) {
        let ended = match status {
            Status::Ok => Ended::Done,
            Status::IoError => Ended::Failed,
            Status::Unsupported => Ended::Unsupported,
        };
        self.ring
            .record(self.queue, asked, ended, begin, block_io::moment_nanos());
    }
}

/// A request in numbers.
fn asked_of(request: &Request<'_>) -> Asked {
    let length = |data: &[IoBuf]| data.iter().map(|piece| piece.len() as u64).sum();
    let asked = |operation, offset, length| Asked {
        operation,
        offset,
        length,
    };
    let ranges = |operation, ranges: &Ranges| {
        let first = ranges.iter().next().map_or(0, |range| range.offset);
        let all = ranges.iter().map(|range| range.length);
        asked(Some(operation), first, all.fold(0, u64::saturating_add))
    };
    match request {
        Request::Read { offset, data } => asked(Some(Operation::Read), *offset, length(data)),
        Request::Write { offset, data } => asked(Some(Operation::Write), *offset, length(data)),
        Request::Flush => asked(Some(Operation::Flush), 0, 0),
        Request::GetId { data } => asked(None, 0, length(data)),
        Request::Discard(all) => ranges(Operation::Discard, all),
        Request::WriteZeroes(all) => ranges(Operation::WriteZeroes, all),
    }
}

impl<L> Service for BlkService<L>
where
    L: Deref<Target: BlockDevice + Sized> + 'static,
{
    async fn serve(
        &self,
        server: &ServerLink,
        buffers: &mut Buffers,
        begin: u64,
    ) -> Result<Option<u32>, String> {
        let written = buffers.writable_length();
        let decoded = decode(buffers).map_err(|error| error.to_string())?;
        let (asked, status) = match decoded.request {
            Ok(request) => {
                let asked = asked_of(&request);
                self.count(asked);
                match self.have_done(server, &request, asked, begin).await {
                    Some(status) => (asked, status),
                    None => return Ok(None),
                }
            }
            Err(status) => (Asked::NOTHING, status),
        };
        self.record(asked, status, begin);
        if status != Status::Ok {
            self.statistics.count_error();
        }
        decoded.status.fill(status as u8);
        Ok(Some(written))
    }

    fn can_release(&self, _: &ServerLink) -> bool {
        self.gate.can_release()
    }

    fn release(&self, server: &ServerLink) {
        self.gate.release(server, false);
    }

    fn longest_spin(&self) -> Duration {
        self.gate.longest_spin()
    }
}
