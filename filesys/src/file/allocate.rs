//! Which cluster a write gets.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::{BlockDevice, Clock};
use smallvec::SmallVec;

use crate::core::Core;
use crate::error::{FsError, Refusal};
use crate::event::Event;
use crate::file_core::{FileCore, Pending};
use crate::inode::Target;
use crate::tree::node::{Body, FANOUT};
use crate::tree::radix::View;
use crate::units::{CLUSTER, Location, VolumeIndex};
use crate::volume::VolumeCore;

const PAGE: u64 = FANOUT as u64;

/// Clusters that a write has reserved, or uses together with others that have. Given back when it is dropped, unless the map has them.
pub(crate) struct Places<'a, V> {
    file: &'a FileCore,
    volumes: &'a RefCell<BTreeMap<VolumeIndex, Rc<VolumeCore<V>>>>,
    clusters: SmallVec<[u32; 4]>,
}

impl<V> Places<'_, V> {
    /// A cluster is reserved as well.
    pub(crate) fn add(&mut self, cluster: u32) {
        self.clusters.push(cluster);
    }

    /// The map has the places now.
    pub(crate) fn mapped(&self) {
        let mut pending = self.file.pending.borrow_mut();
        for cluster in &self.clusters {
            if let Some(place) = pending.get_mut(cluster) {
                place.mapped = true;
            }
        }
    }
}

