//! The one vocabulary of management: what an administrator can ask of smsvmm, what it answers, what it reports.
//!
//! The same serde types are used by vm.toml (`vmm::config`), by the management socket (`management`), by the command line
//! and by the machine itself ([`Vm`] in `vmm`). Whoever can describe a disk in vm.toml can therefore attach the same disk
//! to a running guest with the same words.
//!
//! Compatibility: a field may be added with a default; a field, variant or meaning never changes within `/v1`.

use serde::Deserialize as _;

mod calendar;
mod condition;
mod device;
mod disk;
mod disk_controls;
mod event;
mod expanded;
pub mod file;
mod host;
mod metrics;
mod net;
mod problem;
mod scsi;
mod share;
pub mod storage;
mod storage_request;
mod trace;
mod units;
pub mod virtual_disk;
mod vm;

pub use calendar::Utc;
pub use condition::Condition;
pub use device::{DeviceId, DeviceState, Removal, VmName};
pub use disk::{DiskBus, DiskConfig, DiskSerial, DiskSource, DiskStatus, QueueSize};
pub use disk_controls::{AtPowerOff, DiskChange, DiskLimits, OnError};
pub use event::{Event, EventKind, EventLog, EventPage};
pub use expanded::{ExpandedPolicy, Right};
pub use host::{
    ATTACHMENT_PROTOCOL, AdapterConfig, AdapterRequest, AttachRequest, Attachment, CONSOLE_PROTOCOL,
    ConsoleRequest, Host, HostStatus, MachineDefinition, MachineState, MachineStatus, PoolEntry,
    RestartPolicy, UnitNews, UnitOrder,
};
pub use metrics::{
    AttachmentMetrics, LATENCY_CLASSES, Latencies, Liveness, Metrics, NetMetrics, QueueMetrics, Readiness,
    RequestCounts,
};
pub use net::{MacAddress, NetBackend, NetConfig, NetStatus, PortForward, Protocol, TapName};
pub use problem::{Problem, ProblemKind};
pub use scsi::{MAX_LUNS, MAX_TARGETS, ScsiAccess, ScsiPath, ScsiPlace};
pub use share::{
    Share, ShareAccess, ShareClient, ShareDisk, ShareKind, ShareStatus, ShareTarget, ShareTls, SharedDisk,
};
pub(crate) use storage_request::is_full;
pub use storage_request::{MAX_LOAD_WINDOW_MS, MAX_PAGE, StorageAnswer, StorageRequest};
pub use trace::{DebugDump, DiskTrace, TraceEnd, TraceOperation, TracePage, TraceRecord};
pub use units::{ByteSize, Seconds};
pub use vm::{ExitReason, MachineEntry, Transfer, Vm, VmState, VmStatus};

/// A text that is not a valid value of the type that was asked for; the message says what would be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidValue(String);

impl InvalidValue {
    /// An error with `message`, which names the value and what would be accepted.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// For fields that are structures: serde would take an array of their fields for one as well.
pub(crate) fn object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::Deserialize<'de>,
{
    Object::deserialize(deserializer).map(|object| object.0)
}

/// The same for lists of structures.
pub(crate) fn objects<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::Deserialize<'de>,
{
    let all = Vec::<Object<T>>::deserialize(deserializer)?;
    Ok(all.into_iter().map(|object| object.0).collect())
}

/// A `T` that is written as a map.
struct Object<T>(T);

impl<'de, T: serde::Deserialize<'de>> serde::Deserialize<'de> for Object<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map<T>(std::marker::PhantomData<T>);
        impl<'de, T: serde::Deserialize<'de>> serde::de::Visitor<'de> for Map<T> {
            type Value = Object<T>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Map(std::marker::PhantomData))
    }
}

/// Serde by `FromStr` and `Display`: such a type is a string in TOML and JSON; the text is what a wrong type is told to be. With a
/// pattern (ECMA-262), which may let through more than `FromStr` does, it has a JSON Schema as well.
#[macro_export]
#[doc(hidden)]
macro_rules! string_type {
    ($type:ident, $expecting:literal, $pattern:literal) => {
        $crate::string_type!($type, $expecting);

        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({"type": "string", "description": $expecting, "pattern": $pattern})
            }
        }
    };
    ($type:ty, $expecting:literal) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl serde::de::Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        formatter.write_str($expecting)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}
