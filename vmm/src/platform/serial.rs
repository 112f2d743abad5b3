//! The serial port COM1: a National PC16550D, whose line is a console.
//!
//! Why not vm-superio's model: its interrupt identification is wrong when two causes are pending, it knows no FIFO control
//! and cannot hold back "transmitter empty" while the console is congested.
//!
//! Transmission takes no time, so a driver never waits for the line status: LSR always says that the FIFO is empty, which
//! is one read per load of 16 bytes for a driver that uses interrupts. When the console's receivers fall behind, the
//! interrupt "transmitter empty" is held back instead: a driver that waits for it sends no more, and a kernel that prints its
//! last words by polling is not slowed down.
//!
//! The receiver takes bytes only when the guest listens: a driver clears the FIFO when it opens the port, and would lose what
//! was typed before. The rest waits in the console. A driver says with RTS whether it listens; one that does not use the modem's
//! lines at all (DTR is off) says it by enabling the interrupt. So a guest with hardware flow control (`stty crtscts`) that
//! cannot keep up loses nothing of what is pasted.
//!
//! The interrupt is an ISA one, edge-triggered: the line's rising edges are signalled.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::Interrupt;
use crate::bus::BusDevice;
use crate::console::{ConsoleHandle, ConsoleInput, Pressure};

/// Register offsets (PC16550D data sheet §8).
mod register {
    /// RBR (read), THR (write); with DLAB the divisor's low byte.
    pub(super) const DATA: u64 = 0;
    /// Interrupt enable; with DLAB the divisor's high byte.
    pub(super) const IER: u64 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub(super) const IIR_FCR: u64 = 2;
    pub(super) const LCR: u64 = 3;
    pub(super) const MCR: u64 = 4;
    pub(super) const LSR: u64 = 5;
    pub(super) const MSR: u64 = 6;
    pub(super) const SCRATCH: u64 = 7;
}

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_MASK: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_FIFO_ENABLED: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
/// What of the FIFO control register is kept: enable and trigger level.
const FCR_KEPT: u8 = 0xc9;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
/// Transmitter holding register (or FIFO) and shift register are empty.
const LSR_TRANSMITTER_IDLE: u8 = 0x60;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// Received bytes that the device holds. More than the real one's 16, so that the interrupt line does not fall and rise
/// again between two loads while much text comes in.
const RECEIVE_FIFO: usize = 64;
/// With so few bytes left, more are fetched.
const REFILL_AT: usize = 16;

/// State of a serial port for suspend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version")]
pub enum SerialState {
    /// First version.
    #[serde(rename = "1")]
    V1(SerialRegisters),
}

/// Registers and FIFO of a serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialRegisters {
    /// Divisor latch: 115200 / baud rate.
    pub divisor: u16,
    /// IER.
    pub interrupt_enable: u8,
    /// FCR: enable and trigger level.
    pub fifo_control: u8,
    /// LCR.
    pub line_control: u8,
    /// MCR.
    pub modem_control: u8,
    /// SCR.
    pub scratch: u8,
    /// "Transmitter empty" has not been acknowledged since the last transmission.
    pub transmitter_empty_pending: bool,
    /// Received bytes that the driver has not read.
    pub received: VecDeque<u8>,
}

impl Default for SerialRegisters {
    fn default() -> Self {
        Self {
            divisor: 12,
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0x03,
            modem_control: 0,
            scratch: 0,
            transmitter_empty_pending: false,
            received: VecDeque::new(),
        }
    }
}

/// The serial port.
pub struct Serial {
    console: ConsoleHandle,
    interrupt: Interrupt,
    state: Mutex<State>,
}

struct State {
    registers: SerialRegisters,
    /// The console is congested: "transmitter empty" is held back.
    held: bool,
    /// The console has more input than the FIFO took.
    input_waits: bool,
    /// Level of the interrupt line.
    line: bool,
}

