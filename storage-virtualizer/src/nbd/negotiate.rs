//! The handshake without its sockets: each option that a client sends, and what is said to it.
//!
//! ```text
//!   option, data ──Negotiation::option──► Answer: bytes to send, and what comes then
//!                                           (next option · TLS · transmission · the end)
//! ```
//!
//! What was agreed on before TLS began may have been said by somebody else: it is forgotten then.

use block_io::nbd::protocol::{
    DEFAULT_MAXIMUM, LONGEST_TEXT, OPTION_REPLY_MAGIC, can, info, option, reply, u16_at, u32_at,
};

/// Most metadata contexts that a connection selects.
pub(super) const MOST_CONTEXTS: usize = 64;

/// What the handshake has to know of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    /// Its name.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Smallest request, and what offsets are multiples of.
    pub minimum_block: u32,
    /// What is fastest.
    pub preferred_block: u32,
    /// Takes no writes.
    pub read_only: bool,
    /// Fast zeroes are possible.
    pub zeroes_fast: bool,
    /// Snapshots with knowledge of changes since.
    pub snapshots: Vec<String>,
}

/// Where the handshake learns about exports.
pub(super) trait Catalogue {
    /// The numbers of all exports, in their order; no number is ever another export's.
    fn all(&self) -> Vec<usize>;
    /// Export number `number`, if it is there.
    fn offer(&self, number: usize) -> Option<Offer>;
    /// Its name.
    fn name(&self, number: usize) -> Option<String> {
        self.offer(number).map(|offer| offer.name)
    }
}

/// Whether connections are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsMode {
    /// Never.
    #[default]
    Off,
    /// If the client wants.
    Allowed,
    /// Always: nothing else is answered before.
    Required,
}

/// Something that can be asked about blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// `base:allocation`
    Allocation,
    /// `smsvmm:changed:…` or `qemu:dirty-bitmap:…`: what has changed since this snapshot.
    Changed(usize),
}

/// What a connection agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agreement {
    /// Number of the export.
    pub export: usize,
    /// Reads are answered in chunks.
    pub structured: bool,
    /// Headers with 64-bit lengths.
    pub extended: bool,
    /// Contexts with the numbers that they have here.
    pub contexts: Vec<(u32, Context)>,
}

/// What comes after an option's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Another option.
    Option,
    /// TLS.
    StartTls,
    /// Requests.
    Transmit(Agreement),
    /// Nothing.
    Close,
}

/// What is said to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// To be sent.
    pub bytes: Vec<u8>,
    /// And then.
    pub next: Next,
}

/// What was agreed on so far.
#[derive(Debug, Clone)]
pub(super) struct Negotiation {
    tls: TlsMode,
    encrypted: bool,
    no_zeroes: bool,
    structured: bool,
    extended: bool,
    /// Export and contexts of the last `NBD_OPT_SET_META_CONTEXT`.
    selected: Option<(usize, Vec<(u32, Context)>)>,
}

