//! What a file may hold. Copies of a model share it until it changes, and what every recovery asks for is computed once: a script has
//! thousands of crashes, and between two of them hardly any file is written.

use std::cell::OnceCell;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use block_io::sim::SectorModel;

#[derive(Debug, Default)]
struct Shared {
    sectors: SectorModel,
    fingerprint: OnceCell<u64>,
    crashed: OnceCell<Content>,
    killed_fingerprint: OnceCell<u64>,
    killed: OnceCell<Content>,
}

impl Clone for Shared {
    fn clone(&self) -> Self {
        Self {
            sectors: self.sectors.clone(),
            ..Self::default()
        }
    }
}

/// A [`SectorModel`] that is cheap to copy.
#[derive(Debug, Clone, Default)]
pub(crate) struct Content(Rc<Shared>);

impl Content {
    pub(crate) fn fingerprint(&self) -> u64 {
        *self.0.fingerprint.get_or_init(|| self.0.sectors.fingerprint())
    }

    /// As [`Self::fingerprint`], for a kill.
    pub(crate) fn killed_fingerprint(&self) -> u64 {
        *self
            .0
            .killed_fingerprint
            .get_or_init(|| self.0.sectors.killed_fingerprint())
    }

    /// What is known after the process was killed now, and had everything kept that it answered.
    pub(crate) fn after_a_kill(&self) -> Self {
        let killed = self.0.killed.get_or_init(|| {
            let mut sectors = self.0.sectors.clone();
            sectors.killed();
            Self(Rc::new(Shared {
                sectors,
                ..Shared::default()
            }))
        });
        killed.clone()
    }

    /// What is known after a crash now.
    pub(crate) fn after_a_crash(&self) -> Self {
        let crashed = self.0.crashed.get_or_init(|| {
            let mut sectors = self.0.sectors.clone();
            sectors.crashed();
            Self(Rc::new(Shared {
                sectors,
                ..Shared::default()
            }))
        });
        crashed.clone()
    }
}

impl Deref for Content {
    type Target = SectorModel;

    fn deref(&self) -> &SectorModel {
        &self.0.sectors
    }
}

impl DerefMut for Content {
    fn deref_mut(&mut self) -> &mut SectorModel {
        let shared = Rc::make_mut(&mut self.0);
        shared.fingerprint.take();
        shared.crashed.take();
        shared.killed_fingerprint.take();
        shared.killed.take();
        &mut shared.sectors
    }
}
