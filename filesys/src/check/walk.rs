//! The trees as they were in one moment, walked page by page.
//!
//! # The moment
//! While no checkpoint runs, what files in memory know is put into the tables, and the root of all trees is taken: a clone that costs
//! nothing, since trees share what does not change. Who changes a page afterwards copies it. Pages that are not in memory are
//! read beside the cache and forgotten again; their blocks keep their content because of a [`Hold`], although checkpoints go on. So
//! the check sees one state, whatever is written meanwhile, and has at most a path of pages in memory.
//!
//! A page that is clean in memory is read from the volume all the same: it is the volume that is to be verified.

use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock};

use super::report::Severity;
use super::{Check, Mend};
use crate::core::Core;
use crate::entry::Entry;
use crate::error::{FsError, Refusal};
use crate::file::whole;
use crate::meta_space::Hold;
use crate::tree::codec::{self, Kind, PAGE};
use crate::tree::node::{Body, Child, Node, Ptr, Root};
use crate::units::{SUB_CLUSTER, VolumeIndex};

/// What is walked.
pub(super) struct View<'a, V> {
    pub(super) root: Root,
    /// Blocks of the metadata volume that this state has, as the bitmap says.
    pub(super) image: Vec<u64>,
    pub(super) next_id: u64,
    /// Records that were executed until then.
    pub(super) changes: u64,
    /// Copies of the superblock that are not what was written.
    pub(super) copies: Vec<String>,
    hold: Hold<'a, V>,
}

impl<'a, V: BlockDevice + 'static> View<'a, V> {
    /// Takes the state as it is now.
    pub(super) async fn take<C: Clock + Clone + 'static>(core: &'a Core<V, C>) -> Result<Self, FsError> {
        let running = core.begin_checkpointing().await;
        let copies = super::superblocks(core).await;
        while let Err(missing) = core.state.gather() {
            core.resolve(Refusal::from(missing)).await?;
        }
        // From here on nothing waits.
        let mut image = core.space.image();
        for block in core.state.pages.left_blocks() {
            set(&mut image, block, false);
        }
        let view = Self {
            root: core.state.objects.to_root(),
            image,
            next_id: core.state.next_id(),
            changes: core.changes.get(),
            copies,
            hold: core.space.hold(),
        };
        drop(running);
        Ok(view)
    }

    fn lasts(&self) -> Result<(), FsError> {
        if self.hold.lasts() {
            return Ok(());
        }
        Err(FsError::State {
            object: "the check".into(),
            problem: "was overtaken by changes, since the metadata volume is almost full: grow it, or check when less is written"
                .into(),
        })
    }
}

pub(super) fn is_set(words: &[u64], number: u64) -> bool {
    let index = usize::try_from(number / 64).unwrap_or(usize::MAX);
    words
        .get(index)
        .is_some_and(|word| word >> (number % 64) & 1 == 1)
}

/// Sets or clears a bit. Gives what it was; bits that there are not are set.
pub(super) fn set(words: &mut [u64], number: u64, value: bool) -> bool {
    let index = usize::try_from(number / 64).unwrap_or(usize::MAX);
    let Some(word) = words.get_mut(index) else {
        return true;
    };
    let bit = 1 << (number % 64);
    let before = *word & bit != 0;
    *word = if value { *word | bit } else { *word & !bit };
    before
}

/// A part of a tree that is not empty.
#[derive(Debug)]
pub(super) enum Piece {
    /// Elements that are alike, from `start` on.
    Run { start: u64, count: u64, entry: Entry },
    /// A leaf, and its first element or the first key that belongs there, and the last one.
    Leaf { start: u64, last: u64, node: Rc<Node> },
}

/// A place in a walk through one tree.
#[derive(Debug)]
pub(super) struct Walker {
    kind: Kind,
    /// For messages: `the map of file 17`.
    pub(super) name: String,
    stack: Vec<Frame>,
    /// Pages are noted as belonging to this tree. Not so when a tree is walked for the second time.
    pub(super) notes: bool,
    /// Whose bitmap it is.
    pub(super) volume: Option<VolumeIndex>,
    /// Something could not be read, so the walk did not see everything.
    pub(super) broken: bool,
}

#[derive(Debug)]
struct Frame {
    child: Child,
    level: u8,
    start: u64,
    last: u64,
}

/// Elements under a child of this level, or keys.
fn elements(kind: Kind, level: u8) -> u64 {
    1_u64
        .checked_shl(kind.leaf_bits() + 8 * u32::from(level))
        .unwrap_or(u64::MAX)
}

impl Walker {
    pub(super) fn new(root: &Root, name: impl Into<String>) -> Self {
        let last = match root.kind {
            Kind::Table => u64::MAX,
            kind => elements(kind, root.level) - 1,
        };
        Self {
            kind: root.kind,
            name: name.into(),
            stack: vec![Frame {
                child: root.child.clone(),
                level: root.level,
                start: 0,
                last,
            }],
            notes: true,
            volume: None,
            broken: false,
        }
    }

