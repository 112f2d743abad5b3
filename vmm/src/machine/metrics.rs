//! What a machine's devices have counted.
//!
//! Counters are written by the threads that serve the devices and read by whoever asks, without the main loop. They stay over
//! reboots, as the host's side of the devices does.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use api::{DeviceId, Latencies, NetMetrics, QueueMetrics, RequestCounts};
use storage_virtualizer::Counters;

use super::devices::DeviceOpener;
use crate::devices::net::NetStatistics;

/// Reads what a card has counted; none when the card is gone.
type ReadNet = Box<dyn Fn() -> Option<NetStatistics> + Send>;

/// The network cards of a machine, as far as numbers go.
#[derive(Default)]
pub(super) struct NetCounters(Mutex<BTreeMap<DeviceId, ReadNet>>);

impl fmt::Debug for NetCounters {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("NetCounters").finish_non_exhaustive()
    }
}

impl NetCounters {
    /// A card is there from now on. If its name is taken, the machine will refuse it, and the one that has the name stays.
    pub(super) fn enter(&self, id: DeviceId, read: impl Fn() -> Option<NetStatistics> + Send + 'static) {
        let mut nets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nets.retain(|_, read| read().is_some());
        nets.entry(id).or_insert_with(|| Box::new(read));
    }

    fn all(&self) -> Vec<NetMetrics> {
        let nets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all = nets.iter().filter_map(|(id, read)| Some(of_net(id, &read()?)));
        all.collect()
    }
}

impl DeviceOpener {
    /// The request queues of disks, those of the SCSI adapter last.
    pub(super) fn queue_metrics(&self) -> Vec<QueueMetrics> {
        let adapter = (super::devices::adapter_id(), self.scsi.counters());
        let devices = self.settings.counters().into_iter().chain([adapter]);
        let queues = devices.flat_map(|(id, queues)| {
            (0..)
                .zip(queues)
                .map(move |(number, counters)| of_queue(&id, number, &counters))
        });
        queues.collect()
    }

    pub(super) fn net_metrics(&self) -> Vec<NetMetrics> {
        self.net_counters.all()
    }
}

fn of_queue(device: &DeviceId, queue: u16, counters: &Counters) -> QueueMetrics {
    QueueMetrics {
        device: device.clone(),
        queue,
        counts: request_counts(counters),
        interrupts: counters.interrupts,
        latencies: latencies(counters),
    }
}

/// What a queue has counted, in the words of management.
pub fn request_counts(counters: &Counters) -> RequestCounts {
    let storage_virtualizer::RequestCounts {
        reads,
        read_bytes,
        writes,
        written_bytes,
        flushes,
        others,
        errors,
    } = counters.counts;
    RequestCounts {
        reads,
        read_bytes,
        writes,
        written_bytes,
        flushes,
        others,
        errors,
    }
}

/// How long a queue's requests took, in the words of management.
pub fn latencies(counters: &Counters) -> Latencies {
    Latencies {
        classes: counters.latencies,
        sum_us: counters.time_us,
    }
}

fn of_net(device: &DeviceId, counted: &NetStatistics) -> NetMetrics {
    NetMetrics {
        device: device.clone(),
        received_packets: counted.received_packets,
        received_bytes: counted.received_bytes,
        received_dropped: counted.received_dropped,
        receive_waits: counted.receive_starved,
        sent_packets: counted.sent_packets,
        sent_bytes: counted.sent_bytes,
        sent_dropped: counted.sent_dropped,
        send_waits: counted.send_blocked,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_card_that_is_gone_has_no_numbers_and_its_name_is_free() {
        let nets = NetCounters::default();
        let enter = |packets| {
            let card = Arc::new(NetStatistics {
                sent_packets: packets,
                ..NetStatistics::default()
            });
            let weak = Arc::downgrade(&card);
            nets.enter("net0".parse().unwrap(), move || weak.upgrade().map(|card| *card));
            card
        };
        let first = enter(1);
        let second = enter(2);
        assert_eq!(nets.all()[0].sent_packets, 1);
        drop((first, second));
        assert_eq!(nets.all(), []);
        let _third = enter(3);
        assert_eq!(nets.all()[0].sent_packets, 3);
    }
}
