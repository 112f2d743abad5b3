//! Disks of a guest: what to attach and how it fares.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::is_name;
use crate::virtual_disk::DiskMode;
use crate::{
    AtPowerOff, ByteSize, DeviceId, DeviceState, DiskChange, DiskLimits, InvalidValue, OnError, ScsiAccess,
    ScsiPath, VmName, string_type,
};

/// A disk to be given to the guest: a `[[disk]]` of vm.toml, the body of `POST /v1/vm/disks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskConfig {
    /// Name within the machine; by default "disk0", "disk1", ...
    #[serde(default, skip_serializing_if = "DeviceId::is_unassigned")]
    pub id: DeviceId,
    /// A raw disk image or a block device of the host. Absolute once loaded. This, `file` or `vhost-user` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^/"))]
    pub image: Option<PathBuf>,
    /// A disk of the pool: `/vm/root.dsk`, or a snapshot `/vm/root.dsk@monday`, which is read-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^/"))]
    pub file: Option<String>,
    /// Of a disk that the host's manager serves: in which of its pools `file` is; may be left out if it has one only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The socket at which another process serves the disk (vhost-user-blk). Absolute once loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^/"), length(max = 107))]
    pub vhost_user: Option<PathBuf>,
    /// Of a disk of the pool: what becomes of what the guest writes.
    #[serde(default, skip_serializing_if = "is_persistent")]
    pub mode: DiskMode,
    /// Of an undoable disk: what becomes of what the guest has written when the machine ends; by default it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_power_off: Option<AtPowerOff>,
    /// How the guest sees the disk.
    #[serde(default)]
    pub bus: DiskBus,
    /// The target of the machine's SCSI adapter that shows the disk, 0 to 254; by default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 254))]
    pub target: Option<u8>,
    /// Its LUN there, 0 to 16383; by default the first that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 16383))]
    pub lun: Option<u16>,
    /// How this way gives access to the disk if there are others.
    #[serde(default, skip_serializing_if = "ScsiAccess::is_default")]
    pub access: ScsiAccess,
    /// Further ways to the disk, for multipathing: targets that show it as well.
    #[serde(
        default,
        rename = "path",
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "crate::objects"
    )]
    pub paths: Vec<ScsiPath>,
    /// The guest cannot write; several machines may then use the image at once.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as serial number; by default the identifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<DiskSerial>,
    /// Request queues, 1 to 16. Of a SCSI disk: what the machine's adapter shall have at least, unless `[scsi]` says it.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
    pub queues: u8,
    /// Requests that fit in a queue.
    #[serde(default)]
    pub queue_size: QueueSize,
    /// Bypass the host's page cache (O_DIRECT). Disks of a pool always do.
    #[serde(default = "yes")]
    pub direct: bool,
    /// How long the disk's worker looks for further requests before it sleeps, at most, in microseconds; by default it sleeps at
    /// once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 10_000))]
    pub poll_us: Option<u32>,
    /// Limits of its rate.
    #[serde(
        default,
        skip_serializing_if = "DiskLimits::is_empty",
        deserialize_with = "crate::object"
    )]
    pub limits: DiskLimits,
    /// The limits that it shares with other disks: a name in `[limit-groups]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_group: Option<DeviceId>,
    /// What happens when it fails a request.
    #[serde(default, skip_serializing_if = "OnError::is_default")]
    pub on_error: OnError,
}

impl DiskConfig {
    /// Most request queues of a disk.
    pub const MAX_QUEUES: u8 = 16;
    /// Longest path of a socket: sun_path of unix(7) has 108 bytes, one of which is the final zero.
    pub const MAX_SOCKET: usize = 107;
    /// Longest busy polling in microseconds.
    pub const MAX_POLL_US: u32 = 10_000;

    /// A writable disk on `image` with every default; the identifier is unassigned.
    pub fn new(image: impl Into<PathBuf>) -> Self {
        Self {
            id: DeviceId::default(),
            image: Some(image.into()),
            file: None,
            pool: None,
            vhost_user: None,
            mode: DiskMode::default(),
            at_power_off: None,
            bus: DiskBus::default(),
            target: None,
            lun: None,
            access: ScsiAccess::default(),
            paths: Vec::new(),
            read_only: false,
            serial: None,
            queues: one(),
            queue_size: QueueSize::default(),
            direct: true,
            poll_us: None,
            limits: DiskLimits::default(),
            limit_group: None,
            on_error: OnError::default(),
        }
    }

    /// A disk that another process serves at `socket`, with every default; the identifier is unassigned.
    pub fn served_at(socket: impl Into<PathBuf>) -> Self {
        Self {
            image: None,
            vhost_user: Some(socket.into()),
            ..Self::new("")
        }
    }

    /// Whether it is a logical unit of the machine's own SCSI adapter. One that another process serves is an adapter of its own.
    pub fn is_unit(&self) -> bool {
        self.bus == DiskBus::VirtioScsi && self.vhost_user.is_none()
    }