    /// Puts the children of an inner page on the stack, so that the first comes first.
    fn descend(&mut self, node: &Node, start: u64) {
        let body = node.body.borrow();
        let Body::Inner(children) = &*body else { return };
        let shift = match self.kind {
            Kind::Table => 8 * u32::from(node.level.clamp(1, 8) - 1),
            kind => kind.leaf_bits() + 8 * u32::from(node.level.clamp(1, 8) - 1),
        };
        for (number, child) in children.iter().enumerate().rev() {
            if child.is_empty() {
                continue;
            }
            let first = start | (number as u64).checked_shl(shift).unwrap_or(0);
            let level = match child {
                Child::Media(ptr) => ptr.level,
                Child::Loaded(node) => node.level,
                Child::Empty | Child::Run(_) => node.level.saturating_sub(1),
            };
            self.stack.push(Frame {
                child: child.clone(),
                level,
                start: first,
                last: first | (1_u64.checked_shl(shift).unwrap_or(0)).wrapping_sub(1),
            });
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Check<'_, V, C> {
    /// The next part of a tree. Pages that cannot be used are findings, and are left out.
    pub(super) async fn next(&mut self, walker: &mut Walker) -> Result<Option<Piece>, FsError> {
        while let Some(frame) = walker.stack.pop() {
            let Frame {
                child,
                level,
                start,
                last,
            } = frame;
            let node = match child {
                Child::Empty => continue,
                Child::Run(entry) => {
                    let count = elements(walker.kind, level);
                    return Ok(Some(Piece::Run { start, count, entry }));
                }
                Child::Media(ptr) => match self.page(walker, ptr, start).await? {
                    Some(node) => Rc::new(node),
                    None => continue,
                },
                Child::Loaded(node) => {
                    if let Some(ptr) = node.ptr.get()
                        && walker.notes
                    {
                        // It was dirty in the moment of the check, and may just be on its way to the volume.
                        let is_new = self.view.hold.was_taken(ptr.block);
                        if !is_new && self.page(walker, ptr, start).await?.is_none() {
                            continue;
                        }
                    }
                    node
                }
            };
            if node.level == 0 {
                return Ok(Some(Piece::Leaf { start, last, node }));
            }
            walker.descend(&node, start);
        }
        Ok(None)
    }

    /// Reads a page and verifies that it is the one that its parent means. None: it is not, and that is a finding.
    async fn page(&mut self, walker: &mut Walker, ptr: Ptr, start: u64) -> Result<Option<Node>, FsError> {
        self.view.lasts()?;
        if walker.notes && !self.note(walker, ptr.block) {
            walker.broken = true;
            return Ok(None);
        }
        let buffer = AlignedBuffer::new(PAGE);
        let offset = ptr.block.saturating_mul(SUB_CLUSTER);
        let read = self.core.meta.read(offset, &whole(&buffer)).await;
        self.view.lasts()?;
        let decoded = match read {
            Ok(()) => codec::decode(ptr, walker.kind, buffer.as_slice()).map_err(|bad| bad.to_string()),
            Err(error) => Err(format!(
                "metadata page in block {} cannot be read: {}",
                ptr.block,
                error.cause()
            )),
        };
        let node = match decoded {
            Ok(node) => node,
            Err(problem) => {
                walker.broken = true;
                self.complete = false;
                if walker.notes {
                    self.findings.add(Severity::Loss, &walker.name, problem);
                }
                return Ok(None);
            }
        };
        if walker.notes {
            self.progress.pages += 1;
            self.tell();
            self.verify_count(walker, ptr, start, &node);
        }
        Ok(Some(node))
    }

    /// A tree has this block. False: it cannot have it.
    fn note(&mut self, walker: &Walker, block: u64) -> bool {
        let layout = self.core.superblock.borrow().layout;
        let inside = layout
            .reserved()
            .any(|region| (region.first..region.end()).contains(&block));
        let problem = if block >= layout.size_blocks {
            "lies beyond the end of the metadata volume"
        } else if inside {
            "lies where the superblock, the journal or the bitmap is"
        } else if set(&mut self.seen, block, true) {
            "is used twice; the second time it is left out"
        } else {
            // A page that was dirty may have got its block since.
            if !is_set(&self.view.image, block) && !self.view.hold.was_taken(block) {
                self.findings.mendable(
                    Severity::Major,
                    &walker.name,
                    format!("its page in block {block} is not marked in the metadata bitmap, so it could be overwritten"),
                    [Mend::UseBlock(block)],
                );
            }
            return true;
        };
        self.complete = false;
        self.findings.add(
            Severity::Loss,
            &walker.name,
            format!("its page in block {block} {problem}"),
        );
        false
    }

    /// What the parent keeps of a leaf is what the leaf has.
    fn verify_count(&mut self, walker: &Walker, ptr: Ptr, start: u64, node: &Node) {
        if node.level > 0 {
            if ptr.aux != 0 {
                self.findings
                    .add(Severity::Minor, &walker.name, "an inner page has a count");
            }
            return;
        }
        let count = codec::aux_of(&node.body.borrow());
        if count != ptr.aux {
            let problem = format!(
                "the count kept for its page in block {} is {}, and should be {count}",
                ptr.block, ptr.aux
            );
            match walker.volume {
                Some(volume) => {
                    let mend = Mend::Recount(volume, start);
                    self.findings
                        .mendable(Severity::Major, &walker.name, problem, [mend]);
                }
                None => self.findings.add(Severity::Minor, &walker.name, problem),
            }
        }
    }
}
