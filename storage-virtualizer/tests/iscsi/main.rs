//! The iSCSI target against an initiator that does what it is told, and against Debian's clients.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod data;
mod disk;
mod hostile;
mod initiator;
mod login;
mod manage;
mod managed;
mod sessions;
mod targets;
mod tools;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_io::{ListenAddress, Worker, WorkerOptions};
use storage_virtualizer::iscsi::{
    IscsiControl, IscsiOptions, IscsiServer, IscsiTarget, IscsiUnit, MAX_TRANSFER,
};
use storage_virtualizer::scsi::{Identity, Unit, UnitOptions};

use disk::{Disk, Script};
use initiator::{Initiator, Login, TARGET};

/// Blocks of a disk, of 512 bytes.
const BLOCKS: u64 = 8192;

/// Targets with two disks each.
struct Served {
    script: Arc<Script>,
    server: Option<IscsiServer>,
    control: IscsiControl<Disk>,
    _worker: Worker,
}

impl Served {
    fn start() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut IscsiOptions)) -> Self {
        let script = Arc::<Script>::default();
        let worker = Worker::start("iscsi", WorkerOptions::default()).unwrap();
        let mut options = IscsiOptions {
            listen: vec![ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())],
            targets: vec![IscsiTarget::open(TARGET)],
            patience: (Duration::from_millis(200), Duration::from_secs(10)),
            ..IscsiOptions::default()
        };
        change(&mut options);
        let (own, targets) = (Arc::clone(&script), options.targets.len());
        let (server, control) = IscsiServer::start_managed(worker.handle(), options, move || {
            let unit = |target: usize, lun: u16| IscsiUnit {
                target,
                lun,
                unit: Arc::new(Unit::new(UnitOptions {
                    max_transfer: MAX_TRANSFER as u64,
                    ..UnitOptions::new(Identity::from_name(&format!("disk {lun} of {target}"), "serial"))
                })),
                disk: Rc::new(Disk::new(BLOCKS * 512, &own)),
            };
            let all = (0..targets).flat_map(|target| [unit(target, 0), unit(target, 1)]);
            all.collect()
        })
        .unwrap();
        Self {
            script,
            server: Some(server),
            control,
            _worker: worker,
        }
    }

    fn address(&self) -> SocketAddr {
        match &self.server.as_ref().unwrap().addresses()[0] {
            ListenAddress::Tcp(address) => *address,
            ListenAddress::Unix(_) => panic!("no TCP"),
        }
    }

    /// Logs in and takes the unit attention of LUN 0.
    fn login(&self, login: &Login) -> Initiator {
        let mut initiator = Initiator::login(self.address(), login);
        initiator.settle(0);
        initiator
    }
}

/// Bytes that differ at each place.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length.div_ceil(8))
        .flat_map(|_| next())
        .take(length)
        .collect()
}
