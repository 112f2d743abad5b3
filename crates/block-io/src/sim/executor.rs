//! One power-on of the simulated computer: tasks, requests, time, and who comes next.
//!
//! An event is either the poll of a ready task or the end of what is due first (a request or a sleep). In order, tasks
//! run first come, first served, and every request takes equally long. At random, the seed picks the task, the duration
//! of each request, and sometimes has time pass although tasks are ready.

mod current;
mod requests;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Wake, Waker};

use super::disk::SimDisk;
use super::fault::{Fault, FaultPlan, FaultRule};
use super::host::Host;
use super::medium::{Effect, Medium};
use super::report::count_fault;
use super::rng::{Rng, hash_bytes, mix};
use crate::Operation;
use crate::worker::PollSource;

pub use current::SimClock;
pub(crate) use current::{spawn_on_current, watch};
pub(super) use requests::Request;

use current::is_readable;
use requests::Answer;

/// Lines kept for a failure's report.
const TRACE: usize = 120;

/// Who decides about order and durations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// First come, first served.
    InOrder,
    /// The seed.
    Random,
}

/// Task number 0 is the run's main future.
type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    name: Rc<str>,
    future: Option<Task>,
    waker: Waker,
    queued: bool,
    finished: bool,
}

struct TaskWaker {
    task: usize,
    woken: Arc<Mutex<Vec<usize>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        woken.push(self.task);
    }
}

enum Due {
    Request { disk: usize, id: u64 },
    Sleep(Rc<Sleep>),
}

#[derive(Default)]
struct Sleep {
    over: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

#[derive(Default)]
struct Waiting {
    waker: Option<Waker>,
    done: Option<Answer>,
}

enum Event {
    Poll(usize),
    Submit {
        disk: usize,
        operation: Operation,
        offset: u64,
        length: u64,
        id: u64,
    },
    End {
        disk: usize,
        id: u64,
        errno: i32,
    },
    Slept,
    Fault {
        disk: usize,
        fault: Fault,
    },
    Note(String),
}

/// The simulated computer while it is on. Copies are the same computer.
#[derive(Clone)]
pub struct Sim(Rc<Core>);

struct Core {
    schedule: Schedule,
    rng: RefCell<Rng>,
    now: Cell<u64>,
    next_id: Cell<u64>,
    events: Cell<u64>,
    hash: Cell<u64>,
    trace: RefCell<VecDeque<(u64, Event)>>,
    tasks: RefCell<Vec<Slot>>,
    woken: Arc<Mutex<Vec<usize>>>,
    ready: RefCell<VecDeque<usize>>,
    due: RefCell<BTreeMap<(u64, u64), Due>>,
    waiting: RefCell<BTreeMap<u64, Waiting>>,
    media: RefCell<Vec<Medium>>,
    host: RefCell<Host>,
    /// Changes of its memory.
    host_version: Cell<u64>,
    faults: FaultPlan,
    watches: RefCell<Vec<(RawFd, Waker)>>,
    sources: RefCell<Vec<Weak<dyn PollSource>>>,
    power: Cell<bool>,
}

impl fmt::Debug for Sim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Sim")
            .field("events", &self.events())
            .finish_non_exhaustive()
    }
}

impl Sim {
    pub(super) fn new(
        seed: u64,
        schedule: Schedule,
        media: Vec<Medium>,
        host: Host,
        faults: FaultPlan,
    ) -> Self {
        let sim = Self(Rc::new(Core {
            schedule,
            rng: RefCell::new(Rng::new(seed)),
            now: Cell::new(0),
            next_id: Cell::new(1),
            events: Cell::new(0),
            hash: Cell::new(mix(seed)),
            trace: RefCell::default(),
            tasks: RefCell::default(),
            woken: Arc::default(),
            ready: RefCell::default(),
            due: RefCell::default(),
            waiting: RefCell::default(),
            media: RefCell::new(media),
            host: RefCell::new(host),
            host_version: Cell::new(0),
            faults,
            watches: RefCell::default(),
            sources: RefCell::default(),
            power: Cell::new(true),
        }));
        sim.add_task("main", None);
        sim
    }

    /// Disk number `index` of [`World::media`](super::World).
    pub fn disk(&self, index: usize) -> SimDisk {
        let options = self.with_medium(index, |medium| medium.options().clone());
        SimDisk::new(self.clone(), index, options)
    }

    /// All disks, in the order of [`World::media`](super::World).
    pub fn disks(&self) -> Vec<SimDisk> {
        let count = self.0.media.borrow().len();
        (0..count).map(|index| self.disk(index)).collect()
    }

