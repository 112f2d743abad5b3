//! The pool of the full stack: four files or block devices, and disks on volumes of several layouts.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use lab::finish;

use super::{Place, SIZE, start};

pub(super) const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];
/// Bytes of each device, of which only what is written takes space.
pub(super) const DEVICE: u64 = 6 << 30;
/// Layers of the long chain.
const DEPTH: usize = 8;
/// What every layer of it has of its own: one 4 KiB block in so many bytes.
const SPACING: [&str; DEPTH - 1] = [
    "196608", "212992", "229376", "245760", "262144", "278528", "294912",
];

/// A disk of the pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Disk {
    /// One layer on a volume on one device.
    Plain,
    Mirror,
    Stripe,
    /// Eight layers on the volume of `Plain`.
    Chain,
    /// An empty layer above a full one, on the same volume.
    Fresh,
}

impl Disk {
    fn path(self) -> &'static str {
        match self {
            Self::Plain => "/plain.dsk",
            Self::Mirror => "/mirror.dsk",
            Self::Stripe => "/stripe.dsk",
            Self::Chain => "/chain.dsk",
            Self::Fresh => "/fresh.dsk",
        }
    }

    /// Whether it is made anew for each round.
    pub(super) fn is_fresh(self) -> bool {
        self == Self::Fresh
    }
}

/// The pool in a place.
pub(super) struct Pool<'a>(pub(super) &'a Place);

impl Pool<'_> {
    /// Makes the pool, its volumes, and those disks that are wanted, all of which are full.
    pub(super) fn make(&self, wanted: &[Disk]) -> Result<()> {
        let devices = DEVICES.map(|name| self.0.path(name));
        for device in &devices {
            let file = fs::File::create(device)?;
            if file.metadata()?.is_file() {
                file.set_len(DEVICE)?;
            }
        }
        let mut create = Command::new(&self.0.smsvmm);
        finish(create.args(["pool", "create", "bench"]).args(&devices))?;
        self.command(&["file", "format"])?;
        let volumes: [(&str, u64, &[&str]); 3] = [
            ("plain", 8 * SIZE, &["--layout", "concat", "--device", "d0.img"]),
            ("mirror", 2 * SIZE, &["--layout", "mirror"]),
            ("stripe", 2 * SIZE, &["--layout", "stripe", "--columns", "4"]),
        ];
        for (name, size, layout) in volumes {
            let size = size.to_string();
            self.command(&[&["volume", "create", name, "--size", &size], layout].concat())?;
        }
        let disks = [
            (Disk::Plain, "plain"),
            (Disk::Chain, "plain"),
            (Disk::Fresh, "plain"),
            (Disk::Mirror, "mirror"),
            (Disk::Stripe, "stripe"),
        ];
        for (disk, volume) in disks.into_iter().filter(|(disk, _)| wanted.contains(disk)) {
            let size = SIZE.to_string();
            self.command(&["disk", "create", disk.path(), "--size", &size, "--volume", volume])?;
            self.write(disk, &["--pattern", "write", "--block-size", "131072"])?;
        }
        if wanted.contains(&Disk::Fresh) {
            self.command(&["disk", "snapshot", Disk::Fresh.path(), "--name", "full"])?;
        }
        let layers = if wanted.contains(&Disk::Chain) {
            SPACING.len()
        } else {
            0
        };
        for (number, spacing) in SPACING.iter().enumerate().take(layers) {
            let name = format!("layer-{number}");
            self.command(&["disk", "snapshot", Disk::Chain.path(), "--name", &name])?;
            self.write(Disk::Chain, &["--pattern", "randwrite", "--stride", spacing])?;
        }
        Ok(())
    }

    /// Gives the disk an empty layer.
    pub(super) fn freshen(&self, disk: Disk) -> Result<()> {
        self.command(&["disk", "revert", &format!("{}@full", disk.path())])
    }

    /// Completes a `smsvmm share`.
    pub(super) fn serve(&self, disk: Disk, command: &mut Command) {
        self.name(command);
        command.arg(disk.path());
    }

    /// Writes places once, all that the arguments name.
    fn write(&self, disk: Disk, arguments: &[&str]) -> Result<()> {
        let socket = self.0.path("disk.sock");
        let mut command = self.0.share(&socket, &[]);
        self.serve(disk, &mut command);
        let _server = start(&mut command, &socket)?;
        let always = ["--once", "--depth", "32", "--seconds", "600"];
        self.0.generate(&socket, &[&always, arguments].concat())?;
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.0.smsvmm);
        command.args(arguments);
        self.name(&mut command);
        finish(&mut command)?;
        Ok(())
    }

    fn name(&self, command: &mut Command) {
        for device in DEVICES {
            let path = self.0.path(device);
            command.arg("--devices").arg::<&Path>(&path);
        }
    }
}
