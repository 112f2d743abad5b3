//! What the data of EXPANDED API IN begin with.

/// How it is with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It waits for its turn.
    Queued,
    /// It is being done.
    Running,
    /// It is done; the outcome follows.
    Done,
    /// It was refused or failed; the outcome follows.
    Failed,
}

impl State {
    const fn code(self) -> u8 {
        match self {
            Self::Queued => 1,
            Self::Running => 2,
            Self::Done => 3,
            Self::Failed => 4,
        }
    }

    /// Whether there is an outcome.
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }
}

/// The header: state, bytes of the whole outcome, where in it the piece begins that follows, and how long the piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How it is with the request.
    pub state: State,
    /// Bytes of the outcome.
    pub total: u32,
    /// First byte of the piece.
    pub offset: u32,
    /// Bytes of the piece.
    pub length: u32,
}

impl Header {
    /// Bytes of a header.
    pub const LENGTH: usize = 16;

    /// The header and the piece number `piece` of `body`, where there is room for `room` bytes with the header.
    pub fn with_piece(state: State, body: &[u8], piece: u8, room: usize) -> Vec<u8> {
        let room = room.saturating_sub(Self::LENGTH);
        let offset = room.saturating_mul(usize::from(piece)).min(body.len());
        let rest = &body[offset..];
        let piece = &rest[..rest.len().min(room)];
        let number = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        let header = Self {
            state,
            total: number(body.len()),
            offset: number(offset),
            length: number(piece.len()),
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend(piece);
        bytes
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0] = self.state.code();
        bytes[4..8].copy_from_slice(&self.total.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.offset.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// What `bytes` begin with. None if that is no header.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<{ Self::LENGTH }>()?;
        let state = [State::Queued, State::Running, State::Done, State::Failed]
            .into_iter()
            .find(|state| state.code() == bytes[0])?;
        let number = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Some(Self {
            state,
            total: number(4),
            offset: number(8),
            length: number(12),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_whole() {
        let body: Vec<u8> = (0..100).collect();
        let mut whole: Vec<u8> = Vec::new();
        for piece in 0..5 {
            let bytes = Header::with_piece(State::Done, &body, piece, 40);
            let header = Header::decode(&bytes).unwrap();
            assert_eq!((header.state, header.total), (State::Done, 100));
            assert_eq!(header.offset as usize, whole.len());
            assert_eq!(header.length as usize, bytes.len() - Header::LENGTH);
            whole.extend(&bytes[Header::LENGTH..]);
        }
        assert_eq!(whole, body);
        assert_eq!(Header::with_piece(State::Queued, &[], 200, 16).len(), 16);
        assert!(Header::decode(&[0; 16]).is_none() && Header::decode(&[1; 15]).is_none());
    }
}
