//! The requests of one queue, as [`Service`] wants them.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block_io::{BlockDevice, IoBuf};

use super::execute::{Context, ID_LENGTH, execute, status_of};
use super::request::{Request, Status, decode};
use crate::chain::Buffers;
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
    async fn have_done(&self, server: &ServerLink, request: &Request<'_>) -> Option<Status> {
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
                    continue;
                }
            }
            return Some(status_of(&outcome));
        }
    }

    fn writes_back(&self) -> bool {
        self.flush && (!self.config_wce || self.settings.write_back.load(Ordering::Relaxed))
    }

    fn count(&self, request: &Request<'_>) {
        let length = |data: &[IoBuf]| data.iter().map(|piece| piece.len() as u64).sum();
        match request {
            Request::Read { data, .. } => self.statistics.count_read(length(data)),
            Request::Write { data, .. } => self.statistics.count_write(length(data)),
            Request::Flush => self.statistics.count_flush(),
            Request::GetId { .. } | Request::Discard(_) | Request::WriteZeroes(_) => {
                self.statistics.count_other();
            }
        }
    }
}

impl<L> Service for BlkService<L>
where
    L: Deref<Target: BlockDevice + Sized> + 'static,
{
    async fn serve(&self, server: &ServerLink, buffers: &mut Buffers) -> Result<Option<u32>, String> {
        let written = buffers.writable_length();
        let decoded = decode(buffers).map_err(|error| error.to_string())?;
        let status = match decoded.request {
            Ok(request) => {
                self.count(&request);
                match self.have_done(server, &request).await {
                    Some(status) => status,
                    None => return Ok(None),
                }
            }
            Err(status) => status,
        };
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
