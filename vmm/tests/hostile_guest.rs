//! A guest that touches everything it can reach, with real instructions on `/dev/kvm`: each port, configuration space, BARs,
//! the space around them; with each width and alignment, and with string instructions. The VMM must survive, must do what
//! was asked for by the right access and nothing else, and the machine must work afterwards.

#![allow(clippy::unwrap_used, reason = "tests")]

mod micro_guest;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use micro_guest::{Code, END_PORT, Machine, REPORT_PORT, Report};
use virtio_core::{Activation, ActiveQueue, DeviceError, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};
use vmm::console::ConsoleHandle;
use vmm::layout;
use vmm::platform::{GuestPanic, Platform, PlatformConfig, PlatformEvents};
use vmm::transport::{BAR_SIZE, TransportEvents, VirtioPci};

/// Where the ports of the test are moved to, as those that all micro-guests use belong to a device here.
const TEST_PORTS: u16 = 0x5600;
/// Ports of the test, with those from which a wide access would reach them.
const SPARED: std::ops::Range<u16> = TEST_PORTS - 3..TEST_PORTS + 8;
/// System control port B belongs to KVM's interval timer, along with all of a wider access that begins there.
const KERNEL_PORT: u32 = 0x61;
/// A host with six things to do needs a while for a million exits.
const PATIENCE: Duration = Duration::from_secs(120);

const BAR: u64 = layout::MMIO32.start + BAR_SIZE;
/// ECAM address of slot 1.
const FUNCTION: u64 = layout::ECAM.start + (1 << 15);
const MSIX_TABLE: u64 = BAR + 0x8000;
const LAPIC: u64 = 0xfee0_0000;
const RAM_END: u64 = 32 << 20;

const IDT: u64 = 0x20_4000;
const HANDLER: u64 = 0x20_5000;
const STACK: u32 = 0x30_0000;
const STRING: u32 = 0x40_0000;

/// What the guest made the mainboard ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    PowerOff,
    Reset,
    Panic,
    Eject(u8),
}

#[derive(Default)]
struct Recorder(Mutex<BTreeMap<Asked, u32>>);

impl Recorder {
    fn note(&self, asked: Asked) {
        *self.0.lock().unwrap().entry(asked).or_default() += 1;
    }
}

impl PlatformEvents for Recorder {
    fn power_off(&self) {
        self.note(Asked::PowerOff);
    }

    fn reset(&self) {
        self.note(Asked::Reset);
    }

    fn guest_panic(&self, _panic: GuestPanic) {
        self.note(Asked::Panic);
    }

    fn eject(&self, slot: u8) {
        self.note(Asked::Eject(slot));
    }
}

/// A device that interrupts when its doorbell rings.
#[derive(Default)]
struct Echo {
    worker: Option<(std::thread::JoinHandle<()>, ActiveQueue)>,
}

impl VirtioDevice for Echo {
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

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let Some(queue) = activation.queues.pop() else {
            return Err(DeviceError::MissingQueues {
                enabled: 0,
                needed: 1,
            });
        };
        let (kick, call) = (queue.kick.try_clone().unwrap(), queue.call.try_clone().unwrap());
        let worker = std::thread::spawn(move || {
            let mut poll = libc::pollfd {
                fd: std::os::fd::AsRawFd::as_raw_fd(&kick),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid pollfd; the eventfd lives.
            unsafe { libc::poll(&raw mut poll, 1, 60_000) };
            call.write(1).unwrap();
        });
        self.worker = Some((worker, queue));
        Ok(())
    }

    fn reset(&mut self) {
        if let Some((worker, queue)) = self.worker.take() {
            queue.kick.write(1).unwrap();
            worker.join().unwrap();
            // Not for the next life.
            let _ = queue.call.read();
        }
    }

    fn is_idle(&mut self) -> bool {
        self.worker.is_none()
    }
}

struct Quiet;

impl TransportEvents for Quiet {
    fn activated(&self) {}
    fn needs_reset(&self, _reason: &str) {}
}

/// A machine with a mainboard and a device in slot 1.
struct Target {
    machine: Machine,
    asked: Arc<Recorder>,
    _platform: Platform,
    function: Arc<VirtioPci>,
}

