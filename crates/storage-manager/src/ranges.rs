//! Ranges of a disk or snapshot, read by who has the pool open for who has not: what a backup does where it cannot read the devices.

use api::virtual_disk::{ReadRanges, TransferRequest, Transferred};
use api::{Problem, ProblemKind};
use block_io::BlockDevice;

use crate::conversation::{Flow, Notice, Reporter};
use crate::disks_image::Message;
use crate::disks_transfer::{PIECE, PIECES, broken_off, read_piece};
use crate::live::{Connect, Side, converse};
use crate::moment::Moment;
use crate::pipe::{Pipe, pipe};
use crate::storage::Storage;

const SECTOR: u64 = 512;

/// Sees that ranges are whole sectors, in order, and within a disk of `size` bytes.
fn check(request: &ReadRanges, size: u64) -> Result<(), Problem> {
    let end = size.next_multiple_of(SECTOR);
    let mut at = 0;
    for (offset, length) in &request.ranges {
        let stop = offset.checked_add(*length).filter(|stop| *stop <= end);
        let aligned = offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR);
        match stop {
            Some(stop) if aligned && *offset >= at && *length > 0 => at = stop,
            _ => {
                let detail = format!("a range of {length} bytes at {offset} cannot be read there");
                return Err(Problem::new(ProblemKind::Invalid, detail)
                    .about(&request.path)
                    .remedy("ask for whole sectors of 512 bytes within the disk, in ascending order"));
            }
        }
    }
    Ok(())
}

/// The side that has the pool open.
pub(crate) async fn read(
    storage: &Storage,
    request: &ReadRanges,
    to: Pipe<Message>,
    reporter: &Reporter<Transferred>,
) -> (Result<Transferred, Problem>, Option<String>) {
    storage
        .at_a_moment(&request.path, async |moment| {
            read_out(moment, request, to, reporter).await
        })
        .await
}

async fn read_out(
    moment: &Moment,
    request: &ReadRanges,
    to: Pipe<Message>,
    reporter: &Reporter<Transferred>,
) -> Result<Transferred, Problem> {
    let disk = &*moment.disk;
    let size = disk.size();
    check(request, size)?;
    let _ = to.send(Message::Size(size)).await;
    let mut data = 0;
    for (offset, length) in &request.ranges {
        let (mut at, end) = (*offset, (offset + length).min(size));
        while at < end {
            let stop = end.min(at + PIECE);
            let piece = read_piece(disk, at..stop).await?;
            // Who does not take it any more says why.
            if reporter.stopped() || to.send(Message::Piece(piece)).await.is_err() {
                return Err(broken_off("reading", &request.path));
            }
            data += stop - at;
            at = stop;
        }
    }
    let _ = to.send(Message::End).await;
    Ok(Transferred {
        path: request.path.clone(),
        format: None,
        size,
        data,
        verified: false,
        events: Vec::new(),
    })
}

/// Has the process that has a pool open read ranges; `take` gets all their bytes in order, in pieces, each with its offset.
///
/// # Errors
/// There is no such disk, a range is none of it, or the connection breaks.
pub fn read_ranges(
    connect: Connect,
    request: ReadRanges,
    take: &mut (dyn FnMut(u64, &[u8]) + Send),
) -> Result<(), Problem> {
    let line = connect(&TransferRequest::Read(request))?;
    let (here, there) = pipe(PIECES);
    let side = Side {
        up: None,
        data: Some(here),
        checks: None,
        size: 0,
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while let Some(message) = there.take() {
                match message {
                    Message::Size(_) => {}
                    Message::Piece(piece) => take(piece.offset, piece.bytes()),
                    Message::End => break,
                }
            }
        });
        let go_on = &mut |_: Notice<'_>| Flow::GoOn;
        converse(line, side, go_on).0.map(drop)
    })
}
