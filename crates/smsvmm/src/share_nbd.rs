//! `smsvmm share nbd`: disks for everybody who speaks NBD.
//!
//! One worker has the disks, the sockets and the clients; this thread waits for a signal, and then has the server finish
//! what clients have asked for.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use block_io::{Device, DeviceOptions, ListenAddress, NbdAddress, Worker, WorkerOptions};
use clap::{Args, ValueEnum};
use serde_json::json;
use storage_manager::HostedPool;
use storage_virtualizer::nbd::{DeviceExport, NbdOptions, NbdServer, TlsFiles, TlsMode};

use crate::exit::{Exit, UsageError};
use crate::logs;
use crate::output::{print, print_json};
use crate::pool::{served, with_pool};
use crate::signals::Signals;
use crate::storage::Which;

#[derive(Debug, Args)]
pub(crate) struct NbdArguments {
    #[command(flatten)]
    which: Which,

    /// Disks of the pool that --config or --devices names, or snapshots: /vm/root.dsk, /vm/root.dsk@monday. Each is exported under its
    /// path without the first /.
    #[arg(conflicts_with = "images", required_unless_present = "images")]
    paths: Vec<String>,

    /// A file or block device of this host, or nbd://..., under its file name or the one before `=`. May be given several times.
    #[arg(long = "image", value_name = "[NAME=]FILE")]
    images: Vec<String>,

    /// Listen on this Unix socket, for this user only.
    #[arg(long, value_name = "PATH", required_unless_present = "listen")]
    socket: Option<PathBuf>,

    /// Listen on this address and port (10809 is NBD's). Anyone who can connect can read and write: take a loopback address, or TLS
    /// with --tls-client-ca.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    /// Clients cannot write.
    #[arg(long)]
    read_only: bool,

    /// Use the host's page cache.
    #[arg(long, conflicts_with = "paths")]
    buffered: bool,

