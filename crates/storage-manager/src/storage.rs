//! A pool that is open together with its file system.
//!
//! Everything lives on one worker of block-io: the devices, the pool, the file system, the open files. Who serves disks to guests
//! opens a [`Storage`] on a worker and takes files from it; a command does the same for a moment.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use api::file::META_VOLUME;
use api::storage::PoolEvent;
use api::{Problem, ProblemKind};
use block_io::{LastingMemory, WorkerClock};
use filesys::{Copies, GivenVolume, Redundancy};

use crate::device::{self, Device, DevicePaths};
use crate::disks::Disks;
use crate::member::{Member, Sheet};
use crate::offline::{self, Force};
use crate::operation::Pool;
use crate::problem::{of_files, of_pool};
use crate::told::Told;
use crate::{file_view, places, tail, view, volumes};

/// What files lie on.
pub type Volume = volume_manager::Volume<Member, WorkerClock>;
/// The file system of a pool.
pub type FileSystem = filesys::FileSystem<Volume, WorkerClock>;
/// An open file, which is a disk.
pub type File = filesys::File<Volume, WorkerClock>;

/// How a pool is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing is changed, and others may look at the same time. What a recovery would write stays in memory.
    Read,
    /// Files are changed; nobody else has the pool open.
    Write,
}

/// An open pool, with its file system if it has one. To be used by tasks of the worker on which it was opened.
pub struct Storage {
    pub(crate) pool: Pool,
    access: Access,
    /// Its users outlive this process.
    serves: bool,
    files: Option<FileSystem>,
    pub(crate) disks: Option<Disks>,
    /// Where the file system finds other copies of what is damaged.
    redundancy: Redundancy,
    /// What a person should know of the devices.
    pub(crate) notes: Vec<String>,
    pub(crate) told: Told,
}

impl Storage {
    /// Opens a pool and its file system. The caller is a task of a worker.
    ///
    /// # Errors
    /// The devices do not make a pool, one is in use, or the file system cannot be opened.
    pub async fn open(paths: &DevicePaths, access: Access) -> Result<Self, Problem> {
        Self::open_pool(paths, access).await?.with_files().await
    }

