//! Disks that are open, their guests, and what is done with them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{Failure, Sim, SimClock};
use block_io::{BlockDevice, Clock, Durability, ZeroMode};
use filesys::{CheckOptions, FileSystem};
use storage_virtualizer::disk::{DiskError, DiskMode, DiskOptions, Disks, NewDisk, NewSnapshot, VirtualDisk};

use crate::harness::{BLOCK, failed, get, put, whole};
use crate::model::{Begun, Content, DISKS, Entry, Model, OWN, PLACES, WRITERS};
use crate::rig::SimVolume;

pub(crate) type Files = FileSystem<SimVolume, SimClock>;
type OpenDisk = Rc<VirtualDisk<SimVolume, SimClock>>;
pub(crate) type Promise = Rc<RefCell<Model>>;

/// Of the disks at first: more than is written.
pub(crate) const SIZE: u64 = PLACES * BLOCK + (64 << 10);

pub(crate) fn path(disk: usize) -> String {
    format!("/d{disk}.dsk")
}

/// By which initiators know a disk: the first one from its beginning, the others since they are used.
pub(crate) fn identity(disk: usize) -> [u8; 16] {
    [u8::try_from(disk).unwrap() + 1; 16]
}

/// All disks of an open file system.
pub(crate) struct Session {
    sim: Sim,
    files: Files,
    disks: Disks<SimVolume, SimClock>,
    promise: Promise,
    modes: [DiskMode; DISKS],
    open: RefCell<Vec<Option<OpenDisk>>>,
    guests: RefCell<Guests>,
    /// Merges that are under way.
    merging: Rc<Cell<usize>>,
    failure: Rc<RefCell<Option<Failure>>>,
}

#[derive(Default)]
struct Guests {
    stop: Rc<Cell<bool>>,
    running: Rc<Cell<usize>>,
}

impl Session {
    pub(crate) fn new(sim: &Sim, files: Files, promise: &Promise, modes: [DiskMode; DISKS]) -> Self {
        Self {
            sim: sim.clone(),
            disks: Disks::new(files.clone()),
            files,
            promise: Rc::clone(promise),
            modes,
            open: RefCell::new(vec![None; DISKS]),
            guests: RefCell::default(),
            merging: Rc::default(),
            failure: Rc::default(),
        }
    }

    pub(crate) async fn create(&self) -> Result<(), Failure> {
        for disk in 0..DISKS {
            let new = NewDisk {
                size: SIZE,
                attributes: None,
                identity: (disk == 0).then_some(identity(disk)),
                now: 1,
            };
            self.disks.create(&path(disk), &new).await.map_err(failed)?;
        }
        Ok(())
    }

    /// What a place of rest should have: what the model knows. After a crash that is found out.
    pub(crate) async fn recover(&self) -> Result<(), Failure> {
        Box::pin(self.settle_begun()).await?;
        let mut found = Vec::new();
        for disk in 0..DISKS {
            let content = self.read(&path(disk)).await?;
            self.promise.borrow().check_left(disk, &content)?;
            found.push(content);
        }
        self.promise.borrow_mut().begin(&found);
        Box::pin(self.check()).await
    }

