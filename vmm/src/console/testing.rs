//! A main loop and a guest for the tests of consoles and of the devices on them.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberOps};

use super::{Console, ConsoleCommand, ConsoleInput, ConsoleOptions};
use crate::config::ConsoleSpec;

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A console with a main loop of its own.
pub(crate) struct Bench {
    pub(crate) console: Option<Console>,
    wakes: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    endpoint: RemoteEndpoint<Subscriber>,
    thread: Option<JoinHandle<()>>,
}

/// Options that note commands in the returned list.
pub(crate) fn options() -> (ConsoleOptions, Arc<Mutex<Vec<ConsoleCommand>>>) {
    let commands = Arc::<Mutex<Vec<ConsoleCommand>>>::default();
    let noted = commands.clone();
    let options = ConsoleOptions {
        name: "test".to_owned(),
        escape: Some(0x1d),
        commands: Arc::new(move |command| noted.lock().unwrap().push(command)),
    };
    (options, commands)
}

impl Bench {
    pub(crate) fn open(spec: &str) -> Self {
        Self::new(Console::open(&spec.parse::<ConsoleSpec>().unwrap(), options().0).unwrap())
    }

    pub(crate) fn on(input: &impl AsFd, output: &impl AsFd) -> Self {
        Self::new(Console::on_descriptors(input.as_fd(), output.as_fd(), options().0).unwrap())
    }

    pub(crate) fn new(mut console: Console) -> Self {
        let mut main_loop = EventManager::<Subscriber>::new().unwrap();
        main_loop.add_subscriber(console.take_subscriber().unwrap());
        let endpoint = main_loop.remote_endpoint();
        let (wakes, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (counter, stopped) = (wakes.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                main_loop.run().unwrap();
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self {
            console: Some(console),
            wakes,
            stop,
            endpoint,
            thread: Some(thread),
        }
    }

    pub(crate) fn handle(&self) -> super::ConsoleHandle {
        self.console.as_ref().unwrap().handle()
    }

    /// Waits until all is quiet, and then insists on it: nothing may wake the main loop.
    pub(crate) fn assert_idle(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.wakes.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(100));
            if self.wakes.load(Ordering::SeqCst) == before {
                return;
            }
            assert!(Instant::now() < deadline, "the main loop does not come to rest");
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.console = None;
        self.stop.store(true, Ordering::SeqCst);
        self.endpoint.fire(|_| {}).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A guest that takes all input, or as much as is asked for.
#[derive(Default)]
pub(crate) struct Guest {
    state: Mutex<GuestState>,
    changed: Condvar,
}

#[derive(Default)]
struct GuestState {
    input: Vec<u8>,
    /// Takes no more than this in total.
    limit: Option<usize>,
    output_ready: usize,
}

impl Guest {
    pub(crate) fn attach(bench: &Bench) -> Arc<Self> {
        let guest = Arc::<Self>::default();
        bench.handle().set_input(Some(guest.clone()));
        guest
    }

    pub(crate) fn limited(bench: &Bench, limit: usize) -> Arc<Self> {
        let guest = Arc::<Self>::default();
        guest.set_limit(Some(limit));
        bench.handle().set_input(Some(guest.clone()));
        guest
    }

    pub(crate) fn set_limit(&self, limit: Option<usize>) {
        self.state.lock().unwrap().limit = limit;
    }

    /// Waits for `count` bytes of input.
    pub(crate) fn wait_for(&self, count: usize) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.input.len() < count)
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "{} bytes came of {count}",
            state.input.len()
        );
        state.input.clone()
    }

    /// Waits until output may go on, for the `count`th time.
    pub(crate) fn wait_for_output_ready(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.output_ready < count)
            .unwrap();
        assert!(!timeout.timed_out(), "{} times so far", state.output_ready);
    }
}

impl ConsoleInput for Guest {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock().unwrap();
        let room = state
            .limit
            .map_or(usize::MAX, |limit| limit.saturating_sub(state.input.len()));
        let accepted = bytes.len().min(room);
        state.input.extend(&bytes[..accepted]);
        self.changed.notify_all();
        accepted
    }

    fn output_ready(&self) {
        self.state.lock().unwrap().output_ready += 1;
        self.changed.notify_all();
    }
}

/// Text in which every lost, doubled or exchanged byte shows.
pub(crate) fn text(length: usize) -> Vec<u8> {
    (0_u32..)
        .flat_map(|line| format!("{line:07}\n").into_bytes())
        .take(length)
        .collect()
}
