//! A second thread that has requests done for a worker: most of a fast device's time is the kernel's, in the system call that submits.
//!
//! All that a pool does runs on one worker, so that nothing in it can race. What that worker need not do itself is to call the
//! kernel: a request is a file, a place and memory, and its end is a number. So a worker that is given helpers
//! ([`super::WorkerOptions::helpers`]) leaves a part of its requests to them. Each has a ring of its own, and two queues join it to the
//! worker.
//!
//! ```text
//!     worker ── index, request ──► orders ──► helper: io_uring_enter on its ring
//!        ▲                                       │
//!        └───── index, result ◄── results ◄──────┘
//! ```
//!
//! # Who takes a request
//! A helper, as long as fewer wait for it than two for each that the worker has prepared for its own next call: until then the worker has
//! its tasks to run, while the helper is in the kernel already. So a worker with little to do does it alone, as with no helper, and the more
//! it has, the more evenly it shares, whatever a request costs. A helper that sleeps is only woken for a long row ([`WAKE_FROM`]), which a
//! worker has when it cannot keep up.
//!
//! # Sleep
//! A helper with nothing to do spins for [`SPIN`] and then sleeps in its ring, which watches an eventfd. Each side says that it is
//! going to sleep before it looks at its queue for the last time, and each writes its queue before it looks whether the other
//! sleeps; full fences between, so at least one of them sees the other.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rtrb::{Consumer, Producer, RingBuffer};
use vmm_sys_util::eventfd::EventFd;

use super::engine::{Call, Completion, Request};
use super::local::{Shared, Spawn};
use super::memory::{self, Part};
use super::uring::UringEngine;

/// Requests that a helper has at most, so that results never find their queue full.
const MOST: usize = 256;
/// Requests that the worker keeps for itself before it looks for help.
const KEPT: u32 = 2;
/// How many may wait for a helper for each that the worker has prepared: measured, see `docs/src/performance.md`.
const SHARE: u32 = 2;
/// A helper that sleeps is woken when the worker has so many itself.
const WAKE_FROM: u32 = 12;
/// Requests with which a helper calls the kernel, so that the first results need not wait for the last.
const BATCH: usize = 16;
/// How long a helper looks for more before it sleeps.
const SPIN: Duration = Duration::from_micros(30);
/// The watch of the helper's eventfd in its ring.
const WAKE: u32 = 0;

/// How many helpers a worker gets if nobody says: one where the process may use four processors or more, else none, as guests need the processors too.
pub fn default_helpers() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    usize::from(processors >= 4)
}

/// A request and the index of its operation.
type Order = (u32, Request);
/// The index of an operation and its result.
type Outcome = (u32, i32);

/// What both threads see beside the queues.
struct Common {
    /// Requests that the helper has handed to the kernel since its start.
    submitted: AtomicU32,
    helper_sleeps: AtomicBool,
    worker_sleeps: AtomicBool,
    /// The helper's: for what is rare, and to wake it.
    helper: Arc<Shared>,
    worker: Arc<Shared>,
}

/// The helpers of a worker, seen from there.
#[derive(Default)]
pub(super) struct Helpers {
    helpers: Vec<Helper>,
    /// Requests that the worker has prepared itself since it was in the kernel.
    prepared: Cell<u32>,
    /// Requests that helpers took.
    taken: Cell<u64>,
}

impl Helpers {
    pub(super) fn new(helpers: Vec<Helper>) -> Self {
        Self {
            helpers,
            prepared: Cell::new(0),
            taken: Cell::new(0),
        }
    }

    /// See [`super::helped`].
    pub(super) fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// Has a helper do `request`, as operation `index`, if that is better.
    #[inline]
    pub(super) fn take(&self, index: u32, request: &Request) -> bool {
        if self.helpers.is_empty() || matches!(request.call, Call::Poll { .. }) {
            return false;
        }
        let prepared = self.prepared.get();
        let taken = self
            .helpers
            .iter()
            .any(|helper| helper.is_better(prepared) && helper.submit(index, *request));
        match taken {
            true => self.taken.set(self.taken.get() + 1),
            false => self.prepared.set(prepared + 1),
        }
        taken
    }

    /// The worker is about to call the kernel, and to sleep there if `wait`: says whether it may sleep.
    pub(super) fn before_enter(&self, wait: bool) -> bool {
        self.prepared.set(0);
        // All of them, whatever the first says.
        self.helpers.iter().fold(wait, |wait, helper| {
            helper.kick();
            wait && helper.before_sleep()
        })
    }

