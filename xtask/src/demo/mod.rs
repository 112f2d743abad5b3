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
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::{Cache, Lab};

use crate::{build, host, setup};
use shell::Shell;
use summary::Summary;

/// What the guest boots, in the demo's folder: kernel, initrd, and the image of Debian's root file system, which is imported.
const FILES: [(&str, &str); 3] = [
    ("bzImage", "vmlinuz"),
    ("initrd", "initrd.img"),
    ("root.ext4", "debian.raw"),
];

/// Sets up, builds what runs the guest if it is not given, and shows the guest in the right place.
pub(crate) fn run(tour: bool, smsvmm: Option<&Path>) -> Result<ExitCode> {
    let tour = tour || !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal();
    setup::run(&setup::Options {
        refresh: false,
        debian: true,
    })?;
    let smsvmm = smsvmm.map_or_else(|| build::release("smsvmm"), |built| Ok(built.to_path_buf()))?;
    let cache = Cache::locate();
    let debian = cache.image("debian")?;
    let temporary = cache.path("tmp");
    fs::create_dir_all(&temporary)?;
    let folder = tempfile::Builder::new().prefix("demo.").tempdir_in(temporary)?;
    fs::copy(&smsvmm, folder.path().join("smsvmm"))?;
    for (file, name) in FILES {
        // They are only read; a copy would take its time.
        fs::hard_link(debian.join(file), folder.path().join(name))?;
    }
    if build::kvm_is_good(&smsvmm) {
        host::step("this machine's KVM runs stock kernels: the guest runs right here");
        if !tour {
            host::step(&format!(
                "in another terminal: cd {} && ./smsvmm disk snapshot /system/root.dsk --name now --config vm.toml",
                folder.path().display()
            ));
        }
        return show(folder.path(), tour);
    }
    host::step(
        "this machine's KVM cannot run stock kernels (`smsvmm host check` says why): the guest runs in the lab,",
    );
    host::step("which is emulated in software: expect a minute where a real host takes seconds");
    fs::copy(std::env::current_exe()?, folder.path().join("xtask"))?;
    let mut lab = Lab::builder().share(folder.path()).start()?;
    let status = if tour {
        lab.run_streaming("./xtask demo-inside --tour", Duration::from_secs(900), host::show)?
    } else {
        lab.run_on_terminal("./xtask demo-inside")?
    };
    Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The part in the lab.
pub(crate) fn inside(tour: bool) -> Result<ExitCode> {
    show(&std::env::current_dir()?, tour)
}

/// In a folder that has `smsvmm` and what the guest boots: writes vm.toml, makes the storage, and runs the guest.
fn show(folder: &Path, tour: bool) -> Result<ExitCode> {
    fs::write(folder.join("vm.toml"), vm_toml())?;
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

fn vm_toml() -> String {
    let devices = storage::DEVICES;
    format!(
        r#"# The demo's virtual machine, as you would write it.
name = "demo"
cpus = 2
memory = "768M"

[boot]
kernel = "vmlinuz"
initrd = "initrd.img"
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
