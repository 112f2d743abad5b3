//! The demo's storage: what a user types before the first start of the machine, and after its last end.

use std::fs::File;
use std::io::{BufReader, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::shell::{Job, Shell};
use super::summary::Summary;

/// Where on the scratch disk the 16 MiB are that the guest writes, in MiB; before them are the guest's records.
pub(super) const PIECE_AT: u64 = 192;
/// Bytes of a record.
const RECORD: usize = 4096;

/// The pool's devices. The second one is served by another process, as from another machine: that one can fail.
pub(super) const DEVICES: [&str; 4] = ["d0.img", "nbd+unix:///d1.img?socket=d1.sock", "d2.img", "d3.img"];

/// Four devices, a pool, a mirrored and a striped volume, and the disks, with Debian on one of them. What is returned serves a device.
pub(super) fn prepare(shell: &Shell, summary: &mut Summary) -> Result<Job> {
    shell.run("truncate -s 1536M d0.img d1.img d2.img d3.img")?;
    let server = shell.start("smsvmm share nbd --image d1.img --socket d1.sock")?;
    shell.run("until [ -S d1.sock ]; do sleep 0.1; done")?;
    shell.run(&format!("smsvmm pool create demo '{}'", DEVICES.join("' '")))?;
    summary.stop(
        "pool",
        "four devices make one pool: files here, one of them behind a server of its own".into(),
    );
    shell.run(
        "smsvmm volume create safe --size 1G --layout mirror --device d0 --device d1 --config vm.toml",
    )?;
    shell.run(
        "smsvmm volume create fast --size 1G --layout stripe --device d2 --device d3 --config vm.toml",
    )?;
    shell.run("smsvmm file format --config vm.toml")?;
    summary.stop(
        "volumes",
        "a mirror of d0 and d1, a stripe over d2 and d3, a file system on both".into(),
    );
    shell.run("smsvmm file mkdir /system --volume safe --config vm.toml")?;
    shell.run("smsvmm file mkdir /scratch --volume fast --config vm.toml")?;
    let imported = shell.run("smsvmm disk import debian.raw /system/root.dsk --config vm.toml")?;
    shell.run("smsvmm disk create /scratch/work.dsk --size 512M --config vm.toml")?;
    shell.run("smsvmm disk create /scratch/data.dsk --size 256M --config vm.toml")?;
    summary.stop(
        "virtual disks",
        format!("Debian on the mirror ({}), two on the stripe", imported.trim()),
    );
    Ok(server)
}

/// What the guest said, to be found again from outside.
pub(super) struct Told {
    /// Of the 16 MiB that lie on every disk.
    pub(super) sum: String,
    /// Records that were counted before the snapshot was asked for.
    pub(super) before_snapshot: u64,
    /// Records that were counted when it was made.
    pub(super) after_snapshot: u64,
    /// Records that were counted last.
    pub(super) last: u64,
}

/// Opens the pool again, without the device that failed, and finds everything that the guest wrote.
pub(super) fn check(shell: &Shell, told: &Told, summary: &mut Summary) -> Result<()> {
    let status = shell.run("smsvmm pool status --config vm.toml")?;
    ensure!(
        status.contains("missing: nbd+unix:///d1.img") && status.contains("degraded"),
        "the pool has not noticed the loss"
    );
    let checked = shell.run("smsvmm file check --config vm.toml")?;
    ensure!(
        checked.contains("all is well"),
        "the file system is damaged: {checked}"
    );
    summary.stop(
        "pool, opened again",
        "d1 is missing, and the file system's check finds nothing".into(),
    );

    shell.run("smsvmm disk export /scratch/work.dsk work.raw --config vm.toml")?;
    shell.run("smsvmm disk export /scratch/data.dsk data.raw --config vm.toml")?;
    let raw = sum_of(
        shell,
        &format!("tail -c +$(({PIECE_AT} * 1048576 + 1)) work.raw | head -c 16M | sha256sum"),
    )?;
    shell.run("e2fsck -fn data.raw")?;
    let file = sum_of(shell, "debugfs -R 'cat /copy' data.raw | sha256sum")?;
    ensure!(
        raw == told.sum && file == told.sum,
        "the host finds {raw} and {file}, the guest wrote {}",
        told.sum
    );
    let found = records(&shell.folder().join("work.raw"))?;
    ensure!(
        found == told.last || found == told.last + 1,
        "{found} records are there, the guest counted {}",
        told.last
    );
    summary.stop(
        "seen from the host",
        format!(
            "all {found} records are there, and the 16 MiB with sha256 {}... on both",
            short(&told.sum)
        ),
    );

    shell.run("smsvmm disk export /system/root.dsk@busy root-busy.raw --config vm.toml")?;
    shell.run("smsvmm disk export /scratch/work.dsk@busy work-busy.raw --config vm.toml")?;
    // A running system's: it has a journal to be replayed. 1: that was done.
    shell.run("e2fsck -p root-busy.raw || [ $? = 1 ]")?;
    shell.run("e2fsck -fn root-busy.raw")?;
    let counted = shell.run("debugfs -R 'cat /root/count' root-busy.raw")?;
    let counted: u64 = counted.trim().parse().context("the snapshot has no count")?;
    let kept = records(&shell.folder().join("work-busy.raw"))?;
    ensure!(
        (told.before_snapshot..=told.after_snapshot).contains(&counted),
        "the snapshot counts {counted} records; there were {} before it and {} after it",
        told.before_snapshot,
        told.after_snapshot
    );
    ensure!(
        kept == counted || kept == counted + 1,
        "the snapshots are of different moments: one disk has {kept} records, the other counts {counted}"
    );
    let file = sum_of(shell, "debugfs -R 'cat /root/copy' root-busy.raw | sha256sum")?;
    ensure!(
        file == told.sum,
        "the host finds {file} in the snapshot, the guest wrote {}",
        told.sum
    );
    summary.stop(
        "snapshot",
        format!(
            "of one moment: record {counted} counted on the mirror, {kept} on the stripe, Debian's ext4 clean"
        ),
    );
    Ok(())
}

/// Puts a new device in the place of the one that failed.
pub(super) fn heal(shell: &Shell, summary: &mut Summary) -> Result<()> {
    shell.run("truncate -s 1536M d4.img")?;
    shell.run("smsvmm device replace d1 d4.img --config vm.toml")?;
    shell.run("sed -i 's|nbd+unix:[^\"]*|d4.img|' vm.toml")?;
    let status = shell.run("smsvmm pool status --config vm.toml")?;
    ensure!(
        status.starts_with("pool demo: healthy"),
        "the pool is not healthy again"
    );
    summary.stop("heal", "d4 has taken the place of d1, the pool is healthy".into());
    Ok(())
}

fn sum_of(shell: &Shell, line: &str) -> Result<String> {
    let text = shell.run(line)?;
    let sum = text.split_whitespace().next().filter(|sum| sum.len() == 64);
    Ok(sum.context("there is no checksum")?.to_owned())
}

/// The beginning of a checksum, for people.
pub(super) fn short(sum: &str) -> &str {
    sum.get(..12).unwrap_or(sum)
}

/// The number of records on an image of the scratch disk: 1, 2, 3 and so on without a gap, and nothing behind them.
fn records(image: &Path) -> Result<u64> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(image)?);
    file.seek(SeekFrom::Start(RECORD as u64))?;
    let mut record = [0; RECORD];
    let (mut count, mut ended) = (0, false);
    for number in 1..(PIECE_AT << 20) / RECORD as u64 {
        file.read_exact(&mut record)?;
        if record == [0; RECORD] {
            ended = true;
            continue;
        }
        let text = std::str::from_utf8(&record).unwrap_or_default();
        ensure!(
            !ended && text.trim_start() == number.to_string(),
            "{}: record {number} is not what the guest wrote, after {count} that are",
            image.display()
        );
        count = number;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(numbers: &[(u64, &str)]) -> tempfile::NamedTempFile {
        use std::os::unix::fs::FileExt as _;
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(PIECE_AT << 20).unwrap();
        for (place, text) in numbers {
            let record = format!("{text:>RECORD$}");
            image
                .as_file()
                .write_all_at(record.as_bytes(), place * RECORD as u64)
                .unwrap();
        }
        image
    }

    #[test]
    fn records_are_counted_and_gaps_and_strangers_are_found() {
        assert_eq!(records(image(&[]).path()).unwrap(), 0);
        assert_eq!(records(image(&[(1, "1"), (2, "2")]).path()).unwrap(), 2);
        for wrong in [
            &[(1, "1"), (3, "3")],
            &[(1, "1"), (2, "3")],
            &[(1, "2"), (2, "2")],
        ] {
            assert!(records(image(wrong).path()).is_err(), "{wrong:?}");
        }
    }
}