/// An error that an option is answered with.
struct Refused(u32, &'static str);

type Outcome = Result<Next, Refused>;

impl Negotiation {
    /// The client's flags were read.
    pub(super) fn new(tls: TlsMode, no_zeroes: bool) -> Self {
        Self {
            tls,
            encrypted: false,
            no_zeroes,
            structured: false,
            extended: false,
            selected: None,
        }
    }

    /// TLS stands: begins again.
    pub(super) fn encrypted(&mut self) {
        *self = Self {
            encrypted: true,
            ..Self::new(self.tls, self.no_zeroes)
        };
    }

    /// Answers `option` with its `data`.
    pub(super) fn option(&mut self, catalogue: &impl Catalogue, option: u32, data: &[u8]) -> Answer {
        let mut out = Replies {
            option,
            bytes: Vec::new(),
        };
        let next = self.execute(catalogue, data, &mut out).unwrap_or_else(|refused| {
            out.put(refused.0, &[refused.1.as_bytes()]);
            Next::Option
        });
        Answer {
            bytes: out.bytes,
            next,
        }
    }

    /// Answers an option whose data are too long to be looked at.
    pub(super) fn too_long(option: u32) -> Vec<u8> {
        let mut out = Replies {
            option,
            bytes: Vec::new(),
        };
        out.put(reply::TOO_BIG, &[b"the option's data are too long"]);
        out.bytes
    }

    fn execute(&mut self, catalogue: &impl Catalogue, data: &[u8], out: &mut Replies) -> Outcome {
        let refuses = self.tls == TlsMode::Required && !self.encrypted;
        match out.option {
            option::ABORT => {
                out.ack();
                return Ok(Next::Close);
            }
            option::STARTTLS => return self.start_tls(data, out),
            // It cannot be answered with an error.
            option::EXPORT_NAME if refuses => return Ok(Next::Close),
            _ if refuses => return Err(Refused(reply::TLS_REQUIRED, "this server demands TLS")),
            _ => {}
        }
        match out.option {
            option::EXPORT_NAME => Ok(self.export_name(catalogue, data, out)),
            option::LIST => {
                nothing(data)?;
                for offer in catalogue
                    .all()
                    .into_iter()
                    .filter_map(|number| catalogue.offer(number))
                {
                    let name = offer.name.as_bytes();
                    out.put(
                        reply::SERVER,
                        &[&length(name), name, offer.description.as_bytes()],
                    );
                }
                out.ack();
                Ok(Next::Option)
            }
            option::INFO | option::GO => self.info(catalogue, data, out),
            option::STRUCTURED_REPLY => {
                nothing(data)?;
                if self.extended {
                    return Err(Refused(
                        reply::INVALID,
                        "extended headers include structured replies",
                    ));
                }
                self.structured = true;
                out.ack();
                Ok(Next::Option)
            }
            option::EXTENDED_HEADERS => {
                nothing(data)?;
                if self.extended {
                    return Err(Refused(reply::INVALID, "extended headers are agreed on already"));
                }
                self.structured = true;
                self.extended = true;
                out.ack();
                Ok(Next::Option)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(catalogue, data, out),
            _ => Err(Refused(reply::UNSUPPORTED, "an unknown option")),
        }
    }

    fn start_tls(&self, data: &[u8], out: &mut Replies) -> Outcome {
        nothing(data)?;
        if self.encrypted {
            return Err(Refused(reply::INVALID, "TLS is in use already"));
        }
        if self.tls == TlsMode::Off {
            return Err(Refused(reply::POLICY, "this server has no certificate"));
        }
        out.ack();
        Ok(Next::StartTls)
    }

    fn agreement(&mut self, export: usize) -> Agreement {
        let contexts = match self.selected.take() {
            Some((other, contexts)) if other == export => contexts,
            _ => Vec::new(),
        };
        Agreement {
            export,
            structured: self.structured,
            extended: self.extended,
            contexts,
        }
    }

    fn flags(&self, offer: &Offer) -> u16 {
        let mut flags = can::HAS_FLAGS | can::FLUSH | can::FUA | can::MULTI_CONN;
        if offer.read_only {
            flags |= can::READ_ONLY;
        } else {
            flags |= can::TRIM | can::WRITE_ZEROES;
            if offer.zeroes_fast {
                flags |= can::FAST_ZERO;
            }
        }
        if self.structured {
            flags |= can::DONT_FRAGMENT;
        }
        flags
    }

    /// The one option whose answer has a form of its own, and no errors.
    fn export_name(&mut self, catalogue: &impl Catalogue, data: &[u8], out: &mut Replies) -> Next {
        let Some((export, offer)) = std::str::from_utf8(data)
            .ok()
            .and_then(|name| find(catalogue, name))
        else {
            return Next::Close;
        };
        if self.extended {
            // The protocol wants NBD_OPT_GO then.
            return Next::Close;
        }
        out.bytes.extend(offer.size.to_be_bytes());
        out.bytes.extend(self.flags(&offer).to_be_bytes());
        if !self.no_zeroes {
            out.bytes.extend([0; 124]);
        }
        Next::Transmit(self.agreement(export))
    }

    fn info(&mut self, catalogue: &impl Catalogue, data: &[u8], out: &mut Replies) -> Outcome {
        let malformed = || Refused(reply::INVALID, "the option's data are malformed");
        let (name, rest) = text(data).ok_or_else(malformed)?;
        let count = u16_at(rest, 0).ok_or_else(malformed)?;
        let wanted = &rest[2..];
        if wanted.len() != usize::from(count) * 2 {
            return Err(malformed());
        }
        let wants = |kind: u16| wanted.chunks_exact(2).any(|pair| pair == kind.to_be_bytes());
        let unknown = Refused(reply::UNKNOWN, "there is no such export");
        let (export, offer) = find(catalogue, name).ok_or(unknown)?;
        let flags = self.flags(&offer).to_be_bytes();
        out.info(info::EXPORT, &[&offer.size.to_be_bytes(), &flags]);
        out.info(
            info::BLOCK_SIZE,
            &[
                &offer.minimum_block.to_be_bytes(),
                &offer.preferred_block.to_be_bytes(),
                &DEFAULT_MAXIMUM.to_be_bytes(),
            ],
        );
        if wants(info::NAME) {
            out.info(info::NAME, &[offer.name.as_bytes()]);
        }
        if wants(info::DESCRIPTION) && !offer.description.is_empty() {
            out.info(info::DESCRIPTION, &[offer.description.as_bytes()]);
        }
        out.ack();
        Ok(if out.option == option::GO {
            Next::Transmit(self.agreement(export))
        } else {
            Next::Option
        })
    }

    fn contexts(&mut self, catalogue: &impl Catalogue, data: &[u8], out: &mut Replies) -> Outcome {
        let sets = out.option == option::SET_META_CONTEXT;
        if sets {
            self.selected = None;
        }
        if !self.structured {
            return Err(Refused(
                reply::INVALID,
                "metadata contexts need structured replies, which were not agreed on",
            ));
        }
        let malformed = || Refused(reply::INVALID, "the option's data are malformed");
        let (name, rest) = text(data).ok_or_else(malformed)?;
        let count = u32_at(rest, 0).ok_or_else(malformed)?;
        let mut rest = &rest[4..];
        let mut queries = Vec::new();
        for _ in 0..count {
            let (query, after) = text(rest).ok_or_else(malformed)?;
            queries.push(query);
            rest = after;
        }
        nothing(rest)?;
        let unknown = Refused(reply::UNKNOWN, "there is no such export");
        let (export, offer) = find(catalogue, name).ok_or(unknown)?;
        let mut chosen = Vec::new();
        for (context, name) in all_contexts(&offer.snapshots) {
            let asked = queries
                .iter()
                .any(|query| *query == name || (!sets && query.ends_with(':') && name.starts_with(*query)));
            if !asked && (sets || !queries.is_empty()) {
                continue;
            }
            if chosen.len() == MOST_CONTEXTS {
                break;
            }
            // Two names of one context are two contexts for the client.
            let number = match (sets, u32::try_from(chosen.len())) {
                (true, Ok(number)) => number + 1,
                _ => 0,
            };
            chosen.push((number, context));
            out.put(reply::META_CONTEXT, &[&number.to_be_bytes(), name.as_bytes()]);
        }
        if sets {
            self.selected = Some((export, chosen));
        }
        out.ack();
        Ok(Next::Option)
    }
}

fn all_contexts(snapshots: &[String]) -> impl Iterator<Item = (Context, String)> {
    let changed = snapshots.iter().enumerate().flat_map(|(index, snapshot)| {
        ["smsvmm:changed:", "qemu:dirty-bitmap:"]
            .map(|space| (Context::Changed(index), format!("{space}{snapshot}")))
    });
    std::iter::once((Context::Allocation, "base:allocation".to_owned())).chain(changed)
}

/// The export called `name`, with its number; the empty name is also that of the only export.
fn find(catalogue: &impl Catalogue, name: &str) -> Option<(usize, Offer)> {
    let all = catalogue.all();
    let called = |number: &usize| catalogue.name(*number).as_deref() == Some(name);
    let found = all.iter().copied().find(called);
    let number = found.or(match all[..] {
        [only] if name.is_empty() => Some(only),
        _ => None,
    })?;
    Some((number, catalogue.offer(number)?))
}

fn nothing(data: &[u8]) -> Result<(), Refused> {
    if data.is_empty() {
        Ok(())
    } else {
        Err(Refused(reply::INVALID, "there are more data than the option has"))
    }
}

fn length(text: &[u8]) -> [u8; 4] {
    u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// A text with its length before it, and what follows.
fn text(data: &[u8]) -> Option<(&str, &[u8])> {
    let length = usize::try_from(u32_at(data, 0)?).ok()?;
    if length > LONGEST_TEXT {
        return None;
    }
    let (text, rest) = data.get(4..)?.split_at_checked(length)?;
    Some((std::str::from_utf8(text).ok()?, rest))
}

/// Replies to an option.
struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn put(&mut self, kind: u32, data: &[&[u8]]) {
        let length = data.iter().map(|piece| piece.len()).sum::<usize>();
        self.bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes
            .extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        for piece in data {
            self.bytes.extend(*piece);
        }
    }

    fn info(&mut self, kind: u16, data: &[&[u8]]) {
        let kind = kind.to_be_bytes();
        let mut all: Vec<&[u8]> = vec![&kind];
        all.extend(data);
        self.put(reply::INFO, &all);
    }

    fn ack(&mut self) {
        self.put(reply::ACK, &[]);
    }
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
