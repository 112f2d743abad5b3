//! What a virtual device and a transport agree on: queues, interrupts, activation.
