//! Which path is active: failures, probes, and the change from one path to the next.

use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::buffer::IoBuf;
use crate::clock::Clock;
use crate::cover;
use crate::device::{BlockDevice, Durability};
use crate::error::{IoCause, IoError};
use crate::unflushed::{Content, Unflushed, Write};
use crate::worker::spawn_local;

use super::{AllDown, Shared};

#[derive(Debug)]
pub(super) struct State {
    pub(super) up: Vec<bool>,
    /// Whether a task probes the path.
    probed: Vec<bool>,
    /// None when it went down: even if the same path comes back first, it has to be prepared.
    active: Option<usize>,
    last: usize,
    /// Counts changes of the active path.
    pub(super) epoch: u64,
    /// One request prepares the next path, the others wait.
    changing: bool,
    waiting: Vec<Waker>,
    /// When the last path went down.
    outage: Option<Duration>,
    last_error: Option<Arc<IoError>>,
    pub(super) unflushed: Unflushed,
}

impl State {
    pub(super) fn new(paths: usize) -> Self {
        Self {
            up: vec![true; paths],
            probed: vec![false; paths],
            active: Some(0),
            last: 0,
            epoch: 0,
            changing: false,
            waiting: Vec::new(),
            outage: None,
            last_error: None,
            unflushed: Unflushed::default(),
        }
    }

    fn wake_all(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }

    /// The error of a request when no path works.
    pub(super) fn all_down(&self) -> IoCause {
        match &self.last_error {
            Some(error) => IoCause::ConnectionLost {
                source: Arc::new(AllDown {
                    count: self.up.len(),
                    source: Arc::clone(error),
                }),
            },
            None => IoCause::Os(std::io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }

    /// The path that was active last, or the next one after it, whichever is up.
    fn next_up(&self) -> Option<usize> {
        let count = self.up.len();
        (0..count)
            .map(|step| (self.last + step) % count)
            .find(|path| self.up[*path])
    }
}

enum Choice {
    Path(usize, u64),
    /// Change to this path, which this request has to prepare.
    Change(usize),
}

/// The active path and its epoch. Changes the path if the active one is down; waits if all are.
pub(super) async fn active<D, C>(shared: &Arc<Shared<D, C>>) -> Result<(usize, u64), IoCause>
where
    D: BlockDevice + 'static,
    C: Clock + Clone + 'static,
{
    loop {
        let choice = poll_fn(|context| {
            let mut state = shared.lock();
            if !state.changing {
                if let Some(path) = state.active {
                    return Poll::Ready(Ok(Choice::Path(path, state.epoch)));
                }
                probe_all_down(shared, &mut state);
                if let Some(next) = state.next_up() {
                    state.changing = true;
                    return Poll::Ready(Ok(Choice::Change(next)));
                }
                let outage = state.outage.unwrap_or_default();
                if shared.clock.now().saturating_sub(outage) >= shared.options.patience {
                    cover!("multipath: all paths are down for too long");
                    return Poll::Ready(Err(state.all_down()));
                }
            }
            state.waiting.push(context.waker().clone());
            Poll::Pending
        });
        match choice.await? {
            Choice::Path(path, epoch) => return Ok((path, epoch)),
            Choice::Change(path) => change(shared, path).await,
        }
    }
}

/// Lets the others go on, whatever happens to the request that prepares the path.
struct Changing<'a, D, C>(&'a Shared<D, C>);

impl<D, C> Drop for Changing<'_, D, C> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.changing = false;
        state.wake_all();
    }
}

/// Makes `path` the active one, after everything that is not flushed was written there.
async fn change<D, C>(shared: &Arc<Shared<D, C>>, path: usize)
where
    D: BlockDevice + 'static,
    C: Clock + Clone + 'static,
{
    let _changing = Changing(shared);
    let (writes, epoch) = {
        let mut state = shared.lock();
        // Before the first write: what succeeds on the old path from now on does not count.
        state.epoch += 1;
        (state.unflushed.all(), state.epoch)
    };
    for write in &writes {
        cover!("multipath: an unflushed write repeated");
        match repeat(&shared.paths[path].device, write).await {
            Ok(()) => {}
            Err(error) if error.is_transport() => return down(shared, path, error),
            Err(error) => {
                tracing::error!(device = %shared.name, %error, "a write that had completed cannot be repeated");
                shared.flush_failed.store(true, Ordering::Relaxed);
            }
        }
    }
    let mut state = shared.lock();
    if state.epoch == epoch && state.up[path] {
        tracing::warn!(device = %shared.name, path = %shared.paths[path].name, "requests take this path now");
        state.active = Some(path);
        state.last = path;
    }
}

