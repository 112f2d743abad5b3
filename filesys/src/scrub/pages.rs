//! Metadata: pages of the last checkpoint, its bitmap, the journal behind it, the copies of the superblock. No checkpoint runs during a step,
//! so all of these blocks keep their content meanwhile.

use std::ops::ControlFlow;

use block_io::{AlignedBuffer, BlockDevice, Clock};

use super::{Scrub, ScrubFinding, ScrubPhase, ScrubPosition};
use crate::error::FsError;
use crate::event::Event;
use crate::meta_io;
use crate::state::Damage;
use crate::superblock;
use crate::tree::codec::{self, Kind};
use crate::tree::node::{Body, Child, FANOUT, Node, Ptr};
use crate::units::SUB_CLUSTER;

/// Pages of a step.
const STEP: usize = 256;

/// A page that is to be verified.
#[derive(Debug, Clone, Copy)]
struct Frame {
    ptr: Ptr,
    kind: Kind,
    /// The object whose tree it is in; none: the table of objects.
    object: Option<u64>,
    /// Its first leaf.
    start: u64,
    /// Leaves below its place.
    width: u64,
}

/// Leaves below a place of this level.
fn width(level: u8) -> u64 {
    1_u64.checked_shl(8 * u32::from(level)).unwrap_or(u64::MAX)
}

impl Frame {
    /// Whether all of it lies before a position.
    fn is_before(&self, from: &ScrubPosition) -> bool {
        let last = self.start.saturating_add(self.width - 1);
        match self.object {
            None => {
                last.saturating_mul(FANOUT as u64)
                    .saturating_add(FANOUT as u64 - 1)
                    < from.object
            }
            Some(object) => object < from.object || object == from.object && last < from.offset,
        }
    }

    /// Whether it was verified before that position was told.
    fn is_done(&self, from: &ScrubPosition) -> bool {
        match self.object {
            None => self.start * (FANOUT as u64) < from.object,
            Some(object) => object == from.object && self.start < from.offset,
        }
    }

    fn position(&self) -> (u64, u64) {
        match self.object {
            None => (self.start.saturating_mul(FANOUT as u64), 0),
            Some(object) => (object, self.start),
        }
    }

