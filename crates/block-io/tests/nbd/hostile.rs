//! Servers that lie, talk rubbish, or lose what they promised to keep: errors that say so, soon.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block_io::{BlockDevice, Durability, IoCause, IoError, NbdDevice, NbdOptions, error_chain};

use super::fake::{
    Export, FLUSH_COMMAND, Request, WRITE, answer_option, chunk, data, greet, handshake, option, request,
    serve, simple,
};
use super::{pattern, read, worker, workers, write};

fn options() -> NbdOptions {
    NbdOptions {
        patience: Duration::from_millis(400),
        silence: Duration::from_millis(300),
        ..Default::default()
    }
}

/// For what must succeed, however busy the machine is.
fn patient() -> NbdOptions {
    NbdOptions {
        patience: Duration::from_secs(60),
        ..Default::default()
    }
}

#[test]
fn a_server_that_breaks_the_handshake_is_refused_with_the_reason() {
    type Talk = fn(&mut UnixStream) -> std::io::Result<()>;
    fn structured(stream: &mut UnixStream) -> std::io::Result<()> {
        greet(stream)?;
        option(stream)?;
        answer_option(stream, 8, 1, &[])
    }
    fn with(stream: &mut UnixStream, export: Export) -> std::io::Result<()> {
        handshake(stream, &export)?;
        stream.read_exact(&mut [0])
    }
    let cases: &[(&str, Talk)] = &[
        ("no NBD server", |stream| {
            stream.write_all(&b"HTTP/1.1 200 OK\r\nServer: x\r\n"[..])
        }),
        ("oldstyle", |stream| {
            stream.write_all(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53")
        }),
        ("no fixed newstyle", |stream| {
            stream.write_all(b"NBDMAGICIHAVEOPT\0\x02")
        }),
        ("failed", |stream| stream.write_all(b"NBDMAGIC")),
        ("option that was not sent", |stream| {
            greet(stream)?;
            answer_option(stream, 7, 1, &[])
        }),
        ("too long", |stream| {
            greet(stream)?;
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend([0, 0, 0, 8, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]);
            stream.write_all(&bytes)?;
            stream.read_exact(&mut [0; 64])
        }),
        ("wrong magic", |stream| {
            greet(stream)?;
            stream.write_all(&[7; 64])
        }),
        ("no NBD_OPT_GO", |stream| {
            structured(stream)?;
            answer_option(stream, 7, 1 << 31 | 1, &[])
        }),
        ("TLS", |stream| {
            structured(stream)?;
            answer_option(stream, 7, 1 << 31 | 5, &[])
        }),
        ("no such export as \"\" (not here)", |stream| {
            structured(stream)?;
            answer_option(stream, 7, 1 << 31 | 6, b"not\n here")
        }),
        ("no size", |stream| {
            structured(stream)?;
            answer_option(stream, 7, 1, &[])
        }),
        ("too short", |stream| {
            structured(stream)?;
            answer_option(stream, 7, 3, &[0, 0, 1])
        }),
        ("endless", |stream| {
            structured(stream)?;
            loop {
                answer_option(stream, 7, 3, &[0, 2, 65])?;
            }
        }),
        ("size beyond", |stream| {
            with(
                stream,
                Export {
                    size: u64::MAX - 4095,
                    ..Export::default()
                },
            )
        }),
        ("block sizes", |stream| {
            with(
                stream,
                Export {
                    blocks: (3, 4096, 1 << 20),
                    ..Export::default()
                },
            )
        }),
        ("block sizes", |stream| {
            with(
                stream,
                Export {
                    blocks: (4096, 512, 1 << 20),
                    ..Export::default()
                },
            )
        }),
        ("largest block", |stream| {
            with(
                stream,
                Export {
                    blocks: (1, 64, 64),
                    ..Export::default()
                },
            )
        }),
    ];
    for (reason, talk) in cases {
        let talk = *talk;
        let (_folder, address) = serve(move |_, stream| {
            drop(talk(stream));
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new()).map(drop)
        });
        let error = error_chain(&NbdDevice::open(&address, &options()).unwrap_err());
        assert!(error.contains(reason), "{error}, expected {reason}");
    }
}

#[test]
fn a_server_that_says_nothing_or_drips_is_left_in_time() {
    for drips in [false, true] {
        let (_folder, address) = serve(move |_, stream| {
            loop {
                if !drips {
                    return stream.read_exact(&mut [0]);
                }
                stream.write_all(b"N")?;
                std::thread::sleep(Duration::from_millis(400));
            }
        });
        let start = Instant::now();
        let error = NbdDevice::open(&address, &options()).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(10), "{error}");
    }
}

/// What a read of 4096 bytes at 8192 gives if the server answers it with what `answer` makes of its cookie.
fn read_answered(
    structured: bool,
    answer: impl Fn(u64) -> Vec<u8> + Send + 'static,
) -> Result<Vec<u8>, IoError> {
    let (_folder, address) = serve(move |_, stream| {
        handshake(
            stream,
            &Export {
                structured,
                ..Export::default()
            },
        )?;
        let asked = request(stream)?;
        stream.write_all(&answer(asked.cookie))?;
        stream.read_exact(&mut [0; 64])
    });
    let device = NbdDevice::open(&address, &options()).unwrap();
    worker().run(move || async move { read(&device, 8192, 4096).await })
}

