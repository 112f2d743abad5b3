//! Guest kernels: Debian's packages unpacked, the ELF taken out of the bzImage, and a test initrd for each.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Archive, Cache, Key, Toolbox, finish};

use crate::apt::{self, Apt};
use crate::recipe::{self, Kernel, Recipe};
use crate::{host, images};

/// Makes the image `kernel-NAME`: `bzImage`, `vmlinux`, `initrd`, `initrd-tools`, `modules/`, `version`.
pub(crate) fn make(
    cache: &Cache,
    recipe: &Recipe,
    apt: &Apt,
    toolbox: &Toolbox,
    kernel: &Kernel,
) -> Result<PathBuf> {
    let (package, version) = apt.kernel(&kernel.package)?;
    let init = recipe::file("guest-init")?;
    let key = Key::new()
        .with("4")
        .with(&package)
        .with(&version)
        .with(&init)
        .with(format!("{:?}", recipe.guest_initrd))
        .with(toolbox.tree().to_string_lossy().as_bytes());
    cache.make(&format!("kernel-{}", kernel.name), key, |folder| {
        host::step(&format!("kernel {}: {package} {version}", kernel.name));
        let download = folder.join("download");
        let tree = folder.join("tree");
        for folder in [&download, &tree] {
            fs::create_dir_all(folder)?;
        }
        apt::unpack(&apt.fetch(&package, &version, &download)?, &tree)?;
        let release = release(&tree)?;
        fs::copy(
            tree.join(format!("boot/vmlinuz-{release}")),
            folder.join("bzImage"),
        )?;
        let elf = elf_of_bzimage(&fs::read(folder.join("bzImage"))?, toolbox)?;
        fs::write(folder.join("vmlinux"), elf)?;
        let modules = Modules::prepare(&tree, &release, toolbox)?;
        let mut archive = guest(toolbox, &modules, recipe, &init)?;
        fs::write(folder.join("initrd"), archive.bytes()?)?;
        for program in &recipe.guest_initrd.programs {
            images::add_program(&mut archive, toolbox, program)?;
        }
        let names = "usr/share/misc/pci.ids";
        archive.copy(&toolbox.tree().join(names), names, 0o644)?;
        fs::write(folder.join("initrd-tools"), archive.bytes()?)?;
        fs::write(folder.join("version"), format!("{package} {version}\n"))?;
        fs::write(folder.join("release"), &release)?;
        // Only the modules of the lab host and of the Debian guest are needed later, and those of the former are many.
        fs::rename(tree.join("lib/modules"), folder.join("modules"))
            .or_else(|_| fs::rename(tree.join("usr/lib/modules"), folder.join("modules")))?;
        fs::remove_dir_all(&download)?;
        fs::remove_dir_all(&tree)?;
        Ok(())
    })
}

fn release(tree: &Path) -> Result<String> {
    fs::read_dir(tree.join("boot"))?
        .filter_map(Result::ok)
        .find_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix("vmlinuz-")
                .map(str::to_owned)
        })
        .context("the package has no kernel image")
}

/// The test initrd: BusyBox, the modules with their index (so that `modprobe` finds drivers by alias), the init.
fn guest(toolbox: &Toolbox, modules: &Modules, recipe: &Recipe, init: &str) -> Result<Archive> {
    let mut archive = Archive::default();
    archive.copy(&toolbox.tree().join("usr/bin/busybox"), "bin/busybox", 0o755)?;
    archive.file("init", 0o755, init);
    for folder in [
        "proc", "sys", "dev", "tmp", "mnt", "root", "etc", "sbin", "usr/bin", "usr/sbin",
    ] {
        archive.folder(folder);
    }
    let base = format!("lib/modules/{}", modules.release);
    let wanted = modules.with_dependencies(&recipe.guest_initrd.modules);
    for path in &wanted {
        archive.file(
            &format!("{base}/{}", uncompressed_name(path)),
            0o644,
            modules.content(path)?,
        );
    }
    // An index of just these modules, of the same form as depmod's.
    let names: BTreeSet<String> = wanted.iter().map(|path| module_name(path)).collect();
    let mut index = String::new();
    for path in &wanted {
        index.push_str(&uncompressed_name(path));
        index.push(':');
        for dependency in modules.dependencies.get(path).into_iter().flatten() {
            index.push(' ');
            index.push_str(&uncompressed_name(dependency));
        }
        index.push('\n');
    }
    archive.file(&format!("{base}/modules.dep"), 0o644, index);
    let aliases: String = fs::read_to_string(modules.folder.join("modules.alias"))?
        .lines()
        .filter(|line| line.rsplit(' ').next().is_some_and(|name| names.contains(name)))
        .flat_map(|line| [line, "\n"])
        .collect();
    archive.file(&format!("{base}/modules.alias"), 0o644, aliases);
    for name in ["modules.builtin", "modules.order"] {
        archive.copy(&modules.folder.join(name), &format!("{base}/{name}"), 0o644)?;
    }
    Ok(archive)
}

/// The modules of a kernel, with what each depends on.
pub(crate) struct Modules {
    pub(crate) release: String,
    folder: PathBuf,
    /// Path to the paths it needs, in the order in which depmod names them: load them from last to first.
    dependencies: HashMap<String, Vec<String>>,
    toolbox: Toolbox,
}

