//! Requests as operations on the disk, and what comes of them as replies.

use block_io::{BlockDevice, Durability, IoError};

use super::connection::Session;
use super::export::{Export, Extent, Extents, MOST_EXTENTS};
use super::link::Permit;
use super::negotiate::Context;
use super::reply::{Reply, Style, number_of};
use super::request::Request;
use crate::sockets::buffers::Buffer;

/// Longest extent in a reply with 32-bit lengths: a multiple of every block size that is announced.
const LONGEST_EXTENT: u64 = u32::MAX as u64 & !0xffff;

/// Executes `request` and replies.
pub(super) async fn execute<E: Export>(
    session: &Session<E>,
    cookie: u64,
    request: Request,
    data: Option<Buffer>,
    permit: Permit,
) {
    let disk = session.export().disk();
    let style = session.style;
    let (offset, outcome) = match request {
        Request::Read { offset, length } => {
            let buffer = session.pool.take(length as usize);
            // SAFETY: the buffer lives until the read has ended, and nobody looks at it before.
            let pieces = [unsafe { buffer.io() }];
            match disk.read(offset, &pieces).await {
                Ok(()) => {
                    session
                        .link
                        .reply(Reply::data(style, cookie, offset, buffer, Some(permit)));
                    return;
                }
                Err(error) => (offset, Err(error)),
            }
        }
        Request::Write {
            offset, durability, ..
        } => {
            let outcome = match &data {
                Some(buffer) => {
                    // SAFETY: the buffer lives until the write has ended, and nobody changes it.
                    let pieces = [unsafe { buffer.io() }];
                    let outcome = disk.write(offset, &pieces, durability).await;
                    match durability {
                        Durability::Volatile => kept(disk, outcome).await,
                        Durability::Durable => outcome,
                    }
                }
                None => Ok(()),
            };
            (offset, outcome)
        }
        Request::Flush => (0, disk.flush().await),
        Request::Trim {
            offset,
            length,
            durability,
        } => {
            let outcome = match (disk.discard(offset, length).await, durability) {
                (Ok(()), Durability::Durable) => disk.flush().await,
                (outcome, _) => outcome,
            };
            (offset, outcome)
        }
        Request::WriteZeroes {
            offset,
            length,
            durability,
            mode,
        } => {
            let outcome = disk.write_zeroes(offset, length, mode).await;
            let outcome = match (outcome, durability) {
                (Ok(()), Durability::Durable) => disk.flush().await,
                (outcome, _) => kept(disk, outcome).await,
            };
            (offset, outcome)
        }
        Request::BlockStatus { offset, length, one } => {
            match Box::pin(describe(session, cookie, offset, length, one)).await {
                Ok(replies) => {
                    let mut permit = Some(permit);
                    for mut reply in replies {
                        if reply.is_last() {
                            reply.carry(permit.take());
                        }
                        session.link.reply(reply);
                    }
                    return;
                }
                Err(error) => (offset, Err(error)),
            }
        }
    };
    drop(data);
    session.link.reply(match outcome {
        Ok(()) => Reply::done(style, cookie, offset, Some(permit)),
        Err(error) => failure(session, cookie, offset, &error, permit),
    });
}

/// What has been written must be there when a client connects to our successor, as it has no other way to know that we have died.
async fn kept(disk: &impl BlockDevice, written: Result<(), IoError>) -> Result<(), IoError> {
    written?;
    disk.settle().await
}

#[cold]
fn failure<E: Export>(
    session: &Session<E>,
    cookie: u64,
    offset: u64,
    error: &IoError,
    permit: Permit,
) -> Reply {
    session.count_error();
    tracing::warn!(export = session.export().name(), %error, "a request of an NBD client failed");
    let mut message = error.to_string();
    if let Some(cause) = std::error::Error::source(error) {
        message.push_str(": ");
        message.push_str(&cause.to_string());
    }
    Reply::error(
        session.style,
        cookie,
        offset,
        number_of(error),
        &message,
        Some(permit),
    )
}

/// One chunk for each context that the connection selected.
async fn describe<E: Export>(
    session: &Session<E>,
    cookie: u64,
    offset: u64,
    length: u64,
    one: bool,
) -> Result<Vec<Reply>, IoError> {
    let export = session.export();
    let most = if one {
        1
    } else {
        (MOST_EXTENTS / session.contexts.len().max(1)).max(1)
    };
    let longest = match session.style {
        Style::Extended => u64::MAX,
        _ => LONGEST_EXTENT,
    };
    let mut replies = Vec::with_capacity(session.contexts.len());
    for (index, (number, context)) in session.contexts.iter().enumerate() {
        let mut extents = Extents::new(length, most, longest);
        match *context {
            Context::Allocation => {
                export.allocation(offset, length, &mut extents).await?;
                if extents.list().is_empty() {
                    extents.add(length, Extent::Data);
                }
            }
            Context::Changed(snapshot) => {
                export.changed(snapshot, offset, length, &mut extents).await?;
                if extents.list().is_empty() {
                    extents.add_changed(length, true);
                }
            }
        }
        let last = index + 1 == session.contexts.len();
        replies.push(Reply::extents(
            session.style,
            cookie,
            offset,
            *number,
            extents.list(),
            last,
        ));
    }
    Ok(replies)
}
