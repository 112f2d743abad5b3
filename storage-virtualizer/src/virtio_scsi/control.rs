//! The control queue: task management (virtio 1.2 §5.6.6.2).

use std::cell::RefCell;
use std::sync::Arc;

use super::adapter::{Adapter, Reach};
use super::request::{ControlKind, ControlRequest, Response};
use super::tasks::{Concern, Sweep};
use crate::chain::Buffers;
use crate::disk_handle::DiskHandle;
use crate::queue::{ServerLink, Service};
use crate::scsi::{Found, Reset};

/// Functions of virtio 1.2 §5.6.6.2.1.
mod function {
    pub(super) const ABORT_TASK: u32 = 0;
    pub(super) const ABORT_TASK_SET: u32 = 1;
    pub(super) const CLEAR_TASK_SET: u32 = 3;
    pub(super) const NEXUS_RESET: u32 = 4;
    pub(super) const UNIT_RESET: u32 = 5;
    pub(super) const QUERY_TASK: u32 = 6;
    pub(super) const QUERY_TASK_SET: u32 = 7;
}

pub(super) struct ControlService<H> {
    adapter: Arc<Adapter<H>>,
    /// What the functions in progress wait for.
    sweeps: RefCell<Vec<Arc<Sweep>>>,
}

impl<H: DiskHandle> ControlService<H> {
    pub(super) fn new(adapter: Arc<Adapter<H>>) -> Self {
        Self {
            adapter,
            sweeps: RefCell::default(),
        }
    }

    /// Does a function; none if the server ends before.
    async fn manage(
        &self,
        server: &ServerLink,
        function: u32,
        address: [u8; 8],
        tag: u64,
    ) -> Option<Response> {
        let Some(port) = self.adapter.port_of(address) else {
            return Some(Response::BadTarget);
        };
        if function == function::NEXUS_RESET {
            let target = address[1];
            self.sweep(server, Concern::Target { target }, Reach::Own, true)
                .await?;
            port.reset_nexus();
            return Some(Response::Ok);
        }
        let Found::Lun(lun) = port.find(address) else {
            return Some(Response::IncorrectLun);
        };
        let task = Concern::Task { address, tag };
        let all = Concern::Unit { address };
        let found = |found| {
            if found {
                Response::FunctionSucceeded
            } else {
                Response::Ok
            }
        };
        Some(match function {
            function::ABORT_TASK => {
                self.sweep(server, task, Reach::Own, true).await?;
                Response::Ok
            }
            function::ABORT_TASK_SET => {
                self.sweep(server, all, Reach::Own, true).await?;
                Response::Ok
            }
            function::CLEAR_TASK_SET => {
                self.sweep(server, all, Reach::Group, true).await?;
                Response::Ok
            }
            function::UNIT_RESET => {
                self.sweep(server, all, Reach::Group, true).await?;
                lun.unit.reset(Reset::LogicalUnit);
                Response::Ok
            }
            function::QUERY_TASK => found(self.sweep(server, task, Reach::Own, false).await?),
            function::QUERY_TASK_SET => found(self.sweep(server, all, Reach::Own, false).await?),
            // There is no ACA here to be cleared.
            _ => Response::FunctionRejected,
        })
    }

    /// Whether there were commands that are concerned; once they have ended if they are to. None if the server ends before.
    async fn sweep(&self, server: &ServerLink, concern: Concern, reach: Reach, ends: bool) -> Option<bool> {
        let sweep = self.adapter.sweep(concern, reach, ends);
        self.sweeps.borrow_mut().push(Arc::clone(&sweep));
        let ended = sweep.ended(|| server.stopping().is_some()).await;
        self.sweeps
            .borrow_mut()
            .retain(|other| !Arc::ptr_eq(other, &sweep));
        ended.then(|| sweep.found())
    }
}

impl<H: DiskHandle> Service for ControlService<H> {
    async fn serve(&self, server: &ServerLink, buffers: &mut Buffers, _: u64) -> Result<Option<u32>, String> {
        let request = ControlRequest::decode(buffers)?;
        let response = match request.kind {
            ControlKind::Task {
                function,
                address,
                tag,
            } => match self.manage(server, function, address, tag).await {
                Some(response) => response,
                None => return Ok(None),
            },
            ControlKind::Notification => Response::Ok,
        };
        Ok(Some(request.answer(response)))
    }

    fn can_release(&self, _: &ServerLink) -> bool {
        false
    }

    fn release(&self, _: &ServerLink) {
        self.sweeps.borrow().iter().for_each(|sweep| sweep.wake());
    }
}
