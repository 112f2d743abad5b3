//! A server as other threads reach it: it lives on one worker, where it is found by a number.
//!
//! ```text
//!   any thread: Reach::ask(question) ──► the server's worker: Rc<T> ──► question's future ──► its answer, for which the thread waits
//! ```

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use block_io::WorkerHandle;

thread_local! {
    /// What can be reached on this thread, by number.
    static HERE: RefCell<HashMap<u64, Weak<dyn Any>>> = RefCell::default();
}

/// The way to a `T` on its worker. It does not keep it alive.
pub(crate) struct Reach<T> {
    number: u64,
    worker: WorkerHandle,
    /// Says the type; the thing itself never leaves its thread.
    what: PhantomData<fn() -> T>,
}

impl<T> Clone for Reach<T> {
    fn clone(&self) -> Self {
        Self {
            number: self.number,
            worker: self.worker.clone(),
            what: PhantomData,
        }
    }
}

impl<T> fmt::Debug for Reach<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Reach")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl<T: 'static> Reach<T> {
    /// The way to `what`, which lives on `worker`; to be called by a task of it.
    pub(crate) fn new(what: &Rc<T>, worker: &WorkerHandle) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let weak: Weak<T> = Rc::downgrade(what);
        HERE.with_borrow_mut(|here| {
            here.retain(|_, other| other.strong_count() > 0);
            here.insert(number, weak);
        });
        Self {
            number,
            worker: worker.clone(),
            what: PhantomData,
        }
    }

    /// Has a question answered there, and waits for it. None: it has ended. Not to be called from its worker.
    pub(crate) fn ask<R, F>(&self, question: impl FnOnce(Rc<T>) -> F + Send + 'static) -> Option<R>
    where
        R: Send + 'static,
        F: Future<Output = R> + 'static,
    {
        let (tell, told) = mpsc::channel();
        let number = self.number;
        self.worker.spawn(move || async move {
            let found = HERE.with_borrow(|here| here.get(&number).and_then(Weak::upgrade));
            if let Some(what) = found.and_then(|found| found.downcast::<T>().ok()) {
                // Somebody waits for it below.
                let _ = tell.send(question(what).await);
            }
        });
        told.recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use block_io::{Worker, WorkerOptions};

    use super::*;

    #[test]
    fn a_thing_is_reached_as_long_as_it_lives() {
        thread_local! {
            static KEPT: RefCell<Option<Rc<RefCell<u32>>>> = RefCell::default();
        }
        let worker = Worker::start("reach", WorkerOptions::default()).unwrap();
        let handle = worker.handle().clone();
        let reach = worker.run(move || async move {
            let thing = Rc::new(RefCell::new(1));
            KEPT.set(Some(Rc::clone(&thing)));
            Reach::new(&thing, &handle)
        });
        let add = |thing: Rc<RefCell<u32>>| async move {
            *thing.borrow_mut() += 1;
            *thing.borrow()
        };
        assert_eq!(reach.ask(add), Some(2));
        assert_eq!(reach.clone().ask(add), Some(3));
        worker.run(|| async { KEPT.set(None) });
        assert_eq!(reach.ask(add), None);
        drop(worker);
        assert_eq!(reach.ask(add), None);
    }
}
