//! `Device::open`: what a text stands for, and two addresses of one file.

use std::rc::Rc;
use std::time::{Duration, Instant};

use block_io::{BlockDevice, Device, DeviceError, DeviceOptions, Durability, NbdError, OpenError};

use super::servers::Server;
use super::{pattern, read, together, worker, workers, write};

fn uri(server: &Server) -> String {
    server.address().to_string()
}

#[test]
fn a_text_says_which_kind_of_device_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let options = DeviceOptions::default();
    let path = image.to_str().unwrap();
    let device = Device::open(path, &options).unwrap();
    assert!(matches!(device, Device::Host(_)) && device.name() == path);
    // It is locked.
    let error = Device::open(path, &options).unwrap_err();
    assert!(
        matches!(error, DeviceError::Host(OpenError::InUse { .. })),
        "{error}"
    );
    drop(device);
    let Some(server) = Server::qemu(&image, &socket, &[]) else {
        return;
    };
    let device = Device::open(&uri(&server), &options).unwrap();
    assert!(matches!(device, Device::Nbd(_)));
    let error = Device::open(&uri(&server), &options).unwrap_err();
    let in_use = |source: &NbdError| matches!(source, NbdError::InUse { holder: Some(_) });
    assert!(
        matches!(&error, DeviceError::Nbd { source, .. } if in_use(source)),
        "{error}"
    );
    drop(device);
    let spec = format!("multipath:{},{}", uri(&server), uri(&server));
    let device = Device::open(&spec, &options).unwrap();
    assert!(matches!(&device, Device::Paths(paths) if paths.paths().len() == 2));
    assert_eq!(device.size(), 1 << 20);
    for (spec, text) in [
        ("nbd:host", "is no NBD address"),
        ("multipath:", "no path"),
        (
            "nbd+unix:///?socket=/does/not/exist",
            "cannot open nbd+unix:///?socket=/does/not/exist",
        ),
        ("multipath:nbd+unix:///?socket=/does/not/exist", "cannot open"),
        ("/does/not/exist", "cannot open /does/not/exist"),
    ] {
        let error = Device::open(spec, &options).unwrap_err().to_string();
        assert!(error.contains(text), "{spec}: {error}");
    }
}

#[test]
fn paths_to_files_that_differ_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["one", "two"].map(|name| folder.path().join(name));
    for path in &paths {
        std::fs::File::create(path).unwrap().set_len(1 << 20).unwrap();
    }
    let spec = format!("multipath:{},{}", paths[0].display(), paths[1].display());
    let error = Device::open(&spec, &DeviceOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("different devices"), "{error}");
}

#[test]
fn requests_move_between_two_servers_of_one_file_while_one_after_the_other_is_killed() {
    for worker in workers() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let sockets = ["one", "two"].map(|name| folder.path().join(name));
        let start = |which: usize| Server::qemu(&image, &sockets[which], &[]);
        let (Some(one), Some(two)) = (start(0), start(1)) else {
            return;
        };
        let spec = format!("multipath:{},{}", uri(&one), uri(&two));
        let device = Device::open(&spec, &DeviceOptions::default()).unwrap();
        let (image, sockets) = (image.clone(), sockets.clone());
        let kills = std::thread::spawn(move || {
            let mut servers = [one, two];
            for round in 0..6 {
                std::thread::sleep(Duration::from_millis(200));
                servers[round % 2].kill();
                std::thread::sleep(Duration::from_millis(50));
                servers[round % 2] = Server::qemu(&image, &sockets[round % 2], &[]).unwrap();
            }
            servers
        });
        let end = Instant::now() + Duration::from_millis(1800);
        worker.run(move || async move {
            let device = Rc::new(device);
            together(8, |number| {
                let device = Rc::clone(&device);
                async move {
                    let mut round = 0;
                    while Instant::now() < end {
                        round += 1;
                        let bytes = pattern(20480, number * 1_000_000 + round);
                        let offset = number * (1 << 20) + round % 8 * 20480;
                        write(&*device, offset, &bytes, Durability::Volatile)
                            .await
                            .unwrap();
                        if round % 4 == 0 {
                            device.flush().await.unwrap();
                        }
                        assert!(read(&*device, offset, bytes.len()).await.unwrap() == bytes);
                    }
                }
            })
            .await;
            device.flush().await.unwrap();
        });
        drop(kills.join().unwrap());
    }
}

#[test]
fn a_lost_session_with_unflushed_writes_fails_a_request_for_the_owner_who_remembers() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let Some(mut server) = Server::qemu(&image, &socket, &[]) else {
        return;
    };
    let options = block_io::NbdOptions {
        unflushed_limit: 0,
        ..Default::default()
    };
    let device = block_io::NbdDevice::open(&server.address(), &options).unwrap();
    let worker = worker();
    let device = worker.run(move || async move {
        write(&device, 0, &[1; 512], Durability::Volatile).await.unwrap();
        device
    });
    server.kill();
    let _server = Server::qemu(&image, &socket, &[]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    worker.run(move || async move {
        assert!(device.flush().await.unwrap_err().is_transport());
        device.flush().await.unwrap();
        assert_eq!(read(&device, 0, 512).await.unwrap(), [1; 512]);
    });
}
