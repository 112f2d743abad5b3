//! The thread that makes connections, and notices when a server no longer answers. It may block, which tasks may not, and it
//! exists from the start, so that no confined worker has to start it. It sleeps while the device is idle.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use crate::background;
use crate::device::{Geometry, ZeroMode};
use crate::unflushed::{Content, Write};

use super::handshake::{Export, Wire, handshake};
use super::link::{Link, Phase, Socket, State};
use super::proto::{Command, FLAG_NO_HOLE, Head, Kind, LONGEST_TEXT, Reply, can};
use super::{NbdAddress, NbdError, NbdOptions};

/// Longest time that one attempt to connect takes, and one to agree with the server.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pauses between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE_DOWN: Duration = Duration::from_secs(5);
const STACK_SIZE: usize = 128 << 10;

/// Starts the thread; it ends when the device is closed.
pub(super) fn start(link: Arc<Link>) -> Result<(), NbdError> {
    std::thread::Builder::new()
        .name("nbd-connector".into())
        .stack_size(STACK_SIZE)
        .spawn(move || {
            background::begin(|hooks| &*hooks.connects);
            serve(&link);
        })?;
    Ok(())
}

/// Connects and shakes hands.
pub(super) fn connect(address: &NbdAddress, patience: Duration) -> Result<(Socket, Export), NbdError> {
    let incoming = address.server.connect(patience).map_err(NbdError::Connect)?;
    let export = handshake(&Wire::new(&incoming, patience), &address.export)?;
    let outgoing: OwnedFd = incoming.try_clone()?;
    Ok((Socket { incoming, outgoing }, export))
}

/// What the device is like on the host's side.
pub(super) fn geometry(export: &Export, options: &NbdOptions) -> Result<Geometry, NbdError> {
    let logical_block = export.minimum_block.max(512);
    if export.maximum_block < logical_block {
        return Err(NbdError::Violation(
            "a largest block that is smaller than a sector",
        ));
    }
    let physical_block = export.preferred_block.clamp(logical_block, 1 << 25);
    Ok(Geometry {
        size: export.size - export.size % u64::from(logical_block),
        logical_block,
        physical_block,
        optimal_io: 0,
        discard_granularity: if export.flags & can::TRIM != 0 {
            physical_block
        } else {
            0
        },
        read_only: options.read_only || export.flags & can::READ_ONLY != 0,
    })
}

fn serve(link: &Link) {
    let mut pause = FIRST_PAUSE;
    let mut state = link.lock();
    loop {
        match state.phase {
            Phase::Closed => return,
            Phase::Up(_) => {
                pause = FIRST_PAUSE;
                state = watch(link, state);
            }
            Phase::Lost | Phase::Down => {
                give_up(link, &mut state);
                let patience = match state.phase {
                    Phase::Lost => left(link, &state).clamp(Duration::from_millis(200), PATIENCE),
                    _ => PATIENCE,
                };
                let writes = state.unflushed.all();
                drop(state);
                let connected = reconnect(link, patience, &writes);
                state = link.lock();
                match connected {
                    _ if matches!(state.phase, Phase::Closed) => return,
                    Ok((socket, export)) => {
                        tracing::info!(device = %link.name, "connected again");
                        state.come_up(socket, export);
                    }
                    Err(error) => {
                        tracing::debug!(device = %link.name, %error, "cannot connect");
                        state.cause = Arc::new(error);
                        state = rest(link, state, &mut pause);
                    }
                }
            }
        }
    }
}

/// Time that requests still wait for the connection.
fn left(link: &Link, state: &State) -> Duration {
    let gone = state.outage.map(|outage| outage.elapsed()).unwrap_or_default();
    link.options.patience.saturating_sub(gone)
}

/// Fails all requests if they have waited long enough.
fn give_up(link: &Link, state: &mut State) {
    if matches!(state.phase, Phase::Lost) && left(link, state).is_zero() {
        tracing::error!(device = %link.name, reason = %state.cause, "the server does not come back: requests fail");
        state.phase = Phase::Down;
        state.fail_all();
    }
}

