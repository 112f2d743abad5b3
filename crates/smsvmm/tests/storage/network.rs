//! Pools with devices behind NBD servers, which die, hang, come back and lie.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use block_io::{Device, DeviceOptions};

use crate::fake::{self, Export};
use crate::open::{check, with_pool, write};
use crate::place::{Place, text};
use crate::servers::Server;

/// A place with `far.img` behind a server; none if there is no qemu-nbd.
fn place(files: &[&str]) -> Option<(Place, Server)> {
    let place = Place::new(&[files, &["far.img"]].concat());
    let server = serve(&place, "far")?;
    Some((place, server))
}

fn serve(place: &Place, name: &str) -> Option<Server> {
    let image = place.path("far.img");
    Server::qemu(&image, &place.path(&format!("{name}.sock")), &[])
}

const FAR: &str = "nbd+unix:///?socket=far.sock";

/// A pool on two files and the server, and a volume mirrored over the first file and the server.
fn mirror(place: &Place) {
    let made = place.good(&["pool", "create", "demo", "d0.img", "d1.img", FAR]);
    let (_, lines) = made.split_once("\n\n").unwrap();
    assert_eq!(
        lines,
        format!("[pool]\ndevices = [\"d0.img\", \"d1.img\", \"{FAR}\"]\n")
    );
    fs::write(place.path("vm.toml"), lines).unwrap();
    let create = "volume create data --size 8M --layout mirror --device d0.img --device";
    let create: Vec<&str> = create.split(' ').chain([FAR]).collect();
    place.pool(&create);
}

/// The pool's devices for a process in another folder.
fn absolute(place: &Place, names: &[&str]) -> Vec<String> {
    let names = names
        .iter()
        .map(|name| block_io::relative_to(name, place.0.path()));
    names.collect()
}

#[test]
fn a_leg_behind_a_server_that_dies_is_taken_out_and_catches_up_when_the_server_is_back() {
    let Some((place, server)) = place(&["d0.img", "d1.img"]) else {
        return;
    };
    mirror(&place);
    let devices = absolute(&place, &["d0.img", "d1.img", FAR]);
    let far = devices.last().cloned();
    let begun = Instant::now();
    let server = with_pool(&devices, move |pool| async move {
        let volume = pool.volume("data").unwrap();
        write(&volume, 0, 8, 1).await.unwrap();
        let mut server = server;
        server.kill();
        write(&volume, 2, 5, 2).await.unwrap();
        let events: Vec<String> = pool.take_events().iter().map(ToString::to_string).collect();
        assert!(
            events
                .iter()
                .any(|event| event.contains("far.sock is out of service")),
            "{events:?}"
        );
        check(&volume, 2, 5, 2).await;
        server
    });
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    drop(server);

    let status = place.json(&["pool", "status"]);
    assert_eq!(status["state"], "degraded", "{status:#}");
    // As it was called last.
    assert_eq!(status["devices"][2]["name"].as_str(), far.as_deref());
    assert_ne!(status["devices"][2]["state"], "active");
    let note = status["notes"][0].as_str().unwrap();
    assert!(note.contains(&format!("cannot open {FAR}: ")), "{note}");
    // The pool goes on without it.
    place.pool(&[
        "volume", "create", "more", "--size", "4M", "--layout", "concat", "--device", "d0.img",
    ]);

    let server = serve(&place, "far").unwrap();
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["devices"][2]["state"], "returned", "{status:#}");
    let healed = place.json(&["job", "wait"]);
    assert_eq!(healed["pool"]["state"], "healthy", "{healed:#}");

    // It has everything, alone.
    fs::rename(place.path("d0.img"), place.path("away")).unwrap();
    let devices = absolute(&place, &["d1.img", FAR]);
    with_pool(&devices, |pool| async move {
        let volume = pool.volume("data").unwrap();
        check(&volume, 0, 2, 1).await;
        check(&volume, 2, 5, 2).await;
        check(&volume, 5, 8, 1).await;
    });
    drop(server);
}

#[test]
fn a_command_ends_when_a_server_dies_under_it() {
    let Some((place, mut server)) = place(&["d0.img", "d1.img"]) else {
        return;
    };
    mirror(&place);
    let scrub = Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(["pool", "scrub", "--throttle", "1M", "--config", "vm.toml"])
        .current_dir(place.0.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let error = place.bad(1, &["pool", "create", "other", FAR, "--force"]);
    let holder = format!("{FAR} is in use by smsvmm (pid {})", scrub.id());
    assert!(error.contains(&holder), "{error}");
    server.kill();
    let begun = Instant::now();
    let output = scrub.wait_with_output().unwrap();
    let (out, err) = text(&output);
    assert!(begun.elapsed() < Duration::from_secs(60), "{out}{err}");
    assert!(err.contains(FAR), "{out}{err}");
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["state"], "degraded", "{status:#}");
}

