//! The commands one by one.

use serde_json::json;

use crate::help::{noise, read, same, try_write, with_files, write};
use crate::place::{Place, text};

#[test]
fn what_is_written_is_read_again() {
    let place = with_files();
    place.pool(&["file", "mkdir", "/vm"]);
    let content = noise(1, 5 << 20);
    let said = write(&place, &["/vm/a.dsk"], &content);
    assert!(
        said.contains("/vm/a.dsk: 5M written; it has 5M, 5M allocated"),
        "{said}"
    );
    same(&read(&place, &["/vm/a.dsk"]), &content);
    same(
        &read(&place, &["/vm/a.dsk", "--offset", "1000", "--length", "3M"]),
        &content[1000..1000 + (3 << 20)],
    );

    place.pool(&["file", "move", "/vm/a.dsk", "/"]);
    assert_eq!(place.pool(&["file", "list", "-r"]), "/a.dsk\n/vm/\n");
    same(&read(&place, &["/a.dsk"]), &content);
    place.pool(&["file", "move", "/a.dsk", "/vm/b.dsk"]);
    place.pool(&["file", "delete", "/vm/b.dsk"]);
    place.pool(&["file", "delete", "/vm"]);
    assert_eq!(place.pool(&["file", "list"]), "");
    assert_eq!(place.json(&["pool", "status"])["files"]["free"], 48 << 20);
}

#[test]
fn zeroes_take_no_space_and_the_rest_of_a_file_stays() {
    let place = with_files();
    let mut content = vec![0; 8 << 20];
    content[1 << 20..2 << 20].copy_from_slice(&noise(2, 1 << 20));
    let said = write(&place, &["/a"], &content);
    assert!(
        said.contains("7M of them zeroes that take no space; it has 8M, 1M allocated"),
        "{said}"
    );
    same(&read(&place, &["/a"]), &content);

    // In the middle, and beyond the end; a last sector that is not full keeps what it had.
    let piece = noise(3, 1000);
    write(&place, &["/a", "--offset", "1M"], &piece);
    content[1 << 20..(1 << 20) + 1000].copy_from_slice(&piece);
    same(&read(&place, &["/a"]), &content);
    write(&place, &["/a", "--offset", "9M"], &piece);
    content.resize(9 << 20, 0);
    content.extend(&piece);
    content.resize((9 << 20) + 1024, 0);
    same(&read(&place, &["/a"]), &content);
    // Zeroes over data.
    write(&place, &["/a", "--offset", "1M"], &vec![0; 1 << 20]);
    content[1 << 20..2 << 20].fill(0);
    same(&read(&place, &["/a"]), &content);
    assert!(place.json(&["file", "stat", "/a"])["allocated"].as_u64().unwrap() <= 128 << 10);

    // Without an offset the file becomes what is written.
    write(&place, &["/a"], &piece);
    same(&read(&place, &["/a"]), &[&piece[..], &[0; 24]].concat());
    write(&place, &["/a", "--size", "4M"], &piece);
    assert_eq!(place.json(&["file", "stat", "/a"])["size"], 4 << 20);
    let output = try_write(&place, &["/a", "--size", "512"], &piece);
    assert!(
        text(&output).1.contains("there is more than the 512 bytes"),
        "{output:?}"
    );
}

#[test]
fn a_thick_file_has_its_space_at_once() {
    let place = with_files();
    write(&place, &["/thick", "--thick", "--size", "4M"], b"");
    let stat = place.json(&["file", "stat", "/thick"]);
    assert_eq!(
        (&stat["allocated"], &stat["attributes"]["thick"]),
        (&json!(4 << 20), &json!(true))
    );
    let output = try_write(&place, &["/thick", "--thick"], b"");
    assert!(text(&output).1.contains("--thick is for new files"), "{output:?}");
}

