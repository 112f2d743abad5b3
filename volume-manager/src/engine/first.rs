//! Reads that the first good answer of two legs ends.
//!
//! Both legs read into memory of their own, because the slower one may still write there when the guest has its answer and uses
//! its memory for something else. Nobody cancels the slower one: it ends in the background, and what it could not read is
//! repaired like after any other read. A pool is not closed before it has ended.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use block_io::{AlignedBuffer, BlockDevice, Clock, IoBuf, cover, spawn_local};

use super::list;
use super::map::{ColumnMap, MemberMap, SectionMap};
use super::volume::Volume;
use crate::model::MemberState;

/// What two legs have said so far.
#[derive(Default)]
struct Race {
    answer: RefCell<Option<AlignedBuffer>>,
    /// Legs that have not said anything.
    running: Cell<u32>,
    waker: RefCell<Option<Waker>>,
}

impl Race {
    fn ended(&self, answer: Option<AlignedBuffer>) {
        self.running.set(self.running.get() - 1);
        if answer.is_some() && self.answer.borrow().is_none() {
            *self.answer.borrow_mut() = answer;
        }
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The first answer; none when no leg has one.
    async fn answer(&self) -> Option<AlignedBuffer> {
        poll_fn(|context| {
            let answer = self.answer.borrow_mut().take();
            if answer.is_some() || self.running.get() == 0 {
                return Poll::Ready(answer);
            }
            *self.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// The two legs to ask, beginning with `first`; none if there are not two.
fn two<D: BlockDevice>(column: &ColumnMap<D>, first: usize) -> Option<[&MemberMap<D>; 2]> {
    let count = column.members.len();
    let mut usable = (0..count)
        .filter_map(|step| column.members.get((first + step) % count))
        .filter(|member| member.state == MemberState::InSync && member.is_alive());
    Some([usable.next()?, usable.next()?])
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Has two legs read, and fills `buffers` with the first good answer. False if there are not two, or both failed.
    pub(super) async fn read_first_answer(
        &self,
        section: &SectionMap<D>,
        column: usize,
        first: usize,
        at: u64,
        buffers: &[IoBuf],
    ) -> bool {
        let legs = section.columns.get(column).and_then(|column| two(column, first));
        let Some(legs) = legs else { return false };
        let race = Rc::new(Race::default());
        race.running.set(2);
        for leg in legs {
            let (this, member, id) = (self.clone(), leg.clone(), section.id);
            let (result, busy) = (Rc::clone(&race), self.core.busy());
            let length = list::length(buffers);
            let spawned = spawn_local(async move {
                let _busy = busy;
                let buffer = AlignedBuffer::new(usize::try_from(length).unwrap_or(0));
                // SAFETY: the buffer lives until the read has ended, which nobody cancels.
                let memory = [unsafe { buffer.io(0, buffer.as_slice().len()) }];
                match member.read(this.clock(), at, &memory).await {
                    Ok(()) => result.ended(Some(buffer)),
                    Err((device, _)) => {
                        cover!("first: one of two legs cannot answer");
                        this.repair_later(id, column, member.id, device, at, length);
                        result.ended(None);
                    }
                }
            });
            if spawned.is_err() {
                race.ended(None);
            }
        }
        let Some(answer) = race.answer().await else {
            return false;
        };
        cover!("first: the first answer of two legs counts");
        list::scatter(buffers, answer.as_slice());
        true
    }
}
