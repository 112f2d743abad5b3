//! The kinds of devices that production code opens, as one type, and the text that says which.

use std::time::Duration;

use crate::buffer::IoBuf;
use crate::clock::WorkerClock;
use crate::device::{Allocation, BlockDevice, Durability, Geometry, ZeroMode};
use crate::error::IoError;
use crate::host::{HostDevice, OpenError, OpenOptions};
use crate::multipath::{DevicePath, MultiPath, MultiPathError, MultiPathOptions};
use crate::nbd::{NbdAddress, NbdAddressError, NbdDevice, NbdError, NbdOptions};
use crate::spec;

/// A path over NBD that is silent for so long is given up for another one.
const PATH_SILENCE: Duration = Duration::from_secs(10);

/// A device of any kind.
#[derive(Debug)]
pub enum Device {
    /// A regular file or a block device of this host.
    Host(HostDevice),
    /// An export of an NBD server.
    Nbd(NbdDevice),
    /// A device behind several paths.
    Paths(Box<MultiPath<SinglePath>>),
}

/// A device that can be one of several paths.
#[derive(Debug)]
pub enum SinglePath {
    /// A regular file or a block device of this host.
    Host(HostDevice),
    /// An export of an NBD server.
    Nbd(NbdDevice),
}

/// How to open a [`Device`].
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// For files and block devices; `read_only` and `lock` are for all kinds.
    pub host: OpenOptions,
    /// How long requests wait for a server that is gone, or when all paths are down.
    pub patience: Duration,
    /// How long a server may take for an answer before it counts as gone; less where there are several paths.
    pub silence: Duration,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            host: OpenOptions::default(),
            patience: Duration::from_secs(30),
            silence: Duration::from_secs(30),
        }
    }
}

