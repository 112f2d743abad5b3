//! `cargo xtask demo`: a complete Debian guest with disks and network under `smsvmm run`.
//!
//! ```text
//! cargo xtask demo ── set-up, build ──┬─ KVM is good here ──► xtask demo-inside here
//!                                     └─ else ── lab ───────► xtask demo-inside there
//! demo-inside: vm.toml, disks ── smsvmm run ──┬─ a terminal: yours
//!                                             └─ none, or --tour: the scripted tour (tour.rs)
//! ```

mod tour;

use std::fs;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::{Cache, Lab, Toolbox};

use crate::{build, host, setup};

/// Where the guest's own files are.
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
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
        let root = folder.path().join("root.ext4");
        lab::finish(
            Command::new("cp")
                .args(["--sparse=always", "--reflink=auto"])
                .arg(debian.join("root.ext4"))
                .arg(&root),
        )?;
        let guest = Guest {
            kernel: debian.join("bzImage"),
            initrd: debian.join("initrd"),
            root,
        };
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

/// Writes vm.toml and the disks into a folder that has `smsvmm` in it, and runs the guest.
fn show(folder: &Path, guest: &Guest, tour: bool) -> Result<ExitCode> {
    for (name, mib) in [("scratch.img", 64_u64), ("data.img", 256)] {
        fs::File::create(folder.join(name)).and_then(|file| file.set_len(mib << 20))?;
    }
    let config = folder.join("vm.toml");
    fs::write(&config, vm_toml(guest))?;
    let mut command = Command::new(folder.join("smsvmm"));
    command.arg("run").arg(&config);
    if let Ok(toolbox) = Toolbox::open(&Cache::locate()) {
        // passt, where it is not installed.
        command.env("PATH", toolbox.search_path());
    }
    if tour {
        return tour::run(folder, command);
    }
    eprintln!(
        "\nThe console is yours: you are root in the guest. `poweroff` ends it; Ctrl-] then ? shows what else does.\n"
    );
    let status = command
        .stdin(Stdio::inherit())
        .status()
        .context("cannot start smsvmm")?;
    let code = status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1);
    Ok(ExitCode::from(code))
}

fn vm_toml(guest: &Guest) -> String {
    let Guest { kernel, initrd, root } = guest;
    format!(
        r#"# The demo's virtual machine, as you would write it.
name = "demo"
cpus = 2
memory = "768M"

[boot]
kernel = {kernel:?}
initrd = {initrd:?}
cmdline = "console=ttyS0 root=/dev/vda rw quiet"

[[disk]]
image = {root:?}

[[disk]]
image = "scratch.img"
serial = "scratch"

[[disk]]
image = "data.img"
serial = "data"
queues = 2

[[net]]
backend = "user"

[management]
socket = "demo.sock"
"#
    )
}
