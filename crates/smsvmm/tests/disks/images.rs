//! Images come in and go out, and QEMU's tools say that they are the same.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::time::Duration;

use crate::help::{command, noise, same, with_files};
use crate::place::Place;

/// QEMU's tools are asked where they are.
fn has_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        println!("qemu-img is not here (package qemu-utils): not compared with it");
    }
    found
}

fn qemu(place: &Place, arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .current_dir(place.0.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

/// 8 MiB and a bit: data, holes, zeroes, a last sector of its own.
fn sparse(place: &Place, name: &str) -> Vec<u8> {
    let size = (8 << 20) + 512;
    let mut content = vec![0; size];
    let file = File::create(place.path(name)).unwrap();
    file.set_len(size as u64).unwrap();
    for (seed, offset, length) in [
        (1, 0, 100_000),
        (2, 1 << 20, 4096),
        (3, (5 << 20) + 512, 2 << 20),
        (4, size - 512, 512),
    ] {
        let bytes = noise(seed, length);
        content[offset..offset + length].copy_from_slice(&bytes);
        file.write_all_at(&bytes, offset as u64).unwrap();
    }
    file.write_all_at(&[0; 65536], 2 << 20).unwrap();
    content
}

#[test]
fn a_raw_image_comes_back_as_it_was_and_takes_no_more_space() {
    let place = with_files();
    let content = sparse(&place, "in.raw");
    let said = place.pool(&["disk", "import", "in.raw", "/a.dsk", "--verify"]);
    assert!(
        said.starts_with("/a.dsk: 8M raw imported, ") && said.ends_with("is the same\n"),
        "{said}"
    );
    assert!(
        place.json(&["disk", "status", "/a.dsk"])["allocated"]
            .as_u64()
            .unwrap()
            < 3 << 20
    );
    place.pool(&["disk", "export", "/a.dsk", "out.raw", "--verify"]);
    same(&fs::read(place.path("out.raw")).unwrap(), &content);
    assert!(fs::metadata(place.path("out.raw")).unwrap().blocks() * 512 < 3 << 20);
    // Larger than the image, and thick.
    place.pool(&[
        "disk", "import", "in.raw", "/b.dsk", "--size", "10M", "--thick", "--verify",
    ]);
    let status = place.json(&["disk", "status", "/b.dsk"]);
    assert_eq!(
        (status["size"].as_u64(), status["allocated"].as_u64()),
        (Some(10 << 20), Some(10 << 20))
    );
}

#[test]
fn every_kind_of_qcow2_that_qemu_makes_is_read() {
    if !has_qemu() {
        return;
    }
    let place = with_files();
    let content = sparse(&place, "in.raw");
    let kinds: &[&[&str]] = &[
        &["-o", "compat=1.1"],
        &["-o", "compat=0.10"],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=4096"],
        &["-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=2M,compression_type=zstd"],
        &["-o", "extended_l2=on,cluster_size=128k"],
        &["-o", "preallocation=metadata"],
        &["-o", "lazy_refcounts=on"],
        &["-o", "refcount_bits=1"],
        &["-S", "0"],
    ];
    for kind in kinds {
        qemu(
            &place,
            &[
                &["convert", "-f", "raw", "-O", "qcow2"],
                *kind,
                &["in.raw", "in.qcow2"],
            ]
            .concat(),
        );
        let said = place.pool(&["disk", "import", "in.qcow2", "/a.dsk", "--verify"]);
        assert!(said.contains("8M qcow2 imported"), "{kind:?}: {said}");
        place.pool(&["disk", "export", "/a.dsk", "out.raw", "--force"]);
        same(&fs::read(place.path("out.raw")).unwrap(), &content);
        place.pool(&["disk", "delete", "/a.dsk"]);
    }
}

#[test]
fn a_chain_of_images_is_read_if_that_is_wanted() {
    if !has_qemu() {
        return;
    }
    let place = with_files();
    let mut content = sparse(&place, "in.raw");
    fs::create_dir(place.path("below")).unwrap();
    qemu(
        &place,
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-c",
            "in.raw",
            "below/base.qcow2",
        ],
    );
    qemu(
        &place,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "below/base.qcow2",
            "mid.qcow2",
        ],
    );
    qemu(
        &place,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "mid.qcow2",
            "-o",
            "extended_l2=on",
            "top.qcow2",
            "9M",
        ],
    );
    let write = |image: &str, command: &str| {
        let output = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", command, image])
            .current_dir(place.0.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    write("mid.qcow2", "write -P 17 4096 8192");
    write("mid.qcow2", "write -z 1M 64k");
    write("top.qcow2", "write -P 18 8192 2048");
    write("top.qcow2", "discard 5M 64k");
    content[4096..4096 + 8192].fill(17);
    content[1 << 20..(1 << 20) + 65536].fill(0);
    content[8192..8192 + 2048].fill(18);
    content[5 << 20..(5 << 20) + 65536].fill(0);
    content.resize(9 << 20, 0);
    let import = [
        "disk",
        "import",
        "top.qcow2",
        "/a.dsk",
        "--verify",
        "--config",
        "vm.toml",
    ];
    let error = place.bad(1, &import);
    assert!(
        error.contains("top.qcow2 is built on another image, \"mid.qcow2\"; use --backing, if you trust it"),
        "{error}"
    );
    place.good(&[&import[..], &["--backing"]].concat());
    place.pool(&["disk", "export", "/a.dsk", "out.raw"]);
    same(&fs::read(place.path("out.raw")).unwrap(), &content);
    qemu(
        &place,
        &["compare", "-f", "raw", "-F", "qcow2", "out.raw", "top.qcow2"],
    );
}

#[test]
fn what_is_exported_as_qcow2_is_what_qemu_wants() {
    let place = with_files();
    let content = sparse(&place, "in.raw");
    place.pool(&["disk", "import", "in.raw", "/a.dsk"]);
    place.pool(&["disk", "create", "/empty.dsk", "--size", "4T"]);
    let said = place.pool(&["disk", "export", "/a.dsk", "out.qcow2", "--verify"]);
    assert!(said.contains("8M qcow2 exported"), "{said}");
    place.pool(&[
        "disk",
        "export",
        "/empty.dsk",
        "empty",
        "--format",
        "qcow2",
        "--verify",
    ]);
    // What was exported can be imported.
    place.pool(&["disk", "import", "out.qcow2", "/b.dsk", "--verify"]);
    place.pool(&["disk", "export", "/b.dsk", "out.raw"]);
    same(&fs::read(place.path("out.raw")).unwrap(), &content);
    assert!(fs::metadata(place.path("out.qcow2")).unwrap().len() < 4 << 20);
    if has_qemu() {
        for image in ["out.qcow2", "empty"] {
            let said = qemu(&place, &["check", "-f", "qcow2", image]);
            assert!(said.contains("No errors were found"), "{said}");
        }
        qemu(
            &place,
            &["compare", "-f", "raw", "-F", "qcow2", "in.raw", "out.qcow2"],
        );
        let info = qemu(&place, &["info", "--output=json", "empty"]);
        assert!(
            info.contains(&format!("\"virtual-size\": {}", 4_u64 << 40)),
            "{info}"
        );
    }
}

#[test]
fn who_breaks_off_leaves_nothing_half_done() {
    let place = with_files();
    // As much as the pool cannot take in at once.
    let image = File::create(place.path("in.raw")).unwrap();
    for piece in 0..24 {
        image.write_all_at(&noise(piece, 1 << 20), piece << 20).unwrap();
    }
    let interrupt = |arguments: &[&str]| {
        let child = command(&place, arguments).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(60));
        let id = child.id() as i32;
        // SAFETY: a signal to a child of ours, which was not waited for.
        unsafe { libc::kill(id, libc::SIGINT) };
        child.wait_with_output().unwrap()
    };
    let mut broken_off = 0;
    for _ in 0..6 {
        let output = interrupt(&["disk", "import", "in.raw", "/a.dsk", "--verify"]);
        if !output.status.success() {
            broken_off += 1;
            assert_eq!(place.pool(&["file", "list"]), "");
        } else {
            place.pool(&["disk", "delete", "/a.dsk"]);
        }
    }
    place.pool(&["disk", "import", "in.raw", "/a.dsk"]);
    for _ in 0..6 {
        let output = interrupt(&["disk", "export", "/a.dsk", "out.raw", "--verify"]);
        let left = |name: &str| place.path(name).exists();
        if !output.status.success() {
            broken_off += 1;
            assert!(!left("out.raw"));
        } else {
            fs::remove_file(place.path("out.raw")).unwrap();
        }
        let parts = fs::read_dir(place.0.path()).unwrap().flatten();
        assert_eq!(
            parts
                .filter(|entry| entry.file_name().to_string_lossy().contains(".part"))
                .count(),
            0
        );
    }
    assert!(
        broken_off > 0,
        "nothing was broken off: the machine is too fast for this test"
    );
    assert!(place.pool(&["file", "check"]).contains("all is well"));
}