fn target() -> Option<Target> {
    let machine = Machine::new()?;
    let (report, end) = (u64::from(REPORT_PORT), u64::from(END_PORT) + 4);
    let moved = u64::from(TEST_PORTS);
    machine.ports.relocate(&(report..end), moved..moved + 8).unwrap();
    let asked = Arc::<Recorder>::default();
    let config = PlatformConfig {
        ram_size: RAM_END,
        serial: ConsoleHandle::null(),
        serial_interrupt: Arc::new(|| {}),
        ged_interrupt: Arc::new(|| {}),
        clock: Box::new(|| Duration::from_secs(1_795_277_159)),
        started: Instant::now(),
        marks: Arc::new(|_, _| {}),
        events: asked.clone(),
    };
    let platform = Platform::new(config, &machine.ports).unwrap();
    let memory = machine.ram.memory().clone();
    let function = VirtioPci::new(
        machine.vm.clone(),
        memory,
        false,
        Box::new(Echo::default()),
        BAR,
        Arc::new(Quiet),
    );
    let function = Arc::new(function.unwrap());
    machine.pci.insert(1, function.clone()).unwrap();
    Some(Target {
        machine,
        asked,
        _platform: platform,
        function,
    })
}

/// The guest's last act: sets the device up as a driver does, rings its doorbell, waits for its interrupt, which reports 0x600d.
fn works_afterwards(target: &Target, code: Code) -> Code {
    let memory = target.machine.ram.memory();
    let handler = u32::try_from(HANDLER).unwrap();
    let gate = u64::from(handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(handler >> 16) << 48;
    memory.write_obj(gate, GuestAddress(IDT + 0x40 * 8)).unwrap();
    memory.write_obj(0x7ff_u16, GuestAddress(IDT - 6)).unwrap();
    let idt = u32::try_from(IDT).unwrap();
    memory.write_obj(idt, GuestAddress(IDT - 4)).unwrap();
    let reports = Code::new()
        .out32(TEST_PORTS, 0x600d)
        .out32(TEST_PORTS + 4, 0)
        .raw(&[0xf4, 0xeb, 0xfd]);
    memory
        .write_slice(reports.bytes(), GuestAddress(HANDLER))
        .unwrap();

    let [bar, lapic] = [BAR, LAPIC].map(|address| u32::try_from(address).unwrap());
    let mut code = code
        .raw(&[0xbc])
        .raw(&STACK.to_le_bytes()) // mov esp
        .raw(&[0x0f, 0x01, 0x1d])
        .raw(&(idt - 6).to_le_bytes()) // lidt
        .store32(LAPIC + 0xf0, 0x1ff)
        // Configuration space may be full of nonsense.
        .store16(FUNCTION + 4, 0)
        .store32(FUNCTION + 0x10, bar)
        .store32(FUNCTION + 0x14, 0)
        .store16(FUNCTION + 4, 6)
        .store16(FUNCTION + 0x42, 0x8000);
    for status in [0, 0, 1, 3] {
        code = code.store8(BAR + 0x14, status);
    }
    code.store32(BAR + 0x08, 1)
        .store32(BAR + 0x0c, 1)
        .store32(BAR + 0x08, 0)
        .store32(BAR + 0x0c, 0)
        .store8(BAR + 0x14, 0xb)
        .store16(BAR + 0x16, 0)
        .store16(BAR + 0x1a, 0)
        .store32(BAR + 0x20, 0x20_0000)
        .store32(BAR + 0x24, 0)
        .store32(BAR + 0x28, 0x20_1000)
        .store32(BAR + 0x2c, 0)
        .store32(BAR + 0x30, 0x20_2000)
        .store32(BAR + 0x34, 0)
        .store16(BAR + 0x1c, 1)
        .store32(MSIX_TABLE, lapic)
        .store32(MSIX_TABLE + 4, 0)
        .store32(MSIX_TABLE + 8, 0x40)
        .store32(MSIX_TABLE + 12, 0)
        .store8(BAR + 0x14, 0xf)
        .load32(BAR + 0x14)
        .out_eax(TEST_PORTS)
        .store16(BAR + 0x3000, 0)
        .raw(&[0xfb, 0xf4, 0xeb, 0xfd]) // sti; hlt; jmp to the hlt
}

/// Runs the guest to its end; what the mainboard was asked for.
fn run(target: Target, code: Code) -> BTreeMap<Asked, u32> {
    let code = works_afterwards(&target, code);
    assert!(code.bytes().len() < 0x8_0000);
    let report: Report = target.machine.run_for(&code, PATIENCE);
    assert!(report.ended && report.fault.is_none(), "{report:x?}");
    let [status, interrupted] = report.values[..] else {
        panic!("{report:x?}");
    };
    assert_eq!(status & 0xff, 0xf, "the device does not run");
    assert_eq!(interrupted, 0x600d);
    target.function.stop();
    assert!(target.function.is_idle());
    std::mem::take(&mut *target.asked.0.lock().unwrap())
}

/// `mov edx, first`; `body` for each value of EDX below `end`.
fn for_each_port(code: Code, first: u32, end: u32, body: &[u8]) -> Code {
    // inc edx; cmp edx, end; jb to the body
    repeat(
        code.raw(&[0xba]).raw(&first.to_le_bytes()),
        body,
        &[0x42],
        &[0x81, 0xfa],
        end,
    )
}

/// `mov edi, first`; `body` for each value of EDI below `end`.
fn for_each_address(code: Code, first: u64, end: u64, body: &[u8]) -> Code {
    let [first, end] = [first, end].map(|address| u32::try_from(address).unwrap());
    repeat(
        code.raw(&[0xbf]).raw(&first.to_le_bytes()),
        body,
        &[0x47],
        &[0x81, 0xff],
        end,
    )
}

fn repeat(code: Code, body: &[u8], increment: &[u8], compare: &[u8], end: u32) -> Code {
    let length = i32::try_from(body.len() + increment.len() + compare.len() + 4 + 6).unwrap();
    code.raw(body)
        .raw(increment)
        .raw(compare)
        .raw(&end.to_le_bytes())
        .raw(&[0x0f, 0x82])
        .raw(&(-length).to_le_bytes())
}

/// Reads a port with each width, then writes the low parts of `value` with each width.
fn in_and_out(value: u32) -> Vec<u8> {
    let mut body = vec![0xec, 0x66, 0xed, 0xed, 0xb8];
    body.extend(value.to_le_bytes());
    body.extend([0xee, 0x66, 0xef, 0xef]);
    body
}

/// What a write of `bytes` to `port` must have the mainboard ask for.
fn expect(port: u32, bytes: &[u8], asked: &mut BTreeMap<Asked, u32>) {
    if port == KERNEL_PORT {
        return;
    }
    for (port, byte) in (port..).zip(bytes) {
        let mut note = |event| *asked.entry(event).or_default() += 1;
        let Ok(port) = u16::try_from(port) else { return };
        match (port, *byte) {
            (layout::PORT_ACPI_SLEEP_CONTROL, layout::ACPI_SLEEP_VALUE_S5) => note(Asked::PowerOff),
            (layout::PORT_ACPI_RESET, layout::ACPI_RESET_VALUE) => note(Asked::Reset),
            (layout::PORT_I8042_COMMAND, 0xfe) => note(Asked::Reset),
            (layout::PORT_PVPANIC, byte) if byte & 3 != 0 => note(Asked::Panic),
            (port, byte) => {
                let place = port.checked_sub(layout::PORT_PCI_HOTPLUG_EJECT);
                if let Some(place) = place
                    .and_then(|place| u8::try_from(place).ok())
                    .filter(|place| *place < 4)
                {
                    (0..8)
                        .filter(|bit| byte & 1 << bit != 0)
                        .for_each(|bit| note(Asked::Eject(8 * place + bit)));
                }
            }
        }
    }
}

/// Pokes all ports from `first` to `end`, but for those of the test.
fn poke_ports(mut code: Code, first: u32, end: u32, value: u32, asked: &mut BTreeMap<Asked, u32>) -> Code {
    let spared = u32::from(SPARED.start)..u32::from(SPARED.end);
    for (first, end) in [(first, end.min(spared.start)), (first.max(spared.end), end)] {
        if first < end {
            code = for_each_port(code, first, end, &in_and_out(value));
            for port in first..end {
                // The writes of `in_and_out`.
                for width in [1, 2, 4] {
                    expect(port, &value.to_le_bytes()[..width], asked);
                }
            }
        }
    }
    code
}

/// Ports where something answers, with some around them.
const DEVICES: [std::ops::Range<u32>; 9] = [
    0x5d..0x74,
    0x7e..0x83,
    0xe7..0xec,
    0x3f5..0x402,
    0x502..0x508,
    0x5fd..0x60a,
    0xcf5..0xd02,
    0xadfd..0xae0e,
    0xfffd..0x1_0000,
];

#[test]
fn every_port_survives_every_width() {
    let Some(target) = target() else { return };
    let mut expected = BTreeMap::new();
    let code = poke_ports(Code::new(), 0, 0x1_0000, u32::MAX, &mut expected);
    assert_eq!(run(target, code), expected);
}

#[test]
fn device_ports_ask_for_exactly_what_was_written() {
    let Some(target) = target() else { return };
    let mut expected = BTreeMap::new();
    let mut code = Code::new();
    for value in [
        0,
        0x0101_0101,
        0x3434_3434,
        0xfefe_fefe,
        0x0102_0304,
        0xfe34_0180,
        0x7f60_20aa,
        0x8000_0b0a,
    ] {
        for range in DEVICES {
            code = poke_ports(code, range.start, range.end, value, &mut expected);
        }
    }
    for event in [Asked::PowerOff, Asked::Reset, Asked::Panic, Asked::Eject(31)] {
        assert!(expected.contains_key(&event), "the test tests nothing");
    }
    assert_eq!(run(target, code), expected);
}

#[test]
fn cmos_shutdown_with_interrupts_disabled_is_one_reset() {
    let Some(target) = target() else { return };
    // mov al, 0x8f; out 0x70, al; mov al, 0; out 0x71, al
    let code = Code::new().raw(&[0xb0, 0x8f, 0xe6, 0x70, 0xb0, 0, 0xe6, 0x71]);
    assert_eq!(run(target, code), BTreeMap::from([(Asked::Reset, 1)]));
}

#[test]
fn strings_reach_ports_element_by_element() {
    let Some(target) = target() else { return };
    let mut code = Code::new();
    let mut expected = BTreeMap::new();
    for range in DEVICES {
        for port in range {
            for (width, output, input) in [
                (1_u32, &[0xf3, 0x6e][..], &[0xf3, 0x6c][..]),
                (2, &[0x66, 0xf3, 0x6f], &[0x66, 0xf3, 0x6d]),
                (4, &[0xf3, 0x6f], &[0xf3, 0x6d]),
            ] {
                let count = 33_u32;
                let set_up = |code: Code, register: u8| {
                    code.raw(&[0xba])
                        .raw(&port.to_le_bytes())
                        .raw(&[register])
                        .raw(&STRING.to_le_bytes())
                        .raw(&[0xb9])
                        .raw(&count.to_le_bytes())
                };
                // mov edx, port; mov edi, STRING; mov ecx, count; rep ins. Then, from ESI, rep outs of ones.
                code = set_up(code, 0xbf).raw(input);
                code = set_up(code, 0xbe)
                    .raw(&[0xbf])
                    .raw(&STRING.to_le_bytes())
                    .raw(&[0xb0, 0xff, 0xb9])
                    .raw(&(count * width).to_le_bytes())
                    .raw(&[0xf3, 0xaa, 0xb9]) // rep stosb
                    .raw(&count.to_le_bytes())
                    .raw(output);
                for _ in 0..count {
                    expect(port, &[0xff; 4][..width as usize], &mut expected);
                }
            }
        }
    }
    assert_eq!(run(target, code), expected);
}

/// Reads an address with each width, then writes the low parts of `value` with each width.
fn load_and_store(value: u32) -> Vec<u8> {
    let mut body = vec![0x8a, 0x07, 0x66, 0x8b, 0x07, 0x8b, 0x07, 0xb8];
    body.extend(value.to_le_bytes());
    body.extend([0x88, 0x07, 0x66, 0x89, 0x07, 0x89, 0x07]);
    body
}

/// Places in a BAR that differ.
const REGISTERS: [(u64, u64); 8] = [
    (0, 0x48),
    (0xffc, 0x1008),
    (0x1ffc, 0x2010),
    (0x2ffc, 0x3020),
    (0x7ff8, 0x8030),
    (0xfff8, 0x1_0010),
    (0x1_8000, 0x1_8008),
    (BAR_SIZE - 8, BAR_SIZE + 8),
];

#[test]
fn every_register_survives_every_width_and_alignment() {
    let Some(target) = target() else { return };
    let mut code = Code::new().store16(FUNCTION + 4, 6);
    for value in [u32::MAX, 0, 0x0f0b_0301, 0x8000_0001] {
        for (first, end) in REGISTERS {
            code = for_each_address(code, BAR + first, BAR + end, &load_and_store(value));
        }
    }
    assert_eq!(run(target, code), BTreeMap::new());
}

#[test]
fn all_of_configuration_space_survives_every_width_and_alignment() {
    let Some(target) = target() else { return };
    let mut code = Code::new();
    for value in [u32::MAX, 0, 0x0702_0604] {
        for slot in [0, 1, 2, 31] {
            let function = layout::ECAM.start + (slot << 15);
            code = for_each_address(code, function, function + 0x110, &load_and_store(value));
            code = for_each_address(code, function + 0xff8, function + 0x1008, &load_and_store(value));
        }
        let edges = [layout::ECAM.start - 8, layout::ECAM.end() - 8];
        for edge in edges {
            code = for_each_address(code, edge, edge + 16, &load_and_store(value));
        }
    }
    assert_eq!(run(target, code), BTreeMap::new());
}

#[test]
fn the_edges_of_everything_survive_every_width_and_alignment() {
    let Some(target) = target() else { return };
    let mut code = Code::new();
    let edges = [
        RAM_END,
        layout::LOW_RAM_END_MAX,
        layout::MMIO32.start + 0x1000,
        layout::MMIO32.end(),
        BAR,
        BAR + BAR_SIZE,
        u64::from(layout::IOAPIC) + 0x1000,
        0xffff_0000,
    ];
    for edge in edges {
        code = for_each_address(code, edge - 8, edge + 8, &load_and_store(u32::MAX));
    }
    assert_eq!(run(target, code), BTreeMap::new());
}

#[test]
fn a_bar_that_lies_anywhere_harms_nobody() {
    let Some(target) = target() else { return };
    let mut code = Code::new();
    let places = [
        0_u64,
        0x10_0000,
        RAM_END - BAR_SIZE,
        layout::ECAM.start,
        u64::from(layout::IOAPIC),
        u64::from(layout::LAPIC),
        0xfffe_0000,
        0x1_0000_0000,
        0xffff_ffff_fffe_0000,
        layout::MMIO32.end() - BAR_SIZE,
    ];
    for place in places {
        let [low, high] = [place & 0xffff_ffff, place >> 32].map(|half| u32::try_from(half).unwrap());
        code = code
            .store32(FUNCTION + 0x10, low)
            .store32(FUNCTION + 0x14, high)
            .store16(FUNCTION + 4, 6)
            .load32(FUNCTION + 0x10)
            .store16(BAR + 0x3000, 0)
            .load32(BAR + 0x14)
            .load32(layout::MMIO32.end() - BAR_SIZE + 0x14);
    }
    assert_eq!(run(target, code), BTreeMap::new());
}

#[test]
fn strings_reach_registers_and_configuration_space() {
    let Some(target) = target() else { return };
    let mut code = Code::new().store16(FUNCTION + 4, 6);
    let places = [
        FUNCTION,
        FUNCTION + 0xf1,
        BAR,
        BAR + 3,
        BAR + 0x1ff9,
        BAR + 0x8000,
        BAR + 0x8007,
        BAR + BAR_SIZE - 5,
    ];
    for place in places {
        let place = u32::try_from(place).unwrap();
        for instruction in [&[0xf3, 0xa4][..], &[0x66, 0xf3, 0xa5], &[0xf3, 0xa5]] {
            for (source, destination) in [(place, STRING), (STRING, place)] {
                // mov esi, source; mov edi, destination; mov ecx, 9; rep movs
                code = code
                    .raw(&[0xbe])
                    .raw(&source.to_le_bytes())
                    .raw(&[0xbf])
                    .raw(&destination.to_le_bytes())
                    .raw(&[0xb9, 9, 0, 0, 0])
                    .raw(instruction);
            }
        }
        for instruction in [&[0xf3, 0xaa][..], &[0x66, 0xf3, 0xab], &[0xf3, 0xab]] {
            // mov edi, place; mov ecx, 9; or eax, -1; rep stos
            code = code
                .raw(&[0xbf])
                .raw(&place.to_le_bytes())
                .raw(&[0xb9, 9, 0, 0, 0, 0x83, 0xc8, 0xff])
                .raw(instruction);
        }
    }
    assert_eq!(run(target, code), BTreeMap::new());
}

#[test]
fn read_modify_write_of_registers_survives() {
    let Some(target) = target() else { return };
    let mut code = Code::new().store16(FUNCTION + 4, 6);
    for place in [
        FUNCTION + 4,
        FUNCTION + 0x10,
        BAR + 0x14,
        BAR + 0x17,
        BAR + 0x3000,
        BAR + 0x8001,
    ] {
        let place = u32::try_from(place).unwrap();
        code = code
            .raw(&[0xbf])
            .raw(&place.to_le_bytes())
            .raw(&[0x83, 0x0f, 0x06]) // or dword [edi], 6
            .raw(&[0x80, 0x27, 0xfb]) // and byte [edi], 0xfb
            .raw(&[0xff, 0x07]) // inc dword [edi]
            .raw(&[0xf6, 0x17]) // not byte [edi]
            .raw(&[0x86, 0x07]) // xchg [edi], al
            .raw(&[0x87, 0x07]); // xchg [edi], eax
    }
    assert_eq!(run(target, code), BTreeMap::new());
}
