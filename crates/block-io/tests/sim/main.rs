//! The simulator is proven with small systems: the right one survives everything, and each wrong one is caught.

mod disk;
mod executor;
mod faults;
mod history;
mod proof;
mod superblock;
