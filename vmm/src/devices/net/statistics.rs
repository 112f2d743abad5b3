//! What a network card counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one card, all queues together, since it was made. "Received" and "sent" are the guest's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStatistics {
    /// Packets that the guest got.
    pub received_packets: u64,
    /// Their bytes, without the virtio header.
    pub received_bytes: u64,
    /// Packets that did not fit into the guest's buffers.
    pub received_dropped: u64,
    /// How often packets had to wait because the guest had provided no buffers.
    pub receive_starved: u64,
    /// Packets that the guest sent.
    pub sent_packets: u64,
    /// Their bytes, without the virtio header.
    pub sent_bytes: u64,
    /// Packets of the guest that were malformed, or that the host did not take.
    pub sent_dropped: u64,
    /// How often the guest's packets had to wait for the host.
    pub send_blocked: u64,
}

/// The live counters. Each is independent of the others, so that relaxed order suffices.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) received_packets: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) received_dropped: AtomicU64,
    pub(super) receive_starved: AtomicU64,
    pub(super) sent_packets: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
    pub(super) sent_dropped: AtomicU64,
    pub(super) send_blocked: AtomicU64,
}

impl Counters {
    /// Adds `amount` to `counter`.
    pub(super) fn add(counter: &AtomicU64, amount: usize) {
        counter.fetch_add(u64::try_from(amount).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The values now.
    pub(super) fn snapshot(&self) -> NetStatistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetStatistics {
            received_packets: get(&self.received_packets),
            received_bytes: get(&self.received_bytes),
            received_dropped: get(&self.received_dropped),
            receive_starved: get(&self.receive_starved),
            sent_packets: get(&self.sent_packets),
            sent_bytes: get(&self.sent_bytes),
            sent_dropped: get(&self.sent_dropped),
            send_blocked: get(&self.send_blocked),
        }
    }
}
