//! What the file system has promised: names, chains, sizes, attributes, and for each file what each of its sectors may hold.
//!
//! A change of the name space is *pending* from the moment it begins until it is acknowledged. After a crash each pending change is
//! there wholly or not at all ([`Model::outcomes`]); what is found decides which. Content is kept per file in a
//! [`Content`], which knows what a crash may leave of writes.

use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::Durability;
use block_io::sim::{Failure, Ticket, fingerprint};

use crate::content::Content;

/// Number of a file in the model.
pub(crate) type Node = usize;

/// A file or directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    /// None when it was deleted and others need it.
    pub(crate) path: Option<String>,
    pub(crate) directory: bool,
    pub(crate) size: u64,
    pub(crate) frozen: bool,
    pub(crate) absorbed: bool,
    pub(crate) exempt: bool,
    /// All bytes of it are this; 0: it has none.
    pub(crate) identity: u8,
    pub(crate) parent: Option<Node>,
}

/// A change of the name space.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Change {
    Create {
        path: String,
        size: u64,
        directory: bool,
    },
    Delete {
        path: String,
    },
    Rename {
        from: String,
        to: String,
    },
    /// Files and the layers that are put on them.
    Snapshot(Vec<(String, String)>),
    Clone {
        frozen: String,
        path: String,
    },
    Resize {
        path: String,
        size: u64,
    },
    Exempt {
        path: String,
    },
    Identify {
        path: String,
        identity: u8,
    },
    Freeze {
        path: String,
        frozen: bool,
    },
    /// A layer begins to take over its parent.
    Absorb {
        layer: String,
    },
    /// The parent is gone.
    Absorbed {
        layer: String,
        named: bool,
    },
}

/// Content of files that are being frozen: what the frozen file may have, while the open handle goes on.
#[derive(Debug, Clone, Default)]
struct Freezing {
    nodes: BTreeMap<Node, Content>,
    flushes: BTreeMap<Node, Ticket>,
}

/// All that was promised.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    /// Shared between copies until it changes.
    pub(crate) tree: Rc<BTreeMap<Node, Entry>>,
    pub(crate) contents: BTreeMap<Node, Content>,
    pending: Vec<(u64, Change)>,
    freezing: BTreeMap<u64, Freezing>,
    next: Node,
    next_change: u64,
    /// Makes every write's content its own.
    pub(crate) stamp: u64,
    /// Somebody goes on when the process is killed, and waits for [`block_io::BlockDevice::settle`].
    pub(crate) outlives: bool,
    /// It is looked at after a kill, with a tail of the journal; else after a power cut.
    pub(crate) killed: bool,
    /// As the file system said it last; none after a power cut.
    continuity: Option<u64>,
    /// Of a script, so many. Not for recoveries.
    pub(crate) operations_begun: usize,
}

impl Model {
    fn tree_mut(&mut self) -> &mut BTreeMap<Node, Entry> {
        Rc::make_mut(&mut self.tree)
    }

    pub(crate) fn find(&self, path: &str) -> Option<Node> {
        let mut found = self.tree.iter();
        found
            .find(|(_, entry)| entry.path.as_deref() == Some(path))
            .map(|(node, _)| *node)
    }

    pub(crate) fn entry(&self, path: &str) -> Option<&Entry> {
        self.tree.get(&self.find(path)?)
    }

    /// The nearest ancestor that has a name.
    pub(crate) fn named_parent(&self, node: Node) -> Option<Node> {
        let mut at = self.tree.get(&node)?.parent;
        while let Some(parent) = at {
            let entry = self.tree.get(&parent)?;
            if entry.path.is_some() {
                return Some(parent);
            }
            at = entry.parent;
        }
        None
    }

    fn children(&self, node: Node) -> usize {
        self.tree
            .values()
            .filter(|entry| entry.parent == Some(node))
            .count()
    }