    pub(super) fn after_sleep(&self) {
        for helper in &self.helpers {
            helper.common.worker_sleeps.store(false, Ordering::Relaxed);
        }
    }

    pub(super) fn has_completion(&self) -> bool {
        self.helpers.iter().any(Helper::has_result)
    }

    pub(super) fn next_completion(&self) -> Option<Completion> {
        let (index, result) = self.helpers.iter().find_map(Helper::next)?;
        Some(Completion::Operation { index, result })
    }

    /// Has them hold memory, too.
    pub(super) fn hold(&self, part: Part) {
        for helper in &self.helpers {
            helper.common.helper.order_memory(memory::Order::Hold(part));
        }
    }

    /// Has them let go of memory, and waits until they have.
    pub(super) fn release(&self, part: Part) {
        let (answer, done) = mpsc::channel();
        for helper in &self.helpers {
            let order = memory::Order::Release(part, answer.clone());
            helper.common.helper.order_memory(order);
        }
        drop(answer);
        // It ends when each has answered, or has ended.
        done.iter().for_each(drop);
    }

    /// What runs jobs on their threads.
    pub(super) fn threads(&self) -> Vec<Arc<Shared>> {
        self.helpers
            .iter()
            .map(|helper| Arc::clone(&helper.common.helper))
            .collect()
    }
}

/// One helper, seen from its worker.
pub(super) struct Helper {
    orders: RefCell<Producer<Order>>,
    results: RefCell<Consumer<Outcome>>,
    common: Arc<Common>,
    /// Requests that were given to it since its start, of which it knows if it is awake, and those that came back.
    given: Cell<u32>,
    told: Cell<u32>,
    taken: Cell<u32>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    /// Starts a helper of `worker`; `on_start` runs first on its thread, once its ring stands.
    ///
    /// # Errors
    /// No thread, no descriptor, no ring; or those of `on_start`.
    pub(super) fn start(
        name: &str,
        worker: Arc<Shared>,
        on_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, to_do) = RingBuffer::new(MOST);
        let (done, results) = RingBuffer::new(MOST);
        let common = Arc::new(Common {
            submitted: AtomicU32::new(0),
            helper_sleeps: AtomicBool::new(false),
            worker_sleeps: AtomicBool::new(false),
            helper: Shared::new(EventFd::new(libc::EFD_CLOEXEC)?),
            worker,
        });
        let (report, started) = mpsc::channel();
        let theirs = Arc::clone(&common);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            match UringEngine::new().and_then(|engine| on_start().map(|()| engine)) {
                Ok(engine) => {
                    let side = Side {
                        engine,
                        orders: to_do,
                        results: done,
                        common: theirs,
                        in_flight: 0,
                    };
                    if report.send(Ok(())).is_ok() {
                        side.run();
                    }
                }
                // If nobody listens any more, nobody wants to know.
                Err(error) => drop(report.send(Err(error))),
            }
        })?;
        let helper = Self {
            orders: RefCell::new(orders),
            results: RefCell::new(results),
            common,
            given: Cell::new(0),
            told: Cell::new(0),
            taken: Cell::new(0),
            thread: Some(thread),
        };
        started
            .recv()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        Ok(helper)
    }

    /// Whether the helper should do the next request, as the worker has `prepared` ones itself.
    #[inline]
    fn is_better(&self, prepared: u32) -> bool {
        if prepared < KEPT || self.in_flight() as usize >= MOST {
            return false;
        }
        let submitted = self.common.submitted.load(Ordering::Acquire);
        let waiting = self.given.get().wrapping_sub(submitted);
        if waiting == 0 && self.common.helper_sleeps.load(Ordering::Relaxed) {
            return prepared >= WAKE_FROM;
        }
        waiting + KEPT <= SHARE * prepared
    }

    /// Requests whose end the worker has not seen.
    #[inline]
    fn in_flight(&self) -> u32 {
        self.given.get().wrapping_sub(self.taken.get())
    }

    #[inline]
    fn submit(&self, index: u32, request: Request) -> bool {
        let given = self.orders.borrow_mut().push((index, request)).is_ok();
        if given {
            self.given.set(self.given.get().wrapping_add(1));
        }
        given
    }

    /// Wakes it if it sleeps and has got something.
    #[inline]
    fn kick(&self) {
        if self.told.get() == self.given.get() {
            return;
        }
        self.told.set(self.given.get());
        fence(Ordering::SeqCst);
        if self.common.helper_sleeps.load(Ordering::Relaxed) {
            self.common.helper_sleeps.store(false, Ordering::Relaxed);
            self.common.helper.ring();
        }
    }

    /// The worker is about to sleep: says whether it may.
    fn before_sleep(&self) -> bool {
        if self.in_flight() == 0 {
            return true;
        }
        self.common.worker_sleeps.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.has_result()
    }

    fn has_result(&self) -> bool {
        self.in_flight() > 0 && !self.results.borrow().is_empty()
    }

    #[inline]
    fn next(&self) -> Option<Outcome> {
        if self.in_flight() == 0 {
            return None;
        }
        let outcome = self.results.borrow_mut().pop().ok()?;
        self.taken.set(self.taken.get().wrapping_add(1));
        Some(outcome)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.common.helper.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a helper of a block-io worker ended by a panic");
        }
    }
}