    /// Offer TLS with this certificate (PEM; with those that lead to its authority).
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Clients need a certificate of one of these authorities (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,

    /// Whether clients may do without TLS.
    #[arg(long, value_enum, default_value = "required", requires = "tls_cert")]
    tls: TlsWanted,

    /// Connections at once.
    #[arg(long, value_name = "NUMBER", default_value_t = 32)]
    connections: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TlsWanted {
    /// Everything is encrypted.
    Required,
    /// Clients choose.
    Allowed,
}

pub(crate) fn nbd(arguments: &NbdArguments) -> anyhow::Result<Exit> {
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    if !arguments.paths.is_empty() {
        let serve = |pool: &Arc<HostedPool>| serve_pool_disks(arguments, pool, &signals);
        with_pool(&arguments.which, "nbd", serve)?;
        return Ok(Exit::Success);
    }
    let exports = images(arguments)?;
    let names: Vec<String> = exports.iter().map(|(name, _)| name.clone()).collect();
    let options = options(arguments);
    let worker = Worker::start("nbd", WorkerOptions::default())?;
    let read_only = arguments.read_only;
    let server = NbdServer::start(worker.handle(), options, move || {
        exports
            .into_iter()
            .map(|(name, device)| DeviceExport::new(name, device, read_only))
            .collect()
    })?;
    serve(&names, server, arguments, &signals)?;
    Ok(Exit::Success)
}

fn serve(
    names: &[String],
    server: NbdServer,
    arguments: &NbdArguments,
    signals: &Signals,
) -> anyhow::Result<()> {
    announce(names, server.addresses(), arguments)?;
    let signal = signals.next();
    logs::say(&format!(
        "smsvmm: {signal}: finishing what clients have asked for"
    ));
    server.stop();
    Ok(())
}

/// Serves disks of a pool.
fn serve_pool_disks(arguments: &NbdArguments, pool: &HostedPool, signals: &Signals) -> anyhow::Result<()> {
    let mut disks = Vec::new();
    for path in &arguments.paths {
        let name = path.trim_start_matches('/').to_owned();
        disks.push((name, pool.disk(path, served(path, arguments.read_only))?));
    }
    let names: Vec<String> = disks.iter().map(|(name, _)| name.clone()).collect();
    let server = pool.serve_nbd(&disks, options(arguments))?;
    serve(&names, server, arguments, signals)?;
    for (_, disk) in disks {
        drop(disk.into_guard());
    }
    Ok(())
}

/// Names and devices of the images.
fn images(arguments: &NbdArguments) -> anyhow::Result<Vec<(String, Device)>> {
    let mut options = DeviceOptions::default();
    options.host.read_only = arguments.read_only;
    options.host.memory_at_once = true;
    if arguments.buffered {
        options.host.cache = block_io::Cache::Buffered;
    }
    let open = |text: &String| {
        let (name, image) = named(text)?;
        let device = Device::open(image, &options)?;
        Ok((name, device))
    };
    arguments.images.iter().map(open).collect()
}

/// The name under which an image is exported, and where it is.
pub(crate) fn named(text: &str) -> Result<(String, &str), UsageError> {
    if let Some((name, image)) = text.split_once('=')
        && !name.contains('/')
        && !image.is_empty()
    {
        return Ok((name.to_owned(), image));
    }
    match Path::new(text).file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok((name.to_owned(), text)),
        None => Err(UsageError::new(format!(
            "--image {text}: the file has no name to export it under; write NAME={text}"
        ))),
    }
}

fn options(arguments: &NbdArguments) -> NbdOptions {
    let unix = arguments.socket.clone().map(ListenAddress::Unix);
    let tcp = arguments.listen.map(ListenAddress::Tcp);
    let tls = match (&arguments.tls_cert, &arguments.tls_key) {
        (Some(certificate), Some(key)) => {
            let mode = match arguments.tls {
                TlsWanted::Required => TlsMode::Required,
                TlsWanted::Allowed => TlsMode::Allowed,
            };
            let files = TlsFiles {
                certificate: certificate.clone(),
                key: key.clone(),
                client_authorities: arguments.tls_client_ca.clone(),
            };
            Some((mode, files))
        }
        _ => None,
    };
    if let Some(address) = arguments.listen
        && !address.ip().is_loopback()
        && (tls.is_none() || arguments.tls_client_ca.is_none())
    {
        tracing::warn!(%address, "everybody who reaches this address can use the disks: see --tls-cert and --tls-client-ca");
    }
    NbdOptions {
        listen: unix.into_iter().chain(tcp).collect(),
        tls,
        connections: arguments.connections.max(1),
        ..NbdOptions::default()
    }
}

/// Says where the disks are.
fn announce(names: &[String], addresses: &[ListenAddress], arguments: &NbdArguments) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for name in names {
        for address in addresses {
            let server = match address {
                ListenAddress::Unix(path) => block_io::NbdServer::Unix(std::path::absolute(path)?),
                ListenAddress::Tcp(address) => block_io::NbdServer::Tcp {
                    host: reachable(address.ip()).to_string(),
                    port: address.port(),
                },
            };
            let mut uri = NbdAddress {
                server,
                export: name.clone(),
            }
            .to_string();
            if arguments.tls_cert.is_some() {
                uri = uri.replacen("nbd", "nbds", 1);
            }
            all.push((name, uri));
        }
    }
    if arguments.which.json {
        let list: Vec<_> = all
            .iter()
            .map(|(name, uri)| json!({ "name": name, "uri": uri }))
            .collect();
        return print_json(&json!({ "exports": list }));
    }
    let lines: String = all.iter().map(|(name, uri)| format!("{name}: {uri}\n")).collect();
    Ok(print(&lines)?)
}

/// An address that a client on this host can use.
pub(crate) fn reachable(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(any) if any.is_unspecified() => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V6(any) if any.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_exported_under_its_file_name_or_the_one_given() {
        for (text, name, image) in [
            ("disk.img", "disk.img", "disk.img"),
            ("/vm/disk.img", "disk.img", "/vm/disk.img"),
            ("root=/vm/disk.img", "root", "/vm/disk.img"),
            ("=disk.img", "", "disk.img"),
            ("/vm/a=b", "a=b", "/vm/a=b"),
        ] {
            assert_eq!(named(text).unwrap(), (name.to_owned(), image));
        }
        assert!(named("/").is_err());
    }
}
