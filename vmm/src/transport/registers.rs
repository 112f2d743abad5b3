//! The common configuration structure (virtio 1.2 §4.1.4.3), and the capabilities that say where everything is.

use std::sync::atomic::Ordering;

use super::{DOORBELL_STRIDE, Inner, NO_VECTOR, VirtioPci, place, status};
use crate::pci::ConfigSpace;

/// Capability types (§4.1.4).
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;
const DEVICE: u8 = 4;
const PCI_WINDOW: u8 = 5;

/// Bytes of the common configuration that exist, up to and including `queue_device`.
const COMMON_SIZE: usize = 56;

/// Number of the vendor-specific capability.
const VENDOR_CAPABILITY: u8 = 0x09;

/// Offsets of the fields.
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    pub(super) const END: u64 = 0x38;
}

/// Body of a virtio capability behind the two-byte header: length, type, BAR, id, padding, offset, length.
fn body(kind: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let total = u8::try_from(16 + extra.len()).unwrap_or(u8::MAX);
    let mut body = vec![total, kind, 0, 0, 0, 0];
    // All places lie within a BAR of 128 KiB.
    for value in [offset, length] {
        body.extend(u32::try_from(value).unwrap_or(0).to_le_bytes());
    }
    body.extend(extra);
    body
}

/// Adds the five capabilities; returns the offset of the configuration window's.
pub(super) fn add_capabilities(config: &mut ConfigSpace) -> usize {
    let stride = u32::try_from(DOORBELL_STRIDE).unwrap_or(0).to_le_bytes();
    config.add_capability(
        VENDOR_CAPABILITY,
        &body(COMMON, place::COMMON, COMMON_SIZE as u64, &[]),
        &[],
    );
    config.add_capability(
        VENDOR_CAPABILITY,
        &body(NOTIFY, place::NOTIFY, place::NOTIFY_END - place::NOTIFY, &stride),
        &[],
    );
    config.add_capability(VENDOR_CAPABILITY, &body(ISR, place::ISR, 1, &[]), &[]);
    config.add_capability(
        VENDOR_CAPABILITY,
        &body(DEVICE, place::DEVICE, place::NOTIFY - place::DEVICE, &[]),
        &[],
    );
    // §4.1.4.9: software chooses BAR, offset and length; the data field is handled on access.
    let mut writable = [0; 14];
    writable[2] = 0xff;
    writable[6..14].fill(0xff);
    config.add_capability(VENDOR_CAPABILITY, &body(PCI_WINDOW, 0, 0, &[0; 4]), &writable)
}

/// If a configuration access of `length` bytes at `offset` hits the data field of the configuration window: the place in
/// BAR 0 and the number of bytes that it means.
pub(super) fn window_access(
    config: &ConfigSpace,
    capability: usize,
    offset: usize,
    length: usize,
) -> Option<(u64, usize)> {
    if !(capability + 16..capability + 20).contains(&offset) {
        return None;
    }
    let bar = config.u32_at(capability + 4) & 0xff;
    let place = config.u32_at(capability + 8);
    let wanted = usize::try_from(config.u32_at(capability + 12)).ok()?;
    let valid = bar == 0 && matches!(wanted, 1 | 2 | 4) && place.is_multiple_of(u32::try_from(wanted).ok()?);
    (valid && offset == capability + 16).then_some((u64::from(place), wanted.min(length)))
}