#[test]
fn an_import_that_is_killed_can_be_done_again() {
    let place = with_files();
    let image = File::create(place.path("in.raw")).unwrap();
    let content: Vec<u8> = (0..16).flat_map(|piece| noise(piece, 1 << 20)).collect();
    image.write_all_at(&content, 0).unwrap();
    let mut killed = 0;
    for round in 0..5 {
        let mut child = command(&place, &["disk", "import", "in.raw", "/a.dsk"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(30 + 20 * round));
        child.kill().unwrap();
        killed += usize::from(!child.wait().unwrap().success());
        let left = place.pool(&["file", "list"]);
        // Whatever is there by that name is whole.
        if left.lines().any(|name| name == "a.dsk") {
            place.pool(&["disk", "export", "/a.dsk", "out.raw", "--force"]);
            same(&fs::read(place.path("out.raw")).unwrap(), &content);
            place.pool(&["disk", "delete", "/a.dsk"]);
        }
    }
    assert!(
        killed > 0,
        "nothing was killed: the machine is too fast for this test"
    );
    place.pool(&["disk", "import", "in.raw", "/a.dsk", "--verify"]);
    assert_eq!(place.pool(&["file", "list"]), "a.dsk\n");
    assert!(place.pool(&["file", "check"]).contains("all is well"));
}