impl Serial {
    /// A serial port on `console`, from which it takes the input from now on; `interrupt` signals a rising edge of its
    /// interrupt line.
    pub fn new(console: ConsoleHandle, interrupt: Interrupt) -> Arc<Self> {
        let serial = Arc::new(Self {
            console,
            interrupt,
            state: Mutex::new(State {
                registers: SerialRegisters::default(),
                held: false,
                input_waits: false,
                line: false,
            }),
        });
        serial.console.set_input(Some(serial.clone()));
        serial
    }

    /// The state for suspend. The vCPUs must have stopped.
    pub fn save(&self) -> SerialState {
        SerialState::V1(self.state().registers.clone())
    }

    /// Puts the port into a saved state. The interrupt is signalled again if one was pending: one too many does no harm, and a
    /// lost one would silence the console.
    pub fn restore(&self, saved: &SerialState) {
        let SerialState::V1(registers) = saved;
        self.change(|state| {
            state.registers = registers.clone();
            state.registers.received.truncate(RECEIVE_FIFO);
            state.line = false;
        });
        self.console.input_ready();
    }

    /// Back to power-on: the guest was reset.
    pub fn reset(&self) {
        self.restore(&SerialState::V1(SerialRegisters::default()));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves the registers valid at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change, and then what follows from it: an edge of the interrupt line, more input.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let result = change(&mut state);
        let level = state.pending() != IIR_NONE;
        let rises = level && !state.line;
        state.line = level;
        let fetch = state.input_waits && state.room() > 0 && state.registers.received.len() <= REFILL_AT;
        state.input_waits &= !fetch;
        drop(state);
        if rises {
            (self.interrupt)();
        }
        if fetch {
            self.console.input_ready();
        }
        result
    }

    fn read_register(state: &mut State, register: u64) -> u8 {
        let registers = &mut state.registers;
        let [divisor_low, divisor_high] = registers.divisor.to_le_bytes();
        match register {
            register::DATA if registers.selects_divisor() => divisor_low,
            register::IER if registers.selects_divisor() => divisor_high,
            register::DATA => registers.received.pop_front().unwrap_or(0),
            register::IER => registers.interrupt_enable,
            register::IIR_FCR => state.identify(),
            register::LCR => registers.line_control,
            register::MCR => registers.modem_control,
            register::LSR if registers.received.is_empty() => LSR_TRANSMITTER_IDLE,
            register::LSR => LSR_TRANSMITTER_IDLE | LSR_DATA_READY,
            register::MSR => registers.modem_status(),
            register::SCRATCH => registers.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&self, state: &mut State, register: u64, value: u8) {
        let registers = &mut state.registers;
        let [divisor_low, divisor_high] = registers.divisor.to_le_bytes();
        match register {
            register::DATA if registers.selects_divisor() => {
                registers.divisor = u16::from_le_bytes([value, divisor_high]);
            }
            register::IER if registers.selects_divisor() => {
                registers.divisor = u16::from_le_bytes([divisor_low, value]);
            }
            register::DATA => self.transmit(state, value),
            register::IER => {
                // Enabling the interrupt raises it: the transmitter is empty. Drivers start their output that way.
                let enabled = value & !registers.interrupt_enable;
                registers.transmitter_empty_pending |= enabled & IER_TRANSMITTER_EMPTY != 0;
                registers.interrupt_enable = value & IER_MASK;
            }
            register::IIR_FCR => registers.control_fifo(value),
            register::LCR => registers.line_control = value,
            register::MCR => {
                if registers.modem_control & !value & MCR_LOOP != 0 {
                    // What the driver sent to itself is no input.
                    registers.received.clear();
                }
                registers.modem_control = value & MCR_MASK;
            }
            register::SCRATCH => registers.scratch = value,
            // LSR and MSR are read-only.
            _ => {}
        }
    }

    fn transmit(&self, state: &mut State, byte: u8) {
        if state.registers.loops() {
            if state.registers.received.len() < RECEIVE_FIFO {
                state.registers.received.push_back(byte);
            }
        } else if self.console.write(&[byte]) == Pressure::Congested {
            state.held = true;
        }
        state.registers.transmitter_empty_pending = true;
    }
}

impl State {
    /// How many bytes the receiver takes.
    fn room(&self) -> usize {
        if self.registers.listens() {
            RECEIVE_FIFO.saturating_sub(self.registers.received.len())
        } else {
            0
        }
    }

