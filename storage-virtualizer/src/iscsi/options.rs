//! How a target serves, and why it cannot.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_io::{ListenAddress, ListenError};

use super::access::{Access, AccessError, NameError};
use crate::scsi::{TargetError, Unit};

/// The most that one command moves, in bytes; announced as such where the unit's options say so.
pub const MAX_TRANSFER: usize = 32 << 20;

/// A target: a name for logical units, and who may use them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiTarget {
    /// Its name; no other target has it.
    pub name: String,
    /// What people call it; may be empty.
    pub alias: String,
    /// Who may log in.
    pub access: Vec<Access>,
}

impl IscsiTarget {
    /// A target for everybody.
    pub fn open(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            alias: String::new(),
            access: vec![Access::everybody()],
        }
    }

    pub(super) fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name)
    }
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct IscsiOptions {
    /// The portals: where to listen. TCP, and Unix sockets for tests.
    pub listen: Vec<ListenAddress>,
    /// The targets, one at least. All portals lead to all of them.
    pub targets: Vec<IscsiTarget>,
    /// Most connections at once; further ones are closed at once.
    pub connections: usize,
    /// Most connections that have not logged in yet.
    pub logins: usize,
    /// Most bytes of data of the commands of a connection; one command is always served.
    pub memory: usize,
    /// How long a login may take.
    pub login: Duration,
    /// How long an initiator may take to accept anything that waits for it.
    pub stall: Duration,
    /// After how long a silence an initiator is asked whether it is there, and how long it has to answer.
    pub ping: (Duration, Duration),
    /// How long initiators have to log out when the target stops, and how long their commands are waited for.
    pub patience: (Duration, Duration),
}

impl Default for IscsiOptions {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            targets: Vec::new(),
            connections: 64,
            logins: 16,
            memory: 32 << 20,
            login: Duration::from_secs(15),
            stall: Duration::from_secs(60),
            ping: (Duration::from_secs(15), Duration::from_secs(45)),
            patience: (Duration::from_secs(3), Duration::from_secs(10)),
        }
    }
}

/// A logical unit with its disk.
#[derive(Debug)]
pub struct IscsiUnit<D> {
    /// The target that it belongs to: its place in [`IscsiOptions::targets`].
    pub target: usize,
    /// Its number.
    pub lun: u16,
    /// Everything of it but the disk.
    pub unit: Arc<Unit>,
    /// The disk.
    pub disk: Rc<D>,
}

/// The target cannot start.
#[derive(Debug, thiserror::Error)]
pub enum IscsiServerError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// There is no target, or not that of a unit.
    #[error("an iSCSI server needs a target for each logical unit")]
    NoTarget,
    /// Two targets have one name.
    #[error("there are two targets {0}: give each a name of its own")]
    Twice(String),
    /// A target's name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Who may log in is not clear.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A unit cannot have its number.
    #[error(transparent)]
    Unit(#[from] TargetError),
    /// Nothing is added to a target that stops.
    #[error("the iSCSI target is about to end")]
    Stopping,
    /// The host lacks something.
    #[error("cannot start the iSCSI target")]
    System(#[from] io::Error),
    /// The worker has ended.
    #[error("cannot start the iSCSI target: its worker has ended")]
    NoWorker,
}