#[test]
fn layers_are_made_and_merged() {
    let place = with_files();
    let base = noise(4, 2 << 20);
    write(&place, &["/base"], &base);
    place.pool(&["file", "snapshot", "/base", "/layer"]);
    let change = noise(5, 8192);
    write(&place, &["/layer", "--offset", "4096"], &change);
    let mut changed = base.clone();
    changed[4096..4096 + 8192].copy_from_slice(&change);
    same(&read(&place, &["/layer"]), &changed);
    same(&read(&place, &["/base"]), &base);
    let output = try_write(&place, &["/base"], b"x");
    assert!(text(&output).1.contains("/base is frozen"), "{output:?}");

    place.pool(&["file", "clone", "/base", "/clone"]);
    let stat = place.json(&["file", "stat", "/base"]);
    assert_eq!(stat["children"], json!(["/clone", "/layer"]));
    assert_eq!(
        (&stat["frozen"], &stat["shared"]),
        (&json!(true), &json!(2 << 20))
    );
    assert_eq!(place.json(&["file", "stat", "/layer"])["parent"], "/base");
    let error = place.bad(1, &["file", "merge", "/layer", "--config", "vm.toml"]);
    assert!(error.contains("1 other files depend on it"), "{error}");

    place.pool(&["file", "delete", "/clone"]);
    place.pool(&["file", "merge", "/layer", "--into-parent-name"]);
    assert_eq!(place.pool(&["file", "list"]), "base\n");
    same(&read(&place, &["/base"]), &changed);
    let stat = place.json(&["file", "stat", "/base"]);
    assert_eq!((&stat["frozen"], &stat["children"]), (&json!(false), &json!([])));
}

#[test]
fn attributes_say_where_data_are_and_data_move_there() {
    let place = with_files();
    place.pool(&["file", "mkdir", "/safe", "--volume", "more", "--checksums", "yes"]);
    let content = noise(6, 1 << 20);
    write(&place, &["/safe/a"], &content);
    let stat = place.json(&["file", "stat", "/safe/a"]);
    assert_eq!(stat["attributes"]["target"], json!({"volume": "more"}));
    assert_eq!(stat["attributes"]["checksums"], true);
    assert_eq!(stat["volumes"], json!([{"volume": "more", "bytes": 1 << 20}]));

    let said = place.pool(&["file", "set-attributes", "/safe/a", "--volume", "data"]);
    assert!(said.contains("`smsvmm file relocate /safe/a`"), "{said}");
    assert_eq!(place.pool(&["file", "relocate", "/safe/a"]), "1 file: 1M moved\n");
    let extents = place.json(&["file", "extents", "/safe/a"]);
    assert_eq!(extents[0]["volume"], "data");
    assert_eq!(extents[0]["length"], 1 << 20);
    same(&read(&place, &["/safe/a"]), &content);
    place.pool(&["file", "relocate", "/safe", "--anywhere"]);
    assert_eq!(
        place.pool(&["file", "defragment"]),
        "1 file: nothing had to be moved\n"
    );

    place.pool(&["file", "resize", "/safe/a", "2M"]);
    let error = place.bad(1, &["file", "resize", "/safe/a", "1M", "--config", "vm.toml"]);
    assert!(error.contains("--shrink"), "{error}");
    place.pool(&["file", "resize", "/safe/a", "512K", "--shrink"]);
    same(&read(&place, &["/safe/a"]), &content[..512 << 10]);

    place.pool(&["file", "set-attributes", "/safe/a", "--frozen", "yes"]);
    let output = try_write(&place, &["/safe/a"], b"x");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    place.pool(&["file", "set-attributes", "/safe/a", "--frozen", "no"]);
    write(&place, &["/safe/a"], b"x");
}