    /// What the disk lies on; none if nothing is given, or several, which [`Self::check`] refuses.
    pub fn source(&self) -> Option<DiskSource<'_>> {
        match (&self.image, &self.file, &self.vhost_user) {
            (Some(image), None, None) => Some(DiskSource::Image(image)),
            (None, Some(file), None) => Some(DiskSource::File(file)),
            (None, None, Some(socket)) => Some(DiskSource::VhostUser(socket)),
            _ => None,
        }
    }

    /// Checks what the types alone cannot.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        self.check_scsi()?;
        if self.pool.is_some() && self.file.is_none() {
            let text = "says in which pool `file` is, and there is no `file`";
            return Err(("pool", InvalidValue::new(text)));
        }
        if let Some(pool) = self
            .pool
            .as_deref()
            .filter(|pool| !is_name(pool, VmName::MAX_LENGTH))
        {
            let text = format!(
                "`{pool}` cannot be a pool of a manager; such a name has 1 to {} of A-Z a-z 0-9 . _ -",
                VmName::MAX_LENGTH
            );
            return Err(("pool", InvalidValue::new(text)));
        }
        if let Some(socket) = &self.vhost_user {
            self.check_served(socket)?;
            return self.check_queues();
        }
        match (&self.image, &self.file) {
            (None, None) => {
                let text = "is missing; name a raw image or a block device here, a disk of the pool in `file`, or a socket in `vhost-user`";
                return Err(("image", InvalidValue::new(text)));
            }
            (Some(_), Some(_)) => {
                let text = "cannot stand beside `image`; a disk is either an image of the host or a disk of the pool";
                return Err(("file", InvalidValue::new(text)));
            }
            (Some(image), None) if image.as_os_str().is_empty() => {
                return Err((
                    "image",
                    InvalidValue::new("is empty; name a raw image or a block device"),
                ));
            }
            (Some(_), None) if self.mode != DiskMode::default() => {
                let text = format!(
                    "`{}` is for disks of a pool, and this is an image",
                    self.mode.name()
                );
                return Err(("mode", InvalidValue::new(text)));
            }
            (None, Some(file)) if !file.starts_with('/') => {
                let text = format!(
                    "`{file}` is not a path in the pool; such a path begins with /, as in /vm/root.dsk"
                );
                return Err(("file", InvalidValue::new(text)));
            }
            (None, Some(_)) if !self.direct => {
                let text =
                    "cannot be false for a disk of the pool, which never goes through the host's page cache";
                return Err(("direct", InvalidValue::new(text)));
            }
            _ => {}
        }
        if self.at_power_off.is_some() && self.mode != DiskMode::Undoable {
            let text = format!(
                "is for disks with mode = \"undoable\", and this one is {}",
                self.mode.name()
            );
            return Err(("at-power-off", InvalidValue::new(text)));
        }
        if self.at_power_off.is_some() && self.read_only {
            let text = "is for disks that are written, and this one is read-only";
            return Err(("at-power-off", InvalidValue::new(text)));
        }
        self.limits.check().map_err(|(key, error)| {
            let key = match key {
                "iops" => "limits.iops",
                "iops-burst" => "limits.iops-burst",
                "bytes" => "limits.bytes",
                _ => "limits.bytes-burst",
            };
            (key, error)
        })?;
        self.check_queues()
    }

    /// Much of a disk that another process serves is that process's affair.
    fn check_served(&self, socket: &Path) -> Result<(), (&'static str, InvalidValue)> {
        let length = socket.as_os_str().len();
        let problem = if self.image.is_some() || self.file.is_some() {
            let text = "cannot stand beside `image` or `file`: what the disk lies on, the process at this socket knows";
            ("vhost-user", text.to_owned())
        } else if length == 0 {
            let text =
                "is empty; name the socket at which the disk is served, as by `smsvmm share vhost-user`";
            ("vhost-user", text.to_owned())
        } else if length > Self::MAX_SOCKET {
            let most = Self::MAX_SOCKET;
            let text =
                format!("the path has {length} bytes, a Unix socket's has at most {most}; use a shorter one");
            ("vhost-user", text)
        } else if self.bus == DiskBus::VirtioScsi && self.read_only {
            let text = "is for single disks, and this is an adapter with all disks of its server, which says who may write (`--read-only`)";
            ("read-only", text.to_owned())
        } else if let (DiskBus::VirtioScsi, Some(key)) = (self.bus, self.place_key()) {
            let text = "is for disks of the machine's own adapter, and this is an adapter with all disks of its server";
            (key, text.to_owned())
        } else if self.mode != DiskMode::default() {
            let text =
                "is for disks of a pool, and this one is served by another process, which may know of modes";
            ("mode", format!("`{}` {text}", self.mode.name()))
        } else if self.serial.is_some() {
            let text = "is told to the guest by the process that serves the disk, and cannot be set here";
            ("serial", text.to_owned())
        } else if !self.direct {
            let text = "is for images; give the process that serves the disk such an option (`--buffered`)";
            ("direct", text.to_owned())
        } else if self.poll_us.is_some() {
            let text = "is for disks that this process serves; give the one that serves it such an option (`--poll-us`)";
            ("poll-us", text.to_owned())
        } else if let Some(key) = self.own_setting() {
            let text = "is for disks that this process serves, and this one is served by another";
            (key, text.to_owned())
        } else {
            return Ok(());
        };
        Err((problem.0, InvalidValue::new(problem.1)))
    }

    /// A key that says where on the machine's own adapter a disk is.
    fn place_key(&self) -> Option<&'static str> {
        let keys = [
            ("target", self.target.is_some()),
            ("lun", self.lun.is_some()),
            ("path", !self.paths.is_empty()),
        ];
        keys.into_iter().find_map(|(key, set)| set.then_some(key))
    }

    /// A setting that only who serves the disk can keep.
    fn own_setting(&self) -> Option<&'static str> {
        let limits = self.limits != DiskLimits::default();
        [
            ("at-power-off", self.at_power_off.is_some()),
            ("limits", limits),
            ("limit-group", self.limit_group.is_some()),
            ("on-error", self.on_error != OnError::default()),
        ]
        .into_iter()
        .find_map(|(key, set)| set.then_some(key))
    }

    fn check_queues(&self) -> Result<(), (&'static str, InvalidValue)> {
        if !(1..=Self::MAX_QUEUES).contains(&self.queues) {
            return Err((
                "queues",
                InvalidValue::new(format!(
                    "{} queues are impossible; use 1 to {}",
                    self.queues,
                    Self::MAX_QUEUES
                )),
            ));
        }
        self.poll_us.map_or(Ok(()), Self::check_poll)
    }

    fn check_poll(poll: u32) -> Result<(), (&'static str, InvalidValue)> {
        if poll > Self::MAX_POLL_US {
            let text = format!("polling is limited to {} microseconds", Self::MAX_POLL_US);
            return Err(("poll-us", InvalidValue::new(text)));
        }
        Ok(())
    }

    /// The disk after a change.
    ///
    /// # Errors
    /// The key of the change that is wrong, and why.
    pub fn changed(&self, change: &DiskChange) -> Result<Self, (&'static str, InvalidValue)> {
        let mut config = self.clone();
        config.limits = self.limits.changed(&change.limits)?;
        if let Some(poll) = change.poll_us {
            Self::check_poll(poll)?;
            config.poll_us = (poll > 0).then_some(poll);
        }
        config.on_error = change.on_error.unwrap_or(self.on_error);
        Ok(config)
    }
}

