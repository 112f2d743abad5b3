//! `memory`: how much, and of what pages.

use api::{ByteSize, InvalidValue};
use serde::{Deserialize, Serialize};

use crate::memory::{Pages, RamOptions};

/// The guest's memory. In vm.toml a size, or a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Input", rename_all = "kebab-case")]
pub struct MemoryConfig {
    /// Its size: 32 MiB to 16 TiB, a multiple of 2 MiB (of 1 GiB with pages of 1 GiB).
    pub size: ByteSize,
    /// The pages of the host that back it.
    pub huge_pages: HugePages,
    /// Shareable with other processes (vhost-user back-ends).
    pub shared: bool,
    /// Take all pages from the host at start instead of at first use.
    pub prefault: bool,
}

impl MemoryConfig {
    /// What a Linux guest needs at the very least.
    pub const MIN: ByteSize = ByteSize::from_mib(32);
    /// Well within the address space that every x86-64 host can map.
    pub const MAX: ByteSize = ByteSize::from_mib(16 << 20);
}

impl MemoryConfig {
    /// The memory that is meant; `shared` if it must be, whatever the configuration says.
    pub fn ram(&self, shared: bool) -> RamOptions {
        RamOptions {
            size: self.size.bytes(),
            pages: match self.huge_pages {
                HugePages::None => Pages::Small,
                HugePages::Transparent => Pages::Transparent,
                HugePages::Size2M => Pages::Huge2M,
                HugePages::Size1G => Pages::Huge1G,
            },
            shared: shared || self.shared,
            prefault: self.prefault,
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: ByteSize::from_mib(512),
            huge_pages: HugePages::default(),
            shared: false,
            prefault: false,
        }
    }
}

/// Pages of the host that back the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HugePages {
    /// Pages of 4 KiB.
    #[serde(rename = "none")]
    None,
    /// Pages of 2 MiB where the host has some to spare (transparent huge pages).
    #[default]
    #[serde(rename = "thp")]
    Transparent,
    /// Pages of 2 MiB from the host's reserve.
    #[serde(rename = "2M")]
    Size2M,
    /// Pages of 1 GiB from the host's reserve.
    #[serde(rename = "1G")]
    Size1G,
}

impl HugePages {
    /// What the size of the guest's memory must be a multiple of.
    pub const fn granularity(self) -> ByteSize {
        match self {
            Self::None | Self::Transparent | Self::Size2M => ByteSize::from_mib(2),
            Self::Size1G => ByteSize::from_mib(1024),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Input {
    #[serde(default = "default_size")]
    size: ByteSize,
    #[serde(default)]
    huge_pages: HugePages,
    #[serde(default)]
    shared: bool,
    #[serde(default)]
    prefault: bool,
}

fn default_size() -> ByteSize {
    MemoryConfig::default().size
}

impl TryFrom<Input> for MemoryConfig {
    type Error = InvalidValue;

    fn try_from(input: Input) -> Result<Self, InvalidValue> {
        let size = input.size;
        if !(Self::MIN..=Self::MAX).contains(&size) {
            return Err(InvalidValue::new(format!(
                "size {size} is impossible; use {} to {}",
                Self::MIN,
                Self::MAX
            )));
        }
        let granularity = input.huge_pages.granularity();
        if !size.bytes().is_multiple_of(granularity.bytes()) {
            return Err(InvalidValue::new(format!(
                "size {size} is impossible; it must be a multiple of {granularity}"
            )));
        }
        Ok(Self {
            size,
            huge_pages: input.huge_pages,
            shared: input.shared,
            prefault: input.prefault,
        })
    }
}
