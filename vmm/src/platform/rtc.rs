//! The real-time clock and its CMOS memory (Motorola MC146818A, PC/AT extensions), ports 0x70 and 0x71.
//!
//! The clock shows the host's UTC plus what the guest set it off by; it does not tick, it is computed when read. All
//! reads within 10 ms come from one look at the clock, so that a reader sees no minute change between two registers, and
//! "update in progress" can always be 0: nobody has to wait for the end of an update (Linux' `mach_get_cmos_time` spins on it).
//! Alarm registers are kept, but there are no interrupts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::PlatformEvents;
use super::calendar::{DateTime, from_unix_seconds, to_unix_seconds};
use crate::bus::BusDevice;
use crate::layout::{LOW_RAM_END_MAX, RTC_CENTURY};

/// Where the RTC takes the time from: UTC since 1970.
pub type WallClock = Box<dyn Fn() -> Duration + Send + Sync>;

/// The host's clock.
pub fn host_clock() -> WallClock {
    Box::new(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const SHUTDOWN_STATUS: u8 = 0x0f;
/// As the FADT says.
const CENTURY: u8 = RTC_CENTURY;

/// 32.768 kHz time base, 1024 Hz periodic rate: the usual setting.
const STATUS_A_DEFAULT: u8 = 0x26;
const STATUS_A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const STATUS_B_24_HOURS: u8 = 1 << 1;
const STATUS_B_BINARY: u8 = 1 << 2;
const STATUS_B_SET: u8 = 1 << 7;
/// The battery is good.
const STATUS_D_VALID: u8 = 1 << 7;
/// Bit 7 of a register index disables NMIs, on a PC.
const INDEX_MASK: u8 = 0x7f;
/// In 12-hour mode: afternoon.
const HOURS_PM: u8 = 1 << 7;

/// Reads so close together see the same time.
const SNAPSHOT: Duration = Duration::from_millis(10);

/// State of the clock for suspend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version")]
pub enum RtcState {
    /// First version.
    #[serde(rename = "1")]
    V1(RtcRegisters),
}

/// Registers of the clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcRegisters {
    /// Selected register, with the NMI bit.
    pub index: u8,
    /// 128 bytes of CMOS; the time registers count only while the guest sets the clock.
    pub memory: Vec<u8>,
    /// Seconds that the guest's clock is ahead of UTC.
    pub ahead: i64,
}

/// The clock and its memory.
pub struct Rtc {
    clock: WallClock,
    events: Arc<dyn PlatformEvents>,
    state: Mutex<State>,
}

struct State {
    index: u8,
    memory: [u8; 128],
    ahead: i64,
    /// When the clock was looked at, and what it showed.
    snapshot: Option<(Duration, DateTime)>,
}

impl Rtc {
    /// A clock that shows `clock`, in a machine with `ram_size` bytes of memory.
    pub fn new(ram_size: u64, clock: WallClock, events: Arc<dyn PlatformEvents>) -> Arc<Self> {
        let mut memory = [0; 128];
        describe_memory(&mut memory, ram_size);
        memory[usize::from(STATUS_A)] = STATUS_A_DEFAULT;
        memory[usize::from(STATUS_B)] = STATUS_B_24_HOURS;
        Arc::new(Self {
            clock,
            events,
            state: Mutex::new(State {
                index: 0,
                memory,
                ahead: 0,
                snapshot: None,
            }),
        })
    }

    /// The state for suspend.
    pub fn save(&self) -> RtcState {
        let state = self.state();
        RtcState::V1(RtcRegisters {
            index: state.index,
            memory: state.memory.to_vec(),
            ahead: state.ahead,
        })
    }

    /// Puts the clock into a saved state. It then shows the time of now, not that of the suspend.
    pub fn restore(&self, saved: &RtcState) {
        let RtcState::V1(registers) = saved;
        let mut state = self.state();
        state.index = registers.index;
        for (byte, saved) in state.memory.iter_mut().zip(&registers.memory) {
            *byte = *saved;
        }
        state.ahead = registers.ahead;
        state.snapshot = None;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Every register may hold any value, so a panic elsewhere leaves nothing invalid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_data(&self) -> u8 {
        let mut state = self.state();
        let register = state.index & INDEX_MASK;
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                // While the guest sets the clock it reads back what it wrote.
                if state.is_being_set() {
                    state.byte(register)
                } else {
                    state.time_register(register, &self.clock)
                }
            }
            STATUS_A => state.byte(STATUS_A) & !STATUS_A_UPDATE_IN_PROGRESS,
            // No interrupt has happened.
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            _ => state.byte(register),
        }
    }

    fn write_data(&self, value: u8) {
        let mut state = self.state();
        match state.index & INDEX_MASK {
            register @ (SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY) => {
                if state.is_being_set() {
                    state.memory[usize::from(register)] = value;
                } else {
                    // A register written on its own changes the running clock.
                    state.load_time_registers(&self.clock);
                    state.memory[usize::from(register)] = value;
                    state.set_clock(&self.clock);
                }
            }
            STATUS_B => {
                let was_being_set = state.is_being_set();
                let starts = value & STATUS_B_SET != 0 && !was_being_set;
                if starts {
                    state.load_time_registers(&self.clock);
                }
                state.memory[usize::from(STATUS_B)] = value;
                if was_being_set && !state.is_being_set() {
                    state.set_clock(&self.clock);
                }
            }
            STATUS_C | STATUS_D => {}
            SHUTDOWN_STATUS => {
                state.memory[usize::from(SHUTDOWN_STATUS)] = value;
                // With NMIs disabled this is how firmware resets the machine. Linux writes the same without the NMI bit
                // after it has started a processor.
                let resets = state.index & !INDEX_MASK != 0 && value == 0;
                drop(state);
                if resets {
                    self.events.reset();
                }
            }
            register => state.memory[usize::from(register)] = value,
        }
    }
}

