//! Debian packages without touching this machine's package state: apt with folders of its own in the cache.
//!
//! Each suite has its own lists, so that guest kernels of other Debian releases can be had. apt checks the archive's
//! signatures with the keyring of the package debian-archive-keyring, and every package against the signed lists.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Cache, finish};

use crate::host;
use crate::recipe::Recipe;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt for one suite.
pub(crate) struct Apt {
    folder: PathBuf,
    suite: String,
    /// Whether the suite is an addition to another one.
    addition: bool,
}

/// A package in one version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    /// Name of its file, which has name, version and architecture.
    pub(crate) file: String,
}

impl Apt {
    /// Prepares the folders, and fetches the lists when there are none or when asked to.
    pub(crate) fn open(cache: &Cache, recipe: &Recipe, suite: &str, refresh: bool) -> Result<Self> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: apt-get install debian-archive-keyring"
        );
        let definition = recipe
            .suites
            .get(suite)
            .with_context(|| format!("the recipe has no suite {suite}"))?;
        let apt = Self {
            folder: cache.path("apt").join(suite),
            suite: suite.to_owned(),
            addition: definition.base.is_some(),
        };
        for folder in [
            "lists/partial",
            "archives/partial",
            "none/partial",
            "etc/preferences.d",
        ] {
            fs::create_dir_all(apt.folder.join(folder))?;
        }
        let mut sources = format!("deb [signed-by={KEYRING}] {} {suite} main\n", recipe.mirror);
        if let Some(base) = &definition.base {
            writeln!(sources, "deb [signed-by={KEYRING}] {} {base} main", recipe.mirror)?;
        }
        if definition.security {
            let base = definition.base.as_deref().unwrap_or(suite);
            writeln!(
                sources,
                "deb [signed-by={KEYRING}] {} {base}-security main",
                recipe.security_mirror
            )?;
        }
        let path = apt.folder.join("sources.list");
        let changed = fs::read_to_string(&path).ok().as_deref() != Some(&sources);
        fs::write(&path, &sources)?;
        fs::write(apt.folder.join("status"), "")?;
        let complete = apt.folder.join("complete");
        if refresh || changed || !complete.exists() {
            host::step(&format!("fetching the package lists of Debian {suite}"));
            fs::remove_file(&complete).ok();
            finish(
                apt.command("apt-get")
                    .args(["-q", "-o", "APT::Update::Error-Mode=any", "update"]),
            )
            .with_context(|| format!("cannot fetch the package lists of {suite} from {}", recipe.mirror))?;
            fs::write(&complete, "")?;
        }
        Ok(apt)
    }

    /// The packages that these need to run, themselves included (recommended ones not).
    pub(crate) fn closure(&self, packages: &[String]) -> Result<Vec<Package>> {
        // apt leaves out what it has in its archive folder already: show it an empty one.
        let empty = format!("Dir::Cache::archives={}", self.folder.join("none").display());
        let mut command = self.command("apt-get");
        command.args([
            "-o",
            &empty,
            "-y",
            "-qq",
            "--print-uris",
            "--download-only",
            "install",
        ]);
        let output = finish(command.args(packages))?;
        // 'URI' FILE SIZE HASH
        let mut files: Vec<Package> = String::from_utf8_lossy(&output)
            .lines()
            .filter(|line| line.starts_with('\''))
            .filter_map(|line| line.split(' ').nth(1))
            .map(|file| Package {
                file: file.to_owned(),
            })
            .collect();
        files.sort();
        ensure!(
            !files.is_empty(),
            "apt found no packages for {packages:?} in {}",
            self.suite
        );
        Ok(files)
    }

    /// Fetches what [`Apt::closure`] told; returns the files.
    pub(crate) fn fetch_closure(&self, packages: &[String], closure: &[Package]) -> Result<Vec<PathBuf>> {
        finish(
            self.command("apt-get")
                .args(["-y", "-q", "--download-only", "install"])
                .args(packages),
        )?;
        let files: Vec<PathBuf> = closure
            .iter()
            .map(|package| self.folder.join("archives").join(&package.file))
            .collect();
        for file in &files {
            ensure!(file.exists(), "apt did not fetch {}", file.display());
        }
        Ok(files)
    }

    /// The package of the newest kernel that a metapackage such as `linux-image-cloud-amd64` depends on.
    pub(crate) fn kernel(&self, metapackage: &str) -> Result<(String, String)> {
        let output = finish(
            self.command("apt-cache")
                .args(["show", "--no-all-versions", metapackage]),
        )
        .with_context(|| format!("Debian {} has no {metapackage}", self.suite))?;
        let text = String::from_utf8_lossy(&output);
        let depends = text
            .lines()
            .find_map(|line| line.strip_prefix("Depends: "))
            .unwrap_or_default();
        let Some(name) = depends
            .split([',', ' ', '|'])
            .find(|word| word.starts_with("linux-image-"))
        else {
            bail!("{metapackage} depends on no kernel image: {depends}");
        };
        let output = finish(
            self.command("apt-cache")
                .args(["show", "--no-all-versions", name]),
        )?;
        let fields: BTreeMap<String, String> = String::from_utf8_lossy(&output)
            .lines()
            .filter_map(|line| line.split_once(": "))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let version = fields
            .get("Version")
            .with_context(|| format!("{name} has no version"))?;
        Ok((name.to_owned(), version.clone()))
    }

    /// Fetches one package into a folder.
    pub(crate) fn fetch(&self, name: &str, version: &str, to: &Path) -> Result<PathBuf> {
        finish(
            self.command("apt-get")
                .args(["-q", "download", &format!("{name}={version}")])
                .current_dir(to),
        )?;
        let found = fs::read_dir(to)?.filter_map(Result::ok).map(|entry| entry.path());
        found
            .into_iter()
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt did not fetch {name}"))
    }

    /// The file that names the archives.
    pub(crate) fn sources(&self) -> PathBuf {
        self.folder.join("sources.list")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(std::process::Stdio::null());
        let at = |name: &str| self.folder.join(name).display().to_string();
        for option in [
            format!("Dir::Etc={}", at("etc")),
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=/nonexistent".into(),
            format!("Dir::State={}", at("")),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::State::status={}", at("status")),
            format!("Dir::Cache={}", at("")),
            format!("Dir::Cache::archives={}", at("archives")),
            // An addition such as backports counts only when it is asked for: this asks.
            format!(
                "APT::Default-Release={}",
                if self.addition { self.suite.as_str() } else { "" }
            ),
            "APT::Install-Recommends=false".into(),
            "APT::Sandbox::User=".into(),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=3".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// Unpacks a package over a tree with merged `/usr`, without asking for anybody's rights.
pub(crate) fn unpack(package: &Path, tree: &Path) -> Result<()> {
    let mut producer = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let stream = producer.stdout.take().context("dpkg-deb has no output")?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(tree).args([
        "-x",
        "--keep-directory-symlink",
        "--no-same-owner",
        "--exclude=./usr/share/doc/*",
    ]);
    tar.args([
        "--exclude=./usr/share/man/*",
        "--exclude=./usr/share/locale/*",
        "--exclude=./usr/share/info/*",
    ]);
    finish(tar.stdin(stream))?;
    ensure!(
        producer.wait()?.success(),
        "dpkg-deb could not read {}",
        package.display()
    );
    Ok(())
}
