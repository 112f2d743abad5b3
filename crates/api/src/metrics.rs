//! Numbers of a running server, for those who draw curves and set alarms: `GET /metrics`, `/healthz`, `/readyz`.
//!
//! Counters grow from zero since their object came into being: a machine's process, a device's attachment, a pool's opening.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::storage::PoolStatus;
use crate::{Attachment, DeviceId, HostStatus, VmStatus};

/// Classes of [`Latencies`].
pub const LATENCY_CLASSES: usize = 24;

/// How long requests took, by powers of two of a microsecond.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Latencies {
    /// Class *i* counts what took less than 2^i microseconds and not less than 2^(i-1); the last one everything else.
    pub classes: [u64; LATENCY_CLASSES],
    /// All together, in microseconds.
    pub sum_us: u64,
}

impl Latencies {
    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let grown = |class: usize| self.classes[class].saturating_sub(before.classes[class]);
        Self {
            classes: std::array::from_fn(grown),
            sum_us: self.sum_us.saturating_sub(before.sum_us),
        }
    }

    /// So many microseconds `percent` of all took at most, rounded up to a power of two; 0 if there are none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let all: u64 = self.classes.iter().sum();
        let wanted = (u128::from(all) * u128::from(percent)).div_ceil(100);
        let mut below = 0;
        for (class, count) in self.classes.iter().enumerate() {
            below += u128::from(*count);
            if below >= wanted && below > 0 {
                return 1 << class;
            }
        }
        0
    }
}

/// Requests to a disk, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RequestCounts {
    /// Read requests.
    pub reads: u64,
    /// Bytes asked for by them.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes in them.
    pub written_bytes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// All other requests: discards, write zeroes, commands without data.
    pub others: u64,
    /// Requests that were not answered with success.
    pub errors: u64,
}

impl RequestCounts {
    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            reads: self.reads.saturating_sub(before.reads),
            read_bytes: self.read_bytes.saturating_sub(before.read_bytes),
            writes: self.writes.saturating_sub(before.writes),
            written_bytes: self.written_bytes.saturating_sub(before.written_bytes),
            flushes: self.flushes.saturating_sub(before.flushes),
            others: self.others.saturating_sub(before.others),
            errors: self.errors.saturating_sub(before.errors),
        }
    }
}

/// What a request queue of a disk, or of the SCSI adapter, has done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct QueueMetrics {
    /// The disk; `scsi` for the adapter, whose queues serve all its disks.
    pub device: DeviceId,
    /// The queue, from 0.
    pub queue: u16,
    /// What was asked.
    #[serde(flatten)]
    pub counts: RequestCounts,
    /// Interrupts sent.
    pub interrupts: u64,
    /// From the moment that a request was taken from the guest to its answer.
    pub latencies: Latencies,
}

/// What a network card has done; "received" and "sent" are the guest's view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NetMetrics {
    /// The card.
    pub device: DeviceId,
    /// Packets that the guest got.
    pub received_packets: u64,
    /// Their bytes, with Ethernet's header.
    pub received_bytes: u64,
    /// Packets that did not fit into the guest's buffers.
    pub received_dropped: u64,
    /// How often packets had to wait because the guest had provided no buffers.
    pub receive_waits: u64,
    /// Packets that the guest sent.
    pub sent_packets: u64,
    /// Their bytes, with Ethernet's header.
    pub sent_bytes: u64,
    /// Packets that were malformed, or that the host did not take.
    pub sent_dropped: u64,
    /// How often packets had to wait for the host.
    pub send_waits: u64,
}

/// What has been done on a disk of a pool since a machine has it: an item of the answer of `GET /v1/attachments/counters`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct AttachmentMetrics {
    /// Which disk, and which machine.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// What was asked.
    #[serde(flatten)]
    pub counts: RequestCounts,
    /// From the moment that a request was taken from the guest to its answer.
    pub latencies: Latencies,
}

/// All numbers of a server at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Of a manager: how its host is.
    pub host: Option<HostStatus>,
    /// Of a manager: the disks that it serves.
    pub attachments: Vec<AttachmentMetrics>,
    /// Of a machine: how it is.
    pub vm: Option<VmStatus>,
    /// Request queues of its disks.
    pub queues: Vec<QueueMetrics>,
    /// Its network cards.
    pub nets: Vec<NetMetrics>,
    /// The pools that the server has open.
    pub pools: Vec<PoolStatus>,
}

/// The answer of `GET /healthz`: the server answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Liveness {
    /// `ok`.
    pub status: String,
}

impl Liveness {
    /// It answers.
    pub fn ok() -> Self {
        Self {
            status: "ok".to_owned(),
        }
    }
}

/// The answer of `GET /readyz`: whether the server does what it is there for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Readiness {
    /// It does; the HTTP status is 200 then, and 503 otherwise.
    pub ready: bool,
    /// Where it is in its life, for example the state of a machine.
    pub state: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_between_two_looks_has_percentiles() {
        let mut before = Latencies::default();
        (before.classes[3], before.sum_us) = (50, 300);
        let mut after = before;
        (after.classes[5], after.classes[10], after.sum_us) = (98, 2, 5000);
        let between = after.since(&before);
        assert_eq!(
            (
                between.percentile(50),
                between.percentile(98),
                between.percentile(99)
            ),
            (32, 32, 1024)
        );
        assert_eq!((between.sum_us, Latencies::default().percentile(99)), (4700, 0));
        // Counters that began anew.
        assert_eq!(before.since(&after).sum_us, 0);
    }
}