    /// An operation that a crash has cut happened, or it did not.
    async fn settle_begun(&self) -> Result<(), Failure> {
        let Some(begun) = self.promise.borrow_mut().begun.take() else {
            return Ok(());
        };
        match begun {
            Begun::Snapshot { disks, name, from } => {
                let mut found = Vec::new();
                for disk in &disks {
                    if self.snapshots(*disk).await?.contains(&name) {
                        found.push((*disk, self.read(&format!("{}@{name}", path(*disk))).await?));
                    }
                }
                if !found.is_empty() && found.len() < disks.len() {
                    return Err(format!("a crash has left half of {name}: {found:?}")
                        .as_str()
                        .into());
                }
                block_io::cover!("disks: a crash in a snapshot");
                self.promise.borrow().check_moment(&found, &from)?;
                let mut model = self.promise.borrow_mut();
                for (disk, content) in found {
                    block_io::cover!("disks: a crash in a snapshot, which is there");
                    model.snapshots[disk].insert(name.clone(), content);
                }
            }
            Begun::Delete { disk, name } => {
                block_io::cover!("disks: a crash in a deletion");
                if !self.snapshots(disk).await?.contains(&name) {
                    self.promise.borrow_mut().snapshots[disk].remove(&name);
                }
            }
            Begun::Clone { disk, name, to } => {
                block_io::cover!("disks: a crash in a clone");
                if self.exists(&to).await? {
                    let content = self.promise.borrow().snapshots[disk][&name].clone();
                    self.promise.borrow_mut().clones.insert(to, content);
                }
            }
            Begun::DeleteClone { name } => {
                // A deletion that was begun is ended by the next one.
                match self.disks.delete(&name, 9).await {
                    Ok(()) | Err(DiskError::NoDisk { .. }) => {}
                    Err(error) => return Err(failed(error)),
                }
                self.promise.borrow_mut().clones.remove(&name);
            }
            Begun::Revert { disk, name } => {
                block_io::cover!("disks: a crash in a revert");
                let content = self.read(&path(disk)).await?;
                let wanted = self.promise.borrow().snapshots[disk][&name].clone();
                let status = self.disks.status(&path(disk)).await.map_err(failed)?;
                let mut model = self.promise.borrow_mut();
                if content == wanted {
                    model.reverted(disk, &wanted);
                    let then = status.snapshots.iter().find(|one| one.name == name);
                    if then.is_some_and(|then| then.size == status.size) {
                        model.sizes[disk] = status.size;
                    }
                }
            }
            Begun::Reserve { disk, reservations } => {
                block_io::cover!("disks: a crash while reservations are kept");
                let found = self.disks.reservations(&path(disk)).await.map_err(failed)?;
                let mut model = self.promise.borrow_mut();
                if found == reservations {
                    model.reservations[disk] = reservations;
                }
            }
            Begun::Resize { disk, size } => {
                let status = self.disks.status(&path(disk)).await.map_err(failed)?;
                if status.size == size {
                    self.promise.borrow_mut().sizes[disk] = size;
                }
            }
        }
        Ok(())
    }

    async fn snapshots(&self, disk: usize) -> Result<Vec<String>, Failure> {
        let status = self.disks.status(&path(disk)).await.map_err(failed)?;
        Ok(status.snapshots.into_iter().map(|one| one.name).collect())
    }