    /// The pending interrupt of highest priority, or [`IIR_NONE`].
    fn pending(&self) -> u8 {
        let registers = &self.registers;
        if registers.interrupt_enable & IER_RECEIVED != 0 && !registers.received.is_empty() {
            IIR_RECEIVED
        } else if registers.interrupt_enable & IER_TRANSMITTER_EMPTY != 0
            && registers.transmitter_empty_pending
            && !self.held
        {
            IIR_TRANSMITTER_EMPTY
        } else {
            IIR_NONE
        }
    }

    /// Reads IIR, which acknowledges "transmitter empty".
    fn identify(&mut self) -> u8 {
        let cause = self.pending();
        if cause == IIR_TRANSMITTER_EMPTY {
            self.registers.transmitter_empty_pending = false;
        }
        if self.registers.fifo_control & FCR_ENABLE != 0 {
            cause | IIR_FIFO_ENABLED
        } else {
            cause
        }
    }
}

impl SerialRegisters {
    fn selects_divisor(&self) -> bool {
        self.line_control & LCR_DLAB != 0
    }

    fn loops(&self) -> bool {
        self.modem_control & MCR_LOOP != 0
    }

    /// Whether the guest is ready for input.
    fn listens(&self) -> bool {
        let lines = self.modem_control & (MCR_DTR | MCR_RTS);
        let without_lines = lines == 0 && self.interrupt_enable & IER_RECEIVED != 0;
        !self.loops() && (lines & MCR_RTS != 0 || without_lines)
    }

    /// Writes FCR.
    fn control_fifo(&mut self, value: u8) {
        let toggles = (value ^ self.fifo_control) & FCR_ENABLE != 0;
        if toggles || value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        // The other bits are programmable only together with "enable" (data sheet §8.4).
        self.fifo_control = if value & FCR_ENABLE != 0 {
            value & FCR_KEPT
        } else {
            0
        };
    }

    /// Reads MSR: the other end is always there and ready, unless the outputs are looped back.
    fn modem_status(&self) -> u8 {
        if !self.loops() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [
            (MCR_DTR, MSR_DSR),
            (MCR_RTS, MSR_CTS),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .into_iter()
        .filter(|(output, _)| self.modem_control & output != 0)
        .fold(0, |status, (_, input)| status | input)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Each byte of a wide access is an access of its own to the next register, as on the ISA bus.
        for (register, byte) in (offset..).zip(data) {
            *byte = self.change(|state| Self::read_register(state, register));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            self.change(|state| self.write_register(state, register, *byte));
        }
    }
}

impl ConsoleInput for Serial {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.state();
        let accepted = bytes.len().min(state.room());
        state.registers.received.extend(&bytes[..accepted]);
        state.input_waits = accepted < bytes.len();
        let level = state.pending() != IIR_NONE;
        let rises = level && !state.line;
        state.line = level;
        drop(state);
        if rises {
            (self.interrupt)();
        }
        accepted
    }

