//! Data between a guest and its host over a network, compared by SHA-256.
//!
//! The host's end is this program, the guest's is BusyBox's `nc` in an [interactive](crate::VmBuilder::interactive) machine. The guest
//! sends `/tmp/up`, which becomes `up` in the story's folder, and gets that folder's `down` as `/tmp/down`.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Host, Vm};

/// Bytes of one transfer.
pub const SIZE: u64 = 4 << 20;

/// For how long a transfer may make no progress at all.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes [`SIZE`] random bytes in the guest and on the host.
///
/// # Errors
/// When the guest or the host fails, or the data differs.
pub fn make_data(host: &Host, vm: &mut Vm) -> Result<()> {
    host.sh(&format!("head -c {SIZE} /dev/urandom > down"))?;
    vm.guest(&format!(
        "mkfifo /tmp/open && head -c {SIZE} /dev/urandom > /tmp/up"
    ))
    .map(drop)
}

/// The guest sends; `address` is where it finds the host.
///
/// # Errors
/// When the guest or the host fails, or the data differs.
pub fn upload(host: &Host, vm: &mut Vm, address: &str) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    let mut file = File::create(host.folder().join("up"))?;
    let receiver = thread::spawn(move || io::copy(&mut accept(&listener)?, &mut file));
    vm.guest(&format!("nc {address} {port} -e cat /tmp/up"))?;
    let received = joined(receiver)?;
    ensure!(received == SIZE, "{received} bytes arrived");
    same(host, "up", vm, "/tmp/up")
}

/// The guest receives; `address` is where it finds the host. Its side stays open until the end: passt of Debian 12 was seen
/// to send wrong data without end to a guest that says at once that it has nothing to send.
///
/// # Errors
/// When the guest or the host fails, or the data differs.
pub fn download(host: &Host, vm: &mut Vm, address: &str) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    let mut file = File::open(host.folder().join("down"))?;
    let sender = thread::spawn(move || io::copy(&mut file, &mut accept(&listener)?));
    vm.guest(&format!("nc {address} {port} <> /tmp/open > /tmp/down"))?;
    joined(sender)?;
    same(host, "down", vm, "/tmp/down")
}

/// The guest's connection, which fails when nothing moves on it any more.
fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let limit = Timespec::try_from(PATIENCE).ok();
    if poll(&mut [PollFd::new(listener, PollFlags::IN)], limit.as_ref())? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the guest did not connect",
        ));
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn joined<T>(thread: JoinHandle<io::Result<T>>) -> Result<T> {
    let result = thread
        .join()
        .ok()
        .context("the host's end of a transfer panicked")?;
    result.context("the host's end of a transfer")
}

/// A file of the host and one of the guest have the same content.
///
/// # Errors
/// When the guest or the host fails, or the data differs.
pub fn same(host: &Host, ours: &str, vm: &mut Vm, theirs: &str) -> Result<()> {
    let sums = [
        host.sh(&format!("sha256sum < {ours}"))?,
        vm.guest(&format!("sha256sum < {theirs}"))?,
    ];
    ensure!(
        sums[0].len() >= 64 && sums[0].trim() == sums[1].trim(),
        "{ours} and {theirs} differ: {sums:?}"
    );
    Ok(())
}
