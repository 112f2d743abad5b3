//! Tap interfaces: a network interface of the host whose other end is a file.
//!
//! The interface is made beforehand, by whoever may (`ip tuntap add dev tap0 mode tap user NAME`); its owner then opens it
//! without privilege. Packets carry the virtio header in the guest's own format (`IFF_VNET_HDR`, 12 bytes), so that checksum
//! and segmentation offloads pass through untouched: the kernel does for the guest's packets what it does for its own.
//!
//! A multi-queue interface is opened once per queue pair. Queues that the driver does not use are detached, because the
//! kernel spreads flows over all that are attached.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::backend::NetError;
use super::port::{Closed, Received, Sent};
use super::protocol::{HEADER_SIZE, feature};
use crate::devices::guest_buffers::GuestBuffers;

/// The device through which all tap interfaces are opened.
const TUN_DEVICE: &str = "/dev/net/tun";

const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_UFO: u32 = 0x10;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// Which feature of the driver lets the kernel leave which work to it.
const OFFLOADS: [(u64, u32); 7] = [
    (feature::GUEST_CSUM, TUN_F_CSUM),
    (feature::GUEST_TSO4, TUN_F_TSO4),
    (feature::GUEST_TSO6, TUN_F_TSO6),
    (feature::GUEST_ECN, TUN_F_TSO_ECN),
    (feature::GUEST_UFO, TUN_F_UFO),
    (feature::GUEST_USO4, TUN_F_USO4),
    (feature::GUEST_USO6, TUN_F_USO6),
];

/// An open tap interface.
pub(super) struct Tap {
    name: String,
    queues: Vec<Arc<File>>,
    /// How many of `queues`, from the first on, are attached.
    attached: Mutex<usize>,
    features: u64,
    mtu: Option<u16>,
}

impl Tap {
    /// Opens interface `name` with `queue_pairs` queues.
    pub(super) fn open(name: &str, queue_pairs: u16) -> Result<Self, NetError> {
        let index_name = CString::new(name)
            .ok()
            .filter(|_| !name.is_empty() && name.len() < libc::IFNAMSIZ && !name.contains(['/', ' ', '%']));
        let Some(index_name) = index_name else {
            return Err(NetError::TapName {
                name: name.to_owned(),
            });
        };
        // TUNSETIFF would make an interface that is not there, if it may: one without an address and on no bridge, of no use
        // to anyone, and a typing error would look like success.
        // SAFETY: `index_name` is a C string.
        if unsafe { libc::if_nametoindex(index_name.as_ptr()) } == 0 {
            return Err(NetError::TapAbsent {
                name: name.to_owned(),
                multi_queue: if queue_pairs > 1 { " multi_queue" } else { "" },
            });
        }
        let mut queues = Vec::new();
        for _ in 0..queue_pairs.max(1) {
            queues.push(Arc::new(open_queue(name, queue_pairs > 1)?));
        }
        let features = offered_features(name, &queues[0], queue_pairs > 1)?;
        let tap = Self {
            name: name.to_owned(),
            attached: Mutex::new(queues.len()),
            queues,
            features,
            mtu: interface_mtu(name),
        };
        // As a driver expects it; here, because a change takes the kernel some milliseconds.
        tap.set_active_pairs(1).map_err(|source| NetError::Tap {
            name: name.to_owned(),
            action: "detach its queues",
            source,
        })?;
        Ok(tap)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Features that this interface makes possible.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// The interface's own MTU, where it differs from Ethernet's usual 1500 bytes.
    pub(super) fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Whether the interface is gone for ever; its files stay open and of no use.
    pub(super) fn is_deleted(&self) -> bool {
        let mut request = request("");
        // SAFETY: TUNGETIFF takes a pointer to an ifreq, which lives until the call returns.
        let answer =
            result(unsafe { libc::ioctl(self.queues[0].as_raw_fd(), libc::TUNGETIFF, &raw mut request) });
        answer.is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::BADFD))
    }

    /// One port per queue.
    pub(super) fn ports(&self) -> Vec<TapPort> {
        self.queues
            .iter()
            .map(|file| TapPort {
                file: Arc::clone(file),
            })
            .collect()
    }

    /// Lets the kernel leave to the driver what it takes, by the `GUEST_*` bits of `features`.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let mut flags = 0;
        for (feature, flag) in OFFLOADS {
            if features & feature != 0 {
                flags |= flag;
            }
        }
        set_offload_flags(&self.queues[0], flags)
    }

    /// Attaches the first `pairs` queues and detaches the others.
    pub(super) fn set_active_pairs(&self, pairs: usize) -> io::Result<()> {
        let pairs = pairs.clamp(1, self.queues.len());
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        while *attached < pairs {
            set_queue(&self.queues[*attached], libc::IFF_ATTACH_QUEUE)?;
            *attached += 1;
        }
        while *attached > pairs {
            set_queue(&self.queues[*attached - 1], libc::IFF_DETACH_QUEUE)?;
            *attached -= 1;
        }
        Ok(())
    }
}

/// One queue of a tap interface.
pub(super) struct TapPort {
    file: Arc<File>,
}

