//! `smsvmm share nbd`: disks for everybody who speaks NBD.
//!
//! One worker has the disks, the sockets and the clients; this thread waits for a signal, and then has the server finish
//! what clients have asked for. Meanwhile exports come and go where there is a management socket (`share_manage`).

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use api::{
    EventLog, Problem, ProblemKind, Share, ShareClient, ShareDisk, ShareKind, ShareStatus, ShareTls,
    SharedDisk, StorageAnswer, StorageRequest,
};
use block_io::{Device, DeviceOptions, ListenAddress, NbdAddress, Worker, WorkerOptions};
use clap::{Args, ValueEnum};
use management::Server;
use serde_json::json;
use storage_manager::{DiskGuard, HostedPool};
use storage_virtualizer::nbd::{
    DeviceExport, Export, ExportState, NbdControl, NbdManageError, NbdOptions, NbdServer, NbdServerError,
    TlsFiles, TlsMode,
};
use vmm::sandbox::Opens;

use crate::exit::{Exit, UsageError};
use crate::logs;
use crate::output::{print, print_json};
use crate::pool::{PoolThreads, served, with_pool};
use crate::share_manage::{
    self, Base, Management, Meant, Opened, counts, has_no, is_stopping, latencies, name_taken, no_client,
    no_disk, not_opened, number, problem, since,
};
use crate::share_sandbox::Confined;
use crate::signals::Signals;
use crate::storage::Which;

#[derive(Debug, Args)]
pub(crate) struct NbdArguments {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    threads: PoolThreads,

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

