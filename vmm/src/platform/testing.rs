//! What the tests of the devices share.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{GuestPanic, Interrupt, PlatformEvents};
use crate::bus::BusDevice;

/// What a guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    PowerOff,
    Reset,
    Panic(GuestPanic),
    Eject(u8),
}

/// Notes what the guest asks for.
#[derive(Default)]
pub(crate) struct Recorder(Mutex<Vec<Event>>);

impl Recorder {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What was asked since the last call.
    pub(crate) fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    fn note(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

impl PlatformEvents for Recorder {
    fn power_off(&self) {
        self.note(Event::PowerOff);
    }

    fn reset(&self) {
        self.note(Event::Reset);
    }

    fn guest_panic(&self, panic: GuestPanic) {
        self.note(Event::Panic(panic));
    }

    fn eject(&self, slot: u8) {
        self.note(Event::Eject(slot));
    }
}

/// Counts the edges of an interrupt line.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<AtomicUsize>);

impl Lines {
    pub(crate) fn interrupt(&self) -> Interrupt {
        let count = self.0.clone();
        Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

pub(crate) fn read_byte(device: &dyn BusDevice, offset: u64) -> u8 {
    let mut data = [0];
    device.read(offset, &mut data);
    data[0]
}