#[test]
fn a_list_is_a_table_or_json() {
    let place = with_files();
    place.pool(&["file", "mkdir", "-p", "/a/b/c"]);
    place.pool(&["file", "mkdir", "-p", "/a/b/c"]);
    write(&place, &["/a/file"], &noise(7, 512));
    assert_eq!(place.pool(&["file", "list", "/a"]), "b/\nfile\n");
    let table = place.pool(&["file", "list", "-l", "/a"]);
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["KIND", "SIZE", "ALLOCATED", "MADE", "STATE", "NAME"]);
    assert_eq!((lines[1][0], lines[1][1], lines[1][6]), ("directory", "1", "b/"));
    assert_eq!(
        (lines[2][0], lines[2][1], lines[2][2], lines[2][6]),
        ("file", "512", "64K", "file")
    );
    let mut json = place.json(&["file", "list", "/a"]);
    json[1]["created"] = json!(0);
    assert_eq!(
        json[1],
        json!({"path": "/a/file", "kind": "file", "size": 512, "allocated": 65536, "created": 0, "frozen": false, "layer": false})
    );
    let made = place.json(&["file", "mkdir", "/d"]);
    assert_eq!(
        made,
        json!({"answer": "done", "events": [], "interrupted": false})
    );
    let before = std::fs::read(place.path("d0.img")).unwrap();
    place.json(&["file", "list", "-r", "/"]);
    assert!(
        before == std::fs::read(place.path("d0.img")).unwrap(),
        "looking changes nothing"
    );
}

#[test]
fn wrong_usage_ends_with_2_and_failures_with_1() {
    let place = with_files();
    write(&place, &["/a"], b"a");
    place.pool(&["file", "mkdir", "/d"]);
    write(&place, &["/d/b"], b"b");
    let config = ["--config", "vm.toml"];
    let cases: &[(i32, &[&str], &str)] = &[
        (
            2,
            &["stat", "a"],
            "paths in the pool's file system begin with /: /a",
        ),
        (2, &["write", "/a", "--size", "1X"], "`1X` is not a size"),
        (
            2,
            &["relocate", "/a", "--volume", "data", "--anywhere"],
            "cannot be used with",
        ),
        (2, &["format", "--meta-copies", "9"], "9"),
        (
            1,
            &["read", "/nope"],
            "/nope: no such file or directory; `smsvmm file list -r /`",
        ),
        (1, &["read", "/d"], "/d is a directory"),
        (1, &["read", "/a", "--offset", "1M"], "/a has 512 bytes"),
        (1, &["list", "/a/b"], "/a/b is not a directory"),
        (1, &["mkdir", "/d"], "/d exists already"),
        (1, &["move", "/a", "/d/b"], "/d/b exists already"),
        (
            1,
            &["move", "/d", "/d"],
            "a directory cannot be moved into itself",
        ),
        (
            1,
            &["delete", "/d"],
            "/d is not empty: delete or move what is in it first; or use --recursive",
        ),
        (1, &["write", "/a", "--offset", "100"], "sectors of 512 bytes"),
        (
            1,
            &["set-attributes", "/a", "--volume", "nope"],
            "has no volume nope; it has data, more",
        ),
        (
            1,
            &["set-attributes", "/a", "--volume", "fs-meta"],
            "fs-meta is for metadata",
        ),
        (
            1,
            &["set-attributes", "/a", "--class", "ssd"],
            "no volume of class ssd",
        ),
        (1, &["merge", "/a"], "/a: has no parent to absorb"),
        (1, &["clone", "/a", "/c"], "make a snapshot of it first"),
        (1, &["format"], "pool demo has a file system"),
        (1, &["drain", "nope"], "has no volume nope"),
    ];
    for (status, arguments, expected) in cases {
        let error = place.bad(*status, &[&["file"], *arguments, &config].concat());
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    assert_eq!(place.pool(&["file", "list", "-r"]), "/a\n/d/\n/d/b\n");
}

#[test]
fn a_pool_without_a_file_system_says_so() {
    let place = Place::with_pool(&["d0.img"]);
    for arguments in [&["list"][..], &["read", "/a"], &["write", "/a"], &["check"]] {
        let error = place.bad(1, &[&["file"], arguments, &["--config", "vm.toml"]].concat());
        assert!(
            error.contains("pool demo has no file system; `smsvmm file format` makes one"),
            "{arguments:?}: {error}"
        );
    }
    assert!(!place.pool(&["pool", "status"]).contains("files have"));
}