impl TapPort {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Reads a packet straight into the guest's buffers.
    pub(super) fn receive(
        &mut self,
        buffers: &mut GuestBuffers,
        overflow: &mut Vec<u8>,
    ) -> Result<Received, Closed> {
        loop {
            match buffers.readv(self.file.as_fd(), overflow) {
                Ok(length) => return Ok(Received::Packet(length)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
                Err(error) => return Err(Closed(format!("reading it failed: {error}"))),
            }
        }
    }

    /// Writes a packet straight from the guest's buffers.
    pub(super) fn send(&mut self, packet: &GuestBuffers) -> Result<Sent, Closed> {
        loop {
            match packet.writev(self.file.as_fd()) {
                Ok(_) => return Ok(Sent::Taken),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => {}
                    Some(Errno::AGAIN) => return Ok(Sent::Blocked),
                    // The interface was deleted.
                    Some(Errno::BADFD | Errno::BADF) => {
                        return Err(Closed(format!("writing it failed: {error}")));
                    }
                    // The interface is down (EIO), the header or packet makes no sense (EINVAL), no memory: the packet is
                    // lost, the next may do better.
                    _ => return Ok(Sent::Dropped),
                },
            }
        }
    }
}

/// A zeroed interface request for `name`, which is known to be short enough.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// Flags as the 16 bits that an interface request has for them.
fn flags16(flags: libc::c_int) -> libc::c_short {
    let [low, high, ..] = flags.to_le_bytes();
    libc::c_short::from_le_bytes([low, high])
}

fn result(value: libc::c_int) -> io::Result<()> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Opens the tun device and attaches it to the interface.
fn open_queue(name: &str, multi_queue: bool) -> Result<File, NetError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN_DEVICE)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => NetError::TunAbsent { source },
            io::ErrorKind::PermissionDenied => NetError::TunPermission { source },
            _ if Errno::from_io_error(&source) == Some(Errno::NODEV) => NetError::TunAbsent { source },
            _ => NetError::Tap {
                name: name.to_owned(),
                action: "open /dev/net/tun",
                source,
            },
        })?;
    let attach = |multi_queue: bool| {
        let mut request = request(name);
        let extra = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        request.ifr_ifru.ifru_flags = flags16(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | extra);
        // SAFETY: TUNSETIFF takes a pointer to an ifreq, which lives until the call returns.
        result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
    };
    // One queue of an interface made for several is opened in the same way as several.
    let attached = attach(multi_queue).or_else(|error| {
        if !multi_queue && Errno::from_io_error(&error) == Some(Errno::INVAL) {
            attach(true)
        } else {
            Err(error)
        }
    });
    attached.map_err(|source| {
        let name = name.to_owned();
        match Errno::from_io_error(&source) {
            Some(Errno::BUSY) => NetError::TapBusy { name },
            Some(Errno::TOOBIG) => NetError::TapBusy { name },
            Some(Errno::PERM | Errno::ACCESS) => NetError::TapPermission { name },
            Some(Errno::INVAL) if Path::new(&format!("/sys/class/net/{name}/tun_flags")).exists() => {
                NetError::TapQueues { name }
            }
            Some(Errno::INVAL) => NetError::NotATap { name },
            _ => NetError::Tap {
                name,
                action: "attach to it",
                source,
            },
        }
    })?;
    let size = libc::c_int::try_from(HEADER_SIZE).unwrap_or(12);
    // SAFETY: TUNSETVNETHDRSZ takes a pointer to an int.
    result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) }).map_err(
        |source| NetError::Tap {
            name: name.to_owned(),
            action: "set the size of its packet header",
            source,
        },
    )?;
    Ok(file)
}

fn set_offload_flags(file: &File, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its flags by value.
    result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

fn set_queue(file: &File, flags: libc::c_int) -> io::Result<()> {
    let mut request = request("");
    request.ifr_ifru.ifru_flags = flags16(flags);
    // SAFETY: TUNSETQUEUE takes a pointer to an ifreq, which lives until the call returns.
    result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) })
}

/// Tries which offloads this kernel knows, and leaves them off.
fn offered_features(name: &str, file: &File, multi_queue: bool) -> Result<u64, NetError> {
    let mut features = feature::CSUM
        | feature::HOST_TSO4
        | feature::HOST_TSO6
        | feature::HOST_ECN
        | feature::CTRL_GUEST_OFFLOADS;
    if multi_queue {
        features |= feature::MQ;
    }
    let segmentation = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    set_offload_flags(file, segmentation).map_err(|source| NetError::Tap {
        name: name.to_owned(),
        action: "set its offloads",
        source,
    })?;
    features |= feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN;
    if set_offload_flags(file, segmentation | TUN_F_UFO).is_ok() {
        features |= feature::GUEST_UFO | feature::HOST_UFO;
    }
    // Linux 6.2 and later.
    if set_offload_flags(file, segmentation | TUN_F_USO4 | TUN_F_USO6).is_ok() {
        features |= feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO;
    }
    // This cannot fail where the calls before did not.
    set_offload_flags(file, 0).map_err(|source| NetError::Tap {
        name: name.to_owned(),
        action: "clear its offloads",
        source,
    })?;
    Ok(features)
}

/// The interface's MTU if it can be told and is not 1500.
fn interface_mtu(name: &str) -> Option<u16> {
    // Any socket answers questions about interfaces.
    let socket = UnixDatagram::unbound().ok()?;
    let mut request = request(name);
    // SAFETY: SIOCGIFMTU takes a pointer to an ifreq, which lives until the call returns.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) }).ok()?;
    // SAFETY: SIOCGIFMTU has set this member.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    u16::try_from(mtu).ok().filter(|mtu| *mtu != 1500 && *mtu >= 68)
}
