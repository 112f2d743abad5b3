//! Looks at devices, given in any order, and finds those of pools. Writes nothing.

use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::{BlockDevice, IoError};

use super::inspect::{Content, inspect};
use super::media::{Held, Known, LabelCopies, Media, MediaError, open};
use super::together;
use crate::format::LabelError;
use crate::model::Uuid;

/// A device of a pool.
#[derive(Debug)]
pub(crate) struct Found<D> {
    pub(crate) path: String,
    pub(crate) media: Media<D>,
    pub(crate) copies: LabelCopies,
    /// Its newest configuration.
    pub(crate) held: Option<Held>,
}

/// Why a device plays no part.
#[derive(Debug, thiserror::Error)]
pub enum ProblemKind {
    /// It is not of a pool.
    #[error("it is no device of a pool: it carries {0}")]
    NotOurs(Content),
    /// It fails.
    #[error("it cannot be read")]
    Io(#[from] IoError),
    /// It is of a pool, and cannot be used.
    #[error(transparent)]
    Media(MediaError),
}

/// A device that plays no part.
#[derive(Debug, thiserror::Error)]
#[error("device {path} is left out: {kind}")]
pub struct Problem {
    /// Its name as given.
    pub path: String,
    /// Why.
    #[source]
    pub kind: ProblemKind,
}

/// What was found on some devices.
#[derive(Debug)]
pub struct Scan<D> {
    pub(crate) found: Vec<Found<D>>,
    problems: Vec<Problem>,
}

impl<D> Scan<D> {
    /// The devices that play no part, and why.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The pools that were found, with their names as the labels have them.
    pub fn pools(&self) -> BTreeMap<Uuid, String> {
        let labels = self.found.iter().map(|found| &found.media.label);
        labels
            .map(|label| (label.pool, label.pool_name.clone()))
            .collect()
    }
}

async fn look<D: BlockDevice>(path: &str, device: &Rc<D>, known: &Known) -> Result<Found<D>, Problem> {
    let kind = match open(device, known).await {
        Ok((media, copies, held)) => {
            let path = path.to_owned();
            return Ok(Found {
                path,
                media,
                copies,
                held,
            });
        }
        Err(MediaError::Io(error)) => ProblemKind::Io(error),
        Err(MediaError::Label(LabelError::Absent)) => match inspect(&**device).await {
            Ok(content) => ProblemKind::NotOurs(content),
            Err(error) => ProblemKind::Io(error),
        },
        Err(error) => ProblemKind::Media(error),
    };
    let path = path.to_owned();
    Err(Problem { path, kind })
}

/// Reads labels and configurations of `devices`, all at once.
pub async fn scan<D: BlockDevice>(devices: &[(String, Rc<D>)]) -> Scan<D> {
    let known = Known::default();
    let looks = devices.iter().map(|(path, device)| look(path, device, &known));
    let mut scan = Scan {
        found: Vec::new(),
        problems: Vec::new(),
    };
    for result in together::all(looks).await {
        match result {
            Ok(found) => scan.found.push(found),
            Err(problem) => scan.problems.push(problem),
        }
    }
    scan
}
