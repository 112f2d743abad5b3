//! What is said to mistakes: which object, what is wrong, what to do.

use std::fs::{self, File};

use crate::help::{noise, with_files};

#[test]
fn mistakes_are_told_with_object_reason_and_remedy() {
    let place = with_files();
    place.pool(&["disk", "create", "/a.dsk", "--size", "1M"]);
    place.pool(&["disk", "snapshot", "/a.dsk", "--name", "one"]);
    place.pool(&["file", "mkdir", "/dir.dsk"]);
    place.file("large.raw");
    fs::write(place.path("short.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    fs::write(place.path("no.qcow2"), noise(1, 4096)).unwrap();
    fs::write(place.path("there.raw"), b"x").unwrap();
    let mut header = vec![0; 65536 * 4];
    header[..4].copy_from_slice(b"QFI\xfb");
    header[7] = 3;
    header[23] = 16;
    header[29] = 16;
    header[39] = 1;
    header[45] = 4;
    header[103] = 104;
    fs::write(place.path("cut.qcow2"), &header).unwrap();
    header[35] = 2;
    fs::write(place.path("secret.qcow2"), &header).unwrap();
    let table: &[(i32, &[&str], &str)] = &[
        (
            2,
            &["create", "a.dsk", "--size", "1M"],
            "paths in the pool's file system begin with /",
        ),
        (2, &["create", "/b.dsk"], "--size"),
        (
            1,
            &["create", "/b", "--size", "1M"],
            "/b: the name of a disk ends with .dsk",
        ),
        (
            1,
            &["create", "/.dsk", "--size", "1M"],
            "there is nothing before .dsk",
        ),
        (
            1,
            &["create", "/a.dsk", "--size", "1M"],
            "/a.dsk exists already; take another name",
        ),
        (
            1,
            &["create", "/no/b.dsk", "--size", "1M"],
            "/no: no such file or directory",
        ),
        (1, &["create", "/b.dsk", "--size", "1000"], "a multiple of 512"),
        (
            1,
            &["create", "/b.dsk", "--size", "1G", "--thick"],
            "no space left on",
        ),
        (
            1,
            &["create", "/b.dsk", "--size", "1M", "--volume", "none"],
            "the file system has no volume none",
        ),
        (
            1,
            &["status", "/b.dsk"],
            "there is no disk /b.dsk; `smsvmm disk list` shows what there is",
        ),
        (1, &["status", "/dir.dsk"], "/dir.dsk is a directory"),
        (1, &["delete", "/b.dsk"], "there is no disk /b.dsk"),
        (
            1,
            &["delete", "/a.dsk@two"],
            "/a.dsk has no snapshot two; `smsvmm disk status /a.dsk` shows them",
        ),
        (1, &["revert", "/a.dsk@two"], "/a.dsk has no snapshot two"),
        (
            1,
            &["revert", "/a.dsk"],
            "/a.dsk names no snapshot; give it as /a.dsk@NAME",
        ),
        (
            1,
            &["snapshot", "/a.dsk", "--name", "one"],
            "/a.dsk has a snapshot one already; take another name, or delete it",
        ),
        (
            1,
            &["snapshot", "/a.dsk", "--name", "a b"],
            "the name of a snapshot has no spaces",
        ),
        (2, &["snapshot", "/a.dsk"], "--name"),
        (1, &["clone", "/a.dsk@one", "/a.dsk"], "/a.dsk exists already"),
        (1, &["clone", "/a.dsk@x", "/b.dsk"], "has no snapshot x"),
        (1, &["commit", "/a.dsk"], "/a.dsk has no redo layer"),
        (1, &["discard", "/a.dsk"], "/a.dsk has no redo layer"),
        (1, &["changed", "/a.dsk", "--since", "x"], "has no snapshot x"),
        (1, &["import", "none.raw", "/b.dsk"], "cannot open none.raw"),
        (1, &["import", ".", "/b.dsk"], ". is a directory, not an image"),
        (1, &["import", "there.raw", "/a.dsk"], "/a.dsk exists already"),
        (
            1,
            &["import", "large.raw", "/b.dsk", "--size", "1M"],
            "large.raw has 67108864 bytes, more than the 1048576 of --size",
        ),
        (
            1,
            &["import", "no.qcow2", "/b.dsk", "--format", "qcow2"],
            "no.qcow2: it is not a qcow2 image",
        ),
        (
            1,
            &["import", "short.qcow2", "/b.dsk"],
            "short.qcow2: the image is damaged: its header ends too early: it is truncated",
        ),
        (
            1,
            &["import", "cut.qcow2", "/b.dsk"],
            "its first table lies behind its end: it is truncated",
        ),
        (
            1,
            &["import", "secret.qcow2", "/b.dsk"],
            "secret.qcow2: it is encrypted",
        ),
        (
            1,
            &["export", "/a.dsk", "there.raw"],
            "there.raw exists already; take another name, or use --force",
        ),
        (1, &["export", "/a.dsk", "."], "is no file that could be replaced"),
        (1, &["export", "/a.dsk", "none/x.raw"], "cannot make none/.x.raw."),
        (1, &["export", "/a.dsk@x", "x.raw"], "has no snapshot x"),
        (1, &["copy", "/a.dsk", "/a.dsk"], "/a.dsk exists already"),
    ];
    for (status, arguments, words) in table {
        let error = place.bad(
            *status,
            &[&["disk"], *arguments, &["--config", "vm.toml"]].concat(),
        );
        assert!(error.contains(words), "{arguments:?}: {error}");
        // Warnings may come before it.
        let lines = error.lines().filter(|line| !line.contains(" WARN ")).count();
        assert!(
            *status == 2 || lines == 1,
            "{arguments:?}: {lines} lines: {error}"
        );
    }
    let left = place.pool(&["file", "list", "/"]);
    assert_eq!(left, "a-1.redo\na.disk\na.dsk\ndir.dsk/\n");
    assert!(!place.path("x.raw").exists());
}

#[test]
fn an_import_that_finds_no_space_leaves_nothing() {
    let place = with_files();
    let image = File::create(place.path("in.raw")).unwrap();
    let content = noise(1, 1 << 20);
    for piece in 0..60_u64 {
        std::os::unix::fs::FileExt::write_all_at(&image, &content, piece << 20).unwrap();
    }
    let error = place.bad(1, &["disk", "import", "in.raw", "/a.dsk", "--config", "vm.toml"]);
    assert!(error.contains("/a.dsk: no space left on"), "{error}");
    assert_eq!(place.pool(&["file", "list"]), "");
    assert_eq!(place.json(&["pool", "status"])["files"]["free"], 48 << 20);
}

#[test]
fn a_damaged_descriptor_is_named_and_harms_no_other_disk() {
    let place = with_files();
    for path in ["/a.dsk", "/b.dsk"] {
        place.pool(&["disk", "create", path, "--size", "1M"]);
        place.pool(&["disk", "snapshot", path, "--name", "one"]);
    }
    crate::help::write(&place, &["/a.disk", "--offset", "0"], &noise(1, 1 << 20));
    let error = place.bad(1, &["disk", "status", "/a.dsk", "--config", "vm.toml"]);
    assert!(
        error.contains("/a.disk does not describe /a.dsk: it is no descriptor of a disk"),
        "{error}"
    );
    let list = place.pool(&["disk", "list"]);
    assert!(
        list.contains("does not describe") && list.contains("/b.dsk"),
        "{list}"
    );
    // The descriptor of another disk.
    place.pool(&["file", "delete", "/a.disk"]);
    place.pool(&["file", "move", "/b.disk", "/a.disk"]);
    let error = place.bad(1, &["disk", "status", "/a.dsk", "--config", "vm.toml"]);
    assert!(error.contains("the file of that name is another one"), "{error}");
}
