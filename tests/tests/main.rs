//! All system stories: one program, so that the longest ones run beside others.

mod backup;
mod boot;
mod console;
mod disk_settings;
mod disks;
mod errors;
mod expanded_api;
mod file_systems;
mod hotplug;
mod images;
mod iscsi;
mod manager;
mod memory;
mod network;
mod network_kernels;
mod ordinary_user;
mod platform;
mod pool;
mod power;
mod sandbox;
mod scsi_disks;
mod scsi_tools;
mod served_disks;
mod shared_scsi;
mod time;
mod vhost_user;