    async fn exists(&self, path: &str) -> Result<bool, Failure> {
        match self.disks.status(path).await {
            Ok(_) => Ok(true),
            Err(DiskError::NoDisk { .. }) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// What a disk or snapshot has that nobody writes.
    async fn read(&self, path: &str) -> Result<Content, Failure> {
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        let disk = self.disks.open(path, options).await;
        let disk = disk.map_err(|error| failed(error).context(path))?;
        read_all(&disk).await.map_err(|failure| failure.context(path))
    }

    /// All snapshots and clones have what they had, and there are no others.
    pub(crate) async fn check(&self) -> Result<(), Failure> {
        for disk in 0..DISKS {
            let known = self.promise.borrow().snapshots[disk].clone();
            let found = self.snapshots(disk).await?;
            if found.len() != known.len() || !found.iter().all(|name| known.contains_key(name)) {
                let known: Vec<_> = known.keys().collect();
                return Err(format!("disk {disk} has snapshots {found:?}, and not {known:?}")
                    .as_str()
                    .into());
            }
            for (name, content) in &known {
                let found = self.read(&format!("{}@{name}", path(disk))).await?;
                if found != *content {
                    return Err(
                        format!("snapshot {name} of {disk} has {found:?}, and not {content:?}")
                            .as_str()
                            .into(),
                    );
                }
            }
            let reservations = self.disks.reservations(&path(disk)).await.map_err(failed)?;
            if reservations != self.promise.borrow().reservations[disk] {
                return Err(format!("disk {disk} has reservations {reservations:?}")
                    .as_str()
                    .into());
            }
            let status = self.disks.status(&path(disk)).await.map_err(failed)?;
            let used = self.promise.borrow().used[disk];
            if status.identity.map_or(used, |found| found != identity(disk)) {
                return Err(format!("disk {disk} is known by {:?}", status.identity)
                    .as_str()
                    .into());
            }
            let size = status.size;
            if size != self.promise.borrow().sizes[disk] {
                return Err(format!("disk {disk} has {size} bytes").as_str().into());
            }
        }
        let clones = self.promise.borrow().clones.clone();
        for (name, content) in clones {
            let status = self.disks.status(&name).await.map_err(failed)?;
            if status.identity.is_some() || status.reserved {
                return Err(format!("clone {name} is taken for its origin").as_str().into());
            }
            let found = self.read(&name).await?;
            if found != content {
                return Err(format!("clone {name} has {found:?}, and not {content:?}")
                    .as_str()
                    .into());
            }
        }
        Ok(())
    }

    /// An initiator has reservations kept, other ones, or none any more.
    pub(crate) async fn reserve(&self, disk: usize, choice: u64) -> Result<(), Failure> {
        let length = usize::try_from(choice % 4 * 1500).unwrap();
        let reservations = vec![choice.to_le_bytes()[1]; length];
        self.promise.borrow_mut().begun = Some(Begun::Reserve {
            disk,
            reservations: reservations.clone(),
        });
        let kept = self.disks.keep_reservations(&path(disk), &reservations, 4).await;
        kept.map_err(failed)?;
        let mut model = self.promise.borrow_mut();
        model.begun = None;
        model.reservations[disk] = reservations;
        Ok(())
    }

    pub(crate) async fn is_sound(&self) -> Result<(), Failure> {
        let report = self.files.check(CheckOptions::default()).await.map_err(failed)?;
        match report.findings.first() {
            None => Ok(()),
            Some(first) => Err(format!("the file system's check finds {first:?}").as_str().into()),
        }
    }

    /// Opens a disk as a machine does.
    async fn attach(&self, disk: usize) -> Result<(), Failure> {
        let options = DiskOptions {
            mode: self.modes[disk],
            identity: Some(identity(disk)),
            now: 2,
            ..DiskOptions::default()
        };
        let opened = self.disks.open(&path(disk), options).await.map_err(failed)?;
        self.open.borrow_mut()[disk] = Some(Rc::new(opened));
        self.promise.borrow_mut().used[disk] = true;
        self.shorten(disk);
        Ok(())
    }

    /// As who serves disks does: layers that nobody needs are merged meanwhile.
    fn shorten(&self, disk: usize) {
        let (disks, merging) = (self.disks.clone(), Rc::clone(&self.merging));
        let failure = Rc::clone(&self.failure);
        merging.set(merging.get() + 1);
        self.sim.spawn("merge", async move {
            if let Err(error) = disks.merge(&path(disk), 3).await {
                failure
                    .borrow_mut()
                    .get_or_insert(failed(error).context("a merge in the background"));
            }
            merging.set(merging.get() - 1);
        });
    }

    /// Guests on all disks.
    pub(crate) async fn start(&self) -> Result<(), Failure> {
        for disk in 0..DISKS {
            self.attach(disk).await?;
        }
        let guests = Guests::default();
        let open: Vec<OpenDisk> = self.open.borrow().iter().flatten().cloned().collect();
        for writer in 0..WRITERS {
            let (sim, open, promise) = (self.sim.clone(), open.clone(), Rc::clone(&self.promise));
            let (stop, running) = (Rc::clone(&guests.stop), Rc::clone(&guests.running));
            let failure = Rc::clone(&self.failure);
            running.set(running.get() + 1);
            self.sim.spawn(&format!("guest {writer}"), async move {
                let guest = Guest {
                    sim,
                    open,
                    promise,
                    writer,
                };
                if let Err(found) = guest.run(&stop).await {
                    let found = found.context(&format!("guest {writer}"));
                    failure.borrow_mut().get_or_insert(found);
                }
                running.set(running.get() - 1);
            });
        }
        *self.guests.borrow_mut() = guests;
        Ok(())
    }

    /// Waits until the guests have ended, compares, and closes their disks.
    pub(crate) async fn stop(&self) -> Result<(), Failure> {
        let running = {
            let guests = self.guests.borrow();
            guests.stop.set(true);
            Rc::clone(&guests.running)
        };
        while running.get() > 0 || self.merging.get() > 0 {
            self.sim.clock().sleep(Duration::from_micros(100)).await;
        }
        self.trouble()?;
        for disk in 0..DISKS {
            let Some(open) = self.open.borrow_mut()[disk].take() else {
                continue;
            };
            let found = read_all(&*open).await?;
            let known = self.promise.borrow().now(disk);
            if found != known {
                return Err(format!("disk {disk} has {found:?}, and not {known:?}")
                    .as_str()
                    .into());
            }
            let covered = self.promise.borrow().flush_begins(disk);
            self.disks.close(open, 4).await.map_err(failed)?;
            self.promise.borrow_mut().flushed(disk, &covered);
        }
        Ok(())
    }

    /// What went wrong in the background.
    pub(crate) fn trouble(&self) -> Result<(), Failure> {
        self.failure.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn chosen(&self, disk: usize, choice: u64) -> Option<String> {
        let model = self.promise.borrow();
        let names: Vec<_> = model.snapshots[disk].keys().cloned().collect();
        let count = names.len().max(1);
        names
            .into_iter()
            .nth(usize::try_from(choice).unwrap_or(0) % count)
    }

    fn begin(&self, begun: Begun) {
        self.promise.borrow_mut().begun = Some(begun);
    }

    fn ended(&self) {
        self.promise.borrow_mut().begun = None;
    }

    /// A snapshot of some disks, that are being written.
    pub(crate) async fn snapshot(&self, disks: &[usize]) -> Result<(), Failure> {
        if disks
            .iter()
            .any(|disk| self.promise.borrow().snapshots[*disk].len() >= 4)
        {
            return Ok(());
        }
        let name = self.promise.borrow_mut().name("s");
        let from = self.promise.borrow().marks();
        self.begin(Begun::Snapshot {
            disks: disks.to_vec(),
            name: name.clone(),
            from: from.clone(),
        });
        let paths: Vec<String> = disks.iter().map(|disk| path(*disk)).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let new = NewSnapshot {
            name: name.clone(),
            description: String::new(),
            now: 5,
        };
        self.disks.snapshot(&paths, &new).await.map_err(failed)?;
        let mut found = Vec::new();
        for disk in disks {
            found.push((*disk, self.read(&format!("{}@{name}", path(*disk))).await?));
        }
        self.promise.borrow().check_moment(&found, &from)?;
        let mut model = self.promise.borrow_mut();
        for (disk, content) in found {
            model.snapshots[disk].insert(name.clone(), content);
        }
        model.begun = None;
        Ok(())
    }

    pub(crate) async fn delete_snapshot(&self, disk: usize, choice: u64) -> Result<(), Failure> {
        let Some(name) = self.chosen(disk, choice) else {
            return Ok(());
        };
        self.begin(Begun::Delete {
            disk,
            name: name.clone(),
        });
        let deleted = self.disks.delete_snapshot(&path(disk), &name, 5).await;
        deleted.map_err(failed)?;
        self.promise.borrow_mut().snapshots[disk].remove(&name);
        self.ended();
        self.shorten(disk);
        Ok(())
    }

    /// What a redo layer has becomes a part of the disk.
    pub(crate) async fn commit(&self, disk: usize) -> Result<(), Failure> {
        if self.modes[disk] != DiskMode::Append {
            return Ok(());
        }
        self.disks.commit(&path(disk), 5).await.map_err(failed)?;
        self.shorten(disk);
        Ok(())
    }

    pub(crate) async fn clone_snapshot(&self, disk: usize, choice: u64) -> Result<(), Failure> {
        let Some(name) = self.chosen(disk, choice) else {
            return Ok(());
        };
        if self.promise.borrow().clones.len() >= 2 {
            return Ok(());
        }
        let number = self.promise.borrow_mut().name("");
        let to = format!("/c{number}.dsk");
        self.begin(Begun::Clone {
            disk,
            name: name.clone(),
            to: to.clone(),
        });
        let cloned = self.disks.clone_disk(&path(disk), Some(&name), &to, 5).await;
        cloned.map_err(failed)?;
        let mut content = self.promise.borrow().snapshots[disk][&name].clone();
        self.promise
            .borrow_mut()
            .clones
            .insert(to.clone(), content.clone());
        self.ended();
        // It is a disk of its own.
        let options = DiskOptions {
            now: 5,
            ..DiskOptions::default()
        };
        let opened = Rc::new(self.disks.open(&to, options).await.map_err(failed)?);
        let place = choice % PLACES;
        self.promise.borrow_mut().stamp += 1;
        let stamp = self.promise.borrow().stamp;
        // A crash in this may leave either: then it is as if the clone had not been looked at.
        self.begin(Begun::DeleteClone { name: to.clone() });
        put(&*opened, place, stamp, Durability::Durable)
            .await
            .map_err(failed)?;
        content[usize::try_from(place).unwrap()] = whole(stamp);
        self.disks.close(opened, 5).await.map_err(failed)?;
        self.promise.borrow_mut().clones.insert(to, content);
        self.ended();
        Ok(())
    }

    pub(crate) async fn delete_clone(&self) -> Result<(), Failure> {
        let first = self.promise.borrow().clones.keys().next().cloned();
        let Some(name) = first else { return Ok(()) };
        self.begin(Begun::DeleteClone { name: name.clone() });
        self.disks.delete(&name, 5).await.map_err(failed)?;
        self.promise.borrow_mut().clones.remove(&name);
        self.ended();
        Ok(())
    }

    /// The disk grows, or becomes what it was, while it is written.
    pub(crate) async fn resize(&self, disk: usize) -> Result<(), Failure> {
        let size = match self.promise.borrow().sizes[disk] {
            SIZE => SIZE + (192 << 10),
            _ => SIZE,
        };
        self.begin(Begun::Resize { disk, size });
        let resized = self.disks.resize(&path(disk), size, size == SIZE, 5).await;
        resized.map_err(failed)?;
        self.promise.borrow_mut().sizes[disk] = size;
        self.ended();
        self.shorten(disk);
        let open = self.open.borrow()[disk].clone();
        if let Some(open) = open.filter(|_| size > SIZE)
            && get(&*open, (size - 1) / BLOCK).await? != whole(0)
        {
            return Err(format!("disk {disk} has grown, and not by zeroes")
                .as_str()
                .into());
        }
        Ok(())
    }

    /// A disk becomes what it was. The guests are not there meanwhile.
    pub(crate) async fn revert(&self, disk: usize, choice: u64) -> Result<(), Failure> {
        let Some(name) = self.chosen(disk, choice) else {
            return Ok(());
        };
        if self.modes[disk] != DiskMode::Persistent {
            return Ok(());
        }
        self.stop().await?;
        let size = {
            let snapshot = self.disks.status(&path(disk)).await.map_err(failed)?;
            let found = snapshot.snapshots.into_iter().find(|one| one.name == name);
            found.map_or(SIZE, |one| one.size)
        };
        self.begin(Begun::Revert {
            disk,
            name: name.clone(),
        });
        self.disks.revert(&path(disk), &name, 5).await.map_err(failed)?;
        let content = self.promise.borrow().snapshots[disk][&name].clone();
        {
            let mut model = self.promise.borrow_mut();
            model.reverted(disk, &content);
            model.sizes[disk] = size;
            model.begun = None;
        }
        let found = self.read(&path(disk)).await?;
        if found != content {
            return Err(
                format!("disk {disk} is reverted to {found:?}, and not {content:?}")
                    .as_str()
                    .into(),
            );
        }
        self.start().await
    }

    /// Everything in which two snapshots differ is told.
    pub(crate) async fn changed(&self, disk: usize, choice: u64) -> Result<(), Failure> {
        let (Some(since), Some(until)) = (self.chosen(disk, choice), self.chosen(disk, choice / 7)) else {
            return Ok(());
        };
        let mut told = Vec::new();
        let mut from = Some(0);
        while let Some(start) = from {
            let found = self
                .disks
                .changed(&path(disk), &since, Some(&until), start, 5)
                .await;
            let (ranges, next) = match found {
                Ok(found) => found,
                // The one was not made after the other.
                Err(DiskError::State { .. }) => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            told.extend(ranges);
            from = next;
        }
        let model = self.promise.borrow();
        let (old, new) = (&model.snapshots[disk][&since], &model.snapshots[disk][&until]);
        for (place, (old, new)) in (0..PLACES).zip(old.iter().zip(new)) {
            let at = place * BLOCK;
            let is_told = told
                .iter()
                .any(|range| range.offset <= at && at + BLOCK <= range.offset + range.length);
            if old != new && !is_told {
                return Err(format!(
                    "disk {disk}: place {place} differs between {since} and {until}: {told:?}"
                )
                .as_str()
                .into());
            }
        }
        block_io::cover!("disks: changes between two snapshots");
        Ok(())
    }

    /// Nothing is left of what is not needed.
    pub(crate) async fn clean_up(&self) -> Result<(), Failure> {
        let clones: Vec<_> = self.promise.borrow().clones.keys().cloned().collect();
        for name in clones {
            self.disks.delete(&name, 6).await.map_err(failed)?;
            self.promise.borrow_mut().clones.remove(&name);
        }
        for disk in 0..DISKS {
            while self.chosen(disk, 0).is_some() {
                self.delete_snapshot(disk, 0).await?;
            }
            if self.modes[disk] == DiskMode::Append {
                match self.disks.commit(&path(disk), 6).await {
                    Ok(()) | Err(DiskError::Decided { .. }) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        while self.merging.get() > 0 {
            self.sim.clock().sleep(Duration::from_micros(100)).await;
        }
        self.trouble()?;
        self.files.settled().await;
        for disk in 0..DISKS {
            let mut whole = false;
            // What the file system merges by itself may be in the way of the first try.
            for _ in 0..2 {
                whole = self.disks.merge(&path(disk), 6).await.map_err(failed)?;
                self.files.settled().await;
                if whole {
                    break;
                }
                block_io::cover!("disks: a merge is asked for once more");
            }
            let status = self.disks.status(&path(disk)).await.map_err(failed)?;
            if !whole || status.depth != 1 {
                return Err(format!("disk {disk} is not whole ({whole}) at last: {status:?}")
                    .as_str()
                    .into());
            }
            let (found, known) = (self.read(&path(disk)).await?, self.promise.borrow().now(disk));
            if found != known {
                return Err(format!("disk {disk} has {found:?} at last, and not {known:?}")
                    .as_str()
                    .into());
            }
        }
        let names = self.files.list("/").await.map_err(failed)?;
        let left: Vec<_> = names
            .into_iter()
            .map(|entry| entry.name)
            .filter(|name| !name.ends_with(".dsk") && !name.ends_with(".disk"))
            .collect();
        match left.is_empty() {
            true => Ok(()),
            false => Err(format!("{left:?} are left").as_str().into()),
        }
    }

    pub(crate) async fn close(self) -> Result<(), Failure> {
        let files = self.files.clone();
        drop(self);
        files.close().await.map_err(failed)
    }
}

async fn read_all<D: BlockDevice>(disk: &D) -> Result<Content, Failure> {
    let mut found = Vec::new();
    for place in 0..PLACES {
        found.push(get(disk, place).await?);
    }
    Ok(found)
}

/// One that writes to all disks in turn.
struct Guest {
    sim: Sim,
    open: Vec<OpenDisk>,
    promise: Promise,
    writer: usize,
}

impl Guest {
    async fn run(&self, stop: &Cell<bool>) -> Result<(), Failure> {
        let mut disk = self.sim.random(|rng| rng.index(DISKS));
        while !stop.get() {
            disk = (disk + 1) % DISKS;
            self.write(disk).await?;
            if self.sim.random(|rng| rng.chance(1, 5)) {
                let covered = self.promise.borrow().flush_begins(disk);
                self.open[disk].flush().await.map_err(failed)?;
                self.promise.borrow_mut().flushed(disk, &covered);
            }
            let pause = self.sim.random(|rng| rng.below(60));
            self.sim.clock().sleep(Duration::from_micros(pause)).await;
        }
        Ok(())
    }

    async fn write(&self, disk: usize) -> Result<(), Failure> {
        let (place, way) = self.sim.random(|rng| (rng.below(OWN), rng.below(12)));
        let place = self.writer as u64 * OWN + place;
        let value = match way {
            0 | 1 => 0,
            _ => {
                self.promise.borrow_mut().stamp += 1;
                self.promise.borrow().stamp
            }
        };
        let entry = Entry {
            disk,
            place,
            value: whole(value),
        };
        self.promise.borrow_mut().write_begins(self.writer, entry);
        let open = &*self.open[disk];
        let done = match way {
            0 => open.discard(place * BLOCK, BLOCK).await,
            1 => open.write_zeroes(place * BLOCK, BLOCK, ZeroMode::MayUnmap).await,
            2 => put(open, place, value, Durability::Durable).await,
            _ => put(open, place, value, Durability::Volatile).await,
        };
        done.map_err(failed)?;
        self.promise.borrow_mut().written(self.writer, entry, way == 2);
        if self.sim.random(|rng| rng.chance(1, 6)) {
            let found = get(open, place).await?;
            if found != whole(value) {
                return Err(
                    format!("disk {disk} has {found:?} at {place} just after {value} was written")
                        .as_str()
                        .into(),
                );
            }
        }
        Ok(())
    }
}
