//! Requests of the simulated computer: the faults that hit them, their durations, their ends.

use std::task::{Context, Poll};

use super::super::fault::{Fault, by_rule};
use super::super::image::View;
use super::super::medium::{Change, Effect, InFlight};
use super::super::report::count_fault;
use super::super::rng::hash_bytes;
use super::{Due, Event, Schedule, Sim, Waiting, drop_device};
use crate::Operation;

/// How a request ended.
pub(in crate::sim) struct Answer {
    pub(in crate::sim) content: Option<View>,
    pub(in crate::sim) errno: i32,
}

/// What a task wants of a disk.
pub(in crate::sim) struct Request {
    pub(in crate::sim) disk: usize,
    pub(in crate::sim) operation: Operation,
    pub(in crate::sim) offset: u64,
    pub(in crate::sim) length: u64,
    pub(in crate::sim) durable: bool,
    pub(in crate::sim) change: Option<Change>,
}

impl Sim {
    pub(in crate::sim) fn submit(&self, request: Request) -> u64 {
        let core = &self.0;
        let id = core.next_id.replace(core.next_id.get() + 1);
        let Request {
            disk,
            operation,
            offset,
            length,
            durable,
            change,
        } = request;
        let content = change.as_ref().and_then(Change::bytes).map_or(0, hash_bytes);
        let event = Event::Submit {
            disk,
            operation,
            offset,
            length,
            id,
        };
        self.record(
            1,
            offset ^ content,
            (length << 8) | operation as u64 | ((disk as u64) << 40),
            event,
        );
        let effect = self.strike(disk, operation, offset, length);
        let mut media = core.media.borrow_mut();
        let Some(medium) = media.get_mut(disk) else {
            return id;
        };
        let mut rng = core.rng.borrow_mut();
        let orderly = core.schedule == Schedule::InOrder;
        let change = change.filter(|_| !medium.dropped);
        let in_flight = InFlight {
            id,
            operation,
            offset,
            length,
            durable,
            effect,
            change,
            below: 0,
        };
        medium.submit(in_flight, &mut rng, orderly);
        let duration = if orderly {
            100_000
        } else {
            10_000 + rng.below(1_000_000)
        };
        let due = core.now.get() + duration.saturating_mul(medium.slow);
        core.due.borrow_mut().insert((due, id), Due::Request { disk, id });
        core.waiting.borrow_mut().insert(id, Waiting::default());
        id
    }

    /// Whether, and which, fault hits a request.
    fn strike(&self, disk: usize, operation: Operation, offset: u64, length: u64) -> Effect {
        let core = &self.0;
        let mut media = core.media.borrow_mut();
        let Some(medium) = media.get_mut(disk) else {
            return Effect::Fail(libc::ENODEV);
        };
        if medium.dropped {
            return Effect::Fail(libc::ENODEV);
        }
        let range = offset..offset + length;
        let mut rng = core.rng.borrow_mut();
        let sector = u64::from(medium.options.sector);
        let fault = match by_rule(&mut medium.rules, operation, &range) {
            None => core.faults.draw(&mut rng, disk, operation, &range, sector),
            rule => rule,
        };
        let writes = matches!(operation, Operation::Write | Operation::WriteZeroes);
        let Some(fault) = fault else {
            if writes && medium.is_full_for(offset, length) {
                count_fault(Fault::NoSpace.name());
                return Effect::Fail(libc::ENOSPC);
            }
            return Effect::Normal;
        };
        count_fault(fault.name());
        self.record(2, disk as u64, offset, Event::Fault { disk, fault });
        match fault {
            Fault::Error => Effect::Fail(libc::EIO),
            Fault::NoSpace => Effect::Fail(libc::ENOSPC),
            Fault::LostWrite => Effect::Lost,
            Fault::BitRot => {
                let bit = u32::try_from(rng.below(8)).unwrap_or(0);
                medium.rot(offset + rng.below(length), bit);
                Effect::Normal
            }
            Fault::MisdirectedWrite(by) => {
                let room = medium.options.geometry.size.saturating_sub(length) / sector + 1;
                Effect::Misdirected((offset + by) / sector % room * sector)
            }
            Fault::Drop => {
                drop_device(medium);
                Effect::Fail(libc::ENODEV)
            }
            Fault::Slow(factor) => {
                medium.slow = factor.max(1);
                Effect::Normal
            }
        }
    }

    pub(in crate::sim) fn poll_answer(&self, id: u64, context: &Context<'_>) -> Poll<Answer> {
        let mut waiting = self.0.waiting.borrow_mut();
        let Some(entry) = waiting.get_mut(&id) else {
            let errno = libc::ENODEV;
            return Poll::Ready(Answer { content: None, errno });
        };
        if let Some(answer) = entry.done.take() {
            waiting.remove(&id);
            return Poll::Ready(answer);
        }
        entry.waker = Some(context.waker().clone());
        Poll::Pending
    }

    /// Nobody waits for a request any more. As with real disks, it ends before its memory is given back; after a power
    /// cut it stays as it is.
    pub(in crate::sim) fn abandon(&self, disk: usize, id: u64) {
        let known = self.0.waiting.borrow_mut().remove(&id);
        if self.0.power.get() && known.is_some_and(|entry| entry.done.is_none()) {
            self.0
                .due
                .borrow_mut()
                .retain(|_, due| !matches!(due, Due::Request { id: other, .. } if *other == id));
            self.end_request(disk, id);
        }
    }

    pub(super) fn end_request(&self, disk: usize, id: u64) {
        let core = &self.0;
        let mut media = core.media.borrow_mut();
        let Some(medium) = media.get_mut(disk) else { return };
        let effect = medium
            .in_flight
            .iter()
            .find(|request| request.id == id)
            .map(|request| request.effect);
        let errno = match effect {
            Some(Effect::Fail(errno)) => errno,
            _ => 0,
        };
        let orderly = core.schedule == Schedule::InOrder;
        let content = medium.complete(id, &mut core.rng.borrow_mut(), orderly);
        drop(media);
        let digest = content.as_ref().map_or(0, View::digest);
        self.record(
            3,
            id ^ digest,
            u64::from(errno.unsigned_abs()),
            Event::End { disk, id, errno },
        );
        if let Some(entry) = core.waiting.borrow_mut().get_mut(&id) {
            entry.done = Some(Answer { content, errno });
            if let Some(waker) = entry.waker.take() {
                waker.wake();
            }
        }
    }
}
