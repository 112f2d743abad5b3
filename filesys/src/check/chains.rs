//! Parents and children.

use std::collections::BTreeMap;

use block_io::{BlockDevice, Clock};

use super::mend::{Edit, Links, Mend};
use super::report::Severity;
use super::{Check, file};
use crate::inode::{Flags, Kind};
use crate::units::FileId;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Check<'_, V, C> {
    /// Parents are frozen files and know their children, and nobody is among its own parents.
    pub(super) fn chains(&mut self) {
        let children = self.parents();
        self.lists(&children);
        self.circles();
        self.states();
    }

    /// Each file's parent. Gives for each inode how many have it as parent.
    fn parents(&mut self) -> Vec<u32> {
        let mut children = vec![0_u32; self.inodes.list.len()];
        let mut frozen: Vec<u64> = Vec::new();
        for brief in &self.inodes.list {
            let object = file(brief.id);
            let Some(parent) = brief.parent else {
                if brief.next.is_some() || brief.previous.is_some() {
                    let edit = Mend::Edit(FileId(brief.id), Edit::Siblings(None, None));
                    let problem = "has siblings and no parent";
                    self.findings.mendable(Severity::Minor, object, problem, [edit]);
                }
                continue;
            };
            if brief.kind == Kind::Directory {
                let problem = format!("is a directory, and has {parent} as parent");
                self.findings.add(Severity::Major, object, problem);
                continue;
            }
            let found = self.inodes.index(parent.0);
            let known = found.and_then(|index| self.inodes.list.get(index));
            match (found, known) {
                (Some(index), Some(known)) if known.kind == Kind::File => {
                    children[index] += 1;
                    if !known.flags.has(Flags::FROZEN) {
                        frozen.push(known.id);
                    }
                }
                (Some(_), _) => {
                    let problem = format!("has {parent} as parent, which is a directory");
                    self.findings.add(Severity::Loss, object, problem);
                }
                (None, _) => {
                    let problem = format!(
                        "has {parent} as parent, which {}: what only that had reads as an error",
                        if self.inodes.broken {
                            "could not be read"
                        } else {
                            "does not exist"
                        }
                    );
                    self.findings.add(Severity::Loss, object, problem);
                }
            }
        }
        frozen.dedup();
        frozen.sort_unstable();
        frozen.dedup();
        for id in frozen {
            let problem = "is the parent of others, and is not frozen, so their content could change";
            let edit = Mend::Edit(FileId(id), Edit::Flags(Flags::FROZEN, true));
            self.findings.mendable(Severity::Major, file(id), problem, [edit]);
        }
        children
    }

    /// The lists of children are those who have the parent.
    fn lists(&mut self, children: &[u32]) {
        let mut broken: BTreeMap<u64, (String, Vec<u64>)> = BTreeMap::new();
        for (brief, expected) in self.inodes.list.iter().zip(children) {
            if let Err(problem) = self.list(brief.id, *expected) {
                broken.insert(brief.id, (problem, Vec::new()));
            }
        }
        if broken.is_empty() {
            return;
        }
        for brief in &self.inodes.list {
            if let Some(parent) = brief.parent
                && brief.kind == Kind::File
                && let Some((_, children)) = broken.get_mut(&parent.0)
            {
                children.push(brief.id);
            }
        }
        for (id, (problem, children)) in broken {
            if self.inodes.broken {
                self.findings.add(Severity::Major, file(id), problem);
                continue;
            }
            let count = u32::try_from(children.len()).unwrap_or(u32::MAX);
            let first = children.first().copied().map(FileId);
            let mut mends = vec![Mend::Edit(
                FileId(id),
                Edit::Children(Links {
                    first,
                    children: count,
                }),
            )];
            for (index, child) in children.iter().enumerate() {
                let at =
                    |index: Option<usize>| index.and_then(|index| children.get(index)).copied().map(FileId);
                let edit = Edit::Siblings(at(index.checked_add(1)), at(index.checked_sub(1)));
                mends.push(Mend::Edit(FileId(*child), edit));
            }
            self.findings.mendable(Severity::Major, file(id), problem, mends);
        }
    }

    /// Follows one list.
    fn list(&self, id: u64, expected: u32) -> Result<(), String> {
        let Some(brief) = self.inodes.get(id) else {
            return Ok(());
        };
        if brief.children != expected {
            return Err(format!(
                "counts {} children, and {expected} files have it as parent",
                brief.children
            ));
        }
        let mut at = brief.first_child;
        let mut before = None;
        for number in 0..expected {
            let Some(child) = at else {
                return Err(format!(
                    "has {expected} children, and its list of them ends after {number}"
                ));
            };
            let known = self
                .inodes
                .get(child.0)
                .filter(|known| known.parent == Some(FileId(id)));
            let Some(known) = known else {
                return Err(format!(
                    "has {child} in the list of its children, which is not its child"
                ));
            };
            if known.previous != before {
                return Err(format!(
                    "has a list of children in which {child} does not follow the one before it"
                ));
            }
            before = at;
            at = known.next;
        }
        match at {
            Some(_) => Err(format!(
                "has {expected} children, and its list of them goes on behind the last"
            )),
            None => Ok(()),
        }
    }

    /// Nobody is among its own parents.
    fn circles(&mut self) {
        // 0: not seen, 1: on the way, 2: done.
        let mut seen = vec![0_u8; self.inodes.list.len()];
        for start in 0..self.inodes.list.len() {
            let mut way = Vec::new();
            let mut next = Some(start);
            while let Some(at) = next {
                match seen[at] {
                    0 => {}
                    1 => {
                        let object = file(self.inodes.list[at].id);
                        self.findings
                            .add(Severity::Loss, object, "has itself among its parents");
                        break;
                    }
                    _ => break,
                }
                seen[at] = 1;
                way.push(at);
                next = self.inodes.list[at]
                    .parent
                    .and_then(|parent| self.inodes.index(parent.0));
            }
            for index in way {
                seen[index] = 2;
            }
        }
    }

    /// States that files cannot be in.
    fn states(&mut self) {
        for brief in &self.inodes.list {
            let flags = brief.flags;
            let (dying, unlinked) = (flags.has(Flags::DYING), flags.has(Flags::UNLINKED));
            let object = file(brief.id);
            let id = FileId(brief.id);
            if brief.kind == Kind::Directory && (dying || unlinked || flags.has(Flags::ABSORBED)) {
                let problem = "is a directory in a state that only files can have";
                let mends = [Flags::DYING, Flags::UNLINKED, Flags::ABSORBED, Flags::GIVES_NAME]
                    .map(|flag| Mend::Edit(id, Edit::Flags(flag, false)));
                self.findings.mendable(Severity::Major, object, problem, mends);
            } else if dying && brief.children > 0 {
                let problem = "is being deleted, and others have it as parent; it can wait for them";
                let mends = [
                    Mend::Edit(id, Edit::Flags(Flags::DYING, false)),
                    Mend::Edit(id, Edit::Flags(Flags::UNLINKED, true)),
                ];
                self.findings.mendable(Severity::Loss, object, problem, mends);
            } else if unlinked && !dying && brief.children == 0 {
                let problem = "waits for its children and has none; it can be put into /lost+found";
                self.findings
                    .mendable(Severity::Minor, object, problem, [Mend::Lost(id, false)]);
            } else if flags.has(Flags::ABSORBED) && brief.children != 1 {
                let problem = format!("is being absorbed, and has {} children", brief.children);
                let mends =
                    [Flags::ABSORBED, Flags::GIVES_NAME].map(|flag| Mend::Edit(id, Edit::Flags(flag, false)));
                self.findings.mendable(Severity::Major, object, problem, mends);
            } else if flags.has(Flags::GIVES_NAME) && !flags.has(Flags::ABSORBED) {
                let problem = "gives its name to the child that absorbs it, and is not being absorbed";
                let mend = Mend::Edit(id, Edit::Flags(Flags::GIVES_NAME, false));
                self.findings.mendable(Severity::Minor, object, problem, [mend]);
            }
        }
    }
}
