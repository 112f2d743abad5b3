//! SCSI commands to a disk, by the kernel's SG_IO.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// `SG_IO` (scsi/sg.h).
const SG_IO: libc::Ioctl = 0x2285;
/// `SG_DXFER_NONE`, `SG_DXFER_TO_DEV`, `SG_DXFER_FROM_DEV`.
const NO_DATA: libc::c_int = -1;
const TO_DEVICE: libc::c_int = -2;
const FROM_DEVICE: libc::c_int = -3;
/// Milliseconds until the kernel gives a command up. None waits longer than four seconds in the disk.
const TIMEOUT_MS: u32 = 30_000;
/// CHECK CONDITION.
const CHECK_CONDITION: u8 = 0x02;

/// `struct sg_io_hdr` (scsi/sg.h).
#[repr(C)]
struct SgIoHeader {
    interface_id: libc::c_int,
    direction: libc::c_int,
    command_length: libc::c_uchar,
    max_sense: libc::c_uchar,
    iovec_count: libc::c_ushort,
    length: libc::c_uint,
    data: *mut libc::c_void,
    command: *const libc::c_uchar,
    sense: *mut libc::c_uchar,
    timeout: libc::c_uint,
    flags: libc::c_uint,
    pack_id: libc::c_int,
    user: *mut libc::c_void,
    status: libc::c_uchar,
    masked_status: libc::c_uchar,
    message_status: libc::c_uchar,
    sense_written: libc::c_uchar,
    host_status: libc::c_ushort,
    driver_status: libc::c_ushort,
    residual: libc::c_int,
    duration: libc::c_uint,
    info: libc::c_uint,
}

/// Data of a command.
pub(crate) enum Data<'a> {
    /// None.
    None,
    /// To the disk.
    Out(&'a mut [u8]),
    /// From the disk.
    In(&'a mut [u8]),
}

/// What the disk has against a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) key: u8,
    pub(crate) code: (u8, u8),
}

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] io::Error),
    /// The disk.
    #[error("the disk refuses the command (sense key {:x}, code {:02x}/{:02x})", .0.key, .0.code.0, .0.code.1)]
    Disk(Refusal),
    /// Something between.
    #[error("the command did not reach the disk (status {status:#x}, host {host:#x})")]
    Way { status: u8, host: u16 },
}

/// A disk.
#[derive(Debug)]
pub(crate) struct ScsiDisk {
    file: File,
    /// `/dev/sdb`.
    pub(crate) path: PathBuf,
}

impl ScsiDisk {
    /// Opens it, for commands only: also a disk that cannot be written.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let path = path.to_owned();
        Ok(Self { file, path })
    }

    /// Does a command; bytes of data that were moved.
    pub(crate) fn command(&self, cdb: &[u8], data: Data<'_>) -> Result<usize, CommandError> {
        let (direction, pointer, length) = match data {
            Data::None => (NO_DATA, std::ptr::null_mut(), 0),
            Data::Out(bytes) => (TO_DEVICE, bytes.as_mut_ptr(), bytes.len()),
            Data::In(bytes) => (FROM_DEVICE, bytes.as_mut_ptr(), bytes.len()),
        };
        let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
        let mut sense = [0_u8; 64];
        let mut header = SgIoHeader {
            interface_id: libc::c_int::from(b'S'),
            direction,
            command_length: u8::try_from(cdb.len()).map_err(|_| too_long())?,
            max_sense: 64,
            iovec_count: 0,
            length: u32::try_from(length).map_err(|_| too_long())?,
            data: pointer.cast(),
            command: cdb.as_ptr(),
            sense: sense.as_mut_ptr(),
            timeout: TIMEOUT_MS,
            flags: 0,
            pack_id: 0,
            user: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            message_status: 0,
            sense_written: 0,
            host_status: 0,
            driver_status: 0,
            residual: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: the header is as the kernel wants it, and what it points to lives, with the lengths it says, until the call returns: the
        // command is done by then.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), SG_IO, &raw mut header) };
        if result < 0 {
            return Err(io::Error::last_os_error().into());
        }
        let residual = usize::try_from(header.residual).unwrap_or(0);
        match (header.status, header.host_status) {
            (0, 0) => Ok(length.saturating_sub(residual)),
            (CHECK_CONDITION, _) => {
                let written = usize::from(header.sense_written).min(sense.len());
                Err(CommandError::Disk(refusal(&sense[..written])))
            }
            (status, host) => Err(CommandError::Way { status, host }),
        }
    }

    /// A page of vital product data, without its header.
    pub(crate) fn vital_page(&self, page: u8) -> Result<Vec<u8>, CommandError> {
        let mut bytes = [0; 252];
        let cdb = [0x12, 1, page, 0, 252, 0];
        let moved = self.command(&cdb, Data::In(&mut bytes))?;
        let length = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
        match bytes[1] == page {
            true => Ok(bytes[4..moved.clamp(4, 252).min(4 + length)].to_vec()),
            // Not what was asked for: there is no such page.
            false => Ok(Vec::new()),
        }
    }
}

/// What sense data say (SPC-4 §4.5).
fn refusal(sense: &[u8]) -> Refusal {
    let byte = |at: usize| sense.get(at).copied().unwrap_or(0);
    match byte(0) & 0x7f {
        0x72 | 0x73 => Refusal {
            key: byte(1) & 0x0f,
            code: (byte(2), byte(3)),
        },
        _ => Refusal {
            key: byte(2) & 0x0f,
            code: (byte(12), byte(13)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_the_kernels() {
        assert_eq!(size_of::<SgIoHeader>(), 88);
        assert_eq!(std::mem::offset_of!(SgIoHeader, residual), 72);
    }

    #[test]
    fn sense_data_are_read_in_both_formats() {
        let mut fixed = [0; 18];
        (fixed[0], fixed[2], fixed[12], fixed[13]) = (0xf0, 5, 0x20, 2);
        let expected = Refusal {
            key: 5,
            code: (0x20, 2),
        };
        assert_eq!(refusal(&fixed), expected);
        assert_eq!(refusal(&[0x72, 5, 0x20, 2]), expected);
        assert_eq!(refusal(&[]).key, 0);
    }

    #[test]
    fn what_is_no_scsi_disk_says_so() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = ScsiDisk::open(file.path()).unwrap();
        assert!(matches!(disk.vital_page(0), Err(CommandError::Kernel(_))));
    }
}
