//! The ports of the mainboard, by accesses of every width: the guest gets what it asked for by the right access, and nothing
//! by others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arbitrary::Unstructured;
use vmm::bus::Bus;
use vmm::console::{ConsoleHandle, ConsoleInput};
use vmm::layout;
use vmm::pci::{Cf8, PciBus};
use vmm::platform::{GedState, GuestPanic, Platform, PlatformConfig, PlatformEvents};

#[derive(Default)]
struct Asked {
    power_off: u32,
    resets: u32,
    panics: u32,
    ejected: u32,
}

#[derive(Default)]
struct Recorder(Mutex<Asked>);

impl PlatformEvents for Recorder {
    fn power_off(&self) {
        self.0.lock().unwrap().power_off += 1;
    }

    fn reset(&self) {
        self.0.lock().unwrap().resets += 1;
    }

    fn guest_panic(&self, _panic: GuestPanic) {
        self.0.lock().unwrap().panics += 1;
    }

    fn eject(&self, slot: u8) {
        self.0.lock().unwrap().ejected |= 1 << slot;
    }
}

/// Ports where something answers.
const BASES: [u16; 9] = [
    layout::PORT_I8042_DATA,
    layout::PORT_RTC,
    0x80,
    0xe9,
    layout::PORT_COM1,
    layout::PORT_PVPANIC,
    layout::PORT_ACPI,
    layout::PORT_PCI_HOTPLUG,
    layout::PORT_PCI_CONFIG_ADDRESS,
];

struct Bench {
    platform: Platform,
    console: ConsoleHandle,
    ports: Bus,
    asked: Arc<Recorder>,
    seconds: Arc<AtomicU64>,
    /// Slots that the host announced or asked back, and that were not read yet.
    up: u32,
    down: u32,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut bench = Bench::new();
    while !input.is_empty() {
        match input.int_in_range(0..=15_u8)? {
            0..=11 => bench.access(input)?,
            12 => {
                // Slots from 32 on do not exist.
                let slot: u8 = input.int_in_range(0..=40)?;
                let bit = 1_u32.checked_shl(slot.into()).unwrap_or(0);
                if input.arbitrary()? {
                    bench.platform.hotplug.announce(slot);
                    bench.up |= bit;
                } else {
                    bench.platform.hotplug.request_removal(slot);
                    bench.down |= bit;
                }
                if bit != 0 {
                    bench.assert_event(layout::ged_event::PCI_HOTPLUG);
                }
            }
            13 => {
                bench.platform.ged.press_power_button();
                bench.assert_event(layout::ged_event::POWER_BUTTON);
            }
            14 => {
                let typed = [0x55; 40];
                assert!(bench.platform.serial.push(&typed) <= typed.len());
                let passed = input.int_in_range(0..=100_000)?;
                bench.seconds.fetch_add(passed, Ordering::SeqCst);
            }
            _ => bench.suspend_and_resume(input.ratio(1, 4)?),
        }
    }
    bench.works_afterwards();
    Ok(())
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Port and console hold each other.
        self.console.set_input(None);
    }
}

impl Bench {
    fn new() -> Self {
        let console = ConsoleHandle::null();
        let (ports, asked) = (Bus::new(), Arc::<Recorder>::default());
        let seconds = Arc::new(AtomicU64::new(1_795_277_159));
        let clock = seconds.clone();
        let config = PlatformConfig {
            ram_size: 1 << 30,
            serial: console.clone(),
            serial_interrupt: Arc::new(|| {}),
            ged_interrupt: Arc::new(|| {}),
            clock: Box::new(move || Duration::from_secs(clock.load(Ordering::SeqCst))),
            started: Instant::now(),
            marks: Arc::new(|line, _| {
                assert!(!line.is_empty() && line.len() <= 3 * 256);
                assert!(!line.contains(char::is_control), "{line:?}");
            }),
            events: asked.clone(),
        };
        let platform = Platform::new(config, &ports).unwrap();
        let cf8 = u64::from(layout::PORT_PCI_CONFIG_ADDRESS);
        let pci = Arc::new(Cf8::new(Arc::new(PciBus::new())));
        ports.insert("CF8", cf8..cf8 + 8, pci).unwrap();
        Self {
            platform,
            console,
            ports,
            asked,
            seconds,
            up: 0,
            down: 0,
        }
    }

