//! What can be asked, for programs: an OpenAPI 3.1 document for each kind of server, at `GET /openapi.json`.
//!
//! The documents are made from one table (`table.rs`) and the types of `api`, and kept in the tree, where people can read them and
//! changes are seen: `docs/src/openapi`. They are in the program as they are there; what makes them is in its tests only. A test
//! fails when a document is not what the code makes; `SMSVMM_BLESS=1 cargo test -p management openapi` writes them anew.
//!
//! Another kind of server gets a list of operations in the table, a `Kind` in `document.rs`, a file, and a constant here; what all
//! servers answer is in `routes::common`.

#[cfg(test)]
mod document;
#[cfg(test)]
mod table;

use hyper::StatusCode;

use crate::routes::{self, Answer};

/// The document of a machine's socket.
pub(crate) const MACHINE: &str = include_str!("../../../../docs/src/openapi/machine.json");
/// That of the gateway.
pub(crate) const GATEWAY: &str = include_str!("../../../../docs/src/openapi/gateway.json");

/// `GET /openapi.json`.
pub(crate) fn answer(document: &'static str) -> Answer {
    routes::respond(StatusCode::OK, "application/json", document.into())
}
/// That of `smsvmm share`.
pub(crate) const SHARE: &str = include_str!("../../../../docs/src/openapi/share.json");
/// That of a host's manager.
pub(crate) const HOST: &str = include_str!("../../../../docs/src/openapi/host.json");
