//! The management server on a machine, or with the argument `host` on a host, that only remembers, for programs that ask it whatever comes to their minds
//! (`tests/schemathesis.sh`): on a free port of the loopback address, which is printed, as many of them do not know Unix sockets.
#![allow(clippy::unwrap_used, missing_docs, reason = "a tool for tests")]

#[path = "../tests/fake/mod.rs"]
mod fake;
#[path = "../tests/fake/host.rs"]
#[allow(dead_code)]
mod fake_host;
#[path = "../tests/some_pool/mod.rs"]
mod some_pool;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use api::{DiskConfig, EventKind, NetBackend, NetConfig, Vm};

/// Carries one connection.
fn carry(client: TcpStream, socket: &Path) -> std::io::Result<()> {
    let server = UnixStream::connect(socket)?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || {
        // A client that ends ends it all, as it would at the socket itself.
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (server, client);
    let mut buffer = [0; 16 << 10];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return to.shutdown(Shutdown::Both);
        }
        to.write_all(&buffer[..length])?;
    }
}

fn main() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vm.sock");
    let vm = fake::FakeVm::new();
    *vm.pool.lock().unwrap() = Some(some_pool::some_pool());
    vm.attach_disk(DiskConfig::new("/a.raw")).unwrap();
    vm.attach_net(NetConfig::new(NetBackend::User)).unwrap();
    vm.events.record(EventKind::Started);
    let server = management::Server::bind(&socket).unwrap();
    let _server = server.start(Arc::clone(&vm) as Arc<dyn Vm>, || Ok(())).unwrap();
    let manager = folder.path().join("manager.sock");
    let host = fake_host::FakeHost::new(socket.clone());
    let managing = management::Server::bind(&manager).unwrap();
    let _managing = managing.start_host(host).unwrap();
    let socket = match std::env::args().nth(1).as_deref() {
        Some("host") => manager,
        _ => socket,
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("http://{}", listener.local_addr().unwrap());
    for client in listener.incoming() {
        let socket = socket.clone();
        std::thread::spawn(move || carry(client.unwrap(), &socket));
    }
}