    /// A change begins. Returns its number, for [`Self::acknowledged`].
    pub(crate) fn begins(&mut self, change: Change) -> u64 {
        let number = self.next_change;
        self.next_change += 1;
        if let Change::Snapshot(pairs) = &change {
            let mut freezing = Freezing::default();
            let nodes: Vec<Node> = pairs.iter().filter_map(|(path, _)| self.find(path)).collect();
            for node in nodes {
                if let Some(content) = self.contents.get_mut(&node) {
                    // What has been written before is durable when the snapshot is.
                    freezing.flushes.insert(node, content.flush_begins());
                    freezing.nodes.insert(node, content.clone());
                }
            }
            self.freezing.insert(number, freezing);
        }
        self.pending.push((number, change));
        number
    }

    /// The change was acknowledged: it is there from now on.
    pub(crate) fn acknowledged(&mut self, number: u64) {
        let Some(at) = self.pending.iter().position(|(pending, _)| *pending == number) else {
            return;
        };
        let (_, change) = self.pending.remove(at);
        self.apply(number, &change, true);
    }

    /// The change was refused: it never was.
    pub(crate) fn refused(&mut self, number: u64) {
        self.pending.retain(|(pending, _)| *pending != number);
        self.freezing.remove(&number);
    }

    /// Makes a change, if it can be made.
    fn apply(&mut self, number: u64, change: &Change, acknowledged: bool) -> bool {
        match change {
            Change::Create {
                path,
                size,
                directory,
            } => {
                if self.find(path).is_some() {
                    return false;
                }
                let entry = Entry {
                    path: Some(path.clone()),
                    directory: *directory,
                    size: *size,
                    frozen: false,
                    absorbed: false,
                    exempt: false,
                    identity: 0,
                    parent: None,
                };
                let node = self.add(entry);
                if !directory {
                    self.contents.insert(node, Content::default());
                }
            }
            Change::Delete { path } => {
                let Some(node) = self.find(path) else { return false };
                self.unlink(node);
            }
            Change::Rename { from, to } => {
                let Some(node) = self.find(from) else { return false };
                if let Some(entry) = self.tree_mut().get_mut(&node) {
                    entry.path = Some(to.clone());
                }
                let below = format!("{from}/");
                for entry in self.tree_mut().values_mut() {
                    if let Some(rest) = entry.path.as_deref().and_then(|path| path.strip_prefix(&below)) {
                        entry.path = Some(format!("{to}/{rest}"));
                    }
                }
            }
            Change::Snapshot(pairs) => {
                let mut freezing = self.freezing.remove(&number).unwrap_or_default();
                for (path, layer) in pairs {
                    let Some(node) = self.find(path) else { return false };
                    let new = self.put_layer(node, layer);
                    if let (Some(mut live), Some(mut frozen)) =
                        (self.contents.get(&node).cloned(), freezing.nodes.remove(&node))
                    {
                        let ticket = freezing.flushes.get(&node);
                        if let (true, Some(ticket)) = (acknowledged, ticket) {
                            live.flushed(*ticket);
                            frozen.flushed(*ticket);
                        }
                        self.contents.insert(node, frozen);
                        self.contents.insert(new, live);
                    }
                }
            }
            Change::Clone { frozen, path } => {
                let Some(node) = self.find(frozen) else {
                    return false;
                };
                let new = self.put_layer(node, path);
                if let Some(content) = self.contents.get(&node).cloned() {
                    self.contents.insert(new, content);
                }
            }
            Change::Resize { path, size } => {
                let Some(node) = self.find(path) else { return false };
                let old = self.tree.get(&node).map_or(0, |entry| entry.size);
                if let (Some(content), true) = (self.contents.get_mut(&node), *size < old) {
                    content.settle(*size, &vec![0; usize::try_from(old - size).unwrap()]);
                }
                if let Some(entry) = self.tree_mut().get_mut(&node) {
                    entry.size = *size;
                }
            }
            Change::Exempt { path } => return self.with(path, |entry| entry.exempt = true),
            Change::Identify { path, identity } => {
                return self.with(path, |entry| entry.identity = *identity);
            }
            Change::Freeze { path, frozen } => return self.with(path, |entry| entry.frozen = *frozen),
            Change::Absorb { layer } => {
                let parent = self.find(layer).and_then(|node| self.tree.get(&node)?.parent);
                let Some(parent) = parent else { return false };
                if let Some(entry) = self.tree_mut().get_mut(&parent) {
                    entry.absorbed = true;
                }
            }
            Change::Absorbed { layer, named } => return self.absorb(layer, *named),
        }
        true
    }

