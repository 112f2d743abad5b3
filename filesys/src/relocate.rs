//! Data move to where they shall be, while files are in use.
//!
//! # The life of a move
//! One page of a map at a time: writers of that page wait; what lies on a wrong volume, or out of order, is copied to new places; when
//! the copies are durable, records put the new places into the map, and the old ones are freed once nobody reads them. Readers are not
//! held up. A crash costs the page that was under way: what is left to do follows from the map each time.

use std::ops::ControlFlow;
use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need};
use crate::entry::Entry;
use crate::error::{FsError, Refusal};
use crate::file::Places;
use crate::file_core::{FileCore, Pending};
use crate::inode::{Flags, Target};
use crate::open::FileSystem;
use crate::record::{LARGEST, MAP_BYTES, Record};
use crate::state::entries_of;
use crate::tree::node::FANOUT;
use crate::units::{CLUSTER, FileId, Location, SubMask};

const PAGE: u64 = FANOUT as u64;
/// Clusters that one request copies, at most.
const RUN: usize = 16;

/// What is to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relocation {
    /// What lies on volumes where the file's attributes do not want it, or that are being emptied.
    ToTarget,
    /// That, and what does not lie in order on its volume.
    Defragment,
}

/// How far a relocation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RelocationProgress {
    /// Bytes of the file up to which everything is in its place.
    pub position: u64,
    /// Bytes that were moved.
    pub moved: u64,
    /// Bytes that had to stay because there was no space for them elsewhere.
    pub stayed: u64,
}

