//! Who comes over the network, and what they may do.
//!
//! | | |
//! |---|---|
//! | [`TlsFiles`] | a server's certificate and key, and the authorities of its clients, from PEM files |
//! | [`ClientTls`] | the same for a client |
//! | [`Token`], [`TokenHash`] | a secret that shows who one is, and what is kept of it |
//! | [`Principals`] | a file that says who is known by what, and has which [`Role`] |
//!
//! Secrets are kept as hashes, compared in constant time, and have no `Debug` that shows them.

mod fingerprint;
mod principals;
mod tls;
mod token;

pub use fingerprint::Fingerprint;
pub use principals::{Credentials, Principal, Principals, PrincipalsError, Role, Unknown};
pub use tls::{ClientCertificates, ClientTls, TlsError, TlsFiles, Versions, first_certificate};
pub use token::{Token, TokenHash};
