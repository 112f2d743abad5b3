//! `smsvmm certificate`: a small authority for a lab or a few hosts. Who has one already uses that.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

use crate::cli::CertificateCommand;
use crate::exit::{Exit, UsageError};
use crate::logs;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long an authority is valid.
const AUTHORITY_DAYS: u32 = 3650;
const AUTHORITY: &str = "ca";

pub(crate) fn execute(command: CertificateCommand) -> anyhow::Result<Exit> {
    match command {
        CertificateCommand::Init { folder, host, days } => {
            std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            // Names are checked before anything is written.
            let server = params("server", &host, ExtendedKeyUsagePurpose::ServerAuth, days)?;
            let key = KeyPair::generate().context("cannot make a key")?;
            let certificate = authority()?.self_signed(&key);
            let certificate = certificate.context("cannot make the authority")?;
            write(&folder, AUTHORITY, &certificate.pem(), &key)?;
            sign(&folder, "server", &server)?;
        }
        CertificateCommand::Client { folder, name, days } => {
            if name == AUTHORITY || name.contains('/') || name.is_empty() {
                return Err(UsageError::new(format!("a client cannot be called {name:?}")).into());
            }
            let params = params(&name, &[], ExtendedKeyUsagePurpose::ClientAuth, days)?;
            sign(&folder, &name, &params)?;
        }
    }
    Ok(Exit::Success)
}

/// What all authorities of this command are: they differ by their keys.
fn authority() -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = name("smsvmm authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, AUTHORITY_DAYS);
    Ok(params)
}

fn name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

fn valid(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now();
    // Clocks differ a little.
    params.not_before = (now - DAY).into();
    params.not_after = (now + days * DAY).into();
}

fn params(
    common: &str,
    hosts: &[String],
    purpose: ExtendedKeyUsagePurpose,
    days: u32,
) -> anyhow::Result<CertificateParams> {
    let wrong = |error| UsageError::new(format!("{} are no names of hosts: {error}", hosts.join(", ")));
    let mut params = CertificateParams::new(hosts.to_vec()).map_err(wrong)?;
    params.distinguished_name = name(common);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    params.use_authority_key_identifier_extension = true;
    valid(&mut params, days);
    Ok(params)
}

/// Signs with the authority in `folder`, and writes certificate and key there.
fn sign(folder: &Path, file: &str, params: &CertificateParams) -> anyhow::Result<()> {
    let path = folder.join("ca.key");
    let shown = path.display();
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {shown}; `smsvmm certificate init` makes an authority"))?;
    let authority_key = KeyPair::from_pem(&text).with_context(|| format!("{shown} is no private key"))?;
    let issuer = Issuer::new(authority()?, authority_key);
    let key = KeyPair::generate().context("cannot make a key")?;
    let certificate = params
        .signed_by(&key, &issuer)
        .context("cannot sign the certificate")?;
    write(folder, file, &certificate.pem(), &key)
}

/// Writes both; neither may be there already.
fn write(folder: &Path, file: &str, certificate: &str, key: &KeyPair) -> anyhow::Result<()> {
    for (ending, text, mode) in [
        ("key", key.serialize_pem(), 0o600),
        ("pem", certificate.to_owned(), 0o644),
    ] {
        let path: PathBuf = folder.join(format!("{file}.{ending}"));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(mode);
        let written = options.open(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.with_context(|| format!("cannot write {}", path.display()))?;
        logs::say(&format!("smsvmm: {}", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use access::{ClientCertificates, ClientTls, TlsFiles, Versions};

    use super::*;

    #[test]
    fn what_is_made_is_taken_by_both_sides_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let init = || CertificateCommand::Init {
            folder: folder.path().to_owned(),
            host: vec!["localhost".into(), "127.0.0.1".into()],
            days: 365,
        };
        let client = |name: &str| CertificateCommand::Client {
            folder: folder.path().to_owned(),
            name: name.into(),
            days: 90,
        };
        assert!(
            execute(client("anna"))
                .unwrap_err()
                .to_string()
                .contains("certificate init")
        );
        execute(init()).unwrap();
        execute(client("anna")).unwrap();
        let server = TlsFiles {
            certificate: path("server.pem"),
            key: path("server.key"),
            client_authorities: Some(path("ca.pem")),
        };
        server
            .load(Versions::Tls13, ClientCertificates::Accepted)
            .unwrap();
        let tls = ClientTls {
            authorities: path("ca.pem"),
            certificate: Some((path("anna.pem"), path("anna.key"))),
        };
        tls.load().unwrap();
        let before = std::fs::read(path("ca.key")).unwrap();
        assert!(execute(init()).is_err());
        assert!(execute(client("anna")).is_err());
        assert!(execute(client("ca")).is_err());
        assert!(execute(client("../x")).is_err());
        assert_eq!(std::fs::read(path("ca.key")).unwrap(), before);
        let mode = |name: &str| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path(name)).unwrap());
        assert_eq!(
            (mode("ca.key") & 0o777, mode("server.key") & 0o777),
            (0o600, 0o600)
        );
    }
}
