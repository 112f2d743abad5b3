//! Servers that go away, come back, or fall silent.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block_io::{BlockDevice, Durability, NbdDevice, NbdOptions};

use super::servers::Server;
use super::{pattern, read, together, worker, workers, write};

#[test]
fn requests_outlive_a_server_that_is_killed_and_comes_back() {
    for worker in workers() {
        let folder = tempfile::tempdir().unwrap();
        let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
        std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let Some(mut server) = Server::qemu(&image, &socket, &[]) else {
            return;
        };
        let device = NbdDevice::open(&server.address(), &NbdOptions::default()).unwrap();
        let restarts = std::thread::spawn(move || {
            for _ in 0..5 {
                std::thread::sleep(Duration::from_millis(60));
                server.kill();
                std::thread::sleep(Duration::from_millis(40));
                server = Server::qemu(&image, &socket, &[]).unwrap();
            }
            server
        });
        let end = Instant::now() + Duration::from_millis(1200);
        worker.run(move || async move {
            let device = Rc::new(device);
            together(16, |number| {
                let device = Rc::clone(&device);
                async move {
                    let mut round = 0;
                    while Instant::now() < end {
                        round += 1;
                        let bytes = pattern(20480, number * 1_000_000 + round);
                        let offset = number * (512 << 10) + round % 8 * 20480;
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
        drop(restarts.join().unwrap());
    }
}

#[test]
fn requests_fail_when_the_server_stays_away_and_succeed_when_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let Some(mut server) = Server::qemu(&image, &socket, &[]) else {
        return;
    };
    let options = NbdOptions {
        patience: Duration::from_secs(2),
        ..Default::default()
    };
    let device = NbdDevice::open(&server.address(), &options).unwrap();
    server.kill();
    let worker = worker();
    let device = worker.run(move || async move {
        let start = Instant::now();
        let error = read(&device, 0, 512).await.unwrap_err();
        assert!(error.is_transport(), "{error:?}");
        assert!(start.elapsed() < Duration::from_secs(10));
        // Now it is known.
        let start = Instant::now();
        assert!(device.flush().await.unwrap_err().is_transport());
        assert!(start.elapsed() < Duration::from_secs(1));
        device
    });
    let _server = Server::qemu(&image, &socket, &[]).unwrap();
    worker.run(move || async move {
        let end = Instant::now() + Duration::from_secs(20);
        while let Err(error) = read(&device, 0, 512).await {
            assert!(error.is_transport() && Instant::now() < end, "{error:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn a_server_that_falls_silent_is_given_up_and_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let Some(server) = Server::qemu(&image, &socket, &[]) else {
        return;
    };
    let options = NbdOptions {
        patience: Duration::from_secs(1),
        silence: Duration::from_millis(200),
        ..Default::default()
    };
    let device = NbdDevice::open(&server.address(), &options).unwrap();
    server.signal(libc::SIGSTOP);
    let worker = worker();
    let device = worker.run(move || async move {
        let error = read(&device, 0, 512).await.unwrap_err();
        assert!(error.is_transport(), "{error:?}");
        device
    });
    server.signal(libc::SIGCONT);
    worker.run(move || async move {
        let end = Instant::now() + Duration::from_secs(20);
        while let Err(error) = read(&device, 0, 512).await {
            assert!(error.is_transport() && Instant::now() < end, "{error:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn workers_share_a_device_and_the_others_go_on_when_the_one_that_serves_the_connection_stops() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("socket"));
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let Some(server) = Server::qemu(&image, &socket, &[]) else {
        return;
    };
    let device = Arc::new(NbdDevice::open(&server.address(), &NbdOptions::default()).unwrap());
    let [first, second] = workers();
    // It serves the connection, and has requests in flight whenever it is stopped.
    let served = Arc::clone(&device);
    first.run(move || async move { read(&*served, 0, 4096).await.unwrap() });
    let busy = Arc::clone(&device);
    first.spawn(move || async move {
        let mut round = 0;
        loop {
            round += 1;
            let bytes = pattern(65536, round);
            write(&*busy, 0, &bytes, Durability::Volatile).await.unwrap();
            assert!(read(&*busy, 0, bytes.len()).await.unwrap() == bytes);
        }
    });
    let stop = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(first);
    });
    let end = Instant::now() + Duration::from_millis(600);
    second.run(move || async move {
        together(8, |number| {
            let device = Arc::clone(&device);
            async move {
                let mut round = 0;
                while Instant::now() < end {
                    round += 1;
                    let bytes = pattern(20480, number * 1_000_000 + round);
                    let offset = (1 << 20) + number * 20480;
                    write(&*device, offset, &bytes, Durability::Volatile)
                        .await
                        .unwrap();
                    assert!(read(&*device, offset, bytes.len()).await.unwrap() == bytes);
                }
                assert!(round > 1);
            }
        })
        .await;
        device.flush().await.unwrap();
    });
    stop.join().unwrap();
}