    /// An access near a device, of 1 to 8 bytes, and what it may bring about.
    fn access(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let port = if input.ratio(1, 32)? {
            input.arbitrary()?
        } else {
            input.choose(&BASES)?.wrapping_add(input.int_in_range(0..=15)?)
        };
        let mut data = vec![0; *input.choose(&[1_usize, 1, 1, 2, 4, 4, 3, 8])?];
        if input.arbitrary()? {
            input.fill_buffer(&mut data)?;
            if input.ratio(1, 4)? {
                data[0] = *input.choose(&[0x34, 1, 0xfe, 0x0f, 0x8f, 0x60, 0x20, 3])?;
            }
            *self.asked.0.lock().unwrap() = Asked::default();
            self.ports.write(port.into(), &data);
            self.assert_asked(port, &data);
        } else {
            self.ports.read(port.into(), &mut data);
            self.assert_hotplug_read(port, &data);
        }
        Ok(())
    }

    /// The byte that `data`, written to `port`, brings to port `wanted`.
    fn byte_for(wanted: u16, port: u16, data: &[u8]) -> Option<u8> {
        wanted
            .checked_sub(port)
            .and_then(|at| data.get(usize::from(at)))
            .copied()
    }

    fn assert_asked(&self, port: u16, data: &[u8]) {
        let asked = self.asked.0.lock().unwrap();
        let byte = |wanted| Self::byte_for(wanted, port, data);
        let sleeps = byte(layout::PORT_ACPI_SLEEP_CONTROL) == Some(layout::ACPI_SLEEP_VALUE_S5);
        assert_eq!(asked.power_off, u32::from(sleeps));
        let resets = u32::from(byte(layout::PORT_ACPI_RESET) == Some(layout::ACPI_RESET_VALUE))
            + u32::from(byte(layout::PORT_I8042_COMMAND) == Some(0xfe));
        // The clock's shutdown status depends on what was selected before.
        let rtc = u32::from(byte(layout::PORT_RTC + 1) == Some(0));
        assert!((resets..=resets + rtc).contains(&asked.resets));
        let panics = byte(layout::PORT_PVPANIC).is_some_and(|value| value & 3 != 0);
        assert_eq!(asked.panics, u32::from(panics));
        let eject = [0, 1, 2, 3].map(|at| byte(layout::PORT_PCI_HOTPLUG_EJECT + at).unwrap_or(0));
        assert_eq!(asked.ejected, u32::from_le_bytes(eject));
    }

    /// A dword read of a hot-plug register gives all that was signalled, once.
    fn assert_hotplug_read(&mut self, port: u16, data: &[u8]) {
        let end = u32::from(port) + data.len() as u32;
        for (register, expected) in [
            (layout::PORT_PCI_HOTPLUG_UP, &mut self.up),
            (layout::PORT_PCI_HOTPLUG_DOWN, &mut self.down),
        ] {
            let first = u32::from(register);
            if (u32::from(port)..end).contains(&first) {
                if end >= first + 4 {
                    let at = usize::from(register - port);
                    assert_eq!(
                        data[at..at + 4],
                        expected.to_le_bytes(),
                        "slots were lost or invented"
                    );
                }
                *expected = 0;
            }
        }
    }

    fn assert_event(&self, bit: u8) {
        let GedState::V1 { pending } = self.platform.ged.save();
        assert_ne!(pending & bit, 0, "the guest is not told");
    }

    fn suspend_and_resume(&mut self, reset: bool) {
        let saved = self.platform.save();
        self.platform.restore(&saved);
        assert_eq!(self.platform.save(), saved);
        if reset {
            self.platform.reset();
            (self.up, self.down) = (0, 0);
        }
    }

    /// The mainboard of a guest that comes to its senses.
    fn works_afterwards(&mut self) {
        *self.asked.0.lock().unwrap() = Asked::default();
        self.ports.write(0x600, &[layout::ACPI_SLEEP_VALUE_S5]);
        assert_eq!(self.asked.0.lock().unwrap().power_off, 1);
        self.platform.hotplug.announce(3);
        let mut slots = [0; 4];
        self.ports.read(layout::PORT_PCI_HOTPLUG_UP.into(), &mut slots);
        assert_eq!(u32::from_le_bytes(slots), self.up | 1 << 3);
        let mut id = [0];
        self.ports.write(0x3ff, &[0x5a]);
        self.ports.read(0x3ff, &mut id);
        assert_eq!(id, [0x5a]);
    }
}
