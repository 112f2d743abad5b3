//! A guest's request as operations on the disk, and the one place where failures become status bytes.

use block_io::{BlockDevice, Durability, IoBuf, IoError, ZeroMode};

use super::request::{Request, Status};

/// Length of the identifier (virtio 1.2 §5.2.6.1).
pub const ID_LENGTH: usize = 20;

/// What a disk operation needs to know beside the request.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The identifier, padded with zeroes.
    pub id: &'a [u8; ID_LENGTH],
    /// Whether writes may stay in a cache: the driver can flush, and did not ask for write-through.
    pub write_back: bool,
    /// The driver goes on when this process has died, and must not miss then what it was told is written
    /// ([`BlockDevice::settle`]).
    pub outlived: bool,
}

/// Does what `request` asks for.
///
/// # Errors
/// The disk failed.
pub async fn execute<D: BlockDevice>(
    disk: &D,
    request: &Request<'_>,
    context: Context<'_>,
) -> Result<(), IoError> {
    match request {
        Request::Read { offset, data } => disk.read(*offset, data).await,
        Request::Write { offset, data } => {
            let durability = if context.write_back {
                Durability::Volatile
            } else {
                Durability::Durable
            };
            disk.write(*offset, data, durability).await?;
            settle(disk, context).await
        }
        Request::Flush => disk.flush().await,
        Request::GetId { data } => {
            put_id(data, context.id);
            Ok(())
        }
        Request::Discard(ranges) => {
            for range in ranges.iter() {
                disk.discard(range.offset, range.length).await?;
            }
            Ok(())
        }
        Request::WriteZeroes(ranges) => {
            for range in ranges.iter() {
                let mode = if range.unmap {
                    ZeroMode::MayUnmap
                } else {
                    ZeroMode::KeepAllocated
                };
                disk.write_zeroes(range.offset, range.length, mode).await?;
            }
            if context.write_back {
                settle(disk, context).await
            } else {
                disk.flush().await
            }
        }
    }
}

async fn settle<D: BlockDevice>(disk: &D, context: Context<'_>) -> Result<(), IoError> {
    if context.outlived && context.write_back {
        disk.settle().await
    } else {
        Ok(())
    }
}

fn put_id(data: &[IoBuf], id: &[u8]) {
    let mut rest = id;
    for piece in data {
        piece.copy_from_slice(rest);
        rest = &rest[piece.len().min(rest.len())..];
    }
}

/// The answer that tells the guest of `outcome`.
pub fn status_of(outcome: &Result<(), IoError>) -> Status {
    match outcome {
        Ok(()) => Status::Ok,
        Err(_) => Status::IoError,
    }
}
