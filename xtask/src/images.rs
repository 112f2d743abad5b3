//! The toolbox tree, the lab host and its disk of guest images.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use lab::{Archive, Cache, Key, Toolbox, finish};

use crate::apt::{self, Apt};
use crate::host;
use crate::kernels::Modules;
use crate::recipe::{self, Recipe};

/// What belongs to the C library: on this machine, its own is used.
const C_LIBRARY: &[&str] = &[
    "ld-linux-x86-64.so",
    "libc.so",
    "libm.so",
    "libmvec.so",
    "libpthread.so",
    "libdl.so",
    "librt.so",
    "libresolv.so",
    "libutil.so",
    "libanl.so",
    "libnss_",
    "libthread_db.so",
    "libBrokenLocale.so",
    "libc_malloc_debug.so",
    "libnsl.so",
    "libmemusage.so",
    "libpcprofile.so",
];

/// Unpacks packages of programs (the images `toolbox` and `emulator`): `tree/`, and `libraries/` for running its programs on this machine.
pub(crate) fn programs(cache: &Cache, name: &str, packages: &[String], apt: &Apt) -> Result<()> {
    let closure = apt.closure(packages)?;
    let names: Vec<&str> = closure.iter().map(|package| package.file.as_str()).collect();
    let key = Key::new().with("3").with(names.join("\n"));
    cache.make(name, key, |folder| {
        host::step(&format!("{name}: fetching {} packages", closure.len()));
        let files = apt.fetch_closure(packages, &closure)?;
        host::step(&format!("{name}: unpacking"));
        let tree = folder.join("tree");
        merged_usr(&tree)?;
        for file in files {
            apt::unpack(&file, &tree)?;
        }
        libraries(&tree, &folder.join("libraries"))?;
        prune(&tree)
    })?;
    Ok(())
}

fn merged_usr(tree: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(tree.join("usr").join(name))?;
        symlink(format!("usr/{name}"), tree.join(name))?;
    }
    Ok(())
}

/// Where packages have libraries: most, those that one keeps for itself, and the old place.
const LIBRARIES: [&str; 3] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/ceph",
    "usr/lib",
];

/// Links to the libraries of a tree in one folder, for the loader of this machine.
fn libraries(tree: &Path, links: &Path) -> Result<()> {
    fs::create_dir_all(links)?;
    for folder in LIBRARIES {
        let Ok(entries) = fs::read_dir(tree.join(folder)) else {
            continue;
        };
        for entry in entries {
            let name = entry?.file_name();
            let text = name.to_string_lossy();
            let link = links.join(&name);
            let is_ours = text.contains(".so") && !C_LIBRARY.iter().any(|prefix| text.starts_with(prefix));
            if is_ours && link.symlink_metadata().is_err() {
                symlink(Path::new("../tree").join(folder).join(&name), link)?;
            }
        }
    }
    Ok(())
}

