//! What a client sends, through a buffer: one system call takes many requests. Data of a request that are not in the buffer
//! yet go straight to where they belong, and what comes after them into the buffer, with the same call.

use std::io::{self, IoSliceMut};

use super::link::Link;

/// Bytes that are taken at once.
const BUFFER: usize = 128 << 10;

#[derive(Debug)]
pub(super) struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The last read took all that there was.
    drained: bool,
}

/// Whether there is more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum More {
    Yes,
    /// The client has ended, or this side wants to.
    End,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into(),
            start: 0,
            end: 0,
            // Nothing is there before the client has read the greeting.
            drained: true,
        }
    }

    /// What is there.
    pub(super) fn available(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The first `count` bytes are done with.
    pub(super) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Takes what the client has sent; waits for something.
    pub(super) async fn more(&mut self, link: &Link) -> io::Result<More> {
        let (more, _) = self.receive(link, &mut []).await?;
        Ok(more)
    }

    /// Receives into `first` and then into the buffer; says how much is in `first`.
    async fn receive(&mut self, link: &Link, first: &mut [u8]) -> io::Result<(More, usize)> {
        if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        loop {
            if !self.drained {
                // A client that sends without pause: others have their turn first.
                block_io::yield_now().await;
            } else if !link.readable().await? {
                return Ok((More::End, 0));
            }
            let length = first.len();
            let room = &mut self.buffer[self.end..];
            let could = length + room.len();
            let read = if length == 0 {
                link.transport.try_read(&mut [IoSliceMut::new(room)])
            } else {
                let mut targets = [IoSliceMut::new(&mut *first), IoSliceMut::new(room)];
                link.transport.try_read(&mut targets)
            };
            match read {
                Ok(0) => return Ok((More::End, 0)),
                Ok(count) => {
                    self.drained = count < could && link.transport.short_reads_are_last();
                    self.end += count.saturating_sub(length);
                    return Ok((More::Yes, count.min(length)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.drained = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills `target`.
    pub(super) async fn read(&mut self, link: &Link, target: &mut [u8]) -> io::Result<More> {
        let mut filled = self.available().len().min(target.len());
        target[..filled].copy_from_slice(&self.available()[..filled]);
        self.consume(filled);
        while filled < target.len() {
            match self.receive(link, &mut target[filled..]).await? {
                (More::End, _) => return Ok(More::End),
                (More::Yes, count) => filled += count,
            }
        }
        Ok(More::Yes)
    }

    /// Throws `count` bytes away.
    pub(super) async fn skip(&mut self, link: &Link, mut count: u64) -> io::Result<More> {
        loop {
            let here = self.available().len();
            match usize::try_from(count) {
                Ok(count) if count <= here => {
                    self.consume(count);
                    return Ok(More::Yes);
                }
                _ => {}
            }
            self.consume(here);
            count -= here as u64;
            if self.more(link).await? == More::End {
                return Ok(More::End);
            }
        }
    }
}
