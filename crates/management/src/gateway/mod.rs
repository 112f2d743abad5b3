//! The machines of a host for those who come over the network: TLS 1.3, principals with roles, an audit log.
//!
//! ```text
//!   smsvmm ... --config remote.toml ─► Client ─┐                       ┌─► web1's Unix socket ─► web1's process
//!   curl --cacert ... -H 'authorization: ...' ─┴─ TCP, TLS 1.3 ─► gateway ─► db1's Unix socket  ─► db1's process
//!                                                      │
//!                            access.toml: who is that, and what may it do?
//!                            audit.log:   who wanted what, and what came of it
//! ```
//!
//! The gateway is a process of its own. The processes of machines never speak to the network, and it has neither their memory nor their disks: what it can
//! do is what their sockets let the user do as whom it runs.
//!
//! | path | does |
//! |---|---|
//! | GET /healthz | 200 as long as the gateway answers; for everybody |
//! | GET /v1/vms | the machines that one may know, and whether they answer |
//! | GET /openapi.json | all of this for programs |
//! | /v1/vms/NAME/vm/..., /v1/vms/NAME/storage/..., /v1/vms/NAME/events, /v1/vms/NAME/metrics | what [`crate`] says of /v1/vm, /v1/storage, /v1/events, /v1/metrics of that machine |
//!
//! # Order of a request
//! 1. The connection: TLS in time, at most [`MAX_CONNECTIONS`], of one address [`MAX_OF_ONE`].
//! 2. Who is it: a client certificate or `Authorization: Bearer`; who fails too often waits ([`Attempts`](attempts::Attempts)).
//! 3. May it: a role for each request ([`rights`]), machines by name. Refusals are in the audit log.
//! 4. A request that changes something is in the audit log, durably, before it is passed on; else it is refused. What came of it follows.
//! 5. A stream of events lasts as long as who follows it may see it: that is asked again with each piece of it.
//!
//! A machine that a principal may not know is not there: the answer is the same as for a name that nobody has.

mod attempts;
mod audit;
pub(crate) mod forward;
mod server;
mod stream;
mod subject;

pub use audit::AuditError;
pub use server::{Gateway, GatewayConfig, GatewayError, Machine, Running};