    #[command(flatten)]
    management: Management,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TlsWanted {
    /// Everything is encrypted.
    Required,
    /// Clients choose.
    Allowed,
}

pub(crate) fn nbd(arguments: &NbdArguments) -> anyhow::Result<Exit> {
    arguments.threads.check(&arguments.paths)?;
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    // Before anything is opened: a second process with this socket ends here.
    let management = arguments.management.bind()?;
    let sockets: Vec<PathBuf> = arguments.socket.iter().cloned().collect();
    let confined = Confined::prepare(&sockets, &arguments.management, Opens::Devices)?;
    if !arguments.paths.is_empty() {
        let serve =
            |pool: &Arc<HostedPool>| serve_pool_disks(arguments, management, pool, (&confined, &signals));
        with_pool(&arguments.which, arguments.threads, "nbd", serve)?;
        return Ok(Exit::Success);
    }
    let images = images(arguments)?;
    let opened: Vec<_> = images
        .iter()
        .map(|(name, source, _)| (name.clone(), opened(source, None)))
        .collect();
    let names: Vec<String> = opened.iter().map(|(name, _)| name.clone()).collect();
    let options = options(arguments);
    let worker = Worker::start("nbd", WorkerOptions::default())?;
    let read_only = arguments.read_only;
    let (here, confine) = (worker.handle().clone(), confined.serving());
    let (started, done) = worker.run(move || async move {
        let export = |(name, _, device)| DeviceExport::new(name, device, read_only);
        let started = NbdServer::start_here(&here, &options, images.into_iter().map(export).collect());
        // Its tasks begin when this one has ended.
        (started, confine())
    });
    let (server, control) = started?;
    done?;
    let buffered = arguments.buffered;
    let share = NbdShare {
        base: Base::new(ShareKind::Nbd, None, shown(server.addresses()), opened),
        control,
        tls: demanded(arguments),
        open: Box::new(move |control, meant| {
            let read_only = read_only || meant.read_only;
            let device = Device::open(&meant.source, &device_options(read_only, buffered));
            let device = device.map_err(|error| not_opened(&meant.source, &error))?;
            let name = meant.name.clone();
            let added = control.add(move || async move { Ok(DeviceExport::new(name, device, read_only)) });
            added.map_err(|error| refused(&meant.name, &error))?;
            Ok(None)
        }),
    };
    let managed = (Arc::new(share), management);
    serve(&names, server, managed, arguments, (&confined, &signals))?;
    Ok(Exit::Success)
}

fn serve<E: Export>(
    names: &[String],
    server: NbdServer,
    (share, management): (Arc<NbdShare<E>>, Option<Server>),
    arguments: &NbdArguments,
    (confined, signals): (&Confined, &Signals),
) -> anyhow::Result<()> {
    let managed = share_manage::answer(management, Arc::clone(&share) as Arc<dyn Share>, confined)?;
    announce(names, server.addresses(), arguments)?;
    let signal = signals.next();
    logs::say(&format!(
        "smsvmm: {signal}: finishing what clients have asked for"
    ));
    drop(managed);
    server.stop();
    share.base.close_all();
    Ok(())
}

/// Serves disks of a pool.
fn serve_pool_disks(
    arguments: &NbdArguments,
    management: Option<Server>,
    pool: &Arc<HostedPool>,
    (confined, signals): (&Confined, &Signals),
) -> anyhow::Result<()> {
    let mut disks = Vec::new();
    for path in &arguments.paths {
        disks.push((name_of(path), pool.disk(path, served(path, arguments.read_only))?));
    }
    let names: Vec<String> = disks.iter().map(|(name, _)| name.clone()).collect();
    let (server, control) = pool.serve_nbd(&disks, options(arguments), confined.serving())?;
    let opened = disks
        .into_iter()
        .zip(&arguments.paths)
        .map(|((name, disk), path)| (name, opened(path, Some(disk.into_guard()))));
    let (here, all_read_only) = (Arc::clone(pool), arguments.read_only);
    let share = NbdShare {
        base: Base::new(
            ShareKind::Nbd,
            Some(Arc::clone(pool)),
            shown(server.addresses()),
            opened,
        ),
        control,
        tls: demanded(arguments),
        open: Box::new(move |control, meant| {
            let how = served(&meant.source, all_read_only || meant.read_only);
            let disk = here.disk(&meant.source, how)?;
            let added = here.export(control, &meant.name, &disk);
            let guard = disk.into_guard();
            if let Err(error) = added {
                guard.close();
                return Err(refused(&meant.name, &error));
            }
            Ok(Some(guard))
        }),
    };
    let managed = (Arc::new(share), management);
    serve(&names, server, managed, arguments, (confined, signals))
}

/// What is demanded of clients.
fn demanded(arguments: &NbdArguments) -> Option<ShareTls> {
    arguments.tls_cert.as_ref().map(|_| ShareTls {
        required: matches!(arguments.tls, TlsWanted::Required),
        client_certificates: arguments.tls_client_ca.is_some(),
    })
}

/// What a disk of a pool is called by clients.
fn name_of(path: &str) -> String {
    path.trim_start_matches('/').to_owned()
}

fn opened(source: &str, guard: Option<DiskGuard>) -> Opened {
    Opened {
        source: source.to_owned(),
        guard,
    }
}

fn shown(addresses: &[ListenAddress]) -> Vec<String> {
    let shown = |address: &ListenAddress| match address {
        ListenAddress::Unix(path) => absolute(path).display().to_string(),
        ListenAddress::Tcp(address) => address.to_string(),
    };
    addresses.iter().map(shown).collect()
}

pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Opens a disk and has a server export it.
type Open<E> = Box<dyn Fn(&NbdControl<E>, &Meant) -> Result<Option<DiskGuard>, Problem> + Send + Sync>;

/// Exports while they are served.
struct NbdShare<E: Export> {
    base: Base,
    control: NbdControl<E>,
    tls: Option<ShareTls>,
    open: Open<E>,
}

impl<E: Export> NbdShare<E> {
    fn disks(&self, exports: Vec<ExportState>) -> Vec<SharedDisk> {
        let shown = |export: ExportState| SharedDisk {
            source: self.base.source(&export.name),
            target: None,
            lun: None,
            socket: None,
            size: export.size,
            read_only: export.read_only,
            clients: number(export.clients),
            counts: Some(counts(&export.counters)),
            latencies: Some(latencies(&export.counters)),
            name: export.name,
        };
        exports.into_iter().map(shown).collect()
    }
}

impl<E: Export> Share for NbdShare<E> {
    fn status(&self) -> Result<ShareStatus, Problem> {
        let (exports, clients) = self.control.state().map_err(|_| is_stopping())?;
        let clients = clients.into_iter().map(|client| ShareClient {
            id: client.number.to_string(),
            addresses: vec![client.peer],
            initiator: None,
            target: None,
            disk: client.export,
            since_ms: since(client.since),
            counts: counts(&client.counters),
        });
        let status = self
            .base
            .status(Vec::new(), self.disks(exports), clients.collect());
        let tls = self.tls;
        Ok(ShareStatus { tls, ..status })
    }

