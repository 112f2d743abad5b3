//! `smsvmm share status | add | remove | disconnect | stop`: what an administrator does with disks that are being served, through the
//! management socket of the process that serves them (`share_manage`).

use std::path::PathBuf;

use anyhow::Context;
use api::{RequestCounts, ShareClient, ShareDisk, ShareStatus, SharedDisk, Utc};
use clap::Args;
use management::Client;

use crate::exit::{Exit, UsageError};
use crate::output::{print, print_json};
use crate::share_nbd::named;
use crate::storage::{Table, size};

/// Which process.
#[derive(Debug, Args)]
pub(crate) struct Process {
    /// The socket that `--management` of the process names.
    #[arg(long, value_name = "SOCKET")]
    management: PathBuf,
}

impl Process {
    fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::new(&self.management)?)
    }
}

#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    #[command(flatten)]
    process: Process,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AddArguments {
    #[command(flatten)]
    process: Process,
    /// A disk of the pool, or a snapshot: /vm/root.dsk, /vm/root.dsk@monday.
    #[arg(conflicts_with = "image", required_unless_present = "image")]
    path: Option<String>,
    /// A file or block device of this host, or nbd://..., under its file name or the one before `=`.
    #[arg(long, value_name = "[NAME=]FILE")]
    image: Option<String>,
    /// Clients cannot write.
    #[arg(long)]
    read_only: bool,
    /// Of iSCSI, the target that gets it, if there are several.
    #[arg(long, value_name = "IQN")]
    target: Option<String>,
    /// Of iSCSI and vhost-user-scsi, its number [default: the lowest that is free].
    #[arg(long, value_name = "NUMBER")]
    lun: Option<u16>,
    /// Of vhost-user, the socket at which it is served.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveArguments {
    #[command(flatten)]
    process: Process,
    /// What `smsvmm share status` calls the disk; or its path, if it is served under one name.
    disk: String,
}

#[derive(Debug, Args)]
pub(crate) struct DisconnectArguments {
    #[command(flatten)]
    process: Process,
    /// What `smsvmm share status` calls the client.
    client: String,
}

#[derive(Debug, Args)]
pub(crate) struct StopArguments {
    #[command(flatten)]
    process: Process,
}

pub(crate) fn status(arguments: &StatusArguments) -> anyhow::Result<Exit> {
    let status = arguments.process.client()?.share()?;
    match arguments.json {
        true => print_json(&status)?,
        false => print(&shown(&status))?,
    }
    Ok(Exit::Success)
}

pub(crate) fn add(arguments: &AddArguments) -> anyhow::Result<Exit> {
    let disk = wanted(arguments)?;
    let added = arguments.process.client()?.share_disk(&disk)?;
    match arguments.json {
        true => print_json(&added)?,
        false => print(&format!("{} is served{}\n", added.name, place(&added)))?,
    }
    Ok(Exit::Success)
}

pub(crate) fn remove(arguments: &RemoveArguments) -> anyhow::Result<Exit> {
    let client = arguments.process.client()?;
    let disks = client.share()?.disks;
    let name = name_of(&disks, &arguments.disk);
    client.unshare_disk(name)?;
    print(&format!("{name} is served no more\n"))?;
    Ok(Exit::Success)
}

/// The name of the disk that is meant, by its name or by what it is, if that is one disk.
fn name_of<'a>(disks: &'a [SharedDisk], meant: &'a str) -> &'a str {
    let mut sources = disks.iter().filter(|disk| disk.source == meant);
    match (sources.next(), sources.next()) {
        (Some(disk), None) if disks.iter().all(|disk| disk.name != meant) => &disk.name,
        _ => meant,
    }
}

pub(crate) fn disconnect(arguments: &DisconnectArguments) -> anyhow::Result<Exit> {
    let client = arguments.process.client()?;
    client.disconnect_from_share(&arguments.client)?;
    print(&format!("{} is disconnected\n", arguments.client))?;
    Ok(Exit::Success)
}