/// A device could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A file or block device.
    #[error(transparent)]
    Host(#[from] OpenError),
    /// The address of an NBD server is none.
    #[error(transparent)]
    Address(#[from] NbdAddressError),
    /// An NBD server.
    #[error("cannot open {address}")]
    Nbd {
        /// Its address.
        address: String,
        /// Why.
        source: NbdError,
    },
    /// Paths that do not belong together.
    #[error(transparent)]
    Paths(#[from] MultiPathError),
}

impl DeviceError {
    /// Whether the device, or the way to it, is not there: another path may work, and the device may come back.
    pub fn is_absence(&self) -> bool {
        match self {
            Self::Host(OpenError::Open { source, .. }) => matches!(
                source.raw_os_error(),
                Some(libc::ENOENT | libc::ENOTDIR | libc::ENXIO | libc::ENODEV)
            ),
            Self::Nbd { source, .. } => source.is_absence(),
            _ => false,
        }
    }
}

impl Device {
    /// As [`HostDevice::prefer_extents`], where it is a file of this host.
    pub fn prefer_extents(&self, bytes: u32) {
        if let Self::Host(device) = self {
            device.prefer_extents(bytes);
        }
    }

    /// Opens what `spec` says:
    ///
    /// - `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`: an export of an NBD server,
    /// - `multipath:SPEC,SPEC…`: several of these or of paths, all to one device; a comma inside one is not possible, but as
    ///   `%2C` in an NBD address. Those that cannot be reached are left out until the device is opened again, unless all are,
    /// - everything else: the path of a regular file or a block device. One that begins like the others is written with `./`.
    ///
    /// Blocks: for tools and set-up, not for tasks.
    ///
    /// # Errors
    /// The text is no address, or the device cannot be opened.
    pub fn open(spec: &str, options: &DeviceOptions) -> Result<Self, DeviceError> {
        if let Some(paths) = spec::several(spec) {
            return open_paths(paths, options);
        }
        let nbd = NbdOptions {
            read_only: options.host.read_only,
            patience: options.patience,
            silence: options.silence,
            lock: options.host.lock,
            ..NbdOptions::default()
        };
        Ok(match SinglePath::open(spec, options, &nbd)? {
            SinglePath::Host(device) => Self::Host(device),
            SinglePath::Nbd(device) => Self::Nbd(device),
        })
    }
}

impl SinglePath {
    fn open(spec: &str, options: &DeviceOptions, nbd: &NbdOptions) -> Result<Self, DeviceError> {
        if !spec::is_nbd(spec) {
            return Ok(Self::Host(HostDevice::open(spec, &options.host)?));
        }
        let address: NbdAddress = spec.parse()?;
        let device = NbdDevice::open(&address, nbd).map_err(|source| DeviceError::Nbd {
            address: spec.to_owned(),
            source,
        })?;
        Ok(Self::Nbd(device))
    }

    fn identity(&self) -> Option<String> {
        match self {
            Self::Host(device) => device.identity(),
            Self::Nbd(_) => None,
        }
    }
}

fn open_paths<'a>(
    specs: impl Iterator<Item = &'a str>,
    options: &DeviceOptions,
) -> Result<Device, DeviceError> {
    // Failures are for the paths' owner to deal with, at once; it also remembers what is not flushed.
    let nbd = NbdOptions {
        read_only: options.host.read_only,
        patience: Duration::ZERO,
        silence: options.silence.min(PATH_SILENCE),
        unflushed_limit: 0,
        lock: options.host.lock,
    };
    let mut paths = Vec::new();
    let mut unreachable = None;
    let mut seen: Vec<&str> = Vec::new();
    for spec in specs {
        // The same address may be given twice, for two connections.
        let nbd = NbdOptions {
            lock: nbd.lock && !seen.contains(&spec),
            ..nbd.clone()
        };
        seen.push(spec);
        match SinglePath::open(spec, options, &nbd) {
            Ok(device) => paths.push(DevicePath {
                identity: device.identity(),
                device,
                name: spec.to_owned(),
            }),
            Err(error) if error.is_absence() => {
                tracing::warn!(path = spec, %error, "a path cannot be opened and is left out");
                unreachable = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    if let (true, Some(error)) = (paths.is_empty(), unreachable) {
        return Err(error);
    }
    let remembers = paths.iter().any(|path| matches!(path.device, SinglePath::Nbd(_)));
    let defaults = MultiPathOptions::default();
    let options = MultiPathOptions {
        patience: options.patience,
        // Ports of one disk have one cache.
        unflushed_limit: if remembers { defaults.unflushed_limit } else { 0 },
        ..defaults
    };
    Ok(Device::Paths(Box::new(MultiPath::new(
        paths,
        options,
        WorkerClock::new(),
    )?)))
}

/// Implements [`BlockDevice`] for an enum by asking what is inside. Requests to other kinds than files and block devices are
/// boxed: they cost far more than an allocation, and requests to files stay as small as they are, through all layers above.
macro_rules! dispatch {
    ($kind:ident, $($boxed:ident),+) => {
        impl BlockDevice for $kind {
            fn geometry(&self) -> Geometry {
                match self {
                    Self::Host(device) => device.geometry(),
                    $(Self::$boxed(device) => device.geometry()),+
                }
            }

            fn size(&self) -> u64 {
                match self {
                    Self::Host(device) => device.size(),
                    $(Self::$boxed(device) => device.size()),+
                }
            }

            async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
                match self {
                    Self::Host(device) => device.read(offset, buffers).await,
                    $(Self::$boxed(device) => Box::pin(device.read(offset, buffers)).await),+
                }
            }

            async fn write(
                &self,
                offset: u64,
                buffers: &[IoBuf],
                durability: Durability,
            ) -> Result<(), IoError> {
                match self {
                    Self::Host(device) => device.write(offset, buffers, durability).await,
                    $(Self::$boxed(device) => Box::pin(device.write(offset, buffers, durability)).await),+
                }
            }

            async fn flush(&self) -> Result<(), IoError> {
                match self {
                    Self::Host(device) => device.flush().await,
                    $(Self::$boxed(device) => Box::pin(device.flush()).await),+
                }
            }

            async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
                match self {
                    Self::Host(device) => device.discard(offset, length).await,
                    $(Self::$boxed(device) => Box::pin(device.discard(offset, length)).await),+
                }
            }

            async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
                match self {
                    Self::Host(device) => device.allocation(offset, length).await,
                    $(Self::$boxed(device) => Box::pin(device.allocation(offset, length)).await),+
                }
            }

            async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
                match self {
                    Self::Host(device) => device.write_zeroes(offset, length, mode).await,
                    $(Self::$boxed(device) => Box::pin(device.write_zeroes(offset, length, mode)).await),+
                }
            }
        }

        impl $kind {
            /// What it was opened with, for messages.
            pub fn name(&self) -> &str {
                match self {
                    Self::Host(device) => device.name(),
                    $(Self::$boxed(device) => device.name()),+
                }
            }

            /// Whether a flush failed, so that flushes and durable writes are refused.
            pub fn flush_has_failed(&self) -> bool {
                match self {
                    Self::Host(device) => device.flush_has_failed(),
                    $(Self::$boxed(device) => device.flush_has_failed()),+
                }
            }

            /// An administrator knows of the failed flush and wants to go on.
            pub fn acknowledge_flush_failure(&self) {
                match self {
                    Self::Host(device) => device.acknowledge_flush_failure(),
                    $(Self::$boxed(device) => device.acknowledge_flush_failure()),+
                }
            }
        }
    };
}

dispatch!(Device, Nbd, Paths);
dispatch!(SinglePath, Nbd);

impl MultiPath<SinglePath> {
    /// Whether a flush failed, here or below.
    pub fn flush_has_failed(&self) -> bool {
        self.own_flush_has_failed() || self.paths().iter().any(|(device, _)| device.flush_has_failed())
    }

    /// An administrator knows of the failed flush and wants to go on, here and below.
    pub fn acknowledge_flush_failure(&self) {
        self.acknowledge_own_flush_failure();
        for (device, _) in self.paths() {
            device.acknowledge_flush_failure();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_hardly_larger_than_that_of_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let device = Device::open(path, &DeviceOptions::default()).unwrap();
        let Device::Host(inner) = &device else {
            panic!("not a file")
        };
        for (all, file) in [
            (
                size_of_val(&device.read(0, &[])),
                size_of_val(&inner.read(0, &[])),
            ),
            (
                size_of_val(&device.write(0, &[], Durability::Volatile)),
                size_of_val(&inner.write(0, &[], Durability::Volatile)),
            ),
        ] {
            assert!(all <= file + 64, "{all} and {file} bytes");
        }
    }
}
