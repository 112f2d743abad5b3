//! The keyboard controller i8042, ports 0x60 and 0x64, without a keyboard: it can reset the machine, and answers a driver that
//! looks for it quickly. Port 0x61 (system control port B) lies between its ports and is served with it.
//!
//! The ACPI tables say that there is no i8042, so Linux looks at it only to reboot.

use std::sync::{Arc, Mutex, PoisonError};

use super::PlatformEvents;
use crate::bus::BusDevice;

const DATA: u64 = 0;
const SYSTEM_CONTROL_B: u64 = 1;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// The self-test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;

const COMMAND_READ_CONFIGURATION: u8 = 0x20;
const COMMAND_WRITE_CONFIGURATION: u8 = 0x60;
const COMMAND_DISABLE_AUX: u8 = 0xa7;
const COMMAND_ENABLE_AUX: u8 = 0xa8;
const COMMAND_TEST_AUX: u8 = 0xa9;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_TEST_KEYBOARD: u8 = 0xab;
const COMMAND_DISABLE_KEYBOARD: u8 = 0xad;
const COMMAND_ENABLE_KEYBOARD: u8 = 0xae;
/// Pulse the reset line.
const COMMAND_RESET: u8 = 0xfe;

const CONFIGURATION_KEYBOARD_OFF: u8 = 1 << 4;
const CONFIGURATION_AUX_OFF: u8 = 1 << 5;
const SELF_TEST_PASSED: u8 = 0x55;
/// The interface's clock line is stuck: nothing is connected.
const INTERFACE_DEAD: u8 = 0x01;

/// Memory refresh request, which toggles.
const REFRESH: u8 = 1 << 4;
/// Output of timer 2. Always high, so that a loop that waits for the timer's end ends.
const TIMER_2_OUTPUT: u8 = 1 << 5;
/// Timer 2 gate and speaker enable.
const WRITABLE: u8 = 0x03;

/// The controller.
pub struct I8042 {
    events: Arc<dyn PlatformEvents>,
    state: Mutex<State>,
}

struct State {
    /// A byte for the driver.
    output: Option<u8>,
    configuration: u8,
    /// The next data byte is the configuration.
    expects_configuration: bool,
    control_b: u8,
}

impl I8042 {
    /// A controller whose reset line goes to `events`.
    pub fn new(events: Arc<dyn PlatformEvents>) -> Arc<Self> {
        Arc::new(Self {
            events,
            state: Mutex::new(State {
                output: None,
                configuration: CONFIGURATION_KEYBOARD_OFF | CONFIGURATION_AUX_OFF,
                expects_configuration: false,
                control_b: 0,
            }),
        })
    }
}

impl State {
    fn read(&mut self, port: u64) -> u8 {
        match port {
            DATA => self.output.take().unwrap_or(0),
            SYSTEM_CONTROL_B => {
                self.control_b ^= REFRESH;
                self.control_b | TIMER_2_OUTPUT
            }
            COMMAND if self.output.is_some() => STATUS_SYSTEM | STATUS_OUTPUT_FULL,
            COMMAND => STATUS_SYSTEM,
            _ => 0xff,
        }
    }

    fn write_data(&mut self, value: u8) {
        // Otherwise it is for the keyboard, and there is none.
        if std::mem::take(&mut self.expects_configuration) {
            self.configuration = value;
        }
    }

    fn command(&mut self, command: u8) {
        self.expects_configuration = command == COMMAND_WRITE_CONFIGURATION;
        match command {
            COMMAND_READ_CONFIGURATION => self.output = Some(self.configuration),
            COMMAND_SELF_TEST => self.output = Some(SELF_TEST_PASSED),
            COMMAND_TEST_KEYBOARD | COMMAND_TEST_AUX => self.output = Some(INTERFACE_DEAD),
            COMMAND_DISABLE_AUX => self.configuration |= CONFIGURATION_AUX_OFF,
            COMMAND_ENABLE_AUX => self.configuration &= !CONFIGURATION_AUX_OFF,
            COMMAND_DISABLE_KEYBOARD => self.configuration |= CONFIGURATION_KEYBOARD_OFF,
            COMMAND_ENABLE_KEYBOARD => self.configuration &= !CONFIGURATION_KEYBOARD_OFF,
            _ => {}
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, byte) in (offset..).zip(data) {
            *byte = state.read(port);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, value) in (offset..).zip(data) {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match port {
                DATA => state.write_data(*value),
                SYSTEM_CONTROL_B => {
                    state.control_b = (state.control_b & !WRITABLE) | (value & WRITABLE);
                }
                COMMAND if *value == COMMAND_RESET => {
                    drop(state);
                    self.events.reset();
                }
                COMMAND => state.command(*value),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{Event, Recorder, read_byte};

    #[test]
    fn command_0xfe_resets_the_machine() {
        let events = Recorder::new();
        let controller = I8042::new(events.clone());
        assert_eq!(
            read_byte(&*controller, COMMAND) & 0x02,
            0,
            "the input buffer is always empty"
        );
        controller.write(COMMAND, &[COMMAND_RESET]);
        assert_eq!(events.take(), [Event::Reset]);
    }

    #[test]
    fn a_probing_driver_gets_its_answers_at_once() {
        let controller = I8042::new(Recorder::new());
        controller.write(COMMAND, &[COMMAND_SELF_TEST]);
        assert_eq!(
            read_byte(&*controller, COMMAND) & STATUS_OUTPUT_FULL,
            STATUS_OUTPUT_FULL
        );
        assert_eq!(read_byte(&*controller, DATA), SELF_TEST_PASSED);
        assert_eq!(read_byte(&*controller, COMMAND) & STATUS_OUTPUT_FULL, 0);

        controller.write(COMMAND, &[COMMAND_WRITE_CONFIGURATION]);
        controller.write(DATA, &[0x47]);
        controller.write(COMMAND, &[COMMAND_DISABLE_AUX]);
        controller.write(COMMAND, &[COMMAND_READ_CONFIGURATION]);
        assert_eq!(read_byte(&*controller, DATA), 0x67);
    }

    #[test]
    fn loops_that_wait_for_the_timer_or_the_refresh_end() {
        let controller = I8042::new(Recorder::new());
        let (first, second) = (read_byte(&*controller, 1), read_byte(&*controller, 1));
        assert_eq!(first & TIMER_2_OUTPUT, TIMER_2_OUTPUT);
        assert_eq!((first ^ second) & REFRESH, REFRESH);
        controller.write(1, &[0xff]);
        assert_eq!(read_byte(&*controller, 1) & 0xcf, WRITABLE);
    }
}