fn rest<'a>(link: &Link, state: MutexGuard<'a, State>, pause: &mut Duration) -> MutexGuard<'a, State> {
    let (time, longest) = match state.phase {
        Phase::Lost => ((*pause).min(left(link, &state)), LONGEST_PAUSE),
        _ => (*pause, LONGEST_PAUSE_DOWN),
    };
    *pause = (*pause * 2).min(longest);
    wait(link, state, time)
}

fn wait<'a>(link: &Link, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
    let waited = link.bell.wait_timeout(state, time);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// Looks now and then whether the server answers what it was asked.
fn watch<'a>(link: &'a Link, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    let silence = link.silence();
    let Some(oldest) = state.longest_wait() else {
        state.asleep = true;
        return link.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
    };
    let silent = oldest >= silence && state.last_answer.elapsed() >= silence;
    // One request that is never answered while others are.
    let starved = oldest >= silence.saturating_mul(4);
    if silent || starved {
        let generation = state.generation;
        link.lose(&mut state, generation, NbdError::Silent(silence));
        return state;
    }
    wait(link, state, (silence / 4).max(Duration::from_millis(1)))
}

fn reconnect(link: &Link, patience: Duration, writes: &[Write]) -> Result<(Socket, Export), NbdError> {
    let (socket, export) = connect(&link.address, patience)?;
    let size = still_the_same(link, &export)?;
    for write in writes {
        let wire = Wire::new(&socket.incoming, link.silence());
        if !repeat(&wire, &export, write)? {
            // It had been acknowledged.
            tracing::error!(device = %link.name, offset = write.offset, "a write that had completed cannot be repeated");
            link.flush_failed.store(true, Ordering::Relaxed);
        }
    }
    link.size.store(size, Ordering::Release);
    Ok((socket, export))
}

/// The size, if the export is what it was, or has grown.
fn still_the_same(link: &Link, export: &Export) -> Result<u64, NbdError> {
    let now = geometry(export, &link.options)?;
    let size = link.size.load(Ordering::Acquire);
    if now.size < size {
        return Err(NbdError::Shrunk {
            before: size,
            now: now.size,
        });
    }
    let before = link.lock().export.flags;
    let needed = before & (can::FLUSH | can::FUA | can::TRIM | can::WRITE_ZEROES);
    if now.logical_block > link.geometry.logical_block
        || now.read_only != link.geometry.read_only
        || export.maximum_block < link.largest
        || export.flags & needed != needed
    {
        return Err(NbdError::Changed);
    }
    Ok(now.size)
}

/// Writes once more; `false` if the server refuses.
fn repeat(wire: &Wire<'_>, export: &Export, write: &Write) -> Result<bool, NbdError> {
    let (command, flags, data) = match &write.content {
        Content::Data(data) => (Command::Write, 0, &data[..]),
        Content::Zeroes { mode, .. } => {
            let flags = if *mode == ZeroMode::MayUnmap {
                0
            } else {
                FLAG_NO_HOLE
            };
            (Command::WriteZeroes, flags, &[][..])
        }
    };
    // It was one request before, and so fits.
    let head = Head {
        command,
        flags,
        cookie: write.offset,
        offset: write.offset,
        length: u32::try_from(write.length()).unwrap_or(u32::MAX),
    };
    wire.write(&head.encode())?;
    wire.write(data)?;
    let mut succeeded = true;
    loop {
        let mut bytes = [0; 20];
        let (simple, rest) = bytes.split_at_mut(16);
        wire.read(simple)?;
        let wrong = NbdError::Violation("a wrong answer to a repeated write");
        match Reply::decode(simple) {
            Ok(Some((Reply::Simple { error, cookie }, _))) if cookie == head.cookie => return Ok(error == 0),
            Ok(None) if export.structured => {}
            _ => return Err(wrong),
        }
        wire.read(rest)?;
        match Reply::decode(&bytes) {
            Ok(Some((
                Reply::Chunk {
                    last,
                    kind,
                    cookie,
                    length,
                },
                _,
            ))) if cookie == head.cookie && length as usize <= LONGEST_TEXT + 64 => {
                wire.read(&mut vec![0; length as usize])?;
                match kind {
                    Kind::Nothing if last && length == 0 => {}
                    Kind::Error => succeeded = false,
                    _ => return Err(wrong),
                }
                if last {
                    return Ok(succeeded);
                }
            }
            _ => return Err(wrong),
        }
    }
}
