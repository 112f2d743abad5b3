//! The executor of one worker thread: its tasks, who is ready to run, and the tables of operations and event watches.
//!
//! Everything here belongs to one thread and is reached through a thread-local pointer. A waker is two words without a
//! heap object: the worker's number and the task's index. Waking from the worker's own thread pushes the index onto the
//! ready queue; waking from another thread goes through the worker's inbox and its eventfd.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::num::NonZeroU64;
use std::pin::Pin;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock, Weak};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::engine::{Completion, Engine};
use super::events::Events;
use super::files::{SLOTS, place_of};
use super::memory;
use super::ops::Ops;
use super::rest::Rest;
use super::scratch::Scratch;

/// Tasks polled before the ring is served again, so that tasks that wake each other do not starve I/O.
const POLLS_PER_TURN: usize = 512;

type Task = Pin<Box<dyn Future<Output = ()>>>;
/// Makes a task on the worker's own thread.
pub(super) type Spawn = Box<dyn FnOnce() + Send>;

thread_local! {
    static LOCAL: Cell<*const Local> = const { Cell::new(ptr::null()) };
}

/// What other threads may touch of a worker.
pub(super) struct Shared {
    id: usize,
    inbox: Mutex<Inbox>,
    /// The inbox has something, and the eventfd was written since the worker last looked.
    notified: AtomicBool,
    wake: EventFd,
    /// Numbers of the files that the ring has, or had, by their places: who closes one need not wake other workers.
    files: [AtomicU64; SLOTS as usize],
}

#[derive(Default)]
struct Inbox {
    spawns: Vec<Spawn>,
    wakes: Vec<u32>,
    completions: Vec<Completion>,
    /// Files that are about to be closed.
    forgotten: Vec<NonZeroU64>,
    /// What a helper's ring is to hold.
    memory: Vec<memory::Order>,
    stop: bool,
    /// The worker has ended and takes nothing more.
    closed: bool,
}

/// What is rare for a helper.
pub(super) struct Rare {
    pub(super) jobs: Vec<Spawn>,
    pub(super) forgotten: Vec<NonZeroU64>,
    pub(super) memory: Vec<memory::Order>,
    pub(super) stop: bool,
}

/// All workers of the process by their number, for wakers that are used on foreign threads.
static WORKERS: RwLock<Vec<Weak<Shared>>> = RwLock::new(Vec::new());

impl Shared {
    /// A new worker with a free number.
    pub(super) fn new(wake: EventFd) -> Arc<Self> {
        let mut workers = WORKERS.write().unwrap_or_else(PoisonError::into_inner);
        let free = workers.iter().position(|worker| worker.strong_count() == 0);
        let id = free.unwrap_or(workers.len());
        let shared = Arc::new(Self {
            id,
            inbox: Mutex::default(),
            notified: AtomicBool::new(false),
            wake,
            files: [const { AtomicU64::new(0) }; SLOTS as usize],
        });
        match workers.get_mut(id) {
            Some(slot) => *slot = Arc::downgrade(&shared),
            None => workers.push(Arc::downgrade(&shared)),
        }
        shared
    }

    /// Notes that the ring gets the file with `number`.
    pub(super) fn keep_file(&self, number: NonZeroU64) {
        self.files[place_of(number.get())].store(number.get(), Ordering::Release);
    }

    fn put(&self, change: impl FnOnce(&mut Inbox)) {
        {
            let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            if inbox.closed {
                // What `change` holds, say a task, is dropped with it.
                return;
            }
            change(&mut inbox);
        }
        if !self.notified.swap(true, Ordering::AcqRel) {
            self.ring();
        }
    }

    pub(super) fn spawn(&self, spawn: Spawn) {
        self.put(|inbox| inbox.spawns.push(spawn));
    }

    pub(super) fn complete(&self, completion: Completion) {
        self.put(|inbox| inbox.completions.push(completion));
    }

    /// For a helper.
    pub(super) fn order_memory(&self, order: memory::Order) {
        self.put(|inbox| inbox.memory.push(order));
    }