    /// As [`Self::open`] for changes, by a server whose clients outlive it: what it has answered is found by the next one if it is killed.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn serve(paths: &DevicePaths) -> Result<Self, Problem> {
        let storage = Self::open_pool(paths, Access::Write).await?;
        let serves = true;
        Self { serves, ..storage }.with_files().await
    }

    async fn with_files(self) -> Result<Self, Problem> {
        let mut storage = self;
        match storage.open_files().await {
            Ok(()) => {
                if storage.access == Access::Write {
                    storage.pool.let_jobs_begin();
                }
                Ok(storage)
            }
            Err(problem) => {
                // What matters is why there are no files.
                let _ = storage.pool.close().await;
                Err(problem)
            }
        }
    }

    /// Opens a pool without looking for files. Its jobs wait ([`Pool::let_jobs_begin`]) until the file system has said what is in
    /// use, or it is known that it will not.
    pub(crate) async fn open_pool(paths: &DevicePaths, access: Access) -> Result<Self, Problem> {
        match access {
            Access::Write => {
                let (pool, notes) = offline::open(paths, &Force::No, Vec::new()).await?;
                Ok(Self::of(pool, notes))
            }
            Access::Read => {
                let opened = device::open_all(paths, device::Access::Read).await?;
                let notes = opened.absent.iter().map(|(_, problem)| problem.detail.clone());
                let notes = notes.collect();
                Ok(Self::covered(open_covered(opened.devices).await?, notes))
            }
        }
    }

    /// A pool that is open for changes, without files so far.
    pub(crate) fn of(pool: Pool, notes: Vec<String>) -> Self {
        Self {
            pool,
            access: Access::Write,
            serves: false,
            files: None,
            disks: None,
            redundancy: Redundancy::default(),
            notes,
            told: Told::default(),
        }
    }

    /// A pool over devices that are not changed, without files so far.
    pub(crate) fn covered(pool: Pool, notes: Vec<String>) -> Self {
        Self {
            pool,
            access: Access::Read,
            serves: false,
            files: None,
            disks: None,
            redundancy: Redundancy::default(),
            notes,
            told: Told::default(),
        }
    }

    /// Opens the file system, if there is one.
    pub(crate) async fn open_files(&mut self) -> Result<(), Problem> {
        if self.files.is_some() || !self.has_meta_volume() {
            return Ok(());
        }
        let (meta, volumes) = (self.meta_volume()?, self.data_volumes()?);
        let redundancy = redundancy(&meta, &volumes);
        let options = filesys::OpenOptions {
            read_only: self.access == Access::Read,
            redundancy: redundancy.clone(),
            tail: self.tail(),
            ..filesys::OpenOptions::default()
        };
        let opened = FileSystem::open(meta, volumes, options, WorkerClock::new());
        let opened = Box::pin(opened).await;
        self.set_files(opened.map_err(|error| of_files(&error))?, redundancy);
        match self.access {
            Access::Read => Ok(()),
            // A crash may have come between a change of a volume and its being told.
            Access::Write => {
                volumes::refresh(self).await?;
                places::expire(self).await?;
                self.tell_usage(true)
            }
        }
    }

    fn tail(&self) -> Option<Rc<dyn LastingMemory>> {
        match self.access {
            Access::Read => None,
            Access::Write => tail::of_pool(self.pool.configuration().pool, self.serves),
        }
    }

    /// The file system.
    ///
    /// # Errors
    /// The pool has none.
    pub fn files(&self) -> Result<&FileSystem, Problem> {
        self.files.as_ref().ok_or_else(|| {
            let name = &self.pool.configuration().name;
            Problem::new(ProblemKind::Conflict, format!("pool {name} has no file system"))
                .about(name)
                .remedy("`smsvmm file format` makes one")
        })
    }

    pub(crate) fn set_files(&mut self, files: FileSystem, redundancy: Redundancy) {
        self.disks = Some(Disks::new(files.clone()));
        self.files = Some(files);
        self.redundancy = redundancy;
    }

    /// The copies of a volume that joins the file system. It is set before data can be there.
    pub(crate) fn cover(&self, volume: &GivenVolume<Volume>) {
        let copies = Rc::clone(&volume.device) as Rc<dyn Copies>;
        self.redundancy.set_volume(volume.uuid, Some(copies));
    }

    /// A volume has left the file system.
    pub(crate) fn uncover(&self, uuid: [u8; 16]) {
        self.redundancy.set_volume(uuid, None);
    }

    /// Opens a file.
    ///
    /// # Errors
    /// There is none, or it cannot be used in this way now.
    pub async fn file(&self, path: &str, access: filesys::Access) -> Result<File, Problem> {
        let opened = self.files()?.open_file(path, access).await;
        opened.map_err(|error| of_files(&error))
    }

    /// What happened since this was asked last.
    pub fn take_events(&self) -> Vec<PoolEvent> {
        self.gather_events();
        self.told.take()
    }

    /// Tells who listens what has happened, at once, and keeps it for who asks.
    pub(crate) fn gather_events(&self) {
        let mut events: Vec<PoolEvent> = self.pool.take_events().iter().map(view::event).collect();
        if let Some(files) = &self.files {
            events.extend(files.take_events().iter().filter_map(file_view::event));
        }
        events.into_iter().for_each(|event| self.told.tell(event));
    }

    /// Closes everything after something was done; with what came of that, what happened. The first failure counts.
    pub(crate) async fn end<T>(self, done: Result<T, Problem>) -> Result<(T, Vec<PoolEvent>), Problem> {
        let mut events = self.take_events();
        if self.access == Access::Write {
            let files = self.close_files().await;
            events.extend(self.take_events());
            let pool = self.close_pool().await;
            let done = done?;
            return files.and(pool).map(|()| (done, events));
        }
        done.map(|done| (done, events))
    }

    /// Closes the file system, then the pool. Files that are still open fail from then on.
    ///
    /// # Errors
    /// Something could not be written. What was acknowledged is not lost by that.
    pub async fn close(self) -> Result<(), Problem> {
        self.end(Ok(())).await.map(drop)
    }

    /// Has the pool know what of its volumes is in use, so that it copies no more than that; or forget it.
    pub(crate) fn tell_usage(&self, tell: bool) -> Result<(), Problem> {
        let Some(files) = &self.files else { return Ok(()) };
        for volume in self.data_volumes()? {
            let usage = files.usage_of_volume(volume.uuid).filter(|_| tell);
            volume.device.set_usage(usage);
        }
        Ok(())
    }

    pub(crate) async fn close_files(&self) -> Result<(), Problem> {
        self.tell_usage(false)?;
        match &self.files {
            Some(files) => files.close().await.map_err(|error| of_files(&error)),
            None => Ok(()),
        }
    }

    /// Closes the file system, and goes on without it.
    pub(crate) async fn end_files(&mut self) -> Result<(), Problem> {
        self.close_files().await?;
        self.disks = None;
        self.files = None;
        // It has all volumes open, which keeps them from being deleted.
        self.redundancy = Redundancy::default();
        Ok(())
    }

    async fn close_pool(self) -> Result<(), Problem> {
        let name = self.pool.configuration().name.clone();
        drop(self.disks);
        drop(self.files);
        drop(self.redundancy);
        self.pool.close().await.map_err(|error| of_pool(&name, error))
    }

    /// Whether there is a volume for metadata.
    pub(crate) fn has_meta_volume(&self) -> bool {
        let config = self.pool.configuration();
        config.volumes.iter().any(|volume| volume.name == META_VOLUME)
    }

    /// The volume for metadata.
    pub(crate) fn meta_volume(&self) -> Result<Rc<Volume>, Problem> {
        let volume = self.pool.volume(META_VOLUME);
        Ok(Rc::new(volume.map_err(|error| of_pool(META_VOLUME, error))?))
    }

    /// A volume as the file system is given it.
    pub(crate) fn given(&self, name: &str) -> Result<GivenVolume<Volume>, Problem> {
        let failed = |error| of_pool(name, error);
        let device = Rc::new(self.pool.volume(name).map_err(failed)?);
        let config = self.pool.configuration();
        let model = config.volumes.iter().find(|volume| volume.name == name);
        let model =
            model.ok_or_else(|| failed(volume_manager::PoolError::Unknown(format!("volume {name}"))))?;
        Ok(GivenVolume {
            uuid: model.uuid.0.to_be_bytes(),
            name: name.to_owned(),
            class: model.attributes.class.clone(),
            device,
        })
    }

    /// All volumes but the one for metadata.
    pub(crate) fn data_volumes(&self) -> Result<Vec<GivenVolume<Volume>>, Problem> {
        let config = self.pool.configuration();
        let names = config.volumes.iter().map(|volume| volume.name.as_str());
        let data = names.filter(|name| *name != META_VOLUME);
        data.map(|name| self.given(name)).collect()
    }
}

