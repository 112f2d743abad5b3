//! What comes after the login: PDUs, with their digests, to where their data belong.

use std::rc::Rc;

use block_io::BlockDevice;

use super::connection::Connection;
use super::life::{End, read};
use super::pdu::{Crc, DIGEST, HEAD, Head, NO_TAG, digest, padding, reason, request};
use super::session::{Held, Turn};
use super::task::{Place, Task};
use crate::sockets::buffers::Buffer;
use crate::sockets::input::{Input, More};

/// Takes PDUs until the initiator leaves.
pub(super) async fn full_feature<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    input: &mut Input,
) -> End {
    loop {
        if let Err(end) = one(connection, input).await {
            return if connection.logged_out.get() {
                End::Closed
            } else {
                end
            };
        }
    }
}

/// A header with what follows it before the data.
struct Start {
    head: Head,
    /// Additional header segments.
    additional: Vec<u8>,
}

async fn receive_head<D: BlockDevice + 'static>(
    connection: &Connection<D>,
    input: &mut Input,
) -> Result<Start, End> {
    let link = &*connection.link;
    let mut bytes = [0; HEAD];
    read(link, input, &mut bytes).await?;
    let head = Head(bytes);
    let mut additional = vec![0; head.additional()];
    if !additional.is_empty() {
        read(link, input, &mut additional).await?;
    }
    if connection.digests.header {
        let mut told = [0; DIGEST];
        read(link, input, &mut told).await?;
        let right = if additional.is_empty() {
            digest(&head.0)
        } else {
            digest(&[&head.0[..], &additional].concat())
        };
        if told != right {
            // Where the next PDU begins is not known any more (RFC 7143 §7.8).
            return Err(End::Violation("a header with a wrong digest"));
        }
    }
    if head.data_length() > connection.receive_segment {
        return Err(End::Violation("more data in a PDU than was agreed on"));
    }
    Ok(Start { head, additional })
}

/// Reads `length` bytes of data into `target`, or throws them away; then padding and digest. Whether the digest is right.
async fn receive_data<D: BlockDevice + 'static>(
    connection: &Connection<D>,
    input: &mut Input,
    target: Option<&mut [u8]>,
    length: usize,
) -> Result<bool, End> {
    if length == 0 {
        return Ok(true);
    }
    let link = &*connection.link;
    let mut scratch;
    let target = match target {
        Some(target) => target,
        None if !connection.digests.data => {
            let all = (length + padding(length)) as u64;
            return match input.skip(link, all).await? {
                More::Yes => Ok(true),
                More::End => Err(End::Gone),
            };
        }
        None => {
            scratch = vec![0; length];
            &mut scratch
        }
    };
    read(link, input, target).await?;
    let mut tail = [0; 3 + DIGEST];
    let filler = padding(length);
    let tail_length = filler + if connection.digests.data { DIGEST } else { 0 };
    read(link, input, &mut tail[..tail_length]).await?;
    if !connection.digests.data {
        return Ok(true);
    }
    let mut crc = Crc::new();
    crc.update(target);
    crc.update(&tail[..filler]);
    Ok(crc.bytes() == tail[filler..tail_length])
}

/// The CDB in additional header segments, if it is longer than 16 bytes (RFC 7143 §11.2.2.3).
fn long_cdb(head: &Head, mut additional: &[u8]) -> Result<Vec<u8>, End> {
    const EXTENDED_CDB: u8 = 1;
    let mut cdb = Vec::new();
    while let Some((segment, _)) = additional.split_at_checked(4) {
        let length = usize::from(u16::from_be_bytes([segment[0], segment[1]]));
        if segment[2] & 0x3f == EXTENDED_CDB && length > 1 {
            // The length counts a reserved byte.
            let rest = additional
                .get(4..3 + length)
                .ok_or(End::Violation("a CDB that is cut off"))?;
            cdb = [&head.0[32..48], rest].concat();
        }
        let step = (length + 3).next_multiple_of(4);
        additional = additional.get(step..).unwrap_or_default();
    }
    Ok(cdb)
}