/// Removes what no test runs, so that the lab host's root stays small.
fn prune(tree: &Path) -> Result<()> {
    for path in [
        "usr/share/iso-codes",
        "usr/share/xml",
        "usr/share/i18n",
        "usr/share/zoneinfo",
        "usr/lib/systemd",
        "usr/share/icons",
        "usr/share/perl",
        "usr/lib/x86_64-linux-gnu/gstreamer-1.0",
        "usr/lib/x86_64-linux-gnu/dri",
        "usr/lib/x86_64-linux-gnu/glusterfs",
    ] {
        let path = tree.join(path);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Makes the lab host: `vmlinux`, `initrd`, `root.ext4`.
pub(crate) fn lab_host(cache: &Cache, recipe: &Recipe, toolbox: &Toolbox) -> Result<()> {
    let kernel = cache.image(&format!("kernel-{}", recipe.lab.kernel))?;
    let (initrd_init, init) = (recipe::file("lab-initrd-init")?, recipe::file("lab-init")?);
    let key = Key::new()
        .with("3")
        .with(kernel.to_string_lossy().as_bytes())
        .with(fs::canonicalize(toolbox.tree())?.to_string_lossy().as_bytes())
        .with(&initrd_init)
        .with(&init)
        .with(format!("{:?}", recipe.lab));
    cache.make("lab", key, |folder| {
        host::step("lab host: kernel, initrd, root file system");
        fs::copy(kernel.join("vmlinux"), folder.join("vmlinux"))?;
        let modules = Modules::of_image(&kernel, toolbox)?;
        let mut initrd = Archive::default();
        initrd.copy(&toolbox.tree().join("usr/bin/busybox"), "bin/busybox", 0o755)?;
        initrd.file("init", 0o755, initrd_init);
        for name in ["dev", "proc", "below", "above", "root"] {
            initrd.folder(name);
        }
        modules.add_in_order(&mut initrd, &recipe.lab.initrd_modules)?;
        fs::write(folder.join("initrd"), initrd.bytes()?)?;
        let root = folder.join("root");
        finish(
            std::process::Command::new("cp")
                .args(["-a", "--reflink=auto"])
                .arg(toolbox.tree())
                .arg(&root),
        )?;
        populate(&root, &kernel, &init, toolbox)?;
        ext4(toolbox, &root, &folder.join("root.ext4"), None)?;
        fs::remove_dir_all(&root)?;
        Ok(())
    })?;
    Ok(())
}

fn populate(root: &Path, kernel: &Path, init: &str, toolbox: &Toolbox) -> Result<()> {
    let folders = "proc sys dev tmp run root var etc mnt srv images home work usr/local/bin lib/modules";
    for name in folders.split(' ') {
        fs::create_dir_all(root.join(name))?;
    }
    let release = fs::read_to_string(kernel.join("release"))?;
    finish(
        std::process::Command::new("cp")
            .arg("-a")
            .arg(kernel.join("modules").join(&release))
            .arg(root.join("lib/modules")),
    )?;
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let etc = root.join("etc");
    fs::write(
        etc.join("passwd"),
        "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/tmp:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    fs::write(
        etc.join("group"),
        "root:x:0:\nkvm:x:104:user\nuser:x:1000:\nnogroup:x:65534:\n",
    )?;
    fs::write(etc.join("hosts"), "127.0.0.1 localhost\n")?;
    fs::write(etc.join("resolv.conf"), "")?;
    fs::write(
        etc.join("nsswitch.conf"),
        "passwd: files\ngroup: files\nhosts: files dns\n",
    )?;
    if fs::symlink_metadata(etc.join("mtab")).is_err() {
        symlink("/proc/self/mounts", etc.join("mtab"))?;
    }
    // The kernel looks for programs here; and scripts may say `sh`.
    let applets = finish(toolbox.command("busybox").arg("--list"))?;
    for applet in String::from_utf8_lossy(&applets).lines() {
        let (bin, sbin) = (
            root.join("usr/bin").join(applet),
            root.join("usr/sbin").join(applet),
        );
        if fs::symlink_metadata(&bin).is_err() && fs::symlink_metadata(&sbin).is_err() {
            symlink("busybox", bin)?;
        }
    }
    Ok(())
}

/// Makes the image `lab-images`: the disk that every lab host sees at `/images`: a folder per kernel.
pub(crate) fn lab_images(cache: &Cache, toolbox: &Toolbox, kernels: &[(String, PathBuf)]) -> Result<()> {
    let debian = cache.image("debian").ok();
    let mut key = Key::new().with("3");
    for (name, image) in kernels {
        key = key.with(name).with(image.to_string_lossy().as_bytes());
    }
    if let Some(debian) = &debian {
        key = key.with(debian.to_string_lossy().as_bytes());
    }
    cache.make("lab-images", key, |folder| {
        host::step("lab host: disk of guest images");
        let tree = folder.join("tree");
        // For stories that run on this machine itself.
        let links = folder.join("links");
        fs::create_dir_all(&links)?;
        for (name, image) in kernels {
            let image_name = image.file_name().context("the image has no name")?;
            symlink(Path::new("../..").join(image_name), links.join(name))?;
            let to = tree.join(name);
            fs::create_dir_all(&to)?;
            for file in ["bzImage", "vmlinux", "initrd", "initrd-tools", "version"] {
                link(&image.join(file), &to.join(file))?;
            }
        }
        if let Some(debian) = &debian {
            fs::create_dir_all(tree.join("debian"))?;
            for file in ["bzImage", "initrd"] {
                link(&debian.join(file), &tree.join("debian").join(file))?;
            }
        }
        ext4(toolbox, &tree, &folder.join("images.ext4"), None)?;
        fs::remove_dir_all(&tree)?;
        Ok(())
    })?;
    Ok(())
}

/// Makes the image `guest-tools`: `tools.ext4`, a disk of programs for guests, and of drivers for each kernel.
pub(crate) fn guest_tools(
    cache: &Cache,
    recipe: &Recipe,
    apt: &Apt,
    toolbox: &Toolbox,
    kernels: &[(String, PathBuf)],
) -> Result<()> {
    let tools = &recipe.guest_tools;
    let closure = apt.closure(&tools.packages)?;
    let names: Vec<&str> = closure.iter().map(|package| package.file.as_str()).collect();
    let mut key = Key::new()
        .with("2")
        .with(format!("{tools:?}"))
        .with(names.join("\n"));
    for (_, image) in kernels {
        key = key.with(image.to_string_lossy().as_bytes());
    }
    cache.make("guest-tools", key, |folder| {
        host::step(&format!(
            "tools for guests: fetching and unpacking {} packages",
            closure.len()
        ));
        let (unpacked, disk) = (folder.join("unpacked"), folder.join("disk"));
        let tree = unpacked.join("tree");
        merged_usr(&tree)?;
        for file in apt.fetch_closure(&tools.packages, &closure)? {
            apt::unpack(&file, &tree)?;
        }
        libraries(&tree, &unpacked.join("libraries"))?;
        let source = Toolbox::at(&unpacked);
        for program in &tools.programs {
            for (from, to) in files_of_program(&source, program)? {
                let to = disk.join(to);
                fs::create_dir_all(to.parent().context("no folder")?)?;
                fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            }
        }
        for name in &tools.folders {
            let to = disk.join(name);
            fs::create_dir_all(&to)?;
            for file in fs::read_dir(tree.join(name)).with_context(|| format!("there is no {name}"))? {
                let file = file?;
                fs::copy(file.path(), to.join(file.file_name()))?;
            }
        }
        for (_, kernel) in kernels {
            let modules = Modules::of_image(kernel, toolbox)?;
            modules.write_in_order(&disk.join("modules").join(&modules.release), &tools.modules)?;
        }
        ext4(toolbox, &disk, &folder.join("tools.ext4"), None)?;
        fs::remove_dir_all(&unpacked)?;
        fs::remove_dir_all(&disk)?;
        Ok(())
    })?;
    Ok(())
}

fn link(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to).with_context(|| format!("cannot link {}", from.display()))
}

/// Makes a raw ext4 image of a folder without mounting it, just large enough if no size is given. The same content gives
/// the same bytes: times and identifiers are fixed.
pub(crate) fn ext4(toolbox: &Toolbox, folder: &Path, image: &Path, size: Option<&str>) -> Result<()> {
    let size = match size {
        Some(size) => size.to_owned(),
        None => {
            let output = finish(std::process::Command::new("du").arg("-sm").arg(folder))?;
            let used: u64 = String::from_utf8_lossy(&output)
                .split_whitespace()
                .next()
                .unwrap_or("0")
                .parse()?;
            format!("{}M", used + used / 5 + 24)
        }
    };
    let mut command = toolbox.command("mke2fs");
    command.env("E2FSPROGS_FAKE_TIME", "1700000000");
    command.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-m",
        "0",
        "-U",
        "736d7376-6d6d-4000-8000-000000000001",
    ]);
    command.args([
        "-E",
        "hash_seed=736d7376-6d6d-4000-8000-000000000002,root_owner=0:0,lazy_itable_init=1,nodiscard",
    ]);
    finish(command.arg("-d").arg(folder).arg(image).arg(size))?;
    Ok(())
}

