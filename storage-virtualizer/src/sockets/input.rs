//! What a client sends, through a buffer: one system call takes many requests. Data of a request that are not in the buffer
//! yet go straight to where they belong, and what comes after them into the buffer, with the same call.

use std::io::{self, IoSliceMut};

/// Bytes that are taken at once.
const BUFFER: usize = 128 << 10;

#[derive(Debug)]
pub(crate) struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The last read took all that there was.
    drained: bool,
}

/// Where the bytes come from.
pub(crate) trait Source {
    /// Waits until the client has sent something. `false`: do not read, this is the end.
    async fn readable(&self) -> io::Result<bool>;

    /// Fills `targets`, one after the other, as far as there is something; 0 is the end. Never waits.
    fn try_read(&self, targets: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// Whether a read that filled less than it could have has taken all that there was.
    fn short_reads_are_last(&self) -> bool;
}

/// Whether there is more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum More {
    Yes,
    /// The client has ended, or this side wants to.
    End,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into(),
            start: 0,
            end: 0,
            // Nothing is there before the client has read the greeting.
            drained: true,
        }
    }

    /// What is there.
    pub(crate) fn available(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The first `count` bytes are done with.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Takes what the client has sent; waits for something.
    pub(crate) async fn more(&mut self, link: &impl Source) -> io::Result<More> {
        let (more, _) = self.receive(link, &mut []).await?;
        Ok(more)
    }

    /// Receives into `first` and then into the buffer; says how much is in `first`.
    async fn receive(&mut self, link: &impl Source, first: &mut [u8]) -> io::Result<(More, usize)> {
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
                link.try_read(&mut [IoSliceMut::new(room)])
            } else {
                let mut targets = [IoSliceMut::new(&mut *first), IoSliceMut::new(room)];
                link.try_read(&mut targets)
            };
            match read {
                Ok(0) => return Ok((More::End, 0)),
                Ok(count) => {
                    self.drained = count < could && link.short_reads_are_last();
                    self.end += count.saturating_sub(length);
                    return Ok((More::Yes, count.min(length)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.drained = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills `target`.
    pub(crate) async fn read(&mut self, link: &impl Source, target: &mut [u8]) -> io::Result<More> {
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
    pub(crate) async fn skip(&mut self, link: &impl Source, mut count: u64) -> io::Result<More> {
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