/// A helper, seen from its own thread.
struct Side {
    engine: UringEngine,
    orders: Consumer<Order>,
    results: Producer<Outcome>,
    common: Arc<Common>,
    in_flight: u32,
}

impl Side {
    fn run(mut self) {
        let mut idle_since = None;
        self.engine.watch(WAKE, self.common.helper.wake_fd().as_raw_fd());
        while self.take_inbox() {
            let holds_more = self.engine.hold_next();
            let new = self.take_orders();
            if new > 0 {
                idle_since = None;
                self.engine.enter(false);
                let submitted = self.common.submitted.load(Ordering::Relaxed);
                self.common
                    .submitted
                    .store(submitted.wrapping_add(new), Ordering::Release);
                self.report();
            } else if holds_more {
                self.engine.enter(false);
                self.report();
            } else if self.in_flight == 0 && idle_since.get_or_insert_with(Instant::now).elapsed() < SPIN {
                for _ in 0..32 {
                    std::hint::spin_loop();
                }
            } else {
                idle_since = None;
                self.sleep();
            }
        }
        // Whoever awaited requests has waited for their ends before it let the worker end.
        debug_assert_eq!(self.in_flight, 0);
    }

    /// Does what is rare; says whether to go on.
    fn take_inbox(&self) -> bool {
        let Some(rare) = self.common.helper.take_rare() else {
            return true;
        };
        for number in rare.forgotten {
            self.engine.forget_file(number);
        }
        for order in rare.memory {
            match order {
                memory::Order::Hold(part) => self.engine.hold(part),
                memory::Order::Release(part, answer) => {
                    self.engine.release(part);
                    // The worker waits for it.
                    let _ = answer.send(());
                }
            }
        }
        rare.jobs.into_iter().for_each(|job: Spawn| job());
        !rare.stop
    }

    /// Prepares what the worker has ordered, at most a batch.
    fn take_orders(&mut self) -> u32 {
        let mut new = 0;
        for _ in 0..BATCH {
            let Ok((index, request)) = self.orders.pop() else {
                break;
            };
            self.engine.submit(index, &request, &self.common.helper);
            new += 1;
        }
        self.in_flight += new;
        new
    }

    /// Passes on what has ended.
    fn report(&mut self) {
        let mut any = false;
        while let Some(completion) = self.engine.next_completion() {
            match completion {
                Completion::Operation { index, result } => {
                    self.in_flight -= 1;
                    any = true;
                    // There is a place for each: `MOST`.
                    let pushed = self.results.push((index, result));
                    debug_assert!(pushed.is_ok());
                }
                Completion::Event { armed: true, .. } => {}
                Completion::Event { result, .. } => {
                    if result == -libc::EINVAL {
                        self.engine.without_multishot();
                    } else if let Err(error) = self.common.helper.wake_fd().read() {
                        tracing::error!(%error, "cannot read an eventfd");
                    }
                    self.engine.watch(WAKE, self.common.helper.wake_fd().as_raw_fd());
                }
            }
        }
        if any {
            fence(Ordering::SeqCst);
            if self.common.worker_sleeps.load(Ordering::Relaxed) {
                self.common.worker_sleeps.store(false, Ordering::Relaxed);
                self.common.worker.ring();
            }
        }
    }

    fn sleep(&mut self) {
        self.common.helper_sleeps.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let nothing = self.orders.is_empty();
        self.engine.enter(nothing);
        self.common.helper_sleeps.store(false, Ordering::Relaxed);
        self.report();
    }
}