impl VirtioPci {
    /// Reads common configuration. The fields are laid out as bytes first, so that any width and alignment has an answer.
    pub(super) fn read_common(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        let status = self.status(inner);
        let half = |value: u64, select: u32| -> u32 {
            let shifted = if select < 2 { value >> (32 * select) } else { 0 };
            u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(0)
        };
        let select = usize::from(inner.queue_select);
        let queue = inner.queues.get(select);
        let config_source = inner.queues.len();
        let vector = if queue.is_some() {
            inner.msix.vector(select)
        } else {
            NO_VECTOR
        };

        let mut bytes = Vec::with_capacity(COMMON_SIZE);
        bytes.extend(inner.device_feature_select.to_le_bytes());
        bytes.extend(half(Self::offered(inner), inner.device_feature_select).to_le_bytes());
        bytes.extend(inner.driver_feature_select.to_le_bytes());
        bytes.extend(half(inner.driver_features, inner.driver_feature_select).to_le_bytes());
        bytes.extend(inner.msix.vector(config_source).to_le_bytes());
        bytes.extend(
            u16::try_from(inner.queues.len())
                .unwrap_or(u16::MAX)
                .to_le_bytes(),
        );
        bytes.push(status);
        bytes.push(self.shared.generation.load(Ordering::SeqCst));
        bytes.extend(inner.queue_select.to_le_bytes());
        bytes.extend(queue.map_or(0, |queue| queue.size).to_le_bytes());
        bytes.extend(vector.to_le_bytes());
        bytes.extend(queue.map_or(0, |queue| u16::from(queue.enabled)).to_le_bytes());
        // The doorbell of queue n is the n-th.
        bytes.extend(if queue.is_some() { inner.queue_select } else { 0 }.to_le_bytes());
        for address in [
            queue.map_or(0, |queue| queue.descriptors),
            queue.map_or(0, |queue| queue.driver_area),
            queue.map_or(0, |queue| queue.device_area),
        ] {
            bytes.extend(address.to_le_bytes());
        }
        virtio_core::read_config_bytes(&bytes, offset, data);
    }

    /// Writes common configuration. Fields take accesses of their own width; 64-bit fields also by halves.
    pub(super) fn write_common(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let value = match *data {
            [a] => u64::from(a),
            [a, b] => u64::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => return,
        };
        #[allow(
            clippy::cast_possible_truncation,
            reason = "each value is as wide as the data that it was read from"
        )]
        match (offset, data.len()) {
            (field::STATUS, 1) => self.write_status(inner, value as u8),
            _ if !self.finish_reset(inner) => {}
            (field::DEVICE_FEATURE_SELECT, 4) => inner.device_feature_select = value as u32,
            (field::DRIVER_FEATURE_SELECT, 4) => inner.driver_feature_select = value as u32,
            (field::DRIVER_FEATURE, 4) => self.write_features(inner, value),
            (field::CONFIG_VECTOR, 2) => {
                inner.msix.assign(inner.queues.len(), value as u16);
            }
            (field::QUEUE_SELECT, 2) => inner.queue_select = value as u16,
            (field::QUEUE_VECTOR, 2) if usize::from(inner.queue_select) < inner.queues.len() => {
                inner.msix.assign(usize::from(inner.queue_select), value as u16);
            }
            (field::QUEUE_SIZE..field::END, _) => self.write_queue(inner, offset, data.len(), value),
            _ => {}
        }
    }

    fn write_features(&self, inner: &mut Inner, value: u64) {
        // Features are fixed once the driver said so (§2.2).
        let fixed =
            self.shared.status.load(Ordering::SeqCst) & (status::FEATURES_OK | status::DRIVER_OK) != 0;
        if !fixed && inner.driver_feature_select < 2 {
            let shift = 32 * inner.driver_feature_select;
            inner.driver_features = inner.driver_features & !(u64::from(u32::MAX) << shift) | value << shift;
        }
    }

    /// Writes a field of the selected queue. An enabled queue does not change any more (§4.1.4.3.2).
    fn write_queue(&self, inner: &mut Inner, offset: u64, width: usize, value: u64) {
        let running = self.shared.status.load(Ordering::SeqCst) & status::DRIVER_OK != 0;
        let Some(queue) = inner.queues.get_mut(usize::from(inner.queue_select)) else {
            return;
        };
        if queue.enabled || running {
            return;
        }
        match (offset, width) {
            (field::QUEUE_SIZE, 2) => {
                if let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= queue.max_size
                {
                    queue.size = size;
                }
            }
            (field::QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (field::QUEUE_DESCRIPTORS..field::END, 4 | 8) => {
                let target = match offset & !7 {
                    field::QUEUE_DESCRIPTORS => &mut queue.descriptors,
                    field::QUEUE_DRIVER => &mut queue.driver_area,
                    field::QUEUE_DEVICE => &mut queue.device_area,
                    _ => return,
                };
                match (offset & 7, width) {
                    (0, 8) => *target = value,
                    (0, 4) => *target = *target & !u64::from(u32::MAX) | value,
                    (4, 4) => *target = *target & u64::from(u32::MAX) | value << 32,
                    _ => {}
                }
            }
            _ => {}
        }
    }
}
