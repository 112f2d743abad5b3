//! The real-time clock: whatever a guest wrote before, it reads a date, and the clock does not run backwards by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arbitrary::Unstructured;
use vmm::bus::BusDevice;
use vmm::platform::{GuestPanic, PlatformEvents, Rtc};

/// Notices resets.
#[derive(Default)]
struct Resets(AtomicU64);

impl PlatformEvents for Resets {
    fn power_off(&self) {
        panic!("the clock cannot switch off");
    }

    fn reset(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn guest_panic(&self, _panic: GuestPanic) {
        panic!("the clock knows of no panic");
    }

    fn eject(&self, _slot: u8) {
        panic!("the clock ejects nothing");
    }
}

fn write(rtc: &Rtc, register: u8, value: u8) {
    rtc.write(0, &[register]);
    rtc.write(1, &[value]);
}

fn read(rtc: &Rtc, register: u8) -> u8 {
    let mut data = [0];
    rtc.write(0, &[register]);
    rtc.read(1, &mut data);
    data[0]
}

/// Year to second, read in BCD and 24-hour mode.
fn date(rtc: &Rtc) -> [u16; 6] {
    write(rtc, 0x0b, 0x02);
    let [century, year, month, day, hour, minute, second] = [0x32, 9, 8, 7, 4, 2, 0].map(|register| {
        let value = read(rtc, register);
        let (tens, ones) = (value >> 4, value & 0xf);
        assert!(
            tens < 10 && ones < 10,
            "{value:#x} in register {register:#x} is not BCD"
        );
        u16::from(tens) * 10 + u16::from(ones)
    });
    let date = [century * 100 + year, month, day, hour, minute, second];
    for (value, range) in date
        .iter()
        .zip([1970..=9999, 1..=12, 1..=31, 0..=23, 0..=59, 0..=59])
    {
        assert!(range.contains(value), "{date:?} is no date");
    }
    date
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let seconds = Arc::new(AtomicU64::new(if input.ratio(1, 16)? {
        input.arbitrary()?
    } else {
        1_795_277_159
    }));
    let clock = seconds.clone();
    let resets = Arc::new(Resets::default());
    let rtc = Rtc::new(
        input.arbitrary()?,
        Box::new(move || Duration::from_secs(clock.load(Ordering::SeqCst))),
        resets.clone(),
    );
    let mut may_reset = false;
    while !input.is_empty() {
        match input.int_in_range(0..=7_u8)? {
            0..=3 => {
                let registers = [0, 2, 4, 6, 7, 8, 9, 0x32, 0x0a, 0x0b, 0x0f, 0x8f];
                let register = if input.ratio(1, 8)? {
                    input.arbitrary()?
                } else {
                    *input.choose(&registers)?
                };
                let value = input.arbitrary()?;
                may_reset |= register == 0x8f && value == 0;
                write(&rtc, register, value);
            }
            4 => drop(read(&rtc, input.arbitrary()?)),
            5 => {
                let passed = input.int_in_range(0..=100_000_000)?;
                let now = seconds.load(Ordering::SeqCst);
                seconds.store(now.saturating_add(passed), Ordering::SeqCst);
            }
            6 => {
                let mut data = vec![input.arbitrary()?; input.int_in_range(1..=8)?];
                // Two bytes are index and data at once.
                may_reset = true;
                rtc.write(input.int_in_range(0..=1)?, &data);
                rtc.read(0, &mut data);
            }
            _ => {
                let saved = rtc.save();
                rtc.restore(&saved);
                assert_eq!(rtc.save(), saved);
            }
        }
    }
    assert!(
        may_reset || resets.0.load(Ordering::SeqCst) == 0,
        "a reset that nobody asked for"
    );
    let before = date(&rtc);
    seconds.fetch_add(2, Ordering::SeqCst);
    // Beyond the year 9999, or what 64 bits of seconds can say, it stands.
    assert!(date(&rtc) >= before || seconds.load(Ordering::SeqCst) < 2);
    Ok(())
}
