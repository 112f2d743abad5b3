//! The commands one by one.

use serde_json::json;

use crate::help::{noise, read, same, with_files, write};

/// Writes to the disk as a guest would, through the file that has its present state.
#[test]
fn a_disk_is_made_kept_changed_and_reverted() {
    let place = with_files();
    place.pool(&["file", "mkdir", "/vm"]);
    assert_eq!(
        place.pool(&["disk", "create", "/vm/root.dsk", "--size", "4M"]),
        "/vm/root.dsk has 4M, thin\n"
    );
    let one = noise(1, 65536);
    write(&place, &["/vm/root.dsk", "--offset", "0"], &one);
    let said = place.pool(&[
        "disk",
        "snapshot",
        "/vm/root.dsk",
        "--name",
        "one",
        "--description",
        "first",
    ]);
    assert_eq!(said, "/vm/root.dsk@one is kept\n");
    let two = noise(2, 65536);
    write(&place, &["/vm/root-1.redo", "--offset", "1M"], &two);
    place.pool(&["disk", "snapshot", "/vm/root.dsk", "--name", "two"]);
    let status = place.json(&["disk", "status", "/vm/root.dsk"]);
    assert_eq!(status["snapshot-list"][0]["description"], "first");
    assert_eq!(status["snapshot-list"][1]["parent"], "one");
    assert_eq!(
        (&status["based-on"], &status["layers"]),
        (&json!("two"), &json!(3))
    );
    assert_eq!(
        place.json(&["disk", "changed", "/vm/root.dsk", "--since", "one"]),
        json!([{"offset": 1 << 20, "length": 65536, "zero": false}])
    );
    assert_eq!(
        place.json(&["disk", "changed", "/vm/root.dsk", "--since", "two"]),
        json!([])
    );

    place.pool(&["disk", "clone", "/vm/root.dsk@one", "/vm/clone.dsk"]);
    place.pool(&["disk", "copy", "/vm/root.dsk@two", "/vm/copy.dsk", "--verify"]);
    place.pool(&[
        "disk",
        "describe",
        "/vm/root.dsk@two",
        "--name",
        "last",
        "--description",
        "x",
    ]);
    place.pool(&["disk", "revert", "/vm/root.dsk@one"]);
    place.pool(&["disk", "delete", "/vm/root.dsk@last"]);
    place.pool(&["disk", "export", "/vm/root.dsk", "root.raw", "--verify"]);
    let mut expected = one.clone();
    expected.resize(4 << 20, 0);
    same(&std::fs::read(place.path("root.raw")).unwrap(), &expected);
    place.pool(&["disk", "delete", "/vm/root.dsk@one"]);
    place.pool(&["disk", "delete", "/vm/root.dsk"]);
    same(&read(&place, &["/vm/clone.dsk"]), &expected);
    expected[1 << 20..(1 << 20) + two.len()].copy_from_slice(&two);
    same(&read(&place, &["/vm/copy.dsk"]), &expected);
    let list = place.json(&["disk", "list"]);
    let paths: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| disk["path"].clone())
        .collect();
    assert_eq!(paths, ["/vm/clone.dsk", "/vm/copy.dsk"]);
    assert_eq!(place.pool(&["file", "list", "/vm"]), "clone.dsk\ncopy.dsk\n");
    assert!(place.pool(&["file", "check"]).contains("all is well"));
}

#[test]
fn snapshots_of_several_disks_are_all_or_none() {
    let place = with_files();
    for path in ["/a.dsk", "/b.dsk"] {
        place.pool(&["disk", "create", path, "--size", "1M"]);
    }
    place.pool(&["disk", "snapshot", "/b.dsk", "--name", "x"]);
    let all = [
        "disk", "snapshot", "/a.dsk", "/b.dsk", "--config", "vm.toml", "--name",
    ];
    let error = place.bad(1, &[&all[..], &["x"]].concat());
    assert!(error.contains("/b.dsk has a snapshot x already"), "{error}");
    assert_eq!(place.json(&["disk", "status", "/a.dsk"])["snapshots"], 0);
    place.good(&[&all[..], &["y"]].concat());
    assert_eq!(place.json(&["disk", "status", "/a.dsk"])["snapshots"], 1);
    assert_eq!(place.json(&["disk", "status", "/b.dsk"])["snapshots"], 2);
}

#[test]
fn a_disk_grows_and_shrinks_only_by_force() {
    let place = with_files();
    place.pool(&["disk", "create", "/a.dsk", "--size", "2M", "--thick"]);
    assert_eq!(place.json(&["disk", "status", "/a.dsk"])["allocated"], 2 << 20);
    place.pool(&["disk", "resize", "/a.dsk", "3M"]);
    assert_eq!(place.json(&["disk", "status", "/a.dsk"])["allocated"], 3 << 20);
    let shrink = ["disk", "resize", "/a.dsk", "1M", "--config", "vm.toml"];
    let error = place.bad(1, &shrink);
    assert!(
        error
            .contains("would lose what lies behind them; make what is in it smaller first, then use --force"),
        "{error}"
    );
    place.pool(&["disk", "resize", "/a.dsk", "1M", "--force"]);
    assert_eq!(place.json(&["disk", "status", "/a.dsk"])["size"], 1 << 20);
}
