//! Everything that a device does, on servers that others wrote.

use std::rc::Rc;

use block_io::{BlockDevice, Durability, IoCause, NbdDevice, NbdOptions, Worker, ZeroMode};

use super::servers::Server;
use super::{pattern, read, together, workers, write};

const SIZE: u64 = 16 << 20;

fn image(folder: &tempfile::TempDir) -> std::path::PathBuf {
    let path = folder.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

/// Reads, writes, trims, zeroes, flushes, many at once.
fn exercise(worker: &Worker, device: NbdDevice) {
    worker.run(move || async move {
        let device = Rc::new(device);
        assert_eq!(device.size(), SIZE);
        // As long as the largest message and longer.
        let long = pattern(5 << 20, 1);
        write(&*device, 4096, &long, Durability::Volatile).await.unwrap();
        assert!(read(&*device, 4096, long.len()).await.unwrap() == long);
        // Many at once, of which some need two receives.
        together(200, |number| {
            let device = Rc::clone(&device);
            async move {
                let length = 512 << (number % 7);
                let bytes = pattern(length, number);
                let durability = if number % 3 == 0 {
                    Durability::Durable
                } else {
                    Durability::Volatile
                };
                write(&*device, (8 << 20) + number * 32768, &bytes, durability)
                    .await
                    .unwrap();
                if number % 10 == 0 {
                    device.flush().await.unwrap();
                }
                assert_eq!(
                    read(&*device, (8 << 20) + number * 32768, length).await.unwrap(),
                    bytes
                );
            }
        })
        .await;
        device
            .write_zeroes(8192, 65536, ZeroMode::KeepAllocated)
            .await
            .unwrap();
        device
            .write_zeroes(1 << 20, 1 << 20, ZeroMode::MayUnmap)
            .await
            .unwrap();
        assert_eq!(read(&*device, 8192, 65536).await.unwrap(), [0; 65536]);
        assert_eq!(read(&*device, 1 << 20, 1 << 20).await.unwrap(), vec![0; 1 << 20]);
        assert_eq!(read(&*device, 4096, 4096).await.unwrap(), long[..4096]);
        device.discard(2 << 20, 1 << 20).await.unwrap();
        device.flush().await.unwrap();
        let beyond = read(&*device, SIZE, 512).await.unwrap_err();
        assert!(matches!(beyond.cause(), IoCause::OutOfRange { size: SIZE }));
        assert!(matches!(
            device.discard(1, 512).await.unwrap_err().cause(),
            IoCause::Misaligned { .. }
        ));
    });
}

#[test]
fn qemu_nbd_serves_everything_with_both_engines() {
    for worker in workers() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let Some(server) = Server::qemu(&image(&folder), &socket, &["--discard=unmap"]) else {
            return;
        };
        exercise(
            &worker,
            NbdDevice::open(&server.address(), &NbdOptions::default()).unwrap(),
        );
    }
}

#[test]
fn nbdkit_serves_everything_with_and_without_what_is_optional() {
    // The filters take abilities away: structured replies, FUA, zeroing.
    for filters in [
        &[][..],
        &["--no-sr"],
        &["--filter=nozero"],
        &["--filter=fua", "--filter=blocksize-policy"],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let mut arguments = filters.to_vec();
        arguments.extend(["memory", "16M"]);
        if filters.contains(&"--filter=nozero") {
            arguments.push("zeromode=none");
        }
        if filters.contains(&"--filter=fua") {
            arguments.extend([
                "blocksize-minimum=512",
                "blocksize-preferred=4k",
                "blocksize-maximum=64k",
            ]);
        }
        let Some(server) = Server::nbdkit(&socket, &arguments) else {
            return;
        };
        exercise(
            &super::worker(),
            NbdDevice::open(&server.address(), &NbdOptions::default()).unwrap(),
        );
    }
}

#[test]
fn an_export_over_tcp_by_name_that_is_read_only_takes_no_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(&folder);
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let port_argument = format!("--port={port}");
    let arguments = [
        "--persistent",
        "--format=raw",
        "--read-only",
        "--shared=0",
        "--bind=127.0.0.1",
        "--export-name=disk 1",
        &port_argument,
        path.to_str().unwrap(),
    ];
    let Some(_server) = Server::spawn("qemu-nbd", &arguments) else {
        return;
    };
    let address = format!("nbd://localhost:{port}/disk%201").parse().unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let device = loop {
        match NbdDevice::open(&address, &NbdOptions::default()) {
            Ok(device) => break device,
            Err(error) => assert!(std::time::Instant::now() < end, "{error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    let wrong = format!("nbd://127.0.0.1:{port}/other").parse().unwrap();
    let error = NbdDevice::open(&wrong, &NbdOptions::default()).unwrap_err();
    assert!(error.to_string().contains("no such export"), "{error}");
    super::worker().run(move || async move {
        assert!(device.geometry().read_only);
        assert_eq!(read(&device, 0, 512).await.unwrap(), [0; 512]);
        let error = write(&device, 0, &[1; 512], Durability::Volatile)
            .await
            .unwrap_err();
        assert!(matches!(error.cause(), IoCause::ReadOnly));
        device.flush().await.unwrap();
    });
}

#[test]
fn the_errors_of_the_servers_disk_are_those_of_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let arguments = [
        "--filter=error",
        "memory",
        "16M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
    ];
    let Some(server) = Server::nbdkit(&socket, &arguments) else {
        return;
    };
    let device = NbdDevice::open(&server.address(), &NbdOptions::default()).unwrap();
    super::worker().run(move || async move {
        let error = write(&device, 0, &[1; 512], Durability::Volatile)
            .await
            .unwrap_err();
        assert!(error.is_no_space() && !error.is_transport());
        assert_eq!(read(&device, 0, 512).await.unwrap(), [0; 512]);
    });
}