async fn one<D: BlockDevice + 'static>(connection: &Rc<Connection<D>>, input: &mut Input) -> Result<(), End> {
    connection.link.room().await;
    let Start { head, additional } = receive_head(connection, input).await?;
    match head.opcode() {
        request::COMMAND => command(connection, input, &head, &additional).await,
        request::DATA_OUT => data_out(connection, input, &head).await,
        request::LOGIN => Err(End::Violation("a login after the login")),
        _ => other(connection, input, &head).await,
    }
}

async fn command<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    input: &mut Input,
    head: &Head,
    additional: &[u8],
) -> Result<(), End> {
    let session = &connection.session;
    let length = head.data_length();
    let task = Rc::new(Task::new(head, long_cdb(head, additional)?, connection.cid));
    let both = head.0[1] & 0x60 == 0x60;
    let refusal = if session.is_discovery {
        Some(reason::PROTOCOL)
    } else if both || head.tag() == NO_TAG {
        // No command here moves data in both directions.
        Some(reason::INVALID_FIELD)
    } else if session.has_task(task.tag) {
        Some(reason::TASK_IN_PROGRESS)
    } else if task.is_immediate && !session.takes_immediate() {
        Some(reason::TOO_MANY_IMMEDIATE)
    } else {
        None
    };
    let never = !task.is_immediate && session.order.turn(task.number) == Turn::Never;
    let mut place = if refusal.is_some() || never {
        Place::Nowhere
    } else {
        task.prepare(connection, length, !head.is_final())
    };
    let target = match &mut place {
        Place::Buffer(buffer, _) => buffer.as_mut_slice().get_mut(..length),
        Place::Nowhere => None,
    };
    let is_good = receive_data(connection, input, target, length).await?;
    if never {
        return Ok(());
    }
    if !is_good {
        connection.reject(head, reason::DATA_DIGEST);
        return Ok(());
    }
    if let Some(why) = refusal {
        // Its number counts, or nothing after it would ever be delivered.
        if !task.is_immediate {
            session.skip(task.number);
        }
        connection.reject(head, why);
        return Ok(());
    }
    task.began(place, length);
    let held = Held::Command(Rc::clone(connection), Rc::clone(&task));
    session.take(task.number, task.is_immediate, held);
    Ok(())
}

async fn data_out<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    input: &mut Input,
    head: &Head,
) -> Result<(), End> {
    let length = head.data_length();
    let task = connection
        .session
        .task(head.tag())
        .filter(|task| task.cid == connection.cid && task.is_write());
    let Some(task) = task else {
        // Its command has ended, or never began.
        if !receive_data(connection, input, None, length).await? {
            connection.reject(head, reason::DATA_DIGEST);
        }
        return Ok(());
    };
    let mut place = task.place(connection, head, length);
    let target = match &mut place {
        Place::Buffer(buffer, at) => part(buffer, *at, length),
        Place::Nowhere => None,
    };
    let is_good = receive_data(connection, input, target, length).await?;
    if !is_good {
        connection.reject(head, reason::DATA_DIGEST);
    }
    task.placed(head, place, length, is_good);
    Ok(())
}

fn part(buffer: &mut Buffer, at: usize, length: usize) -> Option<&mut [u8]> {
    buffer.as_mut_slice().get_mut(at..at.checked_add(length)?)
}

async fn other<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    input: &mut Input,
    head: &Head,
) -> Result<(), End> {
    let length = head.data_length();
    let known = matches!(
        head.opcode(),
        request::NOP_OUT | request::TASK_MANAGEMENT | request::TEXT | request::LOGOUT
    );
    let mut data = vec![0; if known { length } else { 0 }];
    let target = known.then_some(data.as_mut_slice());
    let is_good = receive_data(connection, input, target, length).await?;
    if !is_good {
        connection.reject(head, reason::DATA_DIGEST);
        return Ok(());
    }
    if !known {
        let snack = head.opcode() == request::SNACK;
        let why = if snack { reason::SNACK } else { reason::UNSUPPORTED };
        connection.reject(head, why);
        return Ok(());
    }
    let held = Held::Other(Rc::clone(connection), Box::new(*head), data);
    let session = &connection.session;
    session.take(head.command_number(), head.is_immediate(), held);
    Ok(())
}