    /// The computer's clock.
    pub fn clock(&self) -> SimClock {
        SimClock(self.clone())
    }

    /// Starts a task; its name stands in reports.
    pub fn spawn(&self, name: &str, future: impl Future<Output = ()> + 'static) {
        self.add_task(name, Some(Box::pin(future)));
    }

    fn add_task(&self, name: &str, future: Option<Task>) {
        let mut tasks = self.0.tasks.borrow_mut();
        let task = tasks.len();
        let woken = Arc::clone(&self.0.woken);
        tasks.push(Slot {
            name: name.into(),
            future,
            waker: Waker::from(Arc::new(TaskWaker { task, woken })),
            queued: true,
            finished: false,
        });
        self.0.ready.borrow_mut().push_back(task);
    }

    /// Random decisions of the test itself.
    pub fn random<R>(&self, use_it: impl FnOnce(&mut Rng) -> R) -> R {
        use_it(&mut self.0.rng.borrow_mut())
    }

    /// Puts a line into the trace; it counts in the hash.
    pub fn note(&self, text: impl Into<String>) {
        let text = text.into();
        self.record(7, hash_bytes(text.as_bytes()), 0, Event::Note(text));
    }

    /// Looks at a medium, or changes it: rot, poke.
    ///
    /// # Panics
    /// If there is no such disk.
    pub fn with_medium<R>(&self, disk: usize, use_it: impl FnOnce(&mut Medium) -> R) -> R {
        use_it(&mut self.0.media.borrow_mut()[disk])
    }

    /// Has requests to a disk hit by `rule`.
    pub fn inject(&self, disk: usize, rule: FaultRule) {
        self.with_medium(disk, |medium| medium.rules.push(rule));
    }

    /// Unplugs a disk: requests in flight are undone in part, all later ones fail with ENODEV.
    pub fn detach(&self, disk: usize) {
        count_fault(Fault::Drop.name());
        self.with_medium(disk, drop_device);
    }

    /// Plugs a disk in again, with the content that it had.
    pub fn attach(&self, disk: usize) {
        self.with_medium(disk, |medium| medium.dropped = false);
    }

    /// Puts another medium in a disk's place, say an older copy of itself. What is in flight fails.
    pub fn replace(&self, disk: usize, medium: Medium) {
        count_fault("stale device");
        self.with_medium(disk, |old| {
            drop_device(old);
            let in_flight = std::mem::take(&mut old.in_flight);
            let version = old.version;
            *old = medium;
            old.in_flight = in_flight;
            old.in_flight.iter_mut().for_each(|request| request.change = None);
            old.version = old.version.max(version) + 1;
            old.dropped = false;
        });
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        self.0.events.get()
    }

    pub(super) fn hash(&self) -> u64 {
        self.0.hash.get()
    }

    /// What a crash could notice changes whenever this does.
    pub(super) fn version(&self) -> u64 {
        let media = self.0.media.borrow();
        media.iter().map(|medium| medium.version).sum::<u64>() + self.0.host_version.get()
    }

    pub(super) fn look<R>(&self, use_it: impl FnOnce(&[Medium]) -> R) -> R {
        use_it(&self.0.media.borrow())
    }

    fn record(&self, kind: u64, a: u64, b: u64, event: Event) {
        let core = &self.0;
        core.hash
            .set(mix(core.hash.get() ^ (kind << 56) ^ a).wrapping_add(b ^ core.now.get()));
        let mut trace = core.trace.borrow_mut();
        if trace.len() >= TRACE {
            trace.pop_front();
        }
        trace.push_back((core.now.get(), event));
    }

    pub(super) fn trace(&self) -> Vec<String> {
        let tasks = self.0.tasks.borrow();
        let media = self.0.media.borrow();
        let name = |disk: usize| media.get(disk).map_or("?", |medium| &medium.options.name);
        let line = |(now, event): &(u64, Event)| {
            let what = match event {
                Event::Poll(task) => format!("run {}", tasks.get(*task).map_or("?", |slot| &slot.name)),
                Event::Submit {
                    disk,
                    operation,
                    offset,
                    length,
                    id,
                } => {
                    format!("{}: #{id} {operation} {length} bytes at {offset}", name(*disk))
                }
                Event::End { disk, id, errno: 0 } => format!("{}: #{id} done", name(*disk)),
                Event::End { disk, id, errno } => format!("{}: #{id} fails with errno {errno}", name(*disk)),
                Event::Slept => "a sleep ends".to_owned(),
                Event::Fault { disk, fault } => format!("{}: fault: {fault:?}", name(*disk)),
                Event::Note(text) => format!("note: {text}"),
            };
            format!("{:>9} us  {what}", now / 1000)
        };
        self.0.trace.borrow().iter().map(line).collect()
    }

