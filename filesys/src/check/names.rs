//! Directories: the names in them against the inodes, and whether all of them are reached from the root.

use block_io::{BlockDevice, Clock};

use super::inodes::Brief;
use super::mend::{Edit, Mend, NameMend};
use super::report::Severity;
use super::walk::Walker;
use super::{Check, file};
use crate::error::FsError;
use crate::inode::Kind;
use crate::state::{ROOT, read_name, write_name};
use crate::tree::node::Root;
use crate::tree::table::Item;
use crate::units::{FileId, MAX_NAME};

/// A name that is not where its inode says.
#[derive(Debug)]
pub(super) struct Stray {
    directory: u64,
    name: String,
    id: u64,
    item: Item,
}

/// What is seen of one directory.
#[derive(Debug, Default)]
pub(super) struct Listing {
    directory: u64,
    /// Names that stay.
    names: u64,
    /// Of the item before.
    last: Option<(u64, String)>,
}

/// Names of all directories.
#[derive(Debug, Default)]
pub(super) struct Names {
    listing: Listing,
    strays: Vec<Stray>,
    /// Names that each directory has in the end, and those that were counted.
    sizes: Vec<(u64, u64)>,
    /// Not all names could be read.
    broken: bool,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Check<'_, V, C> {
    pub(super) async fn directory(&mut self, id: u64, root: &Root) -> Result<(), FsError> {
        let mut walker = Walker::new(root, format!("the directory {}", FileId(id)));
        self.names.listing = Listing {
            directory: id,
            ..Listing::default()
        };
        let mut whole = true;
        while let Some(piece) = self.next(&mut walker).await? {
            whole &= self.items(&walker.name, &piece, &Self::name);
        }
        if whole && !walker.broken {
            self.names.sizes.push((id, self.names.listing.names));
        } else {
            self.names.broken = true;
        }
        Ok(())
    }

    fn name(&mut self, item: &Item) {
        let directory = self.names.listing.directory;
        let object = format!("the directory {}", FileId(directory));
        self.progress.names += 1;
        let parsed = read_name(&item.data).map(|(id, name)| (id, name.to_owned()));
        let remove = || {
            Mend::Name(NameMend {
                directory: FileId(directory),
                key: item.key,
                data: item.data.to_vec(),
                present: false,
            })
        };
        let Ok((id, name)) = parsed else {
            self.findings
                .mendable(Severity::Major, object, "has an item that is no name", [remove()]);
            return;
        };
        let bad = name.is_empty()
            || name.len() > MAX_NAME
            || name.contains(|character: char| character == '/' || character.is_control())
            || matches!(name.as_str(), "." | "..");
        if bad || self.core.state.name_key(&name) != item.key {
            let why = if bad {
                "which cannot be one"
            } else {
                "under a hash that it does not have, so it is not found"
            };
            let problem = format!("has the name {name:?} of {id}, {why}");
            self.findings
                .mendable(Severity::Major, object, problem, [remove()]);
            return;
        }
        let double = (item.key, name.clone());
        if self.names.listing.last.as_ref() == Some(&double) {
            let problem = format!("has the name {name:?} twice; the second is that of {id}");
            self.findings
                .mendable(Severity::Major, object, problem, [remove()]);
            return;
        }
        self.names.listing.last = Some(double);
        let inodes_broken = self.inodes.broken;
        let Some(brief) = self.inodes.get_mut(id.0) else {
            if inodes_broken {
                self.names.listing.names += 1;
                return;
            }
            let problem = format!("has the name {name:?} of {id}, and there is no such inode");
            self.findings
                .mendable(Severity::Major, object, problem, [remove()]);
            return;
        };
        let kind = brief.kind;
        if brief.is_linked() && !brief.named && brief.directory == directory && brief.key == item.key {
            brief.named = true;
            self.names.listing.names += 1;
        } else {
            self.names.strays.push(Stray {
                directory,
                name: name.clone(),
                id: id.0,
                item: item.clone(),
            });
        }
        let right = write_name(id, kind, &name);
        if item.data.get(8) != right.get(8) {
            let add = Mend::Name(NameMend {
                directory: FileId(directory),
                key: item.key,
                data: right,
                present: true,
            });
            let what = match kind {
                Kind::File => "a file",
                Kind::Directory => "a directory",
            };
            self.findings.mendable(
                Severity::Major,
                object,
                format!("has {name:?} as something else than {what}, which it is"),
                [remove(), add],
            );
        }
    }

