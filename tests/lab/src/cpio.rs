//! Writes cpio archives in the `newc` format, which is what the kernel unpacks as an initrd
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Entries are sorted and bare of times and owners, so that
//! equal content gives equal bytes.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use anyhow::{Context as _, Result};

#[derive(Clone, Debug)]
enum Entry {
    Folder,
    File { mode: u32, content: Vec<u8> },
    Link { target: String },
}

/// An archive that is being put together.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds a file, and the folders above it.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        self.insert(
            path,
            Entry::File {
                mode,
                content: content.into(),
            },
        );
    }

    /// Adds a file of this machine.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn copy(&mut self, from: &Path, path: &str, mode: u32) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, mode, content);
        Ok(())
    }

    /// Adds a symlink.
    pub fn link(&mut self, path: &str, target: &str) {
        self.insert(
            path,
            Entry::Link {
                target: target.to_owned(),
            },
        );
    }

    /// Adds an empty folder.
    pub fn folder(&mut self, path: &str) {
        self.insert(path, Entry::Folder);
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let parts: Vec<String> = Path::new(path)
            .components()
            .filter_map(|part| match part {
                Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
                _ => None,
            })
            .collect();
        for end in 1..parts.len() {
            self.entries
                .entry(parts.get(..end).unwrap_or_default().join("/"))
                .or_insert(Entry::Folder);
        }
        self.entries.insert(parts.join("/"), entry);
    }

    /// The archive's bytes. The kernel takes several archives one after another as one.
    ///
    /// # Errors
    /// When a file is too large for the format (4 GiB).
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for (number, (path, entry)) in (1_u32..).zip(&self.entries) {
            let (mode, content): (u32, &[u8]) = match entry {
                Entry::Folder => (0o040_755, &[]),
                Entry::File { mode, content } => (0o100_000 | mode, content),
                Entry::Link { target } => (0o120_777, target.as_bytes()),
            };
            record(&mut out, number, mode, path, content)?;
        }
        record(&mut out, 0, 0, "TRAILER!!!", &[])?;
        // Archives may follow one another at multiples of 4; 512 is what cpio(1) pads to.
        pad(&mut out, 512);
        Ok(out)
    }
}

fn record(out: &mut Vec<u8>, number: u32, mode: u32, path: &str, content: &[u8]) -> Result<()> {
    let size = u32::try_from(content.len()).with_context(|| format!("{path} is too large for an initrd"))?;
    let name_size = u32::try_from(path.len() + 1)?;
    out.extend_from_slice(b"070701");
    // inode, mode, uid, gid, links, mtime, size, device and special device (two each), name size, check
    for field in [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out, 4);
    out.extend_from_slice(content);
    pad(out, 4);
    Ok(())
}

fn pad(out: &mut Vec<u8>, multiple: usize) {
    out.resize(out.len().next_multiple_of(multiple), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_names_folders_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.file("/bin/sh", 0o755, "x");
        archive.link("init", "bin/sh");
        let bytes = archive.bytes().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let position = |what: &str| text.find(what).unwrap();
        assert!(position("bin\0") < position("bin/sh\0") && position("bin/sh\0") < position("init\0"));
        assert!(text.starts_with("070701") && bytes.len() % 512 == 0);
        assert_eq!(text.matches("070701").count(), 4);
    }
}