    fn with(&mut self, path: &str, change: impl FnOnce(&mut Entry)) -> bool {
        let Some(node) = self.find(path) else { return false };
        self.tree_mut().get_mut(&node).map(change).is_some()
    }

    fn add(&mut self, entry: Entry) -> Node {
        let node = self.next;
        self.next += 1;
        self.tree_mut().insert(node, entry);
        node
    }

    fn put_layer(&mut self, node: Node, path: &str) -> Node {
        let (size, exempt) = self
            .tree_mut()
            .get_mut(&node)
            .map(|entry| {
                entry.frozen = true;
                (entry.size, entry.exempt)
            })
            .unwrap_or_default();
        self.add(Entry {
            path: Some(path.to_owned()),
            directory: false,
            size,
            frozen: false,
            absorbed: false,
            exempt,
            identity: 0,
            parent: Some(node),
        })
    }

    fn unlink(&mut self, node: Node) {
        let mut at = Some(node);
        if let Some(entry) = self.tree_mut().get_mut(&node) {
            entry.path = None;
        }
        // Those without name and children go; one more parent may wait for that.
        while let Some(node) = at {
            let waits = self.tree.get(&node).is_some_and(|entry| entry.path.is_none());
            if !waits || self.children(node) > 0 {
                return;
            }
            at = self.tree_mut().remove(&node).and_then(|entry| entry.parent);
            self.contents.remove(&node);
        }
    }

    fn absorb(&mut self, layer: &str, named: bool) -> bool {
        let Some(node) = self.find(layer) else {
            return false;
        };
        let Some(parent) = self.tree.get(&node).and_then(|entry| entry.parent) else {
            return false;
        };
        let Some(gone) = self.tree_mut().remove(&parent) else {
            return false;
        };
        self.contents.remove(&parent);
        if let Some(entry) = self.tree_mut().get_mut(&node) {
            entry.parent = gone.parent;
            if let (true, Some(path)) = (named, gone.path) {
                entry.path = Some(path);
                if gone.identity != 0 {
                    entry.identity = gone.identity;
                }
            }
        }
        true
    }

    /// The file system is open, and says this of itself: after kills, always the same.
    pub(crate) fn goes_on(&mut self, continuity: u64) -> Result<(), Failure> {
        let before = self.continuity.replace(continuity).unwrap_or(continuity);
        if before == continuity {
            return Ok(());
        }
        Err("something is said to be missing after a kill".into())
    }

    /// The process has ended, by a kill or because the power was cut. What a power cut took is in doubt from then on, whatever comes after it.
    pub(crate) fn ends(&mut self, killed: bool) {
        self.killed = killed;
        if !killed {
            self.continuity = None;
            let freezing = self
                .freezing
                .values_mut()
                .flat_map(|freezing| freezing.nodes.values_mut());
            for content in self.contents.values_mut().chain(freezing) {
                *content = content.after_a_crash();
            }
        }
    }

    /// What a crash may have left of the name space: each model is one possibility, the likeliest first.
    pub(crate) fn outcomes(&self) -> Vec<Self> {
        let mut outcomes = vec![Self {
            pending: Vec::new(),
            ..self.clone()
        }];
        // What absorbs its parent does so with the nearest one that is left.
        let absorbs = |(_, change): &(u64, Change)| matches!(change, Change::Absorb { .. });
        let collapsed = self.pending.iter().any(absorbs).then(|| {
            let mut collapsed = self.clone();
            collapsed.collapse().then_some(collapsed)
        });
        // Each one may be there or not, in any order; there are never many.
        for subset in permutations(self.pending.len()) {
            for start in std::iter::once(self).chain(collapsed.iter().flatten()) {
                let mut model = Self {
                    pending: Vec::new(),
                    ..start.clone()
                };
                let fits = subset.iter().all(|index| {
                    let (number, change) = &self.pending[*index];
                    model.apply(*number, change, false)
                });
                if fits {
                    outcomes.push(model);
                }
            }
        }
        for outcome in &mut outcomes {
            outcome.freezing.clear();
            for content in outcome.contents.values_mut() {
                *content = match self.killed {
                    true => content.after_a_kill(),
                    false => content.after_a_crash(),
                };
            }
        }
        outcomes
    }