pub(crate) fn stop(arguments: &StopArguments) -> anyhow::Result<Exit> {
    arguments.process.client()?.stop_share()?;
    print("it finishes what clients have asked for, and ends\n")?;
    Ok(Exit::Success)
}

/// The disk that the arguments describe, with absolute paths.
fn wanted(arguments: &AddArguments) -> anyhow::Result<ShareDisk> {
    let absolute = |path: &PathBuf| std::path::absolute(path).context("cannot find the current folder");
    let (name, image) = match &arguments.image {
        None => (None, None),
        Some(text) => {
            let (name, image) = named(text)?;
            let name = (image != text).then_some(name);
            let is_file = !image.contains("://") && !image.starts_with("multipath:");
            let image = match is_file {
                false => image.to_owned(),
                true => absolute(&image.into())?
                    .into_os_string()
                    .into_string()
                    .map_err(|_| UsageError::new("the path of an image must be UTF-8".to_owned()))?,
            };
            (name, Some(image))
        }
    };
    Ok(ShareDisk {
        file: arguments.path.clone(),
        image,
        name,
        read_only: arguments.read_only,
        target: arguments.target.clone(),
        lun: arguments.lun,
        socket: arguments.socket.as_ref().map(absolute).transpose()?,
    })
}

/// Where a disk is found.
fn place(disk: &SharedDisk) -> String {
    match (&disk.target, disk.lun, &disk.socket) {
        (Some(target), Some(lun), _) => format!(" as LUN {lun} of {target}"),
        (None, Some(lun), _) => format!(" as LUN {lun}"),
        (_, _, Some(socket)) => format!(" at {}", socket.display()),
        _ => String::new(),
    }
}

fn shown(status: &ShareStatus) -> String {
    let what = match &status.pool {
        Some(pool) => format!("disks of the pool {pool}"),
        None => "images".to_owned(),
    };
    let mut text = format!(
        "{}: {what}, process {}, for {} s\n",
        status.kind, status.pid, status.uptime_seconds
    );
    if !status.addresses.is_empty() {
        text += &format!("listens at {}\n", status.addresses.join(", "));
    }
    if let Some(tls) = status.tls {
        let wanted = if tls.required { "required" } else { "allowed" };
        let certificate = if tls.client_certificates {
            ", clients need a certificate"
        } else {
            ""
        };
        text += &format!("TLS is {wanted}{certificate}\n");
    }
    for target in &status.targets {
        text += &format!("target {}\n", target.name);
        for access in &target.access {
            let chap = if access.chap { ", by CHAP" } else { "" };
            let luns = match &access.luns {
                None => "all disks".to_owned(),
                Some(luns) => {
                    let luns: Vec<String> = luns.iter().map(u16::to_string).collect();
                    format!("LUNs {}", luns.join(", "))
                }
            };
            text += &format!("  {}: {luns}{chap}\n", access.initiator);
        }
    }
    text + "\n" + &disks(&status.disks) + "\n" + &clients(&status.clients)
}

fn disks(disks: &[SharedDisk]) -> String {
    if disks.is_empty() {
        return "no disks; `smsvmm share add` adds one\n".to_owned();
    }
    let heading = [
        "DISK", "WHERE", "SIZE", "MODE", "CLIENTS", "READS", "READ", "WRITES", "WRITTEN", "ERRORS", "SOURCE",
    ];
    let mut table = Table::new(&heading, &[2, 4, 5, 6, 7, 8, 9]);
    for disk in disks {
        let place = place(disk);
        let place = place.trim_start_matches(" as ").trim_start_matches(" at ");
        let mut row = vec![
            disk.name.clone(),
            if place.is_empty() { "-" } else { place }.to_owned(),
            size(disk.size),
            if disk.read_only { "ro" } else { "rw" }.to_owned(),
            disk.clients.to_string(),
        ];
        match &disk.counts {
            Some(counts) => row.extend(numbers(counts)),
            None => row.extend(["-"; 5].map(str::to_owned)),
        }
        row.push(disk.source.clone());
        table.row(row);
    }
    table.text()
}

