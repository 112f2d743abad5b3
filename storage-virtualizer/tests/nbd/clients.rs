//! The clients that people have.

use std::fs;

use block_io::ListenAddress;

use crate::disk::{Disk, Scripted, Shared};
use crate::tools::{nbdsh, succeed};
use crate::{Served, file, pattern};

const MIB: usize = 1 << 20;

#[test]
fn nbdinfo_sees_what_the_export_can_do() {
    let served = Served::file(16 << 20, |_| {});
    let Some(text) = succeed("nbdinfo", &["--json", &served.uri("disk")]) else {
        return;
    };
    for expected in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 16777216",
        "\"is_read_only\": false",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn nbdinfo_lists_exports_and_the_map_of_a_sparse_file() {
    let served = Served::start(
        |_| {},
        |folder| {
            vec![
                file(&folder.join("image"), "disk", 4 << 20, false),
                file(&folder.join("other"), "other", 1 << 20, true),
            ]
        },
    );
    let mut bytes = fs::read(served.image()).unwrap();
    bytes[MIB..2 * MIB].copy_from_slice(&pattern(MIB, 1));
    // Written in its place: the rest stays a hole.
    std::os::unix::fs::FileExt::write_all_at(
        &fs::File::options().write(true).open(served.image()).unwrap(),
        &bytes[MIB..2 * MIB],
        MIB as u64,
    )
    .unwrap();
    let Some(text) = succeed("nbdinfo", &["--list", "--json", &served.uri("")]) else {
        return;
    };
    assert!(
        text.contains("\"export-name\": \"disk\"") && text.contains("\"export-name\": \"other\""),
        "{text}"
    );
    assert!(text.contains("\"is_read_only\": true"), "{text}");
    let map = succeed("nbdinfo", &["--map", &served.uri("disk")]).unwrap();
    let lines: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0][..3], ["0", "1048576", "3"], "{map}");
    assert_eq!(lines[1][..3], ["1048576", "1048576", "0"], "{map}");
    assert_eq!(lines[2][..3], ["2097152", "2097152", "3"], "{map}");
}

#[test]
fn nbdcopy_copies_there_and_back_over_several_connections() {
    let served = Served::file(32 << 20, |_| {});
    let (source, target) = (served.path("source"), served.path("target"));
    let mut bytes = pattern(32 * MIB, 2);
    bytes[5 * MIB..9 * MIB].fill(0);
    fs::write(&source, &bytes).unwrap();
    let arguments = [
        "--connections=4",
        "--requests=64",
        "--flush",
        source.to_str().unwrap(),
        &served.uri("disk"),
    ];
    if succeed("nbdcopy", &arguments).is_none() {
        return;
    }
    assert!(fs::read(served.image()).unwrap() == bytes, "the image differs");
    succeed(
        "nbdcopy",
        &["--connections=4", &served.uri("disk"), target.to_str().unwrap()],
    );
    assert!(fs::read(target).unwrap() == bytes, "the copy differs");
}