async fn repeat(device: &impl BlockDevice, write: &Write) -> Result<(), IoError> {
    match &write.content {
        Content::Data(data) => {
            // SAFETY: the data is only read, and belongs to `write`, which outlives this future's use of it.
            let piece = [unsafe { IoBuf::new(data.as_ptr().cast_mut(), data.len()) }];
            device.write(write.offset, &piece, Durability::Volatile).await
        }
        Content::Zeroes { length, mode } => device.write_zeroes(write.offset, *length, *mode).await,
    }
}

/// A request of `epoch` failed on `path`.
pub(super) fn failed<D, C>(shared: &Arc<Shared<D, C>>, path: usize, epoch: u64, error: IoError)
where
    D: BlockDevice + 'static,
    C: Clock + Clone + 'static,
{
    // What fails after a change says nothing about the path now.
    if shared.lock().epoch == epoch {
        down(shared, path, error);
    }
}

fn down<D, C>(shared: &Arc<Shared<D, C>>, path: usize, error: IoError)
where
    D: BlockDevice + 'static,
    C: Clock + Clone + 'static,
{
    let mut state = shared.lock();
    if std::mem::replace(&mut state.up[path], false) {
        tracing::warn!(device = %shared.name, path = %shared.paths[path].name, reason = %error, "the path is down");
    }
    if state.active == Some(path) {
        state.active = None;
    }
    state.last_error = Some(Arc::new(error));
    if !state.up.contains(&true) {
        state.outage = Some(shared.clock.now());
    }
    probe_all_down(shared, &mut state);
}

/// Whether a path that is up or down works now.
pub(super) async fn probe<D, C>(shared: &Shared<D, C>, path: usize) -> bool
where
    D: BlockDevice,
{
    super::read_first_block(&shared.paths[path].device).await
}

/// Sees to it that every path that is down has a task that probes it. They run on the worker of whoever notices; if that
/// stops, the next request starts them anew.
fn probe_all_down<D, C>(shared: &Arc<Shared<D, C>>, state: &mut State)
where
    D: BlockDevice + 'static,
    C: Clock + Clone + 'static,
{
    for path in 0..state.up.len() {
        if !state.up[path] && !state.probed[path] {
            let probing = Probing {
                shared: Arc::downgrade(shared),
                path,
            };
            let clock = shared.clock.clone();
            let pause = shared.options.first_pause;
            state.probed[path] = match spawn_local(probing.run(clock, pause)) {
                Ok(()) => true,
                // Not on a worker, where no request succeeds. Its end would want the lock that is held here.
                Err(task) => {
                    std::mem::forget(task);
                    false
                }
            };
        }
    }
}

struct Probing<D, C> {
    shared: Weak<Shared<D, C>>,
    path: usize,
}

impl<D: BlockDevice, C: Clock> Probing<D, C> {
    async fn run(self, clock: C, mut pause: Duration) {
        loop {
            clock.sleep(pause).await;
            // The device may have been closed meanwhile.
            let Some(shared) = self.shared.upgrade() else {
                return;
            };
            let works = probe(&shared, self.path).await;
            let mut state = shared.lock();
            // Those that wait look whether they have waited long enough.
            state.wake_all();
            if works {
                cover!("multipath: a path came back");
                tracing::info!(device = %shared.name, path = %shared.paths[self.path].name, "the path is back");
                state.up[self.path] = true;
                state.outage = None;
                return;
            }
            pause = (pause * 2).min(shared.options.longest_pause);
            if let Some(outage) = state.outage {
                let left = (outage + shared.options.patience).saturating_sub(clock.now());
                pause = if left.is_zero() { pause } else { pause.min(left) };
            }
        }
    }
}

impl<D, C> Drop for Probing<D, C> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            let mut state = shared.lock();
            state.probed[self.path] = false;
            state.wake_all();
        }
    }
}