    /// Every inode has just one name; directories know how many there are, and hang together.
    pub(super) fn names(&mut self) {
        self.strays();
        self.unnamed();
        self.sizes();
        self.reached();
        self.orphans();
    }

    fn strays(&mut self) {
        for stray in std::mem::take(&mut self.names.strays) {
            let Stray {
                directory,
                name,
                id,
                item,
            } = stray;
            let object = file(id);
            let Some(brief) = self.inodes.get_mut(id) else {
                continue;
            };
            let place = format!("has the name {name:?} in the directory {}", FileId(directory));
            if !brief.is_linked() {
                let problem = format!("{place}, and is being made or deleted, or waits for its children");
                self.findings.add(Severity::Major, object, problem);
                self.count_name(directory);
                continue;
            }
            if brief.named || id == ROOT.0 {
                let problem = format!("{place} and another one elsewhere");
                let mend = Mend::Name(NameMend {
                    directory: FileId(directory),
                    key: item.key,
                    data: item.data.to_vec(),
                    present: false,
                });
                self.findings.mendable(Severity::Major, object, problem, [mend]);
                continue;
            }
            brief.named = true;
            brief.directory = directory;
            let problem = format!("{place}, and says that it is elsewhere or has another name");
            let edit = Edit::Place(FileId(directory), name);
            self.findings
                .mendable(Severity::Major, object, problem, [Mend::Edit(FileId(id), edit)]);
            self.count_name(directory);
        }
    }

    fn count_name(&mut self, directory: u64) {
        let size = self.names.sizes.iter_mut().find(|(id, _)| *id == directory);
        if let Some((_, names)) = size {
            *names += 1;
        }
    }

    fn unnamed(&mut self) {
        for brief in &self.inodes.list {
            let lost = brief.is_linked() && !brief.named && brief.id != ROOT.0;
            if !lost {
                continue;
            }
            let problem = format!(
                "has no name: it is not in the directory {}",
                FileId(brief.directory)
            );
            if self.names.broken {
                self.findings.add(
                    Severity::Loss,
                    file(brief.id),
                    format!("{problem}, of which not all could be read"),
                );
            } else {
                let problem = format!("{problem}; it can be put into /lost+found");
                let mend = Mend::Lost(FileId(brief.id), false);
                self.findings
                    .mendable(Severity::Major, file(brief.id), problem, [mend]);
            }
        }
    }

    fn sizes(&mut self) {
        for (id, names) in std::mem::take(&mut self.names.sizes) {
            let size = self.inodes.get(id).map_or(names, |brief| brief.size);
            if size != names {
                self.findings.mendable(
                    Severity::Minor,
                    format!("the directory {}", FileId(id)),
                    format!("counts {size} names, and there are {names}"),
                    [Mend::Edit(FileId(id), Edit::Size(names))],
                );
            }
        }
    }

    /// From every directory the way up ends at the root.
    fn reached(&mut self) {
        #[derive(Clone, Copy, PartialEq, Eq)]
        enum Seen {
            No,
            OnTheWay,
            Reached,
            Told,
        }
        let mut seen = vec![Seen::No; self.inodes.list.len()];
        for start in 0..self.inodes.list.len() {
            if self.inodes.list[start].kind != Kind::Directory {
                continue;
            }
            let mut way: Vec<usize> = Vec::new();
            let mut at = start;
            let end = loop {
                match seen[at] {
                    Seen::OnTheWay => {
                        self.cut_circle(at);
                        break Seen::Told;
                    }
                    Seen::Reached => break Seen::Reached,
                    Seen::Told => break Seen::Told,
                    Seen::No => {}
                }
                seen[at] = Seen::OnTheWay;
                way.push(at);
                let brief: &Brief = &self.inodes.list[at];
                if brief.id == ROOT.0 {
                    break Seen::Reached;
                }
                // A directory without a name was told of already.
                let above = brief.named.then(|| self.inodes.index(brief.directory)).flatten();
                let Some(above) = above else { break Seen::Told };
                at = above;
            };
            for index in way {
                seen[index] = end;
            }
        }
    }

    fn cut_circle(&mut self, index: usize) {
        let Some(brief) = self.inodes.list.get(index) else {
            return;
        };
        let id = FileId(brief.id);
        self.findings.mendable(
            Severity::Major,
            format!("the directory {id}"),
            "lies, with others, within itself, so it is not reached from /; it can be put into /lost+found",
            [Mend::Lost(id, true)],
        );
    }
}