    /// The names of the tasks that have not ended.
    pub(super) fn waiting_tasks(&self) -> Vec<String> {
        let tasks = self.0.tasks.borrow();
        tasks
            .iter()
            .filter(|slot| !slot.finished)
            .map(|slot| slot.name.to_string())
            .collect()
    }

    fn take_woken(&self) {
        let mut woken = self.0.woken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tasks = self.0.tasks.borrow_mut();
        for task in woken.drain(..) {
            if let Some(slot) = tasks.get_mut(task).filter(|slot| !slot.queued && !slot.finished) {
                slot.queued = true;
                self.0.ready.borrow_mut().push_back(task);
            }
        }
    }

    /// Makes one event happen. Says `false` if none can ever happen again.
    pub(super) fn step(&self, main: &mut dyn FnMut(&mut Context<'_>)) -> bool {
        let core = &self.0;
        self.take_woken();
        if core.ready.borrow().is_empty() {
            self.look_outside();
        }
        core.events.set(core.events.get() + 1);
        let ready = core.ready.borrow().len();
        let hurry = core.schedule == Schedule::Random
            && !core.due.borrow().is_empty()
            && core.rng.borrow_mut().chance(1, 4);
        if ready > 0 && !hurry {
            let picked = match core.schedule {
                Schedule::InOrder => 0,
                Schedule::Random => core.rng.borrow_mut().index(ready),
            };
            let task = core.ready.borrow_mut().remove(picked);
            if let Some(task) = task {
                self.poll_task(task, main);
            }
            return true;
        }
        let next = core.due.borrow_mut().pop_first();
        let Some(((due, _), what)) = next else {
            return false;
        };
        core.now.set(due.max(core.now.get()));
        match what {
            Due::Request { disk, id } => self.end_request(disk, id),
            Due::Sleep(sleep) => {
                self.record(4, 0, 0, Event::Slept);
                sleep.over.set(true);
                if let Some(waker) = sleep.waker.take() {
                    waker.wake();
                }
            }
        }
        true
    }

    fn poll_task(&self, task: usize, main: &mut dyn FnMut(&mut Context<'_>)) {
        self.record(5, task as u64, 0, Event::Poll(task));
        let (future, waker) = {
            let mut tasks = self.0.tasks.borrow_mut();
            let slot = &mut tasks[task];
            slot.queued = false;
            (slot.future.take(), slot.waker.clone())
        };
        let mut context = Context::from_waker(&waker);
        let Some(mut future) = future else {
            return main(&mut context);
        };
        if future.as_mut().poll(&mut context).is_ready() {
            drop(future);
            self.0.tasks.borrow_mut()[task].finished = true;
        } else {
            self.0.tasks.borrow_mut()[task].future = Some(future);
        }
    }

    /// All tasks wait: what a worker would do before it sleeps.
    fn look_outside(&self) {
        let sources = std::mem::take(&mut *self.0.sources.borrow_mut());
        for source in sources {
            if let Some(alive) = source.upgrade() {
                alive.prepare_sleep();
                self.0.sources.borrow_mut().push(source);
            }
        }
        self.0.watches.borrow_mut().retain(|(fd, waker)| {
            let readable = is_readable(*fd);
            if readable {
                waker.wake_by_ref();
            }
            !readable
        });
        self.take_woken();
    }

    /// Ends the run. With a `crash`, requests in flight stay in flight.
    pub(super) fn end(&self, crash: bool) -> (Vec<Medium>, Host) {
        if crash {
            self.0.power.set(false);
        }
        loop {
            let next = self
                .0
                .tasks
                .borrow_mut()
                .iter_mut()
                .find_map(|slot| slot.future.take());
            let Some(future) = next else { break };
            drop(future);
        }
        self.0.power.set(false);
        (self.0.media.take(), self.0.host.take())
    }

    pub(super) fn with_host<R>(&self, use_it: impl FnOnce(&mut Host) -> R) -> R {
        use_it(&mut self.0.host.borrow_mut())
    }

    pub(super) fn host_changed(&self) {
        self.0.host_version.set(self.0.host_version.get() + 1);
    }

    pub(super) fn cut_power(&self) {
        self.0.power.set(false);
    }
}

/// A device goes away: what is in flight fails.
fn drop_device(medium: &mut Medium) {
    medium.dropped = true;
    medium.version += 1;
    for request in &mut medium.in_flight {
        request.effect = Effect::Fail(libc::ENODEV);
    }
}