fn clients(clients: &[ShareClient]) -> String {
    if clients.is_empty() {
        return "no clients\n".to_owned();
    }
    let heading = [
        "CLIENT",
        "FROM",
        "INITIATOR",
        "DISK",
        "SINCE",
        "READS",
        "READ",
        "WRITES",
        "WRITTEN",
        "ERRORS",
    ];
    let mut table = Table::new(&heading, &[5, 6, 7, 8, 9]);
    let or_dash = |text: Option<&String>| text.cloned().unwrap_or_else(|| "-".to_owned());
    for client in clients {
        let mut row = vec![
            client.id.clone(),
            client.addresses.join(","),
            or_dash(client.initiator.as_ref()),
            or_dash(client.disk.as_ref().or(client.target.as_ref())),
            Utc::from_unix(client.since_ms / 1000).to_string(),
        ];
        row.extend(numbers(&client.counts));
        table.row(row);
    }
    table.text()
}

fn numbers(counts: &RequestCounts) -> [String; 5] {
    [
        counts.reads.to_string(),
        size(counts.read_bytes),
        counts.writes.to_string(),
        size(counts.written_bytes),
        counts.errors.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use api::{ShareAccess, ShareKind, ShareTarget, ShareTls};

    use super::*;

    #[test]
    fn a_disk_is_told_by_its_name_or_by_a_path_that_is_served_once() {
        let disk = |name: &str, source: &str| SharedDisk {
            name: name.to_owned(),
            source: source.to_owned(),
            target: None,
            lun: None,
            socket: None,
            size: 0,
            read_only: false,
            clients: 0,
            counts: None,
            latencies: None,
        };
        let disks = [
            disk("a.dsk", "/a.dsk"),
            disk("x", "/i"),
            disk("y", "/i"),
            disk("/a.dsk2", "a.dsk"),
        ];
        assert_eq!(name_of(&disks, "/a.dsk"), "a.dsk");
        assert_eq!(name_of(&disks, "a.dsk"), "a.dsk", "a name comes first");
        assert_eq!(name_of(&disks, "/i"), "/i", "there are two");
        assert_eq!(name_of(&disks, "z"), "z");
    }

    #[test]
    fn what_is_served_is_shown_with_who_uses_it() {
        let counts = RequestCounts {
            reads: 3,
            read_bytes: 12_288,
            ..RequestCounts::default()
        };
        let status = ShareStatus {
            kind: ShareKind::Iscsi,
            version: "1".to_owned(),
            pid: 7,
            uptime_seconds: 60,
            pool: Some("tank".to_owned()),
            addresses: vec!["127.0.0.1:3260".to_owned()],
            tls: Some(ShareTls {
                required: true,
                client_certificates: true,
            }),
            targets: vec![ShareTarget {
                name: "iqn.t".to_owned(),
                access: vec![ShareAccess {
                    initiator: "*".to_owned(),
                    chap: true,
                    luns: Some(vec![0, 2]),
                }],
            }],
            disks: vec![SharedDisk {
                name: "/vm/a.dsk".to_owned(),
                source: "/vm/a.dsk".to_owned(),
                target: Some("iqn.t".to_owned()),
                lun: Some(2),
                socket: None,
                size: 1 << 30,
                read_only: true,
                clients: 1,
                counts: Some(counts),
                latencies: None,
            }],
            clients: vec![ShareClient {
                id: "1".to_owned(),
                addresses: vec!["127.0.0.1:4000".to_owned()],
                initiator: Some("iqn.i".to_owned()),
                target: Some("iqn.t".to_owned()),
                disk: None,
                since_ms: 1_000,
                counts,
            }],
        };
        let text = shown(&status);
        for part in [
            "iscsi: disks of the pool tank, process 7, for 60 s",
            "  *: LUNs 0, 2, by CHAP",
            "LUN 2 of iqn.t",
            "TLS is required, clients need a certificate",
            "iqn.i",
            "1970-01-01 00:00:01Z",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let empty = ShareStatus {
            disks: Vec::new(),
            clients: Vec::new(),
            ..status
        };
        assert!(shown(&empty).contains("no disks"));
        assert!(shown(&empty).contains("no clients"));
    }
}
