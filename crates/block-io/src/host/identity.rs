//! What tells whether two paths lead to one device.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What no other device of this host has, if it says: the World Wide Name or serial number of a disk, with the number of the
/// partition; file system and inode of a file.
pub(super) fn identity(metadata: &Metadata) -> Option<String> {
    if !metadata.file_type().is_block_device() {
        return Some(format!("file {}:{}", metadata.dev(), metadata.ino()));
    }
    let number = metadata.rdev();
    let link = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
    of_block_device(&fs::canonicalize(link).ok()?)
}

fn of_block_device(folder: &Path) -> Option<String> {
    let text = |path: PathBuf| {
        let text = fs::read_to_string(path).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    if let Some(partition) = text(folder.join("partition")) {
        let disk = of_block_device_without_partition(folder.parent()?, &text)?;
        return Some(format!("{disk} partition {partition}"));
    }
    of_block_device_without_partition(folder, &text)
}

fn of_block_device_without_partition(
    folder: &Path,
    text: &impl Fn(PathBuf) -> Option<String>,
) -> Option<String> {
    ["wwid", "device/wwid", "dm/uuid", "serial", "device/serial"]
        .iter()
        .find_map(|name| text(folder.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_has_the_identity_of_its_disk_and_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("sda");
        fs::create_dir_all(disk.join("device")).unwrap();
        fs::create_dir_all(disk.join("sda2")).unwrap();
        assert_eq!(of_block_device(&disk), None);
        fs::write(disk.join("device/wwid"), "naa.5000\n").unwrap();
        fs::write(disk.join("sda2/partition"), "2\n").unwrap();
        assert_eq!(of_block_device(&disk).unwrap(), "naa.5000");
        assert_eq!(
            of_block_device(&disk.join("sda2")).unwrap(),
            "naa.5000 partition 2"
        );
    }

    #[test]
    fn two_names_of_a_file_have_one_identity_and_two_files_have_two() {
        let folder = tempfile::tempdir().unwrap();
        let [one, same, other] = ["one", "same", "other"].map(|name| folder.path().join(name));
        fs::write(&one, "").unwrap();
        fs::hard_link(&one, &same).unwrap();
        fs::write(&other, "").unwrap();
        let of = |path| identity(&fs::metadata(path).unwrap());
        assert_eq!(of(&one), of(&same));
        assert_ne!(of(&one), of(&other));
    }
}
