//! TLS with certificates that openssl made, and clients that use GnuTLS.

use std::fs;
use std::path::Path;

use storage_virtualizer::nbd::{NbdOptions, NbdServer, NbdServerError, TlsFiles, TlsMode};

use crate::raw::Client;
use crate::tools::{fail, nbdsh, nbdsh_fails, succeed};
use crate::{Served, file, pattern};

/// An authority, a server and a client that it has signed, and a stranger, in `folder` with the names that libnbd and qemu
/// expect. `None` without openssl.
fn certificates(folder: &Path) -> Option<()> {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let make = |name: &str, subject: &str, signer: Option<&str>, extensions: &[&str]| {
        let (key, certificate) = (
            path(&format!("{name}-key.pem")),
            path(&format!("{name}-cert.pem")),
        );
        let mut arguments = vec![
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "30",
            "-subj",
            subject,
            "-keyout",
            &key,
            "-out",
            &certificate,
        ];
        for extension in extensions {
            arguments.extend(["-addext", extension]);
        }
        let signing = signer.map(|signer| {
            (
                path(&format!("{signer}-cert.pem")),
                path(&format!("{signer}-key.pem")),
            )
        });
        if let Some((signer, key)) = &signing {
            arguments.extend(["-CA", signer, "-CAkey", key]);
        }
        succeed("openssl", &arguments).map(drop)
    };
    let end = [
        "basicConstraints=critical,CA:FALSE",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ];
    make(
        "ca",
        "/CN=authority",
        None,
        &["keyUsage=critical,keyCertSign,cRLSign"],
    )?;
    make("server", "/CN=localhost", Some("ca"), &end)?;
    make("client", "/CN=client", Some("ca"), &end)
}

fn files(folder: &Path, check_clients: bool) -> TlsFiles {
    TlsFiles {
        certificate: folder.join("server-cert.pem"),
        key: folder.join("server-key.pem"),
        client_authorities: check_clients.then(|| folder.join("ca-cert.pem")),
    }
}

fn serve(folder: &Path, mode: TlsMode, check_clients: bool) -> Served {
    let files = files(folder, check_clients);
    Served::start(
        |options| options.tls = Some((mode, files)),
        |folder| vec![file(&folder.join("image"), "disk", 8 << 20, false)],
    )
}

fn script(served: &Served, certificates: Option<&Path>, then: &str) -> String {
    let how = match certificates {
        Some(folder) => format!(
            "h.set_tls(nbd.TLS_REQUIRE)\nh.set_tls_verify_peer(True)\nh.set_tls_certificates(\"{}\")\nh.set_tls_hostname(\"localhost\") if hasattr(h, 'set_tls_hostname') else None\n",
            folder.display()
        ),
        None => String::new(),
    };
    format!(
        "{how}h.set_export_name(\"disk\")\nh.connect_unix(\"{}\")\n{then}\nh.shutdown()\nprint(\"well\")\n",
        served.socket().display()
    )
}

const EXCHANGE: &str = r#"
import os
data = os.urandom(1 << 20)
for i in range(8):
    h.pwrite(data, i << 20)
h.flush()
buffers = [nbd.Buffer(65536) for i in range(64)]
cookies = [h.aio_pread(b, i * 65536) for i, b in enumerate(buffers)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
for i, b in enumerate(buffers):
    at = (i * 65536) % (1 << 20)
    assert b.to_bytearray() == data[at:at + 65536]
"#;

#[test]
fn libnbd_writes_and_reads_through_tls() {
    let folder = tempfile::tempdir().unwrap();
    if certificates(folder.path()).is_none() {
        return;
    }
    for (mode, check) in [(TlsMode::Allowed, false), (TlsMode::Required, true)] {
        let served = serve(folder.path(), mode, check);
        let then = format!("assert h.get_tls_negotiated()\n{EXCHANGE}");
        if let Some(text) = nbdsh(&script(&served, Some(folder.path()), &then)) {
            assert_eq!(text.trim(), "well");
        }
    }
}

#[test]
fn unencrypted_clients_are_served_where_that_is_allowed_and_refused_where_not() {
    let folder = tempfile::tempdir().unwrap();
    if certificates(folder.path()).is_none() {
        return;
    }
    let served = serve(folder.path(), TlsMode::Allowed, false);
    if let Some(text) = nbdsh(&script(&served, None, EXCHANGE)) {
        assert_eq!(text.trim(), "well");
    }
    let served = serve(folder.path(), TlsMode::Required, false);
    if let Some(words) = fail("nbdinfo", &["--size", &served.uri("disk")]) {
        assert!(words.contains("TLS"), "{words}");
    }
}

#[test]
fn a_client_without_a_certificate_is_refused_where_one_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    if certificates(folder.path()).is_none() {
        return;
    }
    let served = serve(folder.path(), TlsMode::Required, true);
    let strange = folder.path().join("strange");
    fs::create_dir(&strange).unwrap();
    fs::copy(folder.path().join("ca-cert.pem"), strange.join("ca-cert.pem")).unwrap();
    // With no certificate of its own.
    nbdsh_fails(&script(&served, Some(&strange), EXCHANGE));
    // The server lives.
    if let Some(text) = nbdsh(&script(&served, Some(folder.path()), EXCHANGE)) {
        assert_eq!(text.trim(), "well");
    }
}