    fn add(&self, disk: ShareDisk) -> Result<SharedDisk, Problem> {
        has_no(
            ShareKind::Nbd,
            &[
                ("target", disk.target.is_some()),
                ("lun", disk.lun.is_some()),
                ("socket", disk.socket.is_some()),
            ],
        )?;
        let meant = self.base.meant(&disk, name_of)?;
        let _claim = self.base.claim(&meant.name)?;
        let find = || -> Result<Option<SharedDisk>, Problem> {
            let mut disks = self.status()?.disks;
            let place = disks.iter().position(|disk| disk.name == meant.name);
            Ok(place.map(|place| disks.swap_remove(place)))
        };
        if find()?.is_some() {
            return Err(name_taken(&meant.name));
        }
        let guard = (self.open)(&self.control, &meant)?;
        self.base.keep(&meant.name, opened(&meant.source, guard));
        logs::say(&format!("smsvmm: {} is served as {}", meant.source, meant.name));
        find()?.ok_or_else(|| no_disk(&meant.name))
    }

    fn remove(&self, name: &str) -> Result<(), Problem> {
        let _claim = self.base.claim(name)?;
        match self.control.remove(name) {
            Ok(()) => {
                self.base.close(name);
                logs::say(&format!("smsvmm: {name} is served no more"));
                Ok(())
            }
            Err(NbdManageError::NoExport(_)) => Err(no_disk(name)),
            Err(_) => Err(is_stopping()),
        }
    }

    fn disconnect(&self, client: &str) -> Result<(), Problem> {
        let number = client.parse().map_err(|_| no_client(client))?;
        match self.control.disconnect(number) {
            Ok(()) => Ok(()),
            Err(NbdManageError::NoClient(_)) => Err(no_client(client)),
            Err(_) => Err(is_stopping()),
        }
    }

    fn stop(&self) -> Result<(), Problem> {
        share_manage::stop()
    }

    fn events(&self) -> &EventLog {
        &self.base.events
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.base.storage(request)
    }
}

/// Why a server does not export a disk.
fn refused(name: &str, error: &NbdServerError) -> Problem {
    match error {
        NbdServerError::SameName(_) => name_taken(name),
        NbdServerError::Stopping | NbdServerError::NoWorker => is_stopping(),
        NbdServerError::LongName(_) | NbdServerError::BlockSize { .. } => {
            problem(ProblemKind::Invalid, name, error)
        }
        _ => problem(ProblemKind::Host, name, error),
    }
}

/// How images are opened.
pub(crate) fn device_options(read_only: bool, buffered: bool) -> DeviceOptions {
    let mut options = DeviceOptions::default();
    options.host.read_only = read_only;
    options.host.memory_at_once = true;
    if buffered {
        options.host.cache = block_io::Cache::Buffered;
    }
    options
}

/// Names, places and devices of the images.
fn images(arguments: &NbdArguments) -> anyhow::Result<Vec<(String, String, Device)>> {
    let options = device_options(arguments.read_only, arguments.buffered);
    let open = |text: &String| {
        let (name, image) = named(text)?;
        let device = Device::open(image, &options)?;
        Ok((name, image.to_owned(), device))
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
