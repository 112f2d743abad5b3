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
    WorkerClock, WorkerOptions, helped, spawn_local, turns, wake_after_turn,
};
use vmm_sys_util::eventfd::EventFd;

fn workers() -> [Worker; 4] {
    let kinds = [
        (EngineKind::Uring, 0),
        (EngineKind::Uring, 1),
        (EngineKind::Uring, 3),
        (EngineKind::Threads, 1),
    ];
    kinds.map(|(engine, helpers)| {
        let options = WorkerOptions {
            engine: Some(engine),
            helpers,
            ..Default::default()
        };
        Worker::start("test", options).unwrap()
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
fn a_task_goes_on_when_the_kernel_was_called_though_nothing_else_wakes_the_worker() {
    for worker in workers() {
        let (done, wait) = mpsc::channel();
        worker.spawn(move || async move {
            for _ in 0..100 {
                let before = turns();
                poll_fn(|context| {
                    if turns() != before {
                        return Poll::Ready(());
                    }
                    wake_after_turn(context.waker());
                    Poll::Pending
                })
                .await;
                done.send(turns().unwrap() - before.unwrap()).unwrap();
            }
        });
        for _ in 0..100 {
            assert_eq!(wait.recv_timeout(Duration::from_secs(10)).unwrap(), 1);
        }
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

/// Each of 64 tasks writes a block of its own again and again, with a pattern that tells task and round, and reads it: the worker and its
/// helpers share the requests, and each task gets the answers to its own.
#[test]
fn helpers_take_a_part_of_many_requests_and_none_of_few() {
    for worker in workers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 12).unwrap();
        let device = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
        let alone = worker.run({
            let device = Arc::clone(&device);
            move || async move {
                for round in 0..200 {
                    check_block(&device, 0, round).await;
                }
                helped().unwrap()
            }
        });
        assert_eq!(alone, 0, "one request at a time needs no help");

        let (done, wait) = mpsc::channel();
        for number in 0..64 {
            let (device, done) = (Arc::clone(&device), done.clone());
            worker.spawn(move || async move {
                for round in 0..300 {
                    check_block(&device, number, round).await;
                    // Rests of all lengths, so that each side finds the other asleep now and then.
                    if round % 50 == 49 {
                        let rest = Duration::from_micros(number * 7 + round * 3);
                        WorkerClock::new().sleep(rest).await;
                    }
                }
                done.send(()).unwrap();
            });
        }
        for _ in 0..64 {
            wait.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        let (helped, threads) = worker.run(|| async { (helped().unwrap(), Arc::<Mutex<Vec<_>>>::default()) });
        let ran_on = Arc::clone(&threads);
        worker
            .confine(move || {
                ran_on.lock().unwrap().push(std::thread::current().id());
                Ok(())
            })
            .unwrap();
        let mut threads = std::mem::take(&mut *threads.lock().unwrap());
        let jobs = threads.len();
        threads.dedup();
        assert_eq!(threads.len(), jobs, "each thread once");
        assert_eq!(helped > 0, jobs > 1, "{helped} requests by {} helpers", jobs - 1);
    }
}

async fn check_block(device: &HostDevice, number: u64, round: u64) {
    let mut buffer = AlignedBuffer::new(4096);
    let pattern = (number << 32 | round).to_le_bytes();
    buffer
        .as_mut_slice()
        .chunks_exact_mut(8)
        .for_each(|chunk| chunk.copy_from_slice(&pattern));
    // SAFETY: the buffer outlives both requests, which are awaited one by one.
    let piece = [unsafe { buffer.io(0, 4096) }];
    device
        .write(number << 12, &piece, block_io::Durability::Volatile)
        .await
        .unwrap();
    buffer.as_mut_slice().fill(0);
    device.read(number << 12, &piece).await.unwrap();
    assert!(
        buffer.as_slice().chunks_exact(8).all(|chunk| chunk == pattern),
        "block {number} in round {round}"
    );
}

#[test]
fn what_runs_at_the_start_runs_on_each_thread_and_may_refuse() {
    let started = Arc::<Mutex<Vec<String>>>::default();
    let names = Arc::clone(&started);
    let hook = move || {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        names.lock().unwrap().push(name);
        Ok(())
    };
    let options = WorkerOptions {
        engine: Some(EngineKind::Uring),
        helpers: 2,
        on_start: Some(Box::new(hook)),
        ..Default::default()
    };
    drop(Worker::start("io", options).unwrap());
    assert_eq!(*started.lock().unwrap(), ["1-io", "2-io", "io"]);

    let options = WorkerOptions {
        engine: Some(EngineKind::Uring),
        helpers: 1,
        on_start: Some(Box::new(|| match std::thread::current().name() {
            Some("1-io") => Err(std::io::ErrorKind::PermissionDenied.into()),
            _ => Ok(()),
        })),
        ..Default::default()
    };
    let error = Worker::start("io", options).unwrap_err();
    assert!(format!("{error:?}").contains("PermissionDenied"), "{error:?}");
}