#[test]
fn qemu_copies_through_tls() {
    let folder = tempfile::tempdir().unwrap();
    if certificates(folder.path()).is_none() {
        return;
    }
    let served = serve(folder.path(), TlsMode::Required, true);
    let bytes = pattern(8 << 20, 7);
    let source = served.path("source");
    fs::write(&source, &bytes).unwrap();
    let object = format!(
        "tls-creds-x509,id=tls,endpoint=client,dir={}",
        folder.path().display()
    );
    let target = format!(
        "driver=nbd,export=disk,server.type=unix,server.path={},tls-creds=tls,tls-hostname=localhost",
        served.socket().display()
    );
    let source = source.to_str().unwrap();
    let arguments = [
        "convert",
        "-n",
        "--object",
        &object,
        "-f",
        "raw",
        "--target-image-opts",
        source,
        &target,
    ];
    if succeed("qemu-img", &arguments).is_some() {
        assert!(fs::read(served.image()).unwrap() == bytes, "the image differs");
    }
}

#[test]
fn what_comes_unencrypted_after_the_start_of_tls_ends_the_connection() {
    let folder = tempfile::tempdir().unwrap();
    if certificates(folder.path()).is_none() {
        return;
    }
    let served = serve(folder.path(), TlsMode::Required, false);
    for injected in [
        &b"IHAVEOPT\0\0\0\x05\0\0\0\0IHAVEOPT\0\0\0\x03\0\0\0\0"[..],
        b"IHAVEOPT\0\0\0\x05\0\0\0\0x",
    ] {
        let mut client = Client::greeted(&served.socket());
        std::io::Write::write_all(&mut client.stream, injected).unwrap();
        assert!(client.is_closed());
    }
    // Rubbish instead of TLS.
    let mut client = Client::greeted(&served.socket());
    assert_eq!(client.option(5, &[]), [1]);
    std::io::Write::write_all(&mut client.stream, &[0x55; 1000]).unwrap();
    assert!(client.is_closed());
    if let Some(text) = nbdsh(&script(&served, Some(folder.path()), EXCHANGE)) {
        assert_eq!(text.trim(), "well");
    }
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let folder = tempfile::tempdir().unwrap();
    if certificates(folder.path()).is_none() {
        return;
    }
    let start = |files: TlsFiles| {
        let worker = block_io::Worker::start("test", block_io::WorkerOptions::default()).unwrap();
        let options = NbdOptions {
            tls: Some((TlsMode::Required, files)),
            ..Default::default()
        };
        let error = NbdServer::start(
            worker.handle(),
            options,
            Vec::<storage_virtualizer::nbd::DeviceExport>::new,
        )
        .unwrap_err();
        assert!(matches!(error, NbdServerError::Tls(_)));
        error.to_string()
    };
    let good = files(folder.path(), false);
    let missing = TlsFiles {
        key: folder.path().join("missing.pem"),
        ..good.clone()
    };
    assert!(start(missing).contains("missing.pem"));
    let swapped = TlsFiles {
        certificate: good.key.clone(),
        ..good.clone()
    };
    assert!(start(swapped).contains("server-key.pem"));
    let other = TlsFiles {
        key: folder.path().join("client-key.pem"),
        ..good
    };
    assert!(start(other).contains("client-key.pem"));
}
