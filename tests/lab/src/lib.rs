//! The lab: a software-emulated AMD host whose own KVM runs smsvmm.
