//! PCI, MSI-X and virtqueues as a guest's instructions meet them, on real `/dev/kvm`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod micro_guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use micro_guest::{Code, Machine};
use virtio_core::virtio_queue::QueueT;
use virtio_core::{Activation, DeviceError, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};
use vmm::layout;
use vmm::pci::PciFunction;
use vmm::transport::{BAR_SIZE, TransportEvents, VirtioPci};
use vmm_sys_util::eventfd::EventFd;

const BAR: u64 = layout::MMIO32.start + BAR_SIZE;
/// ECAM address of slot 1.
const FUNCTION: u64 = layout::ECAM.start + (1 << 15);
const MSIX_TABLE: u64 = BAR + 0x8000;
const DOORBELL: u64 = BAR + 0x3000;
const LAPIC: u64 = 0xfee0_0000;

const DESCRIPTORS: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const BUFFER: u64 = 0x20_3000;
const IDT: u64 = 0x20_4000;
const HANDLER: u64 = 0x20_5000;

/// Writes four bytes into every buffer that it is given.
#[derive(Default)]
struct Filler {
    worker: Option<(std::thread::JoinHandle<()>, vmm_sys_util::eventfd::EventFd)>,
    served: Arc<AtomicU32>,
}

impl VirtioDevice for Filler {
    fn device_type(&self) -> u32 {
        virtio_core::device_type::ENTROPY
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[8]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        virtio_core::read_config_bytes(b"config", offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory, mut queues, ..
        } = activation;
        let mut queue = queues.remove(0);
        let stop = queue.kick.try_clone().unwrap();
        let served = self.served.clone();
        let worker = std::thread::spawn(move || {
            let mut poll = libc::pollfd {
                fd: std::os::fd::AsRawFd::as_raw_fd(&queue.kick),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid pollfd; the eventfd lives in `queue`.
            unsafe { libc::poll(&raw mut poll, 1, 10_000) };
            while let Some(chain) = queue.queue.pop_descriptor_chain(&*memory) {
                let head = chain.head_index();
                for descriptor in chain.writable() {
                    memory.write_slice(b"full", descriptor.addr()).unwrap();
                }
                queue.add_used(&memory, head, 4).unwrap();
                served.fetch_add(1, Ordering::SeqCst);
            }
            queue.notify(&memory).unwrap();
        });
        self.worker = Some((worker, stop));
        Ok(())
    }

    fn reset(&mut self) {
        if let Some((worker, stop)) = self.worker.take() {
            stop.write(1).unwrap();
            worker.join().unwrap();
        }
    }

    fn is_idle(&mut self) -> bool {
        self.worker.is_none()
    }
}

struct Quiet;

impl TransportEvents for Quiet {
    fn activated(&self) {}
    fn needs_reset(&self, reason: &str) {
        eprintln!("needs reset: {reason}");
    }
}

/// Puts a [`Filler`] into slot 1.
fn with_device(machine: &Machine) -> (Arc<VirtioPci>, Arc<AtomicU32>) {
    let device = Filler::default();
    let served = device.served.clone();
    let memory = machine.ram.memory().clone();
    let function = VirtioPci::new(
        machine.vm.clone(),
        memory,
        false,
        Box::new(device),
        BAR,
        Arc::new(Quiet),
    )
    .unwrap();
    let function = Arc::new(function);
    machine.pci.insert(1, function.clone()).unwrap();
    (function, served)
}

/// The steps of virtio 1.2 §3.1.1 up to FEATURES_OK, after memory access was enabled.
fn negotiate(code: Code) -> Code {
    code.store16(FUNCTION + 4, 0x6)
        .store8(BAR + 0x14, 1)
        .store8(BAR + 0x14, 3)
        .store32(BAR + 0x08, 1)
        .store32(BAR + 0x0c, 1)
        .store8(BAR + 0x14, 0xb)
}

fn set_up_queue(code: Code, descriptors: u32) -> Code {
    let [available, used] = [AVAILABLE, USED].map(|address| u32::try_from(address).unwrap());
    code.store16(BAR + 0x16, 0)
        .store16(BAR + 0x1a, 0)
        .store32(BAR + 0x20, descriptors)
        .store32(BAR + 0x28, available)
        .store32(BAR + 0x30, used)
        .store16(BAR + 0x1c, 1)
}

#[test]
fn configuration_space_answers_by_ports_and_by_memory() {
    let Some(machine) = Machine::new() else { return };
    let (_function, _) = with_device(&machine);
    let code = Code::new()
        .load32(FUNCTION)
        .report()
        .out32(layout::PORT_PCI_CONFIG_ADDRESS, 1 << 31 | 1 << 11)
        .in32(layout::PORT_PCI_CONFIG_DATA)
        .report()
        .load32(layout::ECAM.start + (2 << 15))
        .report()
        .store16(FUNCTION + 4, 0x6)
        .load32(BAR + 0x2000)
        .report()
        .end();
    let report = machine.run(&code);
    assert!(report.ended, "{report:x?}");
    let config = u32::from_le_bytes(*b"conf");
    assert_eq!(report.values, [0x1044_1af4, 0x1044_1af4, u32::MAX, config]);
}

#[test]
fn a_doorbell_reaches_the_device_and_its_interrupt_the_guest() {
    let Some(machine) = Machine::new() else { return };
    let (function, served) = with_device(&machine);
    let memory = machine.ram.memory();
    // One writable descriptor, made available.
    memory.write_obj(BUFFER, GuestAddress(DESCRIPTORS)).unwrap();
    memory.write_obj(4_u32, GuestAddress(DESCRIPTORS + 8)).unwrap();
    memory.write_obj(2_u16, GuestAddress(DESCRIPTORS + 12)).unwrap();
    memory.write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
    // Interrupt gate 0x40, and IDTR.
    let handler = u32::try_from(HANDLER).unwrap();
    let gate = u64::from(handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(handler >> 16) << 48;
    memory.write_obj(gate, GuestAddress(IDT + 0x40 * 8)).unwrap();
    memory.write_obj(0x7ff_u16, GuestAddress(IDT - 6)).unwrap();
    memory
        .write_obj(u32::try_from(IDT).unwrap(), GuestAddress(IDT - 4))
        .unwrap();
    // The handler reports what the device wrote, and ends the guest.
    let handler = Code::new().load32(BUFFER).report().load32(USED).report().end();
    memory
        .write_slice(handler.bytes(), GuestAddress(HANDLER))
        .unwrap();

    let [idtr] = [u32::try_from(IDT - 6).unwrap().to_le_bytes()];
    let code = Code::new()
        .raw(&[0xbc, 0x00, 0x00, 0x30, 0x00]) // mov esp, 0x300000
        .raw(&[0x0f, 0x01, 0x1d])
        .raw(&idtr) // lidt [IDT - 6]
        .store32(LAPIC + 0xf0, 0x1ff);
    let code = set_up_queue(negotiate(code), u32::try_from(DESCRIPTORS).unwrap())
        .store32(MSIX_TABLE, u32::try_from(LAPIC).unwrap())
        .store32(MSIX_TABLE + 4, 0)
        .store32(MSIX_TABLE + 8, 0x40)
        .store32(MSIX_TABLE + 12, 0)
        .store16(FUNCTION + 0x42, 0x8000)
        .store8(BAR + 0x14, 0xf)
        .load32(BAR + 0x14)
        .report()
        .store16(DOORBELL, 0)
        .raw(&[0xfb, 0xf4, 0xeb, 0xfd]); // sti; hlt; jmp to the hlt
    let report = machine.run(&code);
    assert!(report.ended, "{report:x?}");
    assert_eq!(report.values[0] & 0xff, 0xf, "status: {report:x?}");
    assert_eq!(
        report.values[1..],
        [u32::from_le_bytes(*b"full"), 1 << 16],
        "{report:x?}"
    );
    assert_eq!(served.load(Ordering::SeqCst), 1);
    function.stop();
    assert!(function.is_idle());
}

#[test]
fn a_removed_device_leaves_its_doorbells_to_the_next() {
    let Some(machine) = Machine::new() else { return };
    for _ in 0..2 {
        let (function, _) = with_device(&machine);
        function.config_write(4, &[6, 0]);
        let taken = EventFd::new(0).unwrap();
        assert!(
            machine.vm.connect_doorbell(&taken, DOORBELL).is_err(),
            "the device has its doorbell"
        );
        machine.pci.remove(1);
        function.stop();
        machine.vm.connect_doorbell(&taken, DOORBELL).unwrap();
        machine.vm.disconnect_doorbell(&taken, DOORBELL).unwrap();
    }
}

#[test]
fn rings_outside_of_memory_need_a_reset_and_a_reset_helps() {
    let Some(machine) = Machine::new() else { return };
    let (_function, _) = with_device(&machine);
    let code = set_up_queue(negotiate(Code::new()), 0xf000_0000)
        .store8(BAR + 0x14, 0xf)
        .load32(BAR + 0x14)
        .report()
        .store8(BAR + 0x14, 0)
        .load32(BAR + 0x14)
        .report()
        .end();
    let report = machine.run(&code);
    assert!(report.ended, "{report:x?}");
    assert_eq!(report.values[0] & 0xff, 0x4f);
    assert_eq!(report.values[1] & 0xff, 0);
}

#[test]
fn an_enabled_queue_does_not_change() {
    let Some(machine) = Machine::new() else { return };
    let (_function, _) = with_device(&machine);
    let code = set_up_queue(negotiate(Code::new()), u32::try_from(DESCRIPTORS).unwrap())
        .store32(BAR + 0x20, 0x1234_0000)
        .store16(BAR + 0x18, 2)
        .load32(BAR + 0x20)
        .report()
        .load32(BAR + 0x18)
        .report()
        .end();
    let report = machine.run(&code);
    assert_eq!(
        report.values[0],
        u32::try_from(DESCRIPTORS).unwrap(),
        "{report:x?}"
    );
    assert_eq!(report.values[1] & 0xffff, 8);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let Some(machine) = Machine::new() else { return };
    let (_function, _) = with_device(&machine);
    let code = Code::new()
        .store16(FUNCTION + 4, 0x6)
        .store8(BAR + 0x14, 3)
        .store32(BAR + 0x08, 0)
        .store32(BAR + 0x0c, 0x8000)
        .store8(BAR + 0x14, 0xb)
        .load32(BAR + 0x14)
        .report()
        .end();
    let report = machine.run(&code);
    assert_eq!(report.values[0] & 0xff, 3, "{report:x?}");
}

#[test]
fn no_access_of_any_width_to_any_register_harms_the_machine() {
    let Some(machine) = Machine::new() else { return };
    let (_function, _) = with_device(&machine);
    let mut code = Code::new().store16(FUNCTION + 4, 0x6);
    // Every 61st byte of BAR and configuration space, so that all alignments occur.
    for place in (0..BAR_SIZE)
        .step_by(61)
        .map(|offset| BAR + offset)
        .chain((0..0x1000).step_by(61).map(|offset| FUNCTION + offset))
    {
        // Command and BAR registers would take the device away.
        if (FUNCTION..FUNCTION + 0x40).contains(&place) {
            continue;
        }
        code = code
            .store8(place, 0xff)
            .store16(place, 0xffff)
            .store32(place, 0xffff_ffff)
            .load32(place);
    }
    for port in (0..=u16::MAX)
        .step_by(253)
        .filter(|port| !(0x4fe..0x508).contains(port))
    {
        code = code.out32(port, u32::MAX).in32(port);
    }
    let report = machine.run(&code.load32(FUNCTION).report().end());
    assert!(report.ended, "{report:x?}");
    assert_eq!(report.values, [0x1044_1af4]);
}
