//! `cargo xtask demo`: a complete Debian guest on virtual disks of a pool, and on the network, under `smsvmm run`.
//!
//! ```text
//! cargo xtask demo ── set-up, build ──┬─ KVM is good here ──► show here
//!                                     └─ else ── lab ───────► xtask demo-inside: show there
//! show: vm.toml ── pool, volumes, disks (storage.rs) ── smsvmm run ──┬─ a terminal: yours
//!                                                                    └─ none, or --tour: the scripted tour (tour.rs)
//! ```
//!
//! Everything that is done to the storage is a command that a user would type (shell.rs), shown with its answer.

mod shell;
mod storage;
mod summary;
mod tour;

use std::fs;
use std::io::IsTerminal as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::{Cache, Lab};

use crate::{build, host, setup};
use shell::Shell;
use summary::Summary;

/// Where the guest's own files are.
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    /// Debian's root file system, an image or a block device: only read, and imported.
    root: PathBuf,
}

/// Sets up, builds, and shows the guest in the right place.
pub(crate) fn run(tour: bool) -> Result<ExitCode> {
    let tour = tour || !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal();
    setup::run(&setup::Options {
        refresh: false,
        debian: true,
    })?;
    let smsvmm = build::release("smsvmm")?;
    let cache = Cache::locate();
    let debian = cache.image("debian")?;
    let temporary = cache.path("tmp");
    fs::create_dir_all(&temporary)?;
    let folder = tempfile::Builder::new().prefix("demo.").tempdir_in(temporary)?;
    fs::copy(&smsvmm, folder.path().join("smsvmm"))?;
    if build::kvm_is_good(&smsvmm) {
        host::step("this machine's KVM runs stock kernels: the guest runs right here");
        let guest = Guest {
            kernel: debian.join("bzImage"),
            initrd: debian.join("initrd"),
            root: debian.join("root.ext4"),
        };
        if !tour {
            host::step(&format!(
                "in another terminal: cd {} && ./smsvmm disk snapshot /system/root.dsk --name now --config vm.toml",
                folder.path().display()
            ));
        }
        return show(folder.path(), &guest, tour);
    }
    host::step(
        "this machine's KVM cannot run stock kernels (`smsvmm host check` says why): the guest runs in the lab,",
    );
    host::step("which is emulated in software: expect a minute where a real host takes seconds");
    fs::copy(std::env::current_exe()?, folder.path().join("xtask"))?;
    let mut lab = Lab::builder()
        .share(folder.path())
        .disk(debian.join("root.ext4"))
        .start()?;
    let status = if tour {
        lab.run_streaming("./xtask demo-inside --tour", Duration::from_secs(900), host::show)?
    } else {
        lab.run_on_terminal("./xtask demo-inside")?
    };
    Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The part in the lab.
pub(crate) fn inside(tour: bool) -> Result<ExitCode> {
    let root = PathBuf::from("/dev/vdd");
    for _ in 0..500 {
        if root.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(root.exists(), "the lab host sees no disk for the guest's root");
    let guest = Guest {
        kernel: "/images/debian/bzImage".into(),
        initrd: "/images/debian/initrd".into(),
        root,
    };
    show(&std::env::current_dir()?, &guest, tour)
}

/// In a folder that has `smsvmm` in it: writes vm.toml, makes the storage, and runs the guest.
fn show(folder: &Path, guest: &Guest, tour: bool) -> Result<ExitCode> {
    symlink(&guest.root, folder.join("debian.raw"))?;
    fs::write(folder.join("vm.toml"), vm_toml(guest))?;
    let shell = Shell::new(folder)?;
    let mut summary = Summary::new();
    let device = storage::prepare(&shell, &mut summary)?;
    if tour {
        return tour::run(&shell, device, summary);
    }
    eprintln!(
        "\nThe console is yours: you are root in the guest. `poweroff` ends it; Ctrl-] then ? shows what else does.\n"
    );
    let status = shell
        .run_machine()
        .stdin(Stdio::inherit())
        .status()
        .context("cannot start smsvmm")?;
    drop(device);
    let code = status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1);
    Ok(ExitCode::from(code))
}

fn vm_toml(guest: &Guest) -> String {
    let Guest { kernel, initrd, .. } = guest;
    let devices = storage::DEVICES;
    format!(
        r#"# The demo's virtual machine, as you would write it.
name = "demo"
cpus = 2
memory = "768M"

[boot]
kernel = {kernel:?}
initrd = {initrd:?}
cmdline = "console=ttyS0 root=/dev/vda rw quiet"

[pool]
devices = {devices:?}

[[disk]]
file = "/system/root.dsk"

[[disk]]
file = "/scratch/work.dsk"
serial = "work"

[[disk]]
file = "/scratch/data.dsk"
serial = "data"
queues = 2

[[net]]
backend = "user"

[management]
socket = "demo.sock"
"#
    )
}
