//! The serial port: what comes in comes out, in order and once; an enabled interrupt that is pending was signalled.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arbitrary::Unstructured;
use vmm::bus::BusDevice;
use vmm::console::{ConsoleHandle, ConsoleInput};
use vmm::platform::{Serial, SerialState};

const DATA: u64 = 0;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

const DLAB: u8 = 0x80;
const LOOP: u8 = 0x10;

struct Bench {
    serial: Arc<Serial>,
    console: ConsoleHandle,
    edges: Arc<AtomicUsize>,
    /// What the driver has yet to read.
    expected: VecDeque<u8>,
    selects_divisor: bool,
    loops: bool,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let edges = Arc::new(AtomicUsize::new(0));
    let counter = edges.clone();
    let interrupt = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let console = ConsoleHandle::null();
    let mut bench = Bench {
        serial: Serial::new(console.clone(), interrupt),
        console,
        edges,
        expected: VecDeque::new(),
        selects_divisor: false,
        loops: false,
    };
    while !input.is_empty() {
        match input.int_in_range(0..=7_u8)? {
            0..=2 => bench.write(input.int_in_range(0..=7)?, input.arbitrary()?),
            3 | 4 => bench.read(input.int_in_range(0..=7)?),
            5 => {
                let mut typed = vec![0; input.int_in_range(0..=80)?];
                input.fill_buffer(&mut typed)?;
                bench.push(&typed);
            }
            6 => {
                let saved = bench.serial.save();
                bench.serial.restore(&saved);
                assert_eq!(bench.serial.save(), saved);
            }
            _ => bench.wide(input)?,
        }
        bench.assert_signalled();
    }
    Ok(())
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Port and console hold each other.
        self.console.set_input(None);
    }
}

impl Bench {
    fn write(&mut self, register: u64, value: u8) {
        match register {
            DATA if self.selects_divisor => {}
            DATA if self.loops => {
                // The port may be full: whether it took the byte shows in what can be read.
                let before = self.drained();
                self.serial.write(register, &[value]);
                let after = self.drained();
                assert!(after == before || after.iter().eq(before.iter().chain([&value])));
                self.expected = after;
                return;
            }
            LCR => self.selects_divisor = value & DLAB != 0,
            MCR => {
                let loops = value & LOOP != 0;
                if self.loops && !loops {
                    // What the driver sent to itself is no input.
                    self.expected.clear();
                }
                self.loops = loops;
            }
            _ => {}
        }
        self.serial.write(register, &[value]);
        if register == IIR_FCR {
            // It may clear the receiver.
            let left = self.drained();
            assert!(left.is_empty() || left == self.expected);
            self.expected = left;
        }
    }

    fn read(&mut self, register: u64) {
        let mut data = [0];
        self.serial.read(register, &mut data);
        if register == DATA && !self.selects_divisor {
            assert_eq!(data[0], self.expected.pop_front().unwrap_or(0));
        }
        if register == LSR {
            assert_eq!(data[0] & 1 != 0, !self.expected.is_empty());
            assert_eq!(data[0] & 0x60, 0x60, "a driver that polls would wait for ever");
        }
    }

    fn push(&mut self, typed: &[u8]) {
        let accepted = self.serial.push(typed);
        assert!(accepted <= typed.len());
        self.expected.extend(&typed[..accepted]);
        assert!(self.expected.len() <= 64);
    }

    /// An access of several registers at once; the model starts anew from what it left.
    fn wide(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let mut data = vec![0; input.int_in_range(2..=8)?];
        input.fill_buffer(&mut data)?;
        let register = input.int_in_range(0..=7)?;
        if input.arbitrary()? {
            self.serial.write(register, &data);
        } else {
            self.serial.read(register, &mut data);
        }
        self.expected = self.drained();
        let mut registers = [0; 2];
        self.serial.read(LCR, &mut registers);
        self.selects_divisor = registers[0] & DLAB != 0;
        self.loops = registers[1] & LOOP != 0;
        Ok(())
    }

    /// What the receiver holds.
    fn drained(&self) -> VecDeque<u8> {
        let SerialState::V1(registers) = self.serial.save();
        registers.received
    }

    /// If the port says that an interrupt is pending, its line must have risen at some time.
    fn assert_signalled(&self) {
        let SerialState::V1(registers) = self.serial.save();
        let receives = registers.interrupt_enable & 1 != 0 && !registers.received.is_empty();
        assert!(!receives || self.edges.load(Ordering::SeqCst) > 0);
    }
}
