//! A pool on two files, with a mirrored volume and a file system.

use std::fs::File;
use std::path::Path;

use api::file::FileOperation;
use api::storage::{LayoutKind, NewDevice, Operation, Shape};
use storage_manager::{Flow, Force, Notice};

pub(crate) fn go_on(_: Notice<'_>) -> Flow {
    Flow::GoOn
}

/// A device as it is given to a pool.
pub(crate) fn new_device(path: &str) -> NewDevice {
    NewDevice {
        path: path.to_owned(),
        spare: false,
        class: String::new(),
        enclosure: String::new(),
        force: false,
    }
}

/// Makes it; its devices.
pub(crate) fn pool(folder: &Path) -> Vec<String> {
    let paths: Vec<String> = (0..2)
        .map(|number| {
            let path = folder.join(format!("d{number}"));
            File::create(&path).unwrap().set_len(64 << 20).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let devices = paths.iter().map(|path| new_device(path));
    storage_manager::create("tank", devices.collect(), &mut go_on).unwrap();
    let format = FileOperation::Format {
        meta_size: None,
        meta_copies: None,
        force: false,
    };
    storage_manager::execute_file(paths.clone(), format, &mut go_on).unwrap();
    volume(&paths, "data", LayoutKind::Mirror, 16 << 20);
    paths
}

/// Adds a volume.
pub(crate) fn volume(devices: &[String], name: &str, layout: LayoutKind, size: u64) {
    let volume = Operation::CreateVolume {
        name: name.into(),
        size,
        block: 4096,
        shape: Shape {
            layout,
            columns: 0,
            copies: 0,
            stripe_unit: 0,
            class: String::new(),
            devices: Vec::new(),
        },
        read_policy: api::storage::ReadPolicy::default(),
        raw: false,
    };
    storage_manager::execute(devices.to_vec(), Force::No, volume, &mut go_on).unwrap();
}
