//! The texts that name devices: which of them are addresses, and what relative paths in them are relative to.

use std::path::Path;

use crate::nbd::{NbdAddress, NbdServer};

/// Begins the text for several paths.
const MULTIPATH: &str = "multipath:";

/// Whether `spec` is the address of an NBD server, or meant to be one.
pub(crate) fn is_nbd(spec: &str) -> bool {
    ["nbd:", "nbd+unix:", "nbds:", "nbds+unix:"]
        .iter()
        .any(|scheme| spec.starts_with(scheme))
}

/// The paths of a device that has several.
pub(crate) fn several(spec: &str) -> Option<impl Iterator<Item = &str>> {
    let list = spec.strip_prefix(MULTIPATH)?;
    Some(list.split(',').filter(|spec| !spec.is_empty()))
}

/// `spec`, as understood by [`crate::Device::open`], with relative paths of files and sockets taken as relative to `folder`.
pub fn relative_to(spec: &str, folder: &Path) -> String {
    if let Some(paths) = several(spec) {
        let placed: Vec<String> = paths.map(|spec| one_relative_to(spec, folder)).collect();
        return format!("{MULTIPATH}{}", placed.join(","));
    }
    one_relative_to(spec, folder)
}

fn one_relative_to(spec: &str, folder: &Path) -> String {
    if !is_nbd(spec) {
        return folder.join(spec).to_string_lossy().into_owned();
    }
    match spec.parse() {
        Ok(NbdAddress {
            server: NbdServer::Unix(path),
            export,
        }) if path.is_relative() && !folder.as_os_str().is_empty() => NbdAddress {
            server: NbdServer::Unix(folder.join(path)),
            export,
        }
        .to_string(),
        // Opening it says what is wrong.
        _ => spec.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_are_found_wherever_they_stand() {
        let place = |spec| relative_to(spec, Path::new("/vm"));
        assert_eq!(place("d0.img"), "/vm/d0.img");
        assert_eq!(place("/dev/sdb"), "/dev/sdb");
        assert_eq!(place("nbd://host/a"), "nbd://host/a");
        assert_eq!(
            place("nbd+unix:///a?socket=/run/s"),
            "nbd+unix:///a?socket=/run/s"
        );
        assert_eq!(place("nbd+unix:///a?socket=s"), "nbd+unix:///a?socket=/vm/s");
        assert_eq!(
            place("multipath:a,/b,nbd+unix:///?socket=s"),
            "multipath:/vm/a,/b,nbd+unix:///?socket=/vm/s"
        );
        assert_eq!(place("nbd:nonsense"), "nbd:nonsense");
        assert_eq!(place("./nbd:odd-name"), "/vm/./nbd:odd-name");
        let here = |spec| relative_to(spec, Path::new(""));
        assert_eq!(here("d0.img"), "d0.img");
        assert_eq!(here("multipath:a,b"), "multipath:a,b");
    }
}
