//! Other programs, and what the files can do at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Options, Took, has, run};

pub(super) struct Peers {
    folder: PathBuf,
    size: u64,
}

/// Gives the blocks of files that are gone back to the memory below, if it takes them.
pub(super) fn trim(folder: &Path) {
    let _ = Command::new("fstrim").arg(folder).output();
}

impl Peers {
    pub(super) fn new(folder: &Path, size: u64) -> Self {
        Self {
            folder: folder.to_owned(),
            size,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(super) fn measure(&self, options: &Options, take: &mut impl FnMut(&'static str, Took)) {
        let (raw, copy) = (self.path("image.raw"), self.path("copy.raw"));
        let gib = self.size as f64 / (1 << 30) as f64;
        let mut one = |name: &'static str, program: &str, command: &mut Command| {
            if options.wants(name) && has(program) {
                take(name, run(command, gib));
                let _ = fs::remove_file(&copy);
                trim(&self.folder);
            }
        };
        let size = self.size.to_string();
        let fio = |how: &str, file: &Path| {
            let mut command = Command::new("fio");
            command.args([
                "--name=limit",
                "--direct=1",
                "--ioengine=io_uring",
                "--bs=1M",
                "--iodepth=8",
            ]);
            command.args([
                format!("--rw={how}"),
                format!("--size={size}"),
                format!("--filename={}", file.display()),
            ]);
            command.arg("--end_fsync=1");
            command
        };
        one("fio: read", "fio", &mut fio("read", &raw));
        one("fio: write", "fio", &mut fio("write", &copy));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw", "-T", "none", "-t", "none", "--image-opts"]);
        convert.arg(format!(
            "driver=file,filename={},cache.direct=on,aio=native",
            raw.display()
        ));
        one("qemu-img convert", "qemu-img", convert.arg(&copy));
        let mut dd = Command::new("dd");
        dd.args(["bs=1M", "iflag=direct", "oflag=direct", "conv=fsync"]);
        dd.args([format!("if={}", raw.display()), format!("of={}", copy.display())]);
        one("dd", "dd", &mut dd);
        let mut cp = Command::new("sh");
        cp.args([
            "-c",
            "cp --reflink=never --sparse=never \"$0\" \"$1\" && sync \"$1\"",
        ]);
        one("cp, sync", "cp", cp.arg(&raw).arg(&copy));
        self.borg(options, gib, take);
    }

    fn borg(&self, options: &Options, gib: f64, take: &mut impl FnMut(&'static str, Took)) {
        if !options.wants("borg") || !has("borg") {
            return;
        }
        let (repository, out) = (self.path("borg"), self.path("borg-out"));
        let borg = || {
            let mut command = Command::new("borg");
            command.env("BORG_BASE_DIR", self.path("borg-home"));
            command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
            command
        };
        run(borg().args(["init", "--encryption=none"]).arg(&repository), gib);
        let archive = format!("{}::one", repository.display());
        let mut create = borg();
        create.args(["create", "--compression=none", &archive, "image.raw"]);
        take("borg create", run(create.current_dir(&self.folder), gib));
        take(
            "borg check",
            run(borg().args(["check", "--verify-data"]).arg(&repository), gib),
        );
        fs::create_dir_all(&out).unwrap();
        take(
            "borg extract",
            run(borg().args(["extract", &archive]).current_dir(&out), gib),
        );
        for folder in [&repository, &out, &self.path("borg-home")] {
            let _ = fs::remove_dir_all(folder);
        }
        trim(&self.folder);
    }
}
