//! Certificates: from PEM files to what rustls needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion, version};

/// Files in PEM format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, followed by those that lead to its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authorities of clients: certificates of clients are of one of them.
    pub client_authorities: Option<PathBuf>,
}

/// Versions of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Versions {
    /// 1.3 only (RFC 8446).
    Tls13,
    /// 1.2 as well, for clients that know no better, as the NBD protocol wants.
    Tls12And13,
}

impl Versions {
    fn list(self) -> &'static [&'static SupportedProtocolVersion] {
        static BOTH: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
        match self {
            Self::Tls13 => &BOTH[..1],
            Self::Tls12And13 => &BOTH,
        }
    }
}

/// What certificates of clients are for, where there are authorities for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Who has none is not let in.
    Required,
    /// Who has none may show in another way who it is.
    Accepted,
}

/// What a client knows, in files in PEM format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTls {
    /// The authorities of servers.
    pub authorities: PathBuf,
    /// The client's own certificate with those that lead to its authority, and its private key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing, or is no PEM file of that kind.
    #[error("cannot read {what} from {}", path.display())]
    File {
        /// What should be there.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: PemError,
    },
    /// A file has nothing of the kind.
    #[error("there is no {what} in {}", path.display())]
    Empty {
        /// What should be there.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key do not belong together, or are of a kind that is not supported.
    #[error("certificate {} and key {} cannot be used", certificate.display(), key.display())]
    Certificate {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// A certificate of an authority cannot be used.
    #[error("the authorities in {} cannot be used", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// The authorities cannot be used to check clients.
    #[error("clients cannot be checked with the authorities in {}", path.display())]
    Verifier {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: VerifierBuilderError,
    },
}

impl TlsFiles {
    /// Reads the files, and makes of them what a server needs.
    ///
    /// # Errors
    /// A file is missing or wrong, or they do not belong together.
    pub fn load(
        &self,
        versions: Versions,
        clients: ClientCertificates,
    ) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let certificates = certificates("a certificate", &self.certificate)?;
        let key = private_key(&self.key)?;
        let unusable = |source| TlsError::Certificate {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            source,
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions.list())
            .map_err(unusable)?;
        let builder = match &self.client_authorities {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = authorities(path)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match clients {
                    ClientCertificates::Required => verifier,
                    ClientCertificates::Accepted => verifier.allow_unauthenticated(),
                };
                let verifier = verifier.build().map_err(|source| TlsError::Verifier {
                    path: path.clone(),
                    source,
                })?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        Ok(Arc::new(
            builder.with_single_cert(certificates, key).map_err(unusable)?,
        ))
    }
}

impl ClientTls {
    /// Reads the files, and makes of them what a client needs. TLS 1.3 only.
    ///
    /// # Errors
    /// A file is missing or wrong, or they do not belong together.
    pub fn load(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let roots = authorities(&self.authorities)?;
        let unusable = |source| {
            let (certificate, key) = self.certificate.clone().unwrap_or_default();
            TlsError::Certificate {
                certificate,
                key,
                source,
            }
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(Versions::Tls13.list())
            .map_err(unusable)?
            .with_root_certificates(roots);
        Ok(Arc::new(match &self.certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let own = certificates("a certificate", certificate)?;
                builder
                    .with_client_auth_cert(own, private_key(key)?)
                    .map_err(unusable)?
            }
        }))
    }
}

/// The first certificate of a file in PEM format, in DER.
///
/// # Errors
/// There is none.
pub fn first_certificate(path: &Path) -> Result<CertificateDer<'static>, TlsError> {
    let all = certificates("a certificate", path)?;
    all.into_iter().next().ok_or_else(|| TlsError::Empty {
        what: "a certificate",
        path: path.to_owned(),
    })
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| TlsError::File {
        what: "a private key",
        path: path.to_owned(),
        source,
    })
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("certificates of authorities", path)? {
        roots.add(certificate).map_err(|source| TlsError::Authority {
            path: path.to_owned(),
            source,
        })?;
    }
    Ok(roots)
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let all: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    if all.is_empty() {
        return Err(TlsError::Empty {
            what,
            path: path.to_owned(),
        });
    }
    Ok(all)
}