    pub(super) fn stop(&self) {
        self.put(|inbox| inbox.stop = true);
    }

    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Wakes the thread out of its sleep, for what is not in the inbox.
    pub(super) fn ring(&self) {
        if let Err(error) = self.wake.write(1) {
            // An eventfd refuses only when its counter is full, and then the worker is being woken anyway.
            tracing::error!(%error, "cannot wake a block-io worker");
        }
    }

    /// What a helper finds in its inbox, if there is anything.
    pub(super) fn take_rare(&self) -> Option<Rare> {
        let inbox = self.take()?;
        Some(Rare {
            jobs: inbox.spawns,
            forgotten: inbox.forgotten,
            memory: inbox.memory,
            stop: inbox.stop,
        })
    }

    fn take(&self) -> Option<Inbox> {
        if !self.notified.load(Ordering::Relaxed) || !self.notified.swap(false, Ordering::AcqRel) {
            return None;
        }
        Some(std::mem::take(
            &mut *self.inbox.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }
}

#[derive(Default)]
struct TaskSlot {
    /// Absent while the task runs and when the slot is free.
    future: Option<Task>,
    queued: bool,
}

#[derive(Default)]
struct Tasks {
    slots: Vec<TaskSlot>,
    free: Vec<u32>,
}

/// The state of a worker's thread.
pub(super) struct Local {
    pub(super) shared: Arc<Shared>,
    tasks: RefCell<Tasks>,
    ready: RefCell<VecDeque<u32>>,
    /// Who goes on when the kernel was called.
    later: RefCell<Vec<Waker>>,
    /// Tasks of other threads, not made yet.
    spawns: RefCell<Vec<Spawn>>,
    pub(super) ops: RefCell<Ops>,
    pub(super) events: RefCell<Events>,
    pub(super) engine: Engine,
    pub(super) rest: Rest,
    pub(super) scratch: Scratch,
    /// When this turn began, as [`moment_nanos`] counts; 0 if nobody has asked.
    moment_nanos: Cell<u64>,
    /// See [`turns`].
    turns: Cell<u64>,
    stop: Cell<bool>,
}

/// Has workers let go of a file that is about to be closed, with no request in flight.
pub(super) fn forget_file(number: NonZeroU64) {
    let workers: Vec<_> = {
        let workers = WORKERS.read().unwrap_or_else(PoisonError::into_inner);
        let keeps = |worker: &Arc<Shared>| {
            worker.files[place_of(number.get())].load(Ordering::Acquire) == number.get()
        };
        workers.iter().filter_map(Weak::upgrade).filter(keeps).collect()
    };
    for worker in workers {
        worker.put(|inbox| inbox.forgotten.push(number));
    }
}

/// Calls `use_it` with the worker of this thread, if this thread is one.
pub(super) fn with_local<R>(use_it: impl FnOnce(&Local) -> R) -> Option<R> {
    let local = LOCAL.get();
    // SAFETY: `Local::run` sets the pointer to itself, which outlives all code that it calls, and clears it at its end.
    unsafe { local.as_ref() }.map(use_it)
}

/// Lets other tasks of the worker run.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The time at which the worker of this thread was first asked for it since it last looked for completions, the present outside of workers: in
/// nanoseconds since some time before anybody asked, never 0. For durations of requests: costs a clock's reading per turn of the worker, not per request.
pub fn moment_nanos() -> u64 {
    with_local(Local::moment_nanos).unwrap_or_else(|| nanos_of(Instant::now()))
}

/// An instant as [`moment_nanos`] counts.
pub(crate) fn nanos_of(moment: Instant) -> u64 {
    static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = moment.saturating_duration_since(*FIRST);
    // 584 years fit.
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).max(1)
}

/// How often the worker of this thread has called the kernel to submit requests and to learn what has ended: with io_uring these are all the
/// system calls that its requests cost. None outside of workers.
pub fn turns() -> Option<u64> {
    with_local(|local| local.turns.get())
}

/// Wakes `waker` when the worker of this thread has called the kernel next ([`turns`]), which it does before it sleeps, and after those who wait for what
/// has ended then. Does nothing outside of workers.
pub fn wake_after_turn(waker: &Waker) {
    with_local(|local| local.later.borrow_mut().push(waker.clone()));
}

/// How many requests of the worker of this thread were done by its helpers ([`super::WorkerOptions::helpers`]). None outside of workers.
pub fn helped() -> Option<u64> {
    with_local(|local| local.engine.helped())
}

/// Runs `future` as a task of the worker whose task calls this, or of the simulation.
///
/// # Errors
/// Gives the future back if this thread is not a worker.
pub fn spawn_local<F>(future: F) -> Result<(), F>
where
    F: Future<Output = ()> + 'static,
{
    if LOCAL.get().is_null() {
        #[cfg(feature = "sim")]
        return crate::sim::spawn_on_current(future);
        #[cfg(not(feature = "sim"))]
        return Err(future);
    }
    with_local(|local| local.spawn(Box::pin(future)));
    Ok(())
}

impl Local {
    pub(super) fn new(shared: Arc<Shared>, engine: Engine, busy_poll: Duration) -> Self {
        Self {
            shared,
            tasks: RefCell::default(),
            ready: RefCell::default(),
            later: RefCell::default(),
            spawns: RefCell::default(),
            ops: RefCell::default(),
            events: RefCell::default(),
            engine,
            rest: Rest::new(busy_poll),
            scratch: Scratch::default(),
            moment_nanos: Cell::new(0),
            turns: Cell::new(0),
            stop: Cell::new(false),
        }
    }

