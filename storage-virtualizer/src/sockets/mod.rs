//! What the servers on sockets (NBD, iSCSI) have in common: memory for the data of requests, a buffer for what comes in,
//! how other threads reach them, and how they end.

pub(crate) mod buffers;
pub(crate) mod ending;
pub(crate) mod input;
pub(crate) mod reach;
pub(crate) mod slot;
