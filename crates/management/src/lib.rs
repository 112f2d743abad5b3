//! Management of a running machine over HTTP/JSON on a Unix socket: the server beside the machine, the client in the command
//! line.
//!
//! ```text
//!   smsvmm vm ... ─► Client ──HTTP/1.1──► Unix socket, 0600 ──► thread "management" ──► api::Vm (the machine's control)
//!   curl ────────────────────────────────┘                        one tokio runtime       on a helper thread, as it may wait
//! ```
//!
//! | method, path | does | answer |
//! |---|---|---|
//! | GET /v1/vm | status | 200 [`VmStatus`](api::VmStatus) |
//! | PUT /v1/vm/power-button, stop, reset, pause, resume | the same as the methods of [`api::Vm`] | 204 |
//! | GET /v1/vm/disks, GET /v1/vm/disks/{id} | disks | 200 [`DiskStatus`](api::DiskStatus) |
//! | POST /v1/vm/disks | attaches the [`DiskConfig`](api::DiskConfig) of the body | 201 `DiskStatus` |
//! | DELETE /v1/vm/disks/{id} | asks the guest to let it go | 202 [`Removal`](api::Removal), later an event |
//! | the same for /v1/vm/nets | network cards | |
//! | POST /v1/storage | does the [`StorageRequest`](api::StorageRequest) of the body | 200 [`StorageAnswer`](api::StorageAnswer) |
//! | POST /v1/storage/transfer, to be upgraded | the [`TransferRequest`](api::virtual_disk::TransferRequest) of the body | 101, then data in both directions |
//! | GET /v1/events?after=N&wait=SECONDS | events with numbers above N, waits for the first | 200 [`EventPage`](api::EventPage) |
//! | the same with `Accept: text/event-stream` | events as they happen | 200 server-sent events |
//! | GET /v1/share, /v1/share/disks, /v1/share/clients; POST, DELETE | of `smsvmm share`: what is served, to whom; see `share_routes` | 200 [`ShareStatus`](api::ShareStatus) |
//! | GET /metrics, /v1/metrics | numbers ([`Metrics`](api::Metrics)) | 200 in Prometheus' text format |
//! | GET /healthz | nothing | 200 [`Liveness`](api::Liveness) |
//! | GET /readyz | whether the machine runs | 200 or 503 [`Readiness`](api::Readiness) |
//! | GET /openapi.json | this table for programs | 200 an OpenAPI 3.1 document |
//!
//! Everything else is a [`Problem`](api::Problem) as `application/problem+json`. One request per connection; sizes, times and
//! the number of connections are limited. Whoever is not the owner of the process or root is refused, whatever the mode of
//! the socket has become.
//!
//! The thread exists only where the configuration has `[management]`.

pub mod blocking;
mod client;
mod console;
mod events;
mod gateway;
mod host_routes;
mod journal;
mod lasting;
mod life;
mod locals;
mod metrics;
mod openapi;
mod page;
mod repeated;
mod rights;
mod room;
mod routes;
mod server;
mod share_routes;
mod socket;
mod sse;
mod target;
mod transfer;

pub use client::{Client, ClientError, Removed};
pub use gateway::{AuditError, Gateway, GatewayConfig, GatewayError, Machine, Running};
pub use journal::{EventJournal, GAP, JournalError, Keeper, MIN_SEGMENT, Recovered};
pub use locals::{Local, Locals};
pub use server::{Server, ServerHandle};
pub use socket::SocketError;
pub use target::{Remote, Scope, Target};