impl Modules {
    /// Runs depmod over an unpacked kernel package.
    fn prepare(tree: &Path, release: &str, toolbox: &Toolbox) -> Result<Self> {
        if !tree.join("lib/modules").exists() && tree.join("usr/lib/modules").exists() {
            fs::create_dir_all(tree.join("lib"))?;
            fs::rename(tree.join("usr/lib/modules"), tree.join("lib/modules"))?;
        }
        finish(toolbox.command("depmod").arg("-b").arg(tree).arg(release))?;
        Self::read(&tree.join("lib/modules"), release, toolbox)
    }

    /// The modules of a kernel image.
    pub(crate) fn of_image(image: &Path, toolbox: &Toolbox) -> Result<Self> {
        let release = fs::read_to_string(image.join("release"))?;
        Self::read(&image.join("modules"), &release, toolbox)
    }

    fn read(parent: &Path, release: &str, toolbox: &Toolbox) -> Result<Self> {
        let folder = parent.join(release);
        let mut dependencies = HashMap::new();
        for line in fs::read_to_string(folder.join("modules.dep"))?.lines() {
            let Some((path, needs)) = line.split_once(':') else {
                continue;
            };
            dependencies.insert(
                path.to_owned(),
                needs.split_whitespace().map(str::to_owned).collect(),
            );
        }
        ensure!(!dependencies.is_empty(), "{} has no modules", folder.display());
        Ok(Self {
            release: release.to_owned(),
            folder,
            dependencies,
            toolbox: toolbox.clone(),
        })
    }

    /// The paths of the named modules and of what they need, in an order in which they can be loaded. Names that the
    /// kernel does not have as modules (because they are built in, or not at all) are left out.
    pub(crate) fn with_dependencies(&self, names: &[String]) -> Vec<String> {
        let mut paths = Vec::new();
        let mut add = |path: &String| {
            if !paths.contains(path) {
                paths.push(path.clone());
            }
        };
        for name in names {
            let Some((path, needs)) = self
                .dependencies
                .iter()
                .find(|(path, _)| module_name(path) == name.replace('-', "_"))
            else {
                continue;
            };
            needs.iter().rev().for_each(&mut add);
            add(path);
        }
        paths
    }

    /// A module's bytes, decompressed.
    pub(crate) fn content(&self, path: &str) -> Result<Vec<u8>> {
        let path = self.folder.join(path);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => finish(self.toolbox.command("xz").arg("-dc").arg(&path)),
            Some("zst") => finish(self.toolbox.command("zstd").arg("-dc").arg(&path)),
            _ => fs::read(&path).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Puts modules into an initrd as files in `modules/`, with the load order in `modules/order`.
    pub(crate) fn add_in_order(&self, archive: &mut Archive, names: &[String]) -> Result<()> {
        for (name, content) in self.in_order(names)? {
            archive.file(&format!("modules/{name}"), 0o644, content);
        }
        Ok(())
    }

    /// Writes modules into a folder, with the load order in `order`.
    pub(crate) fn write_in_order(&self, folder: &Path, names: &[String]) -> Result<()> {
        fs::create_dir_all(folder)?;
        for (name, content) in self.in_order(names)? {
            fs::write(folder.join(name), content)?;
        }
        Ok(())
    }

    /// The files of modules, and the file `order`.
    fn in_order(&self, names: &[String]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        let mut order = String::new();
        for path in self.with_dependencies(names) {
            let name = format!("{}.ko", module_name(&path));
            order.push_str(&name);
            order.push('\n');
            files.push((name, self.content(&path)?));
        }
        files.push(("order".into(), order.into_bytes()));
        Ok(files)
    }
}

fn uncompressed_name(path: &str) -> String {
    path.trim_end_matches(".xz").trim_end_matches(".zst").to_owned()
}

/// `kernel/drivers/virtio/virtio_pci.ko.xz` is `virtio_pci`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The ELF kernel in a bzImage: the payload of its setup header (Documentation/arch/x86/boot.rst), decompressed.
fn elf_of_bzimage(image: &[u8], toolbox: &Toolbox) -> Result<Vec<u8>> {
    let field = |offset: usize| -> Result<usize> {
        let bytes = image
            .get(offset..offset + 4)
            .context("the kernel image is too short")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    let setup_sectors = match image
        .get(0x1f1)
        .copied()
        .context("the kernel image is too short")?
    {
        0 => 4,
        count => usize::from(count),
    };
    let begin = (setup_sectors + 1) * 512 + field(0x248)?;
    // The last four bytes tell the size when decompressed.
    let payload = image
        .get(begin..begin + field(0x24c)?.saturating_sub(4))
        .context("the payload is beyond the image")?;
    let program: &[&str] = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => &["lz4", "-dc"],
        [0x28, 0xb5, 0x2f, 0xfd, ..] => &["zstd", "-dc"],
        [0x1f, 0x8b, ..] => &["gzip", "-dc"],
        [0xfd, b'7', b'z', b'X', ..] => &["xz", "-dc"],
        _ => bail!("the kernel's compression is unknown: {:x?}", payload.get(..4)),
    };
    let elf = filter(toolbox.command(program[0]).args(&program[1..]), payload)?;
    ensure!(
        elf.starts_with(b"\x7fELF"),
        "the kernel image has no ELF file in it"
    );
    Ok(elf)
}

/// Runs a program on some input. Trailing garbage makes decompressors complain, so only their output counts.
fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        let output = child.wait_with_output();
        // The reader may stop early, at the end of the compressed data.
        drop(writer.join());
        output
    })?;
    Ok(output.stdout)
}
