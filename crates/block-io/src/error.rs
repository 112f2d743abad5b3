//! What went wrong with a request: which device, which operation, where, and why.
//!
//! [`IoError`] is one pointer wide, so that the `Result` of a request that succeeds costs nothing to pass upwards
//! through the layers; only a failure allocates.

use std::fmt;
use std::io;
use std::sync::Arc;

/// An error and its causes in one line.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// The operations of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Read bytes.
    Read,
    /// Write bytes.
    Write,
    /// Make everything written before durable.
    Flush,
    /// Declare a range's content as no longer needed.
    Discard,
    /// Make a range read as zeroes.
    WriteZeroes,
}

impl fmt::Display for Operation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
        })
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum IoCause {
    /// The range does not lie within the device.
    #[error("the range ends beyond the device's {size} bytes")]
    OutOfRange {
        /// Size of the device in bytes.
        size: u64,
    },
    /// Offset or length is not a multiple of the logical block size.
    #[error("offset and length must be multiples of {block} bytes")]
    Misaligned {
        /// The logical block size in bytes.
        block: u32,
    },
    /// The device was opened read-only.
    #[error("the device is open read-only")]
    ReadOnly,
    /// A flush failed earlier: nobody knows what of the data written before it is on the medium, and the kernel reports
    /// such an error only once. Stays until the device is reopened or the error acknowledged.
    #[error("an earlier flush failed, so written data may be lost: check the device, then reopen it")]
    EarlierFlushFailed,
    /// The file ends before the device does: something truncated it while it was open.
    #[error("the file ends too early: it was truncated while in use")]
    Truncated,
    /// The kernel took no byte of a write and named no reason.
    #[error("the device accepts no data")]
    NoProgress,
    /// The request was not made by a task of a worker.
    #[error("requests can only be made on a block-io worker")]
    NotOnWorker,
    /// The way to the device is gone; nobody knows whether the request was executed.
    #[error("the connection to the device is lost")]
    ConnectionLost {
        /// Why, and for how long it was tried to have it back.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The operating system's answer.
    #[error(transparent)]
    Os(#[from] io::Error),
}

impl IoCause {
    /// Whether the way to the device failed and not the device: the connection is lost, or the operating system says that
    /// the device is not there (ENODEV, ENXIO) or cannot be reached (ENOLINK and the errors of connections). EIO can be
    /// either, and is not among them.
    pub fn is_transport(&self) -> bool {
        match self {
            Self::ConnectionLost { .. } => true,
            Self::Os(error) => matches!(
                error.raw_os_error(),
                Some(
                    libc::ENODEV
                        | libc::ENXIO
                        | libc::ENOLINK
                        | libc::ENOTCONN
                        | libc::ECONNRESET
                        | libc::ECONNREFUSED
                        | libc::ECONNABORTED
                        | libc::EPIPE
                        | libc::ESHUTDOWN
                        | libc::ETIMEDOUT
                        | libc::EHOSTDOWN
                        | libc::EHOSTUNREACH
                        | libc::ENETDOWN
                        | libc::ENETUNREACH
                        | libc::ENETRESET
                )
            ),
            _ => false,
        }
    }
}

/// A failed request.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct IoError(Box<Failure>);

#[derive(Debug, thiserror::Error)]
#[error("{operation} of {length} bytes at offset {offset} failed on {device}")]
struct Failure {
    device: Arc<str>,
    operation: Operation,
    offset: u64,
    length: u64,
    #[source]
    cause: IoCause,
}

impl IoError {
    /// A failure of `operation` on `length` bytes at `offset` of `device`.
    #[cold]
    pub fn new(
        device: &Arc<str>,
        operation: Operation,
        offset: u64,
        length: u64,
        cause: impl Into<IoCause>,
    ) -> Self {
        Self(Box::new(Failure {
            device: Arc::clone(device),
            operation,
            offset,
            length,
            cause: cause.into(),
        }))
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        &self.0.device
    }

    /// What was tried.
    pub fn operation(&self) -> Operation {
        self.0.operation
    }

    /// First byte of the request.
    pub fn offset(&self) -> u64 {
        self.0.offset
    }

    /// Length of the request in bytes.
    pub fn length(&self) -> u64 {
        self.0.length
    }

    /// Why it failed.
    pub fn cause(&self) -> &IoCause {
        &self.0.cause
    }

    /// Whether the way to the device failed and not the device: the same request may succeed on another way.
    pub fn is_transport(&self) -> bool {
        self.0.cause.is_transport()
    }

    /// Whether the device or its file system is full, which more space and a repetition would cure.
    pub fn is_no_space(&self) -> bool {
        match &self.0.cause {
            IoCause::Os(error) => matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn an_error_names_device_operation_and_place_and_chains_the_reason() {
        let device: Arc<str> = "disk.img".into();
        let error = IoError::new(
            &device,
            Operation::Write,
            8192,
            4096,
            io::Error::from_raw_os_error(libc::ENOSPC),
        );
        assert_eq!(
            error.to_string(),
            "write of 4096 bytes at offset 8192 failed on disk.img"
        );
        assert!(error.source().unwrap().to_string().contains("No space left"));
        assert!(error.is_no_space());
    }

    #[test]
    fn a_result_without_value_is_one_word() {
        assert_eq!(size_of::<Result<(), IoError>>(), size_of::<usize>());
    }
}
