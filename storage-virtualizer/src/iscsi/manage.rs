//! Task management (RFC 7143 §11.5, §11.6; SAM-5 §7).
//!
//! A function is answered when all commands that it concerns have ended, which for those that the disk has is when the disk is
//! done with them.

use std::rc::Rc;

use block_io::BlockDevice;

use super::connection::Connection;
use super::pdu::{Body, FINAL, Head, response};
use super::session::{Session, Turn};
use super::task::Task;
use crate::scsi::{Found, Reset};

/// Functions (§11.5.1).
mod function {
    pub(super) const ABORT_TASK: u8 = 1;
    pub(super) const ABORT_TASK_SET: u8 = 2;
    pub(super) const CLEAR_ACA: u8 = 3;
    pub(super) const CLEAR_TASK_SET: u8 = 4;
    pub(super) const LOGICAL_UNIT_RESET: u8 = 5;
    pub(super) const TARGET_WARM_RESET: u8 = 6;
    pub(super) const TARGET_COLD_RESET: u8 = 7;
    pub(super) const TASK_REASSIGN: u8 = 8;
}

/// Responses (§11.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Response {
    Complete = 0,
    NoTask = 1,
    NoUnit = 2,
    NoReassignment = 4,
    NotSupported = 5,
    Rejected = 255,
}

/// Does the function that `head` asks for, and answers.
pub(super) async fn manage<D: BlockDevice + 'static>(connection: &Rc<Connection<D>>, head: &Head) {
    let session = &connection.session;
    let function = head.0[1] & 0x7f;
    let outcome = if session.is_discovery {
        Response::Rejected
    } else {
        perform(session, head, function).await
    };
    tracing::debug!(
        initiator = session.initiator,
        function,
        response = outcome as u8,
        "iSCSI task management"
    );
    let mut answer = Head::new(response::TASK_MANAGEMENT, FINAL, head.tag());
    answer.0[2] = outcome as u8;
    connection.send(answer, Body::Nothing, None);
    if function == function::TARGET_COLD_RESET && outcome == Response::Complete {
        // All sessions with the target end (§11.5.1), this one after its answer.
        for other in session.server.sessions_with(session.target) {
            other.close();
        }
    }
}

async fn perform<D: BlockDevice + 'static>(session: &Rc<Session<D>>, head: &Head, function: u8) -> Response {
    match function {
        function::ABORT_TASK => return abort(session, head).await,
        function::CLEAR_ACA => return Response::NotSupported,
        function::TASK_REASSIGN => return Response::NoReassignment,
        function::TARGET_WARM_RESET | function::TARGET_COLD_RESET => {
            // Not what others use and this initiator may not see.
            if session.nexus.visible().len() < session.units().luns().len() {
                return reset_visible(session).await;
            }
            end_everywhere(session, |_| true).await;
            session.units().reset();
            return Response::Complete;
        }
        _ => {}
    }
    let Found::Lun(lun) = session.units().find(&session.nexus, head.lun()) else {
        return Response::NoUnit;
    };
    let number = lun.number;
    let of_unit = move |task: &Task| crate::scsi::decode_lun(task.lun) == Some(number);
    match function {
        function::ABORT_TASK_SET => {
            for task in session.end_tasks(of_unit) {
                task.done().await;
            }
        }
        function::CLEAR_TASK_SET => end_everywhere(session, of_unit).await,
        function::LOGICAL_UNIT_RESET => {
            end_everywhere(session, of_unit).await;
            lun.unit.reset(Reset::LogicalUnit);
        }
        _ => return Response::NotSupported,
    }
    Response::Complete
}

/// A reset of all units that the initiator sees.
async fn reset_visible<D: BlockDevice + 'static>(session: &Rc<Session<D>>) -> Response {
    let visible = session.nexus.visible();
    let sees = |task: &Task| {
        crate::scsi::decode_lun(task.lun).is_some_and(|lun| visible.binary_search(&lun).is_ok())
    };
    end_everywhere(session, sees).await;
    for lun in session.units().luns() {
        if visible.binary_search(&lun.number).is_ok() {
            lun.unit.reset(Reset::Target);
        }
    }
    Response::Complete
}

/// Ends the tasks of all sessions that `concern` says.
async fn end_everywhere<D: BlockDevice + 'static>(session: &Session<D>, concern: impl Fn(&Task) -> bool) {
    let mut tasks = Vec::new();
    for other in session.server.sessions_with(session.target) {
        tasks.extend(other.end_tasks(&concern));
    }
    for task in tasks {
        task.done().await;
    }
}

async fn abort<D: BlockDevice + 'static>(session: &Rc<Session<D>>, head: &Head) -> Response {
    let (tag, number) = (head.u32(20), head.u32(32));
    let lun = head.lun();
    let tasks = session.end_tasks(|task| task.tag == tag && task.lun == lun);
    if let Some(task) = tasks.first() {
        task.done().await;
        return Response::Complete;
    }
    // One that has not come yet, and now never does: its number counts as used (§11.5.1).
    if session.order.turn(number) == Turn::Never || session.has_task(tag) {
        return Response::NoTask;
    }
    session.skip(number);
    Response::Complete
}