#[test]
fn an_answer_in_pieces_is_put_together() {
    let bytes = pattern(4096, 5);
    let sent = bytes.clone();
    let got = read_answered(true, move |cookie| {
        let mut hole = 9216_u64.to_be_bytes().to_vec();
        hole.extend(512_u32.to_be_bytes());
        let mut answer = data(false, cookie, 9728, &sent[1536..]);
        answer.extend(chunk(false, 2, cookie, 12, &hole));
        answer.extend(data(true, cookie, 8192, &sent[..1024]));
        answer
    });
    let mut expected = bytes;
    expected[1024..1536].fill(0);
    assert!(got.unwrap() == expected);
}

#[test]
fn an_answer_that_is_none_fails_the_request_and_says_why() {
    type Answer = fn(u64) -> Vec<u8>;
    let cases: &[(&str, bool, Answer)] = &[
        ("wrong magic", true, |_| b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
        ("not made", true, |cookie| simple(0, cookie ^ 1)),
        ("not made", false, |cookie| simple(0, cookie ^ 1 << 32)),
        ("not made", true, |cookie| data(true, !cookie, 8192, &[1; 4096])),
        ("simple answer", true, |cookie| simple(0, cookie)),
        ("not agreed", false, |cookie| data(true, cookie, 8192, &[1; 4096])),
        ("no place", true, |cookie| data(true, cookie, 8192, &[1; 4097])),
        ("no place", true, |cookie| {
            chunk(true, 1, cookie, u32::MAX, &[0; 64])
        }),
        ("no place", true, |cookie| {
            chunk(true, 1 << 15 | 1, cookie, u32::MAX, &[0; 64])
        }),
        ("no place", true, |cookie| {
            chunk(true, 1 << 15 | 1, cookie, 5, &[0; 5])
        }),
        ("no place", true, |cookie| chunk(true, 5, cookie, 12, &[0; 12])),
        ("no place", true, |cookie| chunk(false, 0, cookie, 0, &[])),
        ("outside", true, |cookie| data(true, cookie, 8191, &[1; 512])),
        ("outside", true, |cookie| data(true, cookie, 8193, &[1; 4096])),
        ("outside", true, |cookie| data(true, cookie, u64::MAX, &[1; 512])),
        ("twice", true, |cookie| {
            let mut answer = data(false, cookie, 8192, &[1; 1024]);
            answer.extend(data(true, cookie, 9000, &[1; 512]));
            answer
        }),
        ("lacks data", true, |cookie| data(true, cookie, 8192, &[1; 4095])),
        ("lacks data", true, |cookie| chunk(true, 0, cookie, 0, &[])),
    ];
    for (reason, structured, answer) in cases {
        let error = read_answered(*structured, *answer).unwrap_err();
        let text = error_chain(&error);
        assert!(
            error.is_transport() && text.contains(reason),
            "{text}, expected {reason}"
        );
    }
}

#[test]
fn the_servers_errors_are_the_requests() {
    let error = read_answered(false, |cookie| simple(28, cookie)).unwrap_err();
    assert!(error.is_no_space());
    let error = read_answered(true, |cookie| {
        let mut body = 5_u32.to_be_bytes().to_vec();
        body.extend([0, 3, b'b', b'a', b'd']);
        chunk(true, 1 << 15 | 1, cookie, 9, &body)
    });
    assert!(
        matches!(error.unwrap_err().cause(), IoCause::Os(error) if error.raw_os_error() == Some(libc::EIO))
    );
}

#[test]
fn half_an_answer_is_waited_for_no_longer_than_allowed() {
    for worker in workers() {
        for hangs_up in [false, true] {
            let (_folder, address) = serve(move |_, stream| {
                handshake(stream, &Export::default())?;
                let asked = request(stream)?;
                stream.write_all(&data(true, asked.cookie, 8192, &[1; 4096])[..3000])?;
                if hangs_up {
                    Ok(())
                } else {
                    stream.read_exact(&mut [0; 64])
                }
            });
            let device = NbdDevice::open(&address, &options()).unwrap();
            worker.run(move || async move {
                let start = Instant::now();
                let error = read(&device, 8192, 4096).await.unwrap_err();
                assert!(error.is_transport(), "{error:?}");
                assert!(start.elapsed() < Duration::from_secs(10));
            });
        }
    }
}

#[test]
fn a_future_that_is_dropped_leaves_the_session_intact() {
    for worker in workers() {
        let (_folder, address) = serve(move |_, stream| {
            handshake(stream, &Export::default())?;
            loop {
                let asked = request(stream)?;
                std::thread::sleep(Duration::from_millis(20));
                stream.write_all(&data(
                    true,
                    asked.cookie,
                    asked.offset,
                    &[asked.offset as u8; 4096],
                ))?;
            }
        });
        let device = NbdDevice::open(&address, &patient()).unwrap();
        worker.run(move || async move {
            let mut dropped = Box::pin(read(&device, 4096 + 1024, 4096));
            for _ in 0..3 {
                let poll = std::future::poll_fn(|context| {
                    std::task::Poll::Ready(dropped.as_mut().poll(context).is_pending())
                });
                assert!(poll.await);
            }
            let other = read(&device, 0, 4096).await.unwrap();
            drop(dropped);
            assert_eq!(other, [0; 4096]);
            drop(Box::pin(read(&device, 512, 4096)));
            assert_eq!(read(&device, 8192 + 512, 4096).await.unwrap(), [0; 4096]);
        });
    }
}

/// A server that acknowledges writes, dies at the first flush, and comes back with `export` and without what it had.
fn forgetful(
    export: Export,
    refuses: bool,
    options: &NbdOptions,
) -> (tempfile::TempDir, NbdDevice, Arc<Mutex<Vec<Request>>>) {
    let log: Arc<Mutex<Vec<Request>>> = Arc::default();
    let seen = Arc::clone(&log);
    let (folder, address) = serve(move |connection, stream| {
        let first = connection == 0;
        let before = Export::default();
        handshake(stream, if first { &before } else { &export })?;
        loop {
            let asked = request(stream)?;
            if first && asked.command == FLUSH_COMMAND {
                return Ok(());
            }
            let error = if !first && refuses && asked.command == WRITE {
                5
            } else {
                0
            };
            let answer = if asked.command == WRITE && error == 0 {
                chunk(true, 0, asked.cookie, 0, &[])
            } else {
                simple(error, asked.cookie)
            };
            if !first {
                seen.lock().unwrap().push(asked);
            }
            stream.write_all(&answer)?;
        }
    });
    let device = NbdDevice::open(&address, options).unwrap();
    (folder, device, log)
}

#[test]
fn what_was_not_flushed_is_written_again_before_a_flush_on_a_new_connection_succeeds() {
    let (_folder, device, log) = forgetful(Export::default(), false, &patient());
    let device = worker().run(move || async move {
        write(&device, 4096, &pattern(1024, 1), Durability::Volatile)
            .await
            .unwrap();
        write(&device, 4608, &pattern(512, 2), Durability::Volatile)
            .await
            .unwrap();
        device.flush().await.unwrap();
        device
    });
    let seen: Vec<(u16, u64, Vec<u8>)> = log
        .lock()
        .unwrap()
        .drain(..)
        .map(|request| (request.command, request.offset, request.data))
        .collect();
    let expected = [
        (WRITE, 4096, pattern(1024, 1)),
        (WRITE, 4608, pattern(512, 2)),
        (FLUSH_COMMAND, 0, vec![]),
    ];
    assert_eq!(seen, expected);
    // Now it is durable, and forgotten.
    drop(device);
}

#[test]
fn a_flush_fails_if_what_it_covers_cannot_be_written_again() {
    let (_folder, device, _log) = forgetful(Export::default(), true, &patient());
    worker().run(move || async move {
        write(&device, 4096, &pattern(1024, 1), Durability::Volatile)
            .await
            .unwrap();
        for _ in 0..2 {
            let error = device.flush().await.unwrap_err();
            assert!(matches!(error.cause(), IoCause::EarlierFlushFailed), "{error:?}");
        }
    });
}

#[test]
fn an_export_that_shrank_or_lost_abilities_is_not_used() {
    let shrunk = Export {
        size: 1 << 19,
        ..Export::default()
    };
    let poorer = Export {
        flags: 1,
        ..Export::default()
    };
    for (export, reason) in [
        (shrunk, "shrank from 1048576 to 524288"),
        (poorer, "other abilities"),
    ] {
        let (_folder, device, _log) = forgetful(export, false, &options());
        worker().run(move || async move {
            write(&device, 4096, &pattern(1024, 1), Durability::Volatile)
                .await
                .unwrap();
            let error = device.flush().await.unwrap_err();
            let text = error_chain(&error);
            assert!(error.is_transport() && text.contains(reason), "{text}");
        });
    }
}

#[test]
fn unflushed_writes_beyond_the_limit_are_flushed_unasked() {
    let flushes = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&flushes);
    let (_folder, address) = serve(move |_, stream| {
        handshake(stream, &Export::default())?;
        loop {
            let asked = request(stream)?;
            *counted.lock().unwrap() += u32::from(asked.command == FLUSH_COMMAND);
            stream.write_all(&simple(0, asked.cookie))?;
        }
    });
    let options = NbdOptions {
        unflushed_limit: 64 << 10,
        ..patient()
    };
    let device = NbdDevice::open(&address, &options).unwrap();
    worker().run(move || async move {
        for _ in 0..100 {
            write(&device, 0, &[1; 4096], Durability::Volatile).await.unwrap();
        }
    });
    // 400 KiB in steps of somewhat more than 60 KiB.
    assert_eq!(*flushes.lock().unwrap(), 6);
}
