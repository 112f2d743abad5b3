//! A guest that does forbidden things for ever does not fill the host's log.

#![allow(clippy::unwrap_used, reason = "tests")]

mod micro_guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use micro_guest::Machine;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use virtio_core::{Activation, DeviceError, VirtioDevice};
use vmm::layout;
use vmm::pci::PciFunction;
use vmm::transport::{BAR_SIZE, TransportEvents, VirtioPci};

const BAR: u64 = layout::MMIO32.start + BAR_SIZE;
/// So many lines may come of any number of misdeeds in a short time.
const LINES: usize = 100;

/// Counts lines that an administrator sees.
struct Lines(Arc<AtomicUsize>);

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Device;

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        virtio_core::device_type::ENTROPY
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[8]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn is_idle(&mut self) -> bool {
        true
    }
}

struct Quiet;

impl TransportEvents for Quiet {
    fn activated(&self) {}
    fn needs_reset(&self, _reason: &str) {}
}

fn function(machine: &Machine) -> VirtioPci {
    let memory = machine.ram.memory().clone();
    VirtioPci::new(
        machine.vm.clone(),
        memory,
        false,
        Box::new(Device),
        BAR,
        Arc::new(Quiet),
    )
    .unwrap()
}

/// Lines that come of `misdeeds`.
fn lines_of(misdeeds: impl FnOnce()) -> usize {
    let count = Arc::<AtomicUsize>::default();
    tracing::subscriber::with_default(Lines(count.clone()), misdeeds);
    count.load(Ordering::SeqCst)
}

#[test]
fn drivers_that_place_their_rings_outside_of_memory_are_named_a_few_times() {
    let Some(machine) = Machine::new() else { return };
    let function = function(&machine);
    let write = |offset, data: &[u8]| function.bar_write(offset, data);
    let lines = lines_of(|| {
        for _ in 0..2 * LINES {
            for status in [0, 1, 3] {
                write(0x14, &[status]);
            }
            write(0x08, &1_u32.to_le_bytes());
            write(0x0c, &1_u32.to_le_bytes());
            write(0x14, &[0xb]);
            write(0x20, &(1_u64 << 40).to_le_bytes());
            write(0x1c, &1_u16.to_le_bytes());
            write(0x14, &[0xf]);
            let mut status = [0];
            function.bar_read(0x14, &mut status);
            assert_eq!(status, [0x4f]);
        }
    });
    assert!((1..=LINES).contains(&lines), "{lines} lines");
}

#[test]
fn bars_that_fight_for_an_address_are_named_a_few_times() {
    let Some(machine) = Machine::new() else { return };
    let (first, second) = (function(&machine), function(&machine));
    first.config_write(4, &2_u16.to_le_bytes());
    let lines = lines_of(|| {
        for _ in 0..2 * LINES {
            second.config_write(4, &2_u16.to_le_bytes());
            second.config_write(4, &0_u16.to_le_bytes());
        }
    });
    assert!((1..=LINES).contains(&lines), "{lines} lines");
}