#[test]
fn nbdsh_reads_writes_and_is_told_of_mistakes() {
    let served = Served::file(4 << 20, |_| {});
    let script = format!(
        r#"
h.add_meta_context("base:allocation")
h.connect_uri("{uri}")
assert h.get_size() == 4 << 20
data = bytes(range(256)) * 256
h.pwrite(data, 65536, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 65536) == data
chunks = []
def chunk(part, offset, kind, error):
    chunks.append((offset, len(part), kind))
assert h.pread_structured(65536, 65536, chunk, nbd.CMD_FLAG_DF) == data
assert chunks == [(65536, 65536, nbd.READ_DATA)], chunks
h.flush()
h.zero(4096, 65536, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 65536) == bytes(4096)
h.zero(4096, 69632, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
assert h.pread(4096, 69632) == bytes(4096)
h.trim(4096, 77824, nbd.CMD_FLAG_FUA)
extents = []
def status(context, offset, entries, error):
    assert context == "base:allocation"
    extents.extend(entries)
h.block_status(4 << 20, 0, status)
flags = {{}}
at = 0
for length, flag in zip(extents[::2], extents[1::2]):
    for block in range(at, at + length, 4096):
        flags[block] = flag
    at += length
# What was zeroed may have kept its space: that is the host's file system to say. What was trimmed is a hole.
zeroes = set(range(65536, 73728, 4096))
data = {{73728}} | set(range(81920, 131072, 4096))
for block, flag in flags.items():
    assert flag == 0 if block in data else block in zeroes or flag == 3, (block, flag)
assert sum(extents[::2]) == 4 << 20, extents
extents = []
h.block_status(4 << 20, 0, status, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 2, extents
h.set_strict_mode(0)
def fails(expected, f, *arguments):
    try:
        f(*arguments)
    except nbd.Error as error:
        assert error.errnum == expected, error
        return str(error)
    raise AssertionError("did not fail")
import errno
fails(errno.EINVAL, h.pread, 512, 4 << 20)
fails(errno.EINVAL, h.pread, 512, 1)
fails(errno.ENOSPC, h.pwrite, bytes(1024), (4 << 20) - 512)
fails(errno.EINVAL, h.cache, 512, 0)
fails(errno.EINVAL, h.pread, 512, 0, 1 << 9)
# Several in flight, in one go.
cookies = [h.aio_pread(nbd.Buffer(65536), i * 65536) for i in range(64)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.shutdown()
print("well")
"#,
        uri = served.uri("disk")
    );
    if let Some(text) = nbdsh(&script) {
        assert_eq!(text.trim(), "well");
    }
}

#[test]
fn qemu_converts_compares_and_writes_with_extended_headers() {
    let served = Served::file(16 << 20, |_| {});
    let source = served.path("source");
    let mut bytes = pattern(16 * MIB, 3);
    bytes[MIB..3 * MIB].fill(0);
    fs::write(&source, &bytes).unwrap();
    let (source, uri) = (source.to_str().unwrap().to_owned(), served.uri("disk"));
    let arguments = ["convert", "-n", "-f", "raw", "-O", "raw", &source, &uri];
    if succeed("qemu-img", &arguments).is_none() {
        return;
    }
    assert!(fs::read(served.image()).unwrap() == bytes, "the image differs");
    let same = succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &uri]).unwrap();
    assert!(same.contains("identical"), "{same}");
    let map = succeed("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).unwrap();
    assert!(map.contains("\"start\": 1048576, \"length\": 2097152"), "{map}");
    let commands = [
        "-f",
        "raw",
        "-c",
        "write -P 7 0 1M",
        "-c",
        "read -P 7 0 1M",
        "-c",
        "write -z -u 64k 64k",
        "-c",
        "read -P 0 64k 64k",
        "-c",
        "write -f -P 9 4k 4k",
        "-c",
        "discard 8M 4M",
        "-c",
        "flush",
        "-c",
        "read -P 9 4k 4k",
        &uri,
    ];
    let text = succeed("qemu-io", &commands).unwrap();
    assert!(!text.contains("failed"), "{text}");
    let written = fs::read(served.image()).unwrap();
    assert_eq!(
        (written[0], written[4096], written[8192], written[65536]),
        (7, 9, 7, 0)
    );
}

#[test]
fn qemu_sees_what_has_changed_since_a_snapshot() {
    let script = Shared::default();
    let served = Served::start(|_| {}, move |_| vec![Scripted(Disk::new(&script))]);
    for context in ["qemu:dirty-bitmap:monday", "smsvmm:changed:monday"] {
        let description = format!(
            "driver=nbd,export=disk,server.type=unix,server.path={},x-dirty-bitmap={context}",
            served.socket().display()
        );
        let Some(map) = succeed(
            "qemu-img",
            &["map", "--output=json", "--image-opts", &description],
        ) else {
            return;
        };
        // With x-dirty-bitmap, qemu shows what is dirty as no data.
        let dirty: Vec<&str> = map
            .lines()
            .filter(|line| line.contains("\"data\": false"))
            .collect();
        assert_eq!(dirty.len(), 2, "{map}");
        assert!(dirty[0].contains("\"start\": 0, \"length\": 1048576"), "{map}");
        assert!(
            dirty[1].contains("\"start\": 4194304, \"length\": 1048576"),
            "{map}"
        );
    }
    let map = succeed("nbdinfo", &["--map=smsvmm:changed:monday", &served.uri("disk")]).unwrap_or_default();
    assert!(map.is_empty() || map.lines().count() == 4, "{map}");
}

#[test]
fn clients_come_over_tcp_as_well() {
    let served = Served::file(1 << 20, |options| {
        options
            .listen
            .push(ListenAddress::Tcp("127.0.0.1:0".parse().unwrap()));
    });
    let addresses = served.server.as_ref().unwrap().addresses();
    let ListenAddress::Tcp(address) = &addresses[1] else {
        panic!("no TCP")
    };
    if let Some(size) = succeed("nbdinfo", &["--size", &format!("nbd://{address}/")]) {
        assert_eq!(size.trim(), "1048576");
    }
}