#[test]
fn a_server_that_hangs_does_not_keep_a_pool_from_opening() {
    let Some((place, server)) = place(&["d0.img", "d1.img"]) else {
        return;
    };
    mirror(&place);
    server.signal(libc::SIGSTOP);
    let begun = Instant::now();
    let status = place.json(&["pool", "status"]);
    server.signal(libc::SIGCONT);
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    assert_eq!(status["state"], "degraded", "{status:#}");
    let notes = status["notes"].to_string();
    assert!(notes.contains("the server does not answer"), "{notes}");
}

#[test]
fn an_export_has_one_user_and_a_device_one_name() {
    let Some((place, _server)) = place(&["d0.img", "d1.img"]) else {
        return;
    };
    let far = place.path("far.sock");
    let spec = format!("nbd+unix:///?socket={}", far.display());
    let held = Device::open(&spec, &DeviceOptions::default()).unwrap();
    let error = place.bad(1, &["pool", "create", "demo", FAR]);
    let holder = format!("(pid {})", std::process::id());
    assert!(
        error.contains("is in use by") && error.contains(&holder),
        "{error}"
    );
    drop(held);
    let error = place.bad(1, &["pool", "create", "demo", "d0.img", &spec, FAR]);
    assert!(error.contains("was given twice, under two names"), "{error}");

    // Another way to the same image, which nothing tells from another device.
    let _other = serve(&place, "other").unwrap();
    let other = "nbd+unix:///?socket=other.sock";
    let error = place.bad(1, &["pool", "create", "demo", "d0.img", FAR, other]);
    assert!(error.contains("are the same device"), "{error}");
    let error = place.bad(1, &["pool", "create", "demo", FAR]);
    assert!(error.contains("carries the label of pool \"demo\""), "{error}");
    place.good(&["pool", "create", "demo", "d0.img", "d1.img", FAR, "--force"]);
    let devices = format!("d0.img,d1.img,{FAR}");
    let error = place.bad(1, &["device", "add", other, "--force", "--devices", &devices]);
    assert!(
        error.contains(&format!("{other} is {FAR} of this pool")),
        "{error}"
    );
    let status = place.good(&["pool", "status", "--devices", &devices]);
    assert!(status.starts_with("pool demo: healthy"), "{status}");
    let error = place.bad(1, &["pool", "status", "--devices", &format!("{devices},{other}")]);
    assert!(error.contains("are the same device"), "{error}");
}

#[test]
fn what_a_server_holds_already_is_not_destroyed_unasked() {
    let Some((place, server)) = place(&["d0.img"]) else {
        return;
    };
    drop(server);
    let mut image = File::options().write(true).open(place.path("far.img")).unwrap();
    image.write_all(b"XFSB").unwrap();
    let _server = serve(&place, "far").unwrap();
    for arguments in [
        vec!["pool", "create", "demo", "d0.img", FAR],
        vec!["pool", "create", "demo", "d0.img", "--spare", FAR],
    ] {
        let error = place.bad(1, &arguments);
        assert!(
            error.contains(&format!("{FAR} carries an XFS file system")),
            "{error}"
        );
    }
    place.good(&["pool", "create", "demo", "d0.img"]);
    let error = place.bad(1, &["device", "add", FAR, "--devices", "d0.img"]);
    assert!(error.contains("carries an XFS file system"), "{error}");
    place.good(&["device", "add", FAR, "--force", "--devices", "d0.img"]);
    let devices = format!("d0.img,{FAR}");
    place.file("d1.img");
    let left = place.good(&["device", "replace", FAR, "d1.img", "--devices", &devices]);
    assert!(left.contains("devices = [\"d0.img\", \"d1.img\"]"), "{left}");
    let left = place.good(&[
        "device",
        "replace",
        "d0.img",
        FAR,
        "--force",
        "--devices",
        "d0.img,d1.img",
    ]);
    assert!(left.contains(FAR), "{left}");
    let shown = place.good(&["pool", "import", FAR, "d1.img"]);
    assert!(shown.contains("pool demo: healthy"), "{shown}");
}

