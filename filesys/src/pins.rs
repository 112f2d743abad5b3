//! Pins: promises that the blocks of a frozen image stay where and as they are, while somebody else reads them from the devices.
//!
//! A pin holds a frozen file and all its ancestors: none of them is relocated, absorbed or deleted until the pin is released, or its time
//! is over. Pins survive crashes.

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need};
use crate::error::{FsError, Refusal};
use crate::file_core::FileCore;
use crate::open::FileSystem;
use crate::record::{LARGEST, PinRecord, Record};
use crate::state::Stop;
use crate::units::FileId;

/// A pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// Its number.
    pub id: u64,
    /// The frozen file.
    pub file: FileId,
    /// When it ends, in seconds since 1970.
    pub until: u64,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Pins a frozen file until a time in seconds since 1970.
    ///
    /// # Errors
    /// There is none, it is not frozen, or it is being merged.
    pub async fn pin(&self, path: &str, until: u64) -> Result<Pin, FsError> {
        let core = self.core();
        let id = core.state.new_id()?;
        let (group, pin) = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let file = core.find_regular(path)?;
                if !file.inode.borrow().is_frozen() {
                    return Err(FsError::State {
                        object: path.to_owned(),
                        problem: "is written to: only a frozen file can be pinned, so make a snapshot first"
                            .into(),
                    }
                    .into());
                }
                for ancestor in core.chain(file.id)?.iter() {
                    if ancestor.inode.borrow().flags.has(crate::inode::Flags::ABSORBED) {
                        return Err(FsError::Busy {
                            object: path.to_owned(),
                            problem: "it, or a layer below it, is being merged: try again later".into(),
                        }
                        .into());
                    }
                }
                let pin = Pin {
                    id,
                    file: file.id,
                    until,
                };
                Ok((vec![Record::Pin(record_of(pin))], pin))
            })
            .await?;
        core.commit(group).await?;
        Ok(pin)
    }

    /// Ends a pin.
    ///
    /// # Errors
    /// There is no such pin.
    pub async fn unpin(&self, id: u64) -> Result<(), FsError> {
        let core = self.core();
        let (group, ()) = core
            .transact(LARGEST, Need::Freeing, |state| {
                if !state.pins.borrow().contains_key(&id) {
                    return Err(FsError::State {
                        object: format!("pin {id}"),
                        problem: "there is none: it was released, or its time was over".into(),
                    }
                    .into());
                }
                Ok((vec![Record::Unpin { pin: id }], ()))
            })
            .await?;
        core.housekeeping.set(true);
        core.changed.notify();
        core.commit(group).await
    }

    /// Ends all pins whose time is over.
    ///
    /// # Errors
    /// The journal failed.
    pub async fn expire_pins(&self, now: u64) -> Result<Vec<Pin>, FsError> {
        let over: Vec<Pin> = self.pins().into_iter().filter(|pin| pin.until <= now).collect();
        for pin in &over {
            self.unpin(pin.id).await?;
        }
        Ok(over)
    }

    /// All pins.
    pub fn pins(&self) -> Vec<Pin> {
        let pins = self.core().state.pins.borrow();
        pins.values()
            .map(|record| Pin {
                id: record.pin,
                file: record.file,
                until: record.until,
            })
            .collect()
    }
}

fn record_of(pin: Pin) -> PinRecord {
    PinRecord {
        pin: pin.id,
        file: pin.file,
        until: pin.until,
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// The pin that holds a file, itself or as an ancestor.
    pub(crate) fn pin_of(&self, file: &FileCore) -> Result<Option<u64>, Stop> {
        let pins: Vec<PinRecord> = self.state.pins.borrow().values().copied().collect();
        for pin in pins {
            if self
                .chain(pin.file)?
                .iter()
                .any(|ancestor| ancestor.id == file.id)
            {
                return Ok(Some(pin.pin));
            }
        }
        Ok(None)
    }

    /// Refuses what a pin forbids.
    pub(crate) fn check_unpinned(&self, name: &str, file: &FileCore) -> Result<(), Refusal> {
        match self.pin_of(file)? {
            None => Ok(()),
            Some(pin) => Err(FsError::Busy {
                object: name.to_owned(),
                problem: format!("pin {pin} holds its blocks: release it, or wait until its time is over"),
            }
            .into()),
        }
    }
}