/// Adds a program of the toolbox with the libraries it needs to an initrd.
pub(crate) fn add_program(archive: &mut Archive, toolbox: &Toolbox, program: &str) -> Result<()> {
    for (from, to) in files_of_program(toolbox, program)? {
        archive.copy(&from, &to, 0o755)?;
    }
    Ok(())
}

/// A program of the toolbox and the libraries it needs: the file of each, and its path in a guest.
fn files_of_program(toolbox: &Toolbox, program: &str) -> Result<Vec<(PathBuf, String)>> {
    let path = toolbox
        .program(program)
        .with_context(|| format!("the toolbox has no {program}"))?;
    // The loader of this machine resolves the names; the files are those of the tree.
    let output = finish(toolbox.command("ldd").arg(&path))?;
    let mut files = vec![(path, format!("usr/bin/{program}"))];
    for line in String::from_utf8_lossy(&output).lines() {
        // The machine may have a library that the tree has not, or the other way round: neither may pass by chance.
        ensure!(!line.contains("not found"), "{program} needs {}", line.trim());
        let Some(word) = line.split_whitespace().find(|word| word.starts_with('/')) else {
            continue;
        };
        let name = Path::new(word)
            .file_name()
            .context("ldd names no file")?
            .to_string_lossy()
            .into_owned();
        let to = if name.starts_with("ld-linux") {
            format!("lib64/{name}")
        } else {
            format!("lib/x86_64-linux-gnu/{name}")
        };
        let from = LIBRARIES
            .iter()
            .map(|folder| toolbox.tree().join(folder).join(&name))
            .find(|place| place.exists())
            .with_context(|| format!("the toolbox has no {name}, which {program} needs"))?;
        files.push((from, to));
    }
    Ok(files)
}