    fn what(&self) -> String {
        match self.object {
            None => "the table of objects".into(),
            Some(object) => format!("{:?} tree of object {object}", self.kind),
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Scrub<'_, V, C> {
    pub(super) async fn pages(&mut self, phase: ScrubPhase) -> Result<ControlFlow<()>, FsError> {
        loop {
            let next = self.some_pages(phase).await?;
            let Some((object, offset)) = next else { break };
            if self.pause(object, offset).await.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        {
            let core = self.core;
            let _running = core.begin_checkpointing().await;
            self.bitmap(phase).await?;
            self.journal(phase).await;
            self.superblocks(phase).await;
        }
        if std::mem::take(&mut self.renew) && !self.core.options.read_only {
            block_io::cover!("filesys: a scrub has metadata written anew");
            // The bitmap has two places, in turn.
            self.core.checkpoint_now().await?;
            self.core.checkpoint_now().await?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Verifies pages from the position on; gives where to go on.
    async fn some_pages(&mut self, phase: ScrubPhase) -> Result<Option<(u64, u64)>, FsError> {
        let core = self.core;
        let from = self.report.position;
        let _running = core.begin_checkpointing().await;
        let root = core.superblock.borrow().root;
        let root = codec::decode_root(&root.slot)
            .map_err(|problem| Damage::new("the superblock's root", problem))?;
        let mut stack: Vec<Frame> = Vec::new();
        if let Some(root) = root
            && let Child::Media(ptr) = root.child
        {
            stack.push(Frame {
                ptr,
                kind: root.kind,
                object: None,
                start: 0,
                width: width(ptr.level),
            });
        }
        let mut pages = 0;
        while let Some(frame) = stack.pop() {
            if pages >= STEP {
                return Ok(Some(frame.position()));
            }
            let good = |bytes: &[u8]| codec::decode(frame.ptr, frame.kind, bytes).is_ok();
            let node = if frame.is_done(&from) {
                let block = core.healer.find(frame.ptr.block, good).await;
                let block = match block {
                    Some(block) => Some(block),
                    None => meta_io::read_blocks(&*core.meta, frame.ptr.block, 1).await.ok(),
                };
                block.and_then(|block| codec::decode(frame.ptr, frame.kind, block.as_slice()).ok())
            } else {
                pages += 1;
                let found = self.block(frame.ptr.block, phase, || frame.what(), good).await;
                found.and_then(|block| codec::decode(frame.ptr, frame.kind, block.as_slice()).ok())
            };
            if let Some(node) = node {
                push_children(&frame, &node, &from, &mut stack);
            }
        }
        Ok(None)
    }

    /// Verifies a block: what is stored, or the other copies. Gives what is right, if there is that.
    async fn block(
        &mut self,
        block: u64,
        phase: ScrubPhase,
        what: impl Fn() -> String,
        good: impl Fn(&[u8]) -> bool,
    ) -> Option<AlignedBuffer> {
        let found = self.stored_block(block, phase, &good).await;
        let Some(right) = found else {
            if phase == ScrubPhase::Metadata {
                self.core.event(Event::MetadataCorrupt { block });
                self.lost(ScrubFinding::Metadata { block, what: what() });
            }
            return None;
        };
        if phase == ScrubPhase::MetadataCopies {
            self.other_copies(block, &right, &good).await;
        }
        Some(right)
    }

    /// What is stored, repaired if need be.
    async fn stored_block(
        &mut self,
        block: u64,
        phase: ScrubPhase,
        good: impl Fn(&[u8]) -> bool,
    ) -> Option<AlignedBuffer> {
        let core = self.core;
        let stored = match core.healer.copies(block) {
            0 => meta_io::read_blocks(&*core.meta, block, 1).await.ok(),
            _ => core.healer.read(0, block).await,
        };
        if phase == ScrubPhase::Metadata {
            self.report.blocks += 1;
        }
        if let Some(stored) = stored.filter(|stored| good(stored.as_slice())) {
            return Some(stored);
        }
        let found = core.healer.find(block, good).await?;
        if core.healer.repair(block, &found).await {
            self.report.blocks_repaired += 1;
        }
        Some(found)
    }

    async fn other_copies(&mut self, block: u64, right: &AlignedBuffer, good: impl Fn(&[u8]) -> bool) {
        let healer = &self.core.healer;
        for copy in 1..healer.telling(block) {
            let Some(found) = healer.read(copy, block).await else {
                self.report.unread += SUB_CLUSTER;
                continue;
            };
            self.report.blocks += 1;
            if !good(found.as_slice()) && healer.repair(block, right).await {
                block_io::cover!("filesys: a scrub repairs another copy of metadata");
                self.report.blocks_repaired += 1;
            }
        }
    }

    async fn bitmap(&mut self, phase: ScrubPhase) -> Result<(), FsError> {
        let core = self.core;
        let (pages, repaired) = core
            .space
            .verify(&core.healer)
            .await
            .map_err(|error| FsError::Open(error.to_string()))?;
        self.report.blocks_repaired += repaired;
        match pages {
            None => {
                // What is in memory is right, and is written anew.
                core.space.forget_stored();
                self.report.blocks_repaired += u64::from(!core.options.read_only);
                self.renew = true;
            }
            Some(pages) if phase == ScrubPhase::Metadata => self.report.blocks += pages.len() as u64,
            Some(pages) => {
                for (block, right) in pages {
                    self.other_copies(block, &right, |bytes| bytes == right.as_slice())
                        .await;
                }
            }
        }
        Ok(())
    }

    /// Groups that the next opening would read.
    async fn journal(&mut self, phase: ScrubPhase) {
        let core = self.core;
        let replay = core.superblock.borrow().replay;
        for position in replay.block..core.journal.durable_end() {
            let place = core.journal.place(position);
            let good = |bytes: &[u8]| core.journal.is_at(position, bytes);
            match self.stored_block(place, phase, good).await {
                Some(right) if phase == ScrubPhase::MetadataCopies => {
                    self.other_copies(place, &right, good).await;
                }
                Some(_) => {}
                // A checkpoint has all that it says.
                None if !self.renew => {
                    self.report.blocks_repaired += u64::from(!core.options.read_only);
                    self.renew = true;
                }
                None => {}
            }
        }
    }

    async fn superblocks(&mut self, phase: ScrubPhase) {
        let core = self.core;
        if core.options.read_only {
            return;
        }
        let ours = *core.superblock.borrow();
        for (copy, block) in ours.layout.superblocks().into_iter().enumerate() {
            let good = |bytes: &[u8]| superblock::is_copy_of(bytes, copy, block, &ours);
            match self.stored_block(block, phase, good).await {
                Some(right) if phase == ScrubPhase::MetadataCopies => {
                    self.other_copies(block, &right, good).await;
                }
                Some(_) => {}
                None => {
                    self.report.blocks_repaired += 1;
                    self.renew = true;
                }
            }
        }
    }
}

/// What is below a page, the first on top.
fn push_children(frame: &Frame, node: &Node, from: &ScrubPosition, stack: &mut Vec<Frame>) {
    let begin = stack.len();
    match &*node.body.borrow() {
        Body::Inner(children) => {
            let below = width(node.level - 1);
            for (slot, child) in (0_u64..).zip(children.iter()) {
                if let Child::Media(ptr) = child {
                    stack.push(Frame {
                        ptr: *ptr,
                        start: frame.start + slot * below,
                        width: below,
                        ..*frame
                    });
                }
            }
        }
        Body::Objects(roots) => {
            for (slot, root) in (0_u64..).zip(roots.iter()) {
                if let Some(root) = root
                    && let Child::Media(ptr) = root.child
                {
                    stack.push(Frame {
                        ptr,
                        kind: root.kind,
                        object: Some(frame.start * FANOUT as u64 + slot),
                        start: 0,
                        width: width(ptr.level),
                    });
                }
            }
        }
        Body::Map(_) | Body::Bits(_) | Body::Sums(_) | Body::Table(_) => {}
    }
    let mut index = begin;
    while index < stack.len() {
        if stack[index].is_before(from) {
            stack.remove(index);
        } else {
            index += 1;
        }
    }
    stack[begin..].reverse();
}