    /// Whether this is the worker that `shared` is a part of.
    pub(super) fn is(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    fn spawn(&self, future: Task) {
        let mut tasks = self.tasks.borrow_mut();
        let slot = TaskSlot {
            future: Some(future),
            queued: true,
        };
        let index = if let Some(index) = tasks.free.pop() {
            tasks.slots[index as usize] = slot;
            index
        } else {
            let Ok(index) = u32::try_from(tasks.slots.len()) else {
                // Four thousand million tasks do not fit into memory.
                std::process::abort()
            };
            tasks.slots.push(slot);
            index
        };
        self.ready.borrow_mut().push_back(index);
    }

    fn wake(&self, index: u32) {
        if let Some(slot) = self.tasks.borrow_mut().slots.get_mut(index as usize)
            && !slot.queued
        {
            slot.queued = true;
            self.ready.borrow_mut().push_back(index);
        }
    }

    fn waker(&self, index: u32) -> Waker {
        let data = (self.shared.id << 32) | index as usize;
        // SAFETY: the functions of `VTABLE` take `data` as two numbers and keep the contract of `RawWaker`: they are
        // callable on every thread, and there is nothing to own.
        unsafe { Waker::from_raw(RawWaker::new(ptr::without_provenance(data), &VTABLE)) }
    }

    /// Polls ready tasks; says whether some are still ready.
    fn run_ready(&self) -> bool {
        for _ in 0..POLLS_PER_TURN {
            let Some(index) = self.ready.borrow_mut().pop_front() else {
                return false;
            };
            let taken = {
                let slot = &mut self.tasks.borrow_mut().slots[index as usize];
                slot.queued = false;
                slot.future.take()
            };
            // Free, or woken by itself while it runs: then it is queued again.
            let Some(mut future) = taken else { continue };
            let waker = self.waker(index);
            let finished = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
            if finished {
                drop(future);
                let mut tasks = self.tasks.borrow_mut();
                // A late wake may have queued it: the index must not be handed out while it stands in the queue.
                if tasks.slots[index as usize].queued {
                    self.ready.borrow_mut().retain(|queued| *queued != index);
                    tasks.slots[index as usize].queued = false;
                }
                tasks.free.push(index);
            } else {
                self.tasks.borrow_mut().slots[index as usize].future = Some(future);
            }
        }
        !self.ready.borrow().is_empty()
    }

    /// Takes over what other threads left. New tasks wait in `spawns`: this may be called from within a task.
    fn take_inbox(&self) {
        let Some(inbox) = self.shared.take() else { return };
        for completion in inbox.completions {
            self.dispatch(completion);
        }
        for index in inbox.wakes {
            self.wake(index);
        }
        for number in inbox.forgotten {
            self.engine.forget_file(number);
        }
        self.spawns.borrow_mut().extend(inbox.spawns);
        if inbox.stop {
            self.stop.set(true);
        }
    }

    /// Whether a task can run.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    /// Whether another thread left something.
    pub(super) fn is_notified(&self) -> bool {
        self.shared.notified.load(Ordering::Acquire)
    }

    fn dispatch(&self, completion: Completion) {
        match completion {
            Completion::Operation { index, result } => {
                let waker = self.ops.borrow_mut().complete(index, result);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Completion::Event { index, result, armed } => {
                let waker = self.events.borrow_mut().fire(index, result, armed, &self.engine);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }
    }

    fn moment_nanos(&self) -> u64 {
        match self.moment_nanos.get() {
            0 => {
                let nanos = nanos_of(Instant::now());
                self.moment_nanos.set(nanos);
                nanos
            }
            nanos => nanos,
        }
    }

    /// Submits what tasks have prepared and takes completions; `wait` for at least one if there is none yet.
    pub(super) fn turn(&self, wait: bool) {
        self.engine.enter(wait);
        self.turns.set(self.turns.get() + 1);
        self.moment_nanos.set(0);
        while let Some(completion) = self.engine.next_completion() {
            self.dispatch(completion);
        }
        for waker in self.later.borrow_mut().drain(..) {
            waker.wake();
        }
        self.take_inbox();
    }

    /// Runs tasks until [`Shared::stop`]. Tasks that are left are dropped then, which waits for what they have in flight.
    pub(super) fn run(&self) {
        struct Leave<'a>(&'a Local);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                // Dropping a task may drop wakers and spawn tasks, so take them one by one with the table unlocked.
                loop {
                    let next = self
                        .0
                        .tasks
                        .borrow_mut()
                        .slots
                        .iter_mut()
                        .find_map(|slot| slot.future.take());
                    let Some(future) = next else { break };
                    drop(future);
                }
                let closed = Inbox {
                    closed: true,
                    ..Inbox::default()
                };
                let left = std::mem::replace(
                    &mut *self.0.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner),
                    closed,
                );
                drop(left);
                self.0.spawns.borrow_mut().clear();
                LOCAL.set(ptr::null());
            }
        }
        LOCAL.set(self);
        let _leave = Leave(self);
        let wake = self.shared.wake_fd();
        let event = self.events.borrow_mut().insert();
        self.events.borrow_mut().arm(event, wake, &self.engine);
        while !self.stop.get() {
            let spawns = std::mem::take(&mut *self.spawns.borrow_mut());
            for spawn in spawns {
                spawn();
            }
            if self.run_ready() || self.is_notified() || !self.later.borrow().is_empty() {
                self.turn(false);
            } else {
                self.rest.rest(self);
            }
            // The own eventfd has no task that waits for it.
            self.events.borrow_mut().renew(event, wake, &self.engine);
        }
    }
}

static VTABLE: RawWakerVTable = RawWakerVTable::new(clone_waker, wake_by_data, wake_by_data, drop_waker);

fn clone_waker(data: *const ()) -> RawWaker {
    RawWaker::new(data, &VTABLE)
}

fn drop_waker(_: *const ()) {}

fn wake_by_data(data: *const ()) {
    let id = data.addr() >> 32;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the lower half is the task's index"
    )]
    let index = data.addr() as u32;
    let done = with_local(|local| {
        let own = local.shared.id == id;
        if own {
            local.wake(index);
        }
        own
    });
    if done != Some(true) {
        let worker = WORKERS
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .and_then(Weak::upgrade);
        // A worker that has gone has no tasks left to wake.
        if let Some(worker) = worker {
            worker.put(|inbox| inbox.wakes.push(index));
        }
    }
}

/// Keeps `waker` in `slot` unless the same one is there.
pub(super) fn keep_waker(slot: &mut Option<Waker>, waker: &Waker) {
    match slot {
        Some(kept) if kept.will_wake(waker) => {}
        _ => *slot = Some(waker.clone()),
    }
}