    fn output_ready(&self) {
        self.change(|state| state.held = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{Lines, read_byte};

    fn serial() -> (Arc<Serial>, Lines) {
        let lines = Lines::default();
        (Serial::new(ConsoleHandle::null(), lines.interrupt()), lines)
    }

    fn write(serial: &Serial, register: u64, value: u8) {
        serial.write(register, &[value]);
    }

    #[test]
    fn linux_finds_a_16550a() {
        let (serial, _) = serial();
        write(&serial, register::IER, 0xff);
        assert_eq!(read_byte(&*serial, register::IER), 0x0f);
        write(&serial, register::IER, 0);
        write(&serial, register::SCRATCH, 0x5a);
        assert_eq!(read_byte(&*serial, register::SCRATCH), 0x5a);
        // The outputs come back at the inputs in loopback mode.
        write(&serial, register::MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS);
        assert_eq!(read_byte(&*serial, register::MSR) & 0xf0, MSR_DCD | MSR_CTS);
        write(&serial, register::MCR, 0);
        assert_eq!(read_byte(&*serial, register::IIR_FCR), IIR_NONE);
        write(&serial, register::IIR_FCR, FCR_ENABLE);
        assert_eq!(
            read_byte(&*serial, register::IIR_FCR),
            IIR_FIFO_ENABLED | IIR_NONE
        );
    }

    #[test]
    fn the_divisor_is_behind_dlab() {
        let (serial, _) = serial();
        write(&serial, register::LCR, LCR_DLAB | 3);
        write(&serial, register::DATA, 0x01);
        write(&serial, register::IER, 0x02);
        assert_eq!((read_byte(&*serial, 0), read_byte(&*serial, 1)), (1, 2));
        write(&serial, register::LCR, 3);
        assert_eq!(read_byte(&*serial, register::IER), 0);
    }

    #[test]
    fn enabling_transmitter_empty_raises_it_each_time() {
        let (serial, lines) = serial();
        for round in 1..=3 {
            write(&serial, register::IER, IER_TRANSMITTER_EMPTY);
            assert_eq!(lines.count(), round);
            assert_eq!(read_byte(&*serial, register::IIR_FCR), IIR_TRANSMITTER_EMPTY);
            assert_eq!(
                read_byte(&*serial, register::IIR_FCR),
                IIR_NONE,
                "reading IIR acknowledges"
            );
            write(&serial, register::IER, 0);
        }
    }

    #[test]
    fn a_load_of_the_fifo_takes_one_interrupt() {
        let (serial, lines) = serial();
        write(&serial, register::IER, IER_TRANSMITTER_EMPTY);
        let _ = read_byte(&*serial, register::IIR_FCR);
        let before = lines.count();
        (0..16).for_each(|_| write(&serial, register::DATA, b'x'));
        assert_eq!(lines.count(), before + 1);
        assert_eq!(read_byte(&*serial, register::LSR), LSR_TRANSMITTER_IDLE);
    }

    #[test]
    fn received_data_comes_before_transmitter_empty() {
        let (serial, lines) = serial();
        write(&serial, register::MCR, MCR_RTS);
        assert_eq!(serial.push(b"a"), 1);
        assert_eq!(lines.count(), 0, "no interrupt is enabled");
        write(&serial, register::IER, IER_RECEIVED | IER_TRANSMITTER_EMPTY);
        assert_eq!(lines.count(), 1);
        assert_eq!(read_byte(&*serial, register::IIR_FCR), IIR_RECEIVED);
        assert_eq!(
            read_byte(&*serial, register::LSR) & LSR_DATA_READY,
            LSR_DATA_READY
        );
        assert_eq!(read_byte(&*serial, register::DATA), b'a');
        assert_eq!(read_byte(&*serial, register::LSR) & LSR_DATA_READY, 0);
        assert_eq!(read_byte(&*serial, register::IIR_FCR), IIR_TRANSMITTER_EMPTY);
        assert_eq!(read_byte(&*serial, register::IIR_FCR), IIR_NONE);
    }

    #[test]
    fn masking_and_unmasking_signals_pending_input_again() {
        // The console of Linux masks all interrupts while it prints.
        let (serial, lines) = serial();
        write(&serial, register::IER, IER_RECEIVED);
        write(&serial, register::IER, 0);
        write(&serial, register::MCR, MCR_RTS);
        assert_eq!(serial.push(b"a"), 1);
        assert_eq!(lines.count(), 0);
        write(&serial, register::IER, IER_RECEIVED);
        assert_eq!(lines.count(), 1);
    }

    #[test]
    fn input_waits_until_the_guest_listens() {
        let (serial, _) = serial();
        assert_eq!(serial.push(b"typed early"), 0);
        write(&serial, register::IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        write(&serial, register::MCR, MCR_DTR | MCR_RTS);
        assert_eq!(serial.push(b"typed early"), 11);
    }

    #[test]
    fn a_driver_that_takes_rts_back_gets_no_input_although_its_interrupt_is_enabled() {
        let (serial, _) = serial();
        write(&serial, register::MCR, MCR_DTR | MCR_RTS | MCR_OUT2);
        write(&serial, register::IER, IER_RECEIVED);
        assert_eq!(serial.push(b"a"), 1);
        write(&serial, register::MCR, MCR_DTR | MCR_OUT2);
        assert_eq!(serial.push(b"b"), 0);
        write(&serial, register::MCR, MCR_DTR | MCR_RTS | MCR_OUT2);
        assert_eq!(serial.push(b"b"), 1);
    }

    #[test]
    fn a_full_fifo_refuses_and_fifo_control_clears() {
        let (serial, _) = serial();
        write(&serial, register::IER, IER_RECEIVED);
        assert_eq!(serial.push(&[1; 100]), RECEIVE_FIFO);
        assert_eq!(serial.push(&[1]), 0);
        write(&serial, register::IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert_eq!(read_byte(&*serial, register::LSR), LSR_TRANSMITTER_IDLE);
    }

    #[test]
    fn loopback_gives_back_what_was_sent_and_refuses_input() {
        let (serial, _) = serial();
        write(&serial, register::MCR, MCR_LOOP | MCR_RTS);
        assert_eq!(serial.push(b"typed"), 0);
        b"echo"
            .iter()
            .for_each(|byte| write(&serial, register::DATA, *byte));
        let back: Vec<u8> = (0..4).map(|_| read_byte(&*serial, register::DATA)).collect();
        assert_eq!(back, b"echo");
        write(&serial, register::DATA, b'x');
        write(&serial, register::MCR, MCR_RTS);
        assert_eq!(read_byte(&*serial, register::LSR) & LSR_DATA_READY, 0);
    }

    #[test]
    fn a_wide_access_reaches_consecutive_registers() {
        let (serial, _) = serial();
        serial.write(register::MCR, &[MCR_DTR, 0, 0, 0x77]);
        let mut data = [0; 8];
        serial.read(0, &mut data);
        assert_eq!(data, [0, 0, IIR_NONE, 3, MCR_DTR, 0x60, 0xb0, 0x77]);
    }

    #[test]
    fn a_transmission_in_flight_survives_suspend() {
        let (serial, _) = self::serial();
        write(&serial, register::IER, IER_TRANSMITTER_EMPTY | IER_RECEIVED);
        write(&serial, register::DATA, b'x');
        serial.push(b"in");
        let text = toml::to_string(&serial.save()).unwrap();
        assert!(text.contains("version = \"1\""), "{text}");

        let (serial, lines) = self::serial();
        serial.restore(&toml::from_str(&text).unwrap());
        assert_eq!(lines.count(), 1);
        assert_eq!(read_byte(&*serial, register::IIR_FCR), IIR_RECEIVED);
        assert_eq!(read_byte(&*serial, register::DATA), b'i');
        assert_eq!(read_byte(&*serial, register::DATA), b'n');
        assert_eq!(read_byte(&*serial, register::IIR_FCR), IIR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn reset_is_as_new() {
        let (serial, _) = serial();
        write(&serial, register::MCR, MCR_RTS);
        serial.push(b"old");
        serial.reset();
        assert_eq!(serial.save(), SerialState::V1(SerialRegisters::default()));
    }
}
