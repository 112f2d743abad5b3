//! The mover: reads what agents name, and writes archives.
//!
//! ```text
//!   server ── a thread per connection ──► session ──► work ──► image ──► devices, or the storage manager
//!                                                      │ ▲
//!                                             archive ◄┘ └─ parent: what has not changed
//! ```

mod config;
mod devices;
mod image;
mod parent;
mod scribe;
mod server;
mod session;
mod work;

pub use config::{Limits, MoverConfig, Principal, TlsConfig};
pub use image::Pool;
pub use server::{Ended, Mover, MoverError};
pub use session::Reach;