    /// Files without names have gone into the only child that they have left, which happens at some moment in the background.
    /// Says whether there were any.
    pub(crate) fn collapse(&mut self) -> bool {
        let mut any = false;
        loop {
            let nameless = self.tree.iter().filter(|(_, entry)| entry.path.is_none());
            let next = nameless
                .map(|(node, entry)| (*node, entry.parent))
                .find(|(node, _)| self.children(*node) == 1);
            let Some((gone, parent)) = next else { return any };
            for entry in self.tree_mut().values_mut() {
                if entry.parent == Some(gone) {
                    entry.parent = parent;
                }
            }
            self.tree_mut().remove(&gone);
            self.contents.remove(&gone);
            any = true;
        }
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.pending.is_empty()
    }

    /// A write through a handle that writes to `node` begins.
    pub(crate) fn write_begins(
        &mut self,
        node: Node,
        offset: u64,
        bytes: &[u8],
        how: Durability,
    ) -> Option<Ticket> {
        for freezing in self.freezing.values_mut() {
            if let Some(content) = freezing.nodes.get_mut(&node) {
                // It may or may not be part of what is frozen.
                content.write_begins(offset, bytes, Durability::Volatile);
            }
        }
        Some(self.contents.get_mut(&node)?.write_begins(offset, bytes, how))
    }

    /// A discard or zeroing of whole sub-clusters begins; both read as zeroes afterwards.
    pub(crate) fn clear_begins(&mut self, node: Node, offset: u64, length: u64) -> Option<Ticket> {
        for freezing in self.freezing.values_mut() {
            if let Some(content) = freezing.nodes.get_mut(&node) {
                content.zeroes_begin(offset, length);
            }
        }
        Some(self.contents.get_mut(&node)?.zeroes_begin(offset, length))
    }

    /// A write, zeroing or discard that was begun on a handle, which writes to `node` now, has ended.
    pub(crate) fn ended(&mut self, node: Node, ticket: Option<Ticket>, well: bool) {
        if let (Some(content), Some(ticket)) = (self.contents.get_mut(&node), ticket) {
            if well {
                content.succeeded(ticket);
            } else {
                content.failed(ticket);
            }
        }
    }

    /// All of it that a recovery can notice.
    pub(crate) fn fingerprint(&self) -> u64 {
        self.fingerprint_with(Content::fingerprint)
    }

    /// The same after a kill.
    pub(crate) fn killed_fingerprint(&self) -> u64 {
        self.fingerprint_with(Content::killed_fingerprint)
    }

    fn fingerprint_with(&self, of: impl Fn(&Content) -> u64) -> u64 {
        let contents: Vec<_> = self
            .contents
            .iter()
            .map(|(node, content)| (*node, of(content)))
            .collect();
        let freezing: Vec<_> = self
            .freezing
            .iter()
            .flat_map(|(number, freezing)| {
                freezing
                    .nodes
                    .iter()
                    .map(move |(node, content)| (*number, *node, content))
            })
            .map(|(number, node, content)| (number, node, of(content)))
            .collect();
        fingerprint(&(&*self.tree, &self.pending, contents, freezing))
    }
}

/// All ordered choices of at least one of `count` things; of more than four, only those in order.
fn permutations(count: usize) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = Vec::new();
    let mut last: Vec<Vec<usize>> = vec![Vec::new()];
    for _ in 0..count {
        let longer: Vec<Vec<usize>> = last
            .iter()
            .flat_map(|some| (0..count).map(move |next| (some, next)))
            .filter(|(some, next)| {
                !some.contains(next) && (count <= 4 || some.last().is_none_or(|last| last < next))
            })
            .map(|(some, next)| some.iter().copied().chain([next]).collect())
            .collect();
        all.extend(longer.iter().cloned());
        last = longer;
    }
    all
}
