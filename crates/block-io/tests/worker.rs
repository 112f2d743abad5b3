//! Workers: tasks, wakes, eventfds, and their end.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Poll, Waker};
use std::time::Duration;

use block_io::{
    AlignedBuffer, BlockDevice, Clock, EngineKind, EventSignal, EventWatch, HostDevice, OpenOptions, Worker,
    WorkerClock, WorkerOptions, spawn_local,
};
use vmm_sys_util::eventfd::EventFd;

fn workers() -> [Worker; 2] {
    [EngineKind::Uring, EngineKind::Threads].map(|engine| {
        Worker::start(
            "test",
            WorkerOptions {
                engine: Some(engine),
                ..Default::default()
            },
        )
        .unwrap()
    })
}

#[test]
fn tasks_run_and_spawn_others() {
    for worker in workers() {
        let count = Arc::new(AtomicU32::new(0));
        let (done, wait) = mpsc::channel();
        for _ in 0..100 {
            let (count, done) = (Arc::clone(&count), done.clone());
            worker.spawn(move || async move {
                let inner = async move {
                    count.fetch_add(1, Ordering::Relaxed);
                    done.send(()).unwrap();
                };
                assert!(spawn_local(inner).is_ok());
            });
        }
        for _ in 0..100 {
            wait.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        assert_eq!(count.load(Ordering::Relaxed), 100);
    }
}

#[test]
fn a_task_can_be_woken_from_another_thread() {
    for worker in workers() {
        let slot: Arc<Mutex<(bool, Option<Waker>)>> = Arc::default();
        let (done, wait) = mpsc::channel();
        let task_slot = Arc::clone(&slot);
        worker.spawn(move || async move {
            poll_fn(|context| {
                let mut slot = task_slot.lock().unwrap();
                if slot.0 {
                    return Poll::Ready(());
                }
                slot.1 = Some(context.waker().clone());
                Poll::Pending
            })
            .await;
            done.send(()).unwrap();
        });
        loop {
            let mut slot = slot.lock().unwrap();
            if let Some(waker) = slot.1.take() {
                slot.0 = true;
                waker.wake();
                break;
            }
        }
        wait.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}

#[test]
fn every_signal_of_an_eventfd_reaches_its_watcher() {
    for worker in workers() {
        let (ping, pong) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let (task_ping, task_pong) = (ping.try_clone().unwrap(), pong.try_clone().unwrap());
        worker.spawn(move || async move {
            let mut watch = EventWatch::new(task_ping).unwrap();
            let signal = EventSignal::new(task_pong);
            loop {
                watch.wait().await.unwrap();
                signal.signal().unwrap();
            }
        });
        for _ in 0..1000 {
            ping.write(1).unwrap();
            assert!(pong.read().unwrap() >= 1);
        }
    }
}

#[test]
fn a_nonblocking_eventfd_that_was_written_before_is_seen() {
    for worker in workers() {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        event.write(1).unwrap();
        worker.run(move || async move { EventWatch::new(event).unwrap().wait().await.unwrap() });
    }
}

#[test]
fn a_worker_stops_while_tasks_wait_and_requests_are_in_flight() {
    for worker in workers() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let device = Arc::new(HostDevice::open(path, &OpenOptions::default()).unwrap());
        let (started, wait) = mpsc::channel();
        for number in 0..64 {
            let (device, started) = (Arc::clone(&device), started.clone());
            worker.spawn(move || async move {
                started.send(()).unwrap();
                let buffer = AlignedBuffer::new(1 << 20);
                loop {
                    // SAFETY: the buffer lives until the read has ended.
                    let piece = unsafe { buffer.io(0, 1 << 20) };
                    device.read(number << 20, &[piece]).await.unwrap();
                }
            });
        }
        let event = EventFd::new(0).unwrap();
        worker.spawn(move || async move { EventWatch::new(event).unwrap().wait().await.unwrap() });
        for _ in 0..64 {
            wait.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        drop(worker);
        // Nobody holds the device any more.
        assert_eq!(Arc::strong_count(&device), 1);
    }
}

#[test]
fn a_request_outside_of_a_worker_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let device = HostDevice::open(file.path(), &OpenOptions::default()).unwrap();
    let mut flush = std::pin::pin!(device.flush());
    let Poll::Ready(Err(error)) = flush
        .as_mut()
        .poll(&mut std::task::Context::from_waker(Waker::noop()))
    else {
        panic!("it should fail at once");
    };
    assert!(matches!(error.cause(), block_io::IoCause::NotOnWorker));
}

#[test]
fn an_idle_worker_sleeps() {
    for worker in workers() {
        // SAFETY: gettid has no preconditions.
        let thread = worker.run(|| async { unsafe { libc::gettid() } });
        let switches = || {
            let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
            status
                .lines()
                .filter(|line| line.contains("ctxt_switches"))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        std::thread::sleep(Duration::from_millis(100));
        let before = switches();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(switches(), before);
    }
}

#[test]
fn a_task_sleeps_as_long_as_it_asked_to_and_others_run_meanwhile() {
    for worker in workers() {
        let (done, wait) = mpsc::channel();
        let sleeper = done.clone();
        worker.spawn(move || async move {
            let clock = WorkerClock::new();
            clock.sleep(Duration::from_millis(50)).await;
            sleeper.send(clock.now()).unwrap();
        });
        worker.spawn(move || async move { done.send(Duration::ZERO).unwrap() });
        assert_eq!(
            wait.recv_timeout(Duration::from_secs(10)).unwrap(),
            Duration::ZERO
        );
        let slept = wait.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(slept >= Duration::from_millis(50), "{slept:?}");
    }
}

/// Writes a byte of its own to each device, and reads it again.
async fn fill(device: &HostDevice, byte: u8) {
    let mut buffer = AlignedBuffer::new(4096);
    buffer.as_mut_slice().fill(byte);
    for _ in 0..3 {
        // SAFETY: the buffer outlives both requests, which are awaited one by one.
        let piece = [unsafe { buffer.io(0, 4096) }];
        device
            .write(0, &piece, block_io::Durability::Volatile)
            .await
            .unwrap();
        device.read(0, &piece).await.unwrap();
    }
}

#[test]
fn descriptors_that_are_closed_and_given_to_other_files_never_lead_to_the_wrong_one() {
    for worker in workers() {
        let folder = tempfile::tempdir().unwrap();
        let path = |index: usize| folder.path().join(index.to_string());
        let mut open: Vec<(usize, Arc<HostDevice>)> = Vec::new();
        for round in 0..300_usize {
            std::fs::File::create(path(round)).unwrap().set_len(8192).unwrap();
            let device = Arc::new(HostDevice::open(path(round), &OpenOptions::default()).unwrap());
            open.push((round, device));
            // More than a ring has places for, and descriptors that come and go.
            if open.len() > 80 {
                drop(open.remove(round * 7 % 80));
            }
            let now = [open.len() - 1, round * 13 % open.len()].map(|at| open[at].clone());
            worker.run(move || async move {
                for (number, device) in &now {
                    fill(device, *number as u8).await;
                }
            });
        }
        drop(open);
        for round in 0..300_usize {
            let bytes = std::fs::read(path(round)).unwrap();
            assert_eq!(bytes[..4096], [round as u8; 4096], "file {round}");
        }
    }
}

#[test]
fn a_closed_device_is_let_go_by_workers_that_live_on() {
    let workers = workers();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(8192).unwrap();
    let device = Arc::new(HostDevice::open(&path, &OpenOptions::default()).unwrap());
    for worker in &workers {
        let device = Arc::clone(&device);
        worker.run(move || async move { fill(&device, 1).await });
    }
    drop(device);
    // A lease for writing is given only to one who is alone.
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let end = std::time::Instant::now() + Duration::from_secs(5);
    loop {
        // SAFETY: no memory is involved.
        let got = unsafe {
            libc::fcntl(
                std::os::fd::AsRawFd::as_raw_fd(&file),
                libc::F_SETLEASE,
                libc::F_WRLCK,
            )
        };
        if got == 0 {
            break;
        }
        assert!(
            std::time::Instant::now() < end,
            "{}",
            std::io::Error::last_os_error()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