impl State {
    fn byte(&self, register: u8) -> u8 {
        self.memory[usize::from(register & INDEX_MASK)]
    }

    fn is_being_set(&self) -> bool {
        self.byte(STATUS_B) & STATUS_B_SET != 0
    }

    /// The guest's date and time, the same for reads close together.
    fn now(&mut self, clock: &WallClock) -> DateTime {
        let now = clock();
        if let Some((taken, shown)) = self.snapshot
            && now.checked_sub(taken).is_some_and(|age| age < SNAPSHOT)
        {
            return shown;
        }
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let shown = from_unix_seconds(seconds.saturating_add(self.ahead));
        self.snapshot = Some((now, shown));
        shown
    }

    fn time_register(&mut self, register: u8, clock: &WallClock) -> u8 {
        let time = self.now(clock);
        match register {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            WEEKDAY => self.encode(time.weekday),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode(time.year_of_century()),
            _ => self.encode(time.century()),
        }
    }

    /// Puts the running time into the registers, which stand still then.
    fn load_time_registers(&mut self, clock: &WallClock) {
        for register in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
            self.memory[usize::from(register)] = self.time_register(register, clock);
        }
    }

    /// Makes the clock show what the registers say, if that is a date.
    fn set_clock(&mut self, clock: &WallClock) {
        let value = |register| self.decode(self.byte(register));
        let time = DateTime {
            year: u16::from(value(CENTURY)) * 100 + u16::from(value(YEAR)),
            month: value(MONTH),
            day: value(DAY),
            hour: self.decode_hour(self.byte(HOURS)),
            minute: value(MINUTES),
            second: value(SECONDS),
            weekday: value(WEEKDAY),
        };
        let now = i64::try_from(clock().as_secs()).unwrap_or(i64::MAX);
        if let Some(seconds) = to_unix_seconds(&time) {
            self.ahead = seconds.saturating_sub(now);
        }
        self.snapshot = None;
    }

    fn encode(&self, value: u8) -> u8 {
        if self.byte(STATUS_B) & STATUS_B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.byte(STATUS_B) & STATUS_B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0x0f)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.byte(STATUS_B) & STATUS_B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { HOURS_PM } else { 0 };
        // Midnight and noon are 12.
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.byte(STATUS_B) & STATUS_B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & HOURS_PM != 0 { 12 } else { 0 };
        self.decode(value & !HOURS_PM) % 12 + afternoon
    }
}