/// What a disk lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskSource<'a> {
    /// An image or a block device of the host.
    Image(&'a Path),
    /// A disk of the pool.
    File(&'a str),
    /// A disk of another process, at this socket.
    VhostUser(&'a Path),
}

impl fmt::Display for DiskSource<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(path) | Self::VhostUser(path) => path.display().fmt(formatter),
            Self::File(path) => path.fmt(formatter),
        }
    }
}

fn is_persistent(mode: &DiskMode) -> bool {
    *mode == DiskMode::Persistent
}

fn one() -> u8 {
    1
}

fn yes() -> bool {
    true
}

/// The kind of controller through which the guest sees a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// A virtio block device of its own (/dev/vda in Linux).
    #[default]
    VirtioBlk,
    /// A SCSI disk on the machine's virtio-scsi adapter (/dev/sda in Linux).
    VirtioScsi,
}

/// Serial number of a disk: up to 20 printable ASCII characters (virtio 1.2 §5.2.6.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSerial(String);

impl DiskSerial {
    /// What virtio-blk's device identifier can hold, in bytes.
    pub const MAX_LENGTH: usize = 20;

    /// The serial number as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DiskSerial {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if (1..=Self::MAX_LENGTH).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidValue::new(format!(
                "`{text}` cannot be a serial number; use 1 to {} printable ASCII characters without spaces",
                Self::MAX_LENGTH
            )))
        }
    }
}

impl fmt::Display for DiskSerial {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

string_type!(DiskSerial, "a serial number in quotes", r"^[!-~]{1,20}$");

/// Entries of a virtqueue: a power of two from 16 to 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u64", into = "u16")]
#[schemars(extend("enum" = [16, 32, 64, 128, 256, 512, 1024]))]
pub struct QueueSize(u16);

impl QueueSize {
    /// Number of entries.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl Default for QueueSize {
    fn default() -> Self {
        Self(256)
    }
}

impl TryFrom<u64> for QueueSize {
    type Error = InvalidValue;

    fn try_from(size: u64) -> Result<Self, InvalidValue> {
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && (16..=1024).contains(&size) => Ok(Self(size)),
            _ => Err(InvalidValue::new(format!(
                "{size} is not a queue size; use one of 16, 32, 64, 128, 256, 512, 1024"
            ))),
        }
    }
}

impl From<QueueSize> for u16 {
    fn from(size: QueueSize) -> Self {
        size.0
    }
}

/// A disk of a running machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// What it was attached with.
    #[serde(flatten)]
    pub config: DiskConfig,
    /// Where it is in its life.
    pub state: DeviceState,
    /// What the guest sees as the disk's size.
    pub size: ByteSize,
    /// Why its requests wait until the machine is resumed (`on-error = "stop"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
}
