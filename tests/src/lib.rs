//! System stories: whole-VM tests that run directly or in the lab.
