//! What happened just now: the last requests of a disk, `GET /v1/vm/disks/{id}/trace`, and all that a machine can tell of itself at one
//! moment, `GET /v1/vm/debug`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::storage::PoolStatus;
use crate::{DeviceId, Event, NetMetrics, QueueMetrics, VmStatus};

/// What a request of a guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TraceOperation {
    /// Read bytes.
    Read,
    /// Write bytes.
    Write,
    /// Make everything durable that was written before.
    Flush,
    /// Forget a range's content.
    Discard,
    /// Make a range zeroes.
    WriteZeroes,
    /// Something that does not go to the disk, such as a question for its identifier.
    Other,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TraceEnd {
    /// With success.
    Ok,
    /// With an error of the disk; or it waits to be tried again, if that is the disk's policy.
    Failed,
    /// The disk cannot do such a thing.
    Unsupported,
}

/// A request of a guest that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct TraceRecord {
    /// When it ended, in nanoseconds since 1970; the clock is not set while the process runs.
    pub time_ns: u64,
    /// The queue by which it came, from 0.
    pub queue: u16,
    /// What it did.
    pub operation: TraceOperation,
    /// First byte on the disk; of the first range of several.
    pub offset: u64,
    /// In bytes; of all ranges together.
    pub length: u64,
    /// From being taken from the guest to the answer, in nanoseconds.
    pub latency_ns: u64,
    /// How it ended.
    pub end: TraceEnd,
}

/// The answer of `GET /v1/vm/disks/{id}/trace`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct TracePage {
    /// In the order in which they ended.
    pub records: Vec<TraceRecord>,
    /// What to ask for next, as `after`.
    pub next: String,
    /// How many were overwritten before they could be read.
    pub missed: u64,
}

/// The last requests of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskTrace {
    /// The disk.
    pub id: DeviceId,
    /// In the order in which they ended.
    pub records: Vec<TraceRecord>,
    /// Why there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The answer of `GET /v1/vm/debug`: what a machine can tell of itself at one moment, for whoever has to find out what went wrong. It has
/// names, sizes and places, and nothing of what is on the disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DebugDump {
    /// The version of smsvmm.
    pub version: String,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// How the machine is.
    pub vm: VmStatus,
    /// The last events.
    pub events: Vec<Event>,
    /// The last requests of its disks.
    pub disks: Vec<DiskTrace>,
    /// What the request queues of its disks have done.
    pub queues: Vec<QueueMetrics>,
    /// What its network cards have done.
    pub nets: Vec<NetMetrics>,
    /// The pools that its process has open.
    pub pools: Vec<PoolStatus>,
}