impl<V> Drop for Places<'_, V> {
    fn drop(&mut self) {
        let mut pending = self.file.pending.borrow_mut();
        for cluster in &self.clusters {
            let Some(place) = pending.get_mut(cluster) else {
                continue;
            };
            place.writers -= 1;
            if place.writers > 0 {
                continue;
            }
            if !place.mapped
                && let Some(volume) = self.volumes.borrow().get(&place.location.volume)
            {
                volume.release(place.location.cluster);
            }
            pending.remove(cluster);
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    pub(crate) fn places<'a>(&'a self, file: &'a FileCore) -> Places<'a, V> {
        Places {
            file,
            volumes: &self.state.volumes,
            clusters: SmallVec::new(),
        }
    }

    /// Where a cluster of a file is, or will be: reserves a place for it if need be.
    pub(crate) fn place(
        &self,
        file: &FileCore,
        places: &mut Places<'_, V>,
        cluster: u32,
        careful: bool,
    ) -> Result<Location, Refusal> {
        let Some(map) = file.map() else {
            return Err(FsError::IsDirectory {
                path: file.inode.borrow().name.clone(),
            }
            .into());
        };
        if let Some(at) = map.entry(cluster.into())?.location() {
            return Ok(at);
        }
        if let Some(pending) = file.pending.borrow_mut().get_mut(&cluster) {
            pending.writers += 1;
            places.clusters.push(cluster);
            return Ok(pending.location);
        }
        self.release_freed();
        let location = self.choose(file, cluster.into(), careful)?;
        file.pending.borrow_mut().insert(
            cluster,
            Pending {
                location,
                writers: 1,
                mapped: false,
            },
        );
        places.clusters.push(cluster);
        Ok(location)
    }

    /// Reserves a place for a cluster.
    pub(crate) fn choose(&self, file: &FileCore, cluster: u64, careful: bool) -> Result<Location, Refusal> {
        let index = cluster % PAGE;
        let (home, target) = {
            let inode = file.inode.borrow();
            (inode.home, inode.attributes.target.clone())
        };
        // Where the rest of the page is.
        if let Some((volume, base)) = self.base_of_page(file, cluster - index)?
            && let Ok(volume) = self.state.volume(volume)
            && self.may_use(&volume, &target, careful)
            && volume.take(base + index)?
        {
            return Ok(volume.location(base + index));
        }
        self.choose_on(home, &target, index, careful)
    }

    /// Reserves a place for a cluster away from what its page has.
    pub(crate) fn choose_elsewhere(&self, file: &FileCore, cluster: u64) -> Result<Location, Refusal> {
        let (home, target) = {
            let inode = file.inode.borrow();
            (inode.home, inode.attributes.target.clone())
        };
        self.choose_on(home, &target, cluster % PAGE, false)
    }

    fn choose_on(
        &self,
        home: VolumeIndex,
        target: &Target,
        index: u64,
        careful: bool,
    ) -> Result<Location, Refusal> {
        for volume in self.candidates(home, target, careful) {
            if let Some(group) = volume.find_group()?
                && volume.take(group + index)?
            {
                self.watch_space(&volume);
                return Ok(volume.location(group + index));
            }
            if let Some(cluster) = volume.take_any()? {
                self.watch_space(&volume);
                return Ok(volume.location(cluster));
            }
        }
        Err(self.no_space(home, target).into())
    }

    /// Volume and place of cluster 0 of a page of the map, if the page lies in order.
    fn base_of_page(&self, file: &FileCore, first: u64) -> Result<Option<(VolumeIndex, u64)>, Refusal> {
        let base = |index: usize, at: Location| {
            let base = at.cluster.checked_sub(index as u64)?;
            Some((at.volume, base))
        };
        if let Some(map) = file.map() {
            let found = map.view(first, |view| match view {
                View::Run(entry) => entry.location().and_then(|at| base(0, at)),
                View::Leaf(Body::Map(entries)) => entries
                    .first_placed()
                    .and_then(|(index, entry)| base(index, entry.location()?)),
                View::Empty | View::Leaf(_) => None,
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        let (first, last) = (
            u32::try_from(first).unwrap_or(u32::MAX),
            u32::try_from(first + PAGE - 1).unwrap_or(u32::MAX),
        );
        let pending = file.pending.borrow();
        let found = pending.range(first..=last).next();
        Ok(found
            .and_then(|(cluster, place)| base(usize::try_from(cluster - first).unwrap_or(0), place.location)))
    }

    /// Whether a volume is one where a file's data shall be.
    pub(crate) fn wants(&self, volume: &VolumeCore<V>, target: &Target) -> bool {
        let fits = match target {
            Target::Any => true,
            Target::Volume(index) => volume.index == *index,
            Target::Class(class) => volume.record().class == *class,
        };
        fits && !volume.is_draining()
    }

    fn may_use(&self, volume: &VolumeCore<V>, target: &Target, careful: bool) -> bool {
        // The last twentieth is for those who would fail without.
        let reserve = if careful { volume.clusters() / 20 } else { 0 };
        self.wants(volume, target) && !volume.failed.get() && volume.available() > reserve
    }

    /// Volumes that a file may use: its home first, then those with the most space.
    fn candidates(&self, home: VolumeIndex, target: &Target, careful: bool) -> Vec<Rc<VolumeCore<V>>> {
        let volumes = self.state.volumes.borrow();
        if let Some(home) = volumes.get(&home)
            && self.may_use(home, target, careful)
        {
            return vec![Rc::clone(home)];
        }
        let mut usable: Vec<_> = volumes
            .values()
            .filter(|volume| self.may_use(volume, target, careful))
            .map(Rc::clone)
            .collect();
        usable.sort_by_key(|volume| (std::cmp::Reverse(volume.available()), volume.index));
        usable
    }

    /// The volume on which a new file begins: the one with the most space, full ones if there are no others.
    pub(crate) fn home_for(&self, target: &Target) -> Result<VolumeIndex, FsError> {
        let volumes = self.state.volumes.borrow();
        let usable = volumes
            .values()
            .filter(|volume| self.wants(volume, target) && !volume.failed.get());
        let most = usable.max_by_key(|volume| (volume.available(), std::cmp::Reverse(volume.index)));
        most.map(|volume| volume.index)
            .ok_or_else(|| self.no_space(VolumeIndex(u16::MAX), target))
    }

    fn no_space(&self, home: VolumeIndex, target: &Target) -> FsError {
        let what = match target {
            Target::Any => "all volumes".to_owned(),
            Target::Volume(index) => self.state.volume(*index).map_or_else(
                |_| index.to_string(),
                |volume| format!("volume {}", volume.record().name),
            ),
            Target::Class(class) => format!("volumes of class {class}"),
        };
        tracing::debug!(%what, home = home.0, "no space");
        FsError::NoSpace {
            what,
            remedy: "grow a volume, add one, or delete files",
        }
    }

    /// Says when a volume gets low on space, and when it has some again.
    pub(crate) fn watch_space(&self, volume: &VolumeCore<V>) {
        let (free, clusters) = (volume.available(), volume.clusters());
        let low = free * 100 < clusters * 6;
        if low == volume.is_low.replace(low) {
            return;
        }
        let (volume, name) = (volume.index, volume.record().name);
        self.event(if low {
            tracing::warn!(
                volume = name,
                free = free * CLUSTER,
                "less than 6 % of a volume are free"
            );
            Event::LowSpace {
                volume,
                name,
                free: free * CLUSTER,
                size: clusters * CLUSTER,
            }
        } else {
            Event::SpaceAgain { volume, name }
        });
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// As [`Core::place`], with what is missing loaded.
    pub(crate) async fn place_loaded(
        &self,
        file: &FileCore,
        places: &mut Places<'_, V>,
        cluster: u32,
        careful: bool,
    ) -> Result<Location, FsError> {
        let mut tried = false;
        loop {
            match self.place(file, places, cluster, careful) {
                Ok(location) => return Ok(location),
                Err(Refusal::Error(FsError::NoSpace { .. })) if !tried && self.has_freed() => {
                    // What was freed can be used once the record that says so is durable.
                    block_io::cover!("filesys: an allocation waits for freed clusters");
                    tried = true;
                    self.commit(self.journal.open_group()).await?;
                }
                Err(refusal) => self.resolve(refusal).await?,
            }
        }
    }
}
