//! The entropy source: virtio-rng (virtio 1.2 §5.4).
//!
//! A guest asks rarely and for little, so there is no thread: the VMM's event loop serves the one queue. What it gets comes
//! from the host's `getrandom`, which does not wait once the host is up.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_core::{
    Activation, ActiveQueue, DeviceError, DeviceEvents, GuestMemory, VirtioDevice, device_type, feature,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::event_loop::{EventLoop, Registration};
use super::guest_buffers::{Direction, GuestBuffers};
use super::used_ring::Interrupts;

/// Descriptors in the queue.
const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request gets. The guest may ask for gigabytes; less is allowed (§5.4.6.1).
const MAX_REQUEST: usize = 64 << 10;
/// The most bytes in one go before others on the event loop get their turn.
const MAX_BATCH: usize = 256 << 10;

/// An entropy source.
pub struct Rng {
    event_loop: EventLoop,
    active: Option<Active>,
}

/// What there is only while the driver uses the device.
struct Active {
    /// Taken away by a reset, so that the subscriber, which may live a little longer, has nothing left to touch.
    queue: Arc<Mutex<Option<RngQueue>>>,
    _registration: Registration,
}

impl fmt::Debug for Rng {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Rng")
            .field("active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}

impl Rng {
    /// A device that is served on `event_loop`.
    pub fn new(event_loop: EventLoop) -> Self {
        Self {
            event_loop,
            active: None,
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        device_type::ENTROPY
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.reset();
        let event_idx = activation.has(feature::RING_EVENT_IDX);
        let Some(mut queue) = activation.queues.into_iter().find(|queue| queue.index == 0) else {
            return Err(DeviceError::MissingQueues {
                enabled: 0,
                needed: 1,
            });
        };
        queue.queue.set_event_idx(event_idx);
        let host = |action: &str| {
            let action = action.to_owned();
            move |source| DeviceError::Host { action, source }
        };
        let kick = queue
            .kick
            .try_clone()
            .map_err(host("copy the entropy source's doorbell"))?;
        let shared = Arc::new(Mutex::new(Some(RngQueue {
            interrupts: Interrupts::new(&queue),
            buffers: GuestBuffers::new(Arc::clone(&activation.memory)),
            memory: activation.memory,
            events: activation.events,
            queue,
        })));
        let subscriber = RngSubscriber {
            kick,
            queue: Arc::clone(&shared),
        };
        let registration = Registration::new(&self.event_loop, Box::new(subscriber))
            .map_err(|error| std::io::Error::other(error.to_string()))
            .map_err(host("reach the event loop for the entropy source"))?;
        self.active = Some(Active {
            queue: shared,
            _registration: registration,
        });
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            active.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    fn is_idle(&mut self) -> bool {
        self.active.is_none()
    }
}

/// The place on the event loop.
struct RngSubscriber {
    kick: EventFd,
    queue: Arc<Mutex<Option<RngQueue>>>,
}

impl RngSubscriber {
    fn serve(&self) {
        let mut place = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = place.as_mut() else {
            return;
        };
        match queue.serve() {
            Ok(false) => {}
            // The doorbell of our own making brings us back after the others.
            Ok(true) => drop(self.kick.write(1)),
            Err(reason) => {
                queue.events.needs_reset(&format!("entropy source: {reason}"));
                *place = None;
            }
        }
    }
}

impl MutEventSubscriber for RngSubscriber {
    fn process(&mut self, _events: Events, _operations: &mut EventOps<'_>) {
        // Readable, or we would not be here.
        let _ = self.kick.read();
        self.serve();
    }

    fn init(&mut self, operations: &mut EventOps<'_>) {
        if let Err(error) = operations.add(Events::new(&self.kick, EventSet::IN)) {
            tracing::error!(?error, "the entropy source cannot watch its doorbell");
        }
        // What the driver queued before DRIVER_OK rings no doorbell.
        self.serve();
    }
}

/// The queue while it is in use.
struct RngQueue {
    queue: ActiveQueue,
    interrupts: Interrupts,
    buffers: GuestBuffers,
    memory: GuestMemory,
    events: Arc<dyn DeviceEvents>,
}

impl RngQueue {
    /// Fills requests; whether there are more.
    fn serve(&mut self) -> Result<bool, String> {
        let text = |error: DeviceError| error.to_string();
        let mut left = MAX_BATCH;
        let more = loop {
            let chain = match self.queue.queue.iter(&*self.memory) {
                Ok(mut chains) => chains.next(),
                Err(source) => return Err(source.to_string()),
            };
            let Some(chain) = chain else {
                match self.queue.queue.enable_notification(&*self.memory) {
                    Ok(true) => continue,
                    Ok(false) => break false,
                    Err(source) => return Err(source.to_string()),
                }
            };
            let head = chain.head_index();
            self.buffers.clear();
            self.buffers
                .append(chain, Direction::ToGuest)
                .map_err(|error| error.to_string())?;
            let written = fill(&self.buffers);
            self.queue
                .add_used(&self.memory, head, u32::try_from(written).unwrap_or(0))
                .map_err(text)?;
            // An empty request costs something as well.
            left = left.saturating_sub(written.max(1024));
            if left == 0 {
                break true;
            }
        };
        self.interrupts
            .notify(&mut self.queue, &self.memory)
            .map_err(text)?;
        Ok(more)
    }
}

/// Runs the queue of an entropy source made of `data`; see [`super::fuzz`].
///
/// # Panics
/// When the device misbehaves.
#[cfg(any(test, feature = "fuzzing"))]
pub fn fuzz_rng(data: &[u8]) {
    let (guest, queues) = super::fuzz::Guest::new(&mut super::fuzz::Input::new(data), 1);
    for queue in queues {
        let mut queue = RngQueue {
            interrupts: Interrupts::new(&queue),
            buffers: GuestBuffers::new(Arc::clone(&guest.memory)),
            memory: Arc::clone(&guest.memory),
            events: Arc::clone(&guest.events),
            queue,
        };
        for _ in 0..16 {
            if queue.serve() != Ok(true) {
                break;
            }
        }
    }
    guest.check();
}

/// Puts random bytes into the first [`MAX_REQUEST`] bytes of `buffers`; how many.
fn fill(buffers: &GuestBuffers) -> usize {
    let wanted = buffers.len().min(MAX_REQUEST);
    let mut done = 0;
    let mut chunk = [0_u8; 1024];
    while done < wanted {
        let size = chunk.len().min(wanted - done);
        match getrandom(&mut chunk[..size], GetRandomFlags::NONBLOCK) {
            Ok(count) if count > 0 => done += buffers.copy_from(done, &chunk[..count]),
            Err(rustix::io::Errno::INTR) => {}
            // Right after the host's own start; the guest asks again.
            _ => break,
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_driver::{
        BUFFERS, Driver, HIGH_MEMORY, TestLoop, eventually, readable, writable,
    };

    const ALL: u64 = u64::MAX;

    proptest::proptest! {
        #[test]
        fn no_input_breaks_it(data in proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..1024)) {
            fuzz_rng(&data);
        }

        #[test]
        fn no_mostly_valid_chains_break_it(data in crate::devices::fuzz::tests::mostly_valid(1)) {
            fuzz_rng(&data);
        }
    }

    #[test]
    fn requests_are_filled_with_different_bytes() {
        let event_loop = TestLoop::new();
        let mut rng = Rng::new(event_loop.handle());
        let mut driver = Driver::new(&mut rng, ALL);
        driver.queues[0].add(&[writable(BUFFERS, 64), writable(HIGH_MEMORY, 5000)]);
        driver.queues[0].ring();
        assert_eq!(driver.queues[0].used().written, 5064);
        let (first, second) = (driver.read(BUFFERS, 64), driver.read(HIGH_MEMORY, 5000));
        assert_ne!(first, [0; 64]);
        assert_ne!(first, second[..64]);
        assert_ne!(second[4936..], [0; 64]);
    }

    #[test]
    fn a_request_gets_64_kib_at_most_and_many_are_all_served() {
        let event_loop = TestLoop::new();
        let mut rng = Rng::new(event_loop.handle());
        let mut driver = Driver::new(&mut rng, ALL);
        for _ in 0..64 {
            driver.queues[0].add(&[writable(BUFFERS, 1 << 20)]);
        }
        driver.queues[0].ring();
        for _ in 0..64 {
            assert_eq!(driver.queues[0].used().written, 64 << 10);
        }
        assert_eq!(driver.read(BUFFERS + (64 << 10), 64), [0; 64]);
    }

    #[test]
    fn requests_of_no_use_are_given_back() {
        let event_loop = TestLoop::new();
        let mut rng = Rng::new(event_loop.handle());
        let mut driver = Driver::new(&mut rng, 0);
        driver.queues[0].add(&[readable(BUFFERS, 64)]);
        driver.queues[0].add(&[writable(BUFFERS, 0)]);
        driver.queues[0].ring();
        assert_eq!(driver.queues[0].used().written, 0);
        assert_eq!(driver.queues[0].used().written, 0);
    }

    #[test]
    fn it_is_idle_right_after_a_reset_and_leaves_the_loop() {
        let event_loop = TestLoop::new();
        let mut rng = Rng::new(event_loop.handle());
        let mut driver = Driver::new(&mut rng, ALL);
        for _ in 0..50 {
            driver.queues[0].add(&[writable(BUFFERS, 4096)]);
            driver.queues[0].ring();
            rng.reset();
            assert!(rng.is_idle());
            let before = driver.read(BUFFERS, 4096);
            driver.queues[0].ring();
            std::thread::yield_now();
            assert_eq!(driver.read(BUFFERS, 4096), before);
            driver.activate(&mut rng, ALL);
        }
        // The loop holds a doorbell for as long as it knows the subscriber.
        rng.reset();
        let queue = Arc::new(Mutex::new(None));
        let probe = RngSubscriber {
            kick: driver.queues[0].kick.try_clone().unwrap(),
            queue: Arc::clone(&queue),
        };
        let registration = Registration::new(&event_loop.handle(), Box::new(probe)).unwrap();
        eventually("its arrival", || Arc::strong_count(&queue) == 2);
        drop(registration);
        eventually("its departure", || Arc::strong_count(&queue) == 1);
    }

    #[test]
    fn a_hostile_driver_stops_it_until_the_reset() {
        let event_loop = TestLoop::new();
        let mut rng = Rng::new(event_loop.handle());
        let mut driver = Driver::new(&mut rng, ALL);
        driver.queues[0].set_avail_index(1000);
        driver.queues[0].ring();
        assert!(driver.reset_reason().contains("entropy source"));
        Driver::reset(&mut rng);
        driver.activate(&mut rng, ALL);
        driver.queues[0].add(&[writable(HIGH_MEMORY - 10, 64)]);
        driver.queues[0].ring();
        assert!(driver.reset_reason().contains("not in guest memory"));
    }
}
