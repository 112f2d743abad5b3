//! `images/recipe.toml`: which images there are, and from which packages.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Recipe {
    pub(crate) mirror: String,
    pub(crate) security_mirror: String,
    pub(crate) suites: BTreeMap<String, Suite>,
    pub(crate) toolbox: Programs,
    pub(crate) emulator: Programs,
    pub(crate) kernel: Vec<Kernel>,
    pub(crate) lab: LabHost,
    pub(crate) guest_initrd: GuestInitrd,
    pub(crate) guest_tools: GuestTools,
    pub(crate) debian: Debian,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Suite {
    /// The suite that this one is an addition to.
    pub(crate) base: Option<String>,
    /// Whether Debian's security archive has it, or its base.
    #[serde(default)]
    pub(crate) security: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Programs {
    pub(crate) suite: String,
    pub(crate) packages: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) suite: String,
    pub(crate) package: String,
    /// Whether set-up stops without it.
    #[serde(default)]
    pub(crate) required: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct LabHost {
    pub(crate) kernel: String,
    pub(crate) initrd_modules: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct GuestInitrd {
    pub(crate) modules: Vec<String>,
    pub(crate) programs: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GuestTools {
    pub(crate) suite: String,
    pub(crate) packages: Vec<String>,
    pub(crate) programs: Vec<String>,
    /// With what programs load by name.
    pub(crate) folders: Vec<String>,
    pub(crate) modules: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Debian {
    pub(crate) suite: String,
    pub(crate) kernel: String,
    pub(crate) size: String,
    pub(crate) initrd_modules: Vec<String>,
    pub(crate) packages: Vec<String>,
}

impl Recipe {
    /// Reads the recipe of this work tree. `SMSVMM_DEBIAN_MIRROR` and `SMSVMM_DEBIAN_SECURITY_MIRROR` override its mirrors.
    pub(crate) fn load() -> Result<Self> {
        let mut recipe: Self =
            toml::from_str(&file("recipe.toml")?).context("images/recipe.toml is not right")?;
        if let Ok(mirror) = std::env::var("SMSVMM_DEBIAN_MIRROR") {
            recipe.mirror = mirror;
        }
        if let Ok(mirror) = std::env::var("SMSVMM_DEBIAN_SECURITY_MIRROR") {
            recipe.security_mirror = mirror;
        }
        Ok(recipe)
    }
}

/// The text of a file in `images/`.
pub(crate) fn file(name: &str) -> Result<String> {
    let path: PathBuf = lab::repository().join("images").join(name);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}