/// Fills the bytes that say how much memory the machine has, as PC firmware does.
fn describe_memory(memory: &mut [u8; 128], ram_size: u64) {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let low = ram_size.min(LOW_RAM_END_MAX);
    let high = ram_size - low;
    let mut put = |at: usize, value: u64, width: usize| {
        let value = value.min((1 << (8 * width)) - 1);
        memory[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    };
    // KiB of conventional memory.
    put(0x15, 640, 2);
    // KiB between 1 MiB and 64 MiB, twice.
    let extended = low.saturating_sub(MIB).min(63 * MIB) / KIB;
    put(0x17, extended, 2);
    put(0x30, extended, 2);
    // 64 KiB units between 16 MiB and 4 GiB, then above 4 GiB.
    put(0x34, low.saturating_sub(16 * MIB) / (64 * KIB), 2);
    put(0x5b, high / (64 * KIB), 3);
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            // The index port is write-only.
            *byte = if port == 1 { self.read_data() } else { 0xff };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..).zip(data) {
            match port {
                0 => self.state().index = *byte,
                1 => self.write_data(*byte),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::platform::testing::{Event, Recorder};

    /// 2026-11-21 16:05:59 UTC, a Saturday.
    const NOW: u64 = 1_795_277_159;

    struct Bench {
        rtc: Arc<Rtc>,
        milliseconds: Arc<AtomicU64>,
        events: Arc<Recorder>,
    }

    impl Bench {
        fn new(ram_size: u64) -> Self {
            let milliseconds = Arc::new(AtomicU64::new(NOW * 1000));
            let clock = milliseconds.clone();
            let clock: WallClock = Box::new(move || Duration::from_millis(clock.load(Ordering::SeqCst)));
            let events = Recorder::new();
            Self {
                rtc: Rtc::new(ram_size, clock, events.clone()),
                milliseconds,
                events,
            }
        }

        fn get(&self, register: u8) -> u8 {
            self.rtc.write(0, &[register]);
            let mut data = [0];
            self.rtc.read(1, &mut data);
            data[0]
        }

        fn set(&self, register: u8, value: u8) {
            self.rtc.write(0, &[register]);
            self.rtc.write(1, &[value]);
        }

        fn date(&self) -> [u8; 8] {
            [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|register| self.get(register))
        }

        fn pass(&self, milliseconds: u64) {
            self.milliseconds.fetch_add(milliseconds, Ordering::SeqCst);
        }
    }

    #[test]
    fn time_is_bcd_in_24_hours_after_power_on() {
        assert_eq!(
            Bench::new(0).date(),
            [0x20, 0x26, 0x11, 0x21, 0x16, 0x05, 0x59, 7]
        );
    }

    #[test]
    fn binary_and_12_hour_mode_are_obeyed() {
        let bench = Bench::new(0);
        bench.set(STATUS_B, STATUS_B_BINARY);
        assert_eq!(bench.date(), [20, 26, 11, 21, 4 | HOURS_PM, 5, 59, 7]);
    }

    #[test]
    fn registers_read_together_belong_together() {
        let bench = Bench::new(0);
        bench.pass(999);
        assert_eq!(bench.get(STATUS_A) & STATUS_A_UPDATE_IN_PROGRESS, 0);
        assert_eq!(bench.get(MINUTES), 0x05);
        bench.pass(5);
        assert_eq!(bench.get(SECONDS), 0x59, "the same look at the clock");
        bench.pass(5);
        assert_eq!((bench.get(MINUTES), bench.get(SECONDS)), (0x06, 0x00));
    }

    #[test]
    fn the_clock_can_be_set_and_runs_on() {
        let bench = Bench::new(0);
        bench.set(STATUS_B, STATUS_B_24_HOURS | STATUS_B_SET);
        for (register, value) in [
            (CENTURY, 0x20),
            (YEAR, 0x28),
            (MONTH, 0x02),
            (DAY, 0x28),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x58),
        ] {
            bench.set(register, value);
        }
        bench.pass(60_000);
        assert_eq!(bench.get(SECONDS), 0x58, "it stands still while it is set");
        bench.set(STATUS_B, STATUS_B_24_HOURS);
        bench.pass(3_000);
        assert_eq!(bench.date(), [0x20, 0x28, 0x02, 0x29, 0x00, 0x00, 0x01, 3]);

        let saved = toml::to_string(&bench.rtc.save()).unwrap();
        let resumed = Bench::new(0);
        resumed.rtc.restore(&toml::from_str(&saved).unwrap());
        assert_eq!(resumed.get(YEAR), 0x28);
    }

    #[test]
    fn nonsense_leaves_the_clock_as_it_was() {
        let bench = Bench::new(0);
        bench.set(MONTH, 0xff);
        assert_eq!(bench.get(MONTH), 0x11);
        bench.set(SECONDS, 0x00);
        assert_eq!(bench.date(), [0x20, 0x26, 0x11, 0x21, 0x16, 0x05, 0x00, 7]);
    }

    #[test]
    fn memory_size_is_described() {
        let bench = Bench::new(5 << 30);
        let word = |low: u8| u16::from_le_bytes([bench.get(low), bench.get(low + 1)]);
        assert_eq!(word(0x15), 640);
        assert_eq!(word(0x17), 63 * 1024);
        assert_eq!(u64::from(word(0x34)) * 64 * 1024 + (16 << 20), LOW_RAM_END_MAX);
        assert_eq!(u64::from(word(0x5b)) * 64 * 1024, (5 << 30) - LOW_RAM_END_MAX);
        let small = Bench::new(32 << 20);
        assert_eq!((small.get(0x17), small.get(0x18)), (0x00, 0x7c));
    }

    #[test]
    fn alarm_and_memory_keep_what_is_written() {
        let bench = Bench::new(0);
        for register in [0x01, 0x03, 0x05, 0x0e, 0x40, 0x7f] {
            bench.set(register, register ^ 0x55);
            assert_eq!(bench.get(register), register ^ 0x55);
        }
        bench.set(STATUS_D, 0);
        assert_eq!(bench.get(STATUS_D), STATUS_D_VALID);
    }

    #[test]
    fn only_shutdown_status_0_with_nmi_disabled_resets() {
        let bench = Bench::new(0);
        // What Linux does when it starts a processor.
        bench.set(SHUTDOWN_STATUS, 0x0a);
        bench.set(SHUTDOWN_STATUS, 0x00);
        bench.set(0x80 | SHUTDOWN_STATUS, 0x0a);
        assert_eq!(bench.events.take(), []);
        bench.set(0x80 | SHUTDOWN_STATUS, 0x00);
        assert_eq!(bench.events.take(), [Event::Reset]);
    }
}
