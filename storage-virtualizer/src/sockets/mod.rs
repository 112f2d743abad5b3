//! What the servers on sockets (NBD, iSCSI) have in common: memory for the data of requests, and a buffer for what comes in.

pub(crate) mod buffers;
pub(crate) mod input;