/// Where a file system finds other copies of what a checksum shows to be damaged.
pub(crate) fn redundancy(meta: &Rc<Volume>, volumes: &[GivenVolume<Volume>]) -> Redundancy {
    let redundancy = Redundancy::default();
    redundancy.set_meta(Some(Rc::clone(meta) as Rc<dyn Copies>));
    for volume in volumes {
        redundancy.set_volume(volume.uuid, Some(Rc::clone(&volume.device) as Rc<dyn Copies>));
    }
    redundancy
}

/// Opens a pool whose devices are not changed. Its jobs do nothing.
pub(crate) async fn open_covered(devices: Vec<(String, Rc<Device>)>) -> Result<Pool, Problem> {
    let devices = devices.into_iter();
    let devices = devices.map(|(path, device)| (path, Rc::new(Member::Covered(Sheet::new(device)))));
    let options = offline::options(volume_manager::store::Force::No)?;
    let pool = Box::pin(Pool::open(devices.collect(), &options, WorkerClock::new())).await;
    // Jobs wait for ever: their work would fill the memory, and is for nothing.
    pool.map_err(|error| of_pool("pool", error))
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use api::file::FileOperation;
    use api::storage::{LayoutKind, NewDevice, Operation, Shape};
    use block_io::{Worker, WorkerOptions};
    use volume_manager::model::JobKind;

    use super::*;
    use crate::{Flow, Notice};

    #[test]
    fn jobs_that_go_on_when_a_pool_is_opened_leave_out_what_no_file_uses() {
        let go_on = |_: Notice<'_>| Flow::GoOn;
        let folder = tempfile::tempdir().unwrap();
        let file = |number: u32| {
            let path = folder.path().join(format!("d{number}"));
            std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let paths: Vec<String> = (0..2).map(file).collect();
        let device = |path: &String| NewDevice {
            path: path.clone(),
            spare: false,
            class: String::new(),
            enclosure: String::new(),
            force: false,
        };
        crate::create("tank", paths.iter().map(device).collect(), &mut go_on.clone()).unwrap();
        let format = FileOperation::Format {
            meta_size: None,
            meta_copies: None,
            force: false,
        };
        crate::execute_file(paths.clone(), format, &mut go_on.clone()).unwrap();
        let volume = Operation::CreateVolume {
            name: "data".into(),
            size: 16 << 20,
            block: 4096,
            shape: Shape {
                layout: LayoutKind::Mirror,
                columns: 0,
                copies: 0,
                stripe_unit: 0,
                class: String::new(),
                devices: Vec::new(),
            },
            read_policy: api::storage::ReadPolicy::default(),
            raw: false,
        };
        crate::execute(paths.clone(), Force::No, volume, &mut go_on.clone()).unwrap();

        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        worker.run(move || async move {
            let (pool, _) = offline::open(&paths, &Force::No, Vec::new()).await.unwrap();
            let config = pool.configuration();
            let data = config
                .volumes
                .iter()
                .find(|volume| volume.name == "data")
                .unwrap();
            let scrub = JobKind::Scrub {
                volume: Some(data.id),
            };
            // All of the volume would take it an hour.
            let job = pool.start(scrub, 4096).await.unwrap();
            pool.close().await.unwrap();

            let storage = Storage::open(&paths, Access::Write).await.unwrap();
            assert_eq!(storage.pool.job(job).unwrap().done, 0);
            storage.pool.wait(job).await.unwrap();
            storage.close().await.unwrap();
        });
    }
}