/// One cluster that is moved.
#[derive(Debug, Clone, Copy)]
struct Move {
    index: u32,
    entry: Entry,
    from: Location,
    to: Location,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Moves the data of one file, itself without its ancestors, from byte `from` on. `progress` is told after every 16 MiB of the file,
    /// and may break it off; the position it was told last is where to go on.
    ///
    /// # Errors
    /// There is no such file, a pin holds it, or a volume failed.
    pub async fn relocate(
        &self,
        file: FileId,
        what: Relocation,
        from: u64,
        mut progress: impl FnMut(RelocationProgress) -> ControlFlow<()>,
    ) -> Result<RelocationProgress, FsError> {
        let core = self.core();
        let mut done = RelocationProgress::default();
        let mut page = from / (PAGE * CLUSTER);
        let mut looked = false;
        loop {
            let Some(file) = core.look(|state| Ok(state.find_file(file)?)).await? else {
                if looked {
                    block_io::cover!("filesys: a file was reaped or absorbed while it was relocated");
                    return Ok(done);
                }
                let path = file.to_string();
                return Err(FsError::NotFound { path });
            };
            looked = true;
            let next = core
                .look(|_| {
                    core.check_unpinned(&file.inode.borrow().name, &file)?;
                    match file.map() {
                        Some(map) => Ok(map.next(page * PAGE)?.map(|span| (span.start / PAGE).max(page))),
                        None => Ok(None),
                    }
                })
                .await?;
            let Some(next) = next else {
                done.position = file.inode.borrow().size;
                return Ok(done);
            };
            let pass = file.gate.alone(next, next).await;
            if file.inode.borrow().flags.has(Flags::DYING) {
                block_io::cover!("filesys: a file was deleted while it was relocated");
                return Ok(done);
            }
            core.relocate_page(&file, next * PAGE, what, &mut done).await?;
            drop(pass);
            page = next + 1;
            done.position = page * PAGE * CLUSTER;
            if progress(done).is_break() {
                return Ok(done);
            }
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    async fn relocate_page(
        &self,
        file: &Rc<FileCore>,
        first: u64,
        what: Relocation,
        done: &mut RelocationProgress,
    ) -> Result<(), FsError> {
        let entries = self
            .look(|_| match file.map() {
                Some(map) => Ok(entries_of(map, first)?),
                None => Ok([Entry::HOLE; FANOUT]),
            })
            .await?;
        let target = file.inode.borrow().attributes.target.clone();
        let wrong = self.wrong(&entries, &target, what);
        if wrong.is_empty() {
            return Ok(());
        }
        let _running = self.epochs.begin();
        let mut places = self.places(file);
        let moves = self
            .choose_new(file, &mut places, first, &entries, &wrong, done)
            .await?;
        if moves.is_empty() {
            return Ok(());
        }
        self.copy_moves(file, &moves).await?;
        // The copies are durable before the map shows them: the old places go, and with them what was durable.
        self.flush_written(file).await?;
        let records = map_records(file.id, &moves);
        // Only now: copying needs room of its own, and who has some must not wait for more.
        let ticket = self
            .admit(LARGEST.max(moves.len() * MAP_BYTES), Need::Ordinary)
            .await?;
        let (group, ()) = self
            .transact_admitted(&ticket, |_| Ok((records.clone(), ())))
            .await?;
        places.mapped();
        file.group.set(file.group.get().max(group));
        done.moved += moves.len() as u64 * CLUSTER;
        Ok(())
    }

    /// Which entries of a page are not where they shall be.
    fn wrong(&self, entries: &[Entry; FANOUT], target: &Target, what: Relocation) -> Vec<usize> {
        let in_order = what == Relocation::ToTarget || in_order(entries);
        let misplaced = |entry: &Entry| {
            let Some(at) = entry.location() else { return false };
            let Ok(volume) = self.state.volume(at.volume) else {
                return false;
            };
            !in_order || !self.wants(&volume, target)
        };
        let placed = entries.iter().enumerate().filter(|(_, entry)| misplaced(entry));
        placed.map(|(index, _)| index).collect()
    }

    /// Reserves new places. What finds none stays.
    async fn choose_new(
        &self,
        file: &FileCore,
        places: &mut Places<'_, V>,
        first: u64,
        entries: &[Entry; FANOUT],
        wrong: &[usize],
        done: &mut RelocationProgress,
    ) -> Result<Vec<Move>, FsError> {
        let mut moves: Vec<Move> = Vec::with_capacity(wrong.len());
        for index in wrong {
            let Some(entry) = entries.get(*index).copied() else {
                continue;
            };
            let Some(from) = entry.location() else { continue };
            let before = moves.last().map(|step| (step.to, u64::from(step.index)));
            let number = first + *index as u64;
            let chosen = self.look(|_| self.new_place(file, before, number)).await;
            let to = match chosen {
                Ok(to) => to,
                Err(FsError::NoSpace { .. }) => {
                    done.stayed += CLUSTER;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let cluster = u32::try_from(number).unwrap_or(u32::MAX);
            file.pending.borrow_mut().insert(
                cluster,
                Pending {
                    location: to,
                    writers: 1,
                    mapped: false,
                },
            );
            places.add(cluster);
            moves.push(Move {
                index: cluster,
                entry,
                from,
                to,
            });
        }
        Ok(moves)
    }

    /// A place beside the one that was chosen before, or in a free group, or anywhere.
    fn new_place(
        &self,
        file: &FileCore,
        before: Option<(Location, u64)>,
        number: u64,
    ) -> Result<Location, Refusal> {
        if let Some((at, last)) = before
            && let Ok(volume) = self.state.volume(at.volume)
        {
            let wanted = at.cluster + (number - last);
            if volume.take(wanted)? {
                return Ok(volume.location(wanted));
            }
        }
        self.choose_elsewhere(file, number)
    }

    async fn copy_moves(&self, file: &FileCore, moves: &[Move]) -> Result<(), FsError> {
        let mut rest = moves;
        while let Some(step) = rest.first() {
            let full = |step: &Move| step.entry.valid() == u16::MAX;
            let run = rest
                .iter()
                .take(RUN)
                .zip(0_u64..)
                .take_while(|(next, number)| {
                    full(next)
                        && next.entry.is_checked() == step.entry.is_checked()
                        && next.from == step.from.plus(*number)
                        && next.to == step.to.plus(*number)
                })
                .count();
            let cluster = step.index.into();
            if run > 1 {
                self.copy_clusters(file, cluster, step.entry, step.to, run as u64)
                    .await?;
            } else {
                let mask = SubMask(step.entry.valid());
                self.copy_subs(file, cluster, step.entry, step.to, mask).await?;
            }
            rest = &rest[run.max(1)..];
        }
        Ok(())
    }
}

/// Whether the places of a page are those of one run, as far as there are any.
fn in_order(entries: &[Entry; FANOUT]) -> bool {
    let mut bases = (0_u64..).zip(entries).filter_map(|(index, entry)| {
        let at = entry.location()?;
        Some((at.volume, at.cluster.checked_sub(index)))
    });
    let Some(first) = bases.next() else { return true };
    first.1.is_some() && bases.all(|base| base == first)
}

fn map_records(file: FileId, moves: &[Move]) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    for step in moves {
        let new = step.entry.moved(step.to);
        Record::push_map(&mut records, file, step.index, new, true);
    }
    records
}
