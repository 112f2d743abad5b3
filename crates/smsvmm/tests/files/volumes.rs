//! Volumes that join the file system, grow in it, and leave it.

use crate::help::{noise, read, same, try_write, with_files, write};
use crate::place::{Place, text};

#[test]
fn metadata_are_on_three_devices_and_their_volume_is_kept() {
    let place = with_files();
    let status = place.json(&["volume", "status", "fs-meta"]);
    assert_eq!(status["size"], 16 << 20);
    assert_eq!(status["shape"]["copies"], 3);
    let error = place.bad(1, &["volume", "delete", "fs-meta", "--config", "vm.toml"]);
    assert!(
        error.contains("volume fs-meta holds the metadata of all files"),
        "{error}"
    );
    let made = [
        "volume", "create", "fs-meta", "--size", "1M", "--layout", "concat",
    ];
    let error = place.bad(1, &[&made[..], &["--config", "vm.toml"]].concat());
    assert!(error.contains("`smsvmm file format`"), "{error}");
    place.pool(&["volume", "resize", "fs-meta", "--size", "24M"]);
    let files = place.json(&["pool", "status"])["files"].clone();
    assert_eq!(files["meta-size"], 24 << 20);
    let shrink = [
        "volume", "resize", "fs-meta", "--size", "16M", "--shrink", "--config", "vm.toml",
    ];
    assert!(place.bad(1, &shrink).contains("fs-meta cannot become smaller"));
    assert!(place.pool(&["file", "check"]).contains("all is well"));
    let status = place.pool(&["pool", "status"]);
    assert!(status.contains("files have 0 of 48M, metadata"), "{status}");
    assert!(place.pool(&["volume", "list"]).contains("FILES"));
}

#[test]
fn a_volume_joins_by_itself_unless_it_is_raw() {
    let place = Place::with_pool(&["d0.img", "d1.img"]);
    let made = place.pool(&["file", "format", "--meta-size", "4M", "--meta-copies", "1"]);
    assert!(
        made.contains("4M for metadata") && made.contains("no volume for data yet"),
        "{made}"
    );
    let output = try_write(&place, &["/a"], b"a");
    assert!(
        text(&output).1.contains("no space left on all volumes"),
        "{output:?}"
    );
    let create = |name: &str, more: &[&str]| {
        place.pool(
            &[
                &["volume", "create", name, "--size", "8M", "--layout", "concat"],
                more,
            ]
            .concat(),
        )
    };
    create("raw", &["--raw"]);
    assert_eq!(
        place.json(&["pool", "status"])["files"]["volumes"],
        serde_json::json!([])
    );
    create("data", &[]);
    write(&place, &["/a"], &noise(1, 4 << 20));
    let volumes = &place.json(&["pool", "status"])["files"]["volumes"];
    assert_eq!(
        (&volumes[0]["name"], &volumes[0]["free"]),
        (&"data".into(), &(4 << 20).into())
    );
    place.pool(&["volume", "delete", "raw"]);
    place.pool(&["volume", "resize", "data", "--size", "16M"]);
    assert_eq!(place.json(&["pool", "status"])["files"]["size"], 16 << 20);
    let shrink = [
        "volume", "resize", "data", "--size", "8M", "--shrink", "--config", "vm.toml",
    ];
    let error = place.bad(1, &shrink);
    assert!(error.contains("`smsvmm file drain data`"), "{error}");
}

#[test]
fn a_volume_is_emptied_and_leaves() {
    let place = with_files();
    let content = noise(2, 6 << 20);
    write(&place, &["/a"], &content);
    place.pool(&["file", "snapshot", "/a", "/b"]);
    place.pool(&["file", "delete", "/a"]);
    let first = place.json(&["pool", "status"])["files"]["volumes"][0]["free"].clone();
    assert_eq!(first, 26 << 20);
    let error = place.bad(1, &["volume", "delete", "data", "--config", "vm.toml"]);
    assert!(
        error.contains("files have 6M on it; `smsvmm file drain data` moves them"),
        "{error}"
    );
    let said = place.pool(&["file", "drain", "data"]);
    assert!(
        said.contains("6M moved") && said.contains("`smsvmm volume delete data`"),
        "{said}"
    );
    assert!(place.pool(&["volume", "list"]).contains("0, draining"));
    place.pool(&["volume", "delete", "data"]);
    same(&read(&place, &["/b"]), &content);
    assert!(place.pool(&["file", "check"]).contains("all is well"));
}

#[test]
fn a_full_volume_refuses_and_keeps_nothing_half_written() {
    let place = with_files();
    let small = noise(3, 1 << 20);
    write(&place, &["/small"], &small);
    let output = try_write(&place, &["/large"], &noise(4, 60 << 20));
    let error = text(&output).1;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.contains("/large: no space left on all volumes") && error.contains("`smsvmm volume list`"),
        "{error}"
    );
    assert_eq!(place.pool(&["file", "list"]), "small\n");
    same(&read(&place, &["/small"]), &small);
    let free = place.json(&["pool", "status"])["files"]["free"].as_u64().unwrap();
    assert_eq!(free, 47 << 20);
    write(&place, &["/fits"], &noise(5, 8 << 20));
}

#[test]
fn what_volumes_carry_is_not_destroyed_unasked() {
    let place = Place::with_pool(&["d0.img", "d1.img"]);
    place.pool(&["volume", "create", "old", "--size", "8M", "--layout", "concat"]);
    place.pool(&["file", "format", "--meta-size", "4M"]);
    write(&place, &["/a"], &noise(6, 1 << 20));
    let error = place.bad(1, &["file", "format", "--config", "vm.toml"]);
    assert!(error.contains("--force destroys it"), "{error}");
    place.pool(&["file", "format", "--force"]);
    assert_eq!(place.pool(&["file", "list"]), "");
    let error = place.bad(
        1,
        &[
            "file",
            "format",
            "--force",
            "--meta-size",
            "8M",
            "--config",
            "vm.toml",
        ],
    );
    assert!(error.contains("fs-meta is there already"), "{error}");
}
