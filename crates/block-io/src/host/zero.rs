//! Giving space back, and writing zeroes without sending them, each with what the device and its file system can do.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::buffer::AlignedBuffer;
use crate::device::{Durability, ZeroMode};
use crate::error::{IoCause, IoError, Operation};
use crate::worker::Call;

use super::HostDevice;
use super::open::Kind;

/// Zeroes that are written at once where nothing better works.
const ZEROES: u64 = 1 << 20;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl HostDevice {
    /// A discard is a hint: what the device cannot do is no error.
    pub(super) async fn discard_range(&self, offset: u64, length: u64) -> Result<(), IoError> {
        if self.no_punch.load(Ordering::Relaxed) {
            return Ok(());
        }
        let call = match self.kind {
            Kind::RegularFile => Call::Allocate {
                mode: PUNCH,
                offset,
                length,
            },
            Kind::BlockDevice => Call::DiscardBlocks { offset, length },
        };
        match self.attempt(call, &self.no_punch).await {
            Ok(_) => Ok(()),
            Err(cause) => Err(self.error(Operation::Discard, offset, length, cause)),
        }
    }

    pub(super) async fn zero_range(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        let failed = |cause| self.error(Operation::WriteZeroes, offset, length, cause);
        let _held = match self.has_sub_blocks() {
            true => Some(self.hold(offset, length).await),
            false => None,
        };
        let ways = [(PUNCH, &self.no_punch), (ZERO, &self.no_zero_range)];
        let allowed = match mode {
            ZeroMode::MayUnmap => &ways[..],
            ZeroMode::KeepAllocated => &ways[1..],
        };
        for (mode, unable) in allowed {
            if !unable.load(Ordering::Relaxed)
                && self
                    .attempt(
                        Call::Allocate {
                            mode: *mode,
                            offset,
                            length,
                        },
                        unable,
                    )
                    .await
                    .map_err(failed)?
            {
                return Ok(());
            }
        }
        self.write_real_zeroes(offset, length).await
    }

    /// `true` if the kernel did it; `false` if the file system or device cannot, which is then remembered in `unable`.
    async fn attempt(&self, call: Call, unable: &AtomicBool) -> Result<bool, IoCause> {
        match self.call(call).await {
            Ok(_) => Ok(true),
            Err(IoCause::Os(error))
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
                ) =>
            {
                unable.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(cause) => Err(cause),
        }
    }

    async fn write_real_zeroes(&self, offset: u64, length: u64) -> Result<(), IoError> {
        let zeroes = AlignedBuffer::new(usize::try_from(length.min(ZEROES)).unwrap_or(usize::MAX));
        let mut done = 0;
        while done < length {
            let part = (length - done).min(ZEROES);
            // SAFETY: the buffer is only read, and outlives the write that is awaited here.
            let piece = [unsafe { zeroes.io(0, usize::try_from(part).unwrap_or(usize::MAX)) }];
            if self.suits(offset + done, &piece) {
                self.write_aligned(offset + done, &piece, part, Durability::Volatile)
                    .await?;
            } else {
                self.write_bounced(offset + done, &piece, part, Durability::Volatile)
                    .await?;
            }
            done += part;
        }
        Ok(())
    }
}