#[test]
fn an_export_that_is_only_read_is_looked_at_and_not_written() {
    let Some((place, server)) = place(&["d0.img"]) else {
        return;
    };
    place.good(&["pool", "create", "demo", FAR]);
    drop(server);
    let socket = place.path("far.sock");
    let _server = Server::qemu(&place.path("far.img"), &socket, &["--read-only"]).unwrap();
    let status = place.good(&["pool", "status", "--devices", FAR]);
    assert!(status.starts_with("pool demo: healthy"), "{status}");
    for arguments in [
        vec!["pool", "create", "other", FAR, "--force"],
        vec!["job", "wait", "--devices", FAR],
    ] {
        let error = place.bad(1, &arguments);
        let expected = format!("cannot open {FAR} for writing: its server lets nobody write");
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn an_export_that_has_become_smaller_is_left_out() {
    let Some((place, server)) = place(&["d0.img", "d1.img"]) else {
        return;
    };
    mirror(&place);
    drop(server);
    let image = File::options().write(true).open(place.path("far.img")).unwrap();
    image.set_len(32 << 20).unwrap();
    let _server = serve(&place, "far").unwrap();
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["state"], "degraded", "{status:#}");
    let notes = status["notes"].to_string();
    assert!(notes.contains(FAR) && notes.contains("33554432"), "{notes}");
    place.pool(&["volume", "delete", "data"]);
}

#[test]
fn a_server_that_claims_more_than_it_has_is_refused_and_one_without_the_export_is_absent() {
    let real = 16 << 20;
    let export = Export {
        size: 1 << 40,
        structured: false,
        ..Export::default()
    };
    let (folder, address) = fake::serve(move |_, stream| {
        fake::handshake(stream, &export)?;
        loop {
            let (request, length) = fake::any_request(stream)?;
            let beyond = request.offset + u64::from(length) > real;
            stream.write_all(&fake::simple(if beyond { 5 } else { 0 }, request.cookie))?;
            if request.command == 0 && !beyond {
                stream.write_all(&vec![0; length as usize])?;
            }
        }
    });
    let place = Place::with_pool(&["d0.img"]);
    let spec = address.to_string();
    let error = place.bad(1, &["pool", "create", "big", "d0.img", &spec, "--force"]);
    let expected = format!("{spec} claims to have 1099511627776 bytes, and its last block cannot be read");
    assert!(error.contains(&expected), "{error}");
    let error = place.bad(1, &["device", "add", &spec, "--force", "--config", "vm.toml"]);
    assert!(error.contains(&expected), "{error}");
    let status = place.pool(&["pool", "status"]);
    assert!(status.starts_with("pool demo: healthy"), "{status}");
    drop(folder);

    let (_folder, address) = fake::serve(|_, stream| {
        fake::greet(stream)?;
        loop {
            let option = fake::option(stream)?;
            fake::answer_option(stream, option, 1 << 31 | 6, &[])?;
        }
    });
    let error = place.bad(1, &["pool", "create", "big", &address.to_string()]);
    assert!(
        error.contains("no such export") && error.contains("correct the address"),
        "{error}"
    );
}

#[test]
fn two_ways_to_one_export_are_one_device() {
    let Some((place, one)) = place(&["d0.img"]) else {
        return;
    };
    let two = serve(&place, "two").unwrap();
    let spec = "multipath:nbd+unix:///?socket=far.sock,nbd+unix:///?socket=two.sock";
    let made = place.good(&["pool", "create", "demo", "d0.img", spec]);
    let (_, lines) = made.split_once("\n\n").unwrap();
    fs::create_dir(place.path("sub")).unwrap();
    // Relative to the file, all of them.
    let lines = lines
        .replace("d0.img", "../d0.img")
        .replace("socket=", "socket=../");
    fs::write(place.path("sub/vm.toml"), lines).unwrap();
    let there = ["--config", "sub/vm.toml"];
    let create = ["volume", "create", "data", "--size", "4M", "--layout", "mirror"];
    place.good(&[&create[..], &there].concat());
    let status = ["pool", "status", "--devices", "d0.img", "--devices", spec];
    assert!(place.good(&status).starts_with("pool demo: healthy"));
    drop(one);
    assert!(place.good(&status).starts_with("pool demo: healthy"));
    let mixed = format!("d0.img,{spec}");
    let error = place.bad(2, &["pool", "status", "--devices", &mixed]);
    assert!(error.contains("a --devices of its own"), "{error}");
    drop(two);
    let error = place.bad(1, &[&["pool", "status"], &there[..]].concat());
    assert!(
        error.contains("1 of 2 devices") && error.contains(&spec.replace("=", "=sub/../")),
        "{error}"
    );
}

#[test]
fn addresses_that_are_none_say_what_one_looks_like() {
    let place = Place::new(&["d0.img"]);
    for (spec, expected) in [
        ("nbd:host", "is no NBD address"),
        ("nbds://host/a", "TLS is not supported"),
        ("multipath:", "no path"),
        ("multipath:d0.img,nbd://", "the host is missing"),
        (
            "nbd+unix:///?socket=gone.sock",
            "start the server, or correct the address",
        ),
    ] {
        let error = place.bad(1, &["pool", "create", "demo", spec]);
        assert!(error.contains(expected), "{spec}: {error}");
    }
}
