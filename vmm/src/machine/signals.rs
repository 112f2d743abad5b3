//! What vCPUs and devices tell the main loop.
//!
//! A signal is put into a queue and a bell is rung; the thread that gives it never waits. For those that end the guest's
//! present life the gate is closed first: no vCPU enters the guest again before the main loop has decided what comes next.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::platform::{GuestPanic, PlatformEvents};
use crate::transport::TransportEvents;
use crate::vcpu::{Gate, VcpuEvents, VcpuFault};

/// Something that the main loop has to deal with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Signal {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked and starts its crash kernel.
    CrashKernel,
    /// The guest's kernel reported a panic.
    Panic,
    /// A vCPU cannot go on.
    Fault(VcpuFault),
    /// The guest let go of the device in a slot.
    Ejected(u8),
    /// The guest's driver took the device in a slot into use.
    Active(u8),
    /// The device in a slot stopped because of its driver.
    NeedsReset(u8, String),
    /// A line on the debug port, and the time since the VM was started.
    DebugLine(String, Duration),
}

/// The way from any thread to the main loop.
#[derive(Debug)]
pub(super) struct Signals {
    gate: Arc<Gate>,
    queue: Mutex<Vec<Signal>>,
    bell: EventFd,
}

/// Signals that may wait for the main loop; a guest that makes more of them than can be looked at loses them.
const MAX_WAITING: usize = 4096;

impl Signals {
    pub(super) fn new(gate: Arc<Gate>, bell: EventFd) -> Self {
        Signals {
            gate,
            queue: Mutex::default(),
            bell,
        }
    }

    pub(super) fn give(&self, signal: Signal) {
        let ends_life = matches!(signal, Signal::PowerOff | Signal::Reset | Signal::Fault(_));
        if ends_life {
            self.gate.close();
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if ends_life || queue.len() < MAX_WAITING {
            queue.push(signal);
        }
        drop(queue);
        // Non-blocking, and it cannot overflow before the main loop looks.
        let _ = self.bell.write(1);
    }

    pub(super) fn debug_line(&self, text: &str, since_start: Duration) {
        self.give(Signal::DebugLine(text.to_owned(), since_start));
    }

    /// Takes all waiting signals, in order.
    pub(super) fn take(&self) -> Vec<Signal> {
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PlatformEvents for Signals {
    fn power_off(&self) {
        self.give(Signal::PowerOff);
    }

    fn reset(&self) {
        self.give(Signal::Reset);
    }

    fn guest_panic(&self, panic: GuestPanic) {
        self.give(match panic {
            GuestPanic::Panicked => Signal::Panic,
            GuestPanic::CrashKernelStarts => Signal::CrashKernel,
        });
    }

    fn eject(&self, slot: u8) {
        self.give(Signal::Ejected(slot));
    }
}

impl VcpuEvents for Signals {
    fn fault(&self, fault: VcpuFault) {
        self.give(Signal::Fault(fault));
    }
}

/// Events of the device in one slot.
#[derive(Debug)]
pub(super) struct SlotSignals {
    pub(super) slot: u8,
    pub(super) signals: Arc<Signals>,
}

impl TransportEvents for SlotSignals {
    fn activated(&self) {
        self.signals.give(Signal::Active(self.slot));
    }

    fn needs_reset(&self, reason: &str) {
        self.signals
            .give(Signal::NeedsReset(self.slot, reason.to_owned()));
    }
}
