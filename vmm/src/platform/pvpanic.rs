//! pvpanic: how a guest kernel says that it has crashed (QEMU's docs/specs/pvpanic).

use std::sync::Arc;

use super::{GuestPanic, PlatformEvents};
use crate::bus::BusDevice;

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The port.
pub struct PvPanic {
    events: Arc<dyn PlatformEvents>,
}

impl PvPanic {
    /// A port that reports crashes to `events`.
    pub fn new(events: Arc<dyn PlatformEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The events that are understood.
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        for value in data {
            // A crash kernel that takes over is the better news of the two.
            if value & CRASH_LOADED != 0 {
                self.events.guest_panic(GuestPanic::CrashKernelStarts);
            } else if value & PANICKED != 0 {
                self.events.guest_panic(GuestPanic::Panicked);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{Event, Recorder, read_byte};

    #[test]
    fn crashes_are_reported_and_other_bits_ignored() {
        let events = Recorder::new();
        let port = PvPanic::new(events.clone());
        assert_eq!(read_byte(&*port, 0), 3);
        for value in [0x00, 0x01, 0x02, 0xf0] {
            port.write(0, &[value]);
        }
        let expected = [GuestPanic::Panicked, GuestPanic::CrashKernelStarts].map(Event::Panic);
        assert_eq!(events.take(), expected);
    }
}
